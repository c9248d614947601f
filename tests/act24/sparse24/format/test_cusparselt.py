"""Kept plans, against a library played by what its documentation says descriptors mean."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from act24.sparse24.format import cusparselt
from act24.sparse24.format.multiply import relative_error
from act24.sparse24.format.packed import Packed24, empty_packed, pack, unpack


class PlayedLibrary:
    """Reads row- and column-major matrices at addresses, as descriptors say; 7 is a wrong id."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return getattr(type(self), f"_{name}")(self, *arguments)

        return call

    def _dense(self, handle: Any, target: Any, rows: Any, columns: Any, leading: Any, *rest: Any) -> int:
        alignment, dtype, order, *_ = rest
        assert alignment.value == 16
        self.made[ctypes.addressof(target)] = (rows.value, columns.value, leading.value, order, dtype)
        return 0

    _cusparseLtDenseDescriptorInit = _dense
    _cusparseLtStructuredDescriptorInit = _dense

    def _cusparseLtMatmulDescriptorInit(self, handle: Any, target: Any, *rest: Any) -> int:
        first, second, *matrices, compute = rest
        assert (first, compute) == (0, 2)
        found = [self.made[ctypes.addressof(matrix)] for matrix in matrices]
        assert found[2] == found[3]
        assert (found[0][-1], found[2][-1]) == (found[1][-1], 14)
        self.made[ctypes.addressof(target)] = (second, *found[:3])
        return 0

    def _cusparseLtMatmulAlgSelectionInit(self, handle: Any, target: Any, product: Any, kind: int) -> int:
        self.made[ctypes.addressof(target)] = None
        return 0

    def _cusparseLtMatmulAlgSetAttribute(
        self, handle: Any, target: Any, what: int, data: Any, size: Any
    ) -> int:
        assert (what, size.value) == (0, 4)
        return 3 if data._obj.value == 7 else 0

    def _cusparseLtMatmulPlanInit(self, handle: Any, target: Any, product: Any, choice: Any) -> int:
        self.made[ctypes.addressof(target)] = self.made[ctypes.addressof(product)]
        return 0

    def _cusparseLtMatmulGetWorkspace(self, handle: Any, plan: Any, size: Any) -> int:
        size._obj.value = 64
        return 0

    def _cusparseLtMatmul(self, handle: Any, plan: Any, *rest: Any) -> int:
        alpha, left, right, beta, addend, result, workspace, streams, number = rest
        assert (alpha._obj.value, beta._obj.value, addend.value) == (1.0, 0.0, result.value)
        assert (streams._obj.value, number.value) == (5, 1)
        assert workspace.value
        second, sparse, dense, wanted = self.made[ctypes.addressof(plan)]
        packed = empty_packed(*sparse[:2], torch.empty(0, dtype=DTYPES[sparse[-1]]))
        ctypes.memmove(packed.data_ptr(), left.value, packed.nbytes)
        matrix = at(right.value, dense)
        product = unpack(Packed24(packed)).float() @ (matrix.T if second else matrix).float()
        at(result.value, wanted).copy_(product)
        return 0


#: CUDA's numbers.
DTYPES = {14: torch.bfloat16, 28: torch.float8_e4m3fn}


def at(address: int, layout: tuple[int, int, int, int, int]) -> Tensor:
    """The matrix in memory: rows, columns, leading dimension, order (1 by columns, 2 by rows), type."""
    rows, columns, leading, order, number = layout
    size = leading * (rows if order == 2 else columns)
    memory = (ctypes.c_char * (DTYPES[number].itemsize * size)).from_address(address)
    flat = torch.frombuffer(memory, dtype=DTYPES[number])
    return flat.as_strided((rows, columns), (leading, 1) if order == 2 else (1, leading))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> PlayedLibrary:
    played = PlayedLibrary()
    monkeypatch.setattr(cusparselt, "_library", lambda: played)
    monkeypatch.setattr(cusparselt, "_handle", lambda device: cusparselt._structure())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    cusparselt._plan.cache_clear()
    return played


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dense_rows", [False, True])
def test_descriptors_say_where_the_matrices_are(library: Any, dense_rows: bool, transposed: bool) -> None:
    left = torch.randn(64, 128).bfloat16()
    packed = pack(left)
    dense = torch.randn(128, 96).bfloat16() if dense_rows else torch.randn(96, 128).bfloat16().T
    result = cusparselt.multiply(packed.buffer, 64, dense, 3, transposed)
    expected = unpack(packed).float() @ dense.float()
    assert result.shape == ((96, 64) if transposed else (64, 96))
    assert relative_error(result.T if transposed else result, expected) < 1e-2


def test_e4m3_is_multiplied_into_bfloat16(library: Any) -> None:
    packed = pack(torch.randn(64, 128).to(torch.float8_e4m3fn))
    dense = torch.randn(96, 128).to(torch.float8_e4m3fn).T
    result = cusparselt.multiply(packed.buffer, 64, dense, 3, False)
    assert result.dtype is torch.bfloat16
    assert relative_error(result, unpack(packed).float() @ dense.float()) < 1e-2


def test_a_plan_is_made_once(library: Any) -> None:
    packed, dense = pack(torch.randn(64, 128).bfloat16()), torch.randn(128, 96).bfloat16()
    for _ in range(3):
        cusparselt.multiply(packed.buffer, 64, dense, 3, False)
    assert library.calls.count("cusparseLtMatmul") == 3
    assert library.calls.count("cusparseLtMatmulPlanInit") == 1
    cusparselt.multiply(packed.buffer, 64, dense, 4, False)
    assert library.calls.count("cusparseLtMatmulPlanInit") == 2


def test_an_unknown_algorithm_is_an_error(library: Any) -> None:
    packed, dense = pack(torch.randn(64, 128).bfloat16()), torch.randn(128, 96).bfloat16()
    with pytest.raises(RuntimeError, match="AlgSetAttribute of cuSPARSELt failed with status 3"):
        cusparselt.multiply(packed.buffer, 64, dense, 7, False)
