"""`weight24`: linears whose weight is 2:4 along the dimension that the product reduces over.

    linear(x, W, b)   ==>   linear24(x, W, b, mask, scale, seed)

in attention, MLPs or both; the factors of low-rank linears count as linears. W stays a dense parameter. State
is in buffers beside it, named after it: `<weight>24_mask`, and for soft thresholding `<weight>24_scale`,
persistent; `<weight>24_seed`, set anew for every micro-batch; `<weight>24_flips`, what the mask's changes add
up to between two readings. The shell writes them between updates (`act24.passes.state`) and adds the
masked decay.

A product has one 2:4 operand: linears that `activation24` took, standing earlier, are none any more, and
behind this pass `activation24` finds only activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from act24.errors import PassError
from act24.passes.base import Match, OperationalPass, Plan
from act24.passes.graph.linear_sites import LinearSite, Scope, in_scope, linear_sites
from act24.passes.graph.normal_form import replace_node
from act24.passes.graph.region import Region
from act24.sparse24.weight.linear24 import Method, WeightGradient, linear24, weight_mask, weight_scale

#: What the names of the buffers add to the weight's.
MASK, SCALE, SEED, FLIPS = "24_mask", "24_scale", "24_seed", "24_flips"


@dataclass(frozen=True, kw_only=True)
class Weight24(OperationalPass):
    """Options of `weight24`.

    Attributes:
        scope: linears of attention (`"attn"`), of the MLPs (`"mlp"`), or both; others only by `targets`.
        method: `"transposable"` (arXiv 2404.01847): the best mask that is 2:4 along rows and columns, kept
            for `mask_every` updates, with masked decay of the gradients. `"soft_threshold"` (S-STE, arXiv
            2409.09099): soft thresholding by row, scale β fixed at the first sparse update. `"ste"`: the two
            largest of four by row, anew for each update. `"sr_ste"` (arXiv 2102.04010): the same, with the
            dropped weights decayed in the optimizer step.
        weight_gradient: `"mvue"` makes the output gradient 2:4 along the tokens in dW, `"dense"` does not.
            None: mvue for the first two methods, as published, dense for the last two.
        mask_every: optimizer updates between two transposable masks.
        decay: λ of the masked decay of `"transposable"` and `"sr_ste"`.
    """

    name: ClassVar[str] = "weight24"

    scope: Scope = "all"
    method: Method = "transposable"
    weight_gradient: WeightGradient | None = None
    mask_every: int = 40
    decay: float = 6e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_every < 1:
            raise PassError(f"weight24: mask_every must be 1 or more, got {self.mask_every}")
        if self.decay < 0:
            raise PassError(f"weight24: decay must be 0 or more, got {self.decay}")

    @property
    def draws(self) -> bool:
        """Whether dW draws from a seed."""
        if self.weight_gradient is None:
            return self.method in ("transposable", "soft_threshold")
        return self.weight_gradient == "mvue"

    def renews_masks(self, step: int) -> bool:
        """Whether masks are due once `step` updates are made."""
        return self.method != "transposable" or (step - self.from_step) % self.mask_every == 0

    def plan(self, region: Region) -> Plan:
        matches, misses = [], []
        for site in linear_sites(region, factors=True):
            if not (in_scope(self.scope, self.targets, site) and self.selects(region, site.path)):
                continue
            spec = region.parameters[site.weight]
            multiples = site.shape if self.method == "transposable" else site.shape[1:]
            if any(size % 4 for size in multiples):
                shown = " × ".join(map(str, site.shape))
                misses.append((site.path, f"its weight is {shown}, not all multiples of 4"))
            elif spec.shared:
                misses.append((site.path, f"tied to {spec.shared[0]}"))
            else:
                matches.append(
                    Match(
                        path=site.path,
                        before=f"linear {site.shape[1]}→{site.shape[0]}",
                        after=f"2:4 weight, {self.method}",
                        nodes=site,
                        parameters_before=spec.numel(),
                        parameters_after=spec.numel(),
                    )
                )
        return Plan(tuple(matches), tuple(misses), absent=f"no linear in scope '{self.scope}'")

    def _rewrite(self, region: Region, match: Match) -> None:
        site: LinearSite = match.nodes
        self._add_buffers(region, site)
        for node in site.nodes:
            with region.graph.inserting_before(node):
                soft = self.method == "soft_threshold"
                state = (
                    None if soft else self._mask(region, site),
                    region.graph.get_attr(site.weight + SCALE) if soft else None,
                    region.graph.get_attr(site.weight + SEED) if self.draws else None,
                )
                sparse = region.graph.call_function(linear24, (*node.args, *state))
            replace_node(region.graph, node, sparse)

    def _mask(self, region: Region, site: LinearSite) -> fx.Node:
        mask = region.graph.get_attr(site.weight + MASK)
        return region.graph.call_method("t", (mask,)) if site.transposed else mask

    def _add_buffers(self, region: Region, site: LinearSite) -> None:
        def mask(parameters: Mapping[str, Tensor]) -> Tensor:
            return stored_mask(parameters[site.weight], site.transposed, self.method)

        def scale(parameters: Mapping[str, Tensor]) -> Tensor:
            return weight_scale(site.dense(parameters))

        def add(kind: str, shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> None:
            region.add_buffer(site.weight + kind, shape, dtype, kind=kind, of=site.weight, **options)

        add(MASK, tuple(region.parameters[site.weight].shape), torch.bool, persistent=True, initial=mask)
        add(FLIPS, (), torch.float32, persistent=False)
        if self.method == "soft_threshold":
            add(SCALE, (), torch.float32, persistent=True, initial=scale)
        if self.draws:
            add(SEED, (), torch.int64, persistent=False)


def stored_mask(parameter: Tensor, transposed: bool, method: Method) -> Tensor:
    """`act24.sparse24.weight.linear24.weight_mask` of a parameter, in the orientation in which it is
    stored."""
    if transposed:
        return weight_mask(parameter.T, method).T
    return weight_mask(parameter, method)
