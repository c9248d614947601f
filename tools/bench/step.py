"""`act24 bench step`: a whole training step, ours beside the same model written by hand or beside another
recipe, in one run.

Both sides train on the same random tokens with the same optimizer and loss. They are built, warmed up, timed
and freed in turn, twice, and the medians are over all steps of both turns: a machine that drifts moves both.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from act24.errors import Act24Error
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.loss import cross_entropy_sum
from act24.low_rank.lost import kept_columns
from act24.optim import AdamW, AdamWOptions, parameter_groups
from act24.passes import Cola, Lost, Pipeline, Relu2FFN
from act24.passes.graph.linear_sites import FactorisingPass
from act24.recipes.schema import Recipe
from act24.tools.bench.handwritten import (
    BesideColumns,
    Bottleneck,
    Handwritten,
    Linear,
    Network,
    dense,
)
from act24.tools.data import Batch
from act24.tools.run.build import (
    Built,
    attention_passes,
    model_config,
    parameter_dtype,
    passes_of,
    plan_recipe,
)
from act24.tools.run.optimizers import build_optimizer
from act24.tools.run.processes import Processes
from act24.tools.run.step import TrainingStep, uses_compile
from act24.tools.run.tuning import tune_

_WARMUP = 5


@dataclass(frozen=True)
class StepTiming:
    """One side of the comparison.

    Attributes:
        name: which.
        milliseconds: median of an optimizer step.
        tokens_per_second: from that.
        teraflops: model FLOPs a second, forward and backward, 2:4 products counted as dense, attention's
            scores included.
        peak_gib: most memory allocated, parameters and optimizer state included.
    """

    name: str
    milliseconds: float
    tokens_per_second: float
    teraflops: float
    peak_gib: float


def bench_step(
    recipe: Recipe, rows: int, steps: int, turns: int = 2, beside: Recipe | None = None
) -> dict[str, Any]:
    """Time one step of `recipe` with `rows` rows, at the step where most passes are in force.

    Args:
        beside: the other side; None for the same model without 2:4, written by hand.

    Returns:
        JSON values: both sides, the ratio of their rates (the recipe's over the other), machine and versions.

    Raises:
        Act24Error: no hand-written form of this recipe, or no GPU.
    """
    if not torch.cuda.is_available():
        raise Act24Error("bench step times a GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    recipe = _with_rows(recipe, rows)
    config = model_config(recipe)
    sides: dict[str, Callable[[], Callable[[Batch], None]]] = {"act24": lambda: traced_side(recipe, device)}
    flops = {"act24": _flops_per_token(recipe, config)}
    if beside is None:
        handwritten = _handwritten_form(recipe, config)
        sides["hand-written"] = lambda: _handwritten(recipe, handwritten, device)
        flops["hand-written"] = flops["act24"]
    else:
        other = _with_rows(beside, rows)
        if (other.data.max_length, model_config(other).vocab_size) != (
            recipe.data.max_length,
            config.vocab_size,
        ):
            raise Act24Error("bench step compares recipes of one sequence length and one vocabulary")
        sides["beside"] = lambda: traced_side(other, device)
        flops["beside"] = _flops_per_token(other, model_config(other))
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    for _ in range(turns):
        for name, make in sides.items():
            taken, peak = time_side(make, config.vocab_size, rows, recipe.data.max_length, steps)
            times[name] += taken
            peaks[name] = max(peaks[name], peak)
    tokens = rows * recipe.data.max_length
    results = []
    for name in sides:
        seconds = statistics.median(times[name])
        results.append(
            StepTiming(
                name,
                1e3 * seconds,
                tokens / seconds,
                tokens * flops[name] / seconds / 1e12,
                peaks[name] / 2**30,
            )
        )
    ours, others = results
    return {
        "sides": [asdict(side) for side in results],
        "rate_ratio": ours.tokens_per_second / others.tokens_per_second,
        "memory_ratio": ours.peak_gib / others.peak_gib,
        "tokens_per_step": tokens,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def _with_rows(recipe: Recipe, rows: int) -> Recipe:
    train = recipe.train.model_copy(update={"batch_size": rows, "total_batch_size": rows})
    return recipe.model_copy(update={"train": train})


def _handwritten_form(recipe: Recipe, config: LlamaConfig) -> Callable[[], Handwritten]:
    """The hand-written model of what is left of the recipe without 2:4."""
    if attention_passes(recipe):
        raise Act24Error('bench step has no hand-written form of data.attention = "document"')
    network: Network = "swiglu"
    width, linear = config.intermediate_size, dense
    for p in recipe.passes:
        if isinstance(p, Relu2FFN):
            row = next(row for row in plan_recipe(recipe).report.rows if row.pass_name == p.name)
            network, width = "relu2", int(row.after.rpartition(" ")[2])
        elif isinstance(p, FactorisingPass) and p.scope == "all":
            linear = _linear_of(p)
            if isinstance(p, Cola) and p.mlp_activation == "drop" and network == "swiglu":
                network = "gated"
        elif p.name != "activation24":
            raise Act24Error(f"bench step has no hand-written form of {p.name}")
    return lambda: Handwritten(config, network, width, linear)


def _linear_of(p: FactorisingPass) -> Linear:
    """What a low-rank pass makes of a linear, written by hand."""
    activation = {"silu": F.silu, "relu2": lambda h: F.relu(h).square()}.get(getattr(p, "bottleneck", ""))

    def linear(in_features: int, out_features: int, attention: bool) -> nn.Module:
        rank = p.attn_rank if attention else p.mlp_rank
        assert rank is not None
        low = Bottleneck(in_features, out_features, rank, activation)
        if isinstance(p, Lost):
            return BesideColumns(low, kept_columns(in_features, p.sparsity), p.gamma)
        return low

    return linear


def without_start(recipe: Recipe, device: torch.device, step: int = 0, measure: object = None) -> Built:
    """`build`, with random values instead of the model's own start: for LoST that is a decomposition of every
    weight, minutes at 1b, and the time of a step does not depend on it."""
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config(recipe)).to(parameter_dtype(recipe))
    pipeline = Pipeline(model, passes_of(recipe), step=step, keep_all=True)
    pipeline.commit_()
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    pipeline.reset_buffers_()
    return Built(recipe, model, pipeline, step, recipe.tokenizer)


def traced_side(recipe: Recipe, device: torch.device) -> Callable[[Batch], None]:
    processes = Processes(0, 1, device)
    sparse_from = max((getattr(p, "from_step", 0) for p in recipe.passes), default=0)
    built = without_start(recipe, device, sparse_from)
    tune_(built.pipeline, recipe, processes)
    step = TrainingStep(built.model, recipe.train, processes, built.pipeline)
    optimizer = build_optimizer(built.model, recipe.optimizer, pipeline=built.pipeline)
    updates = itertools.count(sparse_from)

    def one(batch: Batch) -> None:
        starts = None
        if attention_passes(recipe):  # random tokens are one document a row
            starts = torch.zeros_like(batch.input_ids, dtype=torch.int32)
        step([replace(batch, starts=starts)], optimizer, next(updates))

    return one


def _handwritten(
    recipe: Recipe, make: Callable[[], Handwritten], device: torch.device
) -> Callable[[Batch], None]:
    with device:
        model = make().to(parameter_dtype(recipe))
    loss = cross_entropy_sum
    if uses_compile(recipe.train, device):
        for block in model.blocks:
            block.compile(fullgraph=True)
        loss = torch.compile(cross_entropy_sum, dynamic=False)
    # LORO's lazy updates, which are what is timed here, are AdamW's.
    options = recipe.optimizer
    if not isinstance(options, AdamWOptions):
        raise Act24Error(
            f"the hand-written side is trained by AdamW, and the recipe by {options.name}: use --beside with "
            "another recipe"
        )
    optimizer = AdamW(
        parameter_groups(model, options.weight_decay, options.decay),
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        state_dtype=options.state_dtype,
    )
    parameters = list(model.parameters())
    autocast = recipe.train.dtype == "bfloat16_autocast"

    def step(batch: Batch) -> None:
        inputs, labels = (
            t.pin_memory().to(device, non_blocking=True) for t in (batch.input_ids, batch.labels)
        )
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            total = loss(model(inputs), model.head.weight, labels)[0] / labels.numel()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.train.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_recipe(recipe: Recipe, rows: int, steps: int) -> tuple[float, float]:
    """Median seconds of one step of a recipe, as `bench_step` has it, and its peak memory in GiB."""
    recipe, device = _with_rows(recipe, rows), torch.device("cuda", torch.cuda.current_device())
    vocabulary, length = model_config(recipe).vocab_size, recipe.data.max_length
    taken, peak = time_side(lambda: traced_side(recipe, device), vocabulary, rows, length, steps)
    return statistics.median(taken), peak / 2**30


def time_side(
    make: Callable[[], Callable[[Batch], None]], vocabulary: int, rows: int, length: int, steps: int
) -> tuple[list[float], int]:
    """Build, warm up, time and free: seconds of each step, by events, a batch of fresh random tokens each
    time; and the most bytes allocated."""
    step = make()
    # Before the warm-up, which needs as much: a graph's replays allocate nothing.
    torch.cuda.reset_peak_memory_stats()
    batches = [
        Batch(torch.randint(vocabulary, (rows, length)), torch.randint(vocabulary, (rows, length)))
        for _ in range(4)
    ]
    for index in range(_WARMUP):
        step(batches[index % len(batches)])
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for index in range(steps):
        step(batches[index % len(batches)])
        marks[index + 1].record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del step
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)], peak


def _flops_per_token(recipe: Recipe, config: LlamaConfig) -> float:
    """Forward and backward: three times the forward's products. Causal scores count half the square."""
    dense = recipe.model_copy(update={"passes": tuple(p for p in recipe.passes if p.kind == "structural")})
    weights = plan_recipe(dense).report.flops_after
    scores = 2 * recipe.data.max_length * config.num_attention_heads * config.head_width
    return 3.0 * (weights + config.num_hidden_layers * scores)
