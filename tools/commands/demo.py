"""`act24 demo`: the whole of act24 in three minutes."""

from __future__ import annotations

from pathlib import Path

from act24.inference.sampling import Sampling
from act24.recipes.load import load_recipe
from act24.tools.commands.generate import Request, sample_text
from act24.tools.commands.show import show_evaluations, show_outcome, show_sparsity
from act24.tools.run.evaluate import evaluate_checkpoint
from act24.tools.run.folder import clear_run
from act24.tools.run.train import train
from act24.tools.watch.tensorboard import open_hint


def run_demo(run_dir: Path) -> bool:
    """Train the recipe `demo`, evaluate the weights dense and 2:4, print a sample and the sparsity.

    Returns False if a signal stopped it before its end.
    """
    recipe = load_recipe("demo")
    clear_run(run_dir, recipe)
    outcome = train(recipe, run_dir)
    print()
    show_outcome(recipe, outcome, None)
    if not outcome.finished:
        return False
    print("\nThe same weights without and with 2:4 activations, on held-out text:")
    show_evaluations(evaluate_checkpoint(run_dir), legacy_average=False, as_json=False)
    print("\nA sample:")
    print(sample_text(run_dir, 'def main():\n    """', Request(80, Sampling(0.7, 40), seed=1)))
    print()
    show_sparsity(outcome)
    print(f"\nCurves, per-layer sparsity and the plan in TensorBoard:\n    {open_hint(run_dir)}")
    return True
