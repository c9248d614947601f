"""Linears in e4m3, against roundings and products made from their definitions in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from slow import slow_after
from torch import Tensor

from act24.errors import Act24Error
from act24.fp8 import linear
from act24.fp8.casts import Scaling
from act24.fp8.linear import cast_weight, linear_fp8

SCALINGS: tuple[Scaling, ...] = ("tensorwise", "rowwise")


def rounded(matrix: Tensor, by_row: bool) -> Tensor:
    """To the nearest of three bits behind the leading one, under a scale that brings the largest to 448;
    below 2^-6 to multiples of 2^-9. In float64, by rows or as a whole."""
    matrix = matrix.double()
    largest = matrix.abs().amax(1, keepdim=True) if by_row else matrix.abs().max()
    scale = largest.clamp(min=1e-30) / 448
    exponent = torch.floor(torch.log2((matrix / scale).abs().clamp(min=2.0**-6)))
    unit = 2.0 ** (exponent - 3)
    return torch.round(matrix / scale / unit) * unit * scale


def by_hand(x: Tensor, weight: Tensor, grad: Tensor, by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, dX and dW of rows: each operand rounded with the dimension that the product sums over innermost."""
    return (
        rounded(x, by_row) @ rounded(weight, by_row).T,
        rounded(grad, by_row) @ rounded(weight.T, by_row).T,
        rounded(grad.T, by_row) @ rounded(x.T, by_row).T,
    )


def close(ours: Tensor, expected: Tensor) -> bool:
    """To the rounding of a result to bfloat16, and a tie of a rounding that fell the other way."""
    return float((ours.detach().double() - expected).norm() / expected.norm()) < 4e-3


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kernels", [True, False])
def test_products_are_of_rounded_operands(scaling: Scaling, kept: bool, kernels: bool) -> None:
    """With rows and features of very different sizes; 37 tokens are no multiple of anything."""
    x = torch.randn(37, 64) * torch.logspace(-2, 2, 37)[:, None]
    weight = torch.randn(48, 64) * torch.logspace(-1, 1, 48)[:, None] * torch.logspace(-1, 1, 64)
    grad = torch.randn(37, 48) * torch.logspace(3, -3, 37)[:, None]
    leaves = (x.requires_grad_(), weight.requires_grad_())
    ready = cast_weight(weight.detach(), scaling) if kept else (None,) * 4
    y = linear_fp8(x, weight, None, *ready, scaling, kernels)
    found = (y, *torch.autograd.grad(y, leaves, grad))
    expected = by_hand(x.detach(), weight.detach(), grad, scaling == "rowwise")
    assert all(map(close, found, expected))
    other = by_hand(x.detach(), weight.detach(), grad, scaling != "rowwise")
    assert not any(map(close, found, other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_dtypes_and_biases_are_those_of_a_linear(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((2, 3, 32), (16, 32), (16,)))
    y, expected = linear_fp8(x, weight, bias), F.linear(x, weight, bias)
    grad = torch.randn_like(y)
    results = [(each, *torch.autograd.grad(each, (x, weight, bias), grad)) for each in (y, expected)]
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype is theirs.dtype
        assert (ours - theirs).norm() < 0.1 * theirs.norm()
    assert torch.equal(results[0][3], results[1][3])  # a bias is summed, and nothing of it is rounded


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_what_is_asked_for_is_differentiated(wanted: tuple[bool, bool]) -> None:
    x, weight = torch.randn(8, 32, requires_grad=wanted[0]), torch.randn(16, 32, requires_grad=wanted[1])
    linear_fp8(x, weight, None).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == wanted


def test_nan_and_infinity_spoil_their_token_and_no_other() -> None:
    x = torch.ones(4, 32)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = linear_fp8(x, torch.ones(16, 32), None)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    assert linear_fp8(x, torch.ones(16, 32), None, scaling="tensorwise").isnan().all()
    assert not linear_fp8(torch.zeros(4, 32), torch.zeros(16, 32), None).any()


@pytest.mark.parametrize("scaling", slow_after(1, SCALINGS))
def test_compiled_in_one_graph_under_autocast(scaling: Scaling) -> None:
    x, weight, bias = torch.randn(3, 8, 32), torch.randn(48, 32), torch.randn(48)
    leaves = tuple(t.requires_grad_() for t in (x, weight, bias))

    def network(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_fp8(x, weight, bias, scaling=scaling)

    grad = torch.randn(3, 8, 48).bfloat16()
    eager = network(*leaves)
    assert eager.dtype is torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(*leaves)
    results = [(y, *torch.autograd.grad(y, leaves, grad)) for y in (eager, compiled)]
    assert all(map(torch.equal, *results))
    assert all(g.dtype is torch.float32 for g in results[0][1:])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_becomes_zero_of_a_gradient_is_counted(scaling: Scaling) -> None:
    """In dX's operand over scales of tokens and in dW's over those of features, by the definition: half of
    2^-9 of a scale and less. Compiled it is the same, and so are gradients with and without."""
    x, weight = torch.randn(24, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    grad = (torch.randn(24, 48) * torch.logspace(-7, 0, 48)).bfloat16().float()
    grad[3] = 0
    lost = 0
    for dimension in (1, 0):
        largest = grad.abs().amax(dimension, keepdim=True) if scaling == "rowwise" else grad.abs().max()
        lost += int(((grad != 0) & (grad.abs() <= largest.clamp(min=1e-30) / 448 / 1024)).sum())
    counter = torch.zeros(2)

    def network(x: Tensor, weight: Tensor) -> Tensor:
        return linear_fp8(x, weight, None, scaling=scaling, counter=counter)

    torch._dynamo.reset()
    expected = torch.autograd.grad(linear_fp8(x, weight, None, scaling=scaling), (x, weight), grad)
    for times, call in enumerate((network, torch.compile(network, fullgraph=True, backend="aot_eager")), 1):
        found = torch.autograd.grad(call(x, weight), (x, weight), grad)
        assert all(map(torch.equal, found, expected))
        assert counter.tolist() == [times * 2 * 23 * 48, times * lost]
    assert lost > 100


def test_backward_keeps_a_byte_an_entry_of_the_input() -> None:
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(16, 32).bfloat16().requires_grad_()
    ready, kept = cast_weight(weight.detach(), "rowwise"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_fp8(x, weight, None, *ready)
    known = {t.data_ptr() for t in ready}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in known) == 64 * 32 + 32 * 4


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in itertools.product((16, 24), repeat=2):
        if shape != (16, 16):
            with pytest.raises(ValueError, match="multiples of 16"):
                linear_fp8(torch.randn(4, shape[1]), torch.randn(shape), None)
    monkeypatch.setattr(linear, "why_no_fp8", lambda _: "this GPU has none")
    with pytest.raises(Act24Error, match="has none"):
        linear_fp8(torch.randn(4, 16), torch.randn(16, 16), None)
