"""activation24 in e4m3, against the six products of operands that are rounded by the definition of the
format, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from slow import slow_but
from torch import Tensor

from act24.errors import Act24Error
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.feed_forward.packed_fp8 import cast_weights

T, D, FEATURES, D_OUT = 128, 64, 192, 48
FP8 = Options24(precision="fp8", token_permutation="none")


def rounded(matrix: Tensor, scale: Tensor) -> Tensor:
    """To three bits behind the leading one, below 2^-6 to multiples of 2^-9, under a scale."""
    over = matrix.double() / scale
    unit = 2.0 ** (torch.floor(torch.log2(over.abs().clamp(min=2.0**-6))) - 3)
    return torch.round(over / unit).clamp(-448 / unit, 448 / unit) * unit * scale


def by_row(matrix: Tensor) -> Tensor:
    return rounded(matrix, matrix.double().abs().amax(1, keepdim=True).clamp(min=1e-30) / 448)


def as_one(matrix: Tensor) -> Tensor:
    return rounded(matrix, matrix.double().abs().max() / 448)


def bfloat16(matrix: Tensor) -> Tensor:
    return matrix.bfloat16().double()


def two_of_four(matrix: Tensor, dim: int) -> Tensor:
    """The two largest magnitudes of four, the first ones on ties."""
    groups = matrix.movedim(dim, -1).unflatten(-1, (-1, 4))
    order = torch.sort(groups.abs(), dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups).scatter(-1, order[..., :2], 1.0)
    return (groups * kept).flatten(-2).movedim(-1, dim)


def by_hand(x: Tensor, weight_in: Tensor, weight_out: Tensor, grad: Tensor, sparse: bool) -> list[Tensor]:
    """y, dX, dW_in and dW_out under naive 2:4."""
    hidden = bfloat16(by_row(x) @ by_row(weight_in).T)
    power = lambda largest: 2.0 ** torch.ceil(torch.log2(largest.square() / 448))  # noqa: E731
    token, feature = power(hidden.abs().amax(1, keepdim=True)), power(hidden.abs().amax(0, keepdim=True))
    value = rounded(bfloat16(two_of_four(hidden.relu(), 1).square()), token)
    y = value @ as_one(weight_out).T
    grad_activation = bfloat16(by_row(grad) @ by_row(weight_out.T).T)
    grad_hidden = bfloat16(grad_activation * 2 * bfloat16(value.sqrt()))
    largest = [grad_activation.abs().amax(dim, keepdim=True) for dim in (1, 0)]
    scales = [a * 2 * (448 * s).sqrt() / 448 for a, s in zip(largest, (token, feature), strict=True)]
    grad_x = rounded(grad_hidden, scales[0]) @ as_one(weight_in)
    if sparse:
        value, grad_hidden = two_of_four(value, 0), two_of_four(grad_hidden, 0)
    grad_weight_in = rounded(grad_hidden, scales[1]).T @ as_one(x)
    return [y, grad_x, grad_weight_in, as_one(grad).T @ rounded(value, feature)]


def draw(dtype: torch.dtype = torch.bfloat16) -> tuple[tuple[Tensor, ...], Tensor]:
    """Tokens and features of different sizes."""
    x = torch.randn(2, T // 2, D) * torch.logspace(-1, 1, T).view(2, -1, 1)
    weight_in = torch.randn(FEATURES, D) / D**0.5 * torch.logspace(-0.5, 0.5, FEATURES)[:, None]
    weight_out = torch.randn(D_OUT, FEATURES) / FEATURES**0.5
    grad = (torch.randn(2, T // 2, D_OUT) * torch.logspace(1, -1, T).view(2, -1, 1)).to(dtype)
    return tuple(t.to(dtype).requires_grad_() for t in (x, weight_in, weight_out)), grad


def outcome(leaves: tuple[Tensor, ...], grad: Tensor, options: Options24) -> list[Tensor]:
    y, _ = activation24(leaves[0], leaves[1], None, leaves[2], None, options=options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def error(found: Tensor, expected: Tensor) -> float:
    found = found.detach().double().reshape(expected.shape)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("backward", ["dense", "sparse"])
def test_all_six_products_are_of_rounded_operands(backward: str) -> None:
    leaves, grad = draw()
    found = outcome(leaves, grad, FP8._replace(backward=backward))
    rows = [t.detach().flatten(0, -2) for t in (*leaves, grad)]
    expected = by_hand(*rows, sparse=backward == "sparse")
    assert max(map(error, found, expected)) < 0.01  # roundings to bfloat16, and ties that fall the other way
    plain = outcome(leaves, grad, FP8._replace(backward=backward, precision="bfloat16"))
    assert all(0.02 < error(a, b.double()) < 0.2 for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("method", ["naive", "soft_dynamic", "mvue"])
@pytest.mark.parametrize("backward", ["dense", "sparse", "split_gemm"])
def test_every_method_and_backward_is_near_its_bfloat16(backward: str, method: str) -> None:
    (x, weight_in, weight_out), grad = draw()
    bias_in, bias_out = (torch.randn(n).bfloat16().requires_grad_() for n in (FEATURES, D_OUT))
    pads = torch.zeros(2, T // 2, dtype=torch.bool)
    pads[1, 50:] = True
    leaves = (x, weight_in, bias_in, weight_out, bias_out)
    state = (torch.tensor(1.25) if method == "soft_dynamic" else None, torch.tensor(3))
    for order, padding in itertools.product(("none", "batch"), (None, pads)):
        results = []
        for precision in ("fp8", "bfloat16"):
            options = Options24("relu2", method, backward, precision=precision, token_permutation=order)
            y, _ = activation24(*leaves, *state, padding, options)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
        assert max(error(a, b.double()) for a, b in zip(*results, strict=True)) < 0.25
        if padding is not None and backward != "dense":
            assert not results[0][1][pads].any()


@pytest.mark.usefixtures("capable_machine")
@pytest.mark.parametrize("backward", ["dense", "sparse", "split_gemm"])
def test_any_shape_and_dtype_computes_what_the_packed_form_does(backward: str) -> None:
    """Filled up with zeros, which change nothing: cut off again, they are the numbers of the smaller
    network."""
    leaves, grad = draw(torch.float32)
    options = FP8._replace(backward=backward, dense_ratio=0.25, statistics=True)
    packed = outcome(tuple(t.bfloat16() for t in leaves), grad.bfloat16(), options)
    plain = outcome(leaves, grad, options._replace(kernels=False))
    assert all(g.dtype is torch.float32 for g in plain)
    assert max(error(a, b.double()) for a, b in zip(plain, packed, strict=True)) < 4e-3
    x, weight_in, weight_out = (t.detach() for t in leaves)
    small = (x[:, :13], weight_in[:44], weight_out[:20, :44])
    cut = tuple(t.clone().requires_grad_() for t in small)
    y, *grads = outcome(cut, grad[:, :13, :20], FP8)
    assert [t.shape for t in (y, *grads)] == [(2, 13, 20), *(t.shape for t in small)]
    assert error(y, outcome(cut, grad[:, :13, :20], FP8._replace(precision="bfloat16"))[0].double()) < 0.2


def test_what_is_saved() -> None:
    """A byte an entry of x and 0.625 a feature; scales are 4 bytes a row and a column."""
    (x, weight_in, weight_out), _ = draw()
    known, kept = {t.data_ptr() for t in (weight_in, weight_out)}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        activation24(x, weight_in, None, weight_out, None, options=FP8._replace(backward="sparse"))
    found = sum(t.nbytes for t in kept if t.data_ptr() not in known)
    assert found == T * D + T * FEATURES * 0.625 + 4 * (T + FEATURES + 1)


def test_nan_and_infinity_are_seen_in_their_token() -> None:
    (x, weight_in, weight_out), _ = draw()
    x = x.detach().clone()
    x[0, 3, 5], x[1, 7, 9] = float("nan"), float("inf")
    y, _ = activation24(x, weight_in, None, weight_out, None, options=FP8)
    bad = y.isnan().all(-1)
    assert bad.nonzero().tolist() == [[0, 3], [1, 7]]
    assert y[~bad].isfinite().all()


def test_compiled_in_one_graph() -> None:
    leaves, grad = draw()
    options = FP8._replace(backward="split_gemm")
    torch._dynamo.reset()
    compiled = torch.compile(activation24, fullgraph=True, backend="aot_eager")
    y, _ = compiled(leaves[0], leaves[1], None, leaves[2], None, options=options)
    found = (y, *torch.autograd.grad(y, leaves, grad))
    assert all(map(torch.equal, found, outcome(leaves, grad, options)))


def test_without_a_first_linear_y_alone_is_in_e4m3() -> None:
    hidden, weight = torch.randn(8, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    results = []
    for options in (Options24(precision="fp8"), Options24()):
        y, _ = activation24(hidden, None, None, weight, None, options=options)
        results.append((y, *torch.autograd.grad(y.sum(), (hidden, weight))))
    assert 0.005 < error(results[0][0], results[1][0].double()) < 0.05
    assert all(map(torch.equal, results[0][1:], results[1][1:]))


def test_samples_are_refused() -> None:
    x, weight_in, weight_out = torch.randn(3, 8, 16), torch.randn(32, 16), torch.randn(16, 32)
    network = lambda x: activation24(x, weight_in, None, weight_out, None, options=FP8)[0]  # noqa: E731
    with pytest.raises(Act24Error, match="vmap"):
        torch.func.vmap(network)(x)
    assert F.relu(network(x)).any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backward", slow_but(("split_gemm",), ["dense", "split_gemm"]))
def test_weights_that_were_cast_before_are_read_in_their_place(backward: str, compiled: bool) -> None:
    """In both directions, bit for bit; of other weights, all that is made of these is theirs."""
    leaves, grad = draw()
    options = FP8._replace(backward=backward)
    run = activation24
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(activation24, fullgraph=True, backend="aot_eager")

    def outcome_with(factor: float) -> list[Tensor]:
        casts = cast_weights(leaves[1].detach() * factor, leaves[2].detach() * factor)
        as_bytes = tuple(t.view(torch.uint8) if t.ndim == 2 else t for t in casts)
        y, _ = run(leaves[0], leaves[1], None, leaves[2], None, None, None, None, options, casts=as_bytes)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    expected = outcome(leaves, grad, options)
    assert all(map(torch.equal, outcome_with(1.0), expected))
    # relu² squares the first factor: y and the gradients of x and W_out are of both, that of W_in of two.
    powers = (3, 3, 2, 2)
    for found, plain, power in zip(outcome_with(2.0), expected, powers, strict=True):
        assert torch.equal(found, plain * 2**power)
    empty = (torch.empty(0, dtype=torch.uint8), torch.empty(0)) * 4
    y, _ = activation24(leaves[0], leaves[1], None, leaves[2], None, options=options, casts=empty)
    assert torch.equal(y, expected[0])
