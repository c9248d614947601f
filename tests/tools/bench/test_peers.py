"""`bench peers` without a GPU: what it makes of the sides that it timed, and of those that fail."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from act24.errors import Act24Error
from act24.passes import Fp8
from act24.tools.bench import peers
from act24.tools.bench.peers import OURS, Timed, converts, left_by_size, our_recipe, rows_of, time_turns_


@pytest.mark.parametrize("side", OURS)
def test_every_side_of_ours_is_a_recipe_that_says_what_is_in_fp8(side: str) -> None:
    passes = [p for p in our_recipe("7b", "bfloat16", side).passes if isinstance(p, Fp8)]
    assert [p.head for p in passes] == (["with head" in side] if "fp8" in side else [])


def test_a_side_that_fails_is_said_once_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    timed, tried = Timed("7b"), []

    def time(make):
        tried.append(make())
        if tried[-1] == "bad":
            raise AssertionError("5461 is no multiple\nof 16")
        return [0.1, 0.2, 0.3], 2**30

    sides = {
        "transformers": lambda: "a",
        "transformers, torchao rowwise": lambda: "bad",
        "act24 dense": lambda: "b",
    }
    time_turns_(timed, sides, 2, time)
    assert tried == ["a", "bad", "b", "a", "b"]
    said = capsys.readouterr().err.splitlines()
    assert said[1] == (
        "7b, turn 0: transformers, torchao rowwise is left out: AssertionError: 5461 is no multiple"
    )
    assert len(said) == 5
    assert [(row.name, row.ours, row.note) for row in rows_of(timed)] == [
        ("step, 7b, act24 dense", 200.0, "transformers")
    ]


def test_rows_are_beside_what_a_user_would_pick() -> None:
    seconds = {
        "transformers": 0.4,
        "transformers, torchao rowwise": 0.3,
        "transformers, torchao tensorwise": 0.2,
    }
    timed = Timed("1b", {name: [value] for name, value in seconds.items()})
    timed.seconds |= {"act24 dense": [0.5], "act24 dense, fp8 with head": [0.1]}
    timed.notes["transformers, torchao tensorwise"] = "3 of 7 linears stay"
    tensorwise = "transformers, torchao tensorwise"
    told = f"{tensorwise}; {tensorwise}: 3 of 7 linears stay"
    found = {(row.name.removeprefix("step, 1b, "), row.note): row.ratio for row in rows_of(timed)}
    assert found == pytest.approx(
        {
            (tensorwise, f"transformers; {tensorwise}: 3 of 7 linears stay"): 2.0,
            ("transformers, torchao rowwise", "transformers"): 4 / 3,
            ("act24 dense", "transformers"): 0.8,
            ("act24 dense", told): 0.4,
            ("act24 dense, fp8 with head", "transformers"): 4.0,
            ("act24 dense, fp8 with head", told): 2.0,
            ("act24 dense, fp8 with head", "act24 dense"): 5.0,
        }
    )


def test_what_is_stopped_reports_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGTERM in its second size, as `timeout` ends it."""

    def time_(timed, size, *_):
        timed.seconds |= {"transformers": [0.2], "act24 dense": [0.1]}
        if size == "1b":
            del timed.seconds["act24 dense"]
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it went on")

    monkeypatch.setattr(peers, "needed_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(peers, "_need_packages", lambda _: None)
    monkeypatch.setattr(peers, "_time_", time_)
    before = signal.getsignal(signal.SIGTERM)
    rows = peers.bench_peers(["7b", "1b", "130m"])
    assert [row.name for row in rows] == ["step, 7b, bfloat16, 8 rows, act24 dense"]
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(Act24Error, match="no two sides"):
        peers.bench_peers(["1b"])
    with pytest.raises(Act24Error, match="sides"):
        peers.bench_peers(sides=["act24"])


def test_torchao_leaves_what_its_products_fail_with() -> None:
    """The widths of 1b, on a model of one block, written by hand."""
    with torch.device("meta"):
        model = nn.ModuleDict(
            {"up": nn.Linear(2048, 5461), "q": nn.Linear(2048, 2048), "lm_head": nn.Linear(2048, 30)}
        )
    assert [name for name, module in model.items() if converts(module, name)] == ["q"]
    assert left_by_size(model) == ("1 of 2 linears stay in bfloat16, 5461 × 2048 are no multiples of 16")
    assert not left_by_size(nn.ModuleDict({"q": model["q"]}))
