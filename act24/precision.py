"""`precision = "auto"`: a layer in bfloat16 beside the same in e4m3, forward and backward, and which to take.

A layer is what is decided on as one: the linears that read one input, which is cast once for them; a network
with a 2:4 activation; a linear with a 2:4 weight. How a call is timed, and where the result is kept, is the
shell's business (`act24.tools.run.auto_precision`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.fp8.casts import CastE4m3, Scaling
from act24.fp8.linear import cast_weight, linear_fp8, underflow_counts, uses_kernels
from act24.options import Range
from act24.sparse24.feed_forward.methods import METHODS
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24, Precision
from act24.sparse24.feed_forward.packed_fp8 import cast_weights
from act24.sparse24.weight.forms import LinearOptions24
from act24.sparse24.weight.linear24 import linear24
from act24.sparse24.weight.packed import packed_operands

#: How many times as fast e4m3 has to be: below that it is in the noise of two timings, and digits are lost.
MARGIN = 1.03

Kind = Literal["linears", "head", "network", "weight24"]


class Layer(NamedTuple):
    """What is decided on as one.

    Attributes:
        kind: linears of one input; the head, which a loss reads chunk by chunk; a network; a 2:4 linear.
        sizes: of the input, and behind it of each linear's output; of a network in, F and out.
        options: what else its time depends on, in words.
    """

    kind: Kind
    sizes: tuple[int, ...]
    options: str

    def __str__(self) -> str:
        width, *sizes = self.sizes
        outs = " + ".join(map(str, sizes)) if self.kind in ("linears", "head") else "→".join(map(str, sizes))
        return f"{width}→{outs}"


class Timed(NamedTuple):
    """What was found of a layer: milliseconds of a micro-batch either way, and what is taken."""

    precision: Precision
    bfloat16: float
    fp8: float


#: `(layer, timed)` of each. As pairs, and any tuples will do: it is an option of passes, which are data.
Milliseconds = Annotated[float, Range(ge=0)]
Decided = tuple[
    tuple[tuple[Kind, tuple[int, ...], str], tuple[Precision, Milliseconds, Milliseconds]],
    ...,
]


def decision(layer: Layer | None, decided: Decided) -> Precision | None:
    """What was decided about a layer; None where nothing was."""
    return next((timed[0] for known, timed in decided if tuple(known) == layer), None)


class Conditions(NamedTuple):
    """What the time of a layer depends on beside itself.

    Attributes:
        rows, length: of a micro-batch.
        dtype: `train.dtype`: of the weights, unless it is under autocast.
        compiled: whether the layer is.
        kept: weights are packed or cast once an update, not where they are read.
        micro_batches: of an update.
        counted: every step counts zeros and what 2:4 and e4m3 drop (`activation_statistics`).
    """

    rows: int
    length: int
    dtype: Literal["bfloat16", "bfloat16_autocast"]
    compiled: bool
    kept: bool
    micro_batches: int
    counted: bool


class Side(NamedTuple):
    """A layer in one precision.

    Attributes:
        step: forward and backward of a micro-batch; returns the gradients of x and of the weights.
        renew: what an update does once to the weights; None: nothing.
    """

    step: Callable[[], tuple[Tensor, ...]]
    renew: Callable[[], Any] | None = None


def timed(
    sides: Mapping[Precision, Side], conditions: Conditions, time: Callable[[Callable[[], Any]], float]
) -> Timed:
    """Time both sides, and take e4m3 where it is faster by `MARGIN`.

    Args:
        time: milliseconds that a call takes.
    """
    found = {}
    for precision, side in sides.items():
        once = time(side.renew) / conditions.micro_batches if side.renew else 0.0
        found[precision] = time(side.step) + once
    narrow = found["fp8"] * MARGIN < found["bfloat16"]
    return Timed("fp8" if narrow else "bfloat16", found["bfloat16"], found["fp8"])


def linears(
    layer: Layer, scaling: Scaling, kernels: bool, conditions: Conditions, device: torch.device
) -> dict[Precision, Side]:
    """Linears of one input, and the head, both ways."""
    width, *outs = layer.sizes
    x, *weights = _draw(conditions, device, width, *((out, width) for out in outs))

    def cast() -> list[CastE4m3]:
        on = uses_kernels(device, kernels)
        return [cast_weight(weight.detach().bfloat16(), scaling, kernels=on) for weight in weights]

    ready, exact = cast() if conditions.kept else [()] * len(weights), layer.kind == "head"
    counters = [_counter(conditions, device) for _ in weights]

    def plain(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, weight) for weight in weights)

    def narrow(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        results = []
        for weight, made, counter in zip(weights, ready, counters, strict=True):
            _count_(counter, x, scaling)
            given: dict[str, Any] = {"kernels": kernels, "counter": counter, "exact_grad_x": exact}
            results.append(linear_fp8(x, weight, None, *made, scaling=scaling, **given))
        return tuple(results)

    leaves = (x, *weights)
    renew = cast if conditions.kept else None
    return {
        # A product that nothing surrounds is the same uncompiled.
        "bfloat16": Side(_step(plain, leaves, conditions._replace(compiled=False))),
        "fp8": Side(_step(narrow, leaves, conditions), renew),
    }


def network(
    layer: Layer, options: Options24, conditions: Conditions, device: torch.device
) -> dict[Precision, Side]:
    """A network with a 2:4 activation, both ways; `options` say all but the precision."""
    width, features, width_out = layer.sizes
    x, weight_in, weight_out = _draw(conditions, device, width, (features, width), (width_out, features))
    method = METHODS[options.method]
    scale = torch.ones((), device=device) if method.scaled else None
    seed = torch.zeros((), dtype=torch.int64, device=device) if method.draws else None

    def cast() -> tuple[Tensor, ...]:
        on = uses_kernels(device, options.kernels)
        return cast_weights(weight_in.detach().bfloat16(), weight_out.detach().bfloat16(), kernels=on)

    ready = {"bfloat16": (), "fp8": cast() if conditions.kept else ()}

    def side(precision: Precision) -> Side:
        given = options._replace(precision=precision, statistics=conditions.counted)
        casts, counter = ready[precision], _counter(conditions, device) if precision == "fp8" else None

        def run(x: Tensor, weight_in: Tensor, weight_out: Tensor) -> tuple[Tensor, ...]:
            arguments = (x, weight_in, None, weight_out, None, scale, seed, None, given)
            _count_(counter, x, "rowwise")
            return activation24(*arguments, casts=casts, counter=counter)[:1]

        return Side(_step(run, (x, weight_in, weight_out), conditions), cast if casts else None)

    return {"bfloat16": side("bfloat16"), "fp8": side("fp8")}


def sparse_linear(
    layer: Layer,
    options: LinearOptions24,
    soft: bool,
    draws: bool,
    packs: bool,
    conditions: Conditions,
    device: torch.device,
) -> dict[Precision, Side]:
    """A linear with a 2:4 weight, both ways; `options` say all but the precision.

    Args:
        soft: its weight is thresholded, not masked.
        draws: its weight gradient is drawn.
        packs: in bfloat16 some product reads the packed weight.
    """
    width, out = layer.sizes
    x, weight = _draw(conditions, device, width, (out, width))
    row, column = torch.arange(out, device=device), torch.arange(width, device=device)
    mask = None if soft else (row[:, None] + column) % 4 < 2  # 2:4 along both sides
    scale = torch.ones((), device=device) if soft else None
    seed = torch.zeros((), dtype=torch.int64, device=device) if draws else None

    def pack() -> tuple[Tensor, Tensor | None]:
        return packed_operands(weight.detach(), mask, scale, options.both_ways)

    kept = packs and conditions.kept
    ready = {"bfloat16": pack() if kept else (None, None), "fp8": (None, None)}

    def side(precision: Precision) -> Side:
        given, (packed, transposed) = options._replace(precision=precision), ready[precision]
        counter = _counter(conditions, device) if precision == "fp8" else None

        def run(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            _count_(counter, x, "rowwise")
            return (linear24(x, weight, None, mask, scale, seed, packed, transposed, given, counter=counter),)

        return Side(_step(run, (x, weight), conditions), None if packed is None else pack)

    return {"bfloat16": side("bfloat16"), "fp8": side("fp8")}


def _counter(conditions: Conditions, device: torch.device) -> Tensor | None:
    return torch.zeros(2, device=device) if conditions.counted else None


def _count_(counter: Tensor | None, x: Tensor, scaling: Scaling) -> None:
    """What `activation_statistics` does beside a layer in e4m3."""
    if counter is not None:
        counter.add_(underflow_counts(x, scaling))


def _draw(
    conditions: Conditions, device: torch.device, width: int, *shapes: tuple[int, int]
) -> tuple[Tensor, ...]:
    """x in bfloat16, as a norm's kernel leaves it, and weights as the run stores them."""
    generator = torch.Generator(device).manual_seed(0)
    stored = torch.bfloat16 if conditions.dtype == "bfloat16" else torch.float32
    x = torch.randn(conditions.rows, conditions.length, width, generator=generator, device=device)
    weights = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    scaled = ((weight * weight.shape[1] ** -0.5).to(stored) for weight in weights)
    return tuple(tensor.requires_grad_() for tensor in (x.bfloat16(), *scaled))


def _step(
    function: Callable[..., tuple[Tensor, ...]], leaves: tuple[Tensor, ...], conditions: Conditions
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward, to be timed."""
    run = torch.compile(function, fullgraph=True, dynamic=False) if conditions.compiled else function
    device, autocast = leaves[0].device, conditions.dtype == "bfloat16_autocast"

    def forward() -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            return run(*leaves)

    generator = torch.Generator(device).manual_seed(1)
    gradients = tuple(
        torch.randn(result.shape, generator=generator, device=device).to(result.dtype) for result in forward()
    )

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, gradients)

    return step
