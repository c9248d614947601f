"""A run's folder: where it is, whether it may be written, and what it goes on from.

RUN/
    recipe.toml         the resolved recipe
    plan.txt            what the passes did
    checkpoints/        `tools/checkpoints/checkpoint.py`
    events.out.tfevents…
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from act24.errors import Act24Error
from act24.recipes.load import dump_recipe, parse_recipe
from act24.recipes.schema import Recipe
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder

#: What may differ when a run goes on: it changes what is watched and kept, not what is computed.
_FREE = ("description", "log", "checkpoint", "eval")


class RunError(Act24Error):
    """A run's folder that cannot be used as asked."""


def default_run_dir(reference: str) -> Path:
    """`runs/<recipe>` below the working directory."""
    name = reference.removesuffix(".toml").strip("./").replace("/", "-")
    return Path("runs") / name


def resume_point(run_dir: Path, resume: str, recipe: Recipe) -> checkpoint.Checkpoint | None:
    """The verified checkpoint to go on from, or None for a fresh start.

    Args:
        resume: `never`, `auto` (the last checkpoint of the run, if there is one), or a checkpoint's folder.

    Raises:
        RunError: the folder already holds a run and `resume` is `never`, or the checkpoint is of another
            recipe.
        CheckpointError: the checkpoint is damaged.
    """
    if resume == "never":
        if (run_dir / "recipe.toml").exists() or (run_dir / "checkpoints").exists():
            raise RunError(
                f"{run_dir} already holds a run: go on with --resume auto, or choose another with --run-dir"
            )
        return None
    folder = checkpoint_folder.latest(run_dir) if resume == "auto" else Path(resume)
    if folder is None:
        return None
    opened = checkpoint.load(folder)
    differences = _differences(parse_recipe(opened.recipe_text, f"{folder}/recipe.toml"), recipe)
    if differences:
        raise RunError(f"{folder} is a checkpoint of another recipe: {'; '.join(differences[:4])}")
    return opened


def describe_run(run_dir: Path, recipe: Recipe, plan: str) -> None:
    """Make the run's folder and write what it is a run of.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "recipe.toml").write_text(dump_recipe(recipe), encoding="utf-8")
        (run_dir / "plan.txt").write_text(f"{plan}\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write the run's folder {run_dir}: {error}") from None


def _differences(then: Recipe, now: Recipe) -> list[str]:
    old, new = _flat(then), _flat(now)
    if new["data.revision"] is None:  # a run stays at the commit that it began with
        new["data.revision"] = old["data.revision"]
    return [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def _flat(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {f"passes.{i}": repr(p) for i, p in enumerate(recipe.passes)}
    for name, value in recipe.model_dump(exclude={"passes", *_FREE}).items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat
