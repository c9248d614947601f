"""Soft thresholding: order statistics, continuity, the least-squares scale, published constants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from act24.sparse24.feed_forward.calibration import CALIBRATION, calibration_sums, sample_rows
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.pattern.soft_threshold import scale_from_sums, scale_sums, soft_threshold24

GROUP = st.lists(st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 1.0, -1.0])), min_size=4, max_size=4)


@given(GROUP)
def test_is_the_magnitude_less_the_second_smallest(group: list[float]) -> None:
    x = torch.tensor(group, dtype=torch.float64)
    threshold = x.abs().sort().values[1]
    p, q, r, s = x.abs()
    branch_free = torch.minimum(
        torch.maximum(torch.minimum(p, q), torch.minimum(r, s)),
        torch.minimum(torch.maximum(p, q), torch.maximum(r, s)),
    )
    assert threshold == branch_free
    expected = x.sign() * (x.abs() - threshold).clamp(min=0)
    assert torch.equal(soft_threshold24(x), expected)


@given(GROUP, st.integers(0, 3), st.floats(-1e-6, 1e-6))
def test_is_continuous_where_magnitudes_change_places(group: list[float], index: int, step: float) -> None:
    x = torch.tensor(group, dtype=torch.float64)
    moved = x.clone()
    moved[index] += step
    difference = (soft_threshold24(moved) - soft_threshold24(x)).abs().max()
    assert float(difference) <= 2 * abs(step) + 1e-12


def test_few_nonzeros_pass_unchanged() -> None:
    x = torch.tensor([[0.0, 3.0, 0.0, -2.0], [0.0, 0.0, 0.0, 5.0], [0.0] * 4], dtype=torch.bfloat16)
    assert torch.equal(soft_threshold24(x), x)


def test_gradient_passes_through_the_two_that_stay() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    soft_threshold24(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, top2_of_4(x.detach().abs()))


def test_scale_of_known_distributions() -> None:
    """β of Gaussian weights by an independent sort; of uniform ones in closed form."""
    normal = torch.randn(400, 4000, dtype=torch.float64)
    ordered = normal.abs().view(-1, 4).sort().values
    kept = ordered[:, 2:] - ordered[:, 1:2]
    by_sort = float((ordered[:, 2:] * kept).sum() / kept.square().sum())
    assert float(scale_from_sums(scale_sums(normal, soft_threshold24(normal)))) == pytest.approx(by_sort)
    assert by_sort == pytest.approx(1.483, abs=0.003)
    # Order statistics of four uniforms: E[U_i U_j] = i (j + 1) / 30 for i ≤ j. With U_2 the threshold
    # <x, S> = U_3² + U_4² - U_2 (U_3 + U_4), <S, S> = U_3² + U_4² + 2 U_2² - 2 U_2 (U_3 + U_4).
    u33, u44, u22, u23, u24 = 12 / 30, 20 / 30, 6 / 30, 8 / 30, 10 / 30
    closed = (u33 + u44 - u23 - u24) / (u33 + u44 + 2 * u22 - 2 * (u23 + u24))
    uniform = torch.rand(400, 4000, dtype=torch.float64)
    assert float(scale_from_sums(scale_sums(uniform, soft_threshold24(uniform)))) == pytest.approx(
        closed, abs=0.003
    )


def test_scale_minimises_the_squared_error() -> None:
    x = torch.randn(64, 32, dtype=torch.float64)
    soft = soft_threshold24(x)
    best = float(scale_from_sums(scale_sums(x, soft)))
    error = lambda scale: float((x - scale * soft).square().sum())  # noqa: E731
    assert error(best) < min(error(best * 1.01), error(best * 0.99))


def test_scale_is_clamped_and_defined_for_zeros() -> None:
    nearly_equal = 1 + 0.05 * torch.rand(16, 16, dtype=torch.float64)
    sums = torch.stack((scale_sums(nearly_equal, soft_threshold24(nearly_equal)), torch.zeros(2).double()))
    assert scale_from_sums(sums).tolist() == [2.0, 1.0]


@given(st.integers(0, 2**31), st.floats(-2, 2))
def test_scale_is_never_below_one(seed: int, shift: float) -> None:
    x = torch.relu(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) + shift).square()
    product, square = scale_sums(x, soft_threshold24(x))
    assert float(product) >= float(square) * (1 - 1e-9)


def published_example(density: float) -> torch.Tensor:
    shift = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(density))
    return torch.randn(2000, 1024, generator=torch.Generator().manual_seed(1)) + shift


@pytest.mark.parametrize(
    ("density", "scale", "naive_error", "soft_error"),
    [(0.50, 1.039, 0.102, 0.169), (0.10, 1.0012, 0.016, 0.028)],
)
def test_scale_and_errors_of_relu2_activations(
    density: float, scale: float, naive_error: float, soft_error: float
) -> None:
    """With relu(N(μ, 1))² soft thresholding has 1.7 times the error of hard selection, and β is near 1."""
    sums = calibration_sums(published_example(density), None, "activation", 2000, "relu2")
    row = dict(zip(CALIBRATION, sums.tolist(), strict=True))
    beta = float(scale_from_sums(sums[-2:]))
    assert beta - 1 == pytest.approx(scale - 1, rel=0.08)
    assert (row["naive_error"] / row["energy"]) ** 0.5 == pytest.approx(naive_error, rel=0.03)
    error = row["energy"] - 2 * beta * row["product"] + beta**2 * row["square"]
    assert (error / row["energy"]) ** 0.5 == pytest.approx(soft_error, rel=0.03)


def test_calibration_takes_the_rows_asked_for_and_no_padding() -> None:
    hidden = torch.randn(4, 10, 8, dtype=torch.float64)
    pads = torch.zeros(4, 10, dtype=torch.bool)
    pads[:, 6:] = True
    rows = sample_rows(pads, 40, 12, hidden.device)
    assert len(set(rows.tolist())) == 12
    assert not pads.flatten()[rows].any()
    chosen = torch.relu(hidden.flatten(0, 1)[rows]).square()
    expected = scale_sums(chosen, soft_threshold24(chosen))
    sums = calibration_sums(hidden, pads, "activation", 12, "relu2")
    assert torch.allclose(sums[-2:], expected)
    changed = hidden.clone()
    changed[:, 6:] = 100.0
    assert torch.equal(calibration_sums(changed, pads, "activation", 12, "relu2"), sums)
    # More samples than tokens: all of them, padding still for nothing.
    everything = torch.relu(hidden[:, :6]).square()
    sums = calibration_sums(changed, pads, "activation", 1000, "relu2")
    assert torch.allclose(sums[-2:], scale_sums(everything, soft_threshold24(everything)))


def test_scale_from_weight_and_from_output() -> None:
    hidden = torch.randn(30, 8, dtype=torch.float64)
    weights = [torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)]
    activation = torch.relu(hidden)
    by_weight = calibration_sums(hidden, None, "weight", 1000, "relu", *weights)[-2:]
    stacked = torch.cat(weights)
    assert torch.allclose(by_weight, scale_sums(stacked, soft_threshold24(stacked)))
    by_output = calibration_sums(hidden, None, "output", 1000, "relu", *weights)[-2:]
    full, sparse = activation @ stacked.T, soft_threshold24(activation) @ stacked.T
    assert torch.allclose(by_output, scale_sums(full, sparse))
    assert torch.equal(
        calibration_sums(hidden, None, "output", 1000, "relu"),
        calibration_sums(hidden, None, "activation", 1000, "relu"),
    )
