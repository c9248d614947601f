"""Which algorithm of cuSPARSELt is fastest for which product on this machine: measured once, and kept.

One JSON file for all machines, keyed by GPU and library version. The core measures
(`act24.sparse24.format.tuner.tuned`) and is handed the table (`Options24.algorithms`); this file is all that
touches the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.passes import Activation24, Fp8, Pipeline, Weight24
from act24.recipes.schema import Recipe
from act24.sparse24.feed_forward.forms import why_never_packed
from act24.sparse24.format.device import obstacle
from act24.sparse24.format.products import KINDS, Measured, Product, Table
from act24.sparse24.format.tuner import tuned
from act24.tools.files import whole_file
from act24.tools.run.processes import Processes


class TuningError(Act24Error):
    """A cache of tuned products that cannot be read or written."""


def cache_path() -> Path:
    """Where the cache is: `$XDG_CACHE_HOME/act24/products.json`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "act24" / "products.json"


def machine(device: torch.device) -> str:
    """What figures hold for: the GPU and the library that runs the products."""
    return f"{torch.cuda.get_device_name(device)}, cuSPARSELt {torch.backends.cusparselt.version()}"


def read_table(path: Path, key: str) -> Table:
    """What is known of a machine; empty where the file or the machine is missing.

    Raises:
        TuningError: the file is no such cache.
    """
    return _parse(_read(path).get(key, []), path)


def write_table(path: Path, key: str, table: Table) -> None:
    """Add to what is known of a machine. The file is replaced as a whole, or not at all.

    Raises:
        TuningError: the file is no such cache, or cannot be written.
    """
    content = _read(path)
    known = dict(_parse(content.get(key, []), path)) | dict(table)
    content[key] = _entries(sorted(known.items()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        raise TuningError(f"cannot write {path}: {error.strerror}") from None


def tune_(
    pipeline: Pipeline, recipe: Recipe, processes: Processes, saved: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Let the 2:4 activations and weights of a model run on the fastest products for the recipe's
    micro-batches, and weights keep their packed forms and casts for an update, where they are not sharded.

    Where nobody measured those on this machine it takes some seconds. Collective: one process measures, the
    others read what it found.

    Args:
        saved: what this returned when the run began. On the same kind of machine it holds, whatever is
            measured now: another algorithm rounds otherwise, and a run goes on bit for bit.

    Returns:
        JSON values.

    Raises:
        TuningError: the cache is damaged.
    """
    if recipe.train.dtype == "float32":
        return {}
    sharded = recipe.train.parallel == "fsdp" and processes.world_size > 1
    for p in [p for p in pipeline.passes if isinstance(p, Fp8 | Activation24)]:
        pipeline.exchange_(p, replace(p, keep_cast=not sharded))
    if obstacle(processes.device):
        return {}
    from act24.tools.bench.rows import graph_milliseconds

    key = machine(processes.device)
    held = _parse(saved["products"], Path("the checkpoint")) if saved and saved["machine"] == key else ()
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
    return {"machine": key, "products": _entries(used.items())}


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
    with _alone(path):  # two that measure at a time on one GPU measure each other
        known = dict(read_table(path, key)) | dict(held)
        missing = {product: tuned(product, time, device)[0] for product in wanted if product not in known}
        if missing:
            with contextlib.suppress(TuningError):  # nowhere to keep it: it is measured again next time
                write_table(path, key, tuple(missing.items()))
    known |= missing
    return tuple((product, known[product]) for product in wanted)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time, where there is a place for a lock."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _entries(table: Iterable[tuple[Any, Any]]) -> list[dict[str, Any]]:
    return [Product(*product)._asdict() | Measured(*measured)._asdict() for product, measured in table]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TuningError(f"{path} cannot be read ({error}): delete it, and it is measured anew") from None
    if not isinstance(content, dict):
        raise TuningError(f"{path} holds no tuned products: delete it, and it is measured anew")
    return content


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
