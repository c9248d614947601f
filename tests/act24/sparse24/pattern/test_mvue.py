"""The minimum-variance unbiased estimator against theory, enumeration and brute-force optimisation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from act24.sparse24.pattern.mvue import _groups, mvue24, mvue_factor
from act24.sparse24.pattern.random_bits import random_bits, random_permutation, random_uniform

SEED = torch.tensor(20240401)
GROUPS = [
    [1.0, -2.0, 3.0, 4.0],
    [0.1, 0.2, 0.3, 5.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.0, 3.0, 0.0, -2.0],
    [0.0, 0.0, 7.0, 0.0],
    [1.0, 2.0, 3.0, 10.0],
    [0.0, 1.0, 1.0, 1.0],
]


def draws(group: list[float], count: int = 200_000) -> torch.Tensor:
    """`[count, 4]` independent estimates: the groups of one tensor draw independently."""
    return mvue24(torch.tensor(group, dtype=torch.float64).repeat(count), SEED).view(count, 4)


def probabilities(a: torch.Tensor) -> torch.Tensor:
    """π of what mvue24 does, `[4]`: of the interval of an entry its share of what contains the draws."""
    groups = _groups(a)
    shared = torch.where(a > 0, groups.magnitude / groups.kept, 0)
    return torch.where(groups.certain, 1, shared)


def variance(a: torch.Tensor, probability: torch.Tensor) -> float:
    """Σ a_i² (1/π_i - 1), the variance of keeping i with probability π_i."""
    kept = a > 0
    return float((a[kept] ** 2 * (1 / probability[kept] - 1)).sum())


@pytest.mark.parametrize("group", GROUPS)
def test_mean_and_variance_are_those_of_theory(group: list[float]) -> None:
    x = torch.tensor(group, dtype=torch.float64)
    sample = draws(group)
    expected_variance = variance(x.abs(), probabilities(x.abs()))
    standard_error = math.sqrt(expected_variance / len(sample))
    deviation = (sample.mean(0) - x).abs().max().item()
    assert deviation <= 5 * standard_error + 1e-9
    assert sample.var(0).sum().item() == pytest.approx(expected_variance, rel=0.03, abs=1e-9)


def test_variances_derived_by_hand() -> None:
    # Σ a² (1/π - 1): S = 10, π = a/5 → 5·Σa - Σa² = 50 - 30; and π = (a/0.6, 1): 0.6² - Σ small a².
    assert variance_of([1.0, 2.0, 3.0, 4.0]) == pytest.approx(20.0)
    assert variance_of([0.1, 0.2, 0.3, 5.0]) == pytest.approx(0.22)


def variance_of(group: list[float]) -> float:
    a = torch.tensor(group, dtype=torch.float64)
    return variance(a, probabilities(a))


@settings(max_examples=60)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 100)), min_size=4, max_size=4))
def test_no_other_probabilities_have_less_variance(group: list[float]) -> None:
    a = torch.tensor(group, dtype=torch.float64)
    probability = probabilities(a)
    assert float(probability.max()) <= 1
    assert float(probability.sum()) <= 2 + 1e-12
    assert bool(((probability > 0) == (a > 0)).all())
    least = variance(a, probability)
    # A convex problem: no small step towards another point of {π_i ≤ 1, Σπ ≤ 2} may improve it.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.rand(4, generator=generator, dtype=torch.float64)
        other = other / other.sum() * 2
        if other.max() > 1:
            continue
        moved = probability + 1e-3 * (other - probability)
        assert variance(a, moved) >= least * (1 - 1e-9) - 1e-12


@settings(max_examples=100)
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2**62),
)
def test_at_most_two_and_exactly_two_of_two_or_more(
    rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    x = torch.randn(rows, 4 * groups, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.4, 0, x).to(dtype)
    y = mvue24(x, torch.tensor(seed))
    kept = (mvue_factor(x, torch.tensor(seed)) != 0).view(-1, 4).sum(1)
    assert torch.equal(kept, (x != 0).view(-1, 4).sum(1).clamp(max=2))
    few = ((x != 0).view(-1, 4).sum(1) <= 2)[:, None].expand(-1, 4).reshape(x.shape)
    assert torch.equal(y[few], x[few]), "groups of at most two come back as they are"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "group",
    [
        [4.0, 0.0, 0.0, 0.0],  # NaN in the public code
        [0.0] * 4,
        [3e38] * 4,
        [3e38, 1e-38, 1e-38, 1e-38],
        [1e-40] * 4,
        [1e30, 1.0, 1.0, 1.0],
    ],
)
def test_finite_on_every_input(group: list[float], dtype: torch.dtype) -> None:
    y = mvue24(torch.tensor(group * 500, dtype=dtype), SEED)
    assert bool(y.isfinite().all())
    assert int((y != 0).view(-1, 4).sum(1).max()) <= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays(value: float) -> None:
    """Alone in its group, it is all that stays."""
    for place in range(4):
        x = torch.tensor([3.0, 1.0, 0.5, 7.0])
        x[place] = value
        for seed in range(8):
            y = mvue24(x, seed)
            assert torch.equal(y[place].nan_to_num(5), x[place].nan_to_num(5))
            assert y.count_nonzero() == 1


def test_a_dominant_entry_is_always_kept_exactly() -> None:
    sample = draws([0.1, 0.2, 0.3, 5.0], 1000)
    assert bool((sample[:, 3] == 5.0).all())
    assert bool(((sample[:, :3] != 0).sum(1) == 1).all())
    assert sample[:, :3].sum(1).tolist() == pytest.approx([0.6] * 1000)


def test_seed_decides_and_dimension_is_free() -> None:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mvue24(x, torch.tensor(5)), mvue24(x, torch.tensor(5)))
    assert not torch.equal(mvue24(x, torch.tensor(5)), mvue24(x, torch.tensor(6)))
    assert not torch.equal(mvue24(x, torch.tensor(5)), mvue24(x, torch.tensor(5 + 2**40)))
    assert torch.equal(mvue24(x, 5, 0), mvue24(x.T.contiguous(), 5).T)
    assert int((mvue24(x, 5, 0) != 0).view(2, 4, 12).sum(1).max()) == 2


def test_gradient_is_the_factor() -> None:
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    mvue24(x, SEED).backward(torch.ones(4, 8, dtype=torch.float64))
    assert x.grad is not None
    assert torch.equal(x.grad, mvue_factor(x, SEED))


def test_width_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        mvue24(torch.ones(2, 6), SEED)


def test_random_bits_are_uniform_and_independent_of_neighbours() -> None:
    u = random_uniform(torch.arange(1 << 18), 3)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    counts = torch.histc(u, 64, 0, 1)
    chi_square = float(((counts - 4096) ** 2 / 4096).sum())
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    for lag in (1, 2, 4, 768):
        correlation = torch.corrcoef(torch.stack((u[lag:], u[:-lag])))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(len(u))
    bits = torch.stack([(random_bits(torch.arange(1 << 14), 9) >> b) & 1 for b in range(32)]).double()
    assert float((bits.mean(1) - 0.5).abs().max()) < 5 * 0.5 / 2**7


def test_random_bits_of_other_seeds_are_unrelated() -> None:
    index = torch.arange(1 << 16)
    a, b = random_uniform(index, 1), random_uniform(index, 2)
    high = random_uniform(index, 1 + (1 << 33))
    for other in (b, high):
        assert abs(float(torch.corrcoef(torch.stack((a, other)))[0, 1])) < 5 / 2**8


@settings(max_examples=30)
@given(st.integers(1, 5000))
def test_random_permutation_is_one(length: int) -> None:
    permutation = random_permutation(length, 7, torch.device("cpu"))
    assert torch.equal(permutation.sort().values, torch.arange(length))
    assert torch.equal(permutation, random_permutation(length, 7, torch.device("cpu")))
