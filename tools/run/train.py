"""The training run: everything that touches the world, in the order in which it happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from act24.errors import Act24Error
from act24.passes import ActivationStatistics
from act24.passes.graph.measurements import Measurement
from act24.passes.recovery import check_zeros
from act24.recipes.checks import oddities
from act24.recipes.load import dump_recipe
from act24.recipes.schema import Recipe
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints.random_states import seed_random_states_
from act24.tools.checkpoints.reading import contents_of
from act24.tools.data import TokenRows, heldout_rows, open_rows, pinned
from act24.tools.run.build import Built, build, model_config, tokenizer_of_run
from act24.tools.run.changes import ScheduleChoice
from act24.tools.run.evaluate import Evaluation, EvaluationStopped, evaluate
from act24.tools.run.folder import Start, begun, describe_run, note_stop, resume_point, way_back
from act24.tools.run.lock import Lock, RunError, check_together, lock_on_the_first
from act24.tools.run.measurements import measure
from act24.tools.run.optimizers import build_optimizer, learning_rate
from act24.tools.run.path import path_lines
from act24.tools.run.pretrained import beginning, close_source, resolved
from act24.tools.run.processes import Processes, open_processes
from act24.tools.run.progress import RunProgress, run_progress
from act24.tools.run.saved import position_of, saved_position, saved_state
from act24.tools.run.signals import StopRequest, stop_on_signal
from act24.tools.run.step import StepResult, TrainingStep, accumulation
from act24.tools.run.tuning import tune_
from act24.tools.watch.monitor import Monitor
from act24.tools.watch.statistics import SiteStatistics
from act24.tools.watch.wandb_sync import close_wandb, open_wandb, require_wandb


class TrainingError(Act24Error):
    """A run that cannot go on: the loss or its gradient is not finite, or nobody reads what it says."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: optimizer steps made in all.
        finished: all steps of the recipe are made.
        stopped: the name of the signal that ended it before, or None.
        tokens: predicted tokens trained on, in all.
        tokens_per_second: since this process took up the run, training steps only; 0 if it made none.
        loss: training loss of the last logged steps; nan if this process made none.
        evaluation: at the end; None when stopped early.
        parameters: trained elements.
        peak_memory: bytes allocated on the GPU, 0 on a CPU.
        checkpoint: the last one; None in a dry run.
        sites: activation statistics of the last logged steps.
        is_main: this process is the one that speaks.
    """

    step: int
    finished: bool
    stopped: str | None
    tokens: int
    tokens_per_second: float
    loss: float
    evaluation: Evaluation | None
    parameters: int
    peak_memory: int
    checkpoint: Path | None
    sites: tuple[SiteStatistics, ...]
    is_main: bool


def train(
    recipe: Recipe,
    run_dir: Path,
    resume: str = "never",
    dry_run: bool = False,
    grow: bool = False,
    schedule: ScheduleChoice = "hold",
    weights: Path | None = None,
) -> Outcome:
    """Train a recipe.

    Args:
        run_dir: its folder (`tools/run/folder.py`).
        resume: see `act24.tools.run.folder.resume_point`.
        dry_run: build, plan, print, make one step, from where the run goes on, and write no file.
        grow: when it goes on, take data files that were added, from the next epoch on.
        schedule: see `resume_point`.
        weights: a folder that run_c4.py left, whose weights a run begins with that begins anew.

    Raises:
        Act24Error: whatever is wrong with the recipe, the data, the folder or a checkpoint; a loss or
            gradient that is not finite.
        Stopped: by a signal, before the first step.
    """
    require_wandb(recipe)
    if resume == "never" and (grow or schedule != "hold"):
        raise RunError("--data grow and --schedule stretch are for a run that goes on: they need --resume")
    with stop_on_signal() as stop, open_processes() as processes:
        accumulation(recipe.train, processes.world_size)  # says what is wrong before anything is built
        with contextlib.nullcontext() if dry_run else lock_on_the_first(run_dir) as lock:
            start = resume_point(run_dir, resume, recipe, schedule, processes.world_size, weights, dry_run)
            began = None if resume == "never" else begun(run_dir, start)
            recipe = _pinned(recipe, began, start, processes)
            make = build if start else beginning(recipe, weights)
            run = TrainingRun(recipe, run_dir, processes, start, dry_run, grow, make, lock, weights)
            outcome = None
            try:
                outcome = run.go(stop)
                return outcome
            finally:
                run.close(outcome.stopped if outcome else stop.signal, failed=outcome is None)


class TrainingRun:
    """One run in progress: what `train` has opened, and where it stands.

    Attributes:
        monitor: what it has logged.
        training_step: the model, ready to train.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        processes: Processes,
        resumption: Start | None,
        dry_run: bool = False,
        grow: bool = False,
        make: Callable[..., Built] = build,
        lock: Lock | None = None,
        weights: Path | None = None,
    ) -> None:
        """
        Args:
            resumption: where to go on.
            make: makes the model, as `build` does; weights may come from elsewhere, or not be needed.
            lock: of the run's folder, by the process that holds it.
            weights: as in `train`.
        """
        self._recipe, self._run_dir, self._processes, self._dry_run = recipe, run_dir, processes, dry_run
        self._lock, start = lock, resumption.checkpoint if resumption else None
        self._remarks = resumption.remarks if resumption else ()
        self._schedule_steps = resumption.schedule_steps if resumption else recipe.train.steps
        self._step = start.step if start else 0
        self._tokens, self._skips, self._evaluation_due, log_state = 0, 0, False, None
        saved = saved_state(start) if start else {}
        if start:
            self._tokens, log_state = saved["tokens"], saved["log"]
            self._skips, self._evaluation_due = saved["skips"], saved["evaluation_due"] and not dry_run
        self._last_checkpoint = start.folder if start else None
        self._is_saved = dry_run or (resumption is not None and resumption.is_last)
        self._note: str | None = None
        self._measured: tuple[int, Evaluation] | None = None
        self._tokenizer = tokenizer_of_run(recipe, start)
        rank, world_size = processes.rank, processes.world_size
        where = {"vocab_size": model_config(recipe).vocab_size, "rank": rank, "world_size": world_size}
        read = (recipe.data, self._tokenizer)
        self._heldout = heldout_rows(*read, recipe.eval.tokens, **where)
        position = saved_position(start) if start else None
        streams = position["fingerprint"]["streams"] if position else None
        self._rows: TokenRows = open_rows(*read, batch_size=recipe.train.batch_size, streams=streams, **where)
        self._built: Built = make(recipe, processes.device, self._step, self._measure)
        close_source()  # its weights are in the model now
        pipeline = self._built.pipeline
        self._products = {} if dry_run else tune_(pipeline, recipe, processes, saved.get("products"))
        if processes.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of training; the tuner's operands are gone
        self.training_step = TrainingStep(self._built.model, recipe.train, processes, pipeline)
        self._optimizer: Optimizer = build_optimizer(
            self._built.model, recipe.optimizer, pipeline=pipeline, processes=processes
        )
        if start and position:
            checkpoint.restore_(start, self._built.model, self._optimizer)
            with position_of(start), contents_of(start.folder / checkpoint.rank_file(0)):
                self._rows.load_state_dict(position, grow)
        else:
            seed_random_states_(recipe.train.seed, rank)
        self._count, self._waited = accumulation(recipe.train, world_size), 0.0
        with position_of(start):
            self._rows.start(self._count)
        self._epoch = self._rows.epoch
        # From here on there is a run: all that can be wrong with its input would have shown.
        check_together(lock)
        self._wandb = open_wandb(recipe, None if dry_run else run_dir, saved.get("wandb"))
        if processes.is_main and not dry_run:
            describe_run(run_dir, recipe, str(self._built.pipeline), resumption, weights, self._rows.grown)
        self.monitor = Monitor(
            recipe,
            self._built,
            self._optimizer,
            processes,
            None if dry_run else run_dir,
            resumed_at=start.step if start else None,
            state=log_state,
        )
        self.monitor.remark(self._remarks, self._step)

    def _measure(self, wanted: Mapping[str, Measurement]) -> dict[str, Tensor]:
        """What passes want to know, on the first batch, which is trained on all the same."""
        beginning = self._rows.state_dict()
        measured = measure(self._recipe, wanted, next(self._rows), self._processes)
        self._rows.load_state_dict(beginning)
        return measured

    def close(self, signal: str | None, failed: bool) -> None:
        self._rows.close()
        self.monitor.close()
        close_wandb(self._wandb, signal, failed)
        # Data parallelism has to end before its processes part. The other way round its destructor is the one
        # to join gloo's threads, and holds the interpreter's lock for which one of them may be waiting.
        del self.training_step

    def go(self, stop: StopRequest) -> Outcome:
        recipe, monitor = self._recipe, self.monitor
        last = min(self._step + 1, recipe.train.steps) if self._dry_run else recipe.train.steps
        evaluation: Evaluation | None = None
        failure: BaseException | None = None
        with run_progress(self._step, last, self._processes.is_main) as progress:
            progress.say(str(self._built.pipeline))
            for line in self._remarks:
                progress.say(f"from step {self._step} on: {line}")
            for line in (*oddities(recipe), *self._rows.remarks(), *self._heldout.warnings):
                progress.say(f"warning: {line}")
            path = path_lines(self._built, recipe, self._processes, self._optimizer, self.training_step)
            progress.say("\n".join(path))
            monitor.remark(path, self._step, "plan/path")
            if self._step == last and not self._evaluation_due:
                progress.say(f"{self._last_checkpoint} is the end of this run: step {last} was its last")
                self._evaluation_due = not self._is_saved  # an end like any other
            stop.at_once = stopped = False  # from here on there is something to save
            if self._evaluation_due:  # it was due when the run was stopped
                evaluation = self._evaluate(progress, stop)
                stopped = evaluation is None
                if evaluation:
                    self._save()  # with the loss, and nothing is due any more
            while self._step < last and not stopped:
                self.advance()
                failure = self._failure(progress, stop) if self._step < last else None
                stopped = self._processes.any(bool(stop) or failure is not None)
                evaluation, stopped = self.after_step(
                    progress, ends=self._step == last, stop=stop, stopped=stopped
                )
        signal = self._report_end(progress, stop, failure) if stopped else None
        return Outcome(
            step=self._step,
            finished=self._step == recipe.train.steps and not self._evaluation_due,
            stopped=signal,
            tokens=self._tokens,
            tokens_per_second=monitor.tokens / monitor.seconds if monitor.seconds else 0.0,
            loss=monitor.loss,
            evaluation=evaluation,
            parameters=sum(p.numel() for p in self._built.model.parameters()),
            peak_memory=torch.cuda.max_memory_allocated() if self._processes.device.type == "cuda" else 0,
            checkpoint=None if self._dry_run else self._last_checkpoint,
            sites=tuple(monitor.sites),
            is_main=self._processes.is_main,
        )

    def advance(self) -> None:
        """Make one optimizer step, with nothing read back from the device."""
        recipe = self._recipe
        counts = _due(self._step + 1, recipe.log.activation_statistics_every)
        rate = learning_rate(recipe, self._step, self._schedule_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        waited = time.perf_counter()
        batches = [next(self._rows) for _ in range(self._count)]
        waited, self._waited = time.perf_counter() - waited + self._waited, 0.0
        if _due(self._step, recipe.log.gradient_cosine_every):
            self.monitor.add_cosines(self.training_step.gradient_cosines(batches[0], self._step))
        left_out = () if counts else (ActivationStatistics.name,)
        result: StepResult = self.training_step(batches, self._optimizer, self._step, left_out)
        self._step += 1
        self._note = result.note
        self._skips = self._skips + 1 if result.skipped else 0
        if result.skipped:
            skipped = f"step {self._step}: the loss or its gradient is not finite; the batch is left out"
            self._note = f"{self._note}\n{skipped}" if self._note else skipped
        self.monitor.add(self._step, result, rate, waited, self._rows.epoch, self._rows.faults())

    def _failure(self, progress: RunProgress, stop: StopRequest) -> BaseException | None:
        """What keeps the next step from being made, a stop aside. Asked for before that step, on which
        processes would wait for each other, and before the position is that of batches nobody trained on."""
        limit, updated = self._recipe.train.max_skips, self._step - self._skips
        if self._skips >= limit:
            why = f"the loss or its gradient was not finite at {limit} steps in a row (train.max_skips)"
            return TrainingError(f"{why}: {way_back(self._run_dir, self._last_checkpoint, updated)}")
        if progress.silenced:
            return TrainingError(progress.silenced)
        began = time.perf_counter()
        failure = self._rows.failure(self._count, lambda: bool(stop))
        self._waited = time.perf_counter() - began
        return failure

    def after_step(
        self, progress: RunProgress, stop: StopRequest, stopped: bool, ends: bool
    ) -> tuple[Evaluation | None, bool]:
        """Log, evaluate and save where it is due; returns the evaluation, and whether to stop now.

        A step that saves also logs: a window of averages never spans a checkpoint, so a run that was
        interrupted logs the same figures as one that was not. An evaluation that a stop prevents is made
        when the run goes on.
        """
        recipe, step = self._recipe, self._step
        saves = not self._dry_run and (ends or stopped or _due(step, recipe.checkpoint.every))
        evaluates = step == recipe.train.steps or _due(step, recipe.eval.every)
        evaluates = evaluates and not self._dry_run
        if saves or evaluates or ends or _due(step, recipe.log.every):
            check_together(self._lock)
            self._flush(progress)
        if _due(step, recipe.log.weight_sparsity_every):
            self.monitor.weigh(step)
        if self._note:
            progress.say(self._note)
        if self._rows.epoch != self._epoch:
            self._epoch = self._rows.epoch
            progress.say(f"step {step}: epoch {self._epoch} of the training text begins (the first was 0)")
            for line in self._rows.remarks():
                progress.say(f"warning: {line}")
        if saves or evaluates:
            self.training_step.measure_first_scales_(step)
        evaluation, self._evaluation_due = None, evaluates
        if evaluates and not stopped:
            evaluation = self._evaluate(progress, stop)
            stopped = evaluation is None
        if saves or (stopped and not self._dry_run):
            self._save()
        return evaluation, stopped

    def _flush(self, progress: RunProgress) -> None:
        window = self.monitor.flush(self._step)
        self._tokens += window.tokens
        if window.first_bad_step is not None:
            last = self._last_checkpoint
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
            raise TrainingError(
                f"the loss or its gradient is not finite at step {window.first_bad_step}; {good}"
                '; train.on_nonfinite = "skip" leaves such batches out'
            )
        progress.update(self._step, window.shown())
        for alarm in window.alarms:
            progress.say(f"step {self._step}: {alarm}")

    def _evaluate(self, progress: RunProgress, stop: StopRequest | None) -> Evaluation | None:
        """The held-out measure of the weights at hand; None if a stop came in between."""
        try:
            evaluation = evaluate(
                self.training_step.summed_loss,
                self._heldout,
                self._recipe,
                self._processes,
                self._built.pipeline,
                step=self._step,
                loss_of=self.training_step.evaluation_loss,
                stop=stop,
            )
        except EvaluationStopped:
            return None
        self._evaluation_due, self._measured = False, (self._step, evaluation)
        self.monitor.evaluated(self._step, evaluation)
        progress.say(
            f"step {self._step}: held-out loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}"
            f", {evaluation.bits_per_byte:.3f} bits per byte over {evaluation.extent}"
        )
        return evaluation

    def _save(self) -> None:
        settings, heldout = self._recipe.checkpoint, None
        if self._measured and self._measured[0] == self._step:
            heldout = {"loss": self._measured[1].loss, "data": self._measured[1].data}
        check_zeros(self._built.pipeline)
        self._last_checkpoint = checkpoint.save(
            self._run_dir,
            self._step,
            model=self._built.model,
            optimizer=self._optimizer,
            state={
                "tokens": self._tokens,
                "schedule_steps": self._schedule_steps,
                "evaluation_due": self._evaluation_due,
                "skips": self._skips,
                "log": self.monitor.state(),
                "products": self._products,
                "wandb": self._wandb,
            },
            rank_state={"data": self._rows.state_dict()},
            recipe_text=dump_recipe(self._recipe),
            plan=asdict(self._built.pipeline.report),
            tokenizer_json=self._tokenizer.to_json(),
            keep=settings.keep,
            keep_every=settings.keep_every,
            keep_best=settings.keep_best,
            heldout=heldout,
            check_folder=self._lock.check if self._lock else lambda: None,
        )
        self.monitor.saved()

    def _report_end(self, progress: RunProgress, stop: StopRequest, failure: BaseException | None) -> str:
        """Say why a run ended before its end; returns the signal. Collective.

        Raises:
            Exception: what else ended it, on every process.
        """
        reports = self._processes.gather((stop.signal, failure and str(failure)))
        saved = f"saved step {self._step} in {self._last_checkpoint}"
        saved = "a dry run saves nothing" if self._dry_run else saved
        reasons = [reason for _, reason in reports if reason]
        if failure and not isinstance(failure, Act24Error):
            progress.say(f"the data failed: {saved}")
            raise failure
        if reasons:
            raise TrainingError(f"{reasons[0]}; {saved}") from failure
        name = next(name for name, _ in reports if name)
        progress.say(f"{name}: {saved}")
        note_stop(self._lock, name, self._step)
        return name


def _pinned(recipe: Recipe, began: Recipe | None, start: Start | None, processes: Processes) -> Recipe:
    """The recipe with the Hub's commit and the model that the run begins with, or began with."""
    data, model = recipe.data, recipe.model
    if began and model.sha256 is None:
        model = model.model_copy(update={"sha256": began.model.sha256})
    if not (start and began):
        recipe = resolved(recipe.model_copy(update={"model": model}))
    else:
        data = data if data.revision else data.model_copy(update={"revision": began.data.revision})
        if model.pretrained != began.model.pretrained:  # moved: the same weights, or a refusal
            resolved(recipe.model_copy(update={"model": model}))
        model = began.model.model_copy(update={"pretrained": model.pretrained})
        recipe = recipe.model_copy(update={"model": model})
    (data, *_) = processes.gather(pinned(data))  # one answer for all: there may be a push in between
    return recipe.model_copy(update={"data": data})


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
