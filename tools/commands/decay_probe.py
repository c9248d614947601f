"""Which λ of the masked decay to take for `weight24`: a few short runs, and the flip rate of each.

Flip rates tell a mask that never settles from one that froze at the start. arXiv 2404.01847 takes a λ whose
rate μ, relative to that of dense training at the end of the warm-up, is a little below 1; the bounds below
are from memory of that paper and not checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from act24.errors import Act24Error
from act24.passes import Weight24
from act24.passes.state import renew_masks_
from act24.recipes.schema import Recipe
from act24.sparse24.weight.methods import METHODS
from act24.tools.data import open_rows, open_tokenizer
from act24.tools.run.build import build, model_config
from act24.tools.run.optimizers import build_optimizer, learning_rate
from act24.tools.run.processes import Processes, open_processes
from act24.tools.run.step import TrainingStep, accumulation
from act24.tools.watch.sparsity_watch import take_flip_rates_
from act24.words import counted

#: Where μ is healthy.
BOUNDS = (0.60, 0.95)


@dataclass(frozen=True)
class Probe:
    """One short run.

    Attributes:
        decay: λ; None for dense training, whose masks are only watched.
        flip_rate: mean over weights and over the second half of the steps.
        ratio: to the flip rate of dense training.
        loss: mean training loss over the second half.
    """

    decay: float | None
    flip_rate: float
    ratio: float
    loss: float

    @property
    def healthy(self) -> bool:
        """Whether the ratio lies within `BOUNDS`."""
        return BOUNDS[0] <= self.ratio <= BOUNDS[1]

    def as_dict(self) -> dict[str, Any]:
        values = {
            name: None if value is None or not math.isfinite(value) else value  # JSON has no nan
            for name, value in asdict(self).items()
        }
        return values | {"healthy": None if self.decay is None else self.healthy}


def probe_decays(
    recipe: Recipe, decays: Sequence[float], steps: int, say: Callable[[str], None] = print
) -> list[Probe]:
    """Train `steps` steps densely and with each λ, on the same data from the same start.

    Args:
        recipe: with a `weight24` whose method decays; its masks are renewed as the recipe says, so `steps`
            should cover a few of its `mask_every`. The learning rate is that of the recipe's own beginning.
        say: takes a line for each run.

    Returns:
        dense first, then in the order of `decays`. Writes no files.

    Raises:
        Act24Error: the recipe has no such pass, a λ is below 0, or `steps` covers fewer than two renewals in
            its second half.
    """
    sparse = _probed(recipe)
    every = sparse.renewal
    if steps < 4 * every:
        raise Act24Error(
            f"{counted(steps, 'step is', 'steps are')} too few: masks are renewed every {every}, take "
            f"{4 * every} or more"
        )
    # All of them before the first run: a λ that is refused costs nothing.
    variants = [
        (decay, replace(sparse, decay=decay or 0.0, from_step=0, until_step=None))
        for decay in (None, *decays)
    ]
    probes: list[Probe] = []
    with open_processes() as processes:
        for decay, probed in variants:
            passes = tuple(probed if p is sparse else p for p in recipe.passes)
            varied = recipe.model_copy(update={"passes": passes})
            rate, loss = _run(varied, steps, decay is None, processes)
            dense_rate = probes[0].flip_rate if probes else rate
            probes.append(Probe(decay, rate, rate / dense_rate if dense_rate else float("nan"), loss))
            say(describe(probes[-1]))
    return probes


def describe(probe: Probe) -> str:
    """One line for a run."""
    if probe.decay is None:
        return f"dense: flip rate {probe.flip_rate:.3e} an update, loss {probe.loss:.4f}"
    verdict = "within" if probe.healthy else "outside"
    return (
        f"λ = {probe.decay:g}: flip rate {probe.flip_rate:.3e}, μ = {probe.ratio:.3f} ({verdict} "
        f"{BOUNDS[0]:.2f} to {BOUNDS[1]:.2f}), loss {probe.loss:.4f}"
    )


def verdict(probes: Sequence[Probe]) -> str:
    """Which λ to take, or where to look for one: flip rates fall as λ grows.

    Args:
        probes: of `probe_decays`, with one λ or more.
    """
    if probes[0].flip_rate == 0:
        return "dense training flipped nothing in its second half, so μ says nothing: take more steps"
    within = f"within {BOUNDS[0]:.2f} to {BOUNDS[1]:.2f}"
    sparse = [(probe.decay, probe) for probe in probes if probe.decay is not None]
    healthy = [f"{decay:g}" for decay, probe in sparse if probe.healthy]
    if healthy:
        return f"μ is {within} for λ = {', '.join(healthy)}"
    restless = max((decay for decay, probe in sparse if probe.ratio > BOUNDS[1]), default=None)
    frozen = min((decay for decay, probe in sparse if probe.ratio < BOUNDS[0]), default=None)
    if frozen is None:
        return f"no μ is {within}, masks flip too often: try λ above {restless:g}"
    if restless is None and frozen > 0:
        return f"no μ is {within}, masks flip too seldom: try λ below {frozen:g}"
    if restless is not None and restless < frozen:
        return f"no μ is {within}: try λ between {restless:g} and {frozen:g}"
    return f"no μ is {within}, nor does it fall from about 1 as λ grows: take more steps"


def default_steps(recipe: Recipe) -> int:
    """Enough for five renewals in the second half of a run.

    Raises:
        Act24Error: the recipe has no pass to probe.
    """
    return 10 * _probed(recipe).renewal


def _probed(recipe: Recipe) -> Weight24:
    sparse = next((p for p in recipe.passes if isinstance(p, Weight24)), None)
    if sparse is None or not sparse.record.decay:
        found = f"method {sparse.method}" if sparse else ", ".join(p.name for p in recipe.passes) or "none"
        decaying = " or ".join(name for name, m in METHODS.items() if m.decay)
        raise Act24Error(
            f"passes: probing the decay needs a recipe with weight24, method {decaying}; this one has {found}"
        )
    return sparse


def _run(recipe: Recipe, steps: int, dense: bool, processes: Processes) -> tuple[float, float]:
    """Mean flip rate and loss over the second half of a run."""
    built = build(recipe, processes.device)
    pipeline = built.pipeline
    sparse = next(p for p in pipeline.passes if isinstance(p, Weight24))
    rows = open_rows(
        recipe.data,
        open_tokenizer(recipe.data, recipe.tokenizer),
        batch_size=recipe.train.batch_size,
        vocab_size=model_config(recipe).vocab_size,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    training_step = TrainingStep(built.model, recipe.train, processes, pipeline)
    optimizer = build_optimizer(built.model, recipe.optimizer, pipeline=pipeline, processes=processes)
    count = accumulation(recipe.train, processes.world_size)
    losses = []
    with rows:
        for step in range(steps):
            pipeline.lower_(step)
            if step == steps // 2:
                take_flip_rates_(pipeline, 1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            batches = [next(rows) for _ in range(count)]
            without = ()
            if dense:  # the masks are watched, and the forward does without them
                renew_masks_(pipeline, sparse, step)
                without = (sparse.name,)
            losses.append(training_step(batches, optimizer, step, without).loss)
        pipeline.lower_(steps)
    half = losses[steps // 2 :]
    rates = take_flip_rates_(pipeline, len(half))
    return rates["mean"], sum(map(float, half)) / len(half)
