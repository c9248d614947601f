"""The kernel that writes dense features into a product, against PyTorch's index_copy_."""

from __future__ import annotations

import pytest
import torch

from act24.sparse24.kernels.product24 import replace_rows


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "length", "number"), [(64, 128, 5), (192, 200, 40), (64, 8, 64)])
def test_equals_index_copy(rows: int, length: int, number: int, transposed: bool) -> None:
    result = torch.randn(rows, length).bfloat16()
    new, index = torch.randn(number, length).bfloat16(), torch.randperm(rows)[:number]
    expected = result.index_copy(0, index, new)
    ours = result.T.contiguous() if transposed else result.clone()
    replace_rows(ours, new, index, transposed)
    assert torch.equal(ours.T if transposed else ours, expected)
