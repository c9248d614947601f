"""Steps of LORO on the manifold of matrices of rank R (ICLR 2025, Algorithms 1 and 2), for stacks of factors.

W = M Nᵀ with M = weight_out and N = weight_inᵀ. The exact step replaces W by the best approximation of rank
R of W - lr P_T(G), where P_T(G) = UUᵀG + GVVᵀ - UUᵀGVVᵀ projects the gradient G of W onto the tangent space
at W, and returns balanced factors. W itself is never formed: with thin QRs M = U R_M and N = V R_N,

    W - lr P_T(G) = U C Vᵀ - lr U Y₁ᵀ - lr Y₂ Vᵀ,        UᵀY₂ = 0, VᵀY₁ = 0,

which has rank 2R at most. Everything is computed in float64 and rounded once at the end. On an H200 that
costs no more than float32, and the global switch for TF32 does not matter. It is also exact enough to make QR
decompositions from Gram matrices and their Cholesky factors; a GPU has no QR for batches. Most of the time
goes into one eigendecomposition of `[n, 2R, 2R]`.

The decomposition itself: with an orthonormal basis Q of Y₁ = Q K, the right-hand side is A [V, Q]ᵀ for

    A = [U C - lr Y₂,  -lr U Kᵀ],        AᵀA = | CᵀC + lr² Y₂ᵀY₂    -lr CᵀKᵀ |
                                               | -lr K C            lr² K Kᵀ |

so the eigenvectors of AᵀA, the R largest, are the right singular vectors in the basis [V, Q], and the
eigenvalues are the squares of the singular values.

This differs from LORO's script in two points, to be robust. First, only K is computed, from Y₁ᵀY₁ = KᵀK, and
never Q, which would not exist where 2R exceeds a side of W and would be arbitrary where Y₁ is rank-deficient
or zero. Second, factors that are ill-conditioned are reported, where the script stops at an assertion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from act24.options import OptionError, Range, in_range

#: Symmetric `[n, k, k]` to ascending eigenvalues `[n, k]` and eigenvectors in columns, as torch.linalg.eigh.
Eigh = Callable[[Tensor], tuple[Tensor, Tensor]]

#: Beyond this condition of a factor, or ratio of the new singular values, a step is refused.
MAX_CONDITION = 1e6


@dataclass(frozen=True)
class Refactored:
    """New factors of a stack.

    Attributes:
        weight_in, weight_out: `[n, R, in]` and `[n, out, R]`, in the dtype that came in, balanced:
            weight_in weight_inᵀ = weight_outᵀ weight_out = diag(singular).
        singular: the singular values of the product, `[n, R]`, float64, descending.
        valid: `[n]`, boolean; where False the other values mean nothing.
    """

    weight_in: Tensor
    weight_out: Tensor
    singular: Tensor
    valid: Tensor


def exact_step(
    weight_in: Tensor,
    weight_out: Tensor,
    direction_in: Tensor,
    direction_out: Tensor,
    lr: float | Tensor,
    eigh: Eigh = torch.linalg.eigh,
) -> Refactored:
    """The truncated singular value decomposition of W - lr P_T(G), as balanced factors.

    Args:
        weight_in, weight_out: `[n, R, in]` and `[n, out, R]`.
        direction_in, direction_out: the gradients of the factors, of the same shapes. They determine P_T(G),
            and the result does not depend on how W is split into factors. LORO feeds Adam's directions
            instead, which belong to no common G; the formulas then take UᵀGV from `direction_in`.
        lr: the step size, a number of 0 or more or a 0-D tensor.
        eigh: for the eigendecomposition; a GPU may have a faster one for batches.

    Raises:
        OptionError: the shapes do not belong together, or `lr` is out of range.
    """
    _check_factors("exact_step", weight_in, weight_out)
    if (direction_in.shape, direction_out.shape) != (weight_in.shape, weight_out.shape):
        raise OptionError(
            f"exact_step: direction_in and direction_out have to be {_shapes(weight_in, weight_out)} as the "
            f"factors are, got {_shapes(direction_in, direction_out)}"
        )
    if not isinstance(lr, Tensor):
        in_range("exact_step", "lr", lr, Range(ge=0))
    u, v = _thin_qr(weight_out.double()), _thin_qr(weight_in.mT.double())
    g_v = direction_out.double() @ v.inverse  # G V, from the gradient of M, which is G N = G V R_N
    gt_u = direction_in.mT.double() @ u.inverse  # Gᵀ U, from the gradient of N, which is Gᵀ M = Gᵀ U R_M
    ut_g_v = gt_u.mT @ v.q
    y1 = gt_u - v.q @ ut_g_v.mT
    y2 = g_v - u.q @ (u.q.mT @ g_v)
    c = u.r @ v.r.mT - lr * ut_g_v

    y1_gram = y1.mT @ y1
    k = _semidefinite_cholesky(y1_gram)
    block_vv = c.mT @ c + lr**2 * (y2.mT @ y2)
    block_qv = -lr * (k @ c)
    block_qq = lr**2 * (k @ k.mT)
    squared = torch.cat((torch.cat((block_vv, block_qv.mT), -1), torch.cat((block_qv, block_qq), -1)), -2)
    valid = u.valid & v.valid & squared.isfinite().all(-1).all(-1)

    rank = c.shape[-1]
    values, vectors = _top(squared, rank, valid, eigh)
    in_v, in_q = vectors[..., :rank, :], vectors[..., rank:, :]
    # Q in_q is Y₁ in_y1 with in_y1 = K⁻¹ in_q. The second row of AᵀA x = s² x, from the left by K⁻¹, has it
    # without an inverse.
    in_y1 = (lr**2 * (k.mT @ in_q) - lr * (c @ in_v)) / values[:, None]
    right = v.q @ in_v + y1 @ in_y1
    left = u.q @ (c @ in_v - lr * (y1_gram @ in_y1)) - lr * (y2 @ in_v)  # A x; Kᵀ in_q = Y₁ᵀY₁ in_y1
    return _balanced(left, right, values, valid, weight_in.dtype)


def refactor(weight_in: Tensor, weight_out: Tensor, eigh: Eigh = torch.linalg.eigh) -> Refactored:
    """The same product from balanced factors: its singular value decomposition, with √s on each side.

    Args:
        weight_in, weight_out: `[n, R, in]` and `[n, out, R]`.
        eigh: as for `exact_step`.

    Raises:
        OptionError: the shapes do not belong together.

    Source: the restarts of arXiv 2505.22922.
    """
    _check_factors("refactor", weight_in, weight_out)
    u, v = _thin_qr(weight_out.double()), _thin_qr(weight_in.mT.double())
    core = u.r @ v.r.mT
    squared = core.mT @ core
    valid = u.valid & v.valid & squared.isfinite().all(-1).all(-1)
    values, vectors = _top(squared, core.shape[-1], valid, eigh)
    return _balanced(u.q @ (core @ vectors), v.q @ vectors, values, valid, weight_in.dtype)


def _check_factors(owner: str, weight_in: Tensor, weight_out: Tensor) -> None:
    fits = weight_in.ndim == weight_out.ndim == 3 and len(weight_in) == len(weight_out)
    if not fits or weight_in.shape[1] != weight_out.shape[2]:
        raise OptionError(
            f"{owner}: weight_in and weight_out have to be [n, R, in] and [n, out, R], got "
            f"{_shapes(weight_in, weight_out)}"
        )


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str([*tensor.shape]) for tensor in tensors)


class _ThinQR(NamedTuple):
    """Q `[n, d, R]`, R `[n, R, R]`, its inverse, and whether the condition is below MAX_CONDITION `[n]`."""

    q: Tensor
    r: Tensor
    inverse: Tensor
    valid: Tensor


def _thin_qr(matrix: Tensor) -> _ThinQR:
    """Two rounds of Cholesky QR, which in float64 give an orthonormal Q up to conditions of about 1e7."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    q, r, inverse = matrix, identity, identity
    sound = torch.ones(matrix.shape[0], dtype=torch.bool, device=matrix.device)
    for _ in range(2):
        lower, info = torch.linalg.cholesky_ex(q.mT @ q)
        sound &= info == 0
        # Explicit inverses of small triangles: batched products are fast on a GPU, batched solves are not.
        step = torch.linalg.solve_triangular(lower.mT, identity.expand_as(lower), upper=True)
        q, r, inverse = q @ step, lower.mT @ r, inverse @ step
    # Between the condition / R and the condition: exact where all singular values are equal.
    condition = r.norm(dim=(-2, -1)) * inverse.norm(dim=(-2, -1)) / r.shape[-1]
    return _ThinQR(q, r, inverse, sound & (condition < MAX_CONDITION))


def _semidefinite_cholesky(gram: Tensor) -> Tensor:
    """An upper triangular K with KᵀK = gram, up to rounding; gram `[n, R, R]` may be singular, or zero."""
    precision = torch.finfo(gram.dtype)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    shift = gram.shape[-1] * precision.eps * trace + precision.tiny
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky_ex(gram + shift[:, None, None] * identity).L.mT


def _top(squared: Tensor, rank: int, valid: Tensor, eigh: Eigh) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues, descending, and their eigenvectors. Matrices that are not valid are
    replaced by the identity first, because `eigh` raises for NaN and infinity."""
    identity = torch.eye(squared.shape[-1], dtype=squared.dtype, device=squared.device)
    values, vectors = eigh(torch.where(valid[:, None, None], squared, identity))
    smallest = torch.finfo(squared.dtype).tiny
    return values[..., -rank:].flip(-1).clamp(min=smallest), vectors[..., -rank:].flip(-1)


def _balanced(left: Tensor, right: Tensor, values: Tensor, valid: Tensor, dtype: torch.dtype) -> Refactored:
    """Factors from s_i u_i `[n, out, R]`, v_i `[n, in, R]` and s_i²."""
    singular = values.sqrt()
    root = singular.sqrt()[:, None]
    valid = valid & (singular[..., -1] * MAX_CONDITION > singular[..., 0])
    return Refactored((right * root).mT.to(dtype), (left / root).to(dtype), singular, valid)
