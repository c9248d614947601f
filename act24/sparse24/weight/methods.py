"""The methods of 2:4 weights: one record each, in one table that passes, modules, recipes and docs read.

Sources: arXiv 2404.01847 (transposable masks, masked decay of gradients, MVUE of the output gradient),
arXiv 2409.09099 (S-STE: soft thresholding with a fixed scale), arXiv 2102.04010 (SR-STE).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from act24.operation import is_mapped
from act24.options import OneOf, OptionError, PositiveSteps, Range, check_options
from act24.records import Table
from act24.sparse24.kernels.shared.self_check import kernel_obstacle
from act24.sparse24.kernels.transposable_mask import best_transposable_mask
from act24.sparse24.pattern.scale import times_scale
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.pattern.soft_threshold import scale_from_sums, scale_sums, soft_threshold24
from act24.sparse24.pattern.transposable import transposable_mask

WeightGradient = Literal["mvue", "dense"]

#: The size of the weight on which the mask of a new method is looked at.
_CHECKED = (64, 64)

#: What the kernel for transposable masks reads.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Where the masked decay λ · (1 - mask) ∘ W enters. `"before_clipping"`: it is a part of the gradient, and is
#: clipped with it. `"after_clipping"`: it is added to the clipped gradient, before the optimizer.
DecayPlace = Literal["none", "before_clipping", "after_clipping"]

#: The products of y = x W₂₄ᵀ, and what each of them multiplies: W₂₄ along its rows, W₂₄ along its columns,
#: the output gradient along the tokens.
LinearProduct = Literal["y", "grad_x", "grad_weight"]


@dataclass(frozen=True)
class WeightMethod:
    """How a dense weight W `[out, in]` becomes 2:4, and how it is trained.

    Attributes:
        name: as recipes have it.
        mask: W `[out, in]` to the boolean `[out, in]` of the entries that stay; at most two of four
            consecutive ones along `in`. W is what the parameter is, of any floating dtype.
        both_ways: the mask is 2:4 along `out` too, so that W₂₄ᵀ is a 2:4 operand in dX = G W₂₄. Then `out`
            has to be a multiple of 4, as `in` has to be.
        soft: W₂₄ = β S(W), soft thresholding with a scale β that is measured once, at the first sparse
            update; else W₂₄ is W where the mask is True, and zero elsewhere.
        mask_every: optimizer updates between two masks, as published; None where masks are those of the
            weights of every update, and there is nothing to choose.
        decay_place: where masked decay of the dropped weights enters.
        decay: its λ, as published; 0 where there is none.
        weight_gradient: of dW, as published: `"mvue"` makes the output gradient 2:4 along the tokens.
        source: where it was published.

    Raises:
        OptionError: an option is out of range, or the mask of a small weight is not as said above.
    """

    name: str
    mask: Callable[[Tensor], Tensor]
    both_ways: bool = False
    soft: bool = False
    mask_every: PositiveSteps | None = None
    decay_place: DecayPlace = "none"
    decay: Annotated[float, Range(ge=0)] = 0.0
    weight_gradient: WeightGradient = "dense"
    source: str = ""

    def __post_init__(self) -> None:
        check_options(self, f"method {self.name}")
        if self.decay and self.decay_place == "none":
            raise OptionError(f"method {self.name}: a decay of {self.decay} needs a decay_place")
        self._check_mask()

    def _check_mask(self) -> None:
        """Look at the mask of a small weight: products with packed weights would drop what it keeps beyond
        two of four, and dense ones would not."""
        weight = torch.randn(_CHECKED, generator=torch.Generator().manual_seed(0), device="cpu")
        kept = self.mask(weight)
        if kept.dtype is not torch.bool or kept.shape != weight.shape:
            raise OptionError(f"method {self.name}: mask has to give a boolean tensor of the weight's shape")
        for side, along in (("in", kept), *([("out", kept.T)] if self.both_ways else [])):
            if int(along.unflatten(1, (-1, 4)).sum(-1).max()) > 2:
                raise OptionError(
                    f"method {self.name}: mask keeps more than two of four consecutive entries along {side}"
                )

    def wrong_size(self, shape: tuple[int, int]) -> str:
        """Why a weight `(out, in)` cannot be made 2:4, in a few words; empty if it can."""
        sizes = shape if self.both_ways else shape[1:]
        return "not all multiples of 4" if any(size % 4 for size in sizes) else ""

    def products(self, weight_gradient: WeightGradient) -> tuple[LinearProduct, ...]:
        """Those of the three products that have a 2:4 operand."""
        both = ("grad_x",) if self.both_ways else ()
        drawn = ("grad_weight",) if weight_gradient == "mvue" else ()
        return ("y", *both, *drawn)


def _transposable(weight: Tensor) -> Tensor:
    weight = weight.detach()
    fits = weight.is_cuda and weight.dtype in _KERNEL_DTYPES and not is_mapped()
    if fits and not kernel_obstacle(weight.device, ("best_transposable_mask",)):
        return best_transposable_mask(weight)
    return transposable_mask(weight)


def _two_largest(weight: Tensor) -> Tensor:
    return top2_of_4(weight.detach().abs())


METHODS: Table[WeightMethod] = Table(
    "method of weight24",
    WeightMethod(
        name="transposable",
        mask=_transposable,
        both_ways=True,
        mask_every=40,
        decay_place="after_clipping",
        decay=6e-5,
        weight_gradient="mvue",
        source="arXiv 2404.01847; their λ is 6e-5 for GPT-2 of 124M and 774M, 2e-4 for 350M and 1558M",
    ),
    # Where the second and third magnitude are equal, soft thresholding makes both zero. The mask has the
    # second one all the same.
    WeightMethod(
        name="soft_threshold",
        mask=_two_largest,
        soft=True,
        weight_gradient="mvue",
        source="S-STE, arXiv 2409.09099",
    ),
    WeightMethod(
        name="ste", mask=_two_largest, source="the straight-through baseline of arXiv 2102.04010, λ = 0"
    ),
    WeightMethod(
        name="sr_ste",
        mask=_two_largest,
        decay_place="before_clipping",
        decay=2e-4,
        source="SR-STE, arXiv 2102.04010, eq. 7: W ← W - γ (g + λ (1 - mask) ∘ W), λ = 2e-4; their code "
        "adds it in the backward of the sparse weight, so that whatever clips gradients clips it too",
    ),
)

#: The name of a method, as an option.
MethodName = Annotated[str, OneOf(METHODS)]


def decays(method: WeightMethod, decay: float | None) -> float:
    """λ of the masked decay: the one that is asked for, or that of the method.

    Raises:
        OptionError: it is not a number of 0 or more, or the method has no decay.
    """
    if decay is None:
        return method.decay
    if decay and method.decay_place == "none":
        named = ", ".join(name for name, m in METHODS.items() if m.decay_place != "none")
        raise OptionError(f'decay {decay:g}: method "{method.name}" has no masked decay; {named} have')
    return decay


def renewed_every(method: WeightMethod, mask_every: int | None) -> int:
    """Updates between two masks: those that are asked for, or those of the method.

    Raises:
        OptionError: the method renews its masks for every update.
    """
    if mask_every is None:
        return method.mask_every or 1
    if mask_every != 1 and method.mask_every is None:
        raise OptionError(
            f'mask_every {mask_every}: method "{method.name}" takes the mask of the weights of every update'
        )
    return mask_every


def weight_mask(weight: Tensor, method: str) -> Tensor:
    """The entries of a weight that its 2:4 form keeps.

    Args:
        weight: `[out, in]`, of any floating dtype; the groups of four lie along `in`, over which the product
            y = x Wᵀ reduces.
        method: a name in `METHODS`.

    Returns:
        boolean `[out, in]`.

    Raises:
        OptionError: there is no such method.
        ValueError: a size that is not a multiple of 4.
    """
    return METHODS[method].mask(weight)


@torch.no_grad()
def weight_scale(weight: Tensor) -> Tensor:
    """β of S-STE: argmin ‖W - β S(W)‖², of W `[out, in]`; a float32 scalar on its device, meant to be
    computed once, at the start of sparse training, and kept (arXiv 2409.09099 saw flip rates diverge
    otherwise)."""
    return scale_from_sums(scale_sums(weight, soft_threshold24(weight)))


def sparse_weight(weight: Tensor, mask: Tensor | None, scale: Tensor | None) -> Tensor:
    """W₂₄ in dense form.

    Args:
        weight: W `[out, in]`.
        mask: boolean `[out, in]`; W₂₄ is W where it is True. None: W₂₄ = β S(W).
        scale: β, a scalar, where there is no mask.

    Returns:
        `[out, in]`, in the dtype of W.
    """
    if mask is not None:
        return torch.where(mask, weight, 0)
    assert scale is not None
    return times_scale(soft_threshold24(weight), scale)
