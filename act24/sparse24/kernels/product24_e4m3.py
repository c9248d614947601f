"""The product with a 2:4 matrix in e4m3, by cuSPARSELt.

The library can multiply the result by one factor, but the host would have to know it; for other types it
takes a vector of factors, which it refuses in e4m3 (0.8.0, H200). So the sums are rounded unscaled, and the
caller multiplies them by the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.format.multiply import multiply24
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.kernels.product24 import replace_rows
from act24.sparse24.kernels.shared.registry import operator


def _reference(
    packed: Tensor,
    right: Tensor,
    algorithm: int,
    transposed: bool,
    rows: Tensor | None,
    index: Tensor | None,
) -> Tensor:
    left = unpack(Packed24(packed)).float()
    if rows is not None and index is not None:
        left[index] = rows.float()
    with torch.autocast(left.device.type, enabled=False):  # which would round the operands
        result = (left @ right.float().T).bfloat16()
    return result.T.contiguous() if transposed else result


def _fake(
    packed: Tensor,
    right: Tensor,
    algorithm: int,
    transposed: bool,
    rows: Tensor | None,
    index: Tensor | None,
) -> Tensor:
    shape = (packed.shape[0], right.shape[0])
    return packed.new_empty(shape[::-1] if transposed else shape, dtype=torch.bfloat16)


@operator(_reference, _fake, ours=("packed",))
def product24_e4m3(
    packed: Tensor,
    right: Tensor,
    algorithm: int,
    transposed: bool,
    rows: Tensor | None,
    index: Tensor | None,
) -> Tensor:
    """L Rᵀ of a 2:4 matrix and a dense one.

    Args:
        packed: the buffer of a packed matrix `[M, K]` in e4m3.
        right: e4m3 `[N, K]`.
        algorithm: cuSPARSELt's; on a CPU it means nothing.
        transposed: return `[N, M]`.
        rows: e4m3 `[n, K]`, which stand for the rows `index` of the 2:4 matrix; or None.
        index: int64 `[n]`, all different, below M; or None.

    Returns:
        bfloat16 `[M, N]`, or `[N, M]`.

    Raises:
        ValueError: shapes, dtypes or layouts that the library would misread.
    """
    result = multiply24(packed, right.T, algorithm, transposed)
    if rows is not None and index is not None and len(rows):  # the library has no product of no rows
        one = torch.ones((), device=rows.device)
        exact = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            rows, right.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        replace_rows(result, exact, index, transposed)
    return result
