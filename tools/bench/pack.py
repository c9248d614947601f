"""`act24 bench pack`: the elementwise passes of 2:4, as a share of what a copy moves."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.kernels.activation_gradient import activation_gradient
from act24.sparse24.kernels.gather_features import gather_features
from act24.sparse24.kernels.pack_activation import pack_activation
from act24.sparse24.kernels.pack_gradient import pack_gradient
from act24.sparse24.kernels.unpack_gradient import unpack_gradient
from act24.tools.bench.rows import Row, milliseconds, needed_gpu

#: T × F.
SHAPES = ((16384, 16384), (32768, 8192))


def bench_pack(shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[Row]:
    """Bandwidth of every packing pass, by the bytes it has to move, beside a copy's in the same run."""
    device = needed_gpu()
    rows = []
    for tokens, features in shapes:
        hidden = torch.randn(tokens, features, device=device).bfloat16()
        rows += _rows(hidden, f"{tokens}×{features}")
        torch.cuda.empty_cache()
    return rows


def _rows(hidden: Tensor, shape: str) -> list[Row]:
    elements = hidden.numel()
    grad = torch.randn_like(hidden)
    target = torch.empty_like(hidden)
    index = torch.randperm(hidden.shape[1], device=hidden.device)[: hidden.shape[1] // 20]
    copy = elements * 4 / milliseconds(lambda: target.copy_(hidden)) / 1e6

    def forward(
        counts: bool, statistics: bool, method: str = "naive", slope: bool = False, fill: bool = False
    ) -> tuple:
        seed = torch.zeros((), dtype=torch.int64, device=hidden.device)
        return pack_activation(hidden, seed, None, "relu2", method, slope, fill, counts, statistics)

    saved, *_ = forward(False, False)
    dense = unpack(Packed24(saved))

    def backward(index: Tensor | None = None) -> tuple:
        return pack_gradient(grad, saved, None, None, index, "relu2")

    passes = [
        ("along features", 3.125, 0.85, lambda: forward(False, False)),
        ("along features, counts", 3.125, None, lambda: forward(True, False)),
        ("along features, statistics", 3.125, None, lambda: forward(True, True)),
        ("along features, with zeros", 4, None, lambda: forward(False, False, fill=True)),
        ("along features, soft threshold", 4.125, None, lambda: forward(True, False, "soft_threshold", True)),
        ("along features, mvue", 4.125, None, lambda: forward(True, False, "mvue", True)),
        ("both ways (dZ and the activation)", 6.5, 0.70, backward),
        ("both ways, 5% of the features dense too", 6.7, None, lambda: backward(index)),
        ("dense weight gradients", 8.25, None, lambda: unpack_gradient(grad, saved, None, "relu2")),
        ("dense products", 6, None, lambda: activation_gradient(grad, dense, "relu2")),
        (
            "5% of the features",
            1.225,
            None,
            lambda: gather_features(saved, index, None, len(saved)),
        ),
        ("PyTorch's compressor", 3.125, None, lambda: torch.ops.aten._cslt_compress(dense)),
    ]
    return [
        Row(f"pack {name}, {shape}", elements * size / milliseconds(call) / 1e6, copy, "GB/s", bar, "a copy")
        for name, size, bar, call in passes
    ]
