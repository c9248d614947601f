"""`activation24` on packed operands: one pass of a kernel on either way, and four 2:4 products of six.

It computes the same function as the reference in `act24.sparse24.feed_forward.operation` and selects the same
entries; only sums are rounded differently. For backward it saves x, the weights and the packed activation,
which takes 1.125 bytes a feature where relu(h) takes 2. With naive relu² nothing else is needed, because the
slope 2 relu(h) is twice the square root of the activation. The other methods save the slope too, 1 byte a
feature more.

Where weight gradients group tokens in another order, the whole network runs in that order: the rows of x and
of the gradient of y are permuted first, and those of y and of the gradient of x are put back at the end.
These four are only as wide as the model; tensors with F columns are never permuted. Backward then saves x in
that order, and the order and its inverse, 16 bytes a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.operation import once_differentiable
from act24.sparse24.feed_forward.forms import (
    Form,
    Network,
    State,
    Tensors,
    product_algorithms,
    why_never_packed,
)
from act24.sparse24.feed_forward.options import Options24, backward_of, method_of
from act24.sparse24.feed_forward.statistics import (
    feature_wise_from_some_features,
    no_statistics,
    token_wise_from_counts,
)
from act24.sparse24.format.device import obstacle_on
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.format.products import Kind
from act24.sparse24.kernels.pack_activation import pack_activation
from act24.sparse24.kernels.pack_gradient import pack_gradient
from act24.sparse24.kernels.product24 import product24
from act24.sparse24.kernels.shared.self_check import DRAWN_ACTIVATION, kernel_obstacle_on
from act24.sparse24.kernels.token_order import token_order
from act24.sparse24.kernels.unpack_gradient import unpack_gradient
from act24.sparse24.pattern.scale import times_scale
from act24.sparse24.pattern.selection import densest_features


class Reordered(torch.autograd.Function):
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
        real: Tensor | None,
        order: Tensor | None,
        options: Options24,
        training: bool,
    ) -> tuple[Tensor, ...]:
        hidden = F.linear(x, weight_in, bias_in)
        kernel = method_of(options).kernel
        assert kernel is not None
        packed, slope, counts, sums = pack_activation(
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
        )
        inference = not training and not options.statistics
        algorithm = algorithms_of(hidden, weight_in, weight_out, options, inference)["y"]
        y = times_scale(product24(packed, weight_out.T, algorithm, False, None, None), scale)
        y = y if bias_out is None else y + bias_out
        return y, packed, slope, counts, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight_in, _, weight_out, _, scale, _, real, _, options, _ = inputs
        _, packed, slope, counts, sums = output
        ctx.mark_non_differentiable(packed, slope, counts, sums)
        ctx.save_for_backward(x, weight_in, weight_out, scale, real, packed, slope, counts)
        ctx.options = options

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight_in, weight_out, scale, real, packed, slope, counts = ctx.saved_tensors
        need_x, need_weight_in, need_bias_in, need_weight_out, need_bias_out = ctx.needs_input_grad[:5]
        grad_product = times_scale(grad_y, scale)
        grad_activation = grad_product @ weight_out
        saved = _Saved(packed, slope if slope.numel() else None, counts, real)
        algorithms = algorithms_of(x, weight_in, weight_out, ctx.options, inference=False)
        sides = x if need_weight_in else None, grad_product if need_weight_out else None
        gradients = _sparse_gradients if backward_of(ctx.options).along_tokens else _exact_gradients
        grad_hidden, grad_weight_in, grad_weight_out = gradients(
            grad_activation, saved, *sides, ctx.options, algorithms
        )
        grad_x = None
        if need_x:
            grad_x = product24(grad_hidden, weight_in, algorithms["grad_x"], False, None, None)
        # This unpacks all of dZ once more; only networks with a bias pay for it.
        grad_bias_in = unpack(Packed24(grad_hidden)).sum(0) if need_bias_in else None
        grad_bias_out = None
        if need_bias_out:
            if real is not None and backward_of(ctx.options).along_tokens:
                grad_y = torch.where(real[:, None], grad_y, 0)
            grad_bias_out = grad_y.sum(0)
        return grad_x, grad_weight_in, grad_bias_in, grad_weight_out, grad_bias_out, *(None,) * 6


class _Saved(NamedTuple):
    """What forward left: the packed activation, its slope (None: made from it), the non-zeros of each feature
    where they were counted, and the tokens that are no padding."""

    packed: Tensor
    slope: Tensor | None
    counts: Tensor
    real: Tensor | None


def _exact_gradients(
    grad_activation: Tensor,
    saved: _Saved,
    x: Tensor | None,
    grad_product: Tensor | None,
    options: Options24,
    algorithms: dict[Kind, int],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dZ packed along the features, and dW_in = dZᵀ x and dW_out = Gᵀ a as dense products.

    Args:
        grad_activation: `[T, F]`.
        x: `[T, D]`; None where dW_in is not asked for.
        grad_product: G, `[T, D_out]`; None where dW_out is not asked for.
    """
    grad_hidden, value, dense = unpack_gradient(grad_activation, saved.packed, saved.slope, options.function)
    grad_weight_in = None if x is None else dense.T @ x
    grad_weight_out = None if grad_product is None else grad_product.T @ value
    return grad_hidden, grad_weight_in, grad_weight_out


def _sparse_gradients(
    grad_activation: Tensor,
    saved: _Saved,
    x: Tensor | None,
    grad_product: Tensor | None,
    options: Options24,
    algorithms: dict[Kind, int],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `_exact_gradients`, with dZᵀ and aᵀ made 2:4 along the tokens. The rows of the densest features are
    computed by dense products instead. Arguments as there."""
    index = None
    if backward_of(options).dense_features:
        index = densest_features(saved.counts, options.dense_ratio)
    grad_hidden, value_rows, hidden_rows, value_dense, hidden_dense = pack_gradient(
        grad_activation, saved.packed, saved.slope, saved.real, index, options.function
    )
    grad_weight_in = grad_weight_out = None
    if x is not None:
        algorithm = algorithms["grad_weight_in"]
        grad_weight_in = product24(hidden_rows, x.contiguous(), algorithm, False, hidden_dense, index)
    if grad_product is not None:
        algorithm = algorithms["grad_weight_out"]
        grad_weight_out = product24(
            value_rows, grad_product.contiguous(), algorithm, True, value_dense, index
        )
    return grad_hidden, grad_weight_in, grad_weight_out


def algorithms_of(
    rows: Tensor, weight_in: Tensor, weight_out: Tensor, options: Options24, inference: bool
) -> dict[Kind, int]:
    """The algorithms of the 2:4 products of a network `[F, D]`, `[D_out, F]`, for as many rows `[T, n]`."""
    features, width = weight_in.shape
    network = Network(
        len(rows), features, width, len(weight_out), rows.dtype, rows.device, inference=inference
    )
    return product_algorithms(network, options)


class Ordered(NamedTuple):
    """The tokens of a network in the order in which its weight gradients group them.

    Attributes:
        rows: `[T, D]`, in that order.
        order, inverse: int64 `[T]`; None where tokens stay where they are.
        real: boolean `[T]`, in that order, the tokens that are no padding; None for all.
    """

    rows: Tensor
    order: Tensor | None
    inverse: Tensor | None
    real: Tensor | None

    def put_back(self, y: Tensor) -> Tensor:
        """Results `[T, n]` in the order of the input."""
        return y if self.order is None else Reordered.apply(y, self.inverse, self.order)


def in_order(
    x: Tensor, weight_in: Tensor, real: Tensor | None, options: Options24, training: bool
) -> Ordered:
    """The tokens of x `[..., D]` in order: only weight gradients along the tokens, and their statistics, look
    at it. `weight_in`, `[F, D]`, and `real` as the operation has them."""
    rows, kind = x.reshape(-1, x.shape[-1]), options.token_permutation
    used = backward_of(options).along_tokens and (training or options.statistics)
    if kind == "none" or not used:
        return Ordered(rows, None, None, real)
    order, inverse = token_order(weight_in, list(x.shape[:-1]), kind)
    rows = Reordered.apply(rows, order, inverse)
    return Ordered(rows, order, inverse, None if real is None else real[order])


def packed_activation24(tensors: Tensors, state: State, options: Options24) -> tuple[Tensor, Tensor]:
    """`act24.sparse24.feed_forward.operation.activation24` where `PACKED` can run it.

    Args:
        tensors: in bfloat16, of the shapes that the operation has, both linears among them.
        state, options: as there.
    """
    x, weight_in, *others = tensors
    assert x is not None
    assert weight_in is not None
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    ordered = in_order(x, weight_in, state.real, options, training)
    rows, order, _, real = ordered
    drawn = order if method_of(options).draws else None
    y, packed, _, counts, sums = _PackedActivation24.apply(
        rows, weight_in, *others, state.scale, state.seed, real, drawn, options, training
    )
    y = ordered.put_back(y)
    y = y.view(*x.shape[:-1], y.shape[-1])
    if not options.statistics:
        return y, no_statistics(y)
    statistics = token_wise_from_counts(len(rows), counts, sums, real)
    if backward_of(options).along_tokens:
        statistics = statistics + feature_wise_from_some_features(packed, counts, real, options)
    return y, statistics


def why_not_drawn(network: Network, options: Options24) -> str:
    """Why the kernel that packs an activation cannot draw it, where the method draws; empty if it can."""
    if method_of(options).kernel != "mvue":
        return ""
    return kernel_obstacle_on(network.device, (DRAWN_ACTIVATION,))


def _condition(network: Network, options: Options24) -> str:
    """This library has to read our layout here, and the products have to be faster than dense ones."""
    widths = (network.width, network.width_out)
    if reason := why_never_packed(network.tokens, network.features, widths) or obstacle_on(network.device):
        return reason
    if reason := why_not_drawn(network, options):
        return reason
    if not product_algorithms(network, options):
        return (
            f"dense products are faster at T {network.tokens}, F {network.features}, widths {network.width} "
            f"and {network.width_out}, or nobody tuned these products on this GPU"
        )
    return ""


PACKED = Form(
    name="packed",
    says="packed 2:4 products",
    sparsifiers=("naive", "soft_threshold", "mvue"),
    functions=("relu2", "relu"),
    estimators=("masked",),
    backwards=("dense", "split_gemm", "sparse"),
    precisions=("bfloat16",),
    linears=True,
    scales=True,
    operators=("pack_activation", "pack_gradient", "unpack_gradient", "gather_features"),
    condition=_condition,
    run=packed_activation24,
)
