"""`activation24` with all six products in e4m3, four of them 2:4, forward and backward.

    h = x W_inᵀ        y  = a W_outᵀ     dW_outᵀ = aᵀ G         a  = T(f(h))
    dS = G W_out       dX = dZ W_in      dW_in   = dZᵀ x        dZ = f'(h) ∘ dS

Scales are made from the values themselves, so that nothing overflows and no state is kept. The entries of the
2:4 operands a and dZ differ most in size, so these have a scale for each row, which is a token, or, where
they are packed along the tokens, a feature. cuSPARSELt takes a single scale for its dense operand; so x, G,
W_in and W_out have one scale where they are multiplied with a 2:4 operand, and one for each row in the two
dense products.

The kernels that select two of four also write a and dZ in e4m3, so they need the scales before they know the
largest entries. Upper bounds are enough: the largest |h|, and the largest f'(h) times the largest |dS|, of
each row and of each feature. One read of h and one of dS find them. Where a bound is too large, entries below
a millionth of it become zero, and all others keep their precision. Scales of a are powers of two, so that a,
saved in e4m3, can be written again along the tokens with other scales without being rounded a second time;
its slope is computed from the same saved numbers.

A training loop may cast the weights once an update (`cast_weights`) and keep the result. Else they are cast
whenever they are read.

Backward saves xᵀ, 1 byte an entry, and a, 0.625 bytes a feature. All methods but naive relu² save the slope
too, 1 byte a feature more.

The reference is this same code with the references of its operators. Sizes that the packed format does not
take are filled up with zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.fp8.casts import OPERATORS_E4M3, Scaling, cast_both_ways
from act24.fp8.linear import ready_cast
from act24.operation import cast, once_differentiable
from act24.sparse24.feed_forward.forms import (
    Form,
    Network,
    State,
    Tensors,
    product_algorithms,
    why_never_packed,
)
from act24.sparse24.feed_forward.options import Options24, backward_of, method_of
from act24.sparse24.feed_forward.packed import algorithms_of, in_order, why_not_drawn
from act24.sparse24.feed_forward.statistics import (
    feature_wise_from_some_features,
    no_statistics,
    token_wise_from_counts,
)
from act24.sparse24.format.device import fp8_obstacle_on, obstacle_on
from act24.sparse24.format.fp8 import LARGEST, power_scales, scales_of
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.format.products import Kind
from act24.sparse24.kernels.shared.registry import form
from act24.sparse24.kernels.shared.self_check import kernel_obstacle_on
from act24.sparse24.pattern.scale import times_scale
from act24.sparse24.pattern.selection import densest_features

#: T and F have to be multiples of the first, widths of the second.
_TILE, _LOAD = 64, 16


class _Settings(NamedTuple):
    """The arguments that are no tensors: the options, whether gradients are wanted, whether kernels run."""

    options: Options24
    training: bool
    kernels: bool


class _PackedFp8(torch.autograd.Function):
    """On rows `[T, D]` that are in order already, all of bfloat16."""

    @staticmethod
    def forward(
        x: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        scale: Tensor | None,
        seed: Tensor | None,
        real: Tensor | None,
        order: Tensor | None,
        settings: _Settings,
        casts: tuple[Tensor, ...] | None,
        counter: Tensor | None,
    ) -> tuple[Tensor, ...]:
        options, training, kernels = settings
        rows = cast_both_ways(x, "rowwise", "tensorwise", turned=training, kernels=kernels)
        narrow, narrow_scale = casts[:2] if casts else _cast(weight_in, "rowwise", False, kernels)
        hidden = form("product_e4m3", kernels)(rows.narrow, narrow, rows.scale, narrow_scale)
        hidden = hidden if bias_in is None else hidden + bias_in
        by_token, by_feature = form("largest_magnitudes", kernels)(hidden, True, training)
        over, over_features = (_value_scales(largest, options) for largest in (by_token, by_feature))
        kernel = method_of(options).kernel
        assert kernel is not None
        packed, slope, counts, sums = form("pack_activation", kernels)(
            hidden,
            seed,
            real,
            options.function,
            kernel,
            training and kernel != "naive",
            False,
            (training and backward_of(options).dense_features) or options.statistics,
            options.statistics,
            order,
            over,
        )
        narrow, narrow_scale = casts[4:6] if casts else _cast(weight_out, "tensorwise", False, kernels)
        inference = not training and not options.statistics
        algorithm = _algorithms(x, weight_in, weight_out, options, inference)["y"]
        y = form("product24_e4m3", kernels)(packed, narrow, algorithm, False, None, None)
        y = times_scale(_scaled(y, (over * narrow_scale)[:, None]), scale)
        y = y if bias_out is None else y + bias_out
        return y, rows.turned, rows.turned_scale, packed, over, over_features, slope, counts, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight_in, _, weight_out, _, scale, _, real, _, settings, casts, ctx.counter = inputs
        _, *kept, _ = output
        ctx.mark_non_differentiable(*output[1:])
        turned = (*casts[2:4], *casts[6:]) if casts else (None,) * 4
        ctx.save_for_backward(weight_in, weight_out, scale, real, *turned, *kept)
        ctx.settings = settings

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        weight_in, weight_out, scale, real, *rest = ctx.saved_tensors
        (turned_in, scale_in, turned_out, scale_out), (turned, turned_scale, *saved) = rest[:4], rest[4:]
        options, _, kernels = ctx.settings
        need_x, need_weight_in, need_bias_in, need_weight_out, need_bias_out = ctx.needs_input_grad[:5]
        grad_y = grad_y.contiguous()
        grad = times_scale(grad_y, scale)
        given = ("rowwise", "tensorwise", True, need_weight_out, kernels, ctx.counter)
        grad_rows = cast_both_ways(grad, *given)
        if turned_out is None:
            turned_out, scale_out = _cast(weight_out, "rowwise", True, kernels)
        grad_activation = form("product_e4m3", kernels)(
            grad_rows.narrow, turned_out, grad_rows.scale, scale_out
        )
        hidden = _hidden_gradient(grad_activation, saved, real, ctx.settings)
        algorithms = _algorithms(grad_y, weight_in, weight_out, options, inference=False)
        grad_x = grad_weight_in = grad_weight_out = grad_bias_in = grad_bias_out = None
        if need_x:
            if turned_in is None:
                turned_in, scale_in = _cast(weight_in, "tensorwise", True, kernels)
            grad_x = form("product24_e4m3", kernels)(
                hidden.packed, turned_in, algorithms["grad_x"], False, None, None
            )
            grad_x = _scaled(grad_x, (hidden.by_token * scale_in)[:, None])
        if need_weight_in:
            sides = (*hidden.gradient_rows, hidden.index, turned, hidden.by_feature * turned_scale)
            grad_weight_in = _weight_gradient(*sides, algorithms.get("grad_weight_in"), False, kernels)
        if need_weight_out:
            over_features = saved[2]
            factors = over_features * grad_rows.turned_scale
            sides = (*hidden.value_rows, hidden.index, grad_rows.turned, factors)
            grad_weight_out = _weight_gradient(*sides, algorithms.get("grad_weight_out"), True, kernels)
        if need_bias_in:  # unpacks all of dZ once more; only networks with a bias pay for it
            values = unpack(Packed24(hidden.packed)).float()
            grad_bias_in = (values * hidden.by_token[:, None]).sum(0).bfloat16()
        if need_bias_out:
            if real is not None and backward_of(options).along_tokens:
                grad_y = torch.where(real[:, None], grad_y, 0)
            grad_bias_out = grad_y.sum(0)
        return grad_x, grad_weight_in, grad_bias_in, grad_weight_out, grad_bias_out, *(None,) * 7


def cast_weights(weight_in: Tensor, weight_out: Tensor, kernels: bool = True) -> tuple[Tensor, ...]:
    """What the products read of W_in `[F, D]` and W_out `[D_out, F]`: of each `act24.fp8.casts.CastE4m3`,
    over one scale beside a 2:4 operand and over one for each row else."""
    return (
        *cast_both_ways(weight_in, "rowwise", "tensorwise", kernels=kernels),
        *cast_both_ways(weight_out, "tensorwise", "rowwise", kernels=kernels),
    )


def ready_casts(casts: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Casts that were made before, of shapes as `cast_weights` has them, from e4m3 or its bytes; None where
    there are none."""
    if not casts:
        return None
    weight_in, weight_out = ready_cast(*casts[:4]), ready_cast(*casts[4:])
    return None if weight_in is None or weight_out is None else (*weight_in, *weight_out)


def _cast(weight: Tensor, scaling: Scaling, turned: bool, kernels: bool) -> tuple[Tensor, Tensor]:
    """A weight as it lies, or transposed, and its scales."""
    made = cast_both_ways(weight, scaling, scaling, not turned, turned, kernels)
    return made[2:] if turned else made[:2]


class _Hidden(NamedTuple):
    """dZ, and what else the weight gradients read, all in e4m3.

    Attributes:
        packed: dZ `[T, F]`, 2:4 along the features, over `by_token`.
        by_token, by_feature: float32 scales `[T]` and `[F]` of dZ.
        index: int64, the features that stay dense; None for none.
        value_rows, gradient_rows: the activation and dZ along the tokens, each as `_weight_gradient` takes
            it: packed `[F, T]`, and the features `index` as they are.
    """

    packed: Tensor
    by_token: Tensor
    by_feature: Tensor
    index: Tensor | None
    value_rows: tuple[Tensor, Tensor]
    gradient_rows: tuple[Tensor, Tensor]


def _hidden_gradient(grad: Tensor, saved: list[Tensor], real: Tensor | None, settings: _Settings) -> _Hidden:
    """From dS, the gradient of the activation `[T, F]`, to the operands of the products that follow.

    Args:
        saved: by forward: the packed activation, its scales by token and by feature, the slope (empty where
            it follows from the activation) and the counts of non-zeros by feature.
    """
    packed, over, over_features, slope, counts = saved
    options, _, kernels = settings
    by_token, by_feature = _gradient_scales(grad, slope, over, over_features, options, kernels)
    backward = backward_of(options)
    index = None
    if backward.along_tokens and backward.dense_features:
        index = densest_features(counts, options.dense_ratio)
    hidden, value_rows, hidden_rows, value_dense, hidden_dense = form("pack_gradient_e4m3", kernels)(
        grad,
        packed,
        over,
        slope if slope.numel() else None,
        # Exact weight gradients take a gradient at padding as any other.
        real if backward.along_tokens else None,
        index,
        by_token,
        over_features,
        by_feature,
        options.function,
        backward.along_tokens,
    )
    return _Hidden(
        hidden, by_token, by_feature, index, (value_rows, value_dense), (hidden_rows, hidden_dense)
    )


def _scaled(product: Tensor, factors: Tensor) -> Tensor:
    """A product of e4m3 with its scales put back, in bfloat16."""
    return (product * factors).bfloat16()


def _weight_gradient(
    packed: Tensor,
    dense: Tensor,
    index: Tensor | None,
    right: Tensor,
    factors: Tensor,
    algorithm: int | None,
    transposed: bool,
    kernels: bool,
) -> Tensor:
    """The gradient of W_in `[F, D]`, or of W_out, transposed `[D_out, F]`, from its two sides along the
    tokens.

    Args:
        packed: 2:4 `[F, T]`, in e4m3; not looked at without an algorithm.
        dense: the features `index` of it as they are, `[n, T]`; all of them without an algorithm.
        right: `[D, T]`, in e4m3.
        factors: float32 `[F]`, what the scales of both come to.
        algorithm: of the 2:4 product; None for an exact one.
    """
    if algorithm is not None:
        arguments = (
            packed,
            right,
            algorithm,
            transposed,
            *((None, None) if index is None else (dense, index)),
        )
        product = form("product24_e4m3", kernels)(*arguments)
        return _scaled(product, factors if transposed else factors[:, None])
    one = factors.new_ones(1)
    multiply = form("product_e4m3", kernels)
    return multiply(right, dense, one, factors) if transposed else multiply(dense, right, factors, one)


def _value_scales(largest: Tensor, options: Options24) -> Tensor:
    """Scales of the activation, from the largest |h|. A draw of mvue doubles an entry at most."""
    bound = largest.square() if options.function == "relu2" else largest
    return power_scales(bound * 2 if method_of(options).kernel == "mvue" else bound)


def _gradient_scales(
    grad: Tensor, slope: Tensor, over: Tensor, over_features: Tensor, options: Options24, kernels: bool
) -> tuple[Tensor, Tensor]:
    """Scales of dZ by token and by feature, from the largest |dS| and slopes."""
    find = form("largest_magnitudes", kernels)
    by_token, by_feature = find(grad, True, True)
    if slope.numel():
        slope_of_token, places = find(slope, True, True)
        slope_of_feature = places.view(-1, 2).amax(1).repeat_interleave(4)
        return scales_of(by_token * slope_of_token), scales_of(by_feature * slope_of_feature)
    if options.function == "relu2":
        by_token = by_token * (over * LARGEST).sqrt() * 2
        by_feature = by_feature * (over_features * LARGEST).sqrt() * 2
    return scales_of(by_token), scales_of(by_feature)


def _algorithms(
    rows: Tensor, weight_in: Tensor, weight_out: Tensor, options: Options24, inference: bool
) -> dict[Kind, int]:
    """Of the products for this many rows; on the reference they mean nothing."""
    exact = not backward_of(options).along_tokens
    kinds: tuple[Kind, ...] = (
        ("y", "grad_x") if exact else ("y", "grad_x", "grad_weight_in", "grad_weight_out")
    )
    found = algorithms_of(rows, weight_in, weight_out, options, inference)
    return found or dict.fromkeys(kinds, 0)


def fp8_activation24(
    tensors: Tensors, state: State, options: Options24, kernels: bool = True
) -> tuple[Tensor, Tensor]:
    """`act24.sparse24.feed_forward.operation.activation24` in e4m3.

    Args:
        tensors: of a floating dtype, of the shapes that the operation has, both linears among them.
        state, options: as there.
        kernels: where `PACKED_FP8` can run it; False for the operators' references, on any shape and device.
    """
    x, weight_in, bias_in, weight_out, bias_out = tensors
    assert x is not None
    assert weight_in is not None
    assert weight_out is not None
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    features, width_out = len(weight_in), len(weight_out)
    ordered = in_order(x, weight_in, state.real, options, training)
    rows, order, _, real = ordered
    tokens = len(rows)
    more = -tokens % _TILE if tokens else _TILE
    wide = (-features % _TILE, -weight_in.shape[1] % _LOAD, -width_out % _LOAD)
    if more:
        counted = rows.new_ones(tokens, dtype=torch.bool) if real is None else real
        real, rows = F.pad(counted, (0, more)), F.pad(rows, (0, 0, 0, more))
        order = None if order is None else torch.cat((order, torch.arange(tokens, tokens + more).to(order)))
    if any(wide):
        rows, weight_in = F.pad(rows, (0, wide[1])), F.pad(weight_in, (0, wide[1], 0, wide[0]))
        weight_out = F.pad(weight_out, (0, wide[0], 0, wide[2]))
        bias_in = None if bias_in is None else F.pad(bias_in, (0, wide[0]))
        bias_out = None if bias_out is None else F.pad(bias_out, (0, wide[2]))
    drawn = order if method_of(options).draws else None
    given = [
        None if t is None else cast(t, torch.bfloat16)
        for t in (rows, weight_in, bias_in, weight_out, bias_out)
    ]
    settings = _Settings(options, training, kernels)
    casts = None if any(wide) else state.casts
    y, _, _, packed, over, _, _, counts, sums = _PackedFp8.apply(
        *given, state.scale, state.seed, real, drawn, settings, casts, state.counter
    )
    y = ordered.put_back(y[:tokens, :width_out])
    y = cast(y, x.dtype).view(*x.shape[:-1], width_out)
    if not options.statistics:
        return y, no_statistics(y)
    statistics = token_wise_from_counts(tokens, counts[:features], sums, real)
    if backward_of(options).along_tokens:
        statistics = statistics + feature_wise_from_some_features(
            packed, counts, real, options, over, kernels
        )
    return y, statistics


def _condition(network: Network, options: Options24) -> str:
    """This library has to read our 8-bit layout here."""
    widths = (network.width, network.width_out)
    if reason := why_never_packed(network.tokens, network.features, widths) or obstacle_on(network.device):
        return reason
    if any(width % _LOAD for width in widths):
        return f"in fp8 widths {network.width} and {network.width_out} have to be multiples of {_LOAD}"
    if reason := fp8_obstacle_on(network.device) or kernel_obstacle_on(network.device, OPERATORS_E4M3):
        return reason
    if reason := why_not_drawn(network, options):
        return reason
    return "" if product_algorithms(network, options) else "cuSPARSELt has no algorithm for these products"


PACKED_FP8 = Form(
    name="packed e4m3",
    says="packed 2:4 products in e4m3",
    sparsifiers=("naive", "soft_threshold", "mvue"),
    functions=("relu2", "relu"),
    estimators=("masked",),
    backwards=("dense", "split_gemm", "sparse"),
    precisions=("fp8",),
    linears=True,
    scales=True,
    operators=("pack_activation:e4m3", "pack_gradient_e4m3", "gather_features:e4m3"),
    condition=_condition,
    run=fp8_activation24,
)
