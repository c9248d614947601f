"""`lost`: linears become a low-rank bottleneck beside some of their own columns (LoST, arXiv 2508.02668).

    linear(x, W, b)   ==>   γ · linear(act(linear(x, W_in)), W_out) + (1 - γ) · linear(x[..., I], W_I) + b

`weight_in` `[R, in]` and `weight_out` `[out, R]` start as the best approximation of the dense initial weight,
`weight_columns` `[out, k]` as its columns I, which `column_indices` `[k]`, a persistent buffer, holds for
good. The dense weight is freed. With `bottleneck = "relu2"` the activation is found by `activation24`.

`method = "gradient"` asks the training loop for a measurement, `"column_scores"`: the norm of each column of
the dense weight's gradient on the first batch, float32 `[in]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.errors import PassError
from act24.low_rank.activations import ACTIVATIONS
from act24.low_rank.columns import select_columns
from act24.low_rank.lost import kept_columns, low_rank_and_scores, random_columns, top_columns
from act24.low_rank.truncation import trainable_factors
from act24.options import Range
from act24.passes.base import Match, StateMap
from act24.passes.graph.fused_columns import fuse_columns
from act24.passes.graph.linear_sites import (
    FactorisingPass,
    LinearSite,
    bottleneck,
    factor_specs,
    parameters_before,
    part_spec,
)
from act24.passes.graph.measurements import Measurement
from act24.passes.graph.normal_form import replace_node
from act24.passes.graph.region import Region
from act24.words import counted

#: The measurement that `method = "gradient"` asks for.
COLUMN_SCORES = "column_scores"
#: The buffer that says which columns are kept.
COLUMN_INDICES = "column_indices"


@dataclass(frozen=True, kw_only=True)
class Lost(FactorisingPass):
    """Options of `lost`, besides scope and ranks.

    Attributes:
        sparsity: in spite of its name, which is the paper's, the density: the share of input channels kept
            (at least one).
        gamma: weight γ of the low-rank branch; the columns have 1 - γ.
        method: what scores a channel: `"svd"`, the norm of its column in what the low-rank part leaves;
            `"gradient"`, the norm of its column in the dense weight's gradient on the first batch, which the
            training loop measures (`Pipeline.measurements`); `"random"`, none: channels are drawn.
        svd_rank: for `"svd"`, how many singular values behind the first R count; 0: all.
        bottleneck: the activation between the factors. With `"none"` a dense form exists.
    """

    name: ClassVar[str] = "lost"

    sparsity: Annotated[float, Range(gt=0, le=1)] = 0.01
    gamma: Annotated[float, Range(ge=0, le=1)] = 0.5
    method: Literal["svd", "gradient", "random"] = "svd"
    svd_rank: Annotated[int, Range(ge=0, le=10**8)] = 0
    bottleneck: Literal["silu", "relu2", "none"] = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.svd_rank and self.method != "svd":
            raise PassError(
                f"lost: svd_rank has no meaning for method '{self.method}': leave it out, or set method to "
                "svd"
            )

    def _match(self, region: Region, site: LinearSite, rank: int) -> Match:
        dense = region.parameters[site.weight]
        out_features, in_features = site.shape
        kept = kept_columns(in_features, self.sparsity)
        specs = factor_specs(region, site, rank)
        specs[site.part("columns")] = part_spec(region, site, "columns", (out_features, kept))
        before = parameters_before(region, site)
        return Match(
            path=site.path,
            reaches=(site.weight,),
            before=f"linear {in_features}→{out_features}",
            after=f"{in_features}→{rank} · {self.bottleneck} · →{out_features}, {counted(kept, 'column')}",
            nodes=(site, specs),
            parameters_before=before,
            parameters_after=before - dense.numel() + sum(spec.numel() for spec in specs.values()),
            state=StateMap(
                removes=(site.weight,),
                creates=(*specs, site.beside(COLUMN_INDICES)),
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
                low = graph.call_function(F.linear, (hidden, graph.get_attr(site.part("out")), None))
                indices = graph.get_attr(site.beside(COLUMN_INDICES))
                kept = graph.call_function(select_columns, (x, indices))
                columns = graph.call_function(F.linear, (kept, graph.get_attr(site.part("columns")), None))
                output = graph.call_function(
                    torch.add,
                    (graph.call_function(torch.mul, (low, self.gamma)), columns),
                    {"alpha": 1 - self.gamma},
                )
                if bias is not None:
                    output = graph.call_function(torch.add, (output, bias))
            replace_node(graph, call, output)
        columns = specs[site.part("columns")]
        region.create(
            specs,
            self._initialise(site, specs[site.part("in")].shape[0], columns.shape[1]),
            replaces=(site.weight,),
            measured={site.beside(COLUMN_SCORES): Measurement(COLUMN_SCORES, site.weight, (site.shape[1],))}
            if self.method == "gradient"
            else {},
        )
        # `initialise` or a checkpoint brings the values. Until then the buffer holds valid channel numbers.
        (_, count), (_, width) = columns.shape, site.shape
        region.add_buffer(
            site.beside(COLUMN_INDICES),
            (count,),
            torch.int64,
            persistent=True,
            initial=lambda _: torch.arange(count) * width // count,
        )

    def finish(self, region: Region) -> None:
        """Make two products of both branches, where no pass has taken a part of them."""
        fuse_columns(region)

    def _initialise(self, site: LinearSite, rank: int, count: int) -> Callable[..., dict[str, Tensor]]:
        def initialise(
            old: Mapping[str, Tensor], generator: Callable[[str], torch.Generator]
        ) -> dict[str, Tensor]:
            dense = site.dense(old)
            weight_in, weight_out, left = low_rank_and_scores(dense[None], rank, self.svd_rank)
            low = trainable_factors(weight_in[0], weight_out[0], generator(site.part("in")))
            name = site.beside(COLUMN_INDICES)
            if self.method == "random":
                indices = random_columns(dense.shape[1], count, generator(name)).to(dense.device)
            else:
                scores = left[0] if self.method == "svd" else old[site.beside(COLUMN_SCORES)]
                indices = top_columns(scores.to(dense.device), count)
            return {
                site.part("in"): low[0],
                site.part("out"): low[1],
                site.part("columns"): dense[:, indices],
                name: indices,
            }

        return initialise

    def _to_stock(self, site: LinearSite) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        def to_stock(created: Mapping[str, Tensor]) -> dict[str, Tensor]:
            weight_in, weight_out, columns, indices = (
                created[name]
                for name in (
                    site.part("in"),
                    site.part("out"),
                    site.part("columns"),
                    site.beside(COLUMN_INDICES),
                )
            )
            dense = self.gamma * (weight_out.double() @ weight_in.double())
            dense[:, indices] += (1 - self.gamma) * columns.double()
            return {site.weight: site.stored(dense.to(weight_in.dtype))}

        return to_stock
