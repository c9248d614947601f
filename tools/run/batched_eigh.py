"""Symmetric eigendecompositions of a whole stack in one call.

torch.linalg.eigh gives stacks to cuSOLVER's batched routine up to 32 × 32 only, and beyond that decomposes
one matrix after the other (pytorch issue 175585): reported there as 4 to 19 times slower for 64 matrices of
512 × 512. So the routine, `cusolverDnXsyevBatched` (CUDA 12.6.2 and later), is called in the library that
PyTorch has loaded. Wherever that does not work, torch.linalg.eigh does the same.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

_WITH_VECTORS, _LOWER = 1, 0  # cusolverEigMode_t, cublasFillMode_t
_DATA_TYPES = {torch.float32: 0, torch.float64: 1}  # cudaDataType
_LARGEST_OF_TORCH = 32


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh for `[n, k, k]`: ascending eigenvalues `[n, k]`, eigenvectors in columns."""
    if _is_for_cusolver(matrices):
        solved = _solve(matrices)
        if solved is not None:
            return solved
    return torch.linalg.eigh(matrices)


def describe_eigh(device: torch.device) -> str:
    """Which way stacks of matrices go on this device."""
    if device.type != "cuda":
        return "torch.linalg.eigh"
    library = _library()
    return "cuSOLVER XsyevBatched" if library else "torch.linalg.eigh, one matrix after the other"


def _is_for_cusolver(matrices: Tensor) -> bool:
    large = matrices.ndim == 3 and matrices.shape[0] > 1 and matrices.shape[-1] > _LARGEST_OF_TORCH
    return large and matrices.is_cuda and matrices.dtype in _DATA_TYPES and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    """cuSOLVER as PyTorch loaded it, or None where it has no batched routine."""
    torch.linalg.eigh(torch.eye(2, device="cuda"))  # PyTorch loads it at first use
    version = int((torch.version.cuda or "0").split(".")[0]) - 1  # CUDA 13 brings cuSOLVER 12
    try:
        library = ctypes.CDLL(f"libcusolver.so.{version}")
        return library if library.cusolverDnXsyevBatched else None
    except (OSError, AttributeError):
        return None


@cache
def _handles(device: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p] | None:
    """cuSOLVER's handle and parameters for a device; they live as long as the process."""
    library = _library()
    handle, parameters = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        if library is None or library.cusolverDnCreate(ctypes.byref(handle)):
            return None
    return None if library.cusolverDnCreateParams(ctypes.byref(parameters)) else (handle, parameters)


def _solve(matrices: Tensor) -> tuple[Tensor, Tensor] | None:
    """The decomposition, or None where a call fails or a matrix does not converge."""
    library, handles = _library(), _handles(matrices.get_device())
    if library is None or handles is None:
        return None
    vectors = matrices.clone(memory_format=torch.contiguous_format)  # overwritten
    count, size = vectors.shape[:2]
    values = vectors.new_empty(count, size)
    failed = torch.empty(count, dtype=torch.int32, device=vectors.device)
    kind, pointer = ctypes.c_int(_DATA_TYPES[vectors.dtype]), ctypes.c_void_p
    problem = (
        *handles,
        ctypes.c_int(_WITH_VECTORS),
        ctypes.c_int(_LOWER),
        ctypes.c_int64(size),
        kind,
        pointer(vectors.data_ptr()),
        ctypes.c_int64(size),
        kind,
        pointer(values.data_ptr()),
        kind,
    )
    on_device, on_host = ctypes.c_size_t(), ctypes.c_size_t()
    with torch.cuda.device(vectors.device):
        stream = pointer(torch.cuda.current_stream().cuda_stream)
        if library.cusolverDnSetStream(handles[0], stream):
            return None
        sizes = (ctypes.byref(on_device), ctypes.byref(on_host))
        if library.cusolverDnXsyevBatched_bufferSize(*problem, *sizes, ctypes.c_int64(count)):
            return None
        workspace = torch.empty(on_device.value, dtype=torch.uint8, device=vectors.device)
        host_workspace = ctypes.create_string_buffer(max(1, on_host.value))
        status = library.cusolverDnXsyevBatched(
            *problem,
            pointer(workspace.data_ptr()),
            on_device,
            host_workspace,
            on_host,
            pointer(failed.data_ptr()),
            ctypes.c_int64(count),
        )
    # Waits for the device, and so for the last use of the host's workspace.
    if status or bool(failed.any()):
        return None
    return values, vectors.mT  # column-major there: its columns are the rows here
