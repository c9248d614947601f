"""`weight24`: linears whose weight is 2:4 along the dimension that the product reduces over.

    linear(x, W, b)   ==>   linear24(x, W, b, mask, scale, seed, packed, transposed)

in attention, MLPs or both; the factors of low-rank linears count as linears. W stays a dense parameter. State
is in buffers beside it, named after it: `<weight>24_mask`, and for soft thresholding `<weight>24_scale`,
persistent; `<weight>24_seed`, another for every micro-batch; `<weight>24_packed` and
`<weight>24_packed_transposed`, the operands of 2:4 products, made for every update where the loop keeps them;
`<weight>24_flips`, what the mask's changes add up to between two readings. `Pipeline.begin_update_` writes
them; masked decay enters the gradient as it is published with the method (`act24.passes.updates`).

A product has one 2:4 operand. If `activation24` stands earlier in the list, the linears that it fused are no
longer linears of the graph, and this pass leaves them alone. If it stands later, it finds no linear beside an
activation, and makes the activation alone 2:4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from act24.fp8.linear import MULTIPLE
from act24.options import PositiveSteps, Range, check_options
from act24.passes.base import PYTHON_ONLY, Match, OperationalPass, Pass, Plan
from act24.passes.fp8 import Fp8, by_shape
from act24.passes.graph.linear_sites import (
    FROZEN,
    RESIZE,
    LinearSite,
    Scope,
    free_linears,
    frozen,
    no_linear,
    roles_in,
    tied,
)
from act24.passes.graph.normal_form import replace_node
from act24.passes.graph.region import Region
from act24.precision import Decided, Layer, decision
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
        precision: `"fp8"`: y and dX, and dW where its gradient is not drawn, in e4m3, as dense products of
            the 2:4 weight; `"auto"`: of linears that are faster so: timed on the GPU when a run begins, and
            until then told by the shape. In training only. None: what the pass `fp8` says, for all steps,
            where it stands in the list, and `"bfloat16"` where it does not.
        kernels: run on this machine's kernels and 2:4 products where there are any; False for plain PyTorch.
        keep_packed: forward and backward read packed weights from buffers, which `begin_update_` fills for
            every update; else they pack them, in every micro-batch. For loops that call it without fail, and
            weights that are not sharded; no key of a recipe.
        algorithms: what a tuner found for the products (`act24.sparse24.format.products`), of no meaning to
            the mathematics; no key of a recipe.
        decided: as in `act24.passes.fp8.Fp8`; no key of a recipe.
    """

    name: ClassVar[str] = "weight24"

    scope: Scope = "all"
    method: MethodName = "transposable"
    weight_gradient: WeightGradient | None = None
    mask_every: PositiveSteps | None = None
    decay: Annotated[float, Range(ge=0)] | None = None
    precision: Literal["bfloat16", "fp8", "auto"] | None = None
    kernels: bool = True
    keep_packed: bool = field(default=False, metadata=PYTHON_ONLY)
    algorithms: Table = field(default=(), repr=False, metadata=PYTHON_ONLY)
    decided: Decided = field(default=(), repr=False, metadata=PYTHON_ONLY)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)
        renewed_every(self.record, self.mask_every)
        decays(self.record, self.decay)

    def beside(self, passes: tuple[Pass, ...]) -> Weight24:
        if self.precision is not None:
            return self
        return replace(self, precision=next((p.precision for p in passes if isinstance(p, Fp8)), "bfloat16"))

    @property
    def covers(self) -> tuple[str, ...]:
        return roles_in(self.scope)

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

    @property
    def fullest(self) -> Weight24:
        return replace(self, precision="fp8") if self.precision == "auto" else self

    def in_evaluation(self) -> Weight24:
        """Packed weights are those of an update's beginning, and evaluation is of the weights as they are."""
        return replace(self, keep_packed=False, precision="bfloat16")

    def in_fp8(self, shape: Sequence[int]) -> bool:
        """Whether the products of a linear `[out, in]` are in e4m3."""
        if any(side % MULTIPLE for side in shape):
            return False
        if (layer := self._layer(shape)) is None:
            return self.precision == "fp8"
        out, width = shape
        return (decision(layer, self.decided) or by_shape((out, width))) == "fp8"

    def _layer(self, shape: Sequence[int]) -> Layer | None:
        """What is decided about a linear `[out, in]` under `"auto"`."""
        if self.precision != "auto" or any(side % MULTIPLE for side in shape):
            return None
        words = [self.method, "mvue" if self.draws else "dense", *(() if self.kernels else ("plain",))]
        return Layer("weight24", (shape[1], shape[0]), ", ".join(words))

    def products(self, match: Match, tokens: int) -> tuple[Product, ...]:
        """The products of a match that can be 2:4 (`act24.sparse24.format.products`), for micro-batches of so
        many tokens."""
        site: LinearSite = match.nodes
        # Until it is decided, those of bfloat16 too, which are more.
        sparse = self._sparse_in(site.shape) if match.layer is None else self.sparse_products
        return tunable_products(tokens, *site.shape, sparse)

    def _sparse_in(self, shape: Sequence[int]) -> tuple[LinearProduct, ...]:
        """The products of such a linear that may have a 2:4 operand; in fp8 a drawn gradient's alone."""
        drawn: tuple[LinearProduct, ...] = ("grad_weight",) if self.draws else ()
        return drawn if self.in_fp8(shape) else self.sparse_products

    def packs(self, out_features: int, in_features: int) -> bool:
        """Whether some product of such a linear reads its packed weight, as the tuner found."""
        return not self.in_fp8((out_features, in_features)) and self.finds_packing(out_features, in_features)

    def finds_packing(self, out_features: int, in_features: int) -> bool:
        """Whether a product of such a linear in bfloat16 would read its packed weight."""
        return any(
            kind in ("linear_y", "linear_grad_x")
            and sizes == [out_features, in_features]
            and Measured(*measured).sparse < Measured(*measured).dense
            for (kind, _, *sizes), measured in self.algorithms
        )

    def plan(self, region: Region) -> Plan:
        matches, misses = [], []
        for site in free_linears(self, self.scope, region, misses, factors=True):
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
                        reaches=(site.weight,),
                        before=f"linear {site.shape[1]}→{site.shape[0]}",
                        after=self._products_text(site),
                        nodes=site,
                        parameters_before=spec.numel(),
                        parameters_after=spec.numel(),
                        note=self._note(site),
                        layer=self._layer(site.shape),
                    )
                )
        return Plan(tuple(matches), tuple(misses), absent=no_linear(self, region, self.scope, factors=True))

    def _products_text(self, site: LinearSite) -> str:
        sparse = ", ".join(_SYMBOLS[product] for product in self._sparse_in(site.shape))
        if not self.in_fp8(site.shape):
            return f"2:4 {self.method}; 2:4 in {sparse}"
        if sparse:
            return f"2:4 {self.method}; e4m3 in y, dX; 2:4 in {sparse}"
        return f"2:4 {self.method}; e4m3 in y, dX, dW"

    def _note(self, site: LinearSite) -> str:
        notes, sparse = [], self._sparse_in(site.shape)
        if self.precision == "fp8" and not self.in_fp8(site.shape):
            notes.append(f"in bfloat16: e4m3 wants sides that are multiples of {MULTIPLE}")
        if self.kernels and sparse and not tunable_products(_ANY_TOKENS, *site.shape, sparse):
            notes.append("in plain PyTorch: 2:4 products want sizes that are multiples of 64")
        return "; ".join(notes)

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
                        "fp8" if self.in_fp8(site.shape) else "bfloat16",
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
        # Empty until they are first packed, so that a run that never packs pays nothing for them.
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
