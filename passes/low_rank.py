"""`low_rank`: linears become products of two factors, as LORO trains them (ICLR 2025).

    linear(x, W, b)   ==>   linear(linear(x, W_in), W_out, b)

with `weight_in` `[R, in]` and `weight_out` `[out, R]` (`act24.low_rank`). The product W_out W_in is a dense
weight of the same function, so the way back is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from act24.initialise import generator_for
from act24.low_rank.initialisation import check_init, initial_factors
from act24.low_rank.truncation import trainable_factors, truncated_factors
from act24.options import Range
from act24.passes.base import Match, StateMap
from act24.passes.graph.linear_sites import (
    FactorisingPass,
    LinearSite,
    factor_specs,
    factorise,
    parameters_before,
)
from act24.passes.graph.region import Region


@dataclass(frozen=True, kw_only=True)
class LowRank(FactorisingPass):
    """Options of `low_rank`, besides scope and ranks.

    Attributes:
        init: first values of the factors (`act24.low_rank.initialisation.initial_factors`).
        initializer_range: standard deviation that `init = "auto"` gives the product.
    """

    name: ClassVar[str] = "low_rank"
    keeps_casts: ClassVar[bool] = True

    init: str = "xavier"
    initializer_range: Annotated[float, Range(gt=0)] = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_init(self.init, self.name)

    @property
    def starts_fresh(self) -> bool:
        return self.init != "svd"

    @property
    def first_values(self) -> str:
        return super().first_values if self.starts_fresh else "starts as its weight's best approximation"

    def _match(self, region: Region, site: LinearSite, rank: int) -> Match:
        specs = factor_specs(region, site, rank)
        if self.init == "svd":  # which is the weight itself, and stays frozen as it was
            trains = region.parameters[site.weight].requires_grad
            specs = {name: replace(spec, requires_grad=trains) for name, spec in specs.items()}
        before = parameters_before(region, site)
        after = before - region.parameters[site.weight].numel() + sum(s.numel() for s in specs.values())
        return Match(
            path=site.path,
            reaches=(site.weight,),
            before=f"linear {site.shape[1]}→{site.shape[0]}",
            after=f"{site.shape[1]}→{rank}→{site.shape[0]}",
            nodes=(site, specs),
            parameters_before=before,
            parameters_after=after,
            state=StateMap(
                removes=(site.weight,),
                creates=tuple(specs),
                from_stock=_factors_of_stock(site, rank),
                to_stock=_product(site),
                exact=True,
                why="from_stock keeps the best approximation of that rank",
            ),
        )

    def _rewrite(self, region: Region, match: Match) -> None:
        site, specs = match.nodes
        factorise(region, site, activation=None)

        def initialise(
            old: Mapping[str, Tensor], generator: Callable[[str], torch.Generator]
        ) -> dict[str, Tensor]:
            names = tuple(specs)
            factors = initial_factors(
                self.init,
                site.dense(old),
                specs[names[0]].shape[0],
                *(generator(name) for name in names),
                initializer_range=self.initializer_range,
            )
            return dict(zip(names, factors, strict=True))

        region.create(specs, initialise, replaces=(site.weight,))


def _factors_of_stock(site: LinearSite, rank: int) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def from_stock(removed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight_in, weight_out = truncated_factors(site.dense(removed)[None], rank)
        generator = generator_for(0, site.part("in"))  # for directions that are zero, which train on
        weight_in, weight_out = trainable_factors(weight_in[0], weight_out[0], generator)
        dtype = removed[site.weight].dtype
        return {
            site.part("in"): weight_in.to(dtype),
            site.part("out"): weight_out.to(dtype),
        }

    return from_stock


def _product(site: LinearSite) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def to_stock(created: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight_in, weight_out = created[site.part("in")], created[site.part("out")]
        # In float64, so that one rounding is all that a bfloat16 checkpoint loses.
        dense = (weight_out.double() @ weight_in.double()).to(weight_in.dtype)
        return {site.weight: site.stored(dense)}

    return to_stock
