"""2:4 activations behind relu² or relu (arXiv 2503.16672): what the pass `activation24` puts into a graph.

Of every 4 consecutive features of the activation the 2 largest stay. Squaring keeps the order of non-negative
numbers, so the two largest are selected by relu(h). Backward saves relu(h) alone, and computes the mask, the
2:4 values and the derivative from it again, with the same function.

This is the plain-PyTorch reference, masked dense products on any device, and the choice between it and the
kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.errors import Act24Error
from act24.operation import (
    cast_for_autocast,
    is_mapped,
    once_differentiable,
    operation,
    refuse_second_derivatives,
)
from act24.sparse24.feed_forward.forms import Form, Network, State, Tensors, is_inference, network_of
from act24.sparse24.feed_forward.masked import MASKED
from act24.sparse24.feed_forward.narrow import NARROW
from act24.sparse24.feed_forward.options import PLAIN, Options24, backward_of, estimator_of, method_of
from act24.sparse24.feed_forward.packed import PACKED
from act24.sparse24.feed_forward.packed_fp8 import PACKED_FP8, fp8_activation24, ready_casts
from act24.sparse24.feed_forward.statistics import (
    feature_wise_statistics,
    no_statistics,
    real_tokens,
    token_wise_statistics,
)
from act24.sparse24.format.device import why_no_fp8
from act24.sparse24.format.fp8 import linear_fp8
from act24.sparse24.pattern.feature_wise import sparsify_feature_wise, token_permutation
from act24.sparse24.pattern.scale import times_scale
from act24.sparse24.pattern.selection import densest
from act24.sparse24.pattern.token_wise import Sparse24, sparsify_token_wise

#: The forms, in the order in which they are asked. A network that none of them serves runs the reference.
FORMS: tuple[Form, ...] = (NARROW, PACKED_FP8, PACKED, MASKED)


def form_of(network: Network, options: Options24) -> Form | None:
    """The form in which a network runs; None for the reference."""
    for form in FORMS:
        if not form.why_not(network, options):
            return form
    return None


class _TokenGroups(NamedTuple):
    """The two sides of a weight gradient, a product that reduces over tokens.

    Attributes:
        real: boolean `[T]`, tokens that are no padding; None for all.
        permutation: int64 `[T]`, the order in which tokens are grouped; None as it is.
        dense: boolean `[F]`, the features that stay dense; None for none.
    """

    real: Tensor | None
    permutation: Tensor | None
    dense: Tensor | None

    def ordered(self, rows: Tensor) -> Tensor:
        """The dense side, `[T, n]`: padding zeroed, tokens in order."""
        rows = rows if self.real is None else rows * self.real[:, None]
        return rows if self.permutation is None else rows[self.permutation]

    def sparse(self, rows: Tensor) -> Tensor:
        """The side `[T, F]` that becomes 2:4 along the tokens."""
        return sparsify_feature_wise(self.ordered(rows), self.dense)


def _token_groups(positive: Tensor, pads: Tensor | None, options: Options24) -> _TokenGroups:
    real = real_tokens(pads)
    permutation = token_permutation(positive.shape[:-1], options.token_permutation, positive.device)
    if not backward_of(options).dense_features:
        return _TokenGroups(real, permutation, None)
    nonzero = _rows(positive) > 0
    counts = (nonzero if real is None else nonzero & real[:, None]).sum(0)
    return _TokenGroups(real, permutation, densest(counts, options.dense_ratio))


def _rows(tensor: Tensor) -> Tensor:
    """`[..., n]` as `[T, n]`; a single token is one row."""
    return tensor.reshape(-1, tensor.shape[-1])


def _sparse(positive: Tensor, seed: Tensor | None, options: Options24) -> Sparse24:
    return sparsify_token_wise(positive, seed, options.function, method_of(options).sparsifier)


def _statistics(positive: Tensor, sparse: Sparse24, pads: Tensor | None, options: Options24) -> Tensor:
    if not options.statistics:
        return no_statistics(positive)
    counts = token_wise_statistics(_rows(sparse.dense), _rows(sparse.mask), real_tokens(pads))
    if backward_of(options).along_tokens:
        groups = _token_groups(positive, pads, options)
        value = groups.ordered(_rows(sparse.value))
        counts += feature_wise_statistics(value, sparsify_feature_wise(value, groups.dense), groups.dense)
    return counts


class _Activation24(torch.autograd.Function):
    """The options come as a plain tuple, because `torch.func.vmap` takes named tuples among the arguments
    apart and makes them again with the mapped dimensions as values, which `Options24` would refuse."""

    generate_vmap_rule = True  # per-sample gradients: torch.func.vmap over torch.func.grad

    @staticmethod
    def forward(
        x: Tensor,
        weight_in: Tensor | None,
        bias_in: Tensor | None,
        weight_out: Tensor | None,
        bias_out: Tensor | None,
        scale: Tensor | None,
        seed: Tensor | None,
        pads: Tensor | None,
        fields: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = Options24(*fields)
        positive = torch.relu(x if weight_in is None else F.linear(x, weight_in, bias_in))
        sparse = _sparse(positive, seed, options)
        linear = linear_fp8 if options.precision == "fp8" else F.linear
        y = sparse.value if weight_out is None else linear(sparse.value, weight_out)
        y = times_scale(y, scale)
        y = y if bias_out is None else y + bias_out
        return y, _statistics(positive, sparse, pads, options), positive

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight_in, _, weight_out, _, scale, seed, pads, fields = inputs
        _, statistics, positive = output
        ctx.mark_non_differentiable(statistics, positive)
        x = None if weight_in is None else x  # else the input is h itself, of which relu(h) is enough
        ctx.save_for_backward(x, weight_in, weight_out, scale, seed, pads, positive)
        ctx.options = Options24(*fields)

    @staticmethod
    @once_differentiable  # relu(h) is saved as a constant, so a second derivative would be silently wrong
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight_in, weight_out, scale, seed, pads, positive = ctx.saved_tensors
        options: Options24 = ctx.options
        need_x, need_weight_in, need_bias_in, need_weight_out, need_bias_out = ctx.needs_input_grad[:5]

        along_tokens = backward_of(options).along_tokens
        if along_tokens and pads is not None and pads.ndim:
            grad_y = torch.where(pads[..., None], 0, grad_y)
        sparse = _sparse(positive, seed, options)
        grad_product = times_scale(grad_y, scale)
        # The slope of the masked estimator is zero where forward dropped an entry, so this gradient is 2:4
        # along the features as the activation is. Selecting two of four of the gradient anew would let it
        # flow into entries that forward had dropped; in the paper such a run diverges (3.735 beside 2.651).
        slope = estimator_of(options).slope(sparse)
        grad_hidden = slope * (grad_product if weight_out is None else grad_product @ weight_out)

        sparse_side = dense_side = _rows
        if along_tokens and (need_weight_in or need_weight_out):
            groups = _token_groups(positive, pads, options)
            sparse_side = lambda tensor: groups.sparse(_rows(tensor))  # noqa: E731
            dense_side = lambda tensor: groups.ordered(_rows(tensor))  # noqa: E731
        grad_x = grad_hidden if weight_in is None else grad_hidden @ weight_in if need_x else None
        return (
            grad_x,
            sparse_side(grad_hidden).T @ dense_side(x) if need_weight_in else None,
            _rows(grad_hidden).sum(0) if need_bias_in else None,
            dense_side(grad_product).T @ sparse_side(sparse.value) if need_weight_out else None,
            _rows(grad_y).sum(0) if need_bias_out else None,
            *(None,) * 4,
        )


def _whole_tiles(
    form: Form, tensors: Tensors, state: State, options: Options24, tokens: int
) -> tuple[Tensor, Tensor]:
    """A form run on so many tokens, the last of them zeros that nobody reads."""
    x, *others = tensors
    assert x is not None
    rows = _rows(x)
    if tokens == len(rows):
        return form.run(tensors, state, options)
    y, statistics = form.run((F.pad(rows, (0, 0, 0, tokens - len(rows))), *others), state, options)
    return y[: len(rows)].view(*x.shape[:-1], y.shape[-1]), statistics


@operation
def activation24(
    x: Tensor,
    weight_in: Tensor | None,
    bias_in: Tensor | None,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
    scale: Tensor | None = None,
    seed: Tensor | None = None,
    pads: Tensor | None = None,
    options: Options24 = PLAIN,
    casts: tuple[Tensor, ...] = (),
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """linear → relu² → 2:4 → linear; either linear may be missing.

        h = x W_inᵀ + b_in        y = β T(relu(h)²) W_outᵀ + b_out

    T makes every four consecutive features 2:4. Products of the forward and of dX have their 2:4 operand
    along the features, the weight gradients along the tokens. Saved for backward: x, the weights and relu(h).

    Args:
        x: `[..., D]`; the pre-activation h, `[..., F]`, where `weight_in` is None.
        weight_in: `[F, D]` or None, F a multiple of 4; bias_in: `[F]` or None.
        weight_out: `[D_out, F]` or None, and then y is the 2:4 activation itself, stored dense; there is no
            product then that `precision` could be about. As with `torch.relu`, backward may need this y:
            autograd refuses to write into it in place.
        bias_out: `[D_out]` or None.
        scale: β, a scalar; None for 1. It gets no gradient.
        seed: int64 scalar, needed by methods that draw (`"mvue"`); the same seed draws the same.
        pads: boolean, the shape of x without its last dimension: True for padding, which the statistics leave
            out, and a backward that selects along the tokens too: a gradient of y that is not zero there
            goes nowhere, neither to x nor to weights and biases. The dense backward is exact, and takes such
            a gradient as any other. (Behind a causal sequence it is zero.) None, or a scalar, for no padding.
        options: see `Options24`.
        casts: of these very weights, eight tensors (`packed_fp8.cast_weights`), which the products in e4m3
            then read; in e4m3 or its bytes. Empty, or without elements, and weights are cast where they are
            read.
        counter: where all products are in e4m3, as in `act24.fp8.linear.linear_fp8`, of the gradient of y.

    Returns:
        y `[..., D_out]` and the statistics (`act24.sparse24.feed_forward.statistics.STATISTICS`).

    Raises:
        ValueError: F is not a multiple of 4, or the method draws and there is no seed.
        Act24Error: fp8 on a GPU that has none.

    Source: arXiv 2503.16672, Fig. 4, and its fp8; soft thresholding from arXiv 2409.09099.
    """
    if method_of(options).draws and seed is None:
        raise ValueError(f"{options.method} draws at random: give a seed")
    if options.precision == "fp8" and weight_out is not None and (reason := why_no_fp8(x.device)):
        raise Act24Error(reason)
    refuse_second_derivatives(x, weight_in, weight_out)
    tensors = cast_for_autocast(x, weight_in, bias_in, weight_out, bias_out)
    inference = is_inference(tensors, options)
    network = network_of(tensors, scale is not None, inference)
    if inference and not is_mapped():
        # y is the same whatever the backward, and more forms know this one.
        forward = options._replace(backward="dense")
        if form := form_of(network, forward):
            return _whole_tiles(form, tensors, State(scale, seed), forward, network.tokens)
    elif not is_mapped() and (form := form_of(network, options)):
        state = State(scale, seed, real_tokens(pads), ready_casts(casts), counter)
        return form.run(tensors, state, options)
    if options.precision == "fp8" and not PACKED_FP8.why_never(network, options):
        if is_mapped():
            raise Act24Error(
                'activation24: its fp8 has no rule for torch.func.vmap: set precision = "bfloat16"'
            )
        state = State(scale, seed, real_tokens(pads), ready_casts(casts), counter)
        return fp8_activation24(tensors, state, options, kernels=False)
    return _Activation24.apply(*tensors, scale, seed, pads, tuple(options))[:2]
