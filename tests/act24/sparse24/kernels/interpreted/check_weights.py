"""The kernels that 2:4 weights need beside packing: masks and drawn gradients, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

import act24.sparse24.kernels.pack_drawn
import act24.sparse24.kernels.transposable_mask  # noqa: F401  (fills OPERATORS)
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.kernels.shared.registry import OPERATORS
from act24.sparse24.pattern.mvue import mvue24
from act24.sparse24.pattern.transposable import transposable_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 4), (20, 260), (64, 128)])
def test_masks_are_those_of_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Ties among them, which the first pattern wins, and blocks of zeros."""
    weight = torch.randn(shape).to(dtype)
    weight = torch.where(torch.rand(shape) < 0.5, (2 * weight).round() / 2, weight)
    weight[:4, :4] = 0
    mask = OPERATORS["best_transposable_mask"].launch(weight)
    assert torch.equal(mask, transposable_mask(weight))


@pytest.mark.parametrize("shape", [(64 * 3, 64), (64, 192)])
def test_gradients_are_drawn_as_the_reference_draws(shape: tuple[int, int]) -> None:
    tokens, features = shape
    grad = torch.randn(shape)
    grad = torch.where(torch.rand(shape) < 0.3, (2 * grad).round() / 2, grad)
    grad[4:8, :8] = 0
    grad[9, :16] *= 1e6
    grad[16:20, 3] = 3.3e38  # over its probability beyond every bfloat16
    grad = grad.bfloat16()
    seed = torch.tensor(2**40 + 17)
    drawn = unpack(Packed24(OPERATORS["pack_drawn"].launch(grad, seed))).T
    expected = mvue24(grad, seed, 0)
    assert bool(drawn.isfinite().all())
    assert torch.equal(drawn, expected)
    assert int((drawn.view(tokens // 4, 4, features) != 0).sum(1).max()) <= 2
    other = unpack(Packed24(OPERATORS["pack_drawn"].launch(grad, seed + 1))).T
    assert float((drawn != other).float().mean()) > 0.1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen(value: float) -> None:
    grad = torch.randn(64, 64).bfloat16()
    for place in range(4):
        grad[8 + place, place] = value
    grad[12:16, 5] = value
    for of in (OPERATORS["pack_drawn"].launch, OPERATORS["pack_drawn"].reference):
        drawn = unpack(Packed24(of(grad, torch.tensor(3)))).T
        seen = (~drawn.isfinite()).nonzero().tolist()
        assert [place for place in seen if place[1] < 5] == [[8, 0], [9, 1], [10, 2], [11, 3]]
        assert sum(place[1] == 5 for place in seen) == 2
