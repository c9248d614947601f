"""The held-out measure: a token-weighted exact mean, cross-entropy in float32.

The mean is over tokens, not over batches, so that batch size and number of processes do not enter. The
public scripts of the GaLore family count batches from 1 and report sum / (n + 1), which makes perplexities
depend on the batch; `legacy_loss` gives that figure for comparison with their tables, and for nothing else.
"""

from __future__ import annotations

import itertools
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from act24.errors import Act24Error
from act24.passes import OperationalPass, Pipeline
from act24.passes.document_attention import set_starts_
from act24.recipes.load import dump_recipe, parse_recipe
from act24.recipes.schema import Recipe
from act24.tools.checkpoints.folder import is_named_like_one
from act24.tools.checkpoints.manifest import CheckpointError
from act24.tools.data import Batch, HeldoutRows, heldout_rows
from act24.tools.data.documents import other_heldout_text
from act24.tools.data.position import PositionError
from act24.tools.huggingface.folder import is_pretrained
from act24.tools.huggingface.old_folder import is_old
from act24.tools.run.build import SPARSE_PASSES, Built, load
from act24.tools.run.processes import Processes, open_processes
from act24.tools.run.saved import saved_text
from act24.tools.run.signals import StopRequest
from act24.tools.run.step import SummedLoss
from act24.words import counted

logger = logging.getLogger("act24")

#: Keys that say where the text is.
_TEXT = {"source", "train_files", "heldout_files", "shards"}
_HEEDED = ("eval.", "data.", "train.batch_size", "train.dtype")


class EvaluationStopped(Exception):
    """Somebody asked to stop before all held-out rows were through."""


@dataclass(frozen=True)
class Evaluation:
    """One model on the held-out rows.

    Attributes:
        loss: nats per predicted token.
        bits_per_byte: of the UTF-8 text that the tokens stand for; of a measure that ended early, of as much
            as so many tokens stand for on the average of all.
        tokens: predicted tokens.
        asked: the same of all held-out rows: more, if `eval.max_seconds` ended the measure early.
        batches: that were measured, of the size used.
        legacy_loss: mean of batch means times n / (n + 1), over this many batches.
        data: fingerprint of the rows; other rows give losses that cannot be compared.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    asked: int
    batches: int
    legacy_loss: float
    data: str

    @property
    def perplexity(self) -> float:
        """exp(loss), as far as a float goes."""
        return math.exp(min(self.loss, 700.0))

    @property
    def legacy_perplexity(self) -> float:
        """exp(legacy_loss), likewise."""
        return math.exp(min(self.legacy_loss, 700.0))

    @property
    def extent(self) -> str:
        """How many tokens it is of, and of how many where it ended early."""
        early = f" of {self.asked:,}: eval.max_seconds ended it" if self.tokens < self.asked else ""
        return f"{counted(self.tokens, 'token')}{early}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity": self.perplexity, "legacy_perplexity": self.legacy_perplexity}


@torch.no_grad()
def evaluate(
    model: SummedLoss,
    rows: HeldoutRows,
    recipe: Recipe,
    processes: Processes,
    pipeline: Pipeline,
    without: Sequence[str] = (),
    step: int | None = None,
    batches: int | None = None,
    loss_of: Callable[[Batch], tuple[Tensor, Tensor]] | None = None,
    stop: StopRequest | None = None,
) -> Evaluation:
    """Measure a model on the held-out rows; its mode, its operations and their state are as before after.

    Args:
        pipeline: what rewrote the model.
        without: names of passes to leave out.
        step: as for `Pipeline.evaluation`; scales are measured on the first batch.
        batches: at most so many; None: all, or what `eval.max_seconds` leaves time for.
        loss_of: what `model` gives for a batch, made another way; a training step has captured it.
        stop: looked at before each batch, by all processes together.

    Raises:
        EvaluationStopped: by `stop`, on all processes.
    """
    began, device, limit = time.perf_counter(), processes.device, recipe.eval.max_seconds
    batch_size = recipe.eval.batch_size or recipe.train.batch_size
    autocast = recipe.train.dtype == "bfloat16_autocast"

    def plain_loss(batch: Batch) -> tuple[Tensor, Tensor]:
        set_starts_(pipeline, None if batch.starts is None else batch.starts.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return model(batch.input_ids.to(device), batch.labels.to(device))

    rest = rows.batches(batch_size)
    first = next(rest)
    measured_on = {
        "forward": lambda: plain_loss(first),
        "pads": None if first.pads is None else first.pads.to(device),
        "reduce": processes.sum_,
    }
    losses, counts = [], []
    with _evaluating(model), pipeline.evaluation(without, step=step, **measured_on):
        for batch in itertools.chain((first,), rest):
            if stop is not None and processes.any(bool(stop)):
                raise EvaluationStopped
            loss, count = (loss_of or plain_loss)(batch)
            losses.append(loss.double())
            counts.append(count)
            if len(counts) == batches or (limit and _over(began + limit, processes)):
                break
    table = processes.sum_(torch.stack((torch.stack(losses), torch.stack(counts).double())))
    total, tokens = (float(x) for x in table.sum(1).tolist())
    means = (table[0] / table[1].clamp(min=1))[table[1] > 0]
    return Evaluation(
        loss=total / tokens,
        bits_per_byte=total / math.log(2) / max(rows.bytes * tokens / rows.tokens, 1),
        tokens=int(tokens),
        asked=rows.tokens,
        batches=len(counts),
        legacy_loss=legacy_mean(means),
        data=rows.fingerprint,
    )


def legacy_mean(means: Tensor) -> float:
    """The mean of batch means as the public scripts have it, who count batches from 1."""
    return float(means.sum()) / (len(means) + 1)


def evaluate_forms(
    built: Built, rows: HeldoutRows, recipe: Recipe, processes: Processes
) -> dict[str, Evaluation]:
    """The same weights by form: `dense` and, where a 2:4 pass is in force or is yet to come, `2:4`.

    Where none is in force at the step of the weights, the sparse form is that of the first step at which one
    will be. Behind the last one's `until_step` the weights have no such form.
    """
    model, pipeline = SummedLoss(built.model), built.pipeline
    sparse = [p for p in recipe.passes if isinstance(p, OperationalPass) and p.name in SPARSE_PASSES]
    names = [p.name for p in pipeline.passes if p.name in SPARSE_PASSES]
    forms = {"dense": evaluate(model, rows, recipe, processes, pipeline, names, built.step)}
    # Of the same rows, where time is short: or the two could not be compared.
    batches = forms["dense"].batches
    steps = [max(built.step, p.from_step) for p in sparse if p.active(max(built.step, p.from_step))]
    if steps:
        forms["2:4"] = evaluate(model, rows, recipe, processes, pipeline, step=min(steps), batches=batches)
    return forms


def evaluate_checkpoint(path: Path, overrides: Sequence[str] = ()) -> dict[str, Evaluation]:
    """`evaluate_forms` of a run's last checkpoint, or of a checkpoint.

    Args:
        overrides: of the recipe in the checkpoint; those of `eval` and `data` make sense.

    Raises:
        Act24Error: no checkpoint, a damaged one, or data that cannot be read.
    """
    no_recipe = (
        f"{path} holds a model and no recipe, which says on what to evaluate it; its perplexity on a text: "
        f"act24 eval {shlex.quote(str(path))} --protocol wikitext --seqlen N --text FILE"
    )
    if (path.suffix == ".gguf" and path.is_file()) or (is_pretrained(path) and not is_old(path)):
        raise Act24Error(no_recipe)
    if len(path.parts) <= 2 and not (path.is_absolute() or path.exists() or is_named_like_one(path)):
        raise Act24Error(f"there is no '{path}' here, be it a run or a checkpoint; of the Hub, {no_recipe}")
    with open_processes() as processes:
        built = load(path, processes.device)
        if built.recipe is None or built.tokenizer_section is None:
            raise Act24Error(no_recipe)
        check_overrides(overrides)
        recipe = parse_recipe(dump_recipe(built.recipe), str(path), overrides)
        rows = heldout_rows(
            recipe.data,
            built.open_tokenizer(recipe.data),
            recipe.eval.tokens,
            vocab_size=built.model.config.vocab_size,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        if processes.is_main:
            for line in (*rows.warnings, *_of_other_text(built, recipe)):
                logger.warning("warning: %s", line)
        return evaluate_forms(built, rows, recipe, processes)


def _of_other_text(built: Built, recipe: Recipe) -> Iterator[str]:
    """A warning where the text that the run held out is no longer what it was. Who names other text with
    `--set` knows."""
    assert built.recipe is not None
    named = [data.model_dump(include=_TEXT) for data in (built.recipe.data, recipe.data)]
    if built.folder is None or named[0] != named[1]:
        return
    try:
        other = other_heldout_text(recipe.data, saved_text(built.folder))
    except (CheckpointError, PositionError) as error:  # a run that goes on may have deleted it
        yield f"whether the held-out text is still that of the run is not known: {error}"
    else:
        if other:
            yield (
                f"the held-out text is not that of the run: {other}. The loss cannot be compared with the "
                "run's, and what was trained on may be in it"
            )


def check_overrides(overrides: Sequence[str]) -> None:
    """
    Raises:
        Act24Error: an override of what the checkpoint fixes: it would be ignored.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    ignored = [key for key in keys if not key.startswith(_HEEDED) or key == "data.attention"]
    if ignored:
        raise Act24Error(
            f"eval ignores {', '.join(ignored)}: the checkpoint says what was trained; it heeds eval.*, "
            "data.* without data.attention, train.batch_size and train.dtype"
        )


def _over(deadline: float, processes: Processes) -> bool:
    """Whether it is past a time on any process: all end at the same batch, or collectives would not match."""
    if processes.device.type == "cuda":
        torch.cuda.synchronize()  # what is only queued has not been measured
    return processes.any(time.perf_counter() > deadline)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
