"""The 2:4 activation against autograd of the masked function in float64; estimators, padding, tracing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import FUNCTIONS, METHODS, SEED, SPARSE, SPLIT, close, gradients, inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import PLAIN, Options24
from act24.sparse24.pattern.mvue import mvue_factor


def masked_reference(
    x: Tensor, wi: Any, bi: Any, wo: Any, bo: Any, scale: Tensor | None, options: Options24
) -> Tensor:
    """The function that runs, with selection, threshold and probabilities as constants, for autograd."""
    hidden = x if wi is None else F.linear(x, wi, bi)
    dense = torch.relu(hidden) if options.function == "relu" else torch.relu(hidden) ** 2
    fixed = dense.detach()
    groups = fixed.unflatten(-1, (-1, 4))
    if options.method == "mvue":
        sparse = dense * mvue_factor(fixed, SEED)
    else:
        # By rank with the lower index first, not by the tournament of the implementation.
        order = torch.argsort(groups, dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(groups).scatter(-1, order[..., :2], 1.0).flatten(-2)
        third = groups.gather(-1, order[..., 2:3]).expand_as(groups).flatten(-2)
        sparse = (dense - third if options.method == "soft_dynamic" else dense) * mask
    scaled = sparse if scale is None else scale * sparse
    if wo is not None:
        scaled = F.linear(scaled, wo)
    return scaled if bo is None else scaled + bo


@settings(max_examples=60)
@given(
    tokens=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.sampled_from([4, 8, 20]),
    bias=st.booleans(),
    scaled=st.booleans(),
    present=st.sampled_from([(True, True), (False, True), (True, False), (False, False)]),
    method=st.sampled_from(METHODS),
    function=st.sampled_from(FUNCTIONS),
)
def test_dense_backward_is_autograd_of_the_masked_forward(
    tokens: list[int],
    width: int,
    bias: bool,
    scaled: bool,
    present: tuple[bool, bool],
    method: Any,
    function: Any,
) -> None:
    options = Options24(function=function, method=method)
    tensors = inputs(*tokens, width if not present[0] else 7, width=width, bias=bias)
    if not present[0]:
        tensors[1:3] = [None, None]
    if not present[1]:
        tensors[3:5] = [None, None]
    scale = torch.tensor(1.3, dtype=torch.float64) if scaled else None
    y, _ = activation24(*tensors, scale, SEED, None, options)
    expected = masked_reference(*tensors, scale, options)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    assert close(gradients(y, tensors, grad), gradients(expected, tensors, grad))


def test_dropped_positions_get_no_gradient_and_kept_ones_the_whole() -> None:
    hidden = torch.tensor([[4.0, 3.0, 2.0, 1.0, -1.0, 5.0, -2.0, -3.0]], requires_grad=True)
    y, _ = activation24(hidden, None, None, None, None)
    assert y.tolist() == [[16.0, 9.0, 0.0, 0.0, 0.0, 25.0, 0.0, 0.0]]
    (grad,) = torch.autograd.grad(y.sum(), hidden)
    assert grad.tolist() == [[8.0, 6.0, 0.0, 0.0, 0.0, 10.0, 0.0, 0.0]]


@pytest.mark.parametrize("method", METHODS)
def test_straight_through_ignores_what_was_dropped(method: Any) -> None:
    options = Options24(method=method, estimator="ste")
    scale = torch.tensor(1.2, dtype=torch.float64)
    x, wi, bi, wo, _ = tensors = inputs(7, 5)
    y, _ = activation24(*tensors, scale, SEED, None, options)
    grad = torch.randn_like(y)
    hidden = F.linear(x, wi, bi).detach().requires_grad_()
    grad_hidden = 2 * torch.relu(hidden) * (scale * grad @ wo)
    got = gradients(y, tensors, grad)
    assert torch.allclose(got[0], grad_hidden @ wi)
    assert torch.allclose(got[1], grad_hidden.T @ x)
    # What the forward multiplied, not the dense activation, is what weight_out's gradient has.
    sparse, _ = activation24(hidden, None, None, None, None, None, SEED, None, options)
    assert torch.allclose(got[3], scale * grad.T @ sparse)


@pytest.mark.parametrize("backward", ["split_gemm", "sparse"])
def test_straight_through_has_no_sparse_backward(backward: Any) -> None:
    with pytest.raises(ValueError, match="not 2:4"):
        activation24(*inputs(4, 5), options=Options24(estimator="ste", backward=backward))


def test_mvue_needs_a_seed_and_width_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="seed"):
        activation24(*inputs(4, 5), options=Options24(method="mvue"))
    with pytest.raises(ValueError, match="multiple of 4"):
        activation24(*inputs(4, 5, width=10))


@pytest.mark.parametrize("options", [SPLIT, SPARSE, PLAIN])
def test_padding_changes_nothing(options: Options24) -> None:
    """Rows of padding, whatever is in them, leave weight gradients and statistics as if cut out."""
    options = options._replace(statistics=True, token_permutation="none")
    tensors = inputs(6, 5)
    pads = torch.tensor([False] * 6 + [True] * 5)
    grad = torch.randn(6, 6, dtype=torch.float64)
    longer = torch.cat((tensors[0].detach(), 50 * torch.randn(5, 5, dtype=torch.float64))).requires_grad_()
    padded = [longer, *tensors[1:]]
    zeros = torch.cat((grad, torch.zeros(5, 6, dtype=torch.float64)))  # causal rows: no gradient at padding
    y, counted = activation24(*padded, None, None, pads, options)
    expected_y, expected_counted = activation24(*tensors, None, None, None, options)
    assert torch.allclose(counted, expected_counted)
    assert close(gradients(y, padded[1:], zeros), gradients(expected_y, tensors[1:], grad))


@pytest.mark.parametrize("backward", ["dense", "split_gemm", "sparse"])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_ties_and_bfloat16(backward: Any, method: Any) -> None:
    options = Options24(method=method, backward=backward, statistics=True)
    tensors = inputs(3, 7, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        tensors[0][0] = 0  # all-zero rows
        tensors[2].zero_()
        tensors[1][4:8] = tensors[1][4]  # four equal features: ties everywhere
    y, statistics = activation24(*tensors, torch.tensor(1.1), SEED, None, options)
    grads = gradients(y, tensors, torch.randn_like(y))
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.bfloat16 and bool(g.isfinite().all()) for g in grads)
    assert bool(statistics.isfinite().all())
    hidden = F.linear(tensors[0], tensors[1], tensors[2]).detach()
    sparse, _ = activation24(hidden, None, None, None, None, None, SEED, None, options)
    assert int((sparse.view(3, 7, -1, 4) != 0).sum(-1).max()) <= 2


def test_gradient_of_hidden_is_two_of_four_along_features() -> None:
    for method in METHODS:
        hidden = torch.randn(9, 32, dtype=torch.float64, requires_grad=True)
        weight_out = torch.randn(6, 32, dtype=torch.float64)
        y, _ = activation24(hidden, None, None, weight_out, None, None, SEED, None, Options24(method=method))
        (grad,) = torch.autograd.grad(y, hidden, torch.randn_like(y))
        assert int((grad.view(9, 8, 4) != 0).sum(-1).max()) <= 2


def test_mvue_gradients_are_unbiased() -> None:
    """The mean over seeds of weight_out's gradient is the dense network's."""
    tensors = inputs(4, 5, bias=False)
    grad = torch.randn(4, 6, dtype=torch.float64)
    options = Options24(method="mvue")
    samples = [run(tensors, options, grad, seed=torch.tensor(s))[2] for s in range(2000)]
    plain = torch.relu(tensors[0] @ tensors[1].T) ** 2 @ tensors[3].T
    exact = gradients(plain, [tensors[3]], grad)[0]
    stacked = torch.stack(samples)
    error = (stacked.mean(0) - exact).abs() / (stacked.std(0) / math.sqrt(2000) + 1e-12)
    assert float(error.max()) < 5.5


def test_only_what_is_needed_is_computed() -> None:
    x, wi, bi, wo, bo = inputs(4, 5)
    y, _ = activation24(x.detach(), wi.detach(), bi.detach(), wo, bo.detach(), options=SPLIT)
    (only,) = torch.autograd.grad(y.sum(), [wo])
    assert only.shape == wo.shape


def test_saves_one_wide_tensor() -> None:
    tensors = inputs(64, 8, width=256)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        activation24(*tensors, torch.tensor(1.0), SEED, None, SPLIT)
    wide = [t for t in saved if t.shape == (64, 256)]
    assert len(wide) == 1
    assert sum(t.numel() for t in saved) <= 64 * 256 + sum(t.numel() for t in tensors) + 2


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(16, 5))
        self.down = torch.nn.Parameter(torch.randn(6, 16))

    def forward(self, x: Tensor) -> Tensor:
        return activation24(x, self.up, None, self.down, None, None, None, None, SPLIT)[0]


def test_stays_one_node_when_traced_twice() -> None:
    network = Network()
    once = fx.symbolic_trace(network)
    twice = fx.symbolic_trace(once)
    x = torch.randn(3, 7, 5, requires_grad=True)
    expected = torch.autograd.grad(network(x).square().sum(), [x, *network.parameters()])
    for traced in (once, twice):
        assert [n.target for n in traced.graph.nodes].count(activation24) == 1
        got = torch.autograd.grad(traced(x).square().sum(), [x, *traced.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "backward"), [("naive", "split_gemm"), ("soft_dynamic", "dense"), ("mvue", "sparse")]
)
def test_compiled_equals_eager(method: Any, backward: Any) -> None:
    torch.compiler.reset()
    options = Options24(method=method, backward=backward, statistics=True)
    scale = torch.tensor(1.1)

    def network(x: Tensor, wi: Tensor, bi: Tensor, wo: Tensor, bo: Tensor) -> tuple[Tensor, Tensor]:
        return activation24(x, wi, bi, wo, bo, scale, SEED, None, options)

    tensors = inputs(3, 9, 8, dtype=torch.float32)
    grad = torch.randn(3, 9, 6)
    y, counted = network(*tensors)
    compiled_y, compiled_counted = torch.compile(network, fullgraph=True)(*tensors)
    torch.testing.assert_close(compiled_y, y)
    torch.testing.assert_close(compiled_counted, counted)
    for a, b in zip(gradients(compiled_y, tensors, grad), gradients(y, tensors, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_under_autocast_everything_is_bfloat16_and_gradients_come_back_as_float32() -> None:
    tensors = inputs(3, 9, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = activation24(*tensors, torch.tensor(1.5), None, None, SPLIT)
    assert y.dtype == torch.bfloat16
    exact, _ = activation24(*tensors, torch.tensor(1.5), None, None, SPLIT)
    assert float((y - exact).detach().norm() / exact.detach().norm()) < 0.03
    assert all(g.dtype == torch.float32 for g in gradients(y, tensors, torch.ones_like(y)))
