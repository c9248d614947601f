"""The same tensor in the layouts that tensors of users and of autograd come in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from operator_cases import operator_cases
from torch import Tensor

from act24.sparse24.kernels.shared.registry import OPERATORS

LAYOUTS = ("strided", "transposed", "offset", "misaligned")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Equal to `tensor`, in memory of its own that has other numbers all around.

    Args:
        layout: every second column of a wider one; the transpose of what lies in memory, the rows behind some
            others; the same, but not from a multiple of 16 bytes on.
    """
    flat = tensor if tensor.ndim else tensor[None]
    if layout == "strided":
        result = filled(tensor, *flat.shape[:-1], 2 * flat.shape[-1])[..., ::2]
    elif layout == "transposed":
        result = filled(tensor, *reversed(flat.shape)).permute(*reversed(range(flat.ndim)))
    else:
        offset = 64 if layout == "offset" else 1
        result = filled(tensor, offset + flat.numel() + 5)[offset : offset + flat.numel()].view(flat.shape)
    result.copy_(flat)
    return result if tensor.ndim else result[0]


def filled(like: Tensor, *shape: int) -> Tensor:
    size = like.element_size()
    garbage = torch.randint(1, 100, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return garbage % 2 == 0 if like.dtype is torch.bool else garbage.view(like.dtype)


def each_layout(arguments: tuple, names: tuple[str, ...]) -> Iterator[tuple[str, str, tuple]]:
    """Every tensor among the arguments in every layout, one at a time: its name, the layout, all
    arguments."""
    for place, (name, argument) in enumerate(zip(names, arguments, strict=False)):
        for layout in LAYOUTS if isinstance(argument, Tensor) else ():
            yield name, layout, (*arguments[:place], laid_out(argument, layout), *arguments[place + 1 :])


def check_layouts(name: str, function: Callable[..., Any]) -> None:
    """The outputs are those of plain tensors, bit for bit; what only our operators write is refused."""
    arguments, ours = operator_cases()[name], OPERATORS[name].ours
    parameters = tuple(inspect.signature(function).parameters)
    expected = as_bytes(function(*arguments))
    tried = 0
    for parameter, layout, others in each_layout(arguments, parameters):
        tried += 1
        changed = others[parameters.index(parameter)]
        if parameter in ours and (
            layout in ("strided", "transposed") or (layout == "misaligned" and changed.is_floating_point())
        ):
            with pytest.raises(ValueError, match=f"{name}: {parameter} has to be as an operator returned it"):
                function(*others)
            continue
        for a, b in zip(as_bytes(function(*others)), expected, strict=True):
            assert torch.equal(a, b), f"{name} reads {parameter} wrong when it is {layout}"
    assert tried >= len(LAYOUTS)


def as_bytes(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [output.contiguous().flatten().view(torch.uint8) for output in outputs]
