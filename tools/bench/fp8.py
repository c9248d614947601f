"""`act24 bench fp8`: what e4m3 gives the products of a feed-forward network and of the head, the passes that
it costs, and its errors (`fp8_scales`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch

from act24.fp8.casts import Scaling, cast_both_ways
from act24.fp8.linear import cast_weight
from act24.loss import CHUNK_TOKENS, cross_entropy_sum
from act24.sparse24.format.fp8 import largest_of, power_scales, scales_of
from act24.sparse24.format.multiply import relative_error
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.format.products import feed_forward_products
from act24.sparse24.format.tuner import tuned
from act24.sparse24.kernels.largest_magnitudes import largest_magnitudes
from act24.sparse24.kernels.pack_activation import pack_activation
from act24.sparse24.kernels.pack_gradient_e4m3 import pack_gradient_e4m3
from act24.sparse24.kernels.product24_e4m3 import product24_e4m3
from act24.sparse24.kernels.product_e4m3 import product_e4m3
from act24.tools.bench.fp8_scales import bench_scales
from act24.tools.bench.rows import Row, graph_milliseconds, milliseconds, needed_gpu

#: T, width, F.
SHAPE = (16384, 4096, 16384)


def bench_fp8(shape: tuple[int, int, int] = SHAPE) -> list[Row]:
    """Products in e4m3, dense and 2:4, beside the dense ones in bfloat16; the passes that e4m3 adds or
    changes, beside a copy of the bytes that they move; and what it costs in accuracy."""
    device = needed_gpu()
    tokens, width, features = shape
    title = f"{tokens}×{width}×{features}"
    draw = lambda *size: torch.randn(*size, device=device).bfloat16()  # noqa: E731
    rows = []
    for kind, product in feed_forward_products(tokens, width, features, width, False, True).items():
        found, _ = tuned(product, graph_milliseconds, device)
        name = f"fp8 product {kind}, 2:4, {title}, algorithm {found.algorithm}"
        rows.append(Row(name, found.sparse, found.dense, "ms", note="dense bf16"))
    for name, (m, n, k) in {
        "h, dS": (tokens, features, width),
        "y, dX": (tokens, width, features),
        "dW": (features, width, tokens),
    }.items():
        left, right = draw(m, k), draw(n, k)
        sides = [cast_both_ways(side, "rowwise", "rowwise", turned=False) for side in (left, right)]
        operands = (sides[0].narrow, sides[1].narrow, sides[0].scale, sides[1].scale)
        ours = graph_milliseconds(lambda operands=operands: product_e4m3(*operands))
        other = graph_milliseconds(lambda left=left, right=right: left @ right.T)
        rows.append(Row(f"fp8 product {name}, dense, {title}", ours, other, "ms", note="dense bf16"))
    rows += _passes(tokens, width, features, title)
    rows += _errors(width, title)
    rows += _head(tokens, width)
    return rows + bench_scales(device=device)


def _passes(tokens: int, width: int, features: int, title: str) -> Iterator[Row]:
    x, hidden, grad = (
        torch.randn(tokens, size, device="cuda").bfloat16() for size in (width, features, features)
    )
    over, over_features = power_scales(largest_of(hidden, 1) ** 2), power_scales(largest_of(hidden, 0) ** 2)
    by_token, by_feature = scales_of(largest_of(grad, 1) * 9), scales_of(largest_of(grad, 0) * 9)
    packing = (hidden, None, None, "relu2", "naive", False, False, False, False, None, over)
    saved, *_ = pack_activation(*packing)
    gradient = (grad, saved, over, None, None, None, by_token, over_features, by_feature, "relu2", True)
    wide, narrow = tokens * features, tokens * width
    calls: dict[str, tuple[float, Callable[[], Any]]] = {
        "casts of x": (narrow * 6, lambda: cast_both_ways(x, "rowwise", "tensorwise")),
        "largest |h|": (wide * 2, lambda: largest_magnitudes(hidden, True, True)),
        "packing forward": (wide * 2.625, lambda: pack_activation(*packing)),
        "packing backward": (wide * 4.5, lambda: pack_gradient_e4m3(*gradient)),
    }
    for name, (size, call) in calls.items():
        source = torch.empty(int(size / 2), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = graph_milliseconds(lambda source=source, target=target: target.copy_(source))
        yield Row(f"fp8 {name}, {title}", graph_milliseconds(call), copy, "ms", note="a copy")


def _head(tokens: int, width: int, words: int = 32000) -> Iterator[Row]:
    """The chunked loss, forward and backward, compiled; the head's weight cast before, as once an update."""
    hidden, weight = (torch.randn(n, width, device="cuda").bfloat16() for n in (tokens, words))
    hidden, weight = hidden.requires_grad_(), (weight.detach() * width**-0.5).requires_grad_()
    labels = torch.randint(words, (tokens,), device="cuda")[None]
    compiled = torch.compile(cross_entropy_sum, dynamic=False)
    for scaling in get_args(Scaling):
        ready = cast_weight(weight.detach(), scaling)

        def loss(*options: Any) -> None:
            total = compiled(hidden[None], weight, labels, CHUNK_TOKENS, *options)[0]
            torch.autograd.grad(total, (hidden, weight))

        ours = milliseconds(lambda ready=ready, scaling=scaling, loss=loss: loss(*ready, scaling))
        name = f"fp8 loss with the head, {scaling}, forward + backward, {tokens}×{width}×{words}"
        yield Row(name, ours, milliseconds(loss), "ms", note="bf16")


def _errors(width: int, title: str) -> Iterator[Row]:
    """Of y, on 4096 tokens and features, beside a 2:4 product of bfloat16."""
    hidden = torch.randn(4096, 4096, device="cuda").bfloat16()
    weight = torch.randn(width, 4096, device="cuda").bfloat16()
    over = power_scales(largest_of(hidden, 1) ** 2)
    state = (None, None, "relu2", "naive", False, False, False, False, None)
    wide, narrow = pack_activation(hidden, *state)[0], pack_activation(hidden, *state, over)[0]
    cast = cast_both_ways(weight, "tensorwise", "tensorwise", turned=False)
    expected = unpack(Packed24(wide)).float() @ weight.float().T
    bfloat16 = relative_error(unpack(Packed24(wide)) @ weight.T, expected)
    product = product24_e4m3(narrow, cast.narrow, 21, False, None, None)
    error = relative_error(product.float() * (over * cast.scale)[:, None], expected)
    yield Row(f"fp8 error of y, 2:4, {title}", error, bfloat16, "relative error", note="2:4 bf16")
