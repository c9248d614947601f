"""`lora` and `masked_lora`: the model stays as it is, and low-rank adapters beside its linears are trained.

    lora          linear(x, W, b)   ==>   linear(x, W, b) + s linear(linear(dropout(x), A), B)
    masked_lora   linear(x, W, b)   ==>   linear(x, W + s M ∘ (B A), b)

with s = alpha / rank, A `[r, in]` and B `[out, r]`; B is zero at first, so that the function is the same.
`apply_` freezes all other parameters of the model. Merging a plain adapter fills the zeros of a pruned
weight; a masked one (arXiv 2312.15230, 2410.03750) merges without losing one, because M, the weight's mask,
lies in its forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from act24.options import Range, Width
from act24.passes.base import Match, Plan, StateMap, StructuralPass
from act24.passes.graph.linear_sites import LinearSite, free_linears, no_linear, roles_in
from act24.passes.graph.normal_form import replace_node
from act24.passes.graph.region import ParameterSpec, Region
from act24.passes.sparse_mask import MASK_BITS, add_mask
from act24.pruning.adapters import masked_adapter_weight, merged
from act24.pruning.stored import unpacked_bits

#: The names of the factors, beside the weight's.
LORA_A, LORA_B, DROPOUT = "lora_A", "lora_B", "lora_dropout"


@dataclass(frozen=True, kw_only=True)
class Lora(StructuralPass):
    """Options of `lora`; the defaults are those of arXiv 2306.11695's fine-tuning.

    Attributes:
        targets: the linears that get an adapter; q and v, as published, in LLaMA's names.
        rank, alpha: r, and s r.
        dropout: of the adapter's inputs.
    """

    name: ClassVar[str] = "lora"
    keeps_function: ClassVar[bool] = False
    freezes: ClassVar[bool] = True

    targets: tuple[str, ...] = ("*.q_proj", "*.v_proj")
    rank: Width = 8
    alpha: Annotated[float, Range(gt=0)] = 16.0
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.05

    @property
    def covers(self) -> tuple[str, ...]:
        return roles_in("all")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    def plan(self, region: Region) -> Plan:
        matches, misses = [], []
        for site in free_linears(self, "all", region, misses):
            spec = region.parameters[site.weight]
            size = self.rank * sum(site.shape)
            matches.append(
                Match(
                    path=site.path,
                    reaches=(site.weight,),
                    before=f"linear {site.shape[1]}→{site.shape[0]}",
                    after=f"frozen, with {'a masked' if self._masked else 'an'} adapter of rank {self.rank}",
                    nodes=site,
                    parameters_before=spec.numel(),
                    parameters_after=spec.numel() + size,
                    state=self._state(site),
                    note="all else in the model is frozen",
                )
            )
        return Plan(
            tuple(matches),
            tuple(misses),
            absent=no_linear(self, region),
        )

    @property
    def _masked(self) -> bool:
        return False

    def _state(self, site: LinearSite) -> StateMap:
        def kept(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {site.weight: values[site.weight]}

        return StateMap(
            removes=(site.weight,),
            creates=(site.weight, site.beside(LORA_A), site.beside(LORA_B)),
            from_stock=kept,
            why="merging a plain adapter fills the zeros of a pruned weight: act24 merge does it where asked",
        )

    def _rewrite(self, region: Region, match: Match) -> None:
        site: LinearSite = match.nodes
        self._add_factors(region, site)
        for node in site.nodes:
            with region.graph.inserting_before(node):
                replaced = self._call(region, site, node)
            replace_node(region.graph, node, replaced)

    def _call(self, region: Region, site: LinearSite, node: fx.Node) -> fx.Node:
        graph = region.graph
        base = graph.call_function(F.linear, node.args)
        inputs = node.args[0]
        if self.dropout:
            name, p = site.beside(DROPOUT), self.dropout
            region.modules[name] = lambda: nn.Dropout(p).train(region.module.training)
            inputs = graph.call_module(name, (inputs,))
        lora_a, lora_b = graph.get_attr(site.beside(LORA_A)), graph.get_attr(site.beside(LORA_B))
        hidden = graph.call_function(F.linear, (inputs, lora_a, None))
        change = graph.call_function(F.linear, (hidden, lora_b, None))
        scaled = graph.call_function(torch.mul, (change, self.scale))
        return graph.call_function(torch.add, (base, scaled))

    def _add_factors(self, region: Region, site: LinearSite) -> None:
        spec = region.parameters[site.weight]
        rows, columns = site.shape

        def part(*shape: int) -> ParameterSpec:
            return ParameterSpec(torch.Size(shape), spec.dtype, spec.device)

        name_a, name_b = site.beside(LORA_A), site.beside(LORA_B)

        def initialise(
            old: Mapping[str, Tensor], generator: Callable[[str], torch.Generator]
        ) -> dict[str, Tensor]:
            # As PEFT's: Kaiming's uniform with a = √5, which is U(±1/√in); B zero.
            bound = 1 / math.sqrt(columns)
            drawn = torch.empty(self.rank, columns).uniform_(-bound, bound, generator=generator(name_a))
            return {name_a: drawn, name_b: torch.zeros(rows, self.rank)}

        specs = {name_a: part(self.rank, columns), name_b: part(rows, self.rank)}
        region.create(specs, initialise)


@dataclass(frozen=True, kw_only=True)
class MaskedLora(Lora):
    """Options of `masked_lora`: those of `lora`, here for all linears of attention and MLPs, but for dropout,
    which W + s M ∘ (B A) has no place for."""

    name: ClassVar[str] = "masked_lora"

    targets: tuple[str, ...] = ("*",)
    dropout: Annotated[float, Range(ge=0, le=0)] = 0.0

    @property
    def _masked(self) -> bool:
        return True

    def _state(self, site: LinearSite) -> StateMap:
        factors = (site.beside(LORA_A), site.beside(LORA_B))
        bits = site.weight + MASK_BITS

        def merge(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            dense = site.dense(values)
            mask = unpacked_bits(values[bits], dense.shape[1])
            whole = merged(dense, values[factors[0]], values[factors[1]], self.scale, mask)
            return {site.weight: site.stored(whole)}

        return StateMap(
            removes=(site.weight,),
            creates=(site.weight, *factors, bits),
            from_stock=lambda values: {site.weight: values[site.weight]},
            to_stock=merge,
            exact=True,
        )

    def _rewrite(self, region: Region, match: Match) -> None:
        add_mask(region, match.nodes)
        super()._rewrite(region, match)

    def _call(self, region: Region, site: LinearSite, node: fx.Node) -> fx.Node:
        graph = region.graph
        x, weight, bias = node.args
        factors = (graph.get_attr(site.beside(LORA_A)), graph.get_attr(site.beside(LORA_B)))
        bits = graph.get_attr(site.weight + MASK_BITS)
        changed = graph.call_function(masked_adapter_weight, (weight, *factors, bits, self.scale))
        return graph.call_function(F.linear, (x, changed, bias))
