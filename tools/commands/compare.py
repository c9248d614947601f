"""`act24 compare`: runs side by side, by what they logged and in what their recipes differ."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act24.errors import Act24Error, reason
from act24.passes import Activation24
from act24.recipes.load import parse_recipe
from act24.recipes.schema import Recipe
from act24.tools.checkpoints.reading import contents_of, read_text
from act24.tools.files import whole_file
from act24.tools.run.folder import RECIPE
from act24.tools.watch.charts import COLOURS, Curve, Panel, chart
from act24.tools.watch.monitor import hyperparameters

logger = logging.getLogger("act24")
_tensorboard = logging.getLogger("tensorboard")

_LOSS, _HELDOUT, _RATE = "loss/train", "loss/val", "perf/tokens_per_s"
_ZEROS, _DROPPED = "sparsity_relu/mean_across_layers", "sparsity_dropped_energy/mean_across_layers"
#: Columns of what was logged: heading, tag, how it is shown. Rates are medians: the first window compiles.
_LAST = (
    ("loss", _LOSS, ".4f"),
    ("held-out loss", _HELDOUT, ".4f"),
    ("zeros after relu²", _ZEROS, ".1%"),
    ("energy 2:4 drops", _DROPPED, ".3%"),
    ("peak GiB", "perf/max_allocated_gib", ".2f"),
)
#: What the plot shows beside the losses: title (Pillow's font has no ²), tag, factor.
_PANELS = (
    ("zeros after relu2, %", _ZEROS, 100.0),
    ("energy that 2:4 drops, %", _DROPPED, 100.0),
    ("tokens/s", _RATE, 1.0),
)


@dataclass(frozen=True)
class Run:
    """A run's folder, its recipe, and the points (step, value) of what it logged, by tag.

    What 2:4 drops has points where the recipe has 2:4: without it, what is logged is what it would drop.
    """

    path: Path
    recipe: Recipe
    curves: Mapping[str, Sequence[tuple[int, float]]]


def open_run(run_dir: Path) -> Run:
    """Read a run's folder.

    Raises:
        Act24Error: it is no run.
    """
    recipe = run_dir / RECIPE
    if not recipe.is_file():
        raise Act24Error(f"{run_dir} is no run: there is no {RECIPE} in it")
    events = _events(run_dir)
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    parsed = parse_recipe(read_text(recipe), str(recipe))
    sparse = [p for p in parsed.passes if isinstance(p, Activation24)]
    dropped = [point for point in curves.pop(_DROPPED, ()) if any(p.active(point[0] - 1) for p in sparse)]
    return Run(run_dir, parsed, curves | ({_DROPPED: dropped} if dropped else {}))


def _events(run_dir: Path) -> EventAccumulator:
    """What a run logged; a file that is read no further because it is damaged is a warning, a record that is
    still being written, or that a kill cut off, is not.

    Raises:
        Act24Error: something is called as an event file and is none.
    """
    for path in sorted(run_dir.glob("*tfevents*")):
        if not path.is_file():
            raise Act24Error(f"{path} is no file, and is called as one of TensorBoard's: move it away")
    damage = _Damage()
    _tensorboard.addHandler(damage)
    level, propagates = _tensorboard.level, _tensorboard.propagate
    _tensorboard.setLevel(logging.DEBUG)
    _tensorboard.propagate = False
    try:
        with contents_of(run_dir / "events.out.tfevents.*"):
            return EventAccumulator(str(run_dir), {"scalars": 0, "images": 1}).Reload()
    finally:
        _tensorboard.removeHandler(damage)
        _tensorboard.setLevel(level)
        _tensorboard.propagate = propagates
        for file in dict.fromkeys(damage.files):
            logger.warning("warning: %s is damaged: what it logged from there on is left out", file)


class _Damage(logging.Handler):
    """Files of which TensorBoard's reader, which tells nobody else, finds that a record has changed."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.files: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        match = re.match(r"Truncated record in (.+?) \((.*)\)", record.getMessage(), re.DOTALL)
        if match and "truncated record" not in match[2]:
            self.files.append(match[1])


def compare_runs(runs: Sequence[Run]) -> list[list[str]]:
    """A table of cells, its head first: a row a run, a column for each figure and each key that differs.

    What a run did not log is a dash.
    """
    keys, values = differences([run.recipe for run in runs])
    head = ["run", "step", *(name for name, _, _ in _LAST), "tokens/s", *keys]
    rows = []
    for run, own in zip(runs, values, strict=True):
        rows.append([str(run.path), *_figures(run), *(str(own.get(key, "–")) for key in keys)])
    used = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    return [[line[i] for i in used] for line in (head, *rows)]


def plot_runs(runs: Sequence[Run], path: Path) -> None:
    """Draw the same runs as curves: losses, sparsity, tokens/s, and under them the keys that differ.

    The loss axis ends where the curves are after a tenth of the steps: before, all runs fall alike.

    Raises:
        Act24Error: there are more runs than colours, none logged anything, or the file is no .png to write.
    """
    if len(runs) > len(COLOURS):
        raise Act24Error(f"a plot tells {len(COLOURS)} runs apart, not {len(runs)}: leave some out")
    panels = _panels(runs)
    if not panels:
        raise Act24Error("none of these runs has logged anything yet: there is nothing to plot")
    keys, values = differences([run.recipe for run in runs])
    legend = []
    for run, own in zip(runs, values, strict=True):
        text = ", ".join(f"{key} = {own[key]}" for key in keys if key in own)
        legend.append(f"{run.path}: {text}" if text else str(run.path))
    if path.suffix != ".png":
        raise Act24Error(f"--plot writes a .png, not {path}")
    if path.is_file() and path.read_bytes()[:4] != b"\x89PNG":
        raise Act24Error(f"{path} exists already and is no picture: give --plot another name")
    picture: Image.Image = chart(panels, legend)
    try:
        with whole_file(path) as partial:
            picture.quantize(128).save(partial, "PNG", optimize=True)
    except OSError as error:
        raise Act24Error(f"cannot write {path}: {reason(error)}") from None


def differences(recipes: list[Recipe]) -> tuple[list[str], list[dict[str, Any]]]:
    """The keys in which recipes differ, in the order of `hyperparameters` (what people vary first), and each
    recipe's values. A pass that only some have is a key, `passes.NAME`, beside those where these differ."""
    values = [hyperparameters(recipe) for recipe in recipes]
    for name in dict.fromkeys(
        key.split(".")[1] for own in values for key in own if key.startswith("passes.")
    ):
        options = {key for own in values for key in own if key.startswith(f"passes.{name}.")}
        having = [number for number, own in enumerate(values) if options & own.keys()]
        if len(having) < len(values):
            same = {key for key in options if len({repr(values[number].get(key)) for number in having}) == 1}
            for number in having:
                rest = {key: value for key, value in values[number].items() if key not in same}
                values[number] = {f"passes.{name}": "yes"} | rest
    every = dict.fromkeys(key for own in values for key in own)
    return [key for key in every if len({repr(own.get(key)) for own in values}) > 1], values


def markdown(table: list[list[str]]) -> str:
    """The table as Markdown."""
    head, *rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])


def _figures(run: Run) -> list[str]:
    """Of a run, the step of its last training loss and the columns of `_LAST`, and the median rate."""
    curves = run.curves
    cells = [f"{curves[_LOSS][-1][0]:,}" if _LOSS in curves else "–"]
    cells += [format(curves[tag][-1][1], form) if tag in curves else "–" for _, tag, form in _LAST]
    return [*cells, f"{median(value for _, value in curves[_RATE]):,.0f}" if _RATE in curves else "–"]


def _panels(runs: Sequence[Run]) -> list[Panel]:
    """Those for which any run has points."""
    losses = _curves(runs, _LOSS, 1.0)
    begun = max((curve.points[-1][0] for curve in losses), default=0) / 10
    settled = [y for curve in losses for x, y in curve.points if x >= begun]
    held_out = [Curve(curve.run, curve.points, dots=True) for curve in _curves(runs, _HELDOUT, 1.0)]
    panels = [Panel("loss by step; dots: held out", [*losses, *held_out], max(settled, default=None))]
    panels += [Panel(title, _curves(runs, tag, factor)) for title, tag, factor in _PANELS]
    return [panel for panel in panels if panel.curves]


def _curves(runs: Sequence[Run], tag: str, factor: float) -> list[Curve]:
    found = []
    for index, run in enumerate(runs):
        points = [(x, y * factor) for x, y in run.curves.get(tag, ()) if math.isfinite(y)]
        if points:
            found.append(Curve(index, points))
    return found
