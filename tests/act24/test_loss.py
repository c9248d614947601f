"""The chunked loss against F.cross_entropy on whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import slow_but
from torch.nn import functional as F

from act24.errors import Act24Error
from act24.fp8.linear import cast_weight, linear_fp8
from act24.loss import cross_entropy_sum


def problem(batch: int, sequence: int, width: int, vocabulary: int, ignored: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, sequence, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocabulary, (batch, sequence), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 9),
    width=st.integers(1, 7),
    vocabulary=st.integers(1, 13),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    chunk_tokens=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_loss_count_and_gradients_equal_torch(
    batch, sequence, width, vocabulary, ignored, chunk_tokens, seed
) -> None:
    hidden, weight, labels = problem(batch, sequence, width, vocabulary, ignored, seed)
    expected = reference(hidden, weight, labels)
    loss, count = cross_entropy_sum(hidden, weight, labels, chunk_tokens)
    assert (loss.shape, loss.dtype, count.dtype) == ((), torch.float64, torch.int64)
    assert count.item() == (labels != -100).sum()
    torch.testing.assert_close(loss, expected)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(hidden, weight, labels, chunk_tokens)[0], expected)
    torch.testing.assert_close(
        torch.autograd.grad(3.0 * loss, (hidden, weight)),
        torch.autograd.grad(3.0 * expected, (hidden, weight)),
    )


def test_gradcheck() -> None:
    hidden, weight, labels = problem(2, 5, 4, 6, ignored=0.3)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy_sum(h, w, labels, 3)[0], (hidden, weight))


def test_second_derivative_is_refused_not_wrong() -> None:
    hidden, weight, labels = problem(2, 5, 4, 6, ignored=0.3)
    squared = cross_entropy_sum(hidden, weight, labels, 3)[0].square()
    (gradient,) = torch.autograd.grad(squared, hidden, create_graph=True)
    with pytest.raises(Act24Error, match="can be differentiated once"):
        gradient.sum().backward()


def test_only_what_requires_a_gradient_gets_one() -> None:
    hidden, weight, labels = problem(2, 5, 4, 6, ignored=0.0)
    loss, _ = cross_entropy_sum(hidden.detach(), weight, labels, 4)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(reference(hidden, weight, labels), weight)[0])
    assert not cross_entropy_sum(hidden.detach(), weight.detach(), labels, 4)[0].requires_grad


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("mode", ["autocast", "bfloat16 parameters"])
def test_bfloat16_is_as_close_as_whole_logits_in_bfloat16(mode: str) -> None:
    hidden, weight, labels = problem(2, 150, 32, 257, ignored=0.1)
    expected_loss = reference(hidden, weight, labels)
    expected = torch.autograd.grad(expected_loss, (hidden, weight))
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        loss, _ = cross_entropy_sum(*inputs, labels, 64)
        logits = F.linear(*inputs).float()
        whole = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    assert relative(loss, expected_loss) < 1e-3
    gradients, baseline = torch.autograd.grad(loss, inputs), torch.autograd.grad(whole, inputs)
    for value, plain, exact in zip(gradients, baseline, expected, strict=True):
        assert value.dtype == dtype
        assert relative(value, exact) < 1.2 * relative(plain, exact) + 1e-4


def test_well_predicted_tokens_keep_their_gradient_in_bfloat16() -> None:
    # p = 1 - 4.5e-5, where bfloat16 knows no number between 1 - 2^-8 and 1.
    hidden = torch.tensor([[[10.0]]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss, _ = cross_entropy_sum(hidden, weight, torch.tensor([[0]]))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.item() == pytest.approx(-1 / (1 + torch.tensor(10.0).exp().item()), rel=0.01)


def test_compiles_into_one_graph() -> None:
    hidden, weight, labels = problem(2, 5, 4, 6, ignored=0.3)
    compiled = torch.compile(cross_entropy_sum, fullgraph=True, backend="aot_eager")
    loss, count = compiled(hidden, weight, labels, 4)
    plain, plain_count = cross_entropy_sum(hidden, weight, labels, 4)
    assert torch.equal(count, plain_count)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight))
    )


def test_is_one_node_in_a_traced_graph() -> None:
    hidden, weight, labels = problem(2, 5, 4, 6, ignored=0.3)
    traced = torch.fx.symbolic_trace(lambda h, w, t: cross_entropy_sum(h, w, t, 4)[0])
    assert next(n.target for n in traced.graph.nodes if n.op == "call_function") is cross_entropy_sum
    torch.testing.assert_close(
        torch.autograd.grad(traced(hidden, weight, labels), (hidden, weight)),
        torch.autograd.grad(reference(hidden, weight, labels), (hidden, weight)),
    )


def rounded(matrix: torch.Tensor, by_row: bool) -> torch.Tensor:
    """To e4m3 under a scale that brings the largest to 448, by rows or as a whole: three bits behind the
    leading one, below 2^-6 multiples of 2^-9. In float64."""
    matrix = matrix.double()
    largest = matrix.abs().amax(1, keepdim=True) if by_row else matrix.abs().max()
    scale = largest.clamp(min=1e-30) / 448
    unit = 2.0 ** (torch.floor(torch.log2((matrix / scale).abs().clamp(min=2.0**-6))) - 3)
    return torch.round(matrix / scale / unit) * unit * scale


def in_e4m3(hidden, weight, labels, by_row: bool, chunk_tokens: int):
    """Loss and gradients with the operands of the logits and of dW rounded, chunk by chunk, from the formula:
    the gradient of the logits is softmax - onehot at positions with a target, in dW over a scale for each
    word."""
    weight, keep, labels = weight.double(), (labels != -100).flatten(), labels.flatten()
    head = rounded(weight, by_row)
    loss, grads, grad_weight = 0.0, [], torch.zeros_like(weight)
    for rows, kept, target in zip(
        *(t.split(chunk_tokens) for t in (hidden.double().flatten(0, 1), keep, labels)), strict=True
    ):
        rows = rows * kept[:, None]
        logits = (rounded(rows, by_row) @ head.T).bfloat16().double()
        loss = loss + F.cross_entropy(logits, target, reduction="sum")
        grad = torch.softmax(logits, 1)
        grad[kept, target[kept]] -= 1
        grads.append((grad @ weight) * kept[:, None])
        grad_weight += rounded(grad.T, True) @ rounded(rows.T, by_row).T
    return loss, torch.cat(grads).view_as(hidden), grad_weight


def e4m3_problem(tokens: int = 37):
    """Tokens and words of very different sizes, some without a target; 37 are no multiple of anything."""
    hidden, weight, labels = problem(1, tokens, 32, 48, ignored=0.3)
    sizes = torch.logspace(-1, 0.5, tokens, dtype=torch.float64)[None, :, None]
    hidden, weight = hidden.detach() * sizes, weight.detach() * torch.logspace(-0.7, 0.3, 48)[:, None]
    return hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), labels


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_the_head_in_e4m3_is_of_rounded_operands(scaling, kept: bool, kernels: bool) -> None:
    hidden, weight, labels = e4m3_problem()
    ready = cast_weight(weight.detach(), scaling) if kept else (None,) * 4
    ready = [None if part is None else part.view(torch.uint8) if part.ndim == 2 else part for part in ready]
    loss, count = cross_entropy_sum(hidden, weight, labels, 16, *ready, scaling, kernels)
    assert loss.dtype is torch.float32
    assert count.item() == (labels != -100).sum()
    found = torch.autograd.grad(loss, (hidden, weight))
    by_row = scaling == "rowwise"
    expected = in_e4m3(hidden.detach(), weight.detach(), labels, by_row, 16)
    other = in_e4m3(hidden.detach(), weight.detach(), labels, not by_row, 16)
    assert relative(loss.detach(), expected[0]) < 1e-5 < relative(loss.detach(), other[0])
    for value, exact in zip(found, expected[1:], strict=True):
        assert value.dtype is torch.bfloat16
        assert relative(value, exact) < 6e-3
    assert relative(found[1], other[2]) > 6e-3
    with torch.no_grad():
        alone, _ = cross_entropy_sum(hidden, weight, labels, 16, *ready, scaling, kernels)
    assert torch.equal(alone, loss)


def test_the_head_in_e4m3_stays_within_the_rounding_of_the_formats() -> None:
    """Three bits: each operand is off by at most 1/16 of itself, so a logit by 1/8 of Σ|hw| and a loss by
    twice the largest; gradients by what two roundings of random sign add up to."""
    hidden, weight, labels = e4m3_problem(200)
    loss, _ = cross_entropy_sum(hidden, weight, labels, 64, None, None, None, None, "rowwise")
    exact = reference(*(t.detach().double() for t in (hidden, weight)), labels)
    bound = (hidden.detach().double().abs() @ weight.detach().double().abs().T).amax(-1) / 4
    assert 0 < (loss.detach() - exact).abs() < bound[labels != -100].sum()
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(reference(*leaves, labels), leaves),
        strict=True,
    ):
        assert relative(ours, theirs) < 0.1


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_fault_in_e4m3_is_seen_where_there_is_a_target_and_nowhere_else(fault: float) -> None:
    hidden, weight, labels = e4m3_problem()
    labels[0, :3] = torch.tensor([-100, 4, 5])
    options = (16, None, None, None, None, "rowwise")
    plain = cross_entropy_sum(hidden, weight, labels, *options)[0].detach()
    with torch.no_grad():
        hidden[0, 0, 3] = fault
    loss = cross_entropy_sum(hidden, weight, labels, *options)[0]
    assert torch.equal(loss.detach(), plain)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    assert grad_weight.isfinite().all()
    assert not grad_hidden[0, 0].any()
    with torch.no_grad():
        hidden[0, 1, 3] = fault
    loss = cross_entropy_sum(hidden, weight, labels, *options)[0]
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isnan()
    assert grad_hidden.isnan().any(-1)[0].nonzero().flatten().tolist() == [1]
    assert grad_weight.isnan().all()


@pytest.mark.parametrize("shape", [(48, 24), (40, 32)])
def test_sizes_that_e4m3_cannot_have_are_refused(shape: tuple[int, int]) -> None:
    hidden, labels = torch.randn(1, 4, shape[1]), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="multiples of 16"):
        cross_entropy_sum(hidden, torch.randn(shape), labels, 4, None, None, None, None, "rowwise")


@pytest.mark.parametrize("kept", slow_but((True,), [False, True]))
def test_the_head_in_e4m3_compiles_into_one_graph_under_autocast(kept: bool) -> None:
    hidden, weight, labels = e4m3_problem()
    leaves = tuple(t.detach().float().requires_grad_() for t in (hidden, weight))
    ready = cast_weight(weight.detach(), "rowwise") if kept else (None,) * 4

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy_sum(hidden, weight, labels, 16, *ready, "rowwise")[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    results = [(loss, *torch.autograd.grad(loss, leaves)) for loss in (loss_of(*leaves), compiled(*leaves))]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype is torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
def test_the_head_in_e4m3_leaves_nothing_of_the_tail_out(scaling: Any) -> None:
    """Words of Zipf's frequencies, most of them far below a target's entry: in the mean over tokens, where
    all else cancels, dX is that of the same logits in float64; by the loss and by the head's own linear."""
    words, width, count = 8192, 32, 64
    frequencies = 1 / torch.arange(3.0, words + 3)
    weight, hidden = torch.randn(words, width) / 4, torch.randn(count, width)
    weight[:, 0], hidden[:, 0] = (frequencies / frequencies.sum()).log() / 3, 4
    weight, hidden = weight.bfloat16().requires_grad_(), hidden.bfloat16().requires_grad_()
    logits = linear_fp8(hidden, weight, None, scaling=scaling, exact_grad_x=True)
    labels = torch.multinomial(logits.float().softmax(1), 1).flatten()
    wanted = logits.detach().double().softmax(1)
    wanted[torch.arange(count), labels] -= 1
    expected = wanted @ weight.detach().double()
    loss, _ = cross_entropy_sum(hidden[None], weight, labels[None], 8192, None, None, None, None, scaling)
    ours = torch.autograd.grad(loss, (hidden, weight))
    own = torch.autograd.grad(logits, (hidden, weight), wanted.bfloat16())
    for found in (ours, own):
        assert (found[0].double() - expected).mean(0).norm() < 1e-3
