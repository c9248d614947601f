"""The statistics of activation24 against counting and against the binomial."""

from __future__ import annotations

import pytest
import torch
from by_hand import inputs, sparse_feature_wise_by_hand
from hypothesis import given
from hypothesis import strategies as st

from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.feed_forward.statistics import STATISTICS, dense_statistics
from act24.sparse24.pattern.selection import densest


@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(-1, 1.5))
def test_statistics_by_counting(seed: int, tokens: int, shift: float) -> None:
    hidden = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed)).double() - shift
    options = Options24(backward="split_gemm", dense_ratio=0.2, statistics=True, token_permutation="none")
    y, statistics = activation24(hidden, None, None, None, None, None, None, None, options)
    row = dict(zip(STATISTICS, statistics.tolist(), strict=True))
    activation = torch.relu(hidden) ** 2
    nonzero = activation > 0
    assert row["elements"] == hidden.numel()
    assert row["zeros"] == int((~nonzero).sum())
    groups = nonzero.view(tokens, 3, 4).sum(-1)
    assert row["groups"] == groups.numel()
    assert row["crowded_groups"] == int((groups > 2).sum())
    assert row["dropped_nonzeros"] == int((groups - 2).clamp(min=0).sum())
    assert row["energy"] == pytest.approx(float((activation**2).sum()), rel=1e-5)
    assert row["dropped_energy"] == pytest.approx(
        float((activation**2).sum() - (y**2).sum()), rel=1e-4, abs=1e-5
    )
    dense = set(densest(nonzero.sum(0), 0.2).nonzero().flatten().tolist())
    left = sparse_feature_wise_by_hand(y, dense)
    assert row["feature_nonzeros"] == int((y != 0).sum())
    assert row["feature_dropped_nonzeros"] == int((y != 0).sum() - (left != 0).sum())
    assert row["feature_energy"] == pytest.approx(float((y**2).sum()), rel=1e-5)
    assert row["feature_dropped_energy"] == pytest.approx(
        float((y**2).sum() - (left**2).sum()), rel=1e-4, abs=1e-5
    )
    assert row["dense_feature_energy"] == pytest.approx(float((y[:, sorted(dense)] ** 2).sum()), rel=1e-5)
    token_wise = dict(zip(STATISTICS, dense_statistics(hidden).tolist(), strict=True))
    for name in ("elements", "zeros", "crowded_groups", "dropped_nonzeros", "energy", "dropped_energy"):
        assert token_wise[name] == pytest.approx(row[name])


@pytest.mark.parametrize("density", [0.5, 0.3, 0.1])
def test_overflow_follows_the_binomial(density: float) -> None:
    """P(more than 2 of 4) = 4 d³ (1 - d) + d⁴; share of non-zeros dropped = d² - d³/2."""
    hidden = torch.where(torch.rand(20000, 400) < density, torch.rand(20000, 400) + 0.1, -1.0)
    row = dict(zip(STATISTICS, dense_statistics(hidden).tolist(), strict=True))
    crowded = 4 * density**3 * (1 - density) + density**4
    assert row["crowded_groups"] / row["groups"] == pytest.approx(crowded, rel=0.05)
    dropped = row["dropped_nonzeros"] / (row["elements"] - row["zeros"])
    assert dropped == pytest.approx(density**2 - density**3 / 2, rel=0.05)


def test_without_statistics_the_vector_is_zero() -> None:
    _, statistics = activation24(*inputs(4, 5))
    assert statistics.tolist() == [0.0] * len(STATISTICS)
