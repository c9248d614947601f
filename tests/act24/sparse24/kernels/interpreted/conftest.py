"""For the process that `test_kernels.py` starts, with TRITON_INTERPRET=1.

Triton's interpreter, with two things corrected that would look like errors of a kernel: it cuts off where a
GPU rounds float32 to bfloat16 or e4m3, and it multiplies bfloat16 matrices as the integers that hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from act24.sparse24.kernels import pack_activation, pack_drawn, pack_gradient, pack_gradient_e4m3

_convert, _dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """To nearest, ties to even; NaN becomes the one that a GPU makes, and e4m3 ends at its largest number."""
    if source == tl.float32 and target == tl.float8e4nv:
        single = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).clamp(-448, 448)
        return single.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if source != tl.float32 or target != tl.bfloat16:
        return _convert(data, source, target, rounding)
    bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(data.view(np.float32)), 0x7FFF, rounded).astype(np.uint16).reshape(data.shape)


def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """In float32."""
    return _dot(self, _float32(a), _float32(b), *rest)


def _float32(operand: Any) -> Any:
    if operand.dtype != tl.bfloat16:
        return operand
    data = (operand.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


interpreter._convert_float = convert
interpreter.InterpreterBuilder.create_dot = dot


@pytest.fixture(autouse=True)
def unwritten_memory_is_filled() -> Iterator[None]:
    """With NaN or the largest integer, so that what a kernel leaves unwritten cannot look right."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def programs_walk_two_tiles() -> Iterator[None]:
    """Instead of eight: three tiles are more than one program walks, where nine would be interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_activation, "SLABS", 2)
        for module in (pack_drawn, pack_gradient, pack_gradient_e4m3):
            patch.setattr(module, "STEPS", 2)
        yield
