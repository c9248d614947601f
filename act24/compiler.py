"""Triton, where it is installed: CPU builds of PyTorch come without it, and every module has to import."""

from __future__ import annotations

from typing import Any

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function: Any) -> Any:
    """`triton.jit`; without Triton a kernel is text that nobody launches."""
    return function if triton is None else triton.jit(function)


def jit_arithmetic(function: Any) -> Any:
    """A function of numbers and tensors alone, from a module that knows nothing of Triton, for kernels.

    The interpreter runs such a function as it stands, and refuses to wrap it.
    """
    compiled = jit(function)
    return compiled if triton is not None and isinstance(compiled, triton.JITFunction) else function
