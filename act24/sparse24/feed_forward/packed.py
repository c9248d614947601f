"""`activation24` on packed operands: one pass of a kernel on either way, and four 2:4 products of six.

The same function as the reference in `act24.sparse24.feed_forward.operation`, selection for selection; only
the rounding of sums differs. Saved for backward are x, the weights and the packed activation: 1.125 bytes a
feature in place of 2 (and 2 more for the slope under the random and the soft method), for with relu² the
slope is a root away.

Where weight gradients group tokens in another order, the whole network runs in that order: x and the gradient
of y are gathered, y and the gradient of x put back, all of them narrow, and nothing F-wide ever moves. Saved
then is x in that order in place of x, with the order and its inverse, 16 bytes a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from act24.sparse24.feed_forward.forms import Network, Tensors, product_algorithms
from act24.sparse24.feed_forward.statistics import STATISTICS, feature_wise_statistics
from act24.sparse24.format.fp8 import scaled
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.format.products import Kind
from act24.sparse24.kernels.gather_features import gather_features
from act24.sparse24.kernels.pack_activation import pack_activation
from act24.sparse24.kernels.pack_gradient import pack_gradient
from act24.sparse24.kernels.product24 import product24
from act24.sparse24.kernels.quantise_packed import quantise_packed
from act24.sparse24.kernels.quantise_rows import quantise_rows
from act24.sparse24.kernels.token_order import token_order
from act24.sparse24.kernels.unpack_gradient import unpack_gradient
from act24.sparse24.pattern.feature_wise import sparsify_feature_wise
from act24.sparse24.pattern.selection import densest_features
from act24.sparse24.pattern.token_wise import Options24

#: The statistics along the tokens look at every 64th feature.
_SAMPLE = 64


class _Reordered(torch.autograd.Function):
    """Rows in an order. The gradient of a plain gather adds up rows; this one takes them by the inverse."""

    @staticmethod
    def forward(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return rows[order]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, inverse = inputs
        ctx.save_for_backward(inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class _PackedActivation24(torch.autograd.Function):
    """On rows `[T, D]` that are in order already."""

    @staticmethod
    def forward(
        x: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        scale: Tensor | None,
        seed: Tensor | None,
        order: Tensor | None,
        real: Tensor | None,
        options: Options24,
        training: bool,
    ) -> tuple[Tensor, ...]:
        hidden = F.linear(x, weight_in, bias_in)
        packed, slope, counts, sums = pack_activation(
            hidden,
            seed,
            real,
            options.function,
            options.method,
            training and options.method != "naive",
            False,
            (training and options.backward == "split_gemm") or options.statistics,
            options.statistics,
            order,
        )
        algorithm = _algorithms(hidden, weight_in, weight_out, options)["y"]
        y = _forward_product(packed, weight_out, algorithm, options)
        y = y if scale is None else y * scale.to(y.dtype)
        y = y if bias_out is None else y + bias_out
        return y, packed, slope, counts, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight_in, _, weight_out, _, scale, _, _, real, options, _ = inputs
        _, packed, slope, counts, sums = output
        ctx.mark_non_differentiable(packed, slope, counts, sums)
        ctx.save_for_backward(x, weight_in, weight_out, scale, real, packed, slope, counts)
        ctx.options = options

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight_in, weight_out, scale, real, packed, slope, counts = ctx.saved_tensors
        options: Options24 = ctx.options
        need_x, need_weight_in, need_bias_in, need_weight_out, need_bias_out = ctx.needs_input_grad[:5]
        slope = slope if slope.numel() else None
        grad_product = grad_y if scale is None else grad_y * scale.to(grad_y.dtype)
        algorithms = _algorithms(x, weight_in, weight_out, options)

        grad_activation = grad_product @ weight_out
        grad_weight_in = grad_weight_out = None
        if options.backward == "dense":
            grad_hidden, value, dense = unpack_gradient(grad_activation, packed, slope, options.function)
            grad_weight_in = dense.T @ x if need_weight_in else None
            grad_weight_out = grad_product.T @ value if need_weight_out else None
        else:
            index = None
            if options.backward == "split_gemm":
                index = densest_features(counts, options.dense_ratio)
            grad_hidden, value_rows, hidden_rows, value_dense, hidden_dense = pack_gradient(
                grad_activation, packed, slope, real, index, options.function
            )
            if need_weight_in:
                grad_weight_in = product24(
                    hidden_rows, x.contiguous(), algorithms["grad_weight_in"], False, hidden_dense, index
                )
            if need_weight_out:
                algorithm = algorithms["grad_weight_out"]
                grad_weight_out = product24(
                    value_rows, grad_product.contiguous(), algorithm, True, value_dense, index
                )
        grad_x = None
        if need_x:
            grad_x = product24(grad_hidden, weight_in, algorithms["grad_x"], False, None, None)
        return (
            grad_x,
            grad_weight_in,
            # A pass of its own over all features, for models with biases only.
            unpack(Packed24(grad_hidden)).sum(0) if need_bias_in else None,
            grad_weight_out,
            grad_y.sum(0) if need_bias_out else None,
            *(None,) * 6,
        )


def _forward_product(packed: Tensor, weight_out: Tensor, algorithm: int, options: Options24) -> Tensor:
    """a W_outᵀ. In fp8 what is packed in e4m3 is packed from what backward needs in bfloat16 anyway."""
    if options.precision == "bfloat16":
        return product24(packed, weight_out.T, algorithm, False, None, None)
    narrow, scale = quantise_packed(packed)
    weight, columns = quantise_rows(weight_out)
    return scaled(product24(narrow, weight.T, algorithm, False, None, None), scale, columns)


def _algorithms(rows: Tensor, weight_in: Tensor, weight_out: Tensor, options: Options24) -> dict[Kind, int]:
    """Of the products for this many rows."""
    features, width = weight_in.shape
    network = Network(len(rows), features, width, len(weight_out), rows.dtype, rows.device)
    return product_algorithms(network, options)


def packed_activation24(
    tensors: Tensors, scale: Tensor | None, seed: Tensor | None, real: Tensor | None, options: Options24
) -> tuple[Tensor, Tensor]:
    """`act24.sparse24.feed_forward.operation.activation24` where `forms.why_not_packed` has nothing to say.

    Args:
        real: boolean `[T]`, the tokens that are no padding; None for all. The others as there.
    """
    x, weight_in, *others = tensors
    assert x is not None
    assert weight_in is not None
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    shape, kind = x.shape[:-1], options.token_permutation
    # Only weight gradients along the tokens, and their statistics, look at the order.
    permuted = options.backward != "dense" and kind != "none" and (training or options.statistics)
    rows, order, inverse = x.reshape(-1, x.shape[-1]), None, None
    if permuted:
        order, inverse = token_order(weight_in, list(shape), kind)
        rows = _Reordered.apply(rows, order, inverse)
        real = None if real is None else real[order]
    drawn = order if options.method == "mvue" else None
    y, packed, _, counts, sums = _PackedActivation24.apply(
        rows, weight_in, *others, scale, seed, drawn, real, options, training
    )
    y = _Reordered.apply(y, inverse, order) if permuted else y
    y = y.view(*shape, y.shape[-1])
    if not options.statistics:
        return y, y.new_zeros(len(STATISTICS), dtype=torch.float32)
    with torch.no_grad():
        return y, _statistics(Packed24(packed), counts, sums, real, options)


def token_statistics(tokens: int, counts: Tensor, sums: Tensor, real: Tensor | None) -> Tensor:
    """The statistics along the features from the kernel's counts `[F]` and sums; the others are zero."""
    number = sums.new_full((), tokens) if real is None else real.sum(dtype=torch.float32)
    crowded, dropped, energy, lost = sums
    elements = number * len(counts)
    token_wise = (elements, elements - counts.sum(), elements / 4, crowded, dropped, energy, lost)
    return torch.cat((torch.stack(token_wise), sums.new_zeros(len(STATISTICS) - len(token_wise))))


def _statistics(
    packed: Packed24,
    counts: Tensor,
    sums: Tensor,
    real: Tensor | None,
    options: Options24,
) -> Tensor:
    """The statistics of the reference from the kernel's sums. Along the tokens they are an estimate, from
    some features: the kernel that selects along the tokens runs in backward, too late."""
    tokens, features = packed.shape
    result = token_statistics(tokens, counts, sums, real)
    if options.backward == "dense":
        return result
    index = torch.arange(0, features, _SAMPLE, device=sums.device)
    value = gather_features(packed.buffer, index, real)
    dense = None
    if options.backward == "split_gemm":
        chosen = densest_features(counts, options.dense_ratio)
        dense = torch.zeros_like(counts, dtype=torch.bool).scatter(0, chosen, True)[index]
    kept = sparsify_feature_wise(value.T, dense)
    return result + feature_wise_statistics(value.T, kept, dense) * (features / len(index))
