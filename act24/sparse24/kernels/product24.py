"""The operator that multiplies 2:4 matrices (`act24.sparse24.format.cusparselt`)."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.format.products import multiply24
from act24.sparse24.kernels.shared.registry import operator


def _product24_reference(
    packed: Tensor, dense: Tensor, algorithm: int, transposed: bool, rows: Tensor | None, index: Tensor | None
) -> Tensor:
    result = unpack(Packed24(packed)).bfloat16() @ dense.bfloat16()
    result = result.T.contiguous() if transposed else result
    if rows is None or index is None:
        return result
    exact = rows @ dense
    return result.index_copy_(1, index, exact.T) if transposed else result.index_copy_(0, index, exact)


def _product24_kernel(
    packed: Tensor, dense: Tensor, algorithm: int, transposed: bool, rows: Tensor | None, index: Tensor | None
) -> Tensor:
    from act24.sparse24.kernels.replace_rows import replace_rows

    result = multiply24(packed, dense, algorithm, transposed)
    if rows is not None and index is not None:
        replace_rows(result, rows @ dense, index, transposed)
    return result


def _product24_fake(
    packed: Tensor, dense: Tensor, algorithm: int, transposed: bool, rows: Tensor | None, index: Tensor | None
) -> Tensor:
    shape = (packed.shape[0], dense.shape[1])
    return packed.new_empty(shape[::-1] if transposed else shape, dtype=torch.bfloat16)


#: A 2:4 matrix `[M, K]` times a dense one `[K, N]`, both of bfloat16 or e4m3, in bfloat16: `[M, N]`, or
#: transposed `[N, M]`; with `rows` `[n, K]` the rows `index` of the 2:4 matrix are these dense ones instead.
#: The algorithm is cuSPARSELt's; on a CPU it means nothing.
product24 = operator(
    "product24(Tensor packed, Tensor dense, int algorithm, bool transposed, Tensor? rows, Tensor? index) "
    "-> Tensor",
    _product24_reference,
    _product24_kernel,
    _product24_fake,
)
