"""`precision = "auto"` on this machine: every layer that may be in e4m3 is timed both ways when a run begins.

What is found is kept beside the tuned products (`act24.tools.run.tuning`), for whoever trains the same layer
under the same conditions on such a machine, and written into checkpoints: a run that goes on keeps what was
decided, wherever it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from act24.loss import CHUNK_TOKENS
from act24.passes import Activation24, Fp8, OperationalPass, Pipeline, Weight24
from act24.precision import (
    Conditions,
    Decided,
    Kind,
    Layer,
    Side,
    Timed,
    linears,
    network,
    sparse_linear,
    timed,
)
from act24.recipes.schema import Recipe
from act24.sparse24.feed_forward.options import Precision
from act24.sparse24.weight.forms import LinearOptions24
from act24.tools.checkpoints.checkpoint import version
from act24.tools.run.step import accumulation, uses_compile
from act24.tools.run.tuning_cache import TuningError, alone, cache_path, machine, read_cache, write_cache

#: Milliseconds that a call takes.
Time = Callable[[Callable[[], Any]], float]

#: Passes that have a precision.
Narrowing = Fp8 | Activation24 | Weight24

#: What makes both sides of a layer under conditions.
Make = Callable[[Conditions], Mapping[Precision, Side]]


def undecided(pipeline: Pipeline) -> list[Narrowing]:
    """The passes that leave their precision to the tuner."""
    return [p for p in pipeline.passes if isinstance(p, Narrowing) and p.precision == "auto"]


def layers(pipeline: Pipeline, device: torch.device) -> dict[Layer, Make]:
    """What `"auto"` has to decide about in any interval of steps, each once, and how it is made."""
    found: dict[Layer, Make] = {}
    for p in undecided(pipeline):
        # What it leaves for now too.
        whole = replace(p, precision="fp8") if isinstance(p, Fp8) else p
        for step in (0, *pipeline.boundaries):
            among = pipeline.in_force(step)
            if p not in among:
                continue
            chosen: list[OperationalPass] = [whole if q is p else q for q in among]
            for _, match in pipeline.matches(whole, chosen):
                if match.layer is not None and match.layer not in found:
                    found[match.layer] = _maker(p, match.layer, match.nodes, device)
    return found


def _maker(p: Narrowing, layer: Layer, site: Any, device: torch.device) -> Make:
    if isinstance(p, Fp8):
        return lambda conditions: linears(layer, p.scaling, p.kernels, conditions, device)
    if isinstance(p, Activation24):
        return lambda conditions: network(layer, p.options(site), conditions, device)
    width, out = layer.sizes
    options = LinearOptions24(p.record.both_ways, p.kernels, p.algorithms)
    packs = p.finds_packing(out, width)
    return lambda conditions: sparse_linear(layer, options, p.record.soft, p.draws, packs, conditions, device)


def conditions_of(recipe: Recipe, world_size: int, device: torch.device) -> Conditions:
    """Under which a recipe's layers are timed."""
    train = recipe.train
    assert train.dtype != "float32"
    return Conditions(
        rows=train.batch_size,
        length=recipe.data.max_length,
        dtype=train.dtype,
        compiled=uses_compile(train, device),
        kept=not (train.parallel == "fsdp" and world_size > 1),
        micro_batches=accumulation(train, world_size),
        counted=recipe.log.activation_statistics and recipe.log.activation_statistics_every == 1,
    )


def of_layer(conditions: Conditions, layer: Layer) -> Conditions:
    """The head is read in chunks of tokens."""
    if layer.kind != "head" or conditions.rows * conditions.length <= CHUNK_TOKENS:
        return conditions
    return conditions._replace(rows=1, length=CHUNK_TOKENS)


def decide(
    wanted: Mapping[Layer, Make],
    conditions: Conditions,
    device: torch.device,
    time: Time,
    held: Mapping[Layer, Timed],
) -> dict[Layer, Timed]:
    """What is taken of each layer: what is held, else from the cache, else timed and added to it.

    Args:
        held: what stands, whatever the cache says.
    """
    path, key = cache_path(), layers_key(device)
    found = {layer: held[layer] for layer in wanted if layer in held}
    if len(found) == len(wanted):
        return found
    with alone(path):
        known = {_key(entry): entry for entry in known_layers(path, key)}
        before = len(known)
        for layer, make in wanted.items():
            under = of_layer(conditions, layer)
            entry = layer._asdict() | under._asdict()
            if layer not in found and _key(entry) not in known:
                known[_key(entry)] = entry | timed(make(under), under, time)._asdict()
                _let_go(under, device)
            if layer not in found:
                found[layer] = parse_layer(known[_key(entry)], path)[1]
        if len(known) > before:
            with contextlib.suppress(TuningError):  # nowhere to keep it: it is timed again next time
                write_cache(path, read_cache(path) | {key: list(known.values())})
    return found


def layers_key(device: torch.device) -> str:
    """What the figures of layers hold for: the GPU, and all the code that runs there."""
    return f"layers: {machine(device)}, torch {torch.__version__}, act24 {version()}"


def known_layers(path: Path, key: str) -> list[dict[str, Any]]:
    """What is known of the layers of a machine, as JSON values.

    Raises:
        TuningError: the file is damaged.
    """
    entries = read_cache(path).get(key, [])
    if not isinstance(entries, list):
        raise TuningError(_NO_LAYER.format(path))
    for entry in entries:
        parse_layer(entry, path)
        if not entry.keys() >= {*Conditions._fields}:
            raise TuningError(_NO_LAYER.format(path))
    return entries


def _let_go(conditions: Conditions, device: torch.device) -> None:
    """Of what timing has compiled and allocated."""
    if conditions.compiled:
        torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one entry from another."""
    names = (*Layer._fields, *Conditions._fields)
    return tuple(tuple(entry[name]) if name == "sizes" else entry[name] for name in names)


_NO_LAYER = "{} holds an entry that is no timed layer: delete it, and it is timed anew"


def parse_layer(entry: Any, origin: object) -> tuple[Layer, Timed]:
    """A layer and what was found of it, from JSON.

    Raises:
        TuningError: it is no such entry.
    """
    try:
        layer = Layer(entry["kind"], tuple(map(int, entry["sizes"])), str(entry["options"]))
        found = Timed(entry["precision"], float(entry["bfloat16"]), float(entry["fp8"]))
    except (TypeError, KeyError, ValueError):
        raise TuningError(_NO_LAYER.format(origin)) from None
    if layer.kind not in get_args(Kind) or found.precision not in get_args(Precision):
        raise TuningError(_NO_LAYER.format(origin))
    return layer, found


def layer_entries(decided: Mapping[Layer, Timed]) -> list[dict[str, Any]]:
    """What was decided, as JSON values."""
    return [layer._asdict() | {"sizes": [*layer.sizes]} | found._asdict() for layer, found in decided.items()]


def held_layers(saved: Mapping[str, Any] | None) -> dict[Layer, Timed]:
    """What was decided when a run began, from what `tune_` returned then."""
    entries = (saved or {}).get("layers", ())
    return dict(parse_layer(entry, "the checkpoint") for entry in entries)


def why_not_timed(device: torch.device) -> str:
    """Why nothing can be timed here; empty if it can."""
    return "" if device.type == "cuda" else "there is no GPU"


def hold_(pipeline: Pipeline, decided: Mapping[Layer, Timed]) -> None:
    """Let the passes that leave their precision open take what was decided."""
    table: Decided = tuple((tuple(layer), tuple(found)) for layer, found in decided.items())  # type: ignore[misc]
    for p in undecided(pipeline) if decided else ():
        pipeline.exchange_(p, replace(p, decided=table))


def decided_text(p: Narrowing) -> Iterator[str]:
    """What was decided about the layers of a pass, for the start of a run."""
    kinds = {Fp8: ("linears", "head"), Activation24: ("network",), Weight24: ("weight24",)}[type(p)]
    for fields, found in p.decided:
        layer, one = Layer(*fields), Timed(*found)
        if layer.kind in kinds:
            yield f"{layer} {one.precision} (fp8 {one.fp8:.3g} ms, bfloat16 {one.bfloat16:.3g})"
