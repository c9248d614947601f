"""cuSPARSELt's products with plans that are kept.

`torch._cslt_sparse_mm` makes descriptors and a plan anew at each call. That took the CPU 0.3 to 0.4 ms,
longer than the GPU runs many of these products. Here the same calls are made once for each shape,
layout and algorithm. The library is the one that PyTorch has loaded. Where that cannot be had, or its results
are not those of PyTorch's call bit for bit on a first try, `multiplies` says no, and PyTorch's call is used.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from act24.errors import ran_out_of_memory

#: Of CUDA's and cuSPARSELt's headers (0.8).
_ORDER_COLUMN, _ORDER_ROW, _COMPUTE_32F, _HALF_SPARSE = 1, 2, 2, 0
_CONFIG_ID, _ALIGNMENT = 0, 16
_TYPES = {torch.bfloat16: 14, torch.float8_e4m3fn: 28}

#: The library's structures are opaque: 512 bytes in 0.8, more in others.
_STRUCTURE = 16384

#: Plans kept: a model has a dozen, a tuner tries some dozens for each.
_PLANS = 1024


class _Plan(NamedTuple):
    """A plan, with everything that it may point to."""

    handle: Any
    plan: Any
    workspace: int
    others: tuple[Any, ...]


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("libcusparseLt.so.0")  # by the name under which it is in this process already


def _structure() -> Any:
    """Zeroed memory for one of the library's structures, at a multiple of 16 bytes."""
    memory = ctypes.create_string_buffer(_STRUCTURE + 16)
    return (ctypes.c_char * _STRUCTURE).from_buffer(memory, -ctypes.addressof(memory) % 16)


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} of cuSPARSELt failed with status {status}")


@functools.cache
def _handle(device: int) -> Any:
    handle = _structure()
    with torch.cuda.device(device):
        _call("cusparseLtInit", handle)
    return handle


@functools.lru_cache(maxsize=_PLANS)
def _plan(
    device: int,
    rows: int,
    inner: int,
    columns: int,
    dense_rows: bool,
    transposed: bool,
    algorithm: int,
    dtype: torch.dtype,
) -> _Plan:
    """As `torch._cslt_sparse_mm` makes it.

    Args:
        rows, inner, columns: the product is `[rows, inner] @ [inner, columns]`, the first one 2:4.
        dense_rows: the second one is contiguous; else its transpose is.
        transposed: the result is written as `[columns, rows]`.
        dtype: of both; the result is bfloat16.
    """
    handle = _handle(device)
    size, word = ctypes.c_int64, ctypes.c_uint32
    sparse, dense, result, product, choice, plan = (_structure() for _ in range(6))
    _call(
        "cusparseLtStructuredDescriptorInit",
        *(handle, sparse, size(rows), size(inner), size(inner), word(_ALIGNMENT)),
        *(_TYPES[dtype], _ORDER_ROW, _HALF_SPARSE),
    )
    stored = (inner, columns) if dense_rows else (columns, inner)
    _call(
        "cusparseLtDenseDescriptorInit",
        *(handle, dense, size(stored[0]), size(stored[1]), size(stored[1]), word(_ALIGNMENT)),
        *(_TYPES[dtype], _ORDER_ROW),
    )
    leading, order = (rows, _ORDER_COLUMN) if transposed else (columns, _ORDER_ROW)
    _call(
        "cusparseLtDenseDescriptorInit",
        *(handle, result, size(rows), size(columns), size(leading), word(_ALIGNMENT)),
        *(_TYPES[torch.bfloat16], order),
    )
    operations = (0, 0 if dense_rows else 1)
    matrices = (sparse, dense, result, result)
    _call("cusparseLtMatmulDescriptorInit", handle, product, *operations, *matrices, _COMPUTE_32F)
    _call("cusparseLtMatmulAlgSelectionInit", handle, choice, product, 0)
    number = ctypes.c_int(algorithm)
    _call(
        "cusparseLtMatmulAlgSetAttribute",
        *(handle, choice, _CONFIG_ID, ctypes.byref(number), ctypes.c_size_t(ctypes.sizeof(number))),
    )
    _call("cusparseLtMatmulPlanInit", handle, plan, product, choice)
    workspace = ctypes.c_size_t()
    _call("cusparseLtMatmulGetWorkspace", handle, plan, ctypes.byref(workspace))
    return _Plan(handle, plan, workspace.value, (sparse, dense, result, product, choice))


_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)


def multiply(packed: Tensor, rows: int, dense: Tensor, algorithm: int, transposed: bool) -> Tensor:
    """A packed 2:4 matrix `[rows, K]` times a dense one `[K, N]`, contiguous or the transpose of what is; of
    bfloat16 or e4m3 both.

    Returns:
        `[rows, N]`, or `[N, rows]`, bfloat16.

    Raises:
        RuntimeError: the library has no such algorithm for this GPU and these layouts.
    """
    inner, columns = dense.shape
    device = packed.device.index
    plan = _plan(device, rows, inner, columns, dense.is_contiguous(), transposed, algorithm, dense.dtype)
    shape = (columns, rows) if transposed else (rows, columns)
    result = dense.new_empty(shape, dtype=torch.bfloat16)
    workspace = dense.new_empty(plan.workspace, dtype=torch.uint8)
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    pointer = ctypes.c_void_p
    _call(
        "cusparseLtMatmul",
        *(plan.handle, plan.plan, ctypes.byref(_ONE), pointer(packed.data_ptr()), pointer(dense.data_ptr())),
        *(ctypes.byref(_ZERO), pointer(result.data_ptr()), pointer(result.data_ptr())),
        *(pointer(workspace.data_ptr()), ctypes.byref(stream), ctypes.c_int32(1)),
    )
    return result


@functools.cache
def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `multiply` gives what PyTorch's call gives, in every layout, bit for bit. Looked at once.

    Args:
        dtype: of the operands. In e4m3 the library has one layout.
    """
    if dtype not in _TYPES:
        return False
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
    left = draw(128, 256).view(128, 64, 4)
    left[..., 2:] = 0
    rows, columns = draw(256, 64).to(dtype), draw(64, 256).to(dtype).T
    layouts, out_dtype = [(columns, False), (columns, True), (rows, False), (rows, True)], None
    if dtype is torch.float8_e4m3fn:
        layouts, out_dtype = layouts[:1], torch.bfloat16
    try:
        packed = torch.ops.aten._cslt_compress(left.view(128, 256).to(dtype))
        for dense, transposed in layouts:
            expected = torch.ops.aten._cslt_sparse_mm(
                packed, dense, out_dtype=out_dtype, transpose_result=transposed
            )
            if not torch.equal(multiply(packed, 128, dense, 0, transposed), expected):
                return False
    except (OSError, AttributeError, RuntimeError) as error:
        if ran_out_of_memory(error):  # raised: False would be kept
            raise
        return False
    return True
