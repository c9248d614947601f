"""The forward kernel against its reference, bit for bit."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import act24.sparse24.kernels.activation_gradient
import act24.sparse24.kernels.count_activation
import act24.sparse24.kernels.pack_activation  # noqa: F401  (fill OPERATORS)
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.kernels.shared.registry import OPERATORS

FUNCTIONS, METHODS = ("relu2", "relu"), ("naive", "soft_threshold", "mvue")
SEED = 2**40 + 17


def awkward(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Normal values with ties, zeros of both signs and an empty row among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, (2 * x).round() / 2, x)
    x[3] = 0
    x[5, ::2] = -0.0
    return x.bfloat16()


def run(
    hidden: Tensor,
    real: Tensor | None,
    function: str,
    method: str,
    order: Tensor | None = None,
    form: str = "launch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel, or the reference: the activation, its slope, the counts and the sums."""
    packed, slope, counts, sums = getattr(OPERATORS["pack_activation"], form)(
        hidden, torch.tensor(SEED), real, function, method, True, False, True, True, order
    )
    return unpack(Packed24(packed)), dense_slope(slope, Packed24(packed)), counts, sums


def dense_slope(slope: Tensor, packed: Packed24) -> Tensor:
    metadata = packed.metadata.view(slope.dtype)
    return unpack(Packed24(torch.cat((slope.flatten(), metadata)).view_as(packed.buffer)))


reference = functools.partial(run, form="reference")


#: What is computed of a group is one thing and how far a program walks another: every method in the smallest
#: shape, and larger ones so that every method and function has a turn.
LARGER = [
    ("relu2", "mvue", (64 * 3, 64)),
    ("relu", "naive", (64 * 3, 64)),
    ("relu2", "soft_threshold", (128, 128)),
    ("relu", "mvue", (128, 128)),
]


@pytest.mark.parametrize(
    ("function", "method", "shape"),
    [*((f, m, (64, 64)) for f, m in itertools.product(FUNCTIONS, METHODS)), *LARGER],
)
def test_equals_the_reference(function: str, method: str, shape: tuple[int, int]) -> None:
    """Several slabs, more than a program walks, several strips; with and without padding."""
    hidden = awkward(*shape)
    for real in (None, torch.rand(shape[0]) < 0.8):
        ours, expected = run(hidden, real, function, method), reference(hidden, real, function, method)
        for a, b in zip(ours[:3], expected[:3], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(ours[3], expected[3], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_token_draws_the_same_wherever_its_row_is(function: str) -> None:
    hidden, order = awkward(64 * 3, 64), torch.randperm(64 * 3)
    in_place = run(hidden, None, function, "mvue")
    ours = run(hidden[order], None, function, "mvue", order)
    for a, b, c in zip(
        ours[:2], in_place, reference(hidden[order], None, function, "mvue", order), strict=False
    ):
        assert torch.equal(a, b[order])
        assert torch.equal(a, c)
    assert torch.equal(ours[2], in_place[2])


VALUES = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 1.0078125, 3.0e15])


@settings(max_examples=15)
@given(st.lists(VALUES, min_size=4, max_size=64), st.sampled_from(FUNCTIONS), st.sampled_from(METHODS))
def test_ties_zeros_and_wide_ranges(values: list[float], function: str, method: str) -> None:
    hidden = torch.tensor(values).repeat(64 * 64)[: 64 * 64].view(64, 64).bfloat16()
    for a, b in zip(
        run(hidden, None, function, method)[:3], reference(hidden, None, function, method)[:3], strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("function", "method", "shape"),
    [
        *((f, m, (64, 64)) for f, m in itertools.product(FUNCTIONS, METHODS)),
        ("relu2", "soft_threshold", (64 * 3, 128)),
        ("relu", "mvue", (64 * 3, 128)),
    ],
)
def test_with_its_zeros_it_is_the_same_activation(function: str, method: str, shape: tuple[int, int]) -> None:
    hidden, real = awkward(*shape), torch.rand(shape[0]) < 0.8
    filled, _, counts, sums = OPERATORS["pack_activation"].launch(
        hidden, torch.tensor(SEED), real, function, method, False, True, True, True
    )
    value, _, expected_counts, expected_sums = reference(hidden, real, function, method)
    assert torch.equal(filled, value)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_counting_alone_counts_the_same(function: str) -> None:
    hidden, real = awkward(64 * 3, 192), torch.rand(64 * 3) < 0.8
    untouched = hidden.clone()
    counts, sums = OPERATORS["count_activation"].launch(hidden, real, function)
    expected_counts, expected_sums = OPERATORS["count_activation"].reference(hidden, real, function)
    assert torch.equal(hidden, untouched)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradient_of_what_has_its_zeros(function: str) -> None:
    """Against the slope that the reference keeps, in a size that is no multiple of a program's."""
    hidden, grad = awkward(64, 192), awkward(64, 192, seed=1)
    value, slope, *_ = reference(hidden, None, function, "naive")
    result = OPERATORS["activation_gradient"].launch(grad, value, function)
    assert torch.equal(result, OPERATORS["activation_gradient"].reference(grad, value, function))
    assert torch.equal(result, slope * grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_not_finite_stays_as_in_the_reference(function: str, method: str) -> None:
    """NaN as products on a GPU make it, with its sign bit clear; PyTorch on a CPU sets it."""
    hidden = awkward(64, 64)
    hidden[10, 8:12] = torch.tensor([float("inf"), 1.0, 2.0, 3.0])
    hidden[20, 8:12] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    hidden[30, 8:12] = torch.tensor([float("inf"), 3.0, float("inf"), 0.0])
    hidden.view(torch.int16)[20, 9] = hidden.view(torch.int16)[30, 11] = 0x7FFF
    value, _, counts, sums = run(hidden, None, function, method)
    expected, _, expected_counts, expected_sums = reference(hidden, None, function, method)
    assert value[10, 8] == float("inf")
    assert value[20, 9].isnan()
    if method != "mvue":  # draws two of the three
        assert value[30, 11].isnan()
    torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
    finite = hidden.isfinite().all(0)
    assert torch.equal(counts[finite], expected_counts[finite])
    assert sums[2].isnan()
    assert expected_sums[2].isnan()


def test_no_negative_zero_comes_out() -> None:
    """Backward sorts bit patterns, where -0 would be the largest."""
    hidden = torch.full((64, 64), -1.0).bfloat16()
    arguments = (hidden, None, None, "relu2", "naive", False, False, False, False)
    packed, *_ = OPERATORS["pack_activation"].launch(*arguments)
    assert not Packed24(packed).values.view(torch.int16).any()
