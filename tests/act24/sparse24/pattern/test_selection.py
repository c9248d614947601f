"""top2_of_4 against brute force: sort the four by value, then by index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from act24.sparse24.pattern.selection import are_densest, densest, top2_of_4

# Few distinct values, so that most groups have ties; zeros of both signs are equal.
FEW = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])
ANY = st.floats(width=32)


def brute_force(scores: list[float]) -> list[bool]:
    mask = []
    for start in range(0, len(scores), 4):
        group = scores[start : start + 4]
        # NaN is above infinity, and all NaNs are equal.
        order = [(0.0, 0.0, i) if x != x else (1.0, -x, i) for i, x in enumerate(group)]
        kept = [i for *_, i in sorted(order)[:2]]
        mask += [i in kept for i in range(4)]
    return mask


@given(st.integers(1, 6).flatmap(lambda n: st.lists(FEW | ANY, min_size=4 * n, max_size=4 * n)))
def test_agrees_with_brute_force(scores: list[float]) -> None:
    assert top2_of_4(torch.tensor(scores)).tolist() == brute_force(scores)


def test_every_order_with_ties() -> None:
    """All 4⁴ groups of four values out of four: every pattern of ties in every position."""
    groups = torch.cartesian_prod(*[torch.arange(4.0)] * 4)
    mask = top2_of_4(groups)
    assert mask.tolist() == [brute_force(group) for group in groups.tolist()]
    assert (mask.sum(-1) == 2).all()


def test_positive_and_negative_zero_are_one_value() -> None:
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0, -0.0, 0.0, -0.0, 0.0])
    assert top2_of_4(zeros).tolist() == [True, True, False, False] * 2


@given(
    shape=st.lists(st.integers(1, 3), min_size=0, max_size=2),
    dim=st.integers(-3, 2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32]),
    seed=st.integers(0, 2**16),
)
def test_any_dimension_and_dtype(shape: list[int], dim: int, dtype: torch.dtype, seed: int) -> None:
    """The groups lie along `dim`, whatever else there is, contiguous or not."""
    dim %= len(shape) + 1
    shape = [*shape[:dim], 8, *shape[dim:]]
    scores = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = torch.tensor([brute_force(row) for row in scores.movedim(dim, -1).reshape(-1, 8).tolist()])
    mask = top2_of_4(scores, dim)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.movedim(dim, -1).reshape(-1, 8), expected)
    backwards = scores.movedim(dim, 0).contiguous().movedim(0, dim)
    assert torch.equal(top2_of_4(backwards, dim - len(shape)), mask)


@given(st.lists(ANY.filter(lambda x: x >= 0), min_size=8, max_size=8))
def test_squaring_non_negative_numbers_selects_the_same(scores: list[float]) -> None:
    """Why the selection may be made on relu(h) instead of relu(h)²; in float64 no square overflows."""
    positive = torch.tensor(scores, dtype=torch.float64)
    square = positive**2
    kept, other = top2_of_4(positive), top2_of_4(square)
    # Squares that underflow may tie where their roots do not; what is kept has the same values all the same.
    assert torch.equal(torch.where(kept, square, 0).sum(), torch.where(other, square, 0).sum())


def test_no_rows() -> None:
    assert top2_of_4(torch.zeros(0, 8)).shape == (0, 8)
    assert top2_of_4(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("width", [1, 2, 3, 6, 1366])
def test_a_size_that_is_no_multiple_of_4(width: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        top2_of_4(torch.zeros(2, width))


def test_meta_and_compile() -> None:
    assert top2_of_4(torch.empty(3, 8, device="meta")).shape == (3, 8)
    scores = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(top2_of_4, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(scores), top2_of_4(scores))


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    ratio=st.floats(0, 1).map(lambda x: round(x, 3)),
)
def test_densest_features(counts: list[int], ratio: float) -> None:
    mask = densest(torch.tensor(counts), ratio)
    number = -int(-ratio * len(counts) // 1)  # the ceiling
    expected = sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:number]
    assert sorted(torch.nonzero(mask).flatten().tolist()) == sorted(expected)
    asked = torch.arange(0, len(counts), 3)
    assert torch.equal(are_densest(torch.tensor(counts), asked, ratio), mask[asked])


def test_mask_carries_no_gradient() -> None:
    scores: Tensor = torch.randn(8, requires_grad=True)
    assert not top2_of_4(scores).requires_grad
