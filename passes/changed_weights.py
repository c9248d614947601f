"""Whether weights are still those that an update began with, and those that an optimizer was made for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from act24.errors import Act24Error
from act24.passes.update_hooks import parameters_of


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


class Replaced:
    """Parameters that passes have taken out of a model, as far as somebody still holds them: an optimizer
    that was made before does, and has none of those that stand there now."""

    def __init__(self, model: nn.Module, stock: Mapping[str, Tensor]) -> None:
        """
        Args:
            stock: the parameters that the model had, by name.
        """
        now, before = dict(model.named_parameters()), {id(p) for p in stock.values()}
        self._new = [name for name, p in now.items() if id(p) not in before and p.requires_grad]
        kept = {id(p) for p in now.values()}
        gone = {name: p for name, p in stock.items() if id(p) not in kept and p.requires_grad}
        self._gone = weakref.WeakValueDictionary[str, Tensor](gone if self._new else {})

    def __len__(self) -> int:
        return len(self._gone)

    def refuse_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Refuse a step that would leave all new parameters as they are."""
        if not self._gone:
            return
        theirs = parameters_of(optimizer)
        name = next((name for name, p in self._gone.items() if id(p) in theirs), None)
        if name is None:
            return
        now = dict(model.named_parameters())
        if not any(id(now[new]) in theirs for new in self._new if new in now):
            raise Act24Error(
                f"this optimizer was made before the passes were applied: it holds {name} as it was, which "
                f"is no parameter of the model any more, and not {self._new[0]}: make it after apply_, of "
                "model.parameters()"
            )


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
