"""`act24 bench peers`: whole training steps of what a user would pick instead, beside ours, in one run.

The LLaMA of `transformers`, compiled as a whole, with its own loss and PyTorch's fused AdamW; the same with
its linears but the head in torchao's fp8, which has to be installed for that; and our recipes of the same
size. All sides train on random tokens in one micro-batch. Each is built, warmed up, timed and freed in turn,
all of them again in the next turn, and what is reported is the median over all turns. A side that fails is
said and left out; a command that is stopped reports the sides that it has timed.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from act24.errors import Act24Error
from act24.fp8.linear import MULTIPLE
from act24.options import one_of
from act24.passes import Activation24, Fp8
from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe
from act24.tools.bench.rows import Row, needed_gpu, stoppable
from act24.tools.bench.step import time_side, traced_side
from act24.tools.data import Batch
from act24.tools.run.build import model_config, parameter_dtype


@dataclass(frozen=True)
class Size:
    """A preset's recipes, rows a step, and what is overridden."""

    family: str
    rows: int
    overrides: tuple[str, ...] = ()


#: 7b with 4 layers, which leave room for their optimizer. With so many rows the GPU paces a step.
SIZES = {
    "130m": Size("130m", 256),
    "350m": Size("350m", 128),
    "1b": Size("1b", 64),
    "7b": Size("1b", 8, ("model.preset=llama-7b", "model.num_hidden_layers=4", "data.max_length=2048")),
}

#: What the recipes of each precision say, moments included.
PRECISIONS = {
    "autocast": (),
    "bfloat16": ("train.dtype=bfloat16", "optimizer.state_dtype=parameter"),
}

#: What torchao scales by.
SCALINGS = ("tensorwise", "rowwise")

#: Our sides: the recipe, and the pass that puts its linears and products in fp8.
OURS = {
    "act24 dense": ("dense", None),
    "act24 dense, fp8": ("dense", Fp8()),
    "act24 dense, fp8 with head": ("dense", Fp8(head=True)),
    "act24 relu², 2:4": ("relu2-act24", None),
    "act24 relu², 2:4, fp8": ("relu2-act24", Fp8()),
    "act24 relu², 2:4, fp8 with head": ("relu2-act24", Fp8(head=True)),
    "act24 CoLA relu², 2:4": ("cola-relu2-act24", None),
    # Factors of rank 512 are slower in e4m3 than in bfloat16.
    "act24 CoLA relu², 2:4, fp8 where faster, with head": (
        "cola-relu2-act24",
        Fp8(precision="auto", head=True),
    ),
}

#: Builds a side, and returns its step.
Make = Callable[[], Callable[[Batch], None]]

#: Theirs: what torchao scales by, or None without it.
PEERS = {"transformers": None} | {f"transformers, torchao {scaling}": scaling for scaling in SCALINGS}


def our_recipe(size: str, precision: str, side: str) -> Recipe:
    """A shipped recipe at a size, with the split backward, without counting."""
    name, fp8 = OURS[side]
    overrides = (*SIZES[size].overrides, *PRECISIONS[precision], "log.activation_statistics=false")
    recipe = load_recipe(f"c4/{SIZES[size].family}-{name}", overrides)
    passes = [
        Activation24(backward="split_gemm") if isinstance(p, Activation24) else p for p in recipe.passes
    ]
    passes += [fp8] if fp8 is not None else []
    train = recipe.train.model_copy(update={"activation_checkpointing": False})
    return recipe.model_copy(update={"passes": tuple(passes), "train": train})


def bench_peers(
    sizes: Sequence[str] = ("7b",),
    precisions: Sequence[str] = ("bfloat16",),
    rows: int | None = None,
    steps: int = 10,
    turns: int = 2,
    sides: Sequence[str] = (),
) -> list[Row]:
    """Time all sides, with progress on stderr; each row is one of ours beside one that a user would pick.

    Args:
        sizes, precisions: names in `SIZES` and `PRECISIONS`.
        rows: a step; None for those of the size.
        sides: names in `PEERS` and `OURS`; empty: all.

    Raises:
        Act24Error: no GPU, or transformers or torchao is not installed; no side could be timed.
    """
    every = {**PEERS, **OURS}
    named = {"sizes": (sizes, SIZES), "precisions": (precisions, PRECISIONS), "sides": (sides, every)}
    for name, (given, known) in named.items():
        for each in given:
            one_of("bench peers", name, each, known)
    chosen = [side for side in every if side in sides] or list(every)
    device, found = needed_gpu(), []
    _need_packages(chosen)
    with stoppable():
        try:
            for size in sizes:
                for precision in precisions:
                    per_step = rows or SIZES[size].rows
                    found.append(Timed(f"{size}, {precision}, {per_step} rows"))
                    _time_(found[-1], size, precision, per_step, steps, turns, chosen, device)
        except KeyboardInterrupt:
            _say("stopped: what follows is of the sides that were timed")
    result = [row for timed in found for row in rows_of(timed)]
    if not result:
        raise Act24Error("bench peers has no two sides to compare: the lines above say why")
    return result


@dataclass
class Timed:
    """What was measured of one size and precision.

    Attributes:
        title: of both.
        seconds: of each step, by side, over all turns.
        notes: what has to be known of a side.
        failed: sides that are left out.
    """

    title: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _need_packages(sides: Sequence[str]) -> None:
    wanted = {
        "transformers": "pip install 'act24[hf]'",
        "torchao": "pip install torchao (0.17 for torch 2.11)",
    }
    for package, how in wanted.items():
        if any(package in side for side in sides) and importlib.util.find_spec(package) is None:
            raise Act24Error(f"bench peers needs {package}: {how}")


def _time_(
    timed: Timed,
    size: str,
    precision: str,
    rows: int,
    steps: int,
    turns: int,
    chosen: Sequence[str],
    device: torch.device,
) -> None:
    """Time the steps of each side."""
    base = _with_rows(our_recipe(size, precision, "act24 dense"), rows)
    sides: dict[str, Make] = {}
    for side in chosen:
        if side in OURS:
            recipe = _with_rows(our_recipe(size, precision, side), rows)
            sides[side] = lambda recipe=recipe: traced_side(recipe, device)
        else:
            sides[side] = lambda side=side: _transformers(base, device, side, timed.notes)
    vocabulary, length = model_config(base).vocab_size, base.data.max_length
    time_turns_(timed, sides, turns, lambda make: time_side(make, vocabulary, rows, length, steps))


def time_turns_(
    timed: Timed, sides: dict[str, Make], turns: int, time: Callable[[Make], tuple[list[float], int]]
) -> None:
    """Time all sides in turn. What one raises is said, and it is left out from then on."""
    for turn in range(turns):
        for side, make in sides.items():
            if side in timed.failed:
                continue
            place = f"{timed.title}, turn {turn}: {side}"
            try:
                seconds, peak = time(make)
            except (
                Exception
            ) as error:  # whatever a library makes of its own sizes is no reason to lose the rest
                lines = str(error).strip().splitlines() or ["no message"]
                _say(f"{place} is left out: {type(error).__name__}: {lines[0]}")
                timed.failed.add(side)
                timed.seconds.pop(side, None)
                error.__traceback__ = None  # whose frames hold the model
                gc.collect()
                torch._dynamo.reset()
                torch.cuda.empty_cache()
                continue
            timed.seconds.setdefault(side, []).extend(seconds)
            taken = 1e3 * statistics.median(seconds)
            note = f" ({timed.notes[side]})" if side in timed.notes else ""
            _say(f"{place} {taken:.1f} ms, {peak / 2**30:.1f} GiB{note}")


def _with_rows(recipe: Recipe, rows: int) -> Recipe:
    train = recipe.train.model_copy(update={"batch_size": rows, "total_batch_size": rows})
    return recipe.model_copy(update={"train": train})


def rows_of(timed: Timed) -> list[Row]:
    """Ours beside plain transformers, the faster of torchao's two, and act24 dense; theirs beside plain
    transformers. A note names the other side, and what has to be known of both."""
    times = {side: 1e3 * statistics.median(seconds) for side, seconds in timed.seconds.items()}
    libraries = sorted((side for side in times if "torchao" in side), key=times.__getitem__)
    beside = ("transformers", *libraries[:1], "act24 dense")
    rows = []
    for side in (side for side in (*PEERS, *OURS) if side in times):
        for other in beside if side in OURS else ("transformers",):
            if other != side and other in times:
                notes = (f"{name}: {timed.notes[name]}" for name in (side, other) if name in timed.notes)
                note = "; ".join((other, *notes))
                rows.append(Row(f"step, {timed.title}, {side}", times[side], times[other], "ms", None, note))
    return rows


def _transformers(
    recipe: Recipe, device: torch.device, side: str, notes: dict[str, str]
) -> Callable[[Batch], None]:
    """A step of the LLaMA of transformers, a side of `PEERS`; `notes` is told what torchao leaves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, train = model_config(recipe), recipe.train
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    with device:
        model: Any = LlamaForCausalLM(LlamaConfig(**{size: getattr(config, size) for size in sizes}))
    model.to(dtype=parameter_dtype(recipe)).train()
    if (scaling := PEERS[side]) is not None and (note := _to_torchao_(model, scaling)):
        notes[side] = note
    compiled = torch.compile(model, dynamic=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.optimizer.lr, fused=True)
    autocast = train.dtype == "bfloat16_autocast"

    def step(batch: Batch) -> None:
        ids = batch.input_ids.pin_memory().to(device, non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, train.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def converts(module: nn.Module, name: str) -> bool:
    """Whether a linear goes to torchao. By `module_filter_fn` its documentation leaves out the head, and what
    has sides that are no multiples of 16: its products fail with them."""
    return name != "lm_head" and fits(module)


def fits(module: nn.Module) -> bool:
    """Whether e4m3 has products with the weight of a linear."""
    return all(side % MULTIPLE == 0 for side in module.weight.shape)  # type: ignore[union-attr]


def left_by_size(model: nn.Module) -> str:
    """Which of a model's linears but the head do not go to torchao, in words; empty if all do."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    left = [module for module in linears.values() if not fits(module)]
    shapes = " and ".join(sorted({" × ".join(map(str, module.weight.shape)) for module in left}))
    if not left:
        return ""
    return f"{len(left)} of {len(linears)} linears stay in bfloat16, {shapes} are no multiples of {MULTIPLE}"


def _to_torchao_(model: nn.Module, scaling: str) -> str:
    """Convert the linears, and say which stay."""
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    left = left_by_size(model)
    config = Float8LinearConfig.from_recipe_name(scaling)
    convert_to_float8_training(model, config=config, module_filter_fn=converts)
    return left
