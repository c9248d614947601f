"""SparseGPT (arXiv 2301.00774): prune column by column, and let the columns that follow make up for it.

With H = XᵀX and U the upper Cholesky factor of H⁻¹, the weight of column j costs w²/U_jj² to drop, and what
is dropped spreads by row j of U over the columns behind it. Columns come in blocks of 128, for which a mask
is chosen at once (a share), or in groups of M as each begins (N:M).
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.pruning.pattern import Pattern, mask_by_layer, mask_by_row

_BLOCK = 128
#: Added to the diagonal of H, as a share of its mean.
_DAMPING = 0.01


def inverse_factor(gram: Tensor) -> Tensor:
    """U, upper triangular with UᵀU = (H + damping)⁻¹. Inputs that were always zero count as of size 1.

    Args:
        gram: XᵀX, float32 `[in, in]`.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune a weight and change what is kept so that the outputs stay close.

    Args:
        weight: `[out, in]`.
        gram: XᵀX of its inputs, float32 `[in, in]`.

    Returns:
        the new weight, float32 `[out, in]`, 0 where it is pruned, and the mask, boolean. A share is exact in
        every block of 128 columns, over all rows.

    Raises:
        torch.linalg.LinAlgError: the gram matrix is not positive even with damping, as with NaN in it.
    """
    w = weight.float().clone()
    w[:, gram.diagonal() == 0] = 0
    upper = inverse_factor(gram)
    mask = torch.ones_like(w, dtype=torch.bool)
    columns = w.shape[1]
    # A block has to hold whole groups of M.
    size = max(_BLOCK // pattern.of, 1) * pattern.of if pattern.of else _BLOCK
    for start in range(0, columns, size):
        end = min(start + size, columns)
        block, own = w[:, start:end].clone(), upper[start:end, start:end]
        costs = own.diagonal().square()
        errors = torch.zeros_like(block)
        if not pattern.of:
            mask[:, start:end] = mask_by_layer(block.square() / costs, pattern)
        for i in range(end - start):
            j = start + i
            if pattern.of and i % pattern.of == 0:
                group = slice(i, i + pattern.of)
                mask[:, j : j + pattern.of] = mask_by_row(block[:, group].square() / costs[group], pattern)
            column = block[:, i].clone()
            w[:, j] = torch.where(mask[:, j], column, 0)
            errors[:, i] = (column - w[:, j]) / own[i, i]
            block[:, i:] -= errors[:, i : i + 1] * own[i, i:]
        w[:, end:] -= errors @ upper[start:end, end:]
    return w, mask
