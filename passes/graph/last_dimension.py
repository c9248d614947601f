"""Which steps of a graph leave a linear's features in the last dimension, where 2:4 takes four neighbours.

What is known to do so is listed: all else may put tokens there.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from act24.passes.graph.flow import PRODUCTS

#: Names that operators have besides those of torch's functions.
_OPERATORS = {"truediv": "div", "floordiv": "floor_divide", "and_": "logical_and", "or_": "logical_or"}
_KEEP = {"dropout", "alpha_dropout", "feature_alpha_dropout", "layer_norm", "rms_norm", "batch_norm"}
_KEEP |= {"group_norm", "normalize", "softmax", "log_softmax", "softmin", "glu", "relu6", "hardtanh", "rrelu"}
_KEEP |= {"celu", "selu", "elu", "prelu", "leaky_relu", "hardswish", "hardsigmoid", "softsign", "threshold"}
_KEEP |= {"logsigmoid", "tanhshrink", "softshrink", "hardshrink", "mish", "softplus", "where", "masked_fill"}
_KEEP |= {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach"}
_KEEP |= {"chunk", "split", "tensor_split", "cat", "concat", "narrow", "pad", "expand", "expand_as", "repeat"}
_KEEP |= {"roll", "flip", "unflatten"}
_MODULES = tuple(
    f"torch.nn.modules.{name}" for name in ("activation", "dropout", "normalization", "batchnorm")
)


def keeps_last(node: fx.Node, module: nn.Module, widths: Collection[int]) -> bool:
    """Whether what a node gives has features last if what it is given has.

    Args:
        module: what the graph is of.
        widths: the numbers of features of the linears around.
    """
    if node.op == "call_module":
        called = dict(module.named_modules()).get(str(node.target))
        own = type(called).__module__.startswith(_MODULES) and not isinstance(called, nn.MultiheadAttention)
        return own or type(called) is nn.Identity
    if getattr(node.target, "__module__", None) is not None and node.target.__module__.startswith("act24."):  # type: ignore[union-attr]
        return True
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    if name in ("view", "reshape"):
        return _splits_features(node, widths)
    if name == "getitem":
        return _selects_before(node.args[1])
    if name == "flatten":
        end = node.kwargs.get("end_dim", (*node.args, None, None, None)[2])
        return isinstance(end, int) and end != -1
    if name in ("squeeze", "unsqueeze"):
        dimension = node.kwargs.get("dim", (*node.args, None)[1])
        return isinstance(dimension, int) and dimension != -1
    if name == "einsum":
        return _same_letter(node)
    return name in _KEEP or _is_pointwise(_OPERATORS.get(name, name))


def meets_features(node: fx.Node, given: fx.Node | None, made: Collection[fx.Node]) -> bool:
    """Whether a product with a weight has that weight's features last: in what it gives, or contracts the
    last dimension of what it is given.

    Args:
        given: the operand that is asked about; None: the product itself.
        made: the nodes that come from inputs; the other operands are weights.
    """
    if node.target is torch.einsum:
        return _contracts(node, given, made)
    if node.target is F.linear or node.target in PRODUCTS:
        first = 1 if getattr(node.target, "__name__", node.target) == "baddbmm" else 0
        operands = node.args[first : first + 2]
        return len(operands) == 2 and operands[1] not in made and given in (None, operands[0])
    return True


def _splits_features(node: fx.Node, widths: Collection[int]) -> bool:
    """Whether rows of what a reshape gives lie within one token's features."""
    given: Any = node.args[1:]
    sizes: Any = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    last = sizes[-1] if sizes else None
    if isinstance(last, fx.Node):  # h.shape[-1], h.size(-1)
        return last.target in (operator.getitem, "size") and last.args[1:] == (-1,)
    return isinstance(last, int) and last > 0 and any(width % last == 0 for width in widths)


def _selects_before(index: Any) -> bool:
    """Whether an index takes no number and adds no dimension at the end."""
    if not isinstance(index, tuple):
        return index is not None
    last: Any = index[-1] if index else None
    return last is not None and not (isinstance(last, int) and (Ellipsis in index or len(index) > 2))


def _letters(node: fx.Node) -> tuple[list[str], str] | None:
    """Those of the operands of einsum and of its result."""
    equation = node.args[0] if node.args else None
    if not isinstance(equation, str) or "->" not in equation:
        return None
    operands, result = equation.replace(" ", "").split("->")
    return operands.split(","), result


def _same_letter(node: fx.Node) -> bool:
    letters = _letters(node)
    return letters is not None and bool(letters[1]) and all(one[-1:] == letters[1][-1] for one in letters[0])


def _contracts(node: fx.Node, given: fx.Node | None, made: Collection[fx.Node]) -> bool:
    letters = _letters(node)
    if letters is None or len(letters[0]) != len(node.args) - 1:
        return False
    of = list(zip(node.args[1:], letters[0], strict=True))
    weights = "".join(one for operand, one in of if operand not in made)
    if given is None:
        values = "".join(one for operand, one in of if operand in made)
        return letters[1][-1:] != "" and letters[1][-1] in weights and letters[1][-1] not in values
    last = next(one[-1:] for operand, one in of if operand is given)
    return last != "" and last in weights and last not in letters[1]


@cache
def _is_pointwise(name: str) -> bool:
    """Whether torch itself says so of its function of this name."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else packet.overloads()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)
