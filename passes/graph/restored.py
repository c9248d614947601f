"""A forward that is no part of training, and leaves buffers and generators as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from act24.passes.graph.region import RegionModule


@contextmanager
def restored(model: nn.Module, regions: Mapping[str, RegionModule]) -> Iterator[None]:
    """Put back what forwards in this context write into buffers, as running statistics are, and what they
    draw from PyTorch's generators. Attributes that are no tensors stay as they leave them.

    Args:
        regions: the model's, by any name; the buffers that passes have added there stay as they are written.
    """
    added = {(id(r.get_submodule(n.rpartition(".")[0])), n.rpartition(".")[2]) for r, n in _added(regions)}
    before: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and (id(module), name) not in added:
                before.append((module, name, buffer, buffer.clone()))
    cuda = any(buffer.is_cuda for *_, buffer in before) or any(p.is_cuda for p in model.parameters())
    cpu_state, cuda_state = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            spread = any(s == 0 and n > 1 for s, n in zip(buffer.stride(), buffer.shape, strict=True))
            if not spread:  # into which nothing could be written
                with torch.no_grad():
                    buffer.copy_(value)
            module._buffers[name] = buffer  # where forward has put another
        if not torch.equal(torch.get_rng_state(), cpu_state):
            torch.set_rng_state(cpu_state)
        if cuda_state is not None and not torch.equal(torch.cuda.get_rng_state(), cuda_state):
            torch.cuda.set_rng_state(cuda_state)


def _added(regions: Mapping[str, RegionModule]) -> Iterator[tuple[RegionModule, str]]:
    for region in regions.values():
        for name in region.buffer_kinds:
            yield region, name
