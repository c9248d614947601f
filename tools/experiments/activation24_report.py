"""The results of `activation24` as a table and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

#: The paper's figures (arXiv 2503.16672, 1.5B parameters, 63B tokens), which it calls perplexity.
PAPER = {
    "dense SwiGLU": 2.654,
    "dense relu2": 2.651,
    "full recipe": 2.652,
    "no warm-up": 2.657,
    "all-sparse backward": 2.682,
    "no permutation": 2.919,
    "forward mask not reused": 3.735,
}


def write_report(out: Path, order: Sequence[str]) -> None:
    """OUT/results.md from the results there, and OUT/*.png where matplotlib is installed."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*-seed*.json"))]
    names = {file_stem(name): name for name in order}
    for log in sorted(out.glob("*-seed*.log")):
        stem, _, seed = log.stem.rpartition("-seed")
        if stem in names and not log.with_suffix(".json").exists() and (result := _cut_off(log.read_text())):
            results.append({"name": names[stem], "seed": int(seed)} | result)
    by_name = {name: [r for r in results if r["name"] == name] for name in order}
    by_name = {name: runs for name, runs in by_name.items() if runs}
    text = "\n".join(_table(by_name)) + "\n"
    (out / "results.md").write_text(text, encoding="utf-8")
    print(text)
    _draw(out, by_name)


def file_stem(name: str) -> str:
    """A variant's name in the names of its files."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower())


def _cut_off(log: str) -> dict[str, Any] | None:
    """What is known of a run that was killed, failed or is under way: the steps in its log, and where it came
    that far the held-out loss at its end. None before its first step."""
    steps = re.findall(r"^step (\d+)/(\d+)  loss (\S+)", log, re.MULTILINE)
    if not steps:
        return None
    heldout = re.search(rf"^step {steps[-1][1]}: held-out loss ([\d.]+),", log, re.MULTILINE)
    known = {"heldout_loss": float(heldout[1])} if heldout else {"cut_off": int(steps[-1][0])}
    return known | {"curves": {"loss/train": [(int(step), float(loss)) for step, _, loss in steps]}}


def _outcome(run: dict[str, Any]) -> str:
    if "heldout_loss" in run:
        return f"{run['heldout_loss']:.4f}"
    return f"cut off at step {run['cut_off']:,}" if "cut_off" in run else "diverged"


def _table(by_name: dict[str, list[dict[str, Any]]]) -> list[str]:
    head = (
        "variant",
        "held-out loss (each seed)",
        "beside dense relu2 of the same seeds (weight24: SwiGLU)",
        "same weights, dense",
        "zeros",
        "dropped energy, forward / weight gradients",
        "cosine of weight gradients",
        "tokens/s",
        "paper",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, runs in by_name.items():
        loss = _loss(runs)
        dense_runs = by_name.get("dense SwiGLU" if name.startswith("weight24") else "dense relu2", [])
        seeds = {run["seed"] for run in runs}
        bar = _loss([run for run in dense_runs if run["seed"] in seeds])
        difference = f"{loss / bar - 1:+.2%}" if loss and bar else ""
        dense = [run["forms"]["dense"] for run in runs if "forms" in run and "2:4" in run["forms"]]
        rates = [run["tokens_per_second"] for run in runs if "tokens_per_second" in run]
        dropped = (
            _last(runs, "sparsity_dropped_energy/mean"),
            _last(runs, "sparsity_feature_dropped_energy/mean"),
        )
        cells = (
            name,
            ", ".join(map(_outcome, runs)),
            difference,
            f"{fmean(dense):.4f}" if dense else "",
            _shown(_last(runs, "sparsity_relu/mean"), "{:.1%}"),
            " / ".join(_shown(value, "{:.3%}") or "—" for value in dropped) if dropped[0] is not None else "",
            _shown(_last(runs, "sparsity_gradient_cosine/"), "{:.4f}"),
            f"{fmean(rates):,.0f}" if rates else "",
            f"{PAPER[name]:.3f}" if name in PAPER else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _loss(runs: list[dict[str, Any]]) -> float | None:
    if not runs or any("heldout_loss" not in run for run in runs):
        return None
    return fmean(run["heldout_loss"] for run in runs)


def _last(runs: list[dict[str, Any]], tag: str) -> float | None:
    """The mean of the last points of the curves whose tags begin so."""
    found = [curve[-1][1] for run in runs for key, curve in run["curves"].items() if key.startswith(tag)]
    return fmean(found) if found else None


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _draw(out: Path, by_name: dict[str, list[dict[str, Any]]]) -> None:
    try:
        import matplotlib.pyplot as plt  # type: ignore[import-not-found]
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    curves = {name: dict(runs[0]["curves"]["loss/train"]) for name, runs in by_name.items()}
    base = curves.get("dense relu2", next(iter(curves.values())))
    colours = plt.get_cmap("tab20")
    for nth, (name, curve) in enumerate(curves.items()):
        apart = [(step, loss - base[step]) for step, loss in curve.items() if step in base]
        for panel, points in ((left, list(curve.items())), (right, apart)):
            if points:
                panel.plot(*zip(*_smooth(points), strict=True), label=name, color=colours(nth))
    left.set(xlabel="step", ylabel="training loss, nats per token", ylim=(None, 6))
    right.set(xlabel="step", ylabel="above dense relu2", ylim=(-0.05, 0.2))
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / "loss.png", dpi=80)
    groups = {
        "sparsity_relu": "zeros after relu²",
        "sparsity_dropped_energy": "energy that 2:4 drops",
        "sparsity_feature_dropped_energy": "energy dropped in weight gradients",
    }
    name = next((name for name in ("full recipe", *by_name) if name in by_name), "")
    figure, panels = plt.subplots(1, len(groups), figsize=(15, 4), layout="constrained")
    for panel, (group, title) in zip(panels, groups.items(), strict=True):
        curves = by_name[name][0]["curves"] if name else {}
        layers = sorted(
            (int(m[1]), tag) for tag in curves if (m := re.fullmatch(rf"{group}/layer_(\d+)", tag))
        )
        for layer, tag in layers:
            steps, values = zip(*curves[tag], strict=True)
            panel.plot(steps, values, color=plt.get_cmap("viridis")(layer / max(len(layers) - 1, 1)))
        panel.set(xlabel="step", title=f"{title}, by layer", yscale="linear" if "zeros" in title else "log")
    figure.suptitle(name)
    figure.savefig(out / "layers.png", dpi=80)


def _smooth(curve: Sequence[tuple[int, float]], decay: float = 0.99) -> list[tuple[int, float]]:
    """An exponential mean, for the eye, `decay` a step, however far apart the points are."""
    smooth, (before, mean) = [], curve[0]
    for step, value in curve:
        weight = decay ** (step - before)
        mean, before = weight * mean + (1 - weight) * value, step
        smooth.append((step, mean))
    return smooth
