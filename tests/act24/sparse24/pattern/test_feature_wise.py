"""Weight gradients that are 2:4 along the tokens: by hand, at their edges, and under the permutation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from by_hand import (
    FUNCTIONS,
    METHODS,
    SEED,
    SPARSE,
    close,
    gradients,
    inputs,
    run,
    sparse_feature_wise_by_hand,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.feed_forward.statistics import STATISTICS
from act24.sparse24.pattern.feature_wise import token_permutation
from act24.sparse24.pattern.mvue import mvue_factor
from act24.sparse24.pattern.selection import top2_of_4


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 23),
    method=st.sampled_from(METHODS),
    function=st.sampled_from(FUNCTIONS),
    permutation=st.sampled_from(["batch", "sequence", "none"]),
)
def test_the_backwards_agree_at_their_edges(
    tokens: int, method: Any, function: Any, permutation: Any
) -> None:
    """Split with no dense feature is sparse, with all dense is dense; dX and biases never differ."""
    base = Options24(function=function, method=method, token_permutation=permutation)
    tensors = inputs(2, tokens, 5)
    grad = torch.randn(2, tokens, 6, dtype=torch.float64)
    dense = run(tensors, base, grad)
    sparse = run(tensors, base._replace(backward="sparse"), grad)
    split = lambda ratio: run(tensors, base._replace(backward="split_gemm", dense_ratio=ratio), grad)  # noqa: E731
    assert close(split(0.0), sparse)
    assert close(split(1.0), dense)
    for position in (0, 2, 4):  # x and the biases
        assert torch.equal(sparse[position], dense[position])
        assert torch.equal(split(0.05)[position], dense[position])


@pytest.mark.parametrize("backward", ["dense", "split_gemm", "sparse"])
@pytest.mark.parametrize("permutation", ["batch", "sequence", "none"])
def test_a_single_token_is_a_row(backward: Any, permutation: Any) -> None:
    options = Options24(backward=backward, token_permutation=permutation, statistics=True)
    x, *others = inputs(1, 5)
    grad = torch.randn(1, 6, dtype=torch.float64)
    rows = run((x, *others), options, grad)
    alone = run((x[0].detach().requires_grad_(), *others), options, grad[0])
    assert torch.equal(alone[0], rows[0][0])
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], rows[1:], strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [8, 11])
def test_weight_gradients_by_hand(method: Any, tokens: int) -> None:
    """split_gemm written out: partition by non-zeros before 2:4, selection on top of the forward mask."""
    options = Options24(method=method, backward="split_gemm", dense_ratio=0.2)
    tensors = inputs(tokens, 5, width=12, bias=False)
    x, weight_in, _, weight_out, _ = (t if t is None else t.detach() for t in tensors)
    grad = torch.randn(tokens, 6, dtype=torch.float64)
    positive = torch.relu(x @ weight_in.T)
    dense = positive**2
    factor = mvue_factor(dense, SEED) if method == "mvue" else top2_of_4(positive).double()
    third = dense.unflatten(-1, (-1, 4)).sort(-1).values[..., 1:2].expand(-1, -1, 4).flatten(-2)
    value = ((dense - third) if method == "soft_dynamic" else dense) * factor
    grad_hidden = 2 * positive * factor * (grad @ weight_out)
    counts = (positive > 0).sum(0).tolist()
    number = math.ceil(0.2 * 12)
    chosen = set(sorted(range(12), key=lambda j: (-counts[j], j))[:number])
    order = token_permutation((tokens,), "batch", x.device)
    assert order is not None
    expected_in = sparse_feature_wise_by_hand(grad_hidden[order], chosen).T @ x[order]
    expected_out = grad[order].T @ sparse_feature_wise_by_hand(value[order], chosen)
    _, grad_in, grad_out = run(tensors, options, grad)
    assert torch.allclose(grad_in, expected_in)
    assert torch.allclose(grad_out, expected_out)


def test_two_or_fewer_in_every_group_make_all_backwards_dense() -> None:
    # h = x itself: feature-wise and token-wise at most two of four are positive.
    checker = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.float64)
    sign = torch.where(checker.repeat(3, 4) > 0, 1.0, -1.0)
    hidden = sign * (torch.rand(12, 16, dtype=torch.float64) + 0.1)
    weight_out = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(12, 6, dtype=torch.float64)
    results = []
    for backward in ("dense", "split_gemm", "sparse"):
        for method in METHODS:
            x = hidden.clone().requires_grad_()
            options = Options24(method=method, backward=backward, token_permutation="none")
            results.append(run([x, None, None, weight_out, None], options, grad))
    plain = torch.relu(hidden.requires_grad_()) ** 2 @ weight_out.T
    exact = gradients(plain, [hidden, weight_out], grad)
    assert all(close(result, exact) for result in results)


@settings(max_examples=30)
@given(batch=st.integers(1, 4), sequence=st.integers(1, 9), kind=st.sampled_from(["batch", "sequence"]))
def test_permutation_is_undone(batch: int, sequence: int, kind: Any) -> None:
    """The same result as permuting all tokens before the network and back behind it, as the paper does."""
    options = SPARSE._replace(token_permutation=kind)
    tensors = inputs(batch, sequence, 5)
    grad = torch.randn(batch, sequence, 6, dtype=torch.float64)
    order = token_permutation((batch, sequence), kind, grad.device)
    assert order is not None
    assert torch.equal(order.sort().values, torch.arange(batch * sequence))
    if kind == "sequence":
        assert torch.equal(order // sequence, torch.arange(batch).repeat_interleave(sequence))
    x, *weights = tensors
    permuted = x.flatten(0, 1)[order].detach().requires_grad_()
    expected = run([permuted, *weights], SPARSE._replace(token_permutation="none"), grad.flatten(0, 1)[order])
    back = torch.argsort(order)
    result = run(tensors, options, grad)
    assert torch.allclose(result[0].flatten(0, 1), expected[0][back])
    assert close(result[1:], expected[1:])


def test_permutation_spreads_bursts() -> None:
    """A feature that is active on runs of neighbouring tokens loses much without a permutation."""
    tokens, width = 512, 64
    active = torch.rand(tokens // 16, width).repeat_interleave(16, 0) < 0.1
    hidden = torch.where(active, torch.rand(tokens, width).double() + 0.5, -1.0)
    options = SPARSE._replace(statistics=True)
    lost = {}
    for kind in ("batch", "sequence", "none"):
        x = hidden.view(8, 64, width)
        chosen = options._replace(token_permutation=kind)
        _, statistics = activation24(x, None, None, None, None, None, None, None, chosen)
        row = dict(zip(STATISTICS, statistics.tolist(), strict=True))
        lost[kind] = row["feature_dropped_energy"] / row["feature_energy"]
    assert lost["batch"] < lost["sequence"] < lost["none"]
    assert lost["batch"] < 0.05
    assert lost["none"] > 0.15
