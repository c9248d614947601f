"""What a device lacks for 2:4 products."""

from __future__ import annotations

import functools

import torch

from act24.compiler import triton
from act24.errors import ran_out_of_memory
from act24.operation import constant_when_compiled
from act24.sparse24.format import cusparselt
from act24.sparse24.format.multiply import TOLERANCE, library_product, relative_error
from act24.sparse24.format.packed import pack, unpack

#: Where the rule for products that nobody tuned was measured: H100 and H200.
_RULE_CAPABILITY = (9, 0)

#: The least compute capability with e4m3, for which `torch.compile` has no code below.
_FP8_CAPABILITY = (8, 9)


def layout_error(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """How far a product with our packing is from one with cuSPARSELt's own compressor, on a small matrix.

    Relative to the result: rounding apart zero, as long as the library reads the layout of
    `act24.sparse24.format.packed` for values of this dtype, bfloat16 or e4m3.
    """
    generator = torch.Generator(device).manual_seed(0)
    packed = pack(torch.randn(128, 256, generator=generator, device=device).to(dtype))
    dense = torch.randn(64, 256, generator=generator, device=device).to(dtype).T
    own = torch.ops.aten._cslt_compress(unpack(packed)).view_as(packed.buffer)
    ours, expected = (library_product(buffer, dense) for buffer in (packed.buffer, own))
    return relative_error(ours, expected)


@functools.cache
def obstacle(device: torch.device) -> str:
    """Why this device cannot run packed products; empty if it can.

    Looked at once a process: it is a fact about the machine. Whether the library reads our layout here, which
    is Hopper's, is told from a product, not from its version or the GPU's name.
    """
    if device.type != "cuda":
        return f"the kernels are for CUDA GPUs, this is {device.type}"
    if not torch.backends.cusparselt.is_available():
        return "this build of PyTorch has no cuSPARSELt"
    if triton is None:
        return "Triton is not installed"
    return _product_obstacle(device, torch.bfloat16)


@functools.cache
def fp8_obstacle(device: torch.device) -> str:
    """Why this device cannot run packed products in e4m3, as `obstacle` does."""
    return obstacle(device) or _product_obstacle(device, torch.float8_e4m3fn)


def _product_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the library's product of a small matrix of this dtype is not what it should be; empty if it is."""
    name = "bfloat16" if dtype is torch.bfloat16 else "e4m3"
    version = torch.backends.cusparselt.version()
    try:
        error = layout_error(device, dtype)
    except RuntimeError as exception:
        if ran_out_of_memory(exception):  # which is no fact about the machine, and would be kept as one
            raise
        return f"cuSPARSELt {version} does not multiply {name} here ({str(exception).splitlines()[0]})"
    if not error < TOLERANCE:
        return f"cuSPARSELt {version} reads another layout of {name} than ours (relative error {error:.2g})"
    # Waits for the device: now, and not while a graph is captured.
    cusparselt.multiplies(device, dtype)
    return ""


@constant_when_compiled
def obstacle_on(device: torch.device) -> str:
    """`obstacle`, as a constant of a compiled graph."""
    return obstacle(device)


@constant_when_compiled
def fp8_obstacle_on(device: torch.device) -> str:
    """`fp8_obstacle`, likewise."""
    return fp8_obstacle(device)


@constant_when_compiled
def rule_holds_on(device: torch.device) -> bool:
    """Whether the rule for shapes that nobody tuned was measured on such a device. Elsewhere a tuner has to
    have found the 2:4 products faster."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == _RULE_CAPABILITY


@constant_when_compiled
def why_no_fp8(device: torch.device) -> str:
    """Why a device cannot run e4m3, not even plain PyTorch compiled, as an error says it; empty if it can."""
    if device.type != "cuda" or (capability := torch.cuda.get_device_capability(device)) >= _FP8_CAPABILITY:
        return ""
    return (
        f"this GPU has compute capability {capability[0]}.{capability[1]}, and e4m3 begins with 8.9: leave "
        'out the pass fp8, and set precision = "bfloat16" for activation24'
    )
