"""Casts to e4m3 with scales, and the product y = a W_outᵀ in e4m3 for networks of `activation24` whose other
products stay in the dtype of their input. Both are plain PyTorch.

    s_t = max_k |a_tk| / 448        a8 = e4m3(a / s)        y_to = s_t u_o Σ_k a8_tk w8_ok

Here a is the 2:4 activation, with a scale s for each token. W_out `[D_out, F]` is cast to w8 in the same way,
with a scale u for each output feature. Both scales are constant within the sum over k, so they multiply its
result. `torch._scaled_mm` does the same, and so does arXiv 2503.16672, whose figures of speed are in fp8. 448
is the largest number of e4m3. A row of zeros stays zeros.

The quantiser has no gradient of its own: backward is that of the same product in bfloat16, straight through.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.operation import cast

#: The largest number of e4m3, and the smallest above zero.
LARGEST, SMALLEST = 448.0, 2.0**-9

#: 1 / 448, to multiply with: PyTorch rounds a tensor divided by a number differently on a CPU and on a GPU.
PER_LARGEST = 1 / LARGEST

#: Smaller magnitudes than this count as this, so that a row of zeros has a scale that can be divided by.
LEAST = 1e-30


def largest_of(matrix: Tensor, dimension: int) -> Tensor:
    """The largest magnitudes of a matrix `[M, N]` along a dimension, float32 `[M]` or `[N]`; NaN where NaN is
    among them, and zero where there are none, as of no tokens."""
    magnitudes = matrix.float().abs()
    return magnitudes.amax(dimension) if matrix.shape[dimension] else magnitudes.sum(dimension)


def scales_of(largest: Tensor) -> Tensor:
    """The scales that bring the largest magnitudes to the largest number of e4m3.

    Args:
        largest: float32, any shape.

    Returns:
        the same shape. NaN where `largest` is NaN or infinite: everything that shares the scale becomes NaN,
        so that the fault is seen.
    """
    scale = largest.clamp(min=LEAST) * PER_LARGEST
    return torch.where(largest.isfinite(), scale, float("nan"))


def power_scales(largest: Tensor) -> Tensor:
    """`scales_of`, rounded up to powers of two. What was cast with one such scale can be cast to another
    without a second rounding, unless it leaves the range of the format.

    Args:
        largest: float32, any shape.

    Returns:
        float32, the same shape; NaN where `scales_of` has it.
    """
    scale = scales_of(largest)
    # Adding the largest fraction raises the exponent by one, unless the fraction is zero already.
    bits = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return torch.where(scale.isnan(), scale, bits.view(torch.float32))


def narrowed(values: Tensor, scale: Tensor) -> Tensor:
    """Values over their scales in e4m3. What is too large becomes 448: left to the cast it would be NaN in
    one release of PyTorch, on one device or uncompiled, and 448 in another. NaN stays NaN.

    Args:
        values: any floating dtype.
        scale: float32, of a shape that is broadcast to that of the values.
    """
    return (values.float() * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, each over its own scale.

    Args:
        rows: `[..., K]`, any floating dtype. A row with NaN or infinity comes out as NaN, as by the kernels.

    Returns:
        float8 `[..., K]`, and the scales, float32 `[...]`.
    """
    scale = scales_of(largest_of(rows, -1))
    return narrowed(rows, scale[..., None]), scale


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
