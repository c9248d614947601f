"""Figures by layer, made on the device and read in one go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from act24.passes.activation24 import SCALE
from act24.passes.activation_statistics import BUFFER
from act24.passes.graph.normal_form import nodes_of, parameter_name
from act24.passes.graph.region import RegionModule, buffers_of
from act24.passes.weight24 import MASK
from act24.sparse24.feed_forward.statistics import STATISTICS
from act24.sparse24.weight.linear24 import linear24
from act24.tools.run.processes import Processes, whole


@dataclass(frozen=True)
class SiteStatistics:
    """What passed one activation since the statistics were last read.

    Attributes:
        layer: index of its block, or None outside one.
        site: name inside the block, `mlp` for the feed-forward network.
        sparsity: share of zeros after the activation, before 2:4.
        crowded_groups: share of the groups of 4 features with more than 2 non-zeros.
        dropped_nonzeros: share of the non-zeros that 2:4 drops.
        dropped_energy: share of the squared activations that it drops.
        feature_dropped_nonzeros, feature_dropped_energy: the same of 2:4 along the tokens, in the weight
            gradients; None where they are dense.
        dense_feature_energy: share of the squared activations in the features that split_gemm leaves dense.
        scale: β of a soft method, 1 for the others.
    """

    layer: int | None
    site: str
    sparsity: float
    crowded_groups: float
    dropped_nonzeros: float
    dropped_energy: float
    feature_dropped_nonzeros: float | None = None
    feature_dropped_energy: float | None = None
    dense_feature_energy: float | None = None
    scale: float = 1.0


def read_activation_statistics_(model: nn.Module, processes: Processes) -> list[SiteStatistics]:
    """Add up the counts of all processes, read them with one transfer, and start them anew.

    Sites that nothing has passed since are left out. Collective: every process has to call it.
    """
    modules = dict(model.named_modules())
    named, known = buffers_of(modules, BUFFER), buffers_of(modules, SCALE)
    if not named:
        return []
    table = processes.sum_(torch.stack(list(named.values())).double())
    one = table.new_ones(())
    scales = [known.get(name, one).double() for name in named]
    table = torch.cat((table, torch.stack(scales)[:, None]), dim=1)  # one transfer for both
    for buffer in named.values():
        buffer.zero_()
    return [
        _site_statistics(name, dict(zip(STATISTICS, row, strict=False)), scale=row[-1])
        for name, row in zip(named, table.tolist(), strict=True)
        if row[0]  # elements
    ]


def _site_statistics(name: str, counts: Mapping[str, float], scale: float) -> SiteStatistics:
    def share(part: str, whole: float) -> float:
        return counts[part] / whole if whole > 0 else 0.0

    layer, site = split_layer(name)
    feature_wise = counts["feature_nonzeros"] > 0
    return SiteStatistics(
        layer,
        site,
        sparsity=share("zeros", counts["elements"]),
        crowded_groups=share("crowded_groups", counts["groups"]),
        dropped_nonzeros=share("dropped_nonzeros", counts["elements"] - counts["zeros"]),
        dropped_energy=share("dropped_energy", counts["energy"]),
        feature_dropped_nonzeros=share("feature_dropped_nonzeros", counts["feature_nonzeros"])
        if feature_wise
        else None,
        feature_dropped_energy=share("feature_dropped_energy", counts["feature_energy"])
        if feature_wise
        else None,
        dense_feature_energy=share("dense_feature_energy", counts["feature_energy"])
        if feature_wise
        else None,
        scale=scale,
    )


def split_layer(fqn: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp.up_proj` is layer 3, `mlp.up_proj`; also of a checkpointed block."""
    match = re.fullmatch(r"(?:.*\.)?(\d+)\.(?:_checkpoint_wrapped_module\.)?(.*)", fqn)
    return (int(match[1]), match[2]) if match else (None, fqn)


def block_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight of every linear of the traced blocks, so no head, which is of no layer.

    Keys are `layer_<i>/attn_q_proj`, `layer_<i>/mlp_up_proj`, …; factors end in `_in` and `_out`.
    """
    weights = {}
    for fqn, module in model.named_modules():
        if isinstance(module, RegionModule) and split_layer(f"{fqn}.")[0] is not None:
            parameters = dict(module.named_parameters())
            names = {name for node in module.graph.nodes for name in _weights(node) if name in parameters}
            weights |= {_weight_tag(f"{fqn}.{name}"): parameters[name] for name in sorted(names)}
    return weights


def weight_sparsity(model: nn.Module) -> dict[str, float]:
    """Share of zeros in each of `block_weights` as the forward multiplies by it, with one transfer.

    Collective where the weights are sharded: every process has to call it.
    """
    weights, masks = block_weights(model), _weight_masks(model)
    if not weights:
        return {}
    counts = [
        whole((weight == 0).sum()) if name not in masks else ((whole(weight) == 0) | ~masks[name]).sum()
        for name, weight in weights.items()
    ]
    zeros = torch.stack(counts).tolist()
    return {name: count / weights[name].numel() for name, count in zip(weights, zeros, strict=True)}


def _weight_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """The masks of the weights that are 2:4 now, under the keys of `block_weights`."""
    return {
        _weight_tag(f"{fqn}.{name}"): module.get_buffer(name + MASK)
        for fqn, module in model.named_modules()
        if isinstance(module, RegionModule)
        for node in nodes_of(module.graph, linear24)
        if (name := parameter_name(node.args[1]))
    }


def _weights(node: torch.fx.Node) -> list[str]:
    """What a node reads under a name that says weight."""
    names = (parameter_name(argument) for argument in node.args)
    return [n for n in names if n and node.op == "call_function" and "weight" in n.rpartition(".")[2]]


def _weight_tag(fqn: str) -> str:
    layer, name = split_layer(fqn)
    module, _, parameter = name.rpartition(".")
    short = module.replace("self_attn.", "attn_").replace(".", "_") or "head"
    return f"layer_{layer}/{short}{parameter.removeprefix('weight')}"
