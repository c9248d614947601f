"""The scales that an update measures, and the rows that it measures them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from act24.errors import Act24Error
from act24.passes.activation24 import Activation24
from act24.passes.rewriting import Rewriting
from act24.passes.state import Due, new_places

#: What a loop hands in to measure on: the arguments of a forward.
Rows = Tensor | Sequence[Tensor] | Mapping[str, Any]

#: Token rows that run for each one that is measured: neighbours in a text say much the same.
_RUN_FOR_ONE = 16


def measured_at(pipeline: Rewriting, step: int) -> list[Due]:
    """The scales that are due once `step` updates are made: those of a pass, or of what another has left to
    it."""
    found, in_force = [], pipeline.in_force(step)
    for p in in_force:
        if isinstance(p, Activation24) and p.soft:
            if p.calibrates(step):
                found.append(Due(p))
            elif new := new_places(pipeline, p, step, in_force):
                found.append(Due(p, frozenset(new)))
    return found


def first_measured_at(pipeline: Rewriting, step: int) -> list[Due]:
    """Those of `measured_at` that no update has measured before."""
    in_force = pipeline.in_force(step)
    return [one for one in measured_at(pipeline, step) if new_places(pipeline, one.of, step, in_force)]


def first_rows(batch: Rows, due: Sequence[Due]) -> Rows:
    """The rows of a batch that are enough to measure on; the same ones, however many follow."""
    tensors = (
        batch.values() if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else batch
    )
    first = next((t for t in tensors if isinstance(t, Tensor) and t.ndim), None)
    if first is None:
        raise Act24Error(
            "begin_update_: give batch as a tensor, a sequence of them, or a mapping as of keyword arguments"
        )
    rows = rows_to_run(due, first.shape[1] if first.ndim > 1 else 1)

    def cut(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.ndim and value.shape[0] == first.shape[0]
        return value[:rows] if fits else value

    if isinstance(batch, Tensor):
        return cut(batch)
    if isinstance(batch, Mapping):
        return {name: cut(value) for name, value in batch.items()}
    return tuple(map(cut, batch))


def rows_to_run(due: Sequence[Due], length: int) -> int:
    """Rows of so many tokens that are run when scales are due."""
    samples = max(one.of.calibration_samples for one in due)
    return -(-_RUN_FOR_ONE * samples // length)


def call_with(forward: Callable[..., object], rows: Rows) -> object:
    """Run a model on such rows."""
    if isinstance(rows, Mapping):
        return forward(**rows)
    return forward(rows) if isinstance(rows, Tensor) else forward(*rows)
