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
from act24.passes.graph.normal_form import is_transposed, weight_source

#: What a model is called with: a tensor, positional arguments, or keyword arguments.
Probe = Tensor | Sequence[Any] | Mapping[str, Any]

_ROWS, _TOKENS, _SIDE = 2, 8, 32
_SIDES = (32, 28, 64, 224)

#: Arguments whose names tell what they are.
_TOLD = ("pixel_values", "input_features", "input_values", "input_ids", "decoder_input_ids")


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


def obstacle(module: nn.Module) -> str:
    """Why a module cannot be run here, or the empty string."""
    for name, p in module.named_parameters():
        if p.is_meta:
            return "its parameters are on the meta device"
        if type(p) not in (nn.Parameter, Tensor):
            return f"{name} is a {type(p).__name__}"
        if p.device.type not in ("cpu", "cuda"):
            return f"its parameters are on {p.device}"
    return ""


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
    """Inputs that a model may take, small and random: by the names of its arguments, as models of
    `transformers` have them, with the sizes of its configuration; else by what its modules take."""
    named = _Guess(model).named()
    if named:
        yield Arguments((), named)
        first = wanted(model)[0]
        for kept in (
            (first, "decoder_input_ids"),
            ("input_ids", "decoder_input_ids"),
            *((n,) for n in named),
        ):
            fewer = {name: value for name, value in named.items() if name in kept}
            if fewer and len(fewer) < len(named):
                yield Arguments((), fewer)
        return
    yield from _Guess(model).unnamed()


def wanted(model: nn.Module) -> tuple[str, ...]:
    """The names of what a forward has to be given, as far as the model says it; the main one first."""
    parameters = [*inspect.signature(type(model).forward).parameters.values()][1:]
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    main = getattr(model, "main_input_name", None)
    names = [main] if isinstance(main, str) and any(p.name == main for p in plain) else []
    names += [p.name for p in plain if p.default is p.empty or p.name in _TOLD]
    return tuple(dict.fromkeys(names or [p.name for p in plain[:1]]))


def wanted_text(model: nn.Module) -> str:
    """How a probe for a model is written."""
    return f"{{{', '.join(f'{name!r}: …' for name in wanted(model))}}}"


class _Guess:
    """What inputs of a model may look like."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._generator = torch.Generator().manual_seed(0)
        self._device = device_of(model)
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        self._dtype = next(floats, torch.float32)
        self._configs = _configs(getattr(model, "config", None))
        own = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 0)
        sizes = (getattr(config, "vocab_size", None) for config in self._configs)
        self._words = min((size for size in sizes if isinstance(size, int) and size > 1), default=own)

    def named(self) -> dict[str, Tensor]:
        """What the forward has a name for that tells what it takes, if the sizes are known."""
        takes = inspect.signature(type(self._model).forward).parameters
        made: dict[str, Callable[[], tuple[int, ...] | None]] = {
            "pixel_values": self._pictures,
            "input_features": self._spectra,
            "input_values": self._sounds,
        }
        found = {}
        for name, shape_of in made.items():
            if name in takes and (shape := shape_of()) is not None:
                found[name] = self._numbers(*shape)
        for name in ("input_ids", "decoder_input_ids"):
            if name in takes and self._words:
                found[name] = self._ids(self._words)
        return found

    def unnamed(self) -> Iterator[Arguments]:
        """One of each kind: what comes first may be registered before what is called first."""
        tried = set[int]()
        for module in self._model.modules():
            weight = module._parameters.get("weight")
            kind = 2 if isinstance(module, nn.Embedding) else 0 if weight is None else weight.ndim + 1
            if kind in tried:
                continue
            tried.add(kind)
            if isinstance(module, nn.Embedding):
                yield Arguments((self._ids(module.num_embeddings),))
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                dimensions = len(module.kernel_size)
                for side in self._sides() if dimensions == 2 else (_SIDE,):
                    sides = side if isinstance(side, tuple) else (side,) * dimensions
                    yield Arguments((self._numbers(_ROWS, module.in_channels, *sides),))
            elif weight is not None:
                width = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[-1]
                yield Arguments((self._numbers(_ROWS, _TOKENS, width),))

    def _sides(self) -> Iterator[int | tuple[int, int]]:
        """Of pictures: what a module says, then the usual ones, for networks with a linear behind."""
        for module in self._model.modules():
            for name in ("image_size", "img_size"):
                side = vars(module).get(name)
                if isinstance(side, int):
                    yield side
                elif isinstance(side, list | tuple) and len(side) == 2:
                    yield (side[0], side[1])
        yield from _SIDES

    def _pictures(self) -> tuple[int, ...] | None:
        channels = self._size("num_channels") or next(
            (m.in_channels for m in self._model.modules() if isinstance(m, nn.Conv2d)), None
        )
        if channels is None:
            return None
        side: Any = self._size("image_size") or 2 * _SIDE
        if isinstance(side, Mapping):
            side = [*side.values()]
        sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
        frames = self._size("num_frames")
        return (_ROWS, *([frames] if frames else []), channels, *sides)

    def _spectra(self) -> tuple[int, ...] | None:
        if bands := self._size("num_mel_bins"):
            return (_ROWS, bands, 2 * (self._size("max_source_positions") or 50))
        width = self._size("input_feat_per_channel") or self._size("feature_projection_input_dim")
        return (_ROWS, 4 * _TOKENS, width) if width else None

    def _sounds(self) -> tuple[int, ...] | None:
        kernels, strides = self._size("conv_kernel"), self._size("conv_stride")
        if isinstance(kernels, list | tuple) and isinstance(strides, list | tuple):
            samples = 2 * _TOKENS + (self._size("mask_time_length") or 0)  # spans that training masks
            for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
                samples = (samples - 1) * stride + kernel
            return (_ROWS, samples)
        if (bands := self._size("num_mel_bins")) and (length := self._size("max_length")):
            return (_ROWS, length, bands)
        channels = self._size("audio_channels")
        return (_ROWS, channels, 1024) if channels else None

    def _size(self, name: str) -> Any:
        """Of the configuration, or of a part of it."""
        sizes = (getattr(config, name, None) for config in self._configs)
        return next((size for size in sizes if size), None)

    def _ids(self, words: int) -> Tensor:
        # Neither the first nor the last few: those are the ones with a meaning of their own.
        low, high = min(5, words - 1), max(words - 5, 6)
        return torch.randint(low, high, (_ROWS, _TOKENS), generator=self._generator).to(self._device)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self._device, self._dtype)


def _configs(config: Any) -> list[Any]:
    """A configuration of `transformers` and those in it: of the text and the pictures of one model."""
    if not hasattr(config, "model_type"):
        return [] if config is None else [config]
    inner = [value for value in vars(config).values() if hasattr(value, "model_type")]
    return [config, *(part for value in inner for part in _configs(value))]


def features(module: nn.Module, graph: fx.Graph) -> Arguments | None:
    """An input for a module that the probe does not reach: features, where it takes one value that ends up,
    by way of norms and the like, in a linear."""
    names = [node for node in graph.nodes if node.op == "placeholder"]
    linear = next((node for node in graph.nodes if node.target is torch.nn.functional.linear), None)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if len(names) != 1 or linear is None:
        return None
    transposed, name = is_transposed(linear), weight_source(linear)
    if name not in parameters:
        return None
    weight = parameters[name]
    width = weight.shape[0 if transposed else -1]
    x = torch.randn(_ROWS, _TOKENS, width, generator=torch.Generator().manual_seed(0))
    return Arguments((x.to(weight.device, weight.dtype),))
