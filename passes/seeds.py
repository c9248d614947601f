"""What the forwards of an update draw from: one seed a place, another for every micro-batch.

A seed lies in a buffer, which the graph reads, and a backward reads it again. So seeds change in place from
one micro-batch to the next only if the backward of the former is behind; where forwards overlap, as two
losses that are added up, the next one's seeds are tensors of their own.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from act24.operation import is_transformed
from act24.passes import activation24, weight24
from act24.passes.graph.activation_sites import PADS
from act24.passes.graph.region import joined
from act24.passes.rewriting import Rewriting

#: What a kind of seed adds to the name that it is drawn from, so that no two are drawn alike.
_DRAWN_FROM = {activation24.SEED: ".activation", weight24.SEED: ""}

#: What is added to a seed from one micro-batch to the next: 2⁶⁴ over the golden ratio (splitmix64), as int64.
_BETWEEN_MICRO_BATCHES = 0x9E3779B97F4A7C15 - 2**64


#: A module and the name of one of its buffers.
Slot = tuple[nn.Module, str]


def set_seeds_(pipeline: Rewriting, step: int, rank: int) -> None:
    """Say what the forwards of an update draw from, before the first of them (`Seeds.next_`).

    Args:
        step, rank: of the update and the process. With the pipeline's seed they draw the same, in a
            recomputation and after a resume too.
    """
    values, slots = [], []
    for name, suffix, slot in _places(pipeline):
        values.append(_hash(pipeline.seed, f"{name}{suffix}", step, rank))
        slots.append(slot)
    if slots:
        buffers = _read(slots)
        torch._foreach_zero_(buffers)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(buffers, values)  # pyright: ignore[reportPrivateImportUsage]


class Seeds:
    """Those of one pipeline and this process.

    A copy is in memory that nobody else writes to: data parallelism sends the buffers of one process to all,
    unless it is told not to.
    """

    def __init__(self, pipeline: Rewriting) -> None:
        self._pipeline = pipeline
        self._slots: list[Slot] = []
        self._own: list[Tensor] = []
        self._pending: list[weakref.ref[_Pending]] = []

    def __bool__(self) -> bool:
        """Whether forwards of this update draw."""
        return bool(self._slots)

    def begin_(self, step: int, rank: int) -> None:
        """Seeds of an update."""
        self._slots = [slot for *_, slot in _places(self._pipeline)]
        if self._unfinished():  # its backward reads the buffers as they are
            _exchange_(self._slots, [seed.clone() for seed in _read(self._slots)])
        set_seeds_(self._pipeline, step, rank)
        buffers = _read(self._slots)
        if [seed.device for seed in self._own] != [buffer.device for buffer in buffers]:
            self._own = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._own, buffers)  # pyright: ignore[reportPrivateImportUsage]

    def next_(self) -> None:
        """Seeds of the next micro-batch. On the device alone, so that a captured forward has it too."""
        if not self._own:
            return
        torch._foreach_add_(self._own, _BETWEEN_MICRO_BATCHES)  # pyright: ignore[reportPrivateImportUsage]
        if self._unfinished():
            _exchange_(self._slots, [seed.clone() for seed in self._own])
            return
        buffers = _read(self._slots)
        if any(map(is_transformed, buffers)):  # many models at once, which draw the same
            for buffer, seed in zip(buffers, self._own, strict=True):
                buffer.copy_(seed)
        else:
            torch._foreach_copy_(buffers, self._own)  # pyright: ignore[reportPrivateImportUsage]

    def forwarded(self, output: object) -> None:
        """A forward that is a micro-batch has ended: its backward is still to come."""
        tensors = [tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
        if any(map(is_transformed, tensors)):  # torch.func has a backward of its own, at once
            return
        if nodes := [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]:
            pads = [(m, PADS) for m in self._pipeline.modules if m._buffers.get(PADS) is not None]
            pending = _Pending([*self._slots, *pads])
            self._pending.append(weakref.ref(pending))
            for node in nodes:  # which keep it for as long as the graph is there
                node.register_prehook(pending)

    def _unfinished(self) -> bool:
        """Whether a forward's backward has not begun, and may still."""
        alive = [(ref, pending) for ref in self._pending if (pending := ref()) is not None]
        self._pending = [ref for ref, pending in alive if not pending.begun]
        return bool(self._pending)


class _Pending:
    """A hook of a forward's last nodes: what was computed with its seeds and its padding is computed again
    with them, where blocks are checkpointed. Autograd is done with the graph of a later forward before it
    comes to that of an earlier one."""

    def __init__(self, slots: list[Slot]) -> None:
        self._slots, self._values = slots, _read(slots)
        self.begun = False

    def __call__(self, *_: Any) -> None:
        self.begun = True
        _exchange_(self._slots, self._values)


def _read(slots: Sequence[Slot]) -> list[Tensor]:
    return [module._buffers[leaf] for module, leaf in slots]  # type: ignore[misc]


def _exchange_(slots: Sequence[Slot], values: Sequence[Tensor]) -> None:
    """Put other tensors in the place of those that regions read."""
    for (module, leaf), value in zip(slots, values, strict=True):
        module._buffers[leaf] = value


def _places(pipeline: Rewriting) -> Iterator[tuple[str, str, Slot]]:
    """Of every seed what it belongs to, what its kind adds to that, and where it is."""
    for kind, suffix in _DRAWN_FROM.items():
        for fqn, module in pipeline.regions.items():
            for local, (its_kind, of) in module.buffer_kinds.items():
                if its_kind == kind:
                    path, _, leaf = local.rpartition(".")
                    yield joined(fqn, of), suffix, (module.get_submodule(path), leaf)


def _hash(*parts: object) -> int:
    """63 bits."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
