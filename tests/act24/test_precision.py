"""What `precision = "auto"` times: both sides are the same layer, forward and backward, and the faster one is
taken only if it is faster by more than the noise of two timings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from act24 import precision
from act24.precision import (
    MARGIN,
    Conditions,
    Layer,
    Side,
    Timed,
    decision,
    linears,
    network,
    sparse_linear,
    timed,
)
from act24.sparse24.feed_forward.options import Options24, Precision
from act24.sparse24.weight.forms import LinearOptions24

CPU = torch.device("cpu")
CONDITIONS = Conditions(2, 64, "bfloat16_autocast", compiled=False, kept=True, micro_batches=4, counted=False)
LINEARS = Layer("linears", (32, 64, 48), "rowwise")
NETWORK = Layer("network", (64, 128, 32), "relu2, naive, dense")
SPARSE = Layer("weight24", (64, 32), "transposable, mvue")


def sides_of(kind: str, given: Conditions) -> Mapping[Precision, Side]:
    if kind == "linears":
        return linears(LINEARS, "rowwise", True, given, CPU)
    if kind == "weight24":
        return sparse_linear(SPARSE, LinearOptions24(both_ways=True), False, True, False, given, CPU)
    if kind == "weight24, soft":
        return sparse_linear(SPARSE, LinearOptions24(), True, False, False, given, CPU)
    return network(NETWORK, Options24(method=kind), given, CPU)


SHAPES = {
    "linears": [(2, 64, 32), (64, 32), (48, 32)],
    "naive": [(2, 64, 64), (128, 64), (32, 128)],
    "mvue": [(2, 64, 64), (128, 64), (32, 128)],
    "soft_dynamic": [(2, 64, 64), (128, 64), (32, 128)],
    "weight24": [(2, 64, 64), (32, 64)],
    "weight24, soft": [(2, 64, 64), (32, 64)],
}


@pytest.mark.parametrize("kind", SHAPES)
def test_both_sides_are_the_same_layer(kind: str) -> None:
    """The same gradients of x and of each weight but for the rounding of e4m3, as a run stores them; with
    weights that are cast before and with those that are cast in the call."""
    for dtype, stored in (("bfloat16", torch.bfloat16), ("bfloat16_autocast", torch.float32)):
        found = []
        for kept in (True, False):
            sides = sides_of(kind, CONDITIONS._replace(dtype=dtype, kept=kept))
            wide, narrow = (sides[name].step() for name in ("bfloat16", "fp8"))
            assert [tuple(g.shape) for g in wide] == SHAPES[kind]
            assert [g.dtype for g in wide] == [torch.bfloat16, *[stored] * (len(wide) - 1)]
            for ours, theirs in zip(narrow, wide, strict=True):
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
                error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
                assert 0 < error < 0.25 if "2" not in kind else error < 0.25
            assert sides["bfloat16"].renew is None
            assert (sides["fp8"].renew is not None) == (kept and "weight24" not in kind)
            found.append(narrow)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", SHAPES)
def test_what_a_run_counts_is_timed_with_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In e4m3 the kernels that cast count too, which costs time and changes no number."""
    counters: list[Any] = []
    make = precision._counter
    monkeypatch.setattr(precision, "_counter", lambda *given: counters.append(make(*given)) or counters[-1])
    found = []
    for counted in (False, True):
        counters.clear()
        sides = sides_of(kind, CONDITIONS._replace(counted=counted))
        found.append([sides[name].step() for name in ("bfloat16", "fp8")])
        if not counted:
            assert counters == [None] * len(counters)
    assert all((counter > 0).any() for counter in counters)
    assert len(counters) == (2 if kind == "linears" else 1)
    for wide, narrow in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


def test_the_faster_one_by_a_margin() -> None:
    """Times of an update are shared out over its micro-batches."""
    step: dict[str, Callable[[], Any]] = {name: lambda: () for name in ("bfloat16", "fp8", "renew")}
    for wide, narrow, renew, expected in (
        (2.0, 1.0, 0.0, Timed("fp8", 2.0, 1.0)),
        (1.0, 1.0, 0.0, Timed("bfloat16", 1.0, 1.0)),
        (1.0, 1 / MARGIN + 0.01, 0.0, Timed("bfloat16", 1.0, 1 / MARGIN + 0.01)),
        (1.0, 1 / MARGIN - 0.01, 0.0, Timed("fp8", 1.0, 1 / MARGIN - 0.01)),
        (2.0, 1.0, 2.0, Timed("fp8", 2.0, 1.5)),
        (2.0, 1.0, 8.0, Timed("bfloat16", 2.0, 3.0)),
    ):
        costs = {step["bfloat16"]: wide, step["fp8"]: narrow, step["renew"]: renew}
        sides: dict[Precision, Side] = {
            "bfloat16": Side(step["bfloat16"]),
            "fp8": Side(step["fp8"], step["renew"]),
        }
        assert timed(sides, CONDITIONS, costs.__getitem__) == expected


def test_a_decision_is_of_the_very_layer() -> None:
    table = ((tuple(LINEARS), ("fp8", 2.0, 1.0)), (tuple(SPARSE), ("bfloat16", 1.0, 1.0)))
    assert decision(LINEARS, table) == "fp8"
    assert decision(SPARSE, table) == "bfloat16"
    assert decision(LINEARS._replace(options="tensorwise"), table) is None
    assert decision(LINEARS._replace(sizes=(32, 64)), table) is None
    assert decision(None, table) is None
    assert str(LINEARS) == "32→64 + 48"
    assert str(NETWORK) == "64→128→32"
