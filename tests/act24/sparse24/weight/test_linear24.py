"""2:4 weights: masks against brute force, the linear against its definition, the parts for one's own loop."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import slow_but
from torch import Tensor, fx, nn

from act24.errors import Act24Error
from act24.fp8.linear import linear_fp8
from act24.sparse24.pattern.mvue import mvue24
from act24.sparse24.pattern.soft_threshold import soft_threshold24
from act24.sparse24.pattern.transposable import patterns, transposable_mask
from act24.sparse24.weight import linear24 as linear24_module
from act24.sparse24.weight.forms import LinearOptions24
from act24.sparse24.weight.linear24 import flip_rate, linear24, masked_decay_
from act24.sparse24.weight.methods import weight_mask, weight_scale
from act24.sparse24.weight.semi_structured import prune24, to_semi_structured


def all_patterns() -> list[list[tuple[int, ...]]]:
    """The 0/1 matrices of size 4 with two ones in every row and column, by trying all choices of rows."""
    rows = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    return [
        m
        for m in map(list, itertools.product(rows, repeat=4))
        if all(sum(c) == 2 for c in zip(*m, strict=True))
    ]


def test_there_are_ninety_patterns() -> None:
    expected = {tuple(map(tuple, m)) for m in all_patterns()}
    assert len(expected) == 90
    assert {tuple(map(tuple, p.int().tolist())) for p in patterns()} == expected


@settings(max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["float32", "float64", "bfloat16"]),
    st.integers(0, 99),
)
def test_transposable_mask_is_the_best_of_ninety(rows: int, columns: int, dtype: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4 * rows, 4 * columns, generator=generator).to(getattr(torch, dtype))
    mask = transposable_mask(weight)
    assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    assert bool((mask.T.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    table = torch.tensor(all_patterns(), dtype=torch.float64)
    for r, c in itertools.product(range(rows), range(columns)):
        block = weight[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].abs().double()
        kept = float((block * mask[4 * r : 4 * r + 4, 4 * c : 4 * c + 4]).sum())
        best = float((table * block).sum((1, 2)).max())
        assert kept == pytest.approx(best, rel=1e-6)


def test_transposable_mask_of_zeros_ties_and_transposes() -> None:
    for weight in (torch.zeros(8, 12), torch.ones(8, 12)):
        mask = transposable_mask(weight)
        assert bool((mask.view(8, 3, 4).sum(-1) == 2).all())
        assert bool((mask.view(2, 4, 12).sum(1) == 2).all())
    weight = torch.randn(16, 8)
    assert torch.equal(transposable_mask(weight).T, transposable_mask(weight.T))
    with pytest.raises(ValueError, match="multiples of 4"):
        transposable_mask(torch.ones(6, 8))


def test_transposable_keeps_less_than_row_wise_and_more_than_half() -> None:
    weight = torch.randn(256, 256)
    row_wise = float(weight.abs()[weight_mask(weight, "ste")].sum())
    both_ways = float(weight.abs()[transposable_mask(weight)].sum())
    assert 0.5 * float(weight.abs().sum()) < both_ways < row_wise


def linear_tensors(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, Any]:
    x = torch.randn(3, 7, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(12, 8, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(12, dtype=dtype, requires_grad=True) if bias else None


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_that_of_the_sparse_weight_straight_through(soft: bool, bias: bool) -> None:
    x, weight, b = linear_tensors(bias=bias)
    mask = transposable_mask(weight)
    scale = torch.tensor(1.4, dtype=torch.float64)
    y = linear24(x, weight, b, None if soft else mask, scale if soft else None)
    sparse = (scale * soft_threshold24(weight) if soft else weight * mask).detach().requires_grad_()
    expected = F.linear(x, sparse, b)
    assert torch.allclose(y, expected)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, weight, *([b] if bias else [])], grad)
    # The gradient of the sparse weight goes to all of the dense one, unmasked and not times β.
    want = torch.autograd.grad(expected, [x, sparse, *([b] if bias else [])], grad)
    assert all(torch.allclose(p, q) for p, q in zip(got, want, strict=True))


def test_the_scale_is_applied_as_it_is_logged() -> None:
    """In bfloat16, which has 1.2265625 and 1.234375 and nothing between."""
    weight, scale = torch.randn(16, 32).bfloat16(), torch.tensor(1.23)
    expected = (soft_threshold24(weight).double() * scale.double()).bfloat16()
    assert torch.equal(linear24(torch.eye(32).bfloat16(), weight, None, None, scale), expected.T)


def test_mvue_makes_the_output_gradient_sparse_along_tokens() -> None:
    x, weight, _ = linear_tensors(bias=False)
    mask, seed = weight_mask(weight, "ste"), torch.tensor(3)
    grad = torch.randn(3, 7, 12, dtype=torch.float64)
    y = linear24(x, weight, None, mask, None, seed)
    grad_x, grad_weight = torch.autograd.grad(y, [x, weight], grad)
    assert torch.allclose(grad_x, grad @ (weight * mask))
    padded = F.pad(grad.flatten(0, 1), (0, 0, 0, 3))  # 21 tokens to 24
    drawn = mvue24(padded, seed, 0)
    assert int((drawn.view(6, 4, 12) != 0).sum(1).max()) <= 2
    assert torch.allclose(grad_weight, drawn[:21].T @ x.flatten(0, 1))


def test_mvue_weight_gradient_is_unbiased() -> None:
    x, weight, _ = linear_tensors(bias=False)
    mask = weight_mask(weight, "ste")
    grad = torch.randn(3, 7, 12, dtype=torch.float64)
    draw = lambda seed: torch.autograd.grad(linear24(x, weight, None, mask, None, seed), weight, grad)[0]  # noqa: E731
    samples = torch.stack([draw(torch.tensor(s)) for s in range(2000)])
    exact = grad.flatten(0, 1).T @ x.detach().flatten(0, 1)
    z = (samples.mean(0) - exact).abs() / (samples.std(0) / math.sqrt(2000))
    assert float(z.max()) < 5.5


@pytest.mark.parametrize("soft", [False, True])
def test_a_second_derivative_is_refused(soft: bool) -> None:
    """dX depends on W, and through W₂₄ is not what straight-through makes of it."""
    x, weight, b = linear_tensors()
    state = (None, torch.tensor(1.4)) if soft else (weight_mask(weight, "ste"), None)
    y = linear24(x, weight, b, *state)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(Act24Error, match="can be differentiated once"):
        grad_x.square().sum().backward()


def test_a_single_token_is_a_row() -> None:
    x, weight, b = linear_tensors()
    mask, seed = weight_mask(weight, "ste"), torch.tensor(3)
    one = x.detach()[0, 0].clone().requires_grad_()
    row = one.detach()[None].clone().requires_grad_()
    grad = torch.randn(12, dtype=torch.float64)
    got = torch.autograd.grad(linear24(one, weight, b, mask, None, seed), [one, weight, b], grad)
    want = torch.autograd.grad(linear24(row, weight, b, mask, None, seed), [row, weight, b], grad[None])
    assert torch.equal(got[0], want[0][0])
    assert all(torch.equal(p, q) for p, q in zip(got[1:], want[1:], strict=True))


def test_decay_of_gradients_survives_bfloat16() -> None:
    """As a part of the weight's step, -lr · λ · W, it is below half a unit in the last place, and nothing."""
    weight = (0.02 * torch.randn(512, 512)).bfloat16()
    mask, gradient = weight_mask(weight, "sr_ste"), (1e-5 * torch.randn(512, 512)).bfloat16()
    decay = 2e-4
    wanted = decay * weight.float()[~mask]

    def effect(after: Tensor, before: Tensor) -> float:
        moved = (after.float() - before.float())[~mask]
        return float((moved * wanted).sum() / wanted.square().sum())

    of_gradient = effect(masked_decay_(gradient.clone(), weight, mask, decay), gradient)
    assert of_gradient == pytest.approx(1, abs=0.02)
    lr = 1e-3
    assert abs(effect(masked_decay_(weight.clone(), weight, mask, -lr * decay), weight) / lr) < 0.01


def test_linear_says_what_it_lacks() -> None:
    x, weight, _ = linear_tensors()
    with pytest.raises(ValueError, match="mask, or a scale"):
        linear24(x, weight, None, None)
    with pytest.raises(ValueError, match="multiple of 4"):
        linear24(x[..., :6], weight[:, :6], None, torch.ones(12, 6, dtype=torch.bool))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))
        self.register_buffer("mask", weight_mask(self.weight, "ste"))

    def forward(self, x: Tensor) -> Tensor:
        return linear24(x, self.weight, None, self.mask)  # type: ignore[arg-type]


def test_stays_one_node_when_traced_twice() -> None:
    module = Masked()
    x = torch.randn(5, 8)
    expected = torch.autograd.grad(module(x).sum(), module.weight)[0]
    for traced in (once := fx.symbolic_trace(module), fx.symbolic_trace(once)):
        assert [n.target for n in traced.graph.nodes].count(linear24) == 1
        got = torch.autograd.grad(traced(x).sum(), traced.get_parameter("weight"))[0]
        assert torch.equal(got, expected)


def test_under_autocast() -> None:
    x, weight, b = linear_tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear24(x, weight, b, weight_mask(weight, "ste"), None, torch.tensor(0))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_scale_is_the_least_squares_one() -> None:
    weight = torch.randn(64, 64, dtype=torch.float64)
    soft = soft_threshold24(weight)
    solution = torch.linalg.lstsq(soft.reshape(-1, 1), weight.reshape(-1, 1)).solution
    assert float(weight_scale(weight)) == pytest.approx(float(solution), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_decay_touches_dropped_weights_only(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 8, dtype=dtype)
    mask = weight_mask(weight, "ste")
    gradient = torch.randn(8, 8)
    expected = gradient + 0.03 * weight.float() * (~mask)
    result = masked_decay_(gradient, weight, mask, 0.03)
    assert result is gradient
    assert torch.allclose(gradient, expected)


def test_flip_rate_counts_changed_entries() -> None:
    before = torch.tensor([True, True, False, False])
    after = torch.tensor([True, False, True, False])
    assert float(flip_rate(before, after)) == 0.5
    assert float(flip_rate(before, before)) == 0.0


def test_pruning_by_magnitude_by_mask_and_by_draw() -> None:
    x = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    assert prune24(x).tolist() == [[4.0, -3.0, 0.0, 0.0]]
    mask = torch.tensor([[False, False, True, True]])
    assert prune24(x, mask).tolist() == [[0.0, 0.0, 2.0, 1.0]]
    assert torch.equal(prune24(x, seed=3), mvue24(x, 3))
    with pytest.raises(ValueError, match="one of the two"):
        prune24(x, mask, 3)
    with pytest.raises(ValueError, match="more than two"):
        prune24(x, torch.ones(1, 4, dtype=torch.bool))


def test_semi_structured_needs_a_gpu() -> None:
    with pytest.raises(Act24Error, match="CUDA"):
        to_semi_structured(torch.randn(64, 64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="packs on CUDA only")
def test_semi_structured_multiplies_like_the_dense_form() -> None:
    x = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16)
    other = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16)
    packed = to_semi_structured(x, transposable_mask(x))
    expected = prune24(x, transposable_mask(x)) @ other
    torch.testing.assert_close(packed @ other, expected, rtol=2e-2, atol=1e-1)


FP8 = LinearOptions24(precision="fp8")


def fp8_network(soft: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    x, weight, bias = torch.randn(3, 10, 32), torch.randn(48, 32), torch.randn(48)
    mask = None if soft else weight_mask(weight, "ste")
    scale = weight_scale(weight) if soft else None
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), mask, scale


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("draws", [False, True])
def test_in_fp8_it_is_the_linear_in_e4m3_of_the_sparse_weight(soft: bool, draws: bool) -> None:
    """Straight through to the dense one; a drawn gradient stays as it is without fp8."""
    x, weight, bias, mask, scale = fp8_network(soft)
    seed = torch.tensor(7) if draws else None
    dense = soft_threshold24(weight.detach()) * scale if soft else weight.detach() * mask
    sparse = dense.requires_grad_()
    y, expected = linear24(x, weight, bias, mask, scale, seed, options=FP8), linear_fp8(x, sparse, bias)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weight, bias), grad)
    theirs = list(torch.autograd.grad(expected, (x, sparse, bias), grad))
    if draws:
        drawn = mvue24(F.pad(grad.flatten(0, 1), (0, 0, 0, 2)), seed, 0)[:30]
        theirs[1] = drawn.T @ x.detach().flatten(0, 1)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    exact = linear24(x, weight, bias, mask, scale, seed)
    assert not torch.equal(y, exact)
    assert float((y - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("draws", slow_but((True,), [False, True]))
def test_fp8_compiles_in_one_graph(draws: bool) -> None:
    x, weight, bias, mask, scale = fp8_network(False)
    seed = torch.tensor(7) if draws else None
    torch._dynamo.reset()
    compiled = torch.compile(linear24, fullgraph=True, backend="aot_eager")
    results = []
    for run in (linear24, compiled):
        y = run(x, weight, bias, mask, scale, seed, options=FP8)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_fp8_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 20), torch.randn(16, 20)
    mask = weight_mask(weight, "ste")
    with pytest.raises(ValueError, match=r"multiples of 16, got \(16, 20\)"):
        linear24(x, weight, None, mask, options=FP8)
    monkeypatch.setattr(linear24_module, "why_no_fp8", lambda _: "this GPU has none")
    with pytest.raises(Act24Error, match="this GPU has none"):
        linear24(x, weight, None, mask, options=FP8)
    monkeypatch.undo()
    wide = torch.randn(16, 32)
    one = lambda row: linear24(row, wide, None, weight_mask(wide, "ste"), options=FP8)  # noqa: E731
    with pytest.raises(Act24Error, match=r"its fp8 has no rule for torch\.func\.vmap"):
        torch.func.vmap(one)(torch.randn(2, 32))
