"""How many parts a split gives, where that does not depend on what is split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from act24.passes.graph.normal_form import is_call

#: The argument that says into what, by the name of the function or method.
_SPLITS = {
    "chunk": "chunks",
    "tensor_split": "indices_or_sections",
    "split": "split_size_or_sections",
    "split_with_sizes": "split_sizes",
}


def parts_of(node: fx.Node, parameters: Mapping[str, Tensor]) -> int:
    """The number of parts that a node gives; 0 where it gives no parts, or as many as there are tokens for.

    Args:
        parameters: of the module that is traced, by name: of a linear's features the number is known.
    """
    name = str(getattr(node.target, "__name__", node.target))
    of_torch = node.op == "call_method" or str(getattr(node.target, "__module__", None)).startswith(
        ("torch", "None")
    )
    if name not in _SPLITS or not of_torch or node.op not in ("call_function", "call_method"):
        return 0
    names = ("input", _SPLITS[name], "dim")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    into = given.get(_SPLITS[name], given.get("split_size", given.get("sections", given.get("indices"))))
    if isinstance(into, list | tuple):
        return len(into) + (name == "tensor_split")
    if not isinstance(into, int) or into < 1:
        return 0
    if name == "tensor_split":
        return into
    features = _features(given.get("input", given.get("self")), parameters) if given.get("dim") == -1 else 0
    size = -(-features // into) if name == "chunk" else into
    return -(-features // size) if size else 0


def _features(value: object, parameters: Mapping[str, Tensor]) -> int:
    """How many features a linear gives, 0 where a value is none or its weight is computed."""
    weight: Any = value.args[1] if is_call(value, F.linear) and len(value.args) > 1 else None
    known = isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target) in parameters
    return parameters[str(weight.target)].shape[0] if known else 0
