"""A decoder block over a cache, made from the block's own graph.

    attention(q, k, v, causal)   ==>   attend(q, k, v, keys, values, place)

All else stays as it is, whatever passes made of the block. Blocks with equal code share one function, so that
torch.compile compiles it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from act24.errors import Act24Error
from act24.inference.attention import attend

#: (block, hidden [B, S, D], cos, sin [B, 1, S, d / 2], keys, values [B, H_kv, L, d], place) -> [B, S, D]
LayerForm = Callable[..., Tensor]

_INPUTS = ("hidden_states", "cos", "sin")
_CACHE = ("act24_keys", "act24_values", "act24_place")


def cached_layers(layers: Sequence[nn.Module]) -> list[LayerForm]:
    """For each block the function that computes it over a cache.

    Raises:
        Act24Error: a block is none of act24's, or its attention is not the causal one of `act24.llama`.
    """
    forms: dict[tuple[Any, ...], LayerForm] = {}
    found = []
    for index, layer in enumerate(layers):
        graph = _cached_graph(layer, f"block {index}")
        code = graph.python_code("self")
        key = (code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
        if key not in forms:
            forms[key] = type(fx.GraphModule(layer, graph)).forward
        found.append(forms[key])
    return found


def _cached_graph(layer: nn.Module, name: str) -> fx.Graph:
    graph = fx.Tracer().trace(layer)
    inputs = tuple(node.target for node in graph.nodes if node.op == "placeholder")
    cores = [
        node
        for node in graph.nodes
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention
    ]
    causal = [node for node in cores if len(node.args) == 3 and node.kwargs.get("is_causal") is True]
    if inputs != _INPUTS or len(cores) != 1 or not causal:
        raise Act24Error(
            f"{name} is no decoder block of act24.llama: it takes {', '.join(map(str, inputs))} and has "
            f"{len(causal)} causal attentions of {len(cores)}; generation needs one"
        )
    (core,) = causal
    last = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    with graph.inserting_after(last):
        cache = [graph.placeholder(name) for name in reversed(_CACHE)][::-1]
    with graph.inserting_before(core):
        core.replace_all_uses_with(graph.call_function(attend, (*core.args, *cache)))
    graph.erase_node(core)
    graph.lint()
    return graph
