"""`act24 bench weight`: a SwiGLU network whose three weights are 2:4, beside the compiled dense one, and the
passes that 2:4 weights need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.sparse24.format.products import Table
from act24.sparse24.format.tuner import tuned
from act24.sparse24.kernels.pack_drawn import pack_drawn
from act24.sparse24.kernels.pack_weight import pack_weight
from act24.sparse24.weight.forms import LinearOptions24, tunable_products
from act24.sparse24.weight.linear24 import linear24
from act24.sparse24.weight.methods import METHODS, WeightGradient, weight_mask, weight_scale
from act24.sparse24.weight.packed import packed_operands
from act24.tools.bench.rows import Row, graph_milliseconds, milliseconds, needed_gpu

#: T, width, F, and the bar of the network with all nine products in 2:4.
SHAPES = ((16384, 4096, 11008, 1.22),)

#: Method, what dW is made of, whether the weights are packed anew in every call, and whether the bar is for
#: it.
_MODES: tuple[tuple[str, WeightGradient, bool, bool], ...] = (
    ("transposable", "mvue", True, True),
    ("transposable", "mvue", False, False),
    ("transposable", "dense", True, False),
    ("soft_threshold", "mvue", True, False),
    ("sr_ste", "dense", True, False),
)


def bench_weight(
    shapes: tuple[tuple[int, int, int, float | None], ...] = SHAPES, table: Table = ()
) -> list[Row]:
    """Forward and backward of the network under each method, and its passes.

    Args:
        shapes: T, width, F, and the bar.
        table: tuned algorithms; empty to tune here.
    """
    device = needed_gpu()
    rows = []
    for tokens, width, features, bar in shapes:
        names = METHODS["transposable"].products("mvue")
        sizes = ((features, width), (width, features))
        products = {p for size in sizes for p in tunable_products(tokens, *size, names)}
        found = table or tuple((p, tuned(p, graph_milliseconds, device)[0]) for p in sorted(products))
        for (kind, _, out_features, in_features), (algorithm, ours, other) in found:
            title = f"{kind}, {tokens}×{in_features}→{out_features}, algorithm {algorithm}"
            rows.append(Row(title, ours, other, "ms", note="dense product"))
        rows += _networks(tokens, width, features, bar, found, device)
        rows += _passes(tokens, features, device)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return rows


def _networks(
    tokens: int, width: int, features: int, bar: float | None, table: Table, device: torch.device
) -> list[Row]:
    shape = f"{tokens}×{width}×{features}"
    draw = lambda *size: torch.randn(*size, device=device).bfloat16()  # noqa: E731
    x, grad = draw(tokens, width).requires_grad_(), draw(tokens, width)
    sizes = (features, width), (features, width), (width, features)
    weights = [(draw(*size) / size[1] ** 0.5).requires_grad_() for size in sizes]
    seeds = [torch.tensor(n, device=device) for n in range(3)]

    def training(network: Callable[..., Tensor], *arguments: Any) -> float:
        call = torch.compile(network, fullgraph=True)
        return milliseconds(lambda: torch.autograd.grad(call(x, *arguments), (x, *weights), grad), 300)

    def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    other = training(dense, *weights)
    rows = []
    for method, weight_gradient, anew, barred in _MODES:
        record = METHODS[method]
        masks = [None if record.soft else weight_mask(w, method) for w in weights]
        scales = [weight_scale(w) if record.soft else None for w in weights]
        kept = [
            packed_operands(w.detach(), m, s, record.both_ways)
            for w, m, s in zip(weights, masks, scales, strict=True)
        ]
        drawn = seeds if weight_gradient == "mvue" else [None] * 3

        def linears(options: LinearOptions24) -> Callable[..., Tensor]:
            def network(x: Tensor, *of: Any) -> Tensor:
                gate, up, down = of
                hidden = F.silu(linear24(x, *gate, options=options)) * linear24(x, *up, options=options)
                return linear24(hidden, *down, options=options)

            return network

        def sparse(
            options: LinearOptions24,
            anew: bool = anew,
            state: tuple = (masks, scales, drawn, kept),
            both_ways: bool = record.both_ways,
        ) -> float:
            masks, scales, drawn, kept = state
            network = linears(options)

            def packing(x: Tensor, *weights: Tensor) -> Tensor:
                operands = kept
                if anew and options.kernels:
                    operands = [
                        packed_operands(w.detach(), m, s, both_ways)
                        for w, m, s in zip(weights, masks, scales, strict=True)
                    ]
                sides = zip(
                    weights, [None] * 3, masks, scales, drawn, *zip(*operands, strict=True), strict=True
                )
                return network(x, *sides)

            return training(packing, *weights)

        options = LinearOptions24(record.both_ways, True, table)
        names = ", ".join(record.products(weight_gradient))
        packed = "packed in every call" if anew else "packed before"
        title = f"SwiGLU, {method}, {names} in 2:4, {packed}, {shape}"
        ours = sparse(options)
        rows.append(Row(title, ours, other, "ms", bar if barred else None, "compiled dense SwiGLU"))
        if barred:
            plain = sparse(options._replace(kernels=False))
            rows.append(
                Row(f"{title}: beside plain PyTorch, compiled", ours, plain, "ms", None, "the same, masked")
            )
    return rows


def _passes(tokens: int, features: int, device: torch.device) -> list[Row]:
    gradient = torch.randn(tokens, features, device=device).bfloat16()
    weight = torch.randn(features, 4096, device=device).bfloat16()
    seed, mask = torch.tensor(3, device=device), weight_mask(weight, "transposable")
    rows = []
    for name, of, size, call in (
        ("draw and pack a gradient", gradient, 3.125, lambda: pack_drawn(gradient, seed)),
        ("pack a weight both ways", weight, 5.25, lambda: pack_weight(weight, mask)),
        ("best transposable mask", weight, 3, lambda: weight_mask(weight, "transposable")),
    ):
        target = torch.empty_like(of)
        copy = of.numel() * 4 / milliseconds(lambda t=target, of=of: t.copy_(of)) / 1e6
        ours = of.numel() * size / milliseconds(call) / 1e6
        rows.append(Row(f"{name}, {of.shape[0]}×{of.shape[1]}", ours, copy, "GB/s", None, "a copy"))
    return rows
