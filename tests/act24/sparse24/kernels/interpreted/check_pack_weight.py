"""Packing a weight both ways against packing W and Wᵀ in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

import act24.sparse24.kernels.pack_weight  # noqa: F401  (fills OPERATORS)
from act24.sparse24.format.packed import Packed24, pack, unpack
from act24.sparse24.kernels.shared.registry import OPERATORS
from act24.sparse24.pattern.selection import top2_of_4

#: 4×4 patterns that are 2:4 along either side; the last has an empty row and a group with one entry.
PATTERNS = torch.tensor(
    [
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]],
        [[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1]],
        [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0]],
    ]
).bool()


@pytest.mark.parametrize("shape", [(64, 64), (128, 192)])
def test_both_ways(shape: tuple[int, int]) -> None:
    rows, columns = shape
    blocks = PATTERNS[torch.randint(len(PATTERNS), (rows // 4, columns // 4))]
    mask = blocks.permute(0, 2, 1, 3).reshape(rows, columns)
    weight = torch.randn(rows, columns).bfloat16()
    weight[:4] = -0.0
    packed, transposed = map(Packed24, OPERATORS["pack_weight"].launch(weight, mask))
    expected = torch.where(mask, weight, 0)
    assert torch.equal(unpack(packed), expected)
    assert torch.equal(unpack(transposed), expected.T)
    assert torch.equal(packed.buffer, pack(weight, mask).buffer)  # which dummies fill up is the same too


def test_rows_alone() -> None:
    weight = torch.randn(128, 192).bfloat16()
    mask = top2_of_4(weight.abs())
    mask[0] = False
    buffer = OPERATORS["pack_weight_rows"].launch(weight, mask)
    assert torch.equal(unpack(Packed24(buffer)), torch.where(mask, weight, 0))
    assert torch.equal(buffer, pack(weight, mask).buffer)
