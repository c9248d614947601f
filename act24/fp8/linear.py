"""A linear whose three products are in e4m3, forward and backward.

    y = x Wᵀ        dX = G W        dW = Gᵀ x

Each product reads both of its operands with the dimension that it sums over innermost, so x, G and W are cast
as they lie and transposed, from one read (`act24.fp8.casts`). What backward keeps of x is its transpose in
e4m3, a byte an element in place of two. Casts have no gradient of their own: straight through.

Where a device has no kernels for it, the same function runs in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.fp8.casts import OPERATORS_E4M3, SCALINGS, CastE4m3, Scaling, cast_both_ways
from act24.operation import cast, cast_for_autocast, once_differentiable, operation, refuse_second_derivatives
from act24.options import one_of
from act24.sparse24.format.device import why_no_fp8
from act24.sparse24.format.fp8 import SMALLEST, largest_of, scales_of
from act24.sparse24.kernels.shared.registry import form
from act24.sparse24.kernels.shared.self_check import kernel_obstacle_on

#: `underflow_counts` looks at every 16th token.
_TOKEN_SAMPLE = 16

#: What both sides of a weight have to be multiples of.
MULTIPLE = 16


def why_in_plain_pytorch(device: torch.device) -> str:
    """Why linears in e4m3 run in plain PyTorch on a device, with no gain in time; empty if they do not."""
    return kernel_obstacle_on(device, OPERATORS_E4M3)


def uses_kernels(device: torch.device, kernels: bool) -> bool:
    """Whether the operators of e4m3 are called with their kernels. True on a CPU too, where an operator runs
    its reference."""
    return kernels and (device.type != "cuda" or not why_in_plain_pytorch(device))


def cast_weight(weight: Tensor, scaling: Scaling, turned: bool = True, kernels: bool = True) -> CastE4m3:
    """What the products read of a weight `[out, in]`."""
    return cast_both_ways(weight, scaling, scaling, turned=turned, kernels=kernels)


def refuse_e4m3(weight: Tensor) -> None:
    """Refuse a weight `[out, in]` that cannot be multiplied with in e4m3.

    Raises:
        ValueError: it has a side that is no multiple of 16.
        Act24Error: it is on a GPU that has no e4m3.
    """
    if any(size % MULTIPLE for size in weight.shape):
        raise ValueError(f"e4m3 needs sides that are multiples of {MULTIPLE}, got {tuple(weight.shape)}")
    if reason := why_no_fp8(weight.device):
        raise Act24Error(reason)


def ready_cast(
    narrow: Tensor | None, scale: Tensor | None, turned: Tensor | None, turned_scale: Tensor | None
) -> tuple[Tensor, ...] | None:
    """The parts of a cast that was made before, of a weight `[out, in]` (`act24.fp8.casts.CastE4m3`), from
    e4m3 or its bytes; None where there is none."""
    if narrow is None or scale is None or turned is None or turned_scale is None or not narrow.numel():
        return None
    return narrow.view(torch.float8_e4m3fn), scale, turned.view(torch.float8_e4m3fn), turned_scale


class _LinearFp8(torch.autograd.Function):
    """On rows `[T, in]`."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ready: tuple[Tensor, ...] | None,
        scaling: Scaling,
        training: bool,
        kernels: bool,
        counter: Tensor | None,
        exact_grad_x: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = cast_both_ways(x, scaling, scaling, turned=training, kernels=kernels)
        narrow, scale = ready[:2] if ready else cast_weight(weight, scaling, False, kernels)[:2]
        y = cast(form("product_e4m3", kernels)(rows.narrow, narrow, rows.scale, scale), x.dtype)
        return y if bias is None else y + bias, rows.turned, rows.turned_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ready, ctx.scaling, _, ctx.kernels, ctx.counter, ctx.exact_grad_x = inputs
        _, turned, turned_scale = output
        ctx.mark_non_differentiable(turned, turned_scale)
        # A weight that came without a cast is cast again in backward, so that no cast of a sharded weight is
        # kept.
        kept = ready[2:] if ready and not ctx.exact_grad_x else (weight,)
        ctx.save_for_backward(turned, turned_scale, *kept)
        ctx.dtypes = x.dtype, weight.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        turned, turned_scale, *rest = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_y, multiply = grad_y.contiguous(), form("product_e4m3", ctx.kernels)
        by_feature: Scaling = "rowwise" if ctx.exact_grad_x else ctx.scaling
        given = (ctx.scaling, by_feature, need_x and not ctx.exact_grad_x, need_weight)
        grad = cast_both_ways(grad_y, *given, ctx.kernels, ctx.counter) if any(given[2:]) else None
        grad_x = grad_weight = None
        if need_x and ctx.exact_grad_x:
            grad_x = grad_y @ rest[0]
        elif need_x:
            assert grad is not None
            if len(rest) == 1:
                weight = cast_both_ways(rest[0], ctx.scaling, ctx.scaling, narrow=False, kernels=ctx.kernels)
                rest = [weight.turned, weight.turned_scale]
            grad_x = cast(multiply(grad.narrow, rest[0], grad.scale, rest[1]), ctx.dtypes[0])
        if need_weight:
            assert grad is not None
            grad_weight = multiply(grad.turned, turned, grad.turned_scale, turned_scale)
            grad_weight = cast(grad_weight, ctx.dtypes[1])
        return grad_x, grad_weight, grad_y.sum(0) if need_bias else None, *(None,) * 6


@operation
def linear_fp8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    narrow: Tensor | None = None,
    scale: Tensor | None = None,
    turned: Tensor | None = None,
    turned_scale: Tensor | None = None,
    scaling: Scaling = "rowwise",
    kernels: bool = True,
    counter: Tensor | None = None,
    exact_grad_x: bool = False,
) -> Tensor:
    """A linear in e4m3: y = x Wᵀ + b, dX = G W, dW = Gᵀ x, each product rounded to bfloat16.

    Args:
        x: `[..., in]`, of a floating dtype.
        weight: `[out, in]`, multiples of 16, of the dtype of x (or any under autocast).
        bias: `[out]` or None.
        narrow, scale, turned, turned_scale: of this very weight (`cast_weight`), which products then read; in
            e4m3 or its bytes. None, or no elements, and it is cast where it is needed.
        scaling: `"rowwise"`: a scale for each row of an operand, that is for each token in y and dX, for each
            feature in dW; `"tensorwise"`: one for each tensor.
        kernels: by kernels and cuBLAS, where the device has them; False for plain PyTorch.
        counter: float32 `[2]`, to which backward adds what becomes zero of the gradient of y, as
            `act24.fp8.casts.cast_both_ways` counts it; None: nothing is counted.
        exact_grad_x: dX is a product in the dtype of x, and in dW the gradient has a scale for each feature.
            Meant for the head. Its gradient is softmax minus target, in which most entries are too small for
            e4m3 beside the target's. Rounding them to zero would change dX in the same direction for every
            token.

    Returns:
        `[..., out]` in the dtype of x. It can be differentiated once. A token with NaN or infinity comes out
        as NaN; tensorwise, all tokens do.

    Raises:
        OptionError: there is no such scaling.
        ValueError: the weight has a side that is no multiple of 16.
        Act24Error: a GPU that has no e4m3.
    """
    one_of("linear_fp8", "scaling", scaling, SCALINGS)
    refuse_e4m3(weight)
    refuse_second_derivatives(x, weight)
    cast_x, cast_w, cast_bias = cast_for_autocast(x, weight, bias)
    assert cast_x is not None
    assert cast_w is not None
    ready = ready_cast(narrow, scale, turned, turned_scale)
    training = torch.is_grad_enabled() and cast_w.requires_grad
    # On a CPU the operators are their references.
    kernels = uses_kernels(x.device, kernels)
    rows = cast_x.reshape(-1, cast_x.shape[-1])
    y, _, _ = _LinearFp8.apply(
        rows, cast_w, cast_bias, ready, scaling, training, kernels, counter, exact_grad_x
    )
    return y.view(*x.shape[:-1], len(weight))


@operation
def underflow_counts(x: Tensor, scaling: Scaling) -> Tensor:
    """Count the entries of every 16th token that become zero in e4m3. None can overflow, because scales are
    made from the values themselves.

    Args:
        x: `[..., in]`, as the linear gets it.
        scaling: the linear's.

    Returns:
        float32 `[2]`: entries that are not zero, and those of them that are in e4m3.

    Raises:
        OptionError: there is no such scaling.
    """
    one_of("underflow_counts", "scaling", scaling, SCALINGS)
    rows = x.detach().reshape(-1, x.shape[-1])[::_TOKEN_SAMPLE].float().abs()
    largest = largest_of(rows, 1)[:, None] if scaling == "rowwise" else largest_of(rows.flatten(), 0)
    nonzero = rows > 0
    # Half of the smallest number is a tie, which goes to zero.
    lost = nonzero & (rows <= scales_of(largest) * (SMALLEST / 2))
    return torch.stack((nonzero.sum(dtype=torch.float32), lost.sum(dtype=torch.float32)))
