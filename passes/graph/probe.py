"""What a model is called with to see what it computes, and what it probably takes where nobody says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from act24.errors import PassError

#: What a model is called with: a tensor, positional arguments, or keyword arguments.
Probe = Tensor | Sequence[Any] | Mapping[str, Any]

_ROWS, _TOKENS, _SIDE = 2, 8, 32


@dataclass(frozen=True)
class Arguments:
    """Of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """The same with what a function makes of each tensor."""
        apply = lambda v: function(v) if isinstance(v, Tensor) else v  # noqa: E731
        return Arguments(tree_map(apply, self.args), tree_map(apply, self.kwargs))

    def __str__(self) -> str:
        named = [("", value) for value in self.args] + [(f"{n} ", v) for n, v in self.kwargs.items()]
        return ", ".join(f"{n}{list(v.shape)}" for n, v in named if isinstance(v, Tensor)) or "the probe"


def device_of(module: nn.Module) -> torch.device:
    """Where a module lies."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def arguments_of(probe: Probe) -> Arguments:
    """A probe that the user gave, as what a model is called with.

    Raises:
        PassError: it is nothing of the kind.
    """
    if isinstance(probe, Tensor):
        return Arguments((probe,))
    if isinstance(probe, str) or not isinstance(probe, Sequence | Mapping):
        raise PassError(
            f"probe is {probe!r}: give what model(…) takes, a tensor, a list of positional arguments, or a "
            "mapping of keyword arguments"
        )
    return Arguments((), dict(probe)) if isinstance(probe, Mapping) else Arguments(tuple(probe))


def guesses(model: nn.Module) -> Iterator[Arguments]:
    """Inputs that a model may take, small and random."""
    generator = torch.Generator().manual_seed(0)
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = getattr(model, "config", None)

    def ids(words: int) -> Tensor:
        # Neither the first nor the last few: those are the ones with a meaning of their own.
        return torch.randint(min(5, words - 1), max(words - 5, 6), (_ROWS, _TOKENS), generator=generator).to(
            device
        )

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def size(name: str) -> Any:
        return getattr(config, name, None)

    takes = inspect.signature(type(model).forward).parameters
    words = size("vocab_size") or next(
        (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 0
    )
    kwargs: dict[str, Any] = {}
    if "pixel_values" in takes and size("num_channels"):
        side = size("image_size") or _SIDE
        sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
        kwargs["pixel_values"] = numbers(_ROWS, size("num_channels"), *sides)
    if "input_features" in takes and size("num_mel_bins"):
        kwargs["input_features"] = numbers(
            _ROWS, size("num_mel_bins"), 2 * (size("max_source_positions") or 50)
        )
    for name in ("input_ids", "decoder_input_ids"):
        if name in takes and words:
            kwargs[name] = ids(words)
    if kwargs:
        yield Arguments((), kwargs)
        return
    tried = set[int]()  # one of each kind: what comes first may be registered before what is called first
    for module in model.modules():
        weight = module._parameters.get("weight")
        kind = 2 if isinstance(module, nn.Embedding) else 0 if weight is None else weight.ndim + 1
        if kind in tried:
            continue
        tried.add(kind)
        if isinstance(module, nn.Embedding):
            yield Arguments((ids(module.num_embeddings),))
        elif isinstance(module, nn.Conv2d):
            yield Arguments((numbers(_ROWS, module.in_channels, _SIDE, _SIDE),))
        elif isinstance(module, nn.Conv1d):
            yield Arguments((numbers(_ROWS, module.in_channels, _SIDE),))
        elif weight is not None:
            width = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[-1]
            yield Arguments((numbers(_ROWS, _TOKENS, width),))


def features(module: nn.Module, graph: fx.Graph) -> Arguments | None:
    """An input for a module that the probe does not reach: features, where it takes one value that ends up,
    by way of norms and the like, in a linear."""
    names = [node for node in graph.nodes if node.op == "placeholder"]
    linear = next((node for node in graph.nodes if node.target is torch.nn.functional.linear), None)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if len(names) != 1 or linear is None:
        return None
    transposed = linear.args[1].op == "call_method"
    name = linear.args[1].args[0].target if transposed else linear.args[1].target
    if name not in parameters:
        return None
    weight = parameters[name]
    width = weight.shape[0 if transposed else -1]
    x = torch.randn(_ROWS, _TOKENS, width, generator=torch.Generator().manual_seed(0))
    return Arguments((x.to(weight.device, weight.dtype),))
