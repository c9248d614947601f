"""Figures of the pages against docs/results/kernels.json, which keeps every run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from act24.errors import Act24Error
from act24.tools.bench.keep import NEEDED, keep
from act24.tools.bench.kernel_groups import CASTS
from act24.tools.commands.show import limit_table

ROOT = Path(__file__).parents[1]
ROWS = json.loads((ROOT / "docs/results/kernels.json").read_text(encoding="utf-8"))
WIDE, HALF = "16384×4096×16384", "32768×2048×8192"
PEER = "step, 7b, bfloat16, 8 rows, act24"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


LIMIT = json.loads((ROOT / "docs/results/step-limit.json").read_text(encoding="utf-8"))


def test_where_the_rest_of_a_step_goes_is_what_was_measured():
    """The table as the command prints it; its groups and gaps add up to the step."""
    page = read("docs/results/training-speed.md")
    assert limit_table(LIMIT, "relu2-act24") in page
    assert LIMIT["commit"] in page
    later = LIMIT["later"]
    assert limit_table(later, "dense") in page
    assert f"(commit {later['commit']})" in page
    assert f"{LIMIT['copy_gb_s'] / 1000:.2f} TB/s" in page
    what_is_left = page.partition("| what | 130m, ms |")[2].partition("So the cheapest")[0]
    left = {}
    for side in LIMIT["sides"]:
        groups = {group["group"]: group for group in side["groups"]}
        assert sum(group["ms"] for group in groups.values()) == pytest.approx(side["kernels_ms"], rel=2e-3)
        assert side["kernels_ms"] + side["gaps_ms"] == pytest.approx(side["ms"])
        limits = sum(group["limit_ms"] for group in groups.values())
        assert f"{limits / side['ms']:.0%}" == "76%"
        for name, group in groups.items():
            if f"| {name} | " in what_is_left:
                left.setdefault(name, []).append(f"{group['ms'] - group['limit_ms']:.2f}")
        moved = [k["ms"] for k in groups[CASTS]["kernels"] if "clone_transpose" in k["name"]]
        left.setdefault("copies between layouts, around attention", []).append(f"{sum(moved):.2f}")
    assert {"attention", "norms and elementwise", "softmax of the head"} <= {*left}
    for name, figures in left.items():
        assert f"| {name} | {' | '.join(figures)} | " in what_is_left


def test_adamw_in_one_pass_is_told_as_it_was_timed():
    one, fused = (r for r in ROWS if r["name"].startswith("AdamW in one pass"))
    page = " ".join(read("docs/results/kernels.md").split())
    assert f"{one['ours']} ms beside {fused['other']} for 1,072M parameters, at 4.17 TB/s" in page
    assert f"{one['other']} in the several passes before" in page
    assert 1072e6 * 22 / one["ours"] / 1e9 == pytest.approx(4.17, abs=0.03)
    assert f"{one['ratio']:.1f} times as fast in one pass" in " ".join(read("README.md").split())


def ratios(name: str, unit: str = "ms", beside: str | None = None) -> list[float]:
    rows = [r for r in ROWS if r["name"] == name and r["unit"] == unit and not r["superseded"]]
    found = [r["ratio"] for r in rows if beside is None or r["note"] == beside]
    assert found, f"no run of {name!r}"
    return found


def told(*names: str, unit: str = "ms", digits: int = 3, beside: str | None = None) -> str:
    """The range over all runs of some rows, as pages write it."""
    found = [f"{ratio:.{digits}f}" for name in names for ratio in ratios(name, unit, beside)]
    low, high = min(found), max(found)
    return low if low == high else f"{low} to {high}"


def test_every_run_says_what_it_is_of():
    for row in ROWS:
        assert {*NEEDED, "superseded"} <= {*row}, row["name"]
        assert row["commit"] or row["recorded"], row["name"]
        assert row["gpu"]
        assert row["versions"]["torch"]
        ours, other = row["ours"], row["other"]
        expected = other / ours if row["unit"] == "ms" else ours / other
        # Those of the fp8 errors and of a launch have no better side.
        assert row["ratio"] == pytest.approx(expected, rel=2e-3) or row["unit"] == "relative error", row[
            "name"
        ]
    runs = [(r["name"], r["unit"], r["ours"], r["other"], r["commit"], r["note"]) for r in ROWS]
    assert len({*runs}) == len(runs)
    assert {r["batch"] for r in ROWS if r["name"].endswith(WIDE)} == {16384}


#: Rows of the table of bars by how they begin, and what stands in their last cells.
BARS = {
    "packing along features": [told("pack along features, 16384×16384", unit="GB/s")],
    "packing both ways": [told("pack both ways (dZ and the activation), 16384×16384", unit="GB/s")],
    "FFN forward for inference": [
        told(f"FFN inference, {WIDE}"),
        told(f"FFN inference, fp8, {WIDE}") + " with fp8",
    ],
    "FFN forward + backward, the same": [
        told(f"FFN forward + backward, all sparse, {WIDE}"),
        told(f"FFN forward + backward, all sparse, fp8, {WIDE}") + " with fp8",
    ],
    "the same with the 95/5": [
        told(f"FFN forward + backward, 95/5 split, {WIDE}"),
        told(f"FFN forward + backward, 95/5 split, fp8, {WIDE}") + " with fp8",
    ],
    "FFN forward + backward, 32768": [
        told(f"FFN forward + backward, all sparse, {HALF}"),
        told(f"FFN forward + backward, 95/5 split, {HALF}") + " with the split",
        told(f"FFN forward + backward, dense weight gradients, {HALF}") + " with exact ones",
    ],
    "bytes saved for backward by the FFN": [told(f"FFN bytes saved, of dense, {WIDE}", unit="bytes")],
    "LORO FFN at 350m": [
        told("low-rank FFN forward + backward, fast, 65536×1024×256×4096"),
        told("low-rank FFN forward + backward, packed, all sparse, 65536×1024×256×4096") + " with all-sparse",
    ],
    "bytes saved by the LORO FFN": [
        " / ".join(
            told(f"low-rank FFN bytes saved, {form}, 65536×1024×256×4096", unit="bytes")
            for form in ("fast", "recompute")
        )
    ],
    "whole step, 7b width, against": [
        told("step, 7b width in bfloat16 relu2, 2:4 / 7b width in bfloat16 dense"),
        told(f"{PEER} relu², 2:4, fp8 with head", beside="act24 dense") + " with fp8 and its head",
        told(f"{PEER} relu², 2:4, fp8", beside="act24 dense") + " with fp8 alone",
        told(f"{PEER} relu², 2:4, fp8 with head", beside="transformers, torchao tensorwise")
        + " of transformers",
        "under autocast " + told("step, 7b width relu2, 2:4 / 7b width dense"),
    ],
    "whole step, 1b, CoLA": [
        told("step, 1b in bfloat16 cola-relu2, 2:4 / 1b in bfloat16 dense"),
        told("step, 1b cola-relu2, 2:4 / 1b dense") + " under autocast",
    ],
    "peak memory of that step": [
        told("step, 1b in bfloat16 cola-relu2, 2:4 / 1b in bfloat16 dense", unit="bytes"),
        told("step, 1b cola-relu2, 2:4 / 1b dense", unit="bytes") + " under autocast",
    ],
    "SwiGLU with 2:4 weights": [
        told("SwiGLU, transposable, y, grad_x, grad_weight in 2:4, packed in every call, 16384×4096×11008")
    ],
    "whole step, 7b width, 2:4 weights": [
        told("whole step, 7b width, 4 layers, 8 rows of 2048, bfloat16, weight24 in attention and MLPs")
    ],
}


def test_the_table_of_bars_quotes_the_ranges_of_all_runs():
    table = read("docs/results/kernels.md").partition("## Bars")[2].partition("\n\nThe dense network")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    assert len(lines) == len(BARS) + 1  # that of the presets is the next table
    for begins, figures in BARS.items():
        (line,) = [line for line in lines if line.startswith(f"| {begins}")]
        assert [figure for figure in figures if figure not in line.split("|", 3)[3]] == [], begins


STEP = re.compile(r"\|([^|\n]*)\|([^|\n]*)\|" + r" ([\d.]+) \|" * 4)


def test_the_table_of_whole_steps_is_of_the_runs():
    table = (
        read("docs/results/kernels.md").partition("## Whole steps")[2].partition("Against dense SwiGLU")[0]
    )
    title, count = "", 0
    for cells in STEP.findall(table):
        given, backward, *figures = (cell.strip() for cell in cells)
        if given.startswith("the same in pure bf16"):
            title = title.replace("7b width", "7b width in bfloat16")
        elif given:
            size, _, method = given.replace(", 4 layers,", "").rpartition(" ")
            size, method = (size, method) if method == "relu2" else (given, method)
            words = size.split()
            kind = {"LORO": "loro-", "CoLA": "cola-", "LoST": "lost-"}.get(words[-1], "")
            title = f"{' '.join(words[:-1] if kind else words)} {kind}relu2"
        exact = ", exact backward" if "exact" in backward else ""
        name = f"step, {title}, 2:4{exact} / {title}"
        time, memory = (
            [r for r in ROWS if r["name"] == name and r["unit"] == unit and not r["superseded"]]
            for unit in ("ms", "bytes")
        )
        assert len(time) == len(memory) == 1, name
        (time,), (memory,) = time, memory
        wanted = (time["other"], time["ours"], time["ratio"], memory["ratio"])
        for figure, value, half in zip(figures, wanted, (0.05, 0.05, 5e-4, 5e-3), strict=True):
            assert float(figure) == pytest.approx(value, abs=1.001 * half), name
        count += 1
    assert count == 21


@pytest.mark.parametrize(("page", "to"), [("README.md", " to "), ("README.zh.md", " 到 ")])
def test_readme_quotes_the_range_of_the_network(page, to):
    names = [f"FFN forward + backward, {kind}" for kind in ("all sparse", "95/5 split")]
    text = re.sub(r"\s+", " ", read(page))
    for precision in ("", ", fp8"):
        figure = told(*(f"{name}{precision}, {WIDE}" for name in names), digits=2)
        assert figure.replace(" to ", to) in text


def test_rows_are_added_with_what_they_are_of(tmp_path):
    file, new = tmp_path / "kernels.json", tmp_path / "rows.json"
    row = {key: value for key, value in ROWS[0].items() if key in NEEDED} | {"commit": "abc1234"}
    file.write_text("[]")
    new.write_text(json.dumps([row]))
    assert keep(new, file) == 1
    assert json.loads(file.read_text()) == [row | {"superseded": False}]
    with pytest.raises(Act24Error, match=r"of abc1234 is kept already"):
        keep(new, file)
    for key in NEEDED[1:]:
        new.write_text(json.dumps([{k: v for k, v in row.items() if k != key}]))
        with pytest.raises(Act24Error, match=f"lacks {key}"):
            keep(new, file)
    new.write_text(json.dumps([row | {"commit": None}]))
    with pytest.raises(Act24Error, match="lacks its commit"):
        keep(new, file)
    new.write_text("{}")
    with pytest.raises(Act24Error, match="expected a list of rows"):
        keep(new, file)


def test_the_first_edition_beside_this_one_is_of_the_rows():
    rows = json.loads(read("docs/results/before-and-after.json"))["rows"]
    ratios = {row["name"]: f"{row['here'] / row['there']:.3f}" for row in rows}
    text = re.sub(r"\s+", " ", read("docs/results/training-speed.md"))
    steps = [ratio for name, ratio in ratios.items() if name.startswith("step")]
    titles = ("130m, 256 rows", "350m, 128 rows", "350m LORO", "1b CoLA, 64 rows")
    quoted = "; ".join(f"{title} {ratio}" for title, ratio in zip(titles, steps, strict=True))
    assert f"Whole steps, new over old: {quoted}." in text
    ours = [r for name, r in ratios.items() if name.startswith("pack") and "PyTorch" not in name]
    ours = sorted(float(ratio) for ratio in ours)
    assert f"{ours[0]:.3f} to {ours[-3]:.3f}, and {ours[-1]:.2f} where MVUE draws" in text


def test_what_fp8_costs_in_loss_is_what_the_runs_said():
    runs = json.loads(read("docs/results/fp8-loss.json"))["runs"]
    losses = {(run["name"], run["seed"]): run["heldout_loss"] for run in runs}
    ours, dense = ([losses[name, seed] for seed in (0, 1)] for name in ("fp8 everywhere, 2:4", "dense relu2"))
    told, kernels = (
        (" and ".join(f"{loss:.4f}" for loss in each) for each in (ours, dense)),
        read("docs/results/kernels.md"),
    )
    for text in told:
        assert text in kernels
        assert text in read("README.md")
        assert text.replace(" and ", " 和 ") in re.sub(r"\s+", " ", read("README.zh.md"))
    changes = " and ".join(f"−{100 - 100 * a / b:.2f}%" for a, b in zip(ours, dense, strict=True))
    assert f"so {changes}: the bar is +0.5%" in kernels


def test_precision_that_was_timed_is_told_as_it_was():
    page = read("docs/results/kernels.md")
    timed = [row for row in ROWS if (row["note"] or "").startswith("taken:")]
    cells = {"60m": [], "130m": []}
    for row in timed:
        taken, by_shape = re.fullmatch(r"taken: (\w+) \(.*\), by its shape (\w+).*", row["note"]).groups()
        assert taken == by_shape
        text = f"{row['ours']:.2f} / {row['other']:.2f}"
        cells[row["name"].partition(",")[0]].append(text + ", taken" * (taken == "fp8"))
    for title, small, large in zip(
        ("network", "q, k and v", "o", "head, a chunk"), cells["60m"], cells["130m"], strict=True
    ):
        assert f"| {title} | {small} | {large} |" in page
    loops = json.loads(read("docs/results/training-speed.json"))["runs"]
    sides = [side for run in loops for side in run["sides"]]
    ratios = {
        size: [f"{side['ratio']:.3f}" for side in sides if side["name"] == f"{size}.toml"]
        for size in ("130m-auto", "60m-auto", "60m-same")
    }
    (wide,), (one, other), (same,) = ratios.values()
    text = " ".join(page.split())
    assert f"{wide} of the tokens/s of the same in bfloat16 at 130m and {one} and {other} at 60m" in text
    assert f"where the same recipe twice made {same}" in text


def test_1b_under_autocast_is_told_as_it_was_timed():
    page = " ".join(read("docs/results/kernels.md").split())
    side = "step, 1b, autocast, 64 rows, act24"
    ours, *_ = (
        r for r in ROWS if r["name"] == f"{side} relu², 2:4, fp8 with head" and r["commit"] == "c195164"
    )
    assert f"(commit c195164): {ours['other']:.1f} and {ours['ours']:.1f} ms, **{ours['ratio']:.3f}**" in page
    for name in ("", ", fp8 where faster, with head", ", fp8 with head"):
        (row,) = (r for r in ROWS if r["name"] == f"{side} CoLA relu², 2:4{name}")
        assert re.search(rf"{row['ours']:.1f}( ms)?, \**{row['ratio']:.3f}", page)
