"""Which half of a linear's output a value is, in the spellings that models have."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from act24.passes.graph.normal_form import is_call, is_transposed, weight_name
from act24.passes.graph.region import Region

_SPLITS = {"chunk": "chunks", "tensor_split": "indices_or_sections", "split": "split_size_or_sections"}
_WHOLE = slice(None)


def half_of(region: Region, value: object) -> tuple[object, int | None, fx.Node | None]:
    """The linear behind one half of its features, which half, and the node that both halves are taken from;
    of what is no half the value, None and None."""
    whole = value, None, None
    if not isinstance(value, fx.Node) or len(value.args) < 2:
        return whole
    source: Any = value.args[0]
    if _name(value) == "narrow" and is_call(source, F.linear):
        dimension, start, length = (*value.args[1:], None, None)[:3]
        half = _half(region, source)
        fits = dimension == -1 and half and length == half and start in (0, half)
        return (source, int(start != 0), source) if fits else whole
    if not is_call(value, operator.getitem) or not isinstance(source, fx.Node):
        return whole
    index: Any = value.args[1]
    if is_call(source, F.linear):
        half = _half(region, source)
        if not half or not isinstance(index, tuple) or len(index) != 2 or index[0] is not Ellipsis:
            return whole
        ends = {(None, half): 0, (0, half): 0, (half, None): 1, (half, 2 * half): 1}
        taken = index[1]
        number = ends.get((taken.start, taken.stop)) if isinstance(taken, slice) else None
        return whole if number is None or taken.step not in (None, 1) else (source, number, source)
    linear: Any = source.args[0] if source.args else None
    if not is_call(linear, F.linear) or len(source.users) != 2:
        return whole
    if _name(source) == "unflatten":
        number = index[1] if isinstance(index, tuple) and len(index) == 3 else None
        fits = index[::2] == (Ellipsis, _WHOLE) if number in (0, 1) else False
        two = source.args[1:2] == (-1,) and [*(source.args[2:3] or [()])[0]][:1] == [2]  # type: ignore[misc]
        return (linear, number, source) if fits and two and _half(region, linear) else whole
    return (linear, index, source) if index in (0, 1) and _splits(region, source, linear) else whole


def _splits(region: Region, node: fx.Node, linear: fx.Node) -> bool:
    """Whether a node splits the features of a linear in two."""
    name = _name(node)
    if name not in _SPLITS or not (half := _half(region, linear)):
        return False
    given: dict[str, Any] = dict(zip(("input", _SPLITS[name], "dim"), node.args, strict=False)) | node.kwargs
    parts = given.get(_SPLITS[name], given.get("split_size"))
    fits = parts in (half, [half, half], (half, half)) if name == "split" else parts == 2
    return fits and given.get("dim") == -1


def _half(region: Region, linear: fx.Node) -> int:
    """Half of the features that a linear gives; 0 where they are odd or not known."""
    name = weight_name(linear)
    if name not in region.parameters or is_transposed(linear):
        return 0
    rows = region.parameters[name].shape[0]
    return 0 if rows % 2 else rows // 2


def _name(node: fx.Node) -> str:
    """Of the function or method that a node calls."""
    if node.op == "call_method" or node.target in (
        torch.chunk,
        torch.split,
        torch.tensor_split,
        torch.narrow,
    ):
        return str(getattr(node.target, "__name__", node.target))
    return "unflatten" if node.target is torch.unflatten else ""
