"""What `act24 bench generate` keeps when something fails; what it measures needs a GPU."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from typer.testing import CliRunner

from act24.inference.layer import DENSE, Choice
from act24.llama import LlamaConfig
from act24.tools.bench import generate as bench
from act24.tools.commands.cli import app

COMMAND = ["bench", "generate", "--sizes", "130m", "--batches", "1,9,17", "--prefill", "64"]


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model, and instead of times what a faster side would take."""

    def step(decoder, batch):
        return 0.5 if decoder.plans[batch][0].packed else 1.0

    def drawn(preset, layers=None):
        return LlamaConfig(64, 64, 64, 2, 4, mlp_bias=True)

    monkeypatch.setattr(bench, "needed_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(bench, "_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(bench, "drawn_config", drawn)
    monkeypatch.setattr(bench, "_step_seconds", step)
    monkeypatch.setattr(bench, "_prefill_seconds", lambda decoder, rows, length: 2.0)
    # On a CPU a decoder that measures takes dense, without a plan to tell.
    monkeypatch.setattr(bench, "SIDES", bench.SIDES[:-1])


def run(*options: str) -> tuple[int, dict, str]:
    result = CliRunner().invoke(app, [*COMMAND, "--json", *options])
    return result.exit_code, json.loads(result.stdout), result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--sizes", "130m,2b"), "unknown size '2b': choose from 130m, 1b, 7b"),
        (("--batches", "1,x"), "--batches takes whole numbers of at least 1, separated by commas, not '1,x'"),
        (("--prefill", "0"), "--prefill takes whole numbers of at least 1, separated by commas, not '0'"),
    ],
)
def test_bad_options_are_named_without_a_gpu_too(options: tuple[str, ...], told: str):
    result = CliRunner().invoke(app, ["bench", "generate", *options])
    assert str(result.exception) == told


@pytest.mark.usefixtures("on_a_cpu")
def test_rows_of_every_side():
    status, found, told = run("--no-transformers")
    assert status == 0
    steps = {
        (row["what"], row["rows"]): row["to dense"] for row in found["rows"] if "prefill" not in row["what"]
    }
    streamed = "fused products and streamed weights"
    assert steps == {
        **{(what, rows): 1.0 for what in ("dense", "fused products") for rows in (1, 9, 17)},
        (streamed, 1): 1.0,
        (f"skipping and {streamed}", 1): 1.0,
        (f"2:4 weights and {streamed}", 1): 2.0,
        (f"2:4 weights and {streamed}", 9): 2.0,
        (f"skipping and 2:4 weights and {streamed}", 1): 2.0,
    }
    prompts = [row for row in found["rows"] if "prefill" in row["what"]]
    assert [(row["what"], row["rows"], row["tokens/s"]) for row in prompts] == [
        (f"prefill of 64, {what}", rows, 32 * rows)
        for rows in (1, 8)
        for what in ("dense", "2:4 weights", "measured")
    ]
    assert all(row["2:4 products"] == "none" for row in prompts), "a CPU has none"
    for row in found["rows"]:  # as it came, with its figures
        assert f"what {row['what']}, rows {row['rows']}, tokens/s {row['tokens/s']:.4g}" in told


@pytest.mark.usefixtures("on_a_cpu")
def test_a_side_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch):
    step = bench._step_seconds

    def failing(decoder, batch):
        choice = decoder.plans[batch][0]
        if choice == DENSE and batch == 9:
            raise torch.OutOfMemoryError("no memory\nand a long story")
        if choice == Choice(skipping=True, fused=True, streamed=True):
            raise RuntimeError("no kernel")
        return step(decoder, batch)

    monkeypatch.setattr(bench, "_step_seconds", failing)
    monkeypatch.setattr(bench, "_theirs", lambda *_: {"what": "theirs", "rows": 1, "tokens/s": 1.0})
    status, found, told = run()
    assert status == 1
    failures = {row["what"]: row["failed"] for row in found["rows"] if "failed" in row}
    assert failures == {
        "dense": "OutOfMemoryError: no memory",
        "skipping and fused products and streamed weights": "RuntimeError: no kernel",
    }
    kept = [(row["what"], row["rows"]) for row in found["rows"] if "failed" not in row]
    assert ("dense", 1) in kept
    assert ("theirs", 1) in kept
    assert ("2:4 weights and fused products and streamed weights", 9) in kept
    assert all(failure in told for failure in failures.values())
    printed = CliRunner().invoke(app, COMMAND)
    assert printed.exit_code == 1
    assert "| 130m | dense | | failed: OutOfMemoryError: no memory | | |" in printed.stdout


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_run_that_is_ended_prints_the_rows_so_far(monkeypatch: pytest.MonkeyPatch, number: int, times: int):
    """`timeout` sends its signal twice: the second one comes while the first is heeded."""
    dumps = json.dumps

    def ended_again(*arguments, **named):
        for _ in range(times - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return dumps(*arguments, **named)

    monkeypatch.setattr(json, "dumps", ended_again)
    step = bench._step_seconds

    def ended(decoder, batch):
        if batch == 9:
            os.kill(os.getpid(), number)
        return step(decoder, batch)

    monkeypatch.setattr(bench, "_step_seconds", ended)
    before = signal.getsignal(signal.SIGTERM)
    try:
        status, found, _ = run("--no-transformers")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (status, found["interrupted"]) == (1, True)
    kept = [(row["what"], row["rows"]) for row in found["rows"]]
    assert kept[:2] == [("dense", 1), ("fused products", 1)]
    assert {rows for what, rows in kept if "prefill" not in what} == {1}
