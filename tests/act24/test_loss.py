"""The chunked loss against F.cross_entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from act24.errors import Act24Error
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
