"""Quantisation to e4m3 against its reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import act24.sparse24.kernels.quantise_packed
import act24.sparse24.kernels.quantise_rows  # noqa: F401  (fill OPERATORS)
from act24.sparse24.format.packed import random_packed
from act24.sparse24.kernels.shared.registry import OPERATORS


def awkward(values: Tensor) -> Tensor:
    """Rows of very different sizes, one of zeros, and one that e4m3 has as subnormal numbers but for one."""
    values *= 10 ** torch.linspace(-20, 20, len(values))[:, None]
    values[3] = 0
    values[5] = 2 ** torch.linspace(-20, 0, values.shape[1])
    return values


def same_bits(ours: Tensor, expected: Tensor) -> bool:
    return torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("shape", [(8, 64), (16, 80), (6, 1000)])
def test_rows(shape: tuple[int, int]) -> None:
    matrix = awkward(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
    narrow, scale = OPERATORS["quantise_rows"].launch(matrix)
    expected, expected_scale = OPERATORS["quantise_rows"].reference(matrix)
    assert same_bits(narrow, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (192, 320), (64, 1024)])
def test_packed(shape: tuple[int, int]) -> None:
    """Also where the metadata is no whole number of blocks a row."""
    packed = random_packed(*shape, torch.bfloat16, torch.Generator().manual_seed(0))
    awkward(packed.values)
    narrow, scale = OPERATORS["quantise_packed"].launch(packed.buffer)
    expected, expected_scale = OPERATORS["quantise_packed"].reference(packed.buffer)
    assert same_bits(narrow, expected)
    assert torch.equal(scale, expected_scale)


def test_infinity_and_nan_are_seen() -> None:
    matrix = torch.ones(2, 64).bfloat16()
    matrix[0, 3], matrix[1, 5] = float("inf"), float("nan")
    narrow, _ = OPERATORS["quantise_rows"].launch(matrix)
    assert narrow.float()[0, 3].isnan()
    assert narrow.float()[1, 5].isnan()
