"""What may change when a run goes on, and what that does.

Of a recipe everything may change that is only watched or kept (`_WATCHED`), and the keys of `_EFFECTS`, each
with what it does from here on. Anything else makes another run. The rows of an optimizer step and their
order stay as they were, for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from act24.recipes.load import SCALED
from act24.recipes.records import as_table
from act24.recipes.schema import Recipe
from act24.tools.run.optimizers import learning_rate

_SEEN = "the values are the same, other figures of them are seen"

#: Tables and keys that change what is watched and kept, not what is computed.
_WATCHED = {
    "description": "the values are the same",
    "log": _SEEN,
    "checkpoint": "the values are the same, other checkpoints of them are kept",
    "eval": _SEEN,
}
_ROUNDING = "sums are rounded otherwise, so no longer bit for bit as before"

_ELSEWHERE = "it is compared by content"

#: What else may change, and what that does.
_EFFECTS = {
    "data.train_files": _ELSEWHERE,  # in the position of the data (`tools/data/identity.py`)
    "data.heldout_files": _ELSEWHERE,
    "data.shards": _ELSEWHERE,
    "model.pretrained": _ELSEWHERE,  # in `train._pinned`
    "tokenizer.name": _ELSEWHERE,  # in `build.tokenizer_of_run`
    "train.steps": "",  # see `schedule_line`
    "train.batch_size": f"the rows of a step are the same, in other micro-batches: {_ROUNDING}",
    "train.compile": _ROUNDING,
    "train.parallel": _ROUNDING,
    "train.cuda_graphs": "the same kernels, launched otherwise",
    "train.activation_checkpointing": "memory against time, the values are the same",
    "train.on_nonfinite": "a loss or gradient that is not finite is met otherwise",
    "train.max_skips": "a loss or gradient that is not finite is met otherwise",
    "optimizer.lr": "the schedule multiplies another learning rate",
    "processes": f"the rows of a step and their order are the same; {_ROUNDING}, and random draws are others",
}

ScheduleChoice = Literal["hold", "stretch"]


@dataclass(frozen=True)
class Change:
    """One thing that is different from here on."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.old!r} and is {self.new!r}"


def changes(then: Recipe, now: Recipe) -> tuple[list[Change], list[Change]]:
    """The differences of two recipes: those with which a run goes on, and those that make another run."""
    old, new = _flat(then), _flat(now)
    if new["data.revision"] is None:  # a run stays at the commit that it began with
        new["data.revision"] = old["data.revision"]
    if new["model.sha256"] is None:  # and with the weights that it began with, also where they are gone
        for key in ("model.sha256", "model.config"):
            new[key] = old[key]
    different = [
        Change(key, old.get(key), new.get(key))
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    others = [c for c in different if _effect(c.key) is None]
    return [c for c in different if c not in others], others


def are_scaled(then: Recipe, now: Recipe, others: Sequence[Change]) -> bool:
    """Whether differences that make another run are only such as `--scale-steps` makes."""
    keys = {f"{table}.{key}" for table in ("schedule", "optimizer") for key in SCALED[table]}

    def fixed(recipe: Recipe) -> list[dict[str, Any]]:
        tables = [as_table(p, "use") for p in recipe.passes]
        return [{k: v for k, v in table.items() if k not in SCALED["passes"]} for table in tables]

    return fixed(then) == fixed(now) and all(c.key in keys or c.key.startswith("passes.") for c in others)


def effects(different: Sequence[Change]) -> list[str]:
    """For people: each change with what it does, but for that of the schedule."""
    return [f"{change}: {effect}" for change in different if (effect := _effect(change.key))]


def _effect(key: str) -> str | None:
    """What a change of a key does; None if it makes another run."""
    return _EFFECTS.get(key, _WATCHED.get(key.partition(".")[0]))


def schedule_line(recipe: Recipe, step: int, old_steps: int, new_steps: int, before: int) -> str:
    """What becomes of the learning rate where `train.steps` changed from `before`.

    Args:
        step: updates made.
        old_steps, new_steps: those that the schedule was, and is, computed for.
    """
    line = f"train.steps was {before} and is {recipe.train.steps}: "
    rate: Callable[[int], float] = lambda steps: learning_rate(recipe, step, steps)  # noqa: E731
    if new_steps == old_steps:
        kept = f"the schedule is still that of {old_steps} steps"
        if recipe.train.steps > old_steps:
            last = learning_rate(recipe, old_steps - 1, old_steps)
            kept += f", and the learning rate stays at its last value, {last:.3g}"
        return f"{line}{kept} (--schedule stretch recomputes it)"
    return (
        f"{line}the schedule is recomputed for {new_steps} steps; the next learning rate is "
        f"{rate(new_steps):.3g} instead of {rate(old_steps):.3g}"
    )


def _flat(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {f"passes.{i}": repr(p) for i, p in enumerate(recipe.passes)}
    for name, value in recipe.model_dump(exclude={"passes"}).items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat
