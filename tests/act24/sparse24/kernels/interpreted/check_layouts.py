"""Every kernel given every one of its tensors in other layouts."""

from __future__ import annotations

import pytest
from layouts import check_layouts
from operator_cases import operator_cases
from slow import slow_but

from act24.sparse24.kernels.shared.registry import OPERATORS

#: Products are cuSPARSELt's and cuBLAS's, and the order of tokens is no kernel; `test_multiply.py` has the
#: layouts of the former.
KERNELS = sorted({*operator_cases()} - {"product24", "product24_e4m3", "product_e4m3", "token_order"})


#: Each of these takes seconds, and reads its tensors as those beside it do.
LONG = ("best_transposable_mask", "pack_gradient", "pack_gradient_e4m3")


@pytest.mark.parametrize("name", slow_but({*KERNELS} - {*LONG}, KERNELS))
def test_a_tensor_in_any_layout_is_read_right_or_refused(name: str) -> None:
    check_layouts(name, OPERATORS[name].launch)
