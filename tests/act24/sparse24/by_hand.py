"""Random feed-forward networks for activation24, their gradients, and 2:4 along the tokens by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24

SEED = torch.tensor(11)
METHODS = ("naive", "soft_dynamic", "mvue")
FUNCTIONS = ("relu2", "relu")
SPARSE = Options24(backward="sparse")
SPLIT = Options24(backward="split_gemm")


def inputs(
    *shape: int, width: int = 16, bias: bool = True, dtype: torch.dtype = torch.float64, out: int = 6
) -> list[Any]:
    """x, weight_in, bias_in, weight_out, bias_out."""
    *tokens, features = shape
    tensors = [
        torch.randn(*tokens, features),
        torch.randn(width, features),
        torch.randn(width) if bias else None,
        torch.randn(out, width),
        torch.randn(out) if bias else None,
    ]
    return [t if t is None else t.to(dtype).requires_grad_() for t in tensors]


def gradients(y: Tensor, tensors: list[Any], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [t for t in tensors if t is not None], grad, retain_graph=True))


def run(tensors: list[Any], options: Options24, grad: Tensor, **state: Any) -> list[Tensor]:
    """The gradients of x, weight_in, … where those are tensors."""
    y, _ = activation24(*tensors, state.get("scale"), state.get("seed", SEED), state.get("pads"), options)
    return gradients(y, tensors, grad)


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(p, q, rtol=1e-10, atol=1e-11) for p, q in zip(a, b, strict=True))


def sparse_feature_wise_by_hand(rows: Tensor, dense: set[int]) -> Tensor:
    """Two largest magnitudes of each four tokens of each feature, one group after another."""
    result = torch.zeros_like(rows)
    for feature in range(rows.shape[1]):
        for start in range(0, len(rows), 4):
            group = rows[start : start + 4, feature].tolist()
            order = sorted(range(len(group)), key=lambda i: (-abs(group[i]), i))
            for i in range(len(group)) if feature in dense else order[:2]:
                result[start + i, feature] = group[i]
    return result
