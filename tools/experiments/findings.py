"""The figures of docs/findings.md, sections 3, 5, 7, 12 and 13: `python -m act24.tools.experiments.findings`.

Each is computed with act24's own operations, from a fixed seed, on the CPU, in a minute. Text and output are
compared by tests/test_findings.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from act24.optim import AdamW
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.pattern.feature_wise import TokenPermutation, sparsify_feature_wise, token_permutation
from act24.sparse24.pattern.selection import densest

_SEED = 0


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((a - b).detach().norm() / b.detach().norm())


def pre_activation(density: float, *shape: int) -> Tensor:
    """Gaussian, so that relu leaves this share of non-zeros."""
    return torch.randn(*shape) + torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(density))


def bursty(tokens: int = 2048, features: int = 256) -> Tensor:
    """relu² activations, 86% zeros, whose features are active on runs of tokens; 5% of them mostly active."""
    noise, state, rows = torch.randn(tokens, features), torch.zeros(features), []
    for row in noise:
        state = 0.9 * state + math.sqrt(1 - 0.81) * row
        rows.append(state)
    hidden = torch.stack(rows) - 1.28
    hidden[:, torch.randperm(features)[: features // 20]] += 2.5
    return torch.relu(hidden).square()


def split_errors() -> dict[str, float]:
    """3. Of the weight gradient's operand, by which 5% of the features stay dense."""
    activation = bursty()
    counts = (activation > 0).sum(0)
    last = torch.arange(256) >= int(0.95 * 256)
    kept = {"densest": densest(counts, 0.05), "sparsest": densest(-counts, 0.05), "last": last, "none": None}
    return {name: _feature_wise_error(activation, dense, "batch") for name, dense in kept.items()}


def backward_errors() -> dict[str, float]:
    """5. Straight through, and dW2 of the dense activation, beside the gradient of what ran; β left out."""
    found = {}
    for zeros, density in ((50, 0.5), (90, 0.1)):
        hidden = pre_activation(density, 4000, 64).requires_grad_()
        weight_out, grad = torch.randn(48, 64, requires_grad=True), torch.randn(4000, 48)
        exact = {}
        for estimator in ("masked", "ste"):
            y = _run(hidden, weight_out, None, Options24(estimator=estimator))
            exact[estimator] = torch.autograd.grad(y, (hidden, weight_out), grad)
        found[f"dZ, {zeros}% zeros"] = relative(exact["ste"][0], exact["masked"][0])
        dense = grad.T @ torch.relu(hidden.detach()).square()
        found[f"dW2, {zeros}% zeros"] = relative(dense, exact["masked"][1])
    hidden, weight_out = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32)
    options = Options24(method="soft_dynamic")
    without, scaled = (
        torch.autograd.grad(_run(hidden, weight_out, scale, options).sum(), hidden)[0]
        for scale in (None, torch.tensor(2.0))
    )
    found["without β = 2"] = float(without.norm() / scaled.norm())
    return found


def moment_shares() -> dict[str, float]:
    """7. What is left of Adam's second moment after 1,000 updates whose gradients are zero."""
    found = {}
    for beta in (0.999, 0.95):
        for kept in ("parameter", "float32"):
            parameter = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
            optimizer = AdamW([parameter], lr=0.0, betas=(0.9, beta), state_dtype=kept)
            parameter.grad = torch.randn(1000).bfloat16()
            optimizer.step()
            before = optimizer.state[parameter]["exp_avg_sq"].float().clone()
            parameter.grad = torch.zeros_like(parameter)
            for _ in range(1000):
                optimizer.step()
            after = optimizer.state[parameter]["exp_avg_sq"].float()
            state = "bfloat16" if kept == "parameter" else "float32"
            found[f"β₂ = {beta}, {state}"] = float(after.sum() / before.sum())
    return found


def permutation_errors() -> dict[str, float]:
    """12. Of the weight gradient's operand, the densest 5% dense, by the order of the tokens."""
    activation = bursty()
    dense = densest((activation > 0).sum(0), 0.05)
    kinds: tuple[TokenPermutation, ...] = ("none", "sequence", "batch")
    return {kind: _feature_wise_error(activation, dense, kind) for kind in kinds}


def padding_errors() -> dict[str, float]:
    """13. Of dW2, with 30% padding rows that compete in the selection along tokens, and that do not."""
    activation = torch.relu(pre_activation(0.1, 4096, 128)).square()
    grad, pads = torch.randn(4096, 32), torch.rand(4096) < 0.3
    grad[pads] = 0
    exact = grad.T @ activation
    rows = {"competing": activation, "left out": activation * ~pads[:, None]}
    return {name: relative(grad.T @ sparsify_feature_wise(r, None), exact) for name, r in rows.items()}


#: By section of docs/findings.md.
FIGURES: dict[int, Callable[[], dict[str, float]]] = {
    3: split_errors,
    5: backward_errors,
    7: moment_shares,
    12: permutation_errors,
    13: padding_errors,
}


def lines() -> Iterator[str]:
    """One line a section, as the document has it: two digits."""
    for section, compute in FIGURES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            figures = compute()
        yield f"{section}. {'; '.join(f'{name}: {value:.2g}' for name, value in figures.items())}"


def _run(hidden: Tensor, weight_out: Tensor, scale: Tensor | None, options: Options24) -> Tensor:
    return activation24(hidden, None, None, weight_out, None, scale, None, None, options)[0]


def _feature_wise_error(activation: Tensor, dense: Tensor | None, kind: TokenPermutation) -> float:
    order = token_permutation((8, len(activation) // 8), kind, activation.device)
    rows = activation if order is None else activation[order]
    return relative(sparsify_feature_wise(rows, dense), rows)


if __name__ == "__main__":
    for line in lines():
        print(line)
