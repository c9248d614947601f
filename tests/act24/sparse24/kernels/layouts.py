"""The same tensor in the layouts that tensors of users and of autograd come in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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


def check_layouts(name: str, function: Callable[..., Any]) -> None:
    """The outputs are those of plain tensors, bit for bit; what only our operators write is refused.

    As many calls as there are layouts: in each of them every tensor is in another one than in the others.
    """
    arguments, ours = operator_cases()[name], OPERATORS[name].ours
    parameters = tuple(inspect.signature(function).parameters)
    tensors = [place for place, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    expected = as_bytes(function(*arguments))
    assert tensors
    for turn in range(len(LAYOUTS)):
        others, told = list(arguments), {}
        for place in tensors:
            layout = LAYOUTS[(place + turn) % len(LAYOUTS)]
            changed = laid_out(arguments[place], layout)
            if parameters[place] in ours and (
                layout in ("strided", "transposed")
                or (layout == "misaligned" and changed.is_floating_point())
            ):
                message = f"{name}: {parameters[place]} has to be as an operator returned it"
                with pytest.raises(ValueError, match=message):
                    function(*arguments[:place], changed, *arguments[place + 1 :])
                continue
            others[place], told[parameters[place]] = changed, layout
        for a, b in zip(as_bytes(function(*others)), expected, strict=True):
            assert torch.equal(a, b), f"{name} reads wrong what is laid out so: {told}"


def as_bytes(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [output.contiguous().flatten().view(torch.uint8) for output in outputs]
