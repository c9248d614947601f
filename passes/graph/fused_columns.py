"""Two products in place of LoST's two branches (`act24.passes.lost`), where no pass has taken a part of them.

    γ · linear(f(linear(x, W_in)), W_out) + (1 - γ) · linear(x[..., I], W_I)
    ==>   low_rank_beside_columns(x, W_in, W_out, W_I, I, γ, f)

Both compute the same function of the same parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from act24.low_rank.activations import ACTIVATIONS
from act24.low_rank.columns import low_rank_beside_columns, select_columns
from act24.passes.graph.normal_form import is_call, replace_node, weight_name
from act24.passes.graph.region import Region

#: Most columns, as a share of the rank: each costs what a channel of the bottleneck does.
_FEW = 0.25


def fuse_columns(region: Region) -> None:
    """Rewrite, in place, every sum of two branches that is still as `lost` wrote it and has few columns."""
    for node in list(region.graph.nodes):
        if arguments := _branches(region, node):
            with region.graph.inserting_before(node):
                fused = region.graph.call_function(low_rank_beside_columns, arguments)
            replace_node(region.graph, node, fused)


def _branches(region: Region, node: fx.Node) -> tuple | None:
    """The arguments of the fused function, where a node is the sum that `lost` writes."""
    if not (is_call(node, torch.add) and "alpha" in node.kwargs):
        return None
    scaled, columns = node.args
    if not (_alone(scaled, torch.mul) and _alone(columns, F.linear) and _alone(scaled.args[0], F.linear)):
        return None
    (low, gamma), (kept, weight_columns, _) = scaled.args, columns.args
    hidden, weight_out, _ = low.args
    if not (_alone(kept, select_columns) and len(getattr(hidden, "users", ())) == 1):
        return None
    activation = next((name for name, f in ACTIVATIONS.items() if f and is_call(hidden, f)), "none")
    inner = hidden if activation == "none" else hidden.args[0]
    x, indices = kept.args
    if not (_alone(inner, F.linear) and inner.args[0] is x):
        return None
    if _size(region, columns, 1) > _FEW * _size(region, inner, 0):
        return None
    return x, inner.args[1], weight_out, weight_columns, indices, gamma, activation


def _alone(node: object, target: object) -> bool:
    """Whether a node calls a function, for one reader."""
    return is_call(node, target) and len(node.users) == 1  # type: ignore[union-attr]


def _size(region: Region, linear: fx.Node, dimension: int) -> int:
    return region.parameters[weight_name(linear) or ""].shape[dimension]
