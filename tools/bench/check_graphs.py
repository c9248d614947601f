"""`python -m act24.tools.bench.check_graphs [WORD…]`, by hand on a GPU: steps replayed from CUDA graphs
beside steps launched operator by operator, bit for bit.

For every method a small model makes four updates of two micro-batches each, twice from the same start:
captured (the first update warms up) and not, with other rows, another learning rate and other seeds for every
update. What has to be equal are the losses, the gradients of every update, all parameters and buffers at the
end, and held-out losses in between, which are captured too. One case changes its passes half way; one makes a
capture fail.

Prints a line a case, and leaves with status 1 if one fails. Only cases with a WORD in their name, if given.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch import Tensor, nn

from act24.passes import Pipeline
from act24.passes.state import _weights_to_read
from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe
from act24.tools.bench.rows import needed_gpu
from act24.tools.bench.step import without_start
from act24.tools.data import Batch
from act24.tools.data.batches import document_starts
from act24.tools.run.graphs import GraphedCalls, capture_stream
from act24.tools.run.optimizers import build_optimizer
from act24.tools.run.processes import Processes
from act24.tools.run.step import TrainingStep
from act24.tools.run.tuning import tune_

#: 64 rows of 256 in each of two micro-batches, as 2:4 products want, and two layers.
_SMALL = (
    "model.num_hidden_layers=2",
    "train.batch_size=64",
    "train.total_batch_size=128",
    "log.activation_statistics=true",
)
_UPDATES = 4

_RELU2 = 'passes=[{use="relu2_ffn"},{use="activation24",from_step=0%s}]'
_WEIGHT = 'passes=[{use="weight24",from_step=0%s}]'

#: Recipe, overrides, and whether rows are padded; None: those of the third update's second micro-batch.
CASES: dict[str, tuple[str, tuple[str, ...], bool | None]] = {
    "dense": ("c4/130m-dense", (), False),
    "dense, bfloat16 parameters": ("c4/130m-dense", ("train.dtype=bfloat16",), False),
    "dense, activation checkpointing": ("c4/130m-dense", ("train.activation_checkpointing=true",), False),
    "dense, within documents": ("c4/130m-dense", ("data.attention=document",), False),
    "naive, within documents, padded": ("c4/130m-dense", (_RELU2 % "", "data.attention=document"), True),
    "naive": ("c4/130m-dense", (_RELU2 % "",), False),
    "naive, padded": ("c4/130m-dense", (_RELU2 % "",), True),
    "naive, padded now and then": ("c4/130m-dense", (_RELU2 % "",), None),
    "naive from update 2 on": ("c4/130m-relu2-act24", ("passes.activation24.from_step=2",), False),
    "naive, sparse": ("c4/130m-dense", (_RELU2 % ',backward="sparse"',), False),
    "naive, split": ("c4/130m-dense", (_RELU2 % ',backward="split_gemm"',), False),
    "naive, split, padded": ("c4/130m-dense", (_RELU2 % ',backward="split_gemm"',), True),
    "mvue": ("c4/130m-dense", (_RELU2 % ',method="mvue"',), False),
    "mvue, split": ("c4/130m-dense", (_RELU2 % ',method="mvue",backward="split_gemm"',), False),
    "soft_dynamic, split": (
        "c4/130m-dense",
        (_RELU2 % ',method="soft_dynamic",dynamic_steps=1,backward="split_gemm"',),
        False,
    ),
    "soft_threshold_weights": ("c4/130m-dense", (_RELU2 % ',method="soft_threshold_weights"',), False),
    "ste": ("c4/130m-dense", (_RELU2 % ',estimator="ste"',), False),
    "fp8, split": ("c4/130m-dense", (_RELU2 % ',precision="fp8",backward="split_gemm"',), False),
    "fp8 with head": (
        "c4/130m-dense",
        ('passes=[{use="relu2_ffn"},{use="activation24"},{use="fp8",head=true}]',),
        False,
    ),
    "fp8 where it is faster": (
        "c4/130m-dense",
        ('passes=[{use="relu2_ffn"},{use="activation24"},{use="fp8",precision="auto",head=true}]',),
        False,
    ),
    "weight24 transposable": ("c4/130m-dense", (_WEIGHT % ",mask_every=2",), False),
    "weight24 soft_threshold": ("c4/130m-dense", (_WEIGHT % ',method="soft_threshold"',), False),
    "weight24 sr_ste": ("c4/130m-dense", (_WEIGHT % ',method="sr_ste"',), False),
    "LoST": ("c4/130m-lost-relu2-act24", ("passes.activation24.from_step=0",), False),
    "CoLA": ("c4/130m-cola-relu2-act24", ("passes.activation24.from_step=0",), False),
    "LORO, exact steps": (
        "c4/130m-loro-relu2-act24",
        ("passes.activation24.from_step=0", "optimizer.exact_every=2"),
        False,
    ),
}


def _batches(recipe: Recipe, padded: bool | None) -> list[list[Batch]]:
    """Of every update, and behind them three held-out ones."""
    generator = torch.Generator().manual_seed(0)
    rows, length = recipe.train.batch_size, recipe.data.max_length

    def draw(padded: bool | None = padded) -> Batch:
        ids, labels = torch.randint(32000, (2, rows, length), generator=generator)
        if padded:
            filled = torch.randint(2, length + 1, (rows, 1), generator=generator)
            labels = labels.where(torch.arange(length) < filled, -100)
        starts = None
        if recipe.data.attention == "document":  # of some forty tokens each
            ends = ids.where(torch.rand(ids.shape, generator=generator) > 1 / 40, -1)
            starts = torch.from_numpy(document_starts(ends.numpy(), -1))
        return Batch(ids, labels, starts)

    updates = [[draw() for _ in range(2)] for _ in range(_UPDATES)]
    if padded is None:
        updates[2][1] = draw(True)
    return [*updates, [draw() for _ in range(3)]]


class _Recorded:
    """An optimizer whose gradients are kept as they were when it made its step."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self.gradients: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        self.gradients += [p.grad.clone() for p in self._parameters if p.grad is not None]
        self._optimizer.step()


def _run(
    recipe: Recipe, model: nn.Module, pipeline: Pipeline, batches: list[list[Batch]], processes: Processes
) -> tuple[list[Tensor], int]:
    """Everything that has to be equal, and how many graphs there were at the end."""
    step = TrainingStep(model, recipe.train, processes, pipeline)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, recipe.optimizer, pipeline=pipeline)
    recorded = _Recorded(optimizer, [p for p in model.parameters() if p.requires_grad])
    found: list[Tensor] = []
    *updates, heldout = batches
    for number, rows in enumerate(updates):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (number + 1)
        result = step(rows, recorded, number)  # type: ignore[arg-type]
        found += [result.loss.clone(), result.grad_norm.clone()]
        with pipeline.evaluation():
            found += [part for batch in heldout for part in step.evaluation_loss(batch)]
    if step.not_captured and recipe.train.cuda_graphs == "on":
        raise AssertionError(step.not_captured)
    graphs = 0 if step._graphs is None else len(step._graphs._graphs)
    state = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    return [*found, *recorded.gradients, *state], graphs


def check(name: str, device: torch.device) -> str:
    """What differs in a case, or how it went."""
    recipe_name, overrides, padded = CASES[name]
    processes = Processes(0, 1, device)
    recipe = load_recipe(recipe_name, [*_SMALL, *overrides])
    torch.manual_seed(0)
    built = without_start(recipe, device)
    tune_(built.pipeline, recipe, processes)
    model, pipeline = built.model, built.pipeline
    start = {key: value.clone() for key, value in (*model.named_parameters(), *model.named_buffers())}
    batches, sides = _batches(recipe, padded), []
    for choice in ("off", "on"):
        with torch.no_grad():
            for key, value in (*model.named_parameters(), *model.named_buffers()):
                if value.shape == start[_stock(key)].shape:  # padding takes the shape of the rows
                    value.copy_(start[_stock(key)])
        chosen = recipe.model_copy(update={"train": recipe.train.model_copy(update={"cuda_graphs": choice})})
        sides.append(_run(chosen, model, pipeline, batches, processes))
        for parameter in model.parameters():
            parameter.grad = None
    (plain, _), (captured, graphs) = sides
    unequal = sum(not _same(a, b) for a, b in zip(plain, captured, strict=True))
    wanted = 2 + (
        next(_weights_to_read(pipeline), None) is not None
    )  # training, evaluation, casts or packing
    if unequal or graphs != wanted:
        worst = max(
            (a.float() - b.float()).abs().max().item()
            for a, b in zip(plain, captured, strict=True)
            if a.numel()
        )
        differ = f"{unequal} of {len(plain)} tensors differ, by {worst:.2g} at most"
        return f"FAILED {differ}; {graphs} graphs, {wanted} expected"
    return f"ok     {len(plain)} tensors equal, {graphs} graphs"


def check_failure(device: torch.device) -> str:
    """A call that waits for the device cannot be captured: it runs as it is, and so does what follows."""
    calls, x = GraphedCalls(device), torch.ones(8, device=device)

    def waits() -> tuple[Tensor]:
        return (x * x.sum().item(),)

    with calls.on_stream():
        results = [calls("a", waits)[0].sum().item() for _ in range(4)]
        torch.randn(8, device=device)
    right = calls.problem and results == [64.0] * 4
    return f"{'ok    ' if right else 'FAILED'} {results}, said: {calls.problem}"


def _stock(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def main(*words: str) -> int:
    """Run the cases with one of these words in their names; the number of those that failed."""
    device, failed = needed_gpu(), 0
    names = [name for word in (words or ("",)) for name in CASES if word in name]
    for name in dict.fromkeys(names):
        gc.collect()
        try:
            with torch.cuda.stream(capture_stream(device)):  # see act24.tools.run.graphs
                message = check(name, device)
        except Exception as exception:
            message = f"FAILED {type(exception).__name__}: {str(exception)[:300]}"
        failed += message.startswith("FAILED")
        print(f"{name}: {message}", flush=True)
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    if not words:
        message = check_failure(device)
        failed += message.startswith("FAILED")
        print(f"a capture that fails: {message}")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(*sys.argv[1:]) else 0)
