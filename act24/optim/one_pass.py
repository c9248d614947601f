# pyright: reportInvalidTypeForm=false
"""AdamW's update in one pass over memory, for parameters whose moments are of another dtype.

PyTorch's fused kernel takes tensors of one dtype. With bfloat16 parameters and gradients and float32 moments
the update as a sequence of PyTorch's operations moves some 100 bytes a parameter; this kernel reads and
writes each of the four once, 22 bytes. It rounds in other places than that sequence, by float32's last bits.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from act24.compiler import jit, tl, triton
from act24.errors import Act24Error, ran_out_of_memory
from act24.operation import constant_when_compiled

#: Elements of a program. Each has four loads, which its threads have on their way at once.
_BLOCK = 1024

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: parameter, gradient, first and second moment, of one shape.
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


@jit
def _update(
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    lr,
    elements,
    gain1,
    beta2,
    gain2,
    root_scale,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    grad = tl.load(gradient + place, inside, other=0.0).to(tl.float32)
    mean = tl.load(exp_avg + place, inside, other=0.0)
    square = tl.load(exp_avg_sq + place, inside, other=0.0)
    value = tl.load(parameter + place, inside, other=0.0).to(tl.float32)
    mean += (grad - mean) * gain1
    square = square * beta2 + grad * grad * gain2
    direction = mean / (tl.sqrt(square) * root_scale + eps)
    value -= tl.load(lr) * (direction + weight_decay * value)
    tl.store(exp_avg + place, mean, inside)
    tl.store(exp_avg_sq + place, square, inside)
    tl.store(parameter + place, value.to(parameter.dtype.element_ty), inside)


def misfit(tensors: Tensors) -> str:
    """Why the kernel does not take them; empty if it does: float32 moments, all contiguous, nothing wider."""
    parameter, gradient, exp_avg, exp_avg_sq = tensors
    for what, tensor, known in (
        ("parameters", parameter, _DTYPES),
        ("gradients", gradient, _DTYPES),
        ("moments", exp_avg, (torch.float32,)),
        ("moments", exp_avg_sq, (torch.float32,)),
    ):
        if tensor.dtype not in known:
            return f"the kernel has no {what} in {str(tensor.dtype).removeprefix('torch.')}"
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "the kernel takes contiguous tensors"
    return "" if parameter.numel() else "the kernel takes no empty tensors"


def update_(
    each: Sequence[Tensors],
    *,
    step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`act24.optim.adamw_` of tensors that fit, on one CUDA device; launched for one after the other."""
    device = each[0][0].device
    if isinstance(lr, Tensor):
        rate = lr.detach().to(device, torch.float32, non_blocking=True)
    else:
        rate = torch.full((), lr, dtype=torch.float32, device=device)  # on the device, so nothing waits
    beta1, beta2 = betas
    # As in `adam_direction`: the corrections of both moments are in the denominator.
    correction = 1 - beta1**step
    numbers = (1 - beta1, beta2, 1 - beta2, correction / math.sqrt(1 - beta2**step), eps * correction)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for tensors in each:
            elements = tensors[0].numel()
            grid = (triton.cdiv(elements, _BLOCK),)
            _update[grid](*tensors, rate, elements, *numbers, weight_decay, BLOCK=_BLOCK)
    # As PyTorch's own operations do: who keeps what was made of these tensors sees that they are others now.
    increment_version([tensor for value, _, *moments in each for tensor in (value, *moments)])


@constant_when_compiled
def why_not_one_pass(device: torch.device) -> str:
    """Why the kernel is not used on a device; empty if it is. On first use it is held against float64, and
    what was found then holds as long as the process lives. Memory that ran out tells nothing of the kernel:
    the next to ask has it checked again.

    Raises:
        Act24Error: a CUDA graph is being captured, which cannot take the check.
    """
    if device.type != "cuda":
        return f"the kernel is for CUDA GPUs, this is {device.type}"
    if triton is None:
        return "Triton is not installed"
    if torch.cuda.is_current_stream_capturing():
        raise Act24Error(
            "the optimizer's kernel checks itself on first use: make one update before a capture"
        )
    try:
        return _found(device)
    except Exception as exception:
        if not ran_out_of_memory(exception):
            raise
        return "no memory was left for the kernel's check of itself, which the next update repeats"


@functools.cache  # of an answer; what is raised is not kept
def _found(device: torch.device) -> str:
    try:
        return "" if agrees(device) else "the kernel is wrong on this GPU"
    except Exception as exception:  # compilers and drivers raise whatever they like
        if ran_out_of_memory(exception):
            raise
        first, *_ = str(exception).strip().splitlines() or [""]
        return f"the kernel does not run on this GPU ({type(exception).__name__}: {first[:100]})"


@torch.no_grad()
def agrees(device: torch.device, update: Callable[..., None] = update_) -> bool:
    """Whether three updates of drawn tensors are those of the formula in float64, to float32's rounding and
    one rounding of each parameter."""
    generator = torch.Generator().manual_seed(0)
    numbers = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    for dtype in _DTYPES[:2]:
        drawn = torch.randn((4, 3 * _BLOCK + 7), generator=generator)
        value, *grads = drawn.to(device, dtype)
        tensors = (value, *(torch.zeros(value.shape, device=device) for _ in range(2)))
        for step, grad in enumerate(grads, start=1):
            # From what was found before, or roundings would add up.
            (value, mean, square), g = (t.double() for t in tensors), grad.double()
            mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g * g
            root = (square / (1 - 0.95**step)).sqrt()
            value = value - 1e-2 * (mean / (1 - 0.9**step) / (root + 1e-3) + 0.1 * value)
            update([(tensors[0], grad, *tensors[1:])], step=step, **numbers)
            found = [tensor.double() for tensor in tensors]
            unit = torch.finfo(dtype).eps * value.abs()  # half of it is what rounding to nearest takes
            near = [((found[0] - value).abs() <= unit + 1e-6).all()]
            for moment, expected in zip(found[1:], (mean, square), strict=True):
                near.append(torch.isclose(moment, expected, rtol=1e-5, atol=1e-7).all())
            if not all(near):
                return False
    return True
