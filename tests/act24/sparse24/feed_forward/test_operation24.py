"""activation24 as an operation: derivatives by finite differences, odd shapes, torch.func, devices, memory.

Its numbers are tested in test_sparse24_activation24.py (methods, estimators), test_sparse24_feature_wise.py
(sparse backwards) and test_sparse24_statistics.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from slow import slow_after
from torch import Tensor
from torch.func import grad, vmap

from act24.errors import Act24Error
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.pattern.selection import top2_of_4

D, WIDE, OUT = 6, 16, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64; ties have probability zero."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(linear_in: bool, linear_out: bool, bias: bool, *batch: int) -> tuple[Tensor | None, ...]:
    """x, weight_in, bias_in, weight_out, bias_out; absent linears None."""
    x = normal(*batch, D if linear_in else WIDE, seed=1)
    weight_in = normal(WIDE, D, seed=2) if linear_in else None
    weight_out = normal(OUT, WIDE, seed=4) if linear_out else None
    bias_in = normal(WIDE, seed=3) if linear_in and bias else None
    bias_out = normal(OUT, seed=5) if linear_out and bias else None
    return x, weight_in, bias_in, weight_out, bias_out


def written_out(
    x: Tensor,
    weight_in: Tensor | None,
    bias_in: Tensor | None,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
) -> Tensor:
    """The function by its definition, the mask from a sort."""
    h = x if weight_in is None else F.linear(x, weight_in, bias_in)
    groups = h.relu().square().unflatten(-1, (-1, 4))
    ranks = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    sparse = (groups * (ranks < 2)).flatten(-2)
    return sparse if weight_out is None else F.linear(sparse, weight_out, bias_out)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("linear_out", [False, True])
@pytest.mark.parametrize("linear_in", [False, True])
def test_derivatives_by_finite_differences(linear_in: bool, linear_out: bool, bias: bool) -> None:
    given = arguments(linear_in, linear_out, bias, 2, 3)
    here = [i for i, a in enumerate(given) if a is not None]

    def call(*tensors: Tensor) -> Tensor:
        full: list[Any] = [None] * 5
        for i, tensor in zip(here, tensors, strict=True):
            full[i] = tensor
        return activation24(*full)[0]

    torch.testing.assert_close(activation24(*given)[0], written_out(*given))
    assert torch.autograd.gradcheck(call, [given[i].requires_grad_() for i in here])


@given(batch=st.lists(st.integers(0, 3), max_size=3), linear_in=st.booleans(), linear_out=st.booleans())
def test_any_leading_dimensions(batch: list[int], linear_in: bool, linear_out: bool) -> None:
    """None at all, empty ones, many: as a linear takes them."""
    leaves = arguments(linear_in, linear_out, True, *batch)
    given = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    actual, expected = activation24(*leaves)[0], written_out(*leaves)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), given), torch.autograd.grad(expected.square().sum(), given)
    )


def test_operands_that_are_not_contiguous() -> None:
    leaves = [a.requires_grad_() for a in arguments(True, True, True, 4, 3)]
    x, weight_in, bias_in, weight_out, bias_out = leaves

    def views(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return x.transpose(0, 1), w[::2].repeat_interleave(2, 0), v.T.contiguous().T

    x_view, w_view, v_view = views(x, weight_in, weight_out)
    assert not x_view.is_contiguous()
    actual = activation24(x_view, w_view, bias_in, v_view, bias_out)[0]
    expected = written_out(x_view, w_view, bias_in, v_view, bias_out)
    # And a gradient that is not contiguous either.
    weight = normal(*actual.shape).transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )


@pytest.mark.parametrize("width", [6, 18])
def test_a_width_that_is_no_multiple_of_four(width: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        activation24(normal(2, width), None, None, None, None)
    with pytest.raises(ValueError, match="multiple of 4"):
        activation24(normal(2, 8), normal(width, 8), None, normal(8, width), None)


def test_on_meta() -> None:
    leaves = [a.to("meta").requires_grad_() for a in arguments(True, True, True, 4)]
    y, statistics = activation24(*leaves)
    assert y.is_meta
    assert statistics.is_meta
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_each_sample(compiled: bool) -> None:
    """torch.func: vmap(grad), as for gradient noise or influence, against one sample at a time."""
    x, weight_in, bias_in, weight_out, bias_out = arguments(True, True, True, 7, 3)

    def loss(weights: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return activation24(x, weights[0], bias_in, weights[1], bias_out)[0].square().sum()

    weights = (weight_in, weight_out)
    per_sample = vmap(grad(loss), (None, 0))
    actual = (torch.compile(per_sample, backend="aot_eager", fullgraph=True) if compiled else per_sample)(
        weights, x
    )
    for i, sample in enumerate(x):
        torch.testing.assert_close(tuple(g[i] for g in actual), grad(loss)(weights, sample))
        leaves = [w.detach().requires_grad_() for w in weights]
        expected = written_out(sample, leaves[0], bias_in, leaves[1], bias_out).square().sum()
        torch.testing.assert_close(grad(loss)(weights, sample), torch.autograd.grad(expected, leaves))


def test_second_derivatives_are_refused() -> None:
    """relu(h) is saved as a constant; going through it twice would be wrong without a word."""
    leaves = [a.requires_grad_() for a in arguments(True, True, False, 4) if a is not None]
    x, weight_in, weight_out = leaves
    y = activation24(x, weight_in, None, weight_out, None)[0]
    (first,) = torch.autograd.grad(y.square().sum(), weight_in, create_graph=True)
    with pytest.raises(Act24Error, match="can be differentiated once"):
        torch.autograd.grad(first.square().sum(), weight_in)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", slow_after(1, [torch.float32, torch.float64]))
def test_dtypes_under_autocast_are_those_of_two_linears(dtype: torch.dtype, compiled: bool) -> None:
    leaves = [a.to(dtype).requires_grad_() for a in arguments(True, True, True, 4)]

    def sparse(*leaves: Tensor) -> Tensor:
        return activation24(*leaves)[0]

    function = torch.compile(sparse, backend="aot_eager", fullgraph=True) if compiled else sparse
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*leaves)
        linear = F.linear(F.linear(leaves[0], leaves[1], leaves[2]), leaves[3], leaves[4])
    assert y.dtype == linear.dtype
    y.sum().backward()
    assert {leaf.grad.dtype for leaf in leaves} == {dtype}
    torch.testing.assert_close(y.to(dtype), written_out(*leaves), rtol=0.05, atol=0.5)


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes of distinct storages that autograd keeps."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(storages.values())


def test_saves_half_of_what_the_dense_network_does() -> None:
    """Dense: x, two weights, relu(h) and relu(h)². 2:4: x, two weights and relu(h)."""
    tokens = 64
    x, w, v = (a.requires_grad_() for a in (normal(tokens, D), normal(WIDE, D), normal(OUT, WIDE)))
    shared = 8 * (x.numel() + w.numel() + v.numel())
    wide = 8 * tokens * WIDE
    assert saved_bytes(lambda: F.linear(F.relu(F.linear(x, w)).square(), v)) == shared + 2 * wide
    for backward in ("dense", "split_gemm", "sparse"):
        options = Options24(backward=backward)  # type: ignore[arg-type]
        assert saved_bytes(lambda o=options: activation24(x, w, None, v, None, options=o)) == shared + wide
    h = normal(tokens, WIDE).requires_grad_()
    assert saved_bytes(lambda: activation24(h, None, None, None, None)) == wide


def test_frozen_operands_get_no_gradient() -> None:
    for wanted in range(5):
        leaves = list(arguments(True, True, True, 4))
        leaves[wanted] = leaves[wanted].requires_grad_()
        y = activation24(*leaves)[0]
        (actual,) = torch.autograd.grad(y.square().sum(), leaves[wanted])
        (expected,) = torch.autograd.grad(written_out(*leaves).square().sum(), leaves[wanted])
        torch.testing.assert_close(actual, expected)
    assert not activation24(*arguments(True, True, True, 4))[0].requires_grad


def test_statistics_carry_no_gradient() -> None:
    x = normal(4, WIDE).requires_grad_()
    y, statistics = activation24(x, None, None, None, None, options=Options24(statistics=True))
    assert y.requires_grad
    assert not statistics.requires_grad


def test_all_negative_and_all_equal() -> None:
    """Every group has fewer than two distinct values: two positions are named all the same, the first two."""
    h = torch.tensor([[-1.0] * 4, [0.0] * 4, [3.0] * 4]).flatten()[None].requires_grad_()
    y = activation24(h, None, None, None, None)[0]
    assert y.tolist() == [[0.0] * 8 + [9.0, 9.0, 0.0, 0.0]]
    y.sum().backward()
    assert h.grad.tolist() == [[0.0] * 8 + [6.0, 6.0, 0.0, 0.0]]
    assert top2_of_4(h).sum() == 6


@pytest.mark.parametrize("scale", [1.06, 1.4430001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scale_applied_is_the_scale_logged(dtype: torch.dtype, scale: float) -> None:
    """1.06 is 1.0625 in bfloat16: what multiplies is the float32 value, rounded with the product only."""
    hidden = torch.randn(64, 32).to(dtype).requires_grad_()
    options, beta = Options24(method="soft_dynamic"), torch.tensor(scale)
    plain, _ = activation24(hidden, None, None, None, None, options=options)
    scaled, _ = activation24(hidden, None, None, None, None, beta, options=options)
    assert torch.equal(scaled, (plain.double() * beta.double()).to(dtype))
    grad = torch.randn(64, 32).to(dtype)
    (ours,) = torch.autograd.grad(scaled, hidden, grad)
    (expected,) = torch.autograd.grad(plain, hidden, (grad.double() * beta.double()).to(dtype))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("backward", ["dense", "sparse", "split_gemm"])
def test_a_gradient_at_padding(backward: str) -> None:
    """A backward that selects along the tokens drops it, as if it had been zero; the dense one takes it."""
    x, weight_in, weight_out = torch.randn(2, 8, 16), torch.randn(32, 16), torch.randn(12, 32)
    bias_in, bias_out = torch.randn(32), torch.randn(12)
    leaves = [t.double().requires_grad_() for t in (x, weight_in, bias_in, weight_out, bias_out)]
    pads = torch.zeros(2, 8, dtype=torch.bool)
    pads[1, 3:] = True
    grad = torch.randn(2, 8, 12).double()
    zeroed = torch.where(pads[..., None], 0, grad)
    y, _ = activation24(*leaves, None, None, pads, Options24(backward=backward))
    full, without = (torch.autograd.grad(y, leaves, g, retain_graph=True) for g in (grad, zeroed))
    same = [torch.equal(a, b) for a, b in zip(full, without, strict=True)]
    assert same == [backward != "dense"] * 5
    assert bool(full[0][pads].any()) is (backward == "dense")
