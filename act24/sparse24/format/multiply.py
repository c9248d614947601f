"""One 2:4 product by cuSPARSELt, and how far off it may be."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.format import cusparselt
from act24.sparse24.format.packed import Packed24

#: How far off a product may be. Hopper's tensor cores keep about 14 bits of a running sum of e4m3.
TOLERANCE, FP8_TOLERANCE = 1e-2, 5e-2


def multiply24(packed: Tensor, dense: Tensor, algorithm: int, transposed: bool) -> Tensor:
    """A packed 2:4 matrix times a dense one, by cuSPARSELt.

    Args:
        packed: the buffer of a `Packed24` `[M, K]`, of bfloat16 or e4m3.
        dense: `[K, N]`, contiguous, or the transpose of a contiguous `[N, K]`; in e4m3 only the latter.
        algorithm: an id that the library has for this GPU.
        transposed: return `[N, M]`.

    Returns:
        `[M, N]` or `[N, M]`, contiguous, in bfloat16.

    Raises:
        ValueError: shapes or dtypes do not match, or the dense operand has another layout: the library would
            not notice, and read something else.
    """
    rows, inner = Packed24(packed).shape
    size, _ = dense.shape
    if size != inner or not packed.is_contiguous():
        raise ValueError(f"a packed {(rows, inner)} matrix cannot multiply {tuple(dense.shape)}")
    if packed.dtype not in (torch.bfloat16, torch.float8_e4m3fn) or dense.dtype is not packed.dtype:
        raise ValueError(
            f"2:4 products are of bfloat16 or e4m3 on both sides, not {packed.dtype} and {dense.dtype}"
        )
    if not (dense.T.is_contiguous() or (dense.is_contiguous() and packed.dtype is torch.bfloat16)):
        raise ValueError(
            f"the dense operand has to be contiguous (not in e4m3) or a contiguous matrix transposed; it is "
            f"{tuple(dense.shape)} with strides {dense.stride()}"
        )
    if cusparselt.multiplies(packed.device, packed.dtype):
        return cusparselt.multiply(packed, rows, dense, algorithm, transposed)
    return library_product(packed, dense, algorithm, transposed)


def library_product(packed: Tensor, dense: Tensor, algorithm: int = 0, transposed: bool = False) -> Tensor:
    """`multiply` by PyTorch's call, which makes a plan of its own: shapes and dtypes as there."""
    out_dtype = torch.bfloat16 if packed.dtype is torch.float8_e4m3fn else None
    return torch.ops.aten._cslt_sparse_mm(
        packed, dense, out_dtype=out_dtype, transpose_result=transposed, alg_id=algorithm
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ of two tensors of one shape, any dtype; NaN counts as infinite. Waits
    for the device."""
    expected = expected.float()
    error = ((found.float() - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")
