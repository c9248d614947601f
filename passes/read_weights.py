"""2:4 weights of a model that is read as it is: its masks, and scales that no update has set yet, are those
of the weights at hand, in buffers of their own in the place of an update's."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from act24.operation import is_transformed
from act24.passes.rewriting import Rewriting
from act24.passes.state import SparseWeight, new_places, sparse_weights, whole
from act24.passes.weight24 import MASK, SCALE, Weight24, stored_mask
from act24.sparse24.weight.methods import weight_scale


class ReadWeights:
    """What forwards in evaluation mode read, made anew where a weight is not what it was."""

    def __init__(self, pipeline: Rewriting) -> None:
        self._pipeline = pipeline
        self._made: list[tuple[SparseWeight, str, Tensor]] = []  # weight, kind of the buffer, value
        self._state: list[Any] = []  # what tells the weights that these were made of from others
        self._cache: weakref.ref[Any] | None = None  # keys and values of the last forward

    def forget_cache(self) -> None:
        """The weights may be others, without a trace in their versions."""
        self._cache = None

    @contextmanager
    def in_place(self, step: int | None, cache: Any) -> Iterator[None]:
        """Masks and scales of the weights as they are, in the place of the update's.

        Args:
            step: updates already made, if none was begun since; None: scales are set.
            cache: the forward's `past_key_values`.
        """
        exchanged: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for weight, kind, fresh in self._fresh(step, self._goes_on(cache)):
                owner, leaf = weight.place(kind)
                exchanged.append((owner, leaf, owner._buffers[leaf]))  # type: ignore[arg-type]
                owner._buffers[leaf] = fresh
            yield
        finally:
            for owner, leaf, buffer in reversed(exchanged):
                # The model may have moved, where Ctrl-C ended a forward and nobody came back here.
                owner._buffers[leaf] = buffer.to(owner._buffers[leaf].device)  # type: ignore[union-attr]

    @torch.inference_mode(False)  # what is made here is read elsewhere too
    @torch.no_grad()
    def _fresh(self, step: int | None, goes_on: bool) -> list[tuple[SparseWeight, str, Tensor]]:
        """Made anew where a weight is not what it was. Its norm says so too: whoever writes to `.data`, as
        averages of weights do, leaves no trace in its version. Norms make the host wait for the device, so
        that a forward that goes on from a cache is spared them: its beginning has looked."""
        wanted: list[tuple[SparseWeight, Weight24]] = []
        for p in self._pipeline.active:
            if isinstance(p, Weight24):
                new = new_places(self._pipeline, p, step) if p.record.soft else set()
                found = sparse_weights(self._pipeline, p)
                wanted += [(w, p) for w in found if not p.record.soft or w.name in new]
        if not wanted:
            return []
        parameters = [weight.parameter for weight, _ in wanted]
        if any(map(is_transformed, parameters)):  # of torch.func, for as long as this forward lasts
            return [(weight, *_made_of(weight, p)) for weight, p in wanted]
        # A shard's version and norm say nothing of the others.
        sharded = any(isinstance(p, DTensor) for p in parameters)
        state: list[Any] = [(id(p), None if p.is_inference() else p._version) for p in parameters]
        if goes_on and not sharded and state == self._state[: len(state)]:
            return self._made
        state += [] if sharded else _norms(parameters)
        if sharded or state != self._state:
            self._state = state
            self._made = [(weight, *_made_of(weight, p)) for weight, p in wanted]
        return self._made

    def _goes_on(self, cache: Any) -> bool:
        """Whether a forward continues one whose keys and values are in the cache, as `generate` of
        `transformers` does for every token but the first."""
        if not hasattr(cache, "get_seq_length"):
            self._cache = None
            return False
        known = self._cache is not None and self._cache() is cache
        self._cache = weakref.ref(cache)
        length = cache.get_seq_length() if known else 0
        return isinstance(length, int) and length > 0  # a tensor is on the device: to read it is to wait too


def _made_of(weight: SparseWeight, p: Weight24) -> tuple[str, Tensor]:
    parameter = whole(weight.parameter)
    if p.record.soft:
        return SCALE, weight_scale(parameter.T if weight.transposed else parameter)
    return MASK, stored_mask(parameter, weight.transposed, p.method)


def _norms(tensors: list[Tensor]) -> list[float]:
    return torch.stack(torch._foreach_norm(tensors)).tolist()  # pyright: ignore[reportPrivateImportUsage]
