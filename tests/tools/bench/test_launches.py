"""Which micro-batches wait for launches is arithmetic; what a launch costs is measured, on any machine."""

import pytest
import torch

from act24.llama import PRESETS
from act24.tools.bench import launches
from act24.tools.commands import doctor


def test_small_batches_of_small_models_wait_first():
    """2 ms a block and 790 TFLOP/s, about what an H200's host takes: 130m waits at 64 rows, not at 256."""
    bound = {
        (name, rows): launches.is_launch_bound(PRESETS[name], rows * 256, 2e-3, 790e12)
        for name in ("llama-60m", "llama-130m", "llama-1b", "llama-7b")
        for rows in (64, 256)
    }
    assert {key for key, waits in bound.items() if waits} == {
        ("llama-60m", 64),
        ("llama-130m", 64),
    }


@pytest.mark.parametrize("name", ["llama-130m", "llama-7b"])
def test_the_limit_is_where_both_take_equally_long(name):
    config, tokens, rate = PRESETS[name], 16384, 1e14
    width, blocks = config.hidden_size, config.num_hidden_layers
    weights = blocks * (4 * width**2 + 3 * width * config.intermediate_size) + width * config.vocab_size
    launch = 6 * tokens * weights / rate / blocks
    assert launches.is_launch_bound(config, tokens, 1.001 * launch, rate)
    assert not launches.is_launch_bound(config, tokens, 0.999 * launch, rate)


def test_a_launch_is_timed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda block, fullgraph: block)  # the compiler takes half a minute
    assert 0 < launches.launch_seconds(torch.device("cpu")) < 1


def test_doctor_says_which(monkeypatch):
    monkeypatch.setattr(doctor, "launch_seconds", lambda device: 2e-3)
    monkeypatch.setattr(doctor, "product_rate", lambda device: 790e12)
    found = {f.subject: f.finding for f in doctor._launches(torch.device("cuda"))}
    assert found["launches"].startswith("2.00 ms")
    assert found["launch-bound without CUDA graphs, 256 rows of 256"].startswith("none of ")
    bound = found["launch-bound without CUDA graphs, 64 rows of 256"]
    assert bound.startswith("llama-60m, llama-130m, llama-350m of ")
    assert doctor._launches(torch.device("cpu")) == []
