"""`cola`: linears become bottlenecks with an activation inside, as in CoLA (arXiv 2502.10940).

    linear(x, W, b)   ==>   linear(silu(linear(x, W_in)), W_out, b)

with `weight_in` `[R, in]` and `weight_out` `[out, R]` (`act24.low_rank`). With `bottleneck = "relu2"` the
activation is relu², and `activation24` finds it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from act24.low_rank.activations import ACTIVATIONS
from act24.low_rank.initialisation import check_init, initial_factors
from act24.passes.base import Match, Plan, StateMap
from act24.passes.graph.linear_sites import (
    FactorisingPass,
    LinearSite,
    factor_specs,
    factorise,
    parameters_before,
)
from act24.passes.graph.normal_form import is_call, replace_node
from act24.passes.graph.region import Region

#: What takes a part of a linear's output.
_PARTS = (operator.getitem, torch.chunk, torch.split, "chunk", "split")


@dataclass(frozen=True, kw_only=True)
class Cola(FactorisingPass):
    """Options of `cola`, besides scope and ranks.

    Attributes:
        init: first values of the factors (`act24.low_rank.initialisation.initial_factors`). `"cola"` is
            CoLA's: a standard deviation of (R (in + out))^(-1/4), which gives their product the variance
            1 / (in + out).
        bottleneck: the activation between the factors.
        mlp_activation: what becomes of the SiLU that stands behind a linear of an MLP (SwiGLU's): the
            published 60m and 130m models `"keep"` it, the larger ones `"drop"` it.
    """

    name: ClassVar[str] = "cola"
    keeps_casts: ClassVar[bool] = True

    init: str = "cola"
    bottleneck: Literal["silu", "relu2"] = "silu"
    mlp_activation: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_init(self.init, self.name)

    @property
    def starts_fresh(self) -> bool:
        return self.init != "svd"

    def plan(self, region: Region) -> Plan:
        plan = super().plan(region)
        networks = [match for match in plan.matches if match.nodes[0].kind == "mlp"]
        if self.mlp_activation == "keep" or any(_silus(match.nodes[0]) for match in networks):
            return plan
        note = 'no SiLU behind it to drop: leave mlp_activation at "keep"'
        noted = {match.path: "; ".join(filter(None, (match.note, note))) for match in networks}
        matches = (replace(match, note=noted.get(match.path, match.note)) for match in plan.matches)
        return replace(plan, matches=tuple(matches))

    def _match(self, region: Region, site: LinearSite, rank: int) -> Match:
        specs = factor_specs(region, site, rank)
        before = parameters_before(region, site)
        dropped = bool(self.mlp_activation == "drop" and _silus(site))
        return Match(
            path=site.path,
            reaches=(site.weight,),
            before=f"linear {site.shape[1]}→{site.shape[0]}" + (" · silu" if dropped else ""),
            after=f"{site.shape[1]}→{rank} · {self.bottleneck} · →{site.shape[0]}",
            nodes=(site, specs),
            parameters_before=before,
            parameters_after=before
            - region.parameters[site.weight].numel()
            + sum(spec.numel() for spec in specs.values()),
            state=StateMap(
                removes=(site.weight,),
                creates=tuple(specs),
                why=f"between the factors stands {self.bottleneck}, so no single matrix computes the same",
            ),
        )

    def _rewrite(self, region: Region, match: Match) -> None:
        site, specs = match.nodes
        if self.mlp_activation == "drop":
            for silu in _silus(site):
                replace_node(region.graph, silu, silu.args[0])  # type: ignore[arg-type]
        factorise(region, site, ACTIVATIONS[self.bottleneck])

        def initialise(
            old: Mapping[str, Tensor], generator: Callable[[str], torch.Generator]
        ) -> dict[str, Tensor]:
            names = tuple(specs)
            rank = specs[names[0]].shape[0]
            factors = initial_factors(self.init, site.dense(old), rank, *(generator(n) for n in names))
            return dict(zip(names, factors, strict=True))

        region.create(specs, initialise, replaces=(site.weight,))


def _silus(site: LinearSite) -> list[fx.Node]:
    """The SiLUs that read a linear of an MLP, or a part of it where it computes up too."""
    found, frontier = list[fx.Node](), [*site.nodes] if site.kind == "mlp" else []
    while frontier:
        for user in frontier.pop().users:
            if is_call(user, F.silu):
                found.append(user)
            elif user.target in _PARTS:
                frontier.append(user)
    return found
