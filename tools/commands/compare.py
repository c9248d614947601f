"""`act24 compare`: runs side by side, by what they logged and in what their recipes differ."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act24.errors import Act24Error
from act24.recipes.load import parse_recipe
from act24.recipes.schema import Recipe
from act24.tools.checkpoints.reading import read_text
from act24.tools.run.folder import RECIPE
from act24.tools.watch.monitor import hyperparameters

#: Columns of what was logged: heading, tag, how it is shown. Rates are medians: the first window compiles.
_LAST = (
    ("loss", "loss/train", ".4f"),
    ("held-out loss", "loss/val", ".4f"),
    ("zeros after relu²", "sparsity_relu/mean_across_layers", ".1%"),
    ("energy 2:4 drops", "sparsity_dropped_energy/mean_across_layers", ".3%"),
    ("peak GiB", "perf/max_allocated_gib", ".2f"),
)


def compare_runs(run_dirs: list[Path]) -> list[list[str]]:
    """A table of cells, its head first: a row a run, a column for each figure and each key that differs.

    What a run did not log is a dash.

    Raises:
        Act24Error: a folder is no run.
    """
    recipes = [_recipe(run_dir) for run_dir in run_dirs]
    keys = differing_keys(recipes)
    head = ["run", "step", *(name for name, _, _ in _LAST), "tokens/s", *keys]
    values = [hyperparameters(recipe) for recipe in recipes]
    rows = []
    for run_dir, own in zip(run_dirs, values, strict=True):
        figures = _figures(run_dir)
        rows.append([str(run_dir), *figures, *(str(own.get(key, "–")) for key in keys)])
    used = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    return [[line[i] for i in used] for line in (head, *rows)]


def differing_keys(recipes: list[Recipe]) -> list[str]:
    """The keys in which recipes differ, in the order of `hyperparameters`: what people vary first."""
    values = [hyperparameters(recipe) for recipe in recipes]
    every = dict.fromkeys(key for own in values for key in own)
    return [key for key in every if len({repr(own.get(key)) for own in values}) > 1]


def markdown(table: list[list[str]]) -> str:
    """The table as Markdown."""
    head, *rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])


def _recipe(run_dir: Path) -> Recipe:
    path = run_dir / RECIPE
    if not path.is_file():
        raise Act24Error(f"{run_dir} is no run: there is no {RECIPE} in it")
    return parse_recipe(read_text(path), str(path))


def _figures(run_dir: Path) -> list[str]:
    """Of a run, the step of its last training loss and the columns of `_LAST`, and the median rate."""
    events = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    cells = [f"{events.Scalars('loss/train')[-1].step:,}" if "loss/train" in tags else "–"]
    cells += [format(events.Scalars(tag)[-1].value, form) if tag in tags else "–" for _, tag, form in _LAST]
    rate = "perf/tokens_per_s"
    return [*cells, f"{median(e.value for e in events.Scalars(rate)):,.0f}" if rate in tags else "–"]
