"""e4m3 with a scale for each row: the product y of `activation24` with `precision = "fp8"`, in plain PyTorch.

    s_t = max_k |a_tk| / 448        a8 = e4m3(a / s)        y_to = s_t u_o Σ_k a8_tk w8_ok

where a is the 2:4 activation, and u and w8 are to W_out `[D_out, F]` what s and a8 are to a: a scale for each
token and for each output feature, which leave the sum as factors. So it is in `torch._scaled_mm`, and in
arXiv 2503.16672, whose figures of speed are in fp8. 448 is the largest number of e4m3; a row of zeros stays
zeros.

The quantiser has no gradient of its own: backward is that of the same product in bfloat16, straight through.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.operation import cast

#: As a factor, for PyTorch divides a tensor by a number in one way on a CPU and in another on a GPU.
PER_LARGEST = 1 / 448

#: What rows are taken to reach at least, so that the scale has an inverse.
LEAST = 1e-30


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, each over its own scale.

    Args:
        rows: `[..., K]`, any floating dtype. A row with NaN or infinity comes out with NaN.

    Returns:
        float8 `[..., K]`, and the scales, float32 `[...]`.
    """
    single = rows.float()
    scale = single.abs().amax(-1).clamp(min=LEAST) * PER_LARGEST
    return (single * scale.reciprocal()[..., None]).to(torch.float8_e4m3fn), scale


def scaled(product: Tensor, scale: Tensor, columns: Tensor) -> Tensor:
    """A product of quantised rows with their scales put back.

    Args:
        product: `[..., N]`.
        scale, columns: float32 `[...]` and `[N]`, of the rows of both sides.

    Returns:
        `[..., N]` in the dtype of the product.
    """
    return cast(product * scale[..., None] * columns, product.dtype)


def linear_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ with both sides in e4m3 by rows, and the sum rounded to the dtype of x before it is scaled.

    Args:
        x: `[..., K]`, any floating dtype.
        weight: `[N, K]`, likewise.

    Returns:
        `[..., N]` in the dtype of x.

    e4m3 is exact in all wider types, so this multiplies in the dtype of x; but products reach 448², which
    float16 has no number for.
    """
    (narrow, scale), (narrow_weight, columns) = quantise_rows(x), quantise_rows(weight)
    wide = torch.float32 if x.dtype is torch.float16 else x.dtype
    return cast(scaled(F.linear(narrow.to(wide), narrow_weight.to(wide)), scale, columns), x.dtype)
