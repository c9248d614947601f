"""`act24 bench gemm`: the products that can be 2:4, tuned, beside the dense ones."""

from __future__ import annotations

from act24.sparse24.format.products import KINDS, Product, Table
from act24.sparse24.format.tuner import tuned
from act24.tools.bench.rows import Row, graph_milliseconds, needed_gpu

#: T, width, F: the shapes of the bars, then presets 130m to 1b, and 350m's low-rank factors.
SHAPES = (
    (16384, 4096, 16384),
    (32768, 2048, 8192),
    (65536, 768, 3072),
    (32768, 1024, 4096),
    (16384, 2048, 8192),
    (65536, 256, 4096),
)


def bench_gemm(
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
) -> tuple[list[Row], Table]:
    """The fastest valid algorithm of every product beside the dense product.

    Returns:
        the rows, and what was found, as a table for `act24.sparse24.pattern.token_wise.Options24.algorithms`.
    """
    device = needed_gpu()
    rows, table = [], []
    for tokens, width, features in shapes:
        for kind in KINDS:
            product = Product(kind, tokens, features, width)
            best, times = tuned(product, graph_milliseconds, device)
            table.append((product, best))
            name = f"{kind}, {tokens}×{width}×{features}, algorithm {best.algorithm}"
            note = f"dense; algorithms: { {key: round(time, 4) for key, time in times.items()} }"
            rows.append(Row(name, best.sparse, best.dense, "ms", note=note))
    return rows, tuple(table)
