"""Which algorithm of cuSPARSELt is fastest for which product on this machine: measured once, and kept.

The core measures (`act24.sparse24.format.tuner.tuned`) and is handed the table (`Options24.algorithms`).
Behind the products come the layers whose precision is left open (`act24.tools.run.auto_precision`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act24.passes import Activation24, Fp8, Pipeline, Weight24
from act24.recipes.schema import Recipe
from act24.sparse24.feed_forward.forms import why_never_packed
from act24.sparse24.format.device import obstacle
from act24.sparse24.format.products import KINDS, Measured, Product, Table
from act24.sparse24.format.tuner import tuned
from act24.tools.run.auto_precision import (
    conditions_of,
    decide,
    held_layers,
    hold_,
    layer_entries,
    layers,
    why_not_timed,
)
from act24.tools.run.processes import Processes
from act24.tools.run.tuning_cache import TuningError, alone, cache_path, machine, read_cache, write_cache


def read_table(path: Path, key: str) -> Table:
    """What is known of a machine; empty where the file or the machine is missing.

    Raises:
        TuningError: the file is no such cache.
    """
    return _parse(read_cache(path).get(key, []), path)


def write_table(path: Path, key: str, table: Table) -> None:
    """Add to what is known of a machine. The file is replaced as a whole, or not at all.

    Raises:
        TuningError: the file is no such cache, or cannot be written.
    """
    content = read_cache(path)
    known = dict(_parse(content.get(key, []), path)) | dict(table)
    write_cache(path, content | {key: _entries(sorted(known.items()))})


def tune_(
    pipeline: Pipeline, recipe: Recipe, processes: Processes, saved: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Let the 2:4 activations and weights of a model run on the fastest products for the recipe's
    micro-batches, decide what `precision = "auto"` leaves open, and let weights keep their packed forms and
    casts for an update, where they are not sharded.

    Where nobody measured that on this machine it takes some seconds, and a layer to decide about some more.
    Collective: one process measures products, the others read what it found; what it decides holds for all.

    Args:
        saved: what this returned when the run began. Of products it holds on the same kind of machine,
            whatever is measured now: another algorithm rounds otherwise, and a run goes on bit for bit. What
            was decided of precisions holds on any.

    Returns:
        JSON values.

    Raises:
        TuningError: the cache is damaged.
    """
    device, kept = processes.device, held_layers(saved)
    hold_(pipeline, kept)
    if recipe.train.dtype == "float32":
        return {}
    sharded = recipe.train.parallel == "fsdp" and processes.world_size > 1
    for p in [p for p in pipeline.passes if isinstance(p, Fp8 | Activation24)]:
        pipeline.exchange_(p, replace(p, keep_cast=not sharded))
    found: dict[str, Any] = {}
    if not obstacle(device):
        found = {"machine": machine(device), "products": _tune_products(pipeline, recipe, processes, saved)}
    if why_not_timed(device):
        return found | ({"layers": layer_entries(kept)} if kept else {})
    from act24.tools.bench.rows import graph_milliseconds

    wanted = layers(pipeline, device)
    if wanted:
        conditions = conditions_of(recipe, processes.world_size, device)
        mine = None
        if processes.is_main:
            mine = decide(wanted, conditions, device, graph_milliseconds, kept)
        (decided, *_) = processes.gather(mine)
        assert decided is not None
        hold_(pipeline, decided)
        found["layers"] = layer_entries(decided)
    return found


def _tune_products(
    pipeline: Pipeline, recipe: Recipe, processes: Processes, saved: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Hand every pass its table of products; what is in all of them."""
    from act24.tools.bench.rows import graph_milliseconds

    sharded = recipe.train.parallel == "fsdp" and processes.world_size > 1
    same = saved and saved.get("machine") == machine(processes.device)
    held = _parse(saved["products"], Path("the checkpoint")) if saved and same else ()
    used: dict[Any, Any] = {}
    tokens = recipe.train.batch_size * recipe.data.max_length
    for mains_turn in (True, False):
        if processes.is_main is mains_turn:
            for p in [p for p in pipeline.passes if isinstance(p, Activation24 | Weight24) and p.kernels]:
                with pipeline.lowered([p]):
                    products = {q for _, match in pipeline.matches(p) for q in p.products(match, tokens)}
                possible = [
                    q for q in sorted(products) if not why_never_packed(q.tokens, q.features, (q.width,))
                ]
                table = tuned_table(possible, processes.device, graph_milliseconds, held=held)
                exchanged = replace(p, algorithms=table)
                if isinstance(exchanged, Weight24):
                    exchanged = replace(exchanged, keep_packed=not sharded)
                pipeline.exchange_(p, exchanged)
                used |= dict(table)
        processes.any(False)  # the others wait here
    return _entries(used.items())


def use_table_(pipeline: Pipeline, device: torch.device) -> None:
    """Let 2:4 activations run on what was measured on this machine before; nothing is measured.

    Raises:
        TuningError: the cache is damaged.
    """
    table = known_table(device)
    for p in [p for p in pipeline.passes if isinstance(p, Activation24) and p.kernels]:
        pipeline.exchange_(p, replace(p, algorithms=table))


def known_table(device: torch.device) -> Table:
    """What was measured on this machine before; empty where it has no 2:4 products.

    Raises:
        TuningError: the cache is damaged.
    """
    return () if obstacle(device) else read_table(cache_path(), machine(device))


def tuned_table(
    wanted: Iterable[Product],
    device: torch.device,
    time: Callable[[Callable[[], Tensor]], float],
    path: Path | None = None,
    held: Table = (),
) -> Table:
    """The table for these products: from the cache, and what is missing measured and added to it.

    Args:
        wanted: the products of a model's networks (`products.feed_forward_products`).
        device: a GPU that can run them (`act24.sparse24.format.device.obstacle`).
        time: milliseconds that a call takes there.
        path: of the cache; None for `cache_path()`.
        held: what stands, whatever the cache says.
    """
    path, key = path or cache_path(), machine(device)
    wanted = list(dict.fromkeys(wanted))
    with alone(path):
        known = dict(read_table(path, key)) | dict(held)
        missing = {product: tuned(product, time, device)[0] for product in wanted if product not in known}
        if missing:
            with contextlib.suppress(TuningError):  # nowhere to keep it: it is measured again next time
                write_table(path, key, tuple(missing.items()))
    known |= missing
    return tuple((product, known[product]) for product in wanted)


def _entries(table: Iterable[tuple[Any, Any]]) -> list[dict[str, Any]]:
    return [Product(*product)._asdict() | Measured(*measured)._asdict() for product, measured in table]


def _parse(entries: Any, path: Path) -> Table:
    try:
        table = tuple(
            (
                Product(e["kind"], int(e["tokens"]), int(e["features"]), int(e["width"])),
                Measured(int(e["algorithm"]), float(e["sparse"]), float(e["dense"])),
            )
            for e in entries
        )
    except (TypeError, KeyError, ValueError):
        table = None
    if table is None or any(product.kind not in KINDS for product, _ in table):
        raise TuningError(
            f"{path} holds an entry that is no tuned product: delete it, and it is measured anew"
        )
    return table
