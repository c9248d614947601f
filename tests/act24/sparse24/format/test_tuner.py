"""The tuner's core, with the library played by a few lines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from act24.sparse24.format import tuner
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.format.products import KINDS, Kind, Measured, Product
from act24.sparse24.format.tuner import tuned


def play_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with ids 0 to 4, of which 2 is wrong on one of two draws and 3 returns NaN."""

    def multiply(packed: Tensor, dense: Tensor, algorithm: int, transposed: bool) -> Tensor:
        if algorithm > 4:
            raise RuntimeError("invalid value")
        result = unpack(Packed24(packed)).bfloat16() @ dense.bfloat16()
        if algorithm == 3:
            result = result * float("nan")
        if algorithm == 2 and packed.flatten()[0].float() > 0:
            result = result.roll(1, 0)
        return result.T.contiguous() if transposed else result

    monkeypatch.setattr(tuner, "multiply24", multiply)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tuner_takes_the_fastest_of_those_that_are_right(
    monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    play_library(monkeypatch)
    signs = [
        tuner._operands(Product(kind, 128, 64, 64), torch.Generator().manual_seed(seed))
        .packed.buffer.flatten()[0]
        .float()
        .sign()
        .item()
        for seed in (0, 1)
    ]
    assert 1 in signs, "the wrong algorithm has to show on one of the draws"
    milliseconds = {0: 5.0, 1: 4.0, 2: 1.0, 3: 1.0, 4: 6.0}

    def time(call: Callable[[], Tensor]) -> float:
        call()
        return milliseconds[call.args[2]] if hasattr(call, "args") else 4.5  # type: ignore[attr-defined]

    measured, times = tuned(Product(kind, 128, 64, 64), time, torch.device("cpu"))
    assert measured == Measured(1, 4.0, 4.5)
    assert times == {0: 5.0, 1: 4.0, 4: 6.0}


def test_memory_that_runs_out_leaves_no_algorithm_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(tuner, "multiply24", multiply)
    with pytest.raises(torch.OutOfMemoryError):
        tuned(Product("y", 128, 64, 64), lambda call: 1.0, torch.device("cpu"))


def test_a_library_without_a_right_algorithm_never_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(*_: object) -> Tensor:
        raise RuntimeError("not supported")

    monkeypatch.setattr(tuner, "multiply24", multiply)
    measured, times = tuned(Product("y", 64, 64, 32), lambda _: 1.0, torch.device("cpu"))
    assert measured.sparse == float("inf")
    assert times == {}
