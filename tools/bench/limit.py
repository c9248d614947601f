"""`act24 bench limit`: where the time of a captured training step goes, kernel by kernel, beside what the
machine could do.

Each side is a shipped recipe at a size, with its statistics, its micro-batches replayed from CUDA graphs. Its
steps are timed by events, then profiled: kernels are sorted by their names (`kernel_groups`), and what the
timed step takes beyond them is gaps. Times are of a micro-batch, with its share of the update.

The limit of a group is, measured in the same run on the same GPU:

- products: each of them alone, with its own operands, in bursts of a millisecond, or as it is in the step if
  that is shorter: products in a row run into the GPU's limit of power. They are recorded from one step that
  is launched operator by operator;
- attention: its products at the rate of a large one, or reading and writing what it must at the rate of a
  copy, whichever takes longer;
- what is elementwise: its bytes at the rate of a copy, if between two products there were one kernel that
  reads and writes each tensor once (`step_bytes`);
- clipping and optimizer: parameters, gradients and moments once at the rate of a copy.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from act24.errors import Act24Error
from act24.llama import LlamaConfig
from act24.optim import AdamWOptions
from act24.options import one_of
from act24.passes import Activation24, Relu2FFN
from act24.passes.relu2_ffn import parity_width
from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe
from act24.tools.bench.kernel_groups import (
    ATTENTION,
    GROUPS,
    PRODUCTS,
    SPARSE,
    UNKNOWN,
    busy,
    by_group,
    kernels_of,
)
from act24.tools.bench.launches import product_rate
from act24.tools.bench.rows import commit, milliseconds, needed_gpu, stoppable, versions
from act24.tools.bench.step import without_start
from act24.tools.bench.step_bytes import Shape, attention_operations, bytes_of
from act24.tools.data import Batch
from act24.tools.run.build import model_config
from act24.tools.run.optimizers import build_optimizer
from act24.tools.run.path import path_text
from act24.tools.run.processes import Processes
from act24.tools.run.step import TrainingStep
from act24.tools.run.tuning import use_table_


@dataclass(frozen=True)
class Size:
    """A preset's recipes, the rows of a micro-batch and how many of them an update has, and overrides."""

    family: str
    rows: int
    micro_batches: int
    overrides: tuple[str, ...] = ()


#: As people train them; 7b with 4 layers, which leave room for their optimizer.
SIZES = {
    "130m": Size("130m", 64, 8),
    "350m": Size("350m", 64, 8),
    "7b": Size(
        "1b",
        8,
        1,
        (
            "model.preset=llama-7b",
            "model.num_hidden_layers=4",
            "data.max_length=2048",
            "train.dtype=bfloat16",
        ),
    ),
}

#: Recipes of a size: full rank, for that is what `step_bytes` counts.
KINDS = ("relu2-act24", "dense", "relu2")

#: Updates before the first that is timed: the first two of micro-batches are launched, and so are those of
#: the weights that an update makes.
_WARMUP, _TIMED, _PROFILED = 3, 3, 1

#: What a product is among the operators that a step calls.
_DENSE_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm")
_SPARSE_PRODUCTS = ("act24::product24", "act24::product24_e4m3")

#: Kernels of a group that are named.
_NAMED = 12


class RecordedProducts(TorchDispatchMode):
    """The products that are called while it is in force: how many of each kind of operands, and the first
    ones to try again with.

    Attributes:
        counts: by operator and operands.
        calls: the operator and its arguments, likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[Any, ...], int] = {}
        self.calls: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name in _DENSE_PRODUCTS + _SPARSE_PRODUCTS:
            key = (name, *map(_kind, args), *map(_kind, (kwargs or {}).values()))
            self.counts[key] = self.counts.get(key, 0) + 1
            self.calls.setdefault(key, (func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _kind(argument: Any) -> Any:
    """What tells two arguments apart that take different times."""
    if isinstance(argument, Tensor):
        return str(argument.dtype).removeprefix("torch."), tuple(argument.shape), argument.stride()
    return argument


def is_sparse(key: tuple[Any, ...]) -> bool:
    """Whether a recorded product is 2:4."""
    return key[0] in _SPARSE_PRODUCTS


def product_times(
    recorded: RecordedProducts, milliseconds: Callable[[Callable[[], Any]], float]
) -> list[dict[str, Any]]:
    """Each recorded product alone: its operands, how often it was called, and ms of one call."""
    found = []
    for key, (function, args, kwargs) in recorded.calls.items():
        taken = milliseconds(lambda f=function, a=args, k=kwargs: f(*a, **k))
        shapes = [f"{part[0]} {'×'.join(map(str, part[1]))}" for part in key if isinstance(part, tuple)]
        found.append(
            {
                "operator": key[0],
                "operands": shapes,
                "sparse": is_sparse(key),
                "count": recorded.counts[key],
                "ms": taken,
            }
        )
    return sorted(found, key=lambda each: -each["count"] * each["ms"])


def recipe_of(size: str, kind: str, micro_batches: int | None = None) -> Recipe:
    """A shipped recipe at a size, its passes in force from the start."""
    chosen = SIZES[size]
    recipe = load_recipe(f"c4/{chosen.family}-{kind}", chosen.overrides)
    count = micro_batches or chosen.micro_batches
    rows = {
        "batch_size": chosen.rows,
        "total_batch_size": count * chosen.rows,
        "activation_checkpointing": False,
    }
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=rows)})


def bench_limit(
    sizes: Sequence[str] = tuple(SIZES),
    kinds: Sequence[str] = KINDS[:2],
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Profile a step of each kind at each size. Stopped, or where a side fails, it returns those it has.

    Args:
        sizes, kinds: of `SIZES` and `KINDS`.
        say: is told what is done, and why a side is left out.

    Returns:
        JSON values: the sides, what the machine was measured to do, versions and commit.

    Raises:
        Act24Error: an unknown size or kind, no GPU, or no side was measured.
    """
    for name, given, known in (("sizes", sizes, tuple(SIZES)), ("kinds", kinds, KINDS)):
        for each in given:
            one_of("bench limit", name, each, known)
    device, began = needed_gpu(), time.perf_counter()
    machine = {"copy_gb_s": copy_rate(device) / 1e9, "large_product_tflop_s": product_rate(device) / 1e12}
    sides: list[dict[str, Any]] = []
    with stoppable():
        try:
            for kind, size in itertools.product(kinds, sizes):
                try:
                    sides.append(_side(size, kind, device, machine))
                    of_products, to_begin, of_steps = sides[-1]["seconds"]
                    told = f"{of_products} s of products, {to_begin} s to begin, {of_steps} s of steps"
                    say(f"{size} {kind}: {told}")
                except Exception as error:  # the others keep their figures
                    first, *_ = str(error).strip().splitlines() or ["no message"]
                    say(f"{size} {kind} is left out: {type(error).__name__}: {first}")
                    error.__traceback__ = None  # whose frames hold the model
                gc.collect()
                torch._dynamo.reset()
                torch.cuda.empty_cache()
                say(f"{size} {kind}, {time.perf_counter() - began:.0f} s since the start")
        except KeyboardInterrupt:
            say("stopped: what follows is of the sides that were measured")
    if not sides:
        raise Act24Error("bench limit has no side that was measured: the lines above say why")
    return {
        "sides": sides,
        **machine,
        "gpu": torch.cuda.get_device_name(),
        "versions": versions(),
        "commit": commit(),
    }


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(2**29, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    # Launched: within a graph it is a node of its own kind, which took half as long again on an H200.
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source)) / 1e3)


def burst_milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call, as many of which are replayed from a CUDA graph as fit in a millisecond, with
    the GPU at rest before."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def taken(work: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        time.sleep(0.01)
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended)

    with torch.cuda.stream(torch.cuda.Stream()):
        call()
        count = max(1, min(50, round(1 / max(taken(call), 1e-3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(count):
                call()
        return statistics.median(taken(graph.replay) for _ in range(5)) / count


def _side(size: str, kind: str, device: torch.device, machine: dict[str, float]) -> dict[str, Any]:
    clock = [time.perf_counter()]
    products = _products(size, kind, device)
    gc.collect()
    torch.cuda.empty_cache()
    clock.append(time.perf_counter())
    recipe = recipe_of(size, kind)
    count = SIZES[size].micro_batches
    step, path, why_not = _steps(recipe, device)
    for _ in range(_WARMUP):
        step()
    reason = why_not()
    torch.cuda.synchronize()
    clock.append(time.perf_counter())
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_TIMED + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    taken = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / count
    with tempfile.TemporaryDirectory() as folder:
        kernels = kernels_of(_profiled(step, Path(folder) / "trace.json"))
    clock.append(time.perf_counter())
    parts = _PROFILED * count
    ran = busy(kernels) / 1e3 / parts
    limits = limits_of(recipe, path, products, machine)
    return {
        "size": size,
        "recipe": kind,
        "rows": SIZES[size].rows,
        "length": recipe.data.max_length,
        "micro_batches": count,
        "path": path,
        "not_captured": reason,
        "ms": taken,
        "kernels_ms": ran,
        "gaps_ms": taken - ran,
        "groups": groups_of(by_group(kernels, parts), limits),
        "products": products,
        "seconds": [round(b - a, 1) for a, b in itertools.pairwise(clock)],
    }


def groups_of(kernels: dict[str, Any], limits: dict[str, float]) -> list[dict[str, Any]]:
    """The groups that have kernels or a limit: ms, the limit, and the kernels that take longest; of unknown
    ones all. Products are a library's own: what they take is a limit too."""
    found = []
    for group in GROUPS:
        shares = kernels[group]
        if not shares and not limits.get(group):
            continue
        named = shares if group == UNKNOWN else shares[:_NAMED]
        taken, limit = sum(share.milliseconds for share in shares), limits.get(group)
        if limit is not None and shares and group in (PRODUCTS, SPARSE):
            limit = min(limit, taken)
        found.append(
            {
                "group": group,
                "ms": taken,
                "launches": sum(share.count for share in shares),
                "limit_ms": limit,
                "kernels": [share.as_json() for share in named],
            }
        )
    return found


def _products(size: str, kind: str, device: torch.device) -> list[dict[str, Any]]:
    """The products of one micro-batch, each timed alone."""
    recipe = recipe_of(size, kind, 1)
    launched = {"compile": "off", "cuda_graphs": "off"}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=launched)})
    step, *_ = _steps(recipe, device)
    step()  # which may measure scales by forwards of its own
    recorded = RecordedProducts()
    with recorded:
        step()
    return product_times(recorded, burst_milliseconds)


def _steps(recipe: Recipe, device: torch.device) -> tuple[Callable[[], None], str, Callable[[], str]]:
    """A function that makes an update, which path passes take, and what says why it is not captured."""
    processes = Processes(0, 1, device)
    first = max((getattr(p, "from_step", 0) for p in recipe.passes), default=0)
    built = without_start(recipe, device, first)
    use_table_(built.pipeline, device)  # to measure anew takes longer than all the rest
    path = path_text(built.pipeline, recipe, device)
    step = TrainingStep(built.model, recipe.train, processes, built.pipeline)
    optimizer = build_optimizer(built.model, recipe.optimizer, pipeline=built.pipeline)
    updates = itertools.count(first)
    shape = (recipe.train.batch_size, recipe.data.max_length)
    vocabulary, count = model_config(recipe).vocab_size, recipe.train.total_batch_size // shape[0]
    drawn = [torch.randint(vocabulary, (2, *shape)) for _ in range(count)]
    batches = [Batch(ids, labels) for ids, labels in drawn]

    def update() -> None:
        step(batches, optimizer, next(updates))

    return update, path, lambda: step.not_captured


def _profiled(step: Callable[[], None], file: Path) -> Path:
    """The trace of a few updates."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(_PROFILED):
            step()
        torch.cuda.synchronize()
    profiled.export_chrome_trace(str(file))
    return file


def limits_of(
    recipe: Recipe, path: str, products: Iterable[dict[str, Any]], machine: dict[str, float]
) -> dict[str, float]:
    """ms that each group takes at least; see the module.

    Args:
        path: what `path_text` says of the recipe.
        products: of `product_times`.
        machine: what `bench_limit` measured of it.
    """
    shape = shape_of(recipe, path)
    in_one_ms = machine["copy_gb_s"] * 1e6
    moved = {group: amount / in_one_ms for group, amount in bytes_of(shape).items()}
    multiplied = attention_operations(shape) / machine["large_product_tflop_s"] / 1e9
    alone = {SPARSE: 0.0, PRODUCTS: 0.0}
    for each in products:
        alone[SPARSE if each["sparse"] else PRODUCTS] += each["count"] * each["ms"]
    return {**moved, **alone, ATTENTION: max(moved[ATTENTION], multiplied)}


def shape_of(recipe: Recipe, path: str) -> Shape:
    """What the bytes of a recipe's step depend on."""
    config = model_config(recipe)
    assert isinstance(config, LlamaConfig)
    train, options = recipe.train, recipe.optimizer
    assert isinstance(options, AdamWOptions)
    sparse = next((p for p in recipe.passes if isinstance(p, Activation24)), None)
    squared = any(isinstance(p, Relu2FFN) for p in recipe.passes)
    parameter = 2 if train.dtype == "bfloat16" else 4
    form = "swiglu"
    if squared:
        form = "relu2"
    if sparse is not None:
        form = f"packed {sparse.backward}" if "packed 2:4 products" in path else "masked"
    return Shape(
        tokens=train.batch_size * recipe.data.max_length,
        length=recipe.data.max_length,
        config=config,
        features=parity_width(config.intermediate_size) if squared else config.intermediate_size,
        form=form,
        residual=parameter,  # of the embedding's dtype, which blocks add to
        parameter=parameter,
        moment=parameter if options.state_dtype == "parameter" else 4,
        casts=train.dtype == "bfloat16_autocast",
        micro_batches=train.total_batch_size // train.batch_size,
    )
