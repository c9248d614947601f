"""`act24 bench fp8`: what e4m3 gives the forward product y = a W_outᵀ of 2:4 activations, and its price."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.format.fp8 import scaled
from act24.sparse24.format.multiply import multiply24, relative_error
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.format.products import Product
from act24.sparse24.format.tuner import tuned
from act24.sparse24.kernels.pack_activation import pack_activation
from act24.sparse24.kernels.quantise_packed import quantise_packed
from act24.sparse24.kernels.quantise_rows import quantise_rows
from act24.tools.bench.rows import Row, graph_milliseconds, needed_gpu

#: T, width, F.
SHAPE = (16384, 4096, 16384)


def bench_fp8(shape: tuple[int, int, int] = SHAPE) -> list[Row]:
    """Products in e4m3, dense and 2:4, beside the dense one in bfloat16; the passes that e4m3 adds, beside a
    copy of the bytes that they move; and what it costs in accuracy."""
    device = needed_gpu()
    tokens, width, features = shape
    title = f"{tokens}×{width}×{features}"
    hidden = torch.randn(tokens, features, device=device).bfloat16()
    weight = (torch.randn(width, features, device=device) / features**0.5).bfloat16()
    packed, *_ = pack_activation(hidden, None, None, "relu2", "naive", False, False, False, False)
    activation = unpack(Packed24(packed))

    wide, bf16_times = tuned(Product("y", tokens, features, width), graph_milliseconds, device)
    narrow, fp8_times = tuned(Product("y_fp8", tokens, features, width), graph_milliseconds, device)
    rows = []
    for kind, found, times in (("bf16", wide, bf16_times), ("fp8", narrow, fp8_times)):
        name = f"{kind} product y, 2:4, {title}, algorithm {found.algorithm}"
        rows.append(Row(name, found.sparse, found.dense, "ms", note=f"dense bf16; algorithms: {times}"))

    (left, scale), (right, columns) = quantise_rows(activation), quantise_rows(weight)
    for fast in (False, True):

        def dense(fast: bool = fast) -> Tensor:
            return torch._scaled_mm(
                left,
                right.T,
                scale_a=scale[:, None],
                scale_b=columns[None],
                out_dtype=torch.bfloat16,
                use_fast_accum=fast,
            )

        name = f"fp8 product y, dense, {'fast sums, ' if fast else ''}{title}"
        rows.append(Row(name, graph_milliseconds(dense), narrow.dense, "ms", note="dense bf16"))

    y = multiply24(packed, weight.T, wide.algorithm, False)
    again = torch.compile(scaled)
    for name, size, call in (
        ("quantise what is packed", tokens * features * 1.75, lambda: quantise_packed(packed)),
        ("quantise the weight", width * features * 3, lambda: quantise_rows(weight)),
        ("scale y", tokens * width * 4, lambda: again(y, scale, columns)),
    ):
        source = torch.empty(int(size / 2), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = graph_milliseconds(lambda source=source, target=target: target.copy_(source))
        rows.append(Row(f"fp8 {name}, {title}", graph_milliseconds(call), copy, "ms", note="a copy"))

    compressed, _ = quantise_packed(packed)
    expected = activation.float() @ weight.float().T
    sparse = scaled(multiply24(compressed, right.T, narrow.algorithm, False), scale, columns)
    for name, found in (("2:4", sparse), ("dense, fast sums", dense())):
        errors = relative_error(found, expected), relative_error(y, expected)
        rows.append(Row(f"fp8 error of y, {name}, {title}", *errors, "relative error", note="2:4 bf16"))
    return rows
