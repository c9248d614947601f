"""`act24 bench peers`: whole training steps of what a user would pick instead, beside ours, in one run.

The LLaMA of `transformers`, compiled as a whole, with its own loss and PyTorch's fused AdamW; the same with
its linears but the head in torchao's fp8, which has to be installed for that; and our recipes of the same
size. All sides train on random tokens in one micro-batch. Each is built, warmed up, timed and freed in turn,
all of them again in the next turn, and what is reported is the median over all turns.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from act24.errors import Act24Error
from act24.options import one_of
from act24.passes import Activation24, Fp8
from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe
from act24.tools.bench.rows import Row, needed_gpu
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

#: Our sides: the recipe, and whether its linears and products are in fp8.
OURS = {
    "act24 dense": ("dense", False),
    "act24 dense, fp8": ("dense", True),
    "act24 relu², 2:4": ("relu2-act24", False),
    "act24 relu², 2:4, fp8": ("relu2-act24", True),
    "act24 CoLA relu², 2:4, fp8": ("cola-relu2-act24", True),
}


def our_recipe(size: str, precision: str, side: str) -> Recipe:
    """A shipped recipe at a size, with the split backward, without counting."""
    name, fp8 = OURS[side]
    overrides = (*SIZES[size].overrides, *PRECISIONS[precision], "log.activation_statistics=false")
    recipe = load_recipe(f"c4/{SIZES[size].family}-{name}", overrides)
    passes = [
        Activation24(backward="split_gemm") if isinstance(p, Activation24) else p for p in recipe.passes
    ]
    passes += [Fp8()] * fp8
    train = recipe.train.model_copy(update={"activation_checkpointing": False})
    return recipe.model_copy(update={"passes": tuple(passes), "train": train})


def bench_peers(
    sizes: Sequence[str] = ("7b",),
    precisions: Sequence[str] = ("bfloat16",),
    rows: int | None = None,
    steps: int = 10,
    turns: int = 2,
) -> list[Row]:
    """Time all sides, with progress on stderr; each row is one of ours beside one that a user would pick.

    Args:
        sizes, precisions: names in `SIZES` and `PRECISIONS`.
        rows: a step; None for those of the size.

    Raises:
        Act24Error: no GPU, or transformers or torchao is not installed.
    """
    for name, given, known in (("sizes", sizes, SIZES), ("precisions", precisions, PRECISIONS)):
        for each in given:
            one_of("bench peers", name, each, known)
    device, result = needed_gpu(), []
    for size in sizes:
        for precision in precisions:
            times = _times(size, precision, rows or SIZES[size].rows, steps, turns, device)
            result += _rows(f"{size}, {precision}, {rows or SIZES[size].rows} rows", times)
    return result


def _times(
    size: str,
    precision: str,
    rows: int,
    steps: int,
    turns: int,
    device: torch.device,
) -> dict[str, float]:
    """Median milliseconds of a step of each side."""
    base = _with_rows(our_recipe(size, precision, "act24 dense"), rows)
    sides: dict[str, Callable[[], Callable[[Batch], None]]] = {
        "transformers": lambda: _transformers(base, device, None)
    }
    for scaling in SCALINGS:
        sides[f"transformers, torchao {scaling}"] = lambda s=scaling: _transformers(base, device, s)
    for side in OURS:
        recipe = _with_rows(our_recipe(size, precision, side), rows)
        sides[side] = lambda recipe=recipe: traced_side(recipe, device)
    found: dict[str, list[float]] = {side: [] for side in sides}
    vocabulary, length = model_config(base).vocab_size, base.data.max_length
    for turn in range(turns):
        for side, make in sides.items():
            seconds, peak = time_side(make, vocabulary, rows, length, steps)
            found[side] += seconds
            taken = 1e3 * statistics.median(seconds)
            line = f"{size}, {precision}, turn {turn}: {side} {taken:.1f} ms, {peak / 2**30:.1f} GiB"
            print(line, file=sys.stderr, flush=True)
    return {side: 1e3 * statistics.median(seconds) for side, seconds in found.items()}


def _with_rows(recipe: Recipe, rows: int) -> Recipe:
    train = recipe.train.model_copy(update={"batch_size": rows, "total_batch_size": rows})
    return recipe.model_copy(update={"train": train})


def _rows(title: str, times: dict[str, float]) -> list[Row]:
    """Ours beside plain transformers, the faster of torchao's two, and act24 dense."""
    others = [side for side in times if side not in OURS]
    libraries = sorted((side for side in others if "torchao" in side), key=times.__getitem__)
    beside = dict.fromkeys(("transformers", *libraries[:1], "act24 dense"))
    rows = [
        Row(f"step, {title}, {side}", times[side], times["transformers"], "ms", None, "transformers")
        for side in others[1:]
    ]
    for side in OURS:
        rows += [
            Row(f"step, {title}, {side}", times[side], times[other], "ms", None, other)
            for other in beside
            if other != side
        ]
    return rows


def _transformers(recipe: Recipe, device: torch.device, scaling: str | None) -> Callable[[Batch], None]:
    """A step of the LLaMA of transformers; `scaling`, its linears but the head in torchao's fp8."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise Act24Error("bench peers needs transformers: pip install 'act24[hf]'") from None
    config, train = model_config(recipe), recipe.train
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    with device:
        model: Any = LlamaForCausalLM(LlamaConfig(**{size: getattr(config, size) for size in sizes}))
    model.to(dtype=parameter_dtype(recipe)).train()
    if scaling is not None:
        _to_torchao_(model, scaling)
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


def _to_torchao_(model: nn.Module, scaling: str) -> None:
    try:
        from torchao.float8 import (  # pyright: ignore[reportMissingImports]
            Float8LinearConfig,
            convert_to_float8_training,
        )
    except ImportError:
        raise Act24Error(
            "bench peers needs torchao (0.17 goes with torch 2.11): pip install torchao"
        ) from None
    config = Float8LinearConfig.from_recipe_name(scaling)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name != "lm_head")
