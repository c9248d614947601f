"""The line at a run's start: which path each 2:4 pass takes on this machine, and why."""

import pytest
import torch

from act24.sparse24.feed_forward.operation import FORMS
from act24.tools.run import path
from act24.tools.run.build import build
from act24.tools.run.path import path_text

CPU = torch.device("cpu")
PLAIN = "plain PyTorch (kernels and 2:4 products need a GPU)"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], f"path: CPU, float32, not compiled; activation24 at 2: {PLAIN}"),
        (["passes=[]"], "path: CPU, float32, not compiled"),
        (["train.compile=on", "passes=[]"], "path: CPU, float32, compiled"),
        (
            ['passes=[{use="weight24"}]', "train.dtype=bfloat16"],  # 7 linears a block, two blocks
            f"path: CPU, bfloat16, not compiled; weight24 at 14: {PLAIN}",
        ),
        (
            ['passes=[{use="weight24", scope="mlp"}, {use="fp8"}]', "train.dtype=bfloat16"],
            f"path: CPU, bfloat16, not compiled; weight24 at 6: e4m3 in {PLAIN}; fp8 at 8: e4m3 in {PLAIN}",
        ),
    ],
)
def test_on_a_cpu(tiny, overrides, said):
    recipe = tiny(*overrides)
    assert path_text(build(recipe, CPU).pipeline, recipe, CPU) == said


def test_a_form_that_takes_a_network_is_named(tiny, monkeypatch):
    """As on a GPU, where some networks fit the kernels and others do not: each way is counted."""
    recipe = tiny("model.num_hidden_layers=3", "train.dtype=bfloat16")
    taken = iter((FORMS[0], None, FORMS[0]))
    seen = []
    monkeypatch.setattr(path, "form_of", lambda network, options: seen.append(network) or next(taken))
    text = path_text(build(recipe, CPU).pipeline, recipe, CPU)
    assert text.endswith(f"activation24 at 2: {FORMS[0].says}; activation24 at 1: {PLAIN}")
    # 4 rows of 16 tokens; F is 1.5 times 48, to a multiple of 128; in bfloat16.
    assert [(n.tokens, n.features, n.width, n.width_out) for n in seen] == [(64, 128, 32, 32)] * 3
    assert {n.dtype for n in seen} == {torch.bfloat16}


@pytest.mark.parametrize("reason", ["", "the kernel cast_e4m3 is wrong on this GPU"])
def test_linears_in_e4m3_say_where_their_kernels_do_not_run(tiny, monkeypatch, reason):
    recipe = tiny('passes=[{use="weight24", precision="fp8"}]', "train.dtype=bfloat16")
    pipeline = build(recipe, CPU).pipeline
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(path, "why_in_plain_pytorch", lambda _: reason)
    said = f"e4m3 in plain PyTorch ({reason})" if reason else "products in e4m3"
    assert path_text(pipeline, recipe, torch.device("cuda")).endswith(f"; weight24 at 14: {said}")


def test_training_says_it_once(act24, tiny_file):
    status, out, _ = act24("train", tiny_file, "--dry-run")
    assert status == 0
    lines = [line for line in out.splitlines() if line.startswith("path: ")]
    assert len(lines) == 1
    assert "activation24 at 2: plain PyTorch" in lines[0]
