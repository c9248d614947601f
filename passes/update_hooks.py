"""Hooks by which a model tells whoever watches it that it runs, and which its copies have not.

A copy of a model (`copy.deepcopy`, pickle) has no pipeline, and so nobody who renews its masks, scales and
seeds: in the hooks' place it has one that refuses what it can no longer do.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from act24.errors import Act24Error
from act24.passes.graph.frozen import Remains
from act24.passes.graph.region import RegionModule
from act24.passes.graph.roles import head_of


class Watcher(Protocol):
    """Who is told of forwards."""

    def before_forward(self, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
        """A forward of a module begins, maybe within one of another that is watched."""

    def after_forward(self, module: nn.Module, output: object) -> None:
        """It has ended, also by an error; then there is no output."""

    def settle(self) -> None:
        """State is to be read: it has to be what it is between forwards."""

    def as_served(self) -> AbstractContextManager[None] | None:
        """What to enter so that the model's operations and state are those that are served, for who runs them
        without its forward; None: they are."""

    def copied(self) -> str | None:
        """A copy of the model is made: why its forwards in evaluation mode are refused; empty if they are
        those of the model; None if all are."""
        ...


def watch_forwards_(model: nn.Module, regions: Sequence[str], watcher: Watcher) -> None:
    """Hook the modules that call the regions (`trunks_of`)."""
    _Before.hide()
    trunks = trunks_of(model, regions)
    for trunk in trunks:
        trunk.register_forward_pre_hook(_Before(watcher), with_kwargs=True)
        trunk.register_forward_hook(_After(watcher), always_call=True)
    for module in {model, *trunks, *map(model.get_submodule, regions)}:
        module.register_state_dict_pre_hook(_Reads(watcher))


class StepWatcher(Protocol):
    """Who is told of optimizers' steps."""

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """An optimizer makes a step; what it is called with instead, or None."""

    def after_step(self, optimizer: Optimizer) -> None:
        """It has made it."""


def watch_optimizers_(watcher: StepWatcher) -> None:
    """Hook every optimizer there is, of whichever kind, wrapped or made anew, for as long as the watcher
    lives: there is nothing to attach, and nothing to forget."""
    this = weakref.ref(watcher)

    def before(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        found = this()
        return None if found is None else found.before_step(optimizer, args, kwargs)

    def after(optimizer: Optimizer, *_: Any) -> None:
        if (found := this()) is not None:
            found.after_step(optimizer)

    for hook in (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)):
        weakref.finalize(watcher, hook.remove)


def parameters_of(optimizer: Optimizer) -> set[int]:
    """The parameters of an optimizer, by `id`."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def takes_attention_mask(model: nn.Module, regions: Sequence[str]) -> bool:
    """Whether the module that calls the regions is told of padding, as those of `transformers` are."""
    return "attention_mask" in inspect.signature(_trunk(model, regions).forward).parameters


def watcher_of(model: nn.Module) -> Watcher | None:
    """Who watches a model; None for a copy."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((hook.watcher for hook in hooks if isinstance(hook, _Before)), None)


def forget_orphans_(model: nn.Module, regions: Collection[nn.Module]) -> None:
    """Take the hooks from a copy that stand there in the place of a watcher's: it has one of its own.

    Args:
        regions: that it watches; others are copies that were put there.
    """
    for module in model.modules():
        if isinstance(module, RegionModule) and module not in regions:
            continue
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Orphan | _Nothing)]:
                del hooks[key]


#: Why a copy that was made in training does not run.
COPIED = (
    "this model is a copy that was made in training, without the pipeline that knows its masks, seeds and "
    "steps: copy both, copy.deepcopy((model, pipeline)), or the model inside `with pipeline.evaluation():`, "
    "or apply the same passes to a stock model and load_state_dict()"
)
_UNTRAINED = (
    "this model is a copy without the pipeline that renews its masks, scales and seeds and knows its steps: "
    "to train it, copy both, copy.deepcopy((model, pipeline)), or apply the same passes to a stock model and "
    "load_state_dict()"
)
_PART = (
    "this block is a copy, and no pipeline renews its masks, scales and seeds and knows its steps: give the "
    "stock model all its blocks, apply the same passes and load_state_dict(); to evaluate it alone, copy it "
    "inside `with pipeline.evaluation():`"
)

#: Why nothing that has to be one graph goes through a hook.
_HIDDEN = (
    "masks, scales and seeds are renewed beside the graph: torch.export with strict=False inside `with "
    "pipeline.evaluation():`, torch.compile without fullgraph=True"
)


def refuse_to_export() -> None:
    """To be called where a forward renews what an exported program would renew at every call, or never."""
    if torch.compiler.is_exporting():
        raise Act24Error(
            "torch.export of a model whose masks, scales or seeds are renewed beside its forward: call "
            "model.eval() and export inside `with pipeline.evaluation():`, where they are those of the "
            "weights as they are"
        )


class _Hook:
    """A hook of a model; copies of it, which have no pipeline, have another in its place."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher


class _Before(_Hook):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Orphan | _Nothing:
        kind, arguments = self.__reduce__()
        return kind(*arguments)

    def __reduce__(self) -> tuple[type[_Orphan | _Nothing], tuple[str, ...]]:
        why = self.watcher.copied()
        return (_Nothing, ()) if why is None else (_Orphan, (why,))

    @classmethod
    def hide(cls) -> None:
        """From torch.compile, for whoever compiles the whole model. Not at import, which would not be
        fast."""
        if not hasattr(cls, "_hidden"):
            cls._hidden = True
            for kind in (_Before, _After):
                hidden = torch.compiler.disable(kind.__call__, reason=_HIDDEN)
                kind.__call__ = hidden  # type: ignore[method-assign]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.watcher.before_forward(module, kwargs)

    def as_served(self) -> AbstractContextManager[None] | None:
        return self.watcher.as_served()


class _Harmless(_Hook):
    """A hook in whose place a copy has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Nothing:
        return _Nothing()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Nothing, ()


class _After(_Harmless):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.watcher.after_forward(module, output)


class _Reads(_Harmless):
    """Behind a forward that Ctrl-C ended somebody may save what there is."""

    def __call__(self, *_: Any) -> None:
        self.watcher.settle()

    def of_copy(self) -> _Orphan | None:
        """What a copy of the region has: it may be put where no copy of the model is around it."""
        why = self.watcher.copied()
        return None if why is None else _Orphan(why and _PART, _PART)


class _Nothing:
    def __call__(self, *_: Any) -> None:
        pass


class _Orphan:
    """Refuses what a copy of a model cannot do."""

    def __init__(self, why: str, untrained: str = _UNTRAINED) -> None:
        self._why, self._untrained = why, untrained

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            raise Act24Error(self._untrained)
        if self._why and not module.training:
            raise Act24Error(self._why)


def trunks_of(model: nn.Module, regions: Sequence[str]) -> tuple[nn.Module, ...]:
    """The module that calls the regions, outside of them. Where the head is one of them, that which calls
    the others too: a loss may read hidden states and multiply with the head's weight itself."""
    head = head_of(model)
    others = [fqn for fqn in regions if model.get_submodule(fqn) is not head]
    return tuple(dict.fromkeys((_trunk(model, regions), _trunk(model, others))))


def _trunk(model: nn.Module, regions: Sequence[str]) -> nn.Module:
    """The innermost module that calls all regions and is none of a list of blocks."""
    paths = [fqn.split(".")[:-1] for fqn in regions]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common:
        module = model.get_submodule(".".join(common))
        parent = model.get_submodule(".".join(common[:-1]))
        if not _only_holds(module) and not _only_holds(parent) and not isinstance(module, Remains):
            return module
        common.pop()
    return model


def _only_holds(module: nn.Module) -> bool:
    """Whether a module is a list or a dictionary of others."""
    return type(module).forward is nn.Module.forward
