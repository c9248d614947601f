"""A model as a chain of blocks, of which one at a time is on the device.

Hidden states stay in host memory, one buffer for all calibration rows, overwritten batch by batch as each
block is passed. Padding is behind the text, where causal attention keeps it from everything else, so that no
attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from act24.errors import Act24Error

#: Arguments of a block behind the hidden states.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Caught(Exception):
    """The first block was reached."""


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks, by name: the list of modules with most matrix elements.

    Raises:
        Act24Error: the model has no list of modules with matrices, or is no decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise Act24Error(f"{type(model).__name__} has an encoder beside its decoder, which is not supported")
    best: dict[str, nn.Module] = {}
    size = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            elements = sum(p.numel() for p in module.parameters() if p.ndim == 2)
            if elements > size:
                size = elements
                best = {f"{name}.{leaf}": child for leaf, child in module.named_children()}
    if not best:
        raise Act24Error(f"{type(model).__name__} has no list of blocks with linears")
    return best


def transposed_weights(model: nn.Module) -> set[str]:
    """The names of weights that are stored `[in, out]`: GPT-2's Conv1D."""
    return {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}


@dataclass(frozen=True)
class Linear:
    """A linear as it was called.

    Attributes:
        name: of its weight, local to the block.
        parameter: the weight as it is stored.
        transposed: stored `[in, out]`, as Conv1D does.
    """

    name: str
    parameter: nn.Parameter
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, a view."""
        return self.parameter.detach().T if self.transposed else self.parameter.detach()

    def stored(self, dense: Tensor) -> Tensor:
        """A tensor `[out, in]` as the parameter is stored."""
        return dense.T.contiguous() if self.transposed else dense


class _Observer(TorchFunctionMode):
    """Shows every product of inputs with a weight, whatever module or graph makes it."""

    def __init__(self, weights: Mapping[int, str], see: Callable[[str, bool, Tensor], None]) -> None:
        super().__init__()
        self._weights, self._see = weights, see

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if func is F.linear and id(args[1]) in self._weights:
            self._see(self._weights[id(args[1])], False, args[0])
        elif func is torch.addmm and len(args) > 2 and id(args[2]) in self._weights:
            self._see(self._weights[id(args[2])], True, args[1])
        return func(*args, **kwargs)


class Chain:
    """The blocks of a model, and what goes into the next one.

    Attributes:
        blocks: by name.
        pads: by batch, boolean `[B, S]`, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        pads: Sequence[Tensor | None],
        device: torch.device,
    ) -> None:
        """Run what stands before the blocks.

        Args:
            model: in host memory; what does not lie in blocks has to be in one place.
            batches: int64 `[B, S]` each.
            device: where blocks run.

        Raises:
            Act24Error: the model is no chain of blocks.
        """
        self.blocks = decoder_blocks(model)
        self.pads = pads
        self._device = device
        modules = list(self.blocks.values())
        home = next(model.parameters()).device
        self._hidden: list[Tensor] = []
        # What else blocks are called with, by batch: the same list for batches that it is equal for.
        self._calls: list[list[_Call]] = []
        distinct: list[list[_Call]] = []
        for ids in batches:
            hidden, calls = _catch(model, modules, ids.to(home), device)
            self._hidden.append(hidden.to("cpu"))
            equal = next((before for before in distinct if _same(before, calls)), None)
            if equal is None:
                # Of a model that calls its blocks with something of the tokens, as Gemma 4's, in host memory.
                equal = calls if not distinct else _moved(calls, torch.device("cpu"))
                distinct.append(equal)
            self._calls.append(equal)

    @torch.no_grad()
    def forward(
        self, index: int, see: Callable[[Tensor | None, str, bool, Tensor], None] | None = None
    ) -> Iterator[Tensor]:
        """The outputs of a block for each batch, on the device.

        Args:
            see: called with every product: the padding of the batch, the local name of the weight, whether it
                is transposed, and the inputs.
        """
        block = list(self.blocks.values())[index]
        weights = {id(p): name for name, p in block.named_parameters() if p.ndim == 2}
        for number in range(len(self._hidden)):
            hidden, pads = self.inputs(number), self.pads[number]
            if see is None:
                yield self.run(index, hidden, number)
                continue
            with _Observer(weights, partial(see, pads)):
                output = self.run(index, hidden, number)
            yield output

    def inputs(self, number: int) -> Tensor:
        """What goes into the block at hand, of a batch, on the device."""
        return self._hidden[number].to(self._device)

    def __len__(self) -> int:
        """How many batches."""
        return len(self._hidden)

    def run(self, index: int, hidden: Tensor, number: int) -> Tensor:
        """A block on hidden states `[B, S, D]` of a batch, called as the model calls it for that batch."""
        args, kwargs = _moved(self._calls[number][index], self._device)
        return _tensor(list(self.blocks.values())[index](hidden, *args, **kwargs))

    def advance(self, index: int) -> None:
        """Pass a block: its outputs are what goes into the next one."""
        for number, output in enumerate(self.forward(index)):
            self._hidden[number].copy_(output)

    @contextmanager
    def on_device(self, index: int) -> Iterator[nn.Module]:
        """A block on the device, and back where it was afterwards."""
        block = list(self.blocks.values())[index]
        home = next(block.parameters()).device
        block.to(self._device)
        try:
            yield block
        finally:
            block.to(home)


def _same(one: Any, other: Any) -> bool:
    """Whether calls of blocks are equal, value by value."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other.to(one.device))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other))


def _tensor(output: Any) -> Tensor:
    """Hidden states, which older blocks return in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def _catch(
    model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor, device: torch.device
) -> tuple[Tensor, list[_Call]]:
    """The hidden states that go into the first block, and what else each block is called with: no block runs
    but the first, on one row, to see whether it returns a tuple."""
    seen: list[_Call] = []
    entered: list[Tensor] = []
    as_tuple = False

    def recorder(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        entered.append(hidden_states)
        seen.append((_moved(args, device), _moved(kwargs, device)))
        if len(seen) == len(blocks):
            raise _Caught
        return (hidden_states,) if as_tuple else hidden_states

    def probe(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal as_tuple
        as_tuple = not isinstance(type(blocks[0]).forward(blocks[0], hidden_states, *args, **kwargs), Tensor)
        raise _Caught

    # One token is enough for the probe.
    for patched, function, tokens in ((blocks[:1], probe, ids[:1, :1]), (blocks, recorder, ids)):
        try:
            for block in patched:
                block.forward = function  # type: ignore[method-assign]
            model(tokens)
        except _Caught:
            pass
        finally:
            for block in patched:
                vars(block).pop("forward", None)
    if len(seen) != len(blocks):
        raise Act24Error(
            f"{type(model).__name__} calls {len(seen)} of its {len(blocks)} blocks one after the other, and "
            "pruning goes block by block"
        )
    return entered[0], seen


def _moved(value: Any, device: torch.device) -> Any:
    """Arguments of a block on the device. A cache of keys and values is left out: what one batch put into it
    the next would attend to."""
    if isinstance(value, Tensor):
        return value.to(device)
    if hasattr(value, "get_seq_length"):
        return None
    if isinstance(value, tuple | list):
        return type(value)(_moved(entry, device) for entry in value)
    if isinstance(value, dict):
        moved = {key: _moved(entry, device) for key, entry in value.items()}
        return moved | ({"use_cache": False} if "use_cache" in moved else {})
    return value
