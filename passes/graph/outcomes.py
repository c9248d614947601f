"""What a forward gives, and in what two of them differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict, immutable_list


@dataclass(frozen=True)
class Outcome:
    """What a forward gives.

    Attributes:
        outputs: the tensors in what it returns.
        gradients: in training, of its inputs.
        left: what its arguments and buffers are afterwards.
        outline: what it returns beside tensors.
    """

    outputs: Sequence[Tensor]
    gradients: Sequence[Tensor | None] = ()
    left: Sequence[Tensor] = ()
    outline: Any = None


def has_nothing_finite(outcome: Outcome) -> bool:
    """Whether there is a tensor of infinities and nan alone, which would agree with any other such."""
    tensors = [t for t in (*outcome.outputs, *outcome.gradients) if t is not None and t.is_floating_point()]
    return any(t.numel() and not bool(t.isfinite().any()) for t in tensors)


def difference_of(expected: Outcome, found: Outcome) -> str:
    """In what two outcomes differ, or the empty string."""
    if len(expected.outputs) != len(found.outputs):
        return "returns another number of tensors"
    if expected.outline != found.outline:
        return "returns another container, or other values beside the tensors in it,"
    for a, b in zip(expected.outputs, found.outputs, strict=True):
        if a.dtype != b.dtype:
            return f"returns {b.dtype} where the module returns {a.dtype}"
        if not _equal(a, b):
            return "gives other numbers than the module"
    if len(expected.gradients) != len(found.gradients):
        return "has no gradient, or one too many"
    for a, b in zip(expected.gradients, found.gradients, strict=True):
        if (a is None) != (b is None):
            return "gives an input no gradient, or one too many"
        if a is not None and b is not None:
            # Half precision rounds by 1/256; what is dropped or added is off by its whole size.
            close = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
            size = a[a.isfinite()].abs()  # an infinite tolerance would let anything pass, and nan is none
            largest = float(size.max()) if size.numel() else 0.0
            if not torch.allclose(a, b, rtol=close, atol=close * largest, equal_nan=True):
                return "gives other gradients than the module"
    if not all(map(_equal, expected.left, found.left)):
        return "leaves other numbers in its arguments or buffers than the module"
    return ""


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def outline_of(value: Any) -> Any:
    """What a value is beside the tensors in it, as data that compares. fx has lists and dictionaries of its
    own."""
    kind = next((k for k in (list, dict) if type(value) in (k, _OF_FX[k])), type(value))
    if isinstance(value, Mapping):
        return kind, [(key, outline_of(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return kind, [outline_of(part) for part in value]
    return kind, value if isinstance(value, bool | int | float | str) else None


_OF_FX = {list: immutable_list, dict: immutable_dict}
