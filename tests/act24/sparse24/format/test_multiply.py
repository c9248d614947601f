"""What a product by the library refuses."""

from __future__ import annotations

import pytest
import torch

from act24.sparse24.format.multiply import multiply24
from act24.sparse24.format.packed import pack


def test_operands_in_other_layouts_are_refused() -> None:
    """The library would read something else without an error."""
    packed = pack(torch.randn(64, 64).bfloat16()).buffer
    wide = torch.randn(64, 256).bfloat16()
    with pytest.raises(ValueError, match=r"strides \(256, 1\)"):
        multiply24(packed, wide[:, :128], 0, False)
    narrow = pack(torch.randn(64, 64).to(torch.float8_e4m3fn)).buffer
    with pytest.raises(ValueError, match="not in e4m3"):
        multiply24(narrow, torch.randn(64, 64).to(torch.float8_e4m3fn), 0, False)
    with pytest.raises(ValueError, match="cannot multiply"):
        multiply24(packed, torch.randn(32, 8).bfloat16(), 0, False)
