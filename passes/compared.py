"""When what tracing froze is compared with what it was: where the model is called, with all of it, and where
a region is called by itself, with what its own graph has.

Within a call that has compared nothing is compared again, so that the time it takes does not grow with the
layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from act24.passes.forwards import OneCall
from act24.passes.graph.watched import Fact


def watch_(
    callers: Collection[nn.Module], facts: Sequence[Fact], of_regions: Mapping[nn.Module, Sequence[Fact]]
) -> None:
    """Compare facts whenever one of some modules is called.

    Args:
        callers: the model, and what calls its regions.
        facts: all there are.
        of_regions: those of each region.
    """
    if not facts:
        return
    call = OneCall()
    for module in callers:
        module.register_forward_pre_hook(_Compares(tuple(facts), call, begins=True))
        module.register_forward_hook(_Ends(call), always_call=True)
    for module, own in of_regions.items():
        if own and module not in callers:
            module.register_forward_pre_hook(_Compares(tuple(own), call))


class _Hook:
    """A hook of a model. Where a copy's values lie nobody knows."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Nothing:
        return _Nothing()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Nothing, ()


class _Nothing:
    def __call__(self, *_: Any) -> None:
        pass


class _Compares(_Hook):
    def __init__(self, facts: tuple[Fact, ...], call: OneCall, begins: bool = False) -> None:
        """Make it.

        Args:
            call: that has compared everything.
            begins: such a one begins.
        """
        self._facts, self._call, self._begins = facts, call, begins

    def __call__(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or self._call.goes_on():
            return
        for fact in self._facts:
            fact.check()
        if self._begins:
            self._call.begin()


class _Ends(_Hook):
    def __init__(self, call: OneCall) -> None:
        self._call = call

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._call.end()
