"""The core of the tuner: every algorithm of the library that gets a product right, timed beside the dense
product.

How to time a call, and where the result is kept, is the shell's business (`act24.tools.run.tuning`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from act24.errors import ran_out_of_memory
from act24.sparse24.format.multiply import FP8_TOLERANCE, TOLERANCE, multiply24, relative_error
from act24.sparse24.format.packed import Packed24, random_packed, unpack
from act24.sparse24.format.products import Measured, Product

#: The library's ids run from 0 to less than this; those that a GPU does not have raise an error.
ALGORITHMS = 32


class _Operands(NamedTuple):
    """What a product multiplies, drawn at random: both sides as cuSPARSELt takes them, and as the dense
    product does, with the zeros filled in, in bfloat16."""

    packed: Packed24
    right: Tensor
    left: Tensor
    dense: Tensor


def _operands(product: Product, generator: torch.Generator) -> _Operands:
    rows, inner = product.sparse_shape
    dtype = torch.float8_e4m3fn if product.fp8 else torch.bfloat16
    packed = random_packed(rows, inner, dtype, generator)
    turned = product.dense_transposed
    shape = (product.columns, inner) if turned else (inner, product.columns)
    right = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
    right = right.T if turned else right
    left = unpack(packed).bfloat16()
    left = left.T.contiguous().T if product.filled_transposed else left
    return _Operands(packed, right, left, right.bfloat16())


def dense_call(product: Product, generator: torch.Generator) -> Callable[[], Tensor]:
    """A call, to be timed, of the dense product, with its operands as a dense network has them."""
    _, _, left, dense = _operands(product, generator)
    return (lambda: dense.T @ left.T) if product.transposed else (lambda: left @ dense)


def candidates(
    product: Product, generators: Iterable[torch.Generator]
) -> Iterator[tuple[int, Callable[[], Tensor]]]:
    """Every algorithm that runs this product and gets it right, with a call to be timed.

    Some ids return wrong numbers without an error (pytorch issue 155333), so each has to agree with the dense
    product on one draw of each generator, all seeded differently, before it is offered: to `TOLERANCE`, in
    e4m3 to `FP8_TOLERANCE`. The calls are of the first draw.
    """
    tolerance = FP8_TOLERANCE if product.fp8 else TOLERANCE
    draws = [_operands(product, generator) for generator in generators]
    expected = [left @ dense for _, _, left, dense in draws]
    for algorithm in range(ALGORITHMS):
        calls = [
            functools.partial(multiply24, packed.buffer, right, algorithm, product.transposed)
            for packed, right, _, _ in draws
        ]
        try:
            results = [call().T if product.transposed else call() for call in calls]
        except RuntimeError as error:  # this GPU does not have the id, or not for this shape
            if ran_out_of_memory(error):  # and the algorithm would be left out of what is kept in a file
                raise
            continue
        if max(map(relative_error, results, expected)) < tolerance:
            yield algorithm, calls[0]


def tuned(
    product: Product, time: Callable[[Callable[[], Tensor]], float], device: torch.device
) -> tuple[Measured, dict[int, float]]:
    """The fastest valid algorithm of a product.

    Args:
        product: what to measure.
        time: milliseconds that a call takes.
        device: where.

    Returns:
        what the table holds, and the times of all valid algorithms. Where none is, an infinite time.
    """
    seeded = [torch.Generator(device).manual_seed(seed) for seed in (0, 1)]
    times = {algorithm: time(call) for algorithm, call in candidates(product, seeded)}
    best = min(times, key=times.__getitem__, default=0)
    dense = time(dense_call(product, seeded[0]))
    return Measured(best, times.get(best, float("inf")), dense), times
