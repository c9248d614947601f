"""`sparse_mask`: dense training of what a pruned model kept, with its masks fixed.

    linear(x, W, b)   ==>   the same, W zero where the mask says so, and kept there

The graph stays as it is; the pass adds the mask beside each weight, a persistent buffer `<weight>_mask_bits`,
eight to a byte. A training loop clears the gradients of what is pruned before they are clipped, and imposes
the zeros again behind every step of the optimizer (`act24.passes.recovery`): stale momentum and optimizers
that mix entries, such as Muon, would bring them back. Zeros are written, not multiplied, so none is -0.

Masks are those of the model that the run starts from (`[model] pretrained`). To choose masks while training
is what `weight24` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from act24.passes.base import Match, Plan, StateMap, StructuralPass
from act24.passes.graph.linear_sites import LinearSite, Scope, free_linears, no_linear, roles_in, tied
from act24.passes.graph.region import Region
from act24.pruning.stored import packed_bits

#: What the name of the buffer adds to the weight's; also its kind, of weights that are stored `[out, in]`.
MASK_BITS = "_mask_bits"
#: The kind of it where the weight is stored `[in, out]`.
TRANSPOSED = "_mask_bits_transposed"


@dataclass(frozen=True, kw_only=True)
class SparseMask(StructuralPass):
    """Options of `sparse_mask`.

    Attributes:
        scope: linears of attention (`"attn"`), of the MLPs (`"mlp"`), or both.
        masks: `"saved"`: those that lie beside the model's weights (`act24 prune`). `"zeros"`: what is not
            zero stays, for models that another program pruned; of a weight that was kept and is zero by
            chance it makes a pruned one.
    """

    name: ClassVar[str] = "sparse_mask"
    keeps_function: ClassVar[bool] = True

    scope: Scope = "all"
    masks: Literal["saved", "zeros"] = "saved"

    @property
    def covers(self) -> tuple[str, ...]:
        return roles_in(self.scope)

    def plan(self, region: Region) -> Plan:
        matches, misses = [], []
        for site in free_linears(self, self.scope, region, misses, factors=True):
            spec = region.parameters[site.weight]
            if spec.shared:
                misses.append((site.path, tied(spec.shared[0])))
                continue
            matches.append(
                Match(
                    path=site.path,
                    reaches=(site.weight,),
                    before=f"linear {site.shape[1]}→{site.shape[0]}",
                    after="its zeros stay",
                    nodes=site,
                    parameters_before=spec.numel(),
                    parameters_after=spec.numel(),
                    state=kept_weight(site),
                )
            )
        return Plan(tuple(matches), tuple(misses), absent=no_linear(self, region, self.scope, factors=True))

    def _rewrite(self, region: Region, match: Match) -> None:
        add_mask(region, match.nodes)


def add_mask(region: Region, site: LinearSite) -> None:
    """Add the buffer of a weight's mask: what is not zero stays, until the shell writes another one there."""
    rows, columns = site.shape

    def initial(parameters: Mapping[str, Tensor]) -> Tensor:
        return packed_bits(torch.ne(site.dense(parameters), 0))

    shape = (rows, -(-columns // 8))
    name = site.weight + MASK_BITS
    region.add_buffer(
        name,
        shape,
        torch.uint8,
        persistent=True,
        initial=initial,
        kind=TRANSPOSED if site.transposed else MASK_BITS,
        of=site.weight,
    )


def kept_weight(site: LinearSite) -> StateMap:
    """The weight as it is, and its mask beside it."""

    def same(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {site.weight: values[site.weight]}

    both = (site.weight, site.weight + MASK_BITS)
    return StateMap(removes=both[:1], creates=both, from_stock=same, to_stock=same, exact=True)
