"""`log.wandb`: what a run writes for TensorBoard goes to Weights & Biases too, by its `sync_tensorboard`."""

from __future__ import annotations

import os
from pathlib import Path

from act24.errors import Act24Error, not_imported, reason
from act24.recipes.schema import Recipe
from act24.tools.checkpoints.together import on_the_first, rank
from act24.tools.run.signals import STOPPED_STATUS
from act24.tools.watch.monitor import hyperparameters


def require_wandb(recipe: Recipe) -> None:
    """Say before anything is built that the package is missing, or cannot be imported.

    Raises:
        Act24Error: the recipe wants it, and it is not installed or lacks something itself.
    """
    if recipe.log.wandb:
        try:
            # A folder of the package's own files, ./wandb, would pass for it.
            from wandb import init  # type: ignore[import-not-found]  # noqa: F401
        except ImportError as error:
            raise Act24Error(
                f"log.wandb = true needs the package wandb, which {not_imported(error, 'wandb')}: "
                "pip install wandb, or set log.wandb = false"
            ) from error


def open_wandb(recipe: Recipe, run_dir: Path | None, run_id: str | None) -> str | None:
    """Begin a run there, or go on with one, and return its id; None where the recipe wants none. Collective,
    and to be called before event files are opened, whose writer it watches.

    The project is that of WANDB_PROJECT, or `act24`; its files lie in WANDB_DIR, or in `wandb` here.

    Args:
        run_dir: None for a dry run, which has none.
        run_id: what this returned when the run began; None for a new one.

    Raises:
        Act24Error: it refuses; nobody is logged in, for instance. Or its files would lie in the run's folder:
            the package links the event files there, finds the links, and takes every value many times.
    """
    if not recipe.log.wandb or run_dir is None:
        return None
    return on_the_first(lambda: _begun(recipe, run_dir, run_id))


def close_wandb(run_id: str | None, signal: str | None, failed: bool) -> None:
    """End the run there, if there is one. To be called by every process, when event files are closed.

    Its state becomes "preempted" behind a signal, as it goes on later; "failed", or "finished".

    Args:
        signal: what stopped it, by name.
        failed: an exception did.
    """
    if run_id and rank() == 0:
        import wandb  # type: ignore[import-not-found]

        if signal:
            wandb.run.mark_preempting()  # what makes "preempted" of a status other than 0
        wandb.finish(exit_code=STOPPED_STATUS if signal else int(failed))


def _begun(recipe: Recipe, run_dir: Path, run_id: str | None) -> str:
    import wandb  # type: ignore[import-not-found]

    own_files = Path(os.environ.get("WANDB_DIR") or ".").resolve()
    if own_files.is_relative_to(run_dir.resolve()):
        raise Act24Error(
            f"log.wandb: {own_files}, where wandb keeps its files, is in the run's folder, of which it would "
            "read them again; set WANDB_DIR to a folder outside"
        )
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "act24"),
            name=run_dir.name,
            id=run_id,
            resume="allow",
            config=hyperparameters(recipe),
            sync_tensorboard=True,
        )
    except wandb.Error as error:
        refused = reason(error).rstrip(".")
        raise Act24Error(f"log.wandb: {refused}; WANDB_MODE=offline keeps it on this disk") from error
    return run.id
