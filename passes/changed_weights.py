"""Whether weights are still those that an update began with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Unchanged:
    """Looks at one weight: whoever updates a model by hand, without an optimizer whose step is seen, writes
    to all, and to `.data` without a trace. Nothing waits for a GPU: there the answer comes one look later."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        trains = (p for m in modules for p in m.parameters() if p.requires_grad and not p.is_meta)
        self._parameter = max(trains, key=_elements, default=None)
        self._where = _where(self._parameter)
        self._norm = None if self._parameter is None else _norm(self._parameter)
        self._answer: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def violated(self) -> bool:
        """Whether the weight is another than it was, as far as is known yet."""
        if self._ready is not None and not self._ready.query():
            return False
        parameter, answer = self._parameter, self._answer
        # A wrapper that gathers shards puts other tensors in the place of what was looked at.
        if answer is None and parameter is not None and _where(parameter) == self._where:
            answer = ~torch.isclose(_norm(parameter), self._norm, rtol=0, atol=0, equal_nan=True)  # type: ignore[arg-type]
            if answer.is_cuda:
                host = torch.empty((), dtype=torch.bool, pin_memory=True)
                host.copy_(answer, non_blocking=True)
                self._ready = torch.cuda.Event()
                self._ready.record()
                self._answer = host
                return False
        self._answer = self._ready = None
        return answer is not None and bool(answer)


def _elements(parameter: Tensor) -> int:
    """The largest up to some size: it is read at every micro-batch."""
    return parameter.numel() if parameter.numel() <= 2**22 else -parameter.numel()


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[operator]


def _where(parameter: Tensor | None) -> tuple[int, torch.Size] | None:
    if parameter is None:
        return None
    local = _local(parameter.detach())
    return local.data_ptr(), local.shape


def _norm(parameter: Tensor) -> Tensor:
    """Of the values here, in float32 at least; of no gradient."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.linalg.vector_norm(_local(parameter.detach()), dtype=dtype)
