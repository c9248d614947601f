"""Steps of LORO on the manifold of matrices of rank R (ICLR 2025, Algorithms 1 and 2), for stacks of factors.

W = M Nᵀ with M = weight_out and N = weight_inᵀ. The exact step replaces W by the best approximation of rank
R of W - lr P_T(G), where P_T(G) = UUᵀG + GVVᵀ - UUᵀGVVᵀ projects the gradient G of W onto the tangent space
at W, and returns balanced factors. W itself is never formed: with thin QRs M = U R_M and N = V R_N,

    W - lr P_T(G) = U C Vᵀ - lr U Y₁ᵀ - lr Y₂ Vᵀ,        UᵀY₂ = 0, VᵀY₁ = 0,

of rank 2R at most. Everything is computed in float64, and rounded once at the end: that costs an H200 no more
than float32 would, needs no switch for TF32, which would be global, and lets Gram matrices and their Cholesky
factors stand for QR decompositions, which a GPU does not do in batches. What is left of the cost is one
eigendecomposition of `[n, 2R, 2R]`.

Two differences to LORO's script, both for robustness. Y₁ enters only through its Gram matrix, not through
an orthonormal basis, so nothing is to be capped where 2R exceeds a side of W, and nothing drifts where Y₁ is
rank-deficient or zero. And a module whose factors are ill-conditioned is reported instead of asserted on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
        lr: the step size, a number or a 0-D tensor.
        eigh: for the eigendecomposition; a GPU may have a faster one for batches.
    """
    outer, outer_r, outer_inverse, outer_valid = _cholesky_qr(weight_out.double())
    inner, inner_r, inner_inverse, inner_valid = _cholesky_qr(weight_in.mT.double())
    rank = outer_r.shape[-1]
    gradient_v = direction_out.double() @ inner_inverse  # G V, from dM = G N = G V R_N
    gradient_u = direction_in.mT.double() @ outer_inverse  # Gᵀ U, from dN = Gᵀ M = Gᵀ U R_M
    overlap = gradient_u.mT @ inner  # Uᵀ G V
    inner_rest = gradient_u - inner @ overlap.mT  # Y₁
    outer_rest = gradient_v - outer @ (outer.mT @ gradient_v)  # Y₂
    core = outer_r @ inner_r.mT - lr * overlap  # C

    gram = inner_rest.mT @ inner_rest
    root = _semidefinite_cholesky(gram)  # K with Kᵀ K = Y₁ᵀ Y₁; Y₁ K⁻¹ would be orthonormal
    coupling = -lr * (root @ core)
    squared = _blocks(
        core.mT @ core + lr**2 * (outer_rest.mT @ outer_rest), coupling.mT, coupling, lr**2 * (root @ root.mT)
    )
    valid = outer_valid & inner_valid & squared.isfinite().all(-1).all(-1)
    values, vectors = _top(squared, rank, valid, eigh)
    top, bottom = vectors[..., :rank, :], vectors[..., rank:, :]
    # Y₁ K⁻¹ bottom without the inverse: the eigenvector equation gives K⁻¹ bottom.
    weights = (lr**2 * (root.mT @ bottom) - lr * (core @ top)) / values[:, None]
    right = inner @ top + inner_rest @ weights
    left = outer @ (core @ top - lr * (gram @ weights)) - lr * (outer_rest @ top)
    return _balanced(left, right, values, valid, weight_in.dtype)


def refactor(weight_in: Tensor, weight_out: Tensor, eigh: Eigh = torch.linalg.eigh) -> Refactored:
    """The same product from balanced factors: its singular value decomposition, with √s on each side.

    Args:
        weight_in, weight_out: `[n, R, in]` and `[n, out, R]`.

    Source: the restarts of arXiv 2505.22922.
    """
    outer, outer_r, _, outer_valid = _cholesky_qr(weight_out.double())
    inner, inner_r, _, inner_valid = _cholesky_qr(weight_in.mT.double())
    core = outer_r @ inner_r.mT
    squared = core.mT @ core
    valid = outer_valid & inner_valid & squared.isfinite().all(-1).all(-1)
    values, vectors = _top(squared, core.shape[-1], valid, eigh)
    return _balanced(outer @ (core @ vectors), inner @ vectors, values, valid, weight_in.dtype)


def _cholesky_qr(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Thin QR of `[n, d, R]`: (Q, R, R⁻¹, whether the condition is below MAX_CONDITION `[n]`).

    Two rounds of Cholesky, which in float64 give an orthonormal Q up to conditions of about 1e7.
    """
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
    return q, r, inverse, sound & (condition < MAX_CONDITION)


def _semidefinite_cholesky(gram: Tensor) -> Tensor:
    """An upper triangular K with KᵀK = gram, up to rounding; gram `[n, R, R]` may be singular, or zero."""
    precision = torch.finfo(gram.dtype)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    shift = gram.shape[-1] * precision.eps * trace + precision.tiny
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky_ex(gram + shift[:, None, None] * identity).L.mT


def _blocks(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.cat((torch.cat((a, b), -1), torch.cat((c, d), -1)), -2)


def _top(squared: Tensor, rank: int, valid: Tensor, eigh: Eigh) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues, descending, and their eigenvectors; of the identity where not valid,
    because a decomposition of what is not finite raises."""
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
