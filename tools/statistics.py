"""Figures by layer, made on the device and read in one go."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from act24.passes.activation_statistics import BUFFER
from act24.passes.normal_form import parameter_name
from act24.passes.region import RegionModule
from act24.relu2 import STATISTICS
from act24.tools.processes import Processes


@dataclass(frozen=True)
class SiteStatistics:
    """What passed one relu² since the statistics were last read.

    Attributes:
        layer: index of its block, or None outside one.
        site: name inside the block, `mlp` for the feed-forward network.
        sparsity: share of zeros after relu², before 2:4.
        dropped_nonzeros: share of the non-zeros that 2:4 drops.
        dropped_energy: share of the squared activations that it drops.
    """

    layer: int | None
    site: str
    sparsity: float
    dropped_nonzeros: float
    dropped_energy: float


def read_activation_statistics_(model: nn.Module, processes: Processes) -> list[SiteStatistics]:
    """Add up the counts of all processes, read them with one transfer, and start them anew.

    Sites that nothing has passed since are left out. Collective: every process has to call it.
    """
    named = [(name, b) for name, b in model.named_buffers() if name.rpartition(".")[2] == BUFFER]
    if not named:
        return []
    table = processes.sum_(torch.stack([buffer for _, buffer in named]).double())
    for _, buffer in named:
        buffer.zero_()
    found = []
    for (name, _), row in zip(named, table.tolist(), strict=True):
        counts = dict(zip(STATISTICS, row, strict=True))
        if counts["elements"]:
            layer, site = split_layer(name.rpartition(".")[0])
            nonzeros = counts["elements"] - counts["zeros"]
            found.append(
                SiteStatistics(
                    layer,
                    site,
                    counts["zeros"] / counts["elements"],
                    counts["dropped_nonzeros"] / max(nonzeros, 1),
                    counts["dropped_energy"] / max(counts["energy"], torch.finfo(torch.float32).tiny),
                )
            )
    return found


def split_layer(fqn: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp.up_proj` is layer 3, `mlp.up_proj`."""
    match = re.fullmatch(r"(?:.*\.)?(\d+)\.(.*)", fqn)
    return (int(match[1]), match[2]) if match else (None, fqn)


def weight_sparsity(model: nn.Module) -> dict[str, float]:
    """Share of zeros in the weight of every linear of the traced blocks, with one transfer.

    Keys are `layer_<i>/attn_q_proj`, `layer_<i>/mlp_up_proj`, …; factors end in `_in` and `_out`.
    """
    shares = {}
    for fqn, module in model.named_modules():
        if isinstance(module, RegionModule):
            weights = {name for node in module.graph.nodes for name in _weights(node)}
            for name in sorted(weights):
                shares[_weight_tag(f"{fqn}.{name}")] = (module.get_parameter(name) == 0).float().mean()
    if not shares:
        return {}
    return dict(zip(shares, torch.stack(list(shares.values())).tolist(), strict=True))


def _weights(node: torch.fx.Node) -> list[str]:
    """Parameters of two dimensions that a node reads: names that end in `weight` or a factor's name."""
    names = (parameter_name(argument) for argument in node.args)
    return [n for n in names if n and node.op == "call_function" and "weight" in n.rpartition(".")[2]]


def _weight_tag(fqn: str) -> str:
    layer, name = split_layer(fqn)
    module, _, parameter = name.rpartition(".")
    short = module.replace("self_attn.", "attn_").replace(".", "_") or "head"
    return f"layer_{layer}/{short}{parameter.removeprefix('weight')}"
