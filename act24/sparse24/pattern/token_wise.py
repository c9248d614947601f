"""2:4 along the features: from relu(h) to the activation that stays, and its derivative."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from act24.sparse24.format.products import Table
from act24.sparse24.pattern.feature_wise import TokenPermutation
from act24.sparse24.pattern.mvue import mvue_factor
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.pattern.soft_threshold import third_largest

Function = Literal["relu2", "relu"]
Method = Literal["naive", "soft_threshold", "mvue"]
Backward = Literal["dense", "split_gemm", "sparse"]
Estimator = Literal["masked", "ste"]
Precision = Literal["bfloat16", "fp8"]


class Options24(NamedTuple):
    """How `activation24` makes an activation 2:4, and how gradients come back.

    Attributes:
        function: the activation, relu(h)² or relu(h).
        method: the 2:4 value of an activation a. `"naive"`: the two largest of four stay as they are.
            `"soft_threshold"`: less the third largest. `"mvue"`: two drawn at random, over their
            probability, which is unbiased (`act24.sparse24.pattern.mvue`).
        backward: weight gradients. `"dense"`: exact. `"split_gemm"`: 2:4 along the tokens, but for the
            densest features. `"sparse"`: the same without that exception.
        estimator: `"masked"`, the gradient of the function that ran: dropped positions get none, and the
            gradient of h is 2:4 where the activation is. `"ste"`, straight through: as if nothing had been
            dropped; it is not 2:4, so it goes with the dense backward only.
        precision: of the product y = a W_outᵀ. `"fp8"`: in e4m3, with a scale for each token and each output
            feature (`act24.sparse24.format.fp8`); all of backward, and what is saved for it, stays as it is.
            Networks of narrow linears then run on packed operands too, or on the reference.
        dense_ratio: share of the features that split_gemm leaves dense, those with the most non-zeros.
        token_permutation: see `act24.sparse24.pattern.feature_wise`; of no meaning for the dense backward.
        statistics: count what 2:4 does; else the statistics are zeros and cost nothing.
        kernels: run on packed operands (`act24.sparse24.feed_forward.packed`), inside the products of narrow
            linears (`narrow_activation`), or around dense ones or none (`masked_activation`), wherever one of
            them can; False for the plain-PyTorch reference.
        recompute: for narrow linears keep nothing F-wide for backward, and make it again there
            (`act24.sparse24.feed_forward.narrow`); the others do not look at it.
        algorithms: what a tuner found for the products on this GPU; empty for the rule of
            `act24.sparse24.format.products.choose`.
    """

    function: Function = "relu2"
    method: Method = "naive"
    backward: Backward = "dense"
    estimator: Estimator = "masked"
    precision: Precision = "bfloat16"
    dense_ratio: float = 0.05
    token_permutation: TokenPermutation = "batch"
    statistics: bool = False
    kernels: bool = True
    recompute: bool = False
    algorithms: Table = ()


#: relu², hard selection, exact gradients.
PLAIN = Options24()


class Sparse24(NamedTuple):
    """A 2:4 activation.

    Attributes:
        dense: the activation before 2:4.
        mask: what stays, boolean.
        value: the activation after 2:4, without the scale.
        slope: d value / d h as the estimator has it.
    """

    dense: Tensor
    mask: Tensor
    value: Tensor
    slope: Tensor


def sparsify_token_wise(positive: Tensor, seed: Tensor | None, options: Options24) -> Sparse24:
    """Make an activation 2:4 along the features.

    Args:
        positive: relu(h), `[..., F]`, F a multiple of 4.
        seed: int64 scalar, for `"mvue"`.
    """
    squared = options.function == "relu2"
    dense = positive * positive if squared else positive
    derivative = 2 * positive if squared else (positive > 0).to(positive.dtype)
    if options.method == "mvue":
        assert seed is not None
        factor = mvue_factor(dense, seed)
        mask, value = factor > 0, (dense * factor).to(dense.dtype)
        slope = (derivative * factor).to(dense.dtype)
    else:
        mask = top2_of_4(positive)
        value = dense - third_largest(dense, mask) if options.method == "soft_threshold" else dense
        value, slope = torch.where(mask, value, 0), torch.where(mask, derivative, 0)
    return Sparse24(dense, mask, value, derivative if options.estimator == "ste" else slope)
