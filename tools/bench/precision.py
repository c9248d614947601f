"""`act24 bench precision`: what `precision = "auto"` takes of each layer of a model with 2:4 activations, the
head among them, at each size: milliseconds of a micro-batch in e4m3 and in bfloat16, forward and backward."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

from act24.options import one_of
from act24.passes import Fp8
from act24.passes.fp8 import by_shape
from act24.precision import MARGIN, Layer, Timed
from act24.recipes.load import load_recipe
from act24.tools.bench.peers import PRECISIONS, Size
from act24.tools.bench.peers import SIZES as PEER_SIZES
from act24.tools.bench.rows import Row, needed_gpu, stoppable
from act24.tools.bench.step import without_start
from act24.tools.run.auto_precision import undecided
from act24.tools.run.processes import Processes
from act24.tools.run.tuning import tune_

SIZES = {"60m": Size("60m", 256), **PEER_SIZES}


def bench_precision(
    sizes: Sequence[str] = tuple(SIZES), precisions: Sequence[str] = ("autocast",), rows: int | None = None
) -> list[Row]:
    """What is in the cache of tuned products is taken from there; the rest is timed, and goes there. Stopped,
    it reports the sizes that it has timed.

    Args:
        sizes, precisions: names in `SIZES` and of `act24 bench peers`.
        rows: of a micro-batch; None for those of the size.

    Raises:
        Act24Error: there is no GPU.
    """
    for name, given, known in (("sizes", sizes, SIZES), ("precisions", precisions, PRECISIONS)):
        for each in given:
            one_of("bench precision", name, each, known)
    device, found = needed_gpu(), list[Row]()
    with stoppable():
        try:
            for size in sizes:
                for precision in precisions:
                    for row in _rows(size, precision, rows or SIZES[size].rows, device):
                        told = f"{row.ours:.4g} ms beside {row.other:.4g}, {row.note}"
                        print(f"{row.name}: {told}", file=sys.stderr, flush=True)
                        found.append(row)
        except KeyboardInterrupt:
            print("stopped: what follows was timed", file=sys.stderr)
    return found


def _rows(size: str, precision: str, rows: int, device: torch.device) -> Iterator[Row]:
    overrides = (*SIZES[size].overrides, *PRECISIONS[precision])
    # Without what comes before 2:4 begins, which is timed for nothing here.
    one_block = (
        "model.num_hidden_layers=1",
        "passes.activation24.from_step=0",
    )
    of_rows = (f"train.batch_size={rows}", f"train.total_batch_size={rows}")
    recipe = load_recipe(f"c4/{SIZES[size].family}-relu2-act24", (*overrides, *one_block, *of_rows))
    recipe = recipe.model_copy(update={"passes": (*recipe.passes, Fp8(precision="auto", head=True))})
    built = without_start(recipe, device)
    tune_(built.pipeline, recipe, Processes(0, 1, device))
    decided = {layer: timed for p in undecided(built.pipeline) for layer, timed in p.decided}
    for fields, timed in decided.items():
        layer, one = Layer(*fields), Timed(*timed)
        told = f"taken: {one.precision} (from {MARGIN} on), by its shape {' '.join(_by_shape(layer))}"
        counted = ", counted" if recipe.log.activation_statistics else ""
        name = f"{size}, {precision}, {layer.kind} {layer}, {rows} rows of {recipe.data.max_length}{counted}"
        yield Row(name, one.fp8, one.bfloat16, "ms", note=told)


def _by_shape(layer: Layer) -> tuple[str, ...]:
    """What the rule for shapes says of each of its weights."""
    width, *sizes = layer.sizes
    if layer.kind == "network":
        features, width_out = sizes
        return (by_shape((features, width), (width_out, features)),)
    return tuple(by_shape((out, width)) for out in sizes)
