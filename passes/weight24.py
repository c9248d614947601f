"""`weight24`: linears whose weight is 2:4 along the dimension that the product reduces over.

    linear(x, W, b)   ==>   linear24(x, W, b, mask, scale, seed, packed, transposed)

in attention, MLPs or both; the factors of low-rank linears count as linears. W stays a dense parameter. State
is in buffers beside it, named after it: `<weight>24_mask`, and for soft thresholding `<weight>24_scale`,
persistent; `<weight>24_seed`, another for every micro-batch; `<weight>24_packed` and
`<weight>24_packed_transposed`, the operands of 2:4 products, made for every update where the loop keeps them;
`<weight>24_flips`, what the mask's changes add up to between two readings. `Pipeline.begin_update_` writes
them; masked decay enters the gradient as it is published with the method (`act24.passes.updates`).

A product has one 2:4 operand: linears that `activation24` took, standing earlier, are none any more, and
behind this pass `activation24` finds only activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, fx

from act24.options import Range, check_options
from act24.passes.base import PYTHON_ONLY, Match, OperationalPass, Plan
from act24.passes.graph.linear_sites import (
    FROZEN,
    RESIZE,
    LinearSite,
    Scope,
    frozen,
    linear_sites,
    no_linear,
    takes,
    tied,
)
from act24.passes.graph.normal_form import replace_node
from act24.passes.graph.region import Region
from act24.sparse24.format.products import Measured, Product, Table
from act24.sparse24.weight.forms import LinearOptions24, tunable_products
from act24.sparse24.weight.linear24 import linear24
from act24.sparse24.weight.methods import (
    METHODS,
    LinearProduct,
    MethodName,
    WeightGradient,
    WeightMethod,
    decays,
    renewed_every,
    weight_mask,
    weight_scale,
)

#: What the names of the buffers add to the weight's.
MASK, SCALE, SEED, FLIPS = "24_mask", "24_scale", "24_seed", "24_flips"
PACKED, TRANSPOSED = "24_packed", "24_packed_transposed"

#: Tokens of a micro-batch that any kernel takes.
_ANY_TOKENS = 64

#: As reports call the products.
_SYMBOLS: dict[LinearProduct, str] = {"y": "y", "grad_x": "dX", "grad_weight": "dW"}


@dataclass(frozen=True, kw_only=True)
class Weight24(OperationalPass):
    """Options of `weight24`.

    Attributes:
        scope: linears of attention (`"attn"`), of the MLPs (`"mlp"`), or both; others only by `targets`.
        method: a name in `act24.sparse24.weight.methods.METHODS`. `"transposable"` (arXiv 2404.01847): the
            best mask that is 2:4 along rows and columns, kept for `mask_every` updates, with masked decay of
            the gradients. `"soft_threshold"` (S-STE, arXiv 2409.09099): soft thresholding by row, scale β
            fixed at the first sparse update. `"ste"`: the two largest of four by row, anew for each update.
            `"sr_ste"` (arXiv 2102.04010): the same, with masked decay as a part of the gradient.
        weight_gradient: `"mvue"` makes the output gradient 2:4 along the tokens in dW, `"dense"` does not.
            None: as published with the method.
        mask_every: optimizer updates between two masks; None: as published with the method.
        decay: λ of the masked decay; None: as published with the method.
        kernels: run on this machine's kernels and 2:4 products where there are any; False for plain PyTorch.
        keep_packed: forward and backward read packed weights from buffers, which `begin_update_` fills for
            every update; else they pack them, in every micro-batch. For loops that call it without fail, and
            weights that are not sharded; no key of a recipe.
        algorithms: what a tuner found for the products (`act24.sparse24.format.products`), of no meaning to
            the mathematics; no key of a recipe.
    """

    name: ClassVar[str] = "weight24"

    scope: Scope = "all"
    method: MethodName = "transposable"
    weight_gradient: WeightGradient | None = None
    mask_every: Annotated[int, Range(ge=1)] | None = None
    decay: Annotated[float, Range(ge=0)] | None = None
    kernels: bool = True
    keep_packed: bool = field(default=False, metadata=PYTHON_ONLY)
    algorithms: Table = field(default=(), repr=False, metadata=PYTHON_ONLY)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)
        renewed_every(self.record, self.mask_every)
        decays(self.record, self.decay)

    @property
    def covers(self) -> tuple[str, ...]:
        return ("attn", "mlp") if self.scope == "all" else (self.scope,)

    @property
    def record(self) -> WeightMethod:
        """What the method is."""
        return METHODS[self.method]

    @property
    def draws(self) -> bool:
        """Whether dW draws from a seed."""
        return (self.weight_gradient or self.record.weight_gradient) == "mvue"

    @property
    def renews(self) -> bool:
        return True

    @property
    def sparse_products(self) -> tuple[LinearProduct, ...]:
        """Those of the three products of a linear that have a 2:4 operand."""
        return self.record.products("mvue" if self.draws else "dense")

    @property
    def renewal(self) -> int:
        """Updates between two masks."""
        return renewed_every(self.record, self.mask_every)

    @property
    def masked_decay(self) -> float:
        """λ, 0 where there is none."""
        return decays(self.record, self.decay)

    def renews_masks(self, step: int) -> bool:
        """Whether masks are due once `step` updates are made."""
        return (step - self.from_step) % self.renewal == 0

    def in_evaluation(self) -> Weight24:
        """Packed weights are those of an update's beginning, and evaluation is of the weights as they are."""
        return replace(self, keep_packed=False)

    def products(self, match: Match, tokens: int) -> tuple[Product, ...]:
        """The products of a match that can be 2:4 (`act24.sparse24.format.products`), for micro-batches of so
        many tokens."""
        site: LinearSite = match.nodes
        return tunable_products(tokens, *site.shape, self.sparse_products)

    def packs(self, out_features: int, in_features: int) -> bool:
        """Whether some product of such a linear reads its packed weight, as the tuner found."""
        return any(
            kind in ("linear_y", "linear_grad_x")
            and sizes == [out_features, in_features]
            and Measured(*measured).sparse < Measured(*measured).dense
            for (kind, _, *sizes), measured in self.algorithms
        )

    def plan(self, region: Region) -> Plan:
        matches, misses = [], []
        symbols = ", ".join(_SYMBOLS[product] for product in self.sparse_products)
        for site in linear_sites(region, factors=True):
            if not takes(self, self.scope, region, site):
                continue
            spec = region.parameters[site.weight]
            if wrong := self.record.wrong_size(site.shape):
                shown = " × ".join(map(str, site.shape))
                misses.append((site.path, f"its weight is {shown}, {wrong}: {RESIZE}"))
            elif frozen(self, region, site):
                misses.append((site.path, FROZEN))
            elif spec.shared:
                misses.append((site.path, tied(spec.shared[0])))
            else:
                matches.append(
                    Match(
                        path=site.path,
                        before=f"linear {site.shape[1]}→{site.shape[0]}",
                        after=f"2:4 weight, {self.method}; 2:4 in {symbols}",
                        nodes=site,
                        parameters_before=spec.numel(),
                        parameters_after=spec.numel(),
                        note=self._note(site),
                    )
                )
        return Plan(tuple(matches), tuple(misses), absent=no_linear(self.scope))

    def _note(self, site: LinearSite) -> str:
        if self.kernels and not tunable_products(_ANY_TOKENS, *site.shape, self.sparse_products):
            return "in plain PyTorch: 2:4 products want sizes that are multiples of 64"
        return ""

    def _rewrite(self, region: Region, match: Match) -> None:
        site: LinearSite = match.nodes
        self._add_buffers(region, site)
        for node in site.nodes:
            with region.graph.inserting_before(node):
                soft = self.record.soft
                state = (
                    None if soft else self._mask(region, site),
                    region.graph.get_attr(site.weight + SCALE) if soft else None,
                    region.graph.get_attr(site.weight + SEED) if self.draws else None,
                    region.graph.get_attr(site.weight + PACKED) if self.keep_packed else None,
                    self._transposed(region, site),
                    # Plain tuples: the graph's code has no names for their classes.
                    LinearOptions24(
                        self.record.both_ways,
                        self.kernels,
                        tuple((tuple(p), tuple(m)) for p, m in self.algorithms),  # type: ignore[arg-type]
                    ),
                )
                sparse = region.graph.call_function(linear24, (*node.args, *state))
            replace_node(region.graph, node, sparse)

    def _mask(self, region: Region, site: LinearSite) -> fx.Node:
        mask = region.graph.get_attr(site.weight + MASK)
        return region.graph.call_method("t", (mask,)) if site.transposed else mask

    def _transposed(self, region: Region, site: LinearSite) -> fx.Node | None:
        if not (self.keep_packed and self.record.both_ways):
            return None
        return region.graph.get_attr(site.weight + TRANSPOSED)

    def _add_buffers(self, region: Region, site: LinearSite) -> None:
        def mask(parameters: Mapping[str, Tensor]) -> Tensor:
            return stored_mask(parameters[site.weight], site.transposed, self.method)

        def scale(parameters: Mapping[str, Tensor]) -> Tensor:
            return weight_scale(site.dense(parameters))

        def add(kind: str, shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> None:
            region.add_buffer(site.weight + kind, shape, dtype, kind=kind, of=site.weight, **options)

        add(MASK, tuple(region.parameters[site.weight].shape), torch.bool, persistent=True, initial=mask)
        add(FLIPS, (), torch.float32, persistent=False)
        # Without elements until they are first packed: where nothing is, they cost nothing.
        add(PACKED, (0,), torch.bfloat16, persistent=False)
        if self.record.both_ways:
            add(TRANSPOSED, (0,), torch.bfloat16, persistent=False)
        if self.record.soft:
            add(SCALE, (), torch.float32, persistent=True, initial=scale)
        if self.draws:
            add(SEED, (), torch.int64, persistent=False)


def stored_mask(parameter: Tensor, transposed: bool, method: str) -> Tensor:
    """`act24.sparse24.weight.methods.weight_mask` of a parameter, in the orientation in which it is stored.

    Args:
        parameter: `[out, in]`, or `[in, out]` where `transposed`.
        method: a name in `METHODS`.

    Returns:
        boolean, the shape of the parameter.
    """
    if transposed:
        return weight_mask(parameter.T, method).T
    return weight_mask(parameter, method)
