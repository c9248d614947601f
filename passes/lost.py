"""`lost`: linears become a low-rank bottleneck beside some of their own columns (LoST, arXiv 2508.02668).

    linear(x, W, b)   ==>   γ · linear(act(linear(x, W_in)), W_out) + (1 - γ) · linear(x[..., I], W_I) + b

`weight_in` `[R, in]` and `weight_out` `[out, R]` start as the best approximation of the dense initial weight,
`weight_columns` `[out, k]` as its columns I, which `column_indices` `[k]`, a persistent buffer, holds for
good. The dense weight is freed. With `bottleneck = "relu2"` the activation is found by `activation24`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.low_rank.columns import select_columns
from act24.low_rank.lost import kept_columns, low_rank_and_scores, random_columns, top_columns
from act24.passes.base import Match, PassError, StateMap
from act24.passes.cola import ACTIVATIONS
from act24.passes.graph.linear_sites import (
    FactorisingPass,
    LinearSite,
    bottleneck,
    factor_specs,
    parameters_before,
)
from act24.passes.graph.normal_form import replace_node
from act24.passes.graph.region import Region, column_scores_key


@dataclass(frozen=True, kw_only=True)
class Lost(FactorisingPass):
    """Options of `lost`, besides scope and ranks.

    Attributes:
        sparsity: in spite of its name, which is the paper's, the density: the share of input channels kept
            (at least one).
        gamma: weight γ of the low-rank branch; the columns have 1 - γ.
        method: what scores a channel: `"svd"`, the norm of its column in what the low-rank part leaves;
            `"gradient"`, the norm of its column in the dense weight's gradient on the first batch, which the
            shell measures (`Pipeline.needs_column_scores`); `"random"`.
        svd_rank: for `"svd"`, how many singular values behind the first R count; 0: all.
        bottleneck: the activation between the factors. With `"none"` a dense form exists.
    """

    name: ClassVar[str] = "lost"

    sparsity: float = 0.01
    gamma: float = 0.5
    method: Literal["svd", "gradient", "random"] = "svd"
    svd_rank: int = 0
    bottleneck: Literal["silu", "relu2", "none"] = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sparsity <= 1:
            raise PassError(
                f"lost: sparsity, the share of input channels kept, must be above 0 and at most 1, "
                f"got {self.sparsity}"
            )
        if not 0 <= self.gamma <= 1:
            raise PassError(f"lost: gamma must lie between 0 and 1, got {self.gamma}")
        if self.svd_rank < 0:
            raise PassError(f"lost: svd_rank must be 0 or more, got {self.svd_rank}")
        if self.svd_rank and self.method != "svd":
            raise PassError(f"lost: svd_rank has no meaning for method '{self.method}'")

    def _match(self, region: Region, site: LinearSite, rank: int) -> Match:
        dense = region.parameters[site.weight]
        out_features, in_features = site.shape
        kept = kept_columns(in_features, self.sparsity)
        specs = factor_specs(region, site, rank)
        specs[site.factor("weight_columns")] = replace(dense, shape=torch.Size((out_features, kept)))
        before = parameters_before(region, site)
        return Match(
            path=site.path,
            before=f"linear {in_features}→{out_features}",
            after=f"{in_features}→{rank} · {self.bottleneck} · →{out_features}, {kept} columns",
            nodes=(site, specs),
            parameters_before=before,
            parameters_after=before - dense.numel() + sum(spec.numel() for spec in specs.values()),
            state=StateMap(
                removes=(site.weight,),
                creates=(*specs, site.factor("column_indices")),
                to_stock=self._to_stock(site) if self.bottleneck == "none" else None,
                exact=self.bottleneck == "none",
                why=""
                if self.bottleneck == "none"
                else f"between the factors stands {self.bottleneck}, so no single matrix computes the same",
            ),
        )

    def _rewrite(self, region: Region, match: Match) -> None:
        site, specs = match.nodes
        graph = region.graph
        for call in site.nodes:
            x, _, bias = call.args
            with graph.inserting_before(call):
                hidden = bottleneck(region, site, call, ACTIVATIONS[self.bottleneck])
                low = graph.call_function(F.linear, (hidden, graph.get_attr(site.factor("weight_out")), None))
                indices = graph.get_attr(site.factor("column_indices"))
                kept = graph.call_function(select_columns, (x, indices))
                columns = graph.call_function(
                    F.linear, (kept, graph.get_attr(site.factor("weight_columns")), None)
                )
                output = graph.call_function(
                    torch.add,
                    (graph.call_function(torch.mul, (low, self.gamma)), columns),
                    {"alpha": 1 - self.gamma},
                )
                if bias is not None:
                    output = graph.call_function(torch.add, (output, bias))
            replace_node(graph, call, output)
        columns = specs[site.factor("weight_columns")]
        region.create(
            specs,
            self._initialise(site, specs[site.factor("weight_in")].shape[0], columns.shape[1]),
            replaces=(site.weight,),
            scored=self.method == "gradient",
        )
        region.add_buffer(site.factor("column_indices"), (columns.shape[1],), torch.int64, persistent=True)

    def _initialise(self, site: LinearSite, rank: int, count: int) -> Callable[..., dict[str, Tensor]]:
        def initialise(
            old: Mapping[str, Tensor], generator: Callable[[str], torch.Generator]
        ) -> dict[str, Tensor]:
            dense = site.dense(old)
            weight_in, weight_out, left = low_rank_and_scores(dense[None], rank, self.svd_rank)
            name = site.factor("column_indices")
            if self.method == "random":
                indices = random_columns(dense.shape[1], count, generator(name)).to(dense.device)
            else:
                scores = left[0] if self.method == "svd" else old[column_scores_key(site.weight)]
                indices = top_columns(scores.to(dense.device), count)
            return {
                site.factor("weight_in"): weight_in[0],
                site.factor("weight_out"): weight_out[0],
                site.factor("weight_columns"): dense[:, indices],
                name: indices,
            }

        return initialise

    def _to_stock(self, site: LinearSite) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        def to_stock(created: Mapping[str, Tensor]) -> dict[str, Tensor]:
            weight_in, weight_out, columns, indices = (
                created[site.factor(name)]
                for name in ("weight_in", "weight_out", "weight_columns", "column_indices")
            )
            dense = self.gamma * (weight_out.double() @ weight_in.double())
            dense[:, indices] += (1 - self.gamma) * columns.double()
            return {site.weight: site.stored(dense.to(weight_in.dtype))}

        return to_stock
