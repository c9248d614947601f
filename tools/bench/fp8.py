"""`act24 bench fp8`: what e4m3 would give the forward product y = a W_outᵀ of 2:4 activations, and its price.

A scale for each token and each output feature. The 2:4 operand comes from cuSPARSELt's own compressor: act24
does not write that layout (docs/results/kernels.md says why, and what it is).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from act24.sparse24.packed import pack
from act24.sparse24.products import ALGORITHMS, multiply24, relative_error
from act24.sparse24.selection import top2_of_4
from act24.tools.bench.rows import Row, graph_milliseconds, needed_gpu

#: T, width, F.
SHAPE = (16384, 4096, 16384)
_LARGEST = 448.0  # of e4m3


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, each over its own scale: float8 `[M, K]`, and float32 `[M, 1]`."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def bench_fp8(shape: tuple[int, int, int] = SHAPE) -> list[Row]:
    """Dense and 2:4 products in e4m3 beside those in bfloat16, and the passes that e4m3 adds."""
    device = needed_gpu()
    tokens, width, features = shape
    hidden = torch.randn(tokens, features, device=device).bfloat16().relu()
    mask = top2_of_4(hidden)
    activation = torch.where(mask, hidden * hidden, 0)
    weight = (torch.randn(width, features, device=device) / features**0.5).bfloat16()
    (narrow, rows), (narrow_weight, columns) = quantised(activation), quantised(weight)
    expected = activation.float() @ weight.float().T
    title = f"{tokens}×{width}×{features}"
    dense = graph_milliseconds(lambda: activation @ weight.T)

    def scaled(fast: bool) -> Tensor:
        return torch._scaled_mm(
            narrow,
            narrow_weight.T,
            scale_a=rows,
            scale_b=columns.T.contiguous(),
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    made = []
    for fast in (False, True):
        name = f"fp8 product y, dense, {'fast sums, ' if fast else ''}{title}"
        time = graph_milliseconds(lambda fast=fast: scaled(fast))
        made.append(Row(name, time, dense, "ms", note="dense bf16"))
    packed = pack(activation, mask)
    found = _fastest(lambda algorithm: multiply24(packed.buffer, weight.T, algorithm, False), expected)
    made.append(Row(f"bf16 product y, 2:4, {title}, algorithm {found[0]}", found[1], dense, "ms"))
    compressed = torch.ops.aten._cslt_compress(narrow)

    def sparse(algorithm: int) -> Tensor:
        return torch.ops.aten._cslt_sparse_mm(
            compressed, narrow_weight.T, out_dtype=torch.bfloat16, alg_id=algorithm
        )

    found = _fastest(sparse, expected / (rows * columns.T))
    made.append(Row(f"fp8 product y, 2:4, {title}, algorithm {found[0]}", found[1], dense, "ms"))
    y = torch.empty(tokens, width, device=device, dtype=torch.bfloat16)
    scales = (rows.bfloat16(), columns.T.bfloat16())
    compiled, scale = torch.compile(quantised), torch.compile(lambda y, rows, columns: y * rows * columns)
    for name, call in (
        ("cuSPARSELt's compressor", lambda: torch.ops.aten._cslt_compress(narrow)),
        ("largest of each token", lambda: torch.amax(hidden, 1)),
        ("quantise the weight", lambda: compiled(weight)),
        ("scale y", lambda: scale(y, *scales)),
    ):
        made.append(Row(f"fp8 {name}, {title}", graph_milliseconds(call), dense, "ms", note="dense product"))
    error = relative_error(scaled(True), expected)
    made.append(Row(f"fp8 error of y, dense, {title}", error, 1.0, "relative error", note="of float32"))
    return made


def _fastest(call: Callable[[int], Tensor], expected: Tensor) -> tuple[int, float]:
    """The fastest algorithm of cuSPARSELt that is right to 5%, which e4m3 is, and its milliseconds."""
    times = {}
    for algorithm in range(ALGORITHMS):
        try:
            result = call(algorithm)
        except RuntimeError:  # this GPU does not have the id, or not for this shape
            continue
        if relative_error(result, expected) < 0.05:
            times[algorithm] = graph_milliseconds(lambda algorithm=algorithm: call(algorithm))
    best = min(times, key=times.__getitem__, default=-1)
    return best, times.get(best, float("inf"))
