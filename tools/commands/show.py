"""Results as tables for people and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.table import Table

from act24.passes.report import Report
from act24.recipes.schema import Recipe
from act24.tools.bench.kernel_groups import GROUPS, UNKNOWN
from act24.tools.bench.rows import Row
from act24.tools.bench.rows import table as markdown_table
from act24.tools.run.evaluate import Evaluation
from act24.tools.run.pretrained import plan as plan_recipe
from act24.tools.run.progress import console
from act24.tools.run.train import Outcome
from act24.tools.watch.tensorboard import open_hint


def show_outcome(recipe: Recipe, outcome: Outcome, run_dir: Path | None) -> None:
    """The summary at the end of a run, on the main process; `run_dir` None for a dry run."""
    if not outcome.is_main:
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # of a path nothing may be missing
    for name, value in _summary_rows(recipe, outcome):
        table.add_row(name, str(value))
    console.print(table, highlight=False)
    if run_dir is not None:
        print(f"watch it: {open_hint(run_dir)}")


def _summary_rows(recipe: Recipe, outcome: Outcome) -> list[tuple[str, Any]]:
    """What a run came to, for the table at its end."""
    rows: list[tuple[str, Any]] = [
        ("steps", f"{outcome.step:,} of {recipe.train.steps:,}"),
        ("parameters", f"{outcome.parameters:,}"),
        ("tokens", f"{outcome.tokens:,}"),
    ]
    if outcome.tokens_per_second:
        rows += [
            ("tokens per second", f"{outcome.tokens_per_second:,.0f}"),
            ("training loss", f"{outcome.loss:.4f}"),
        ]
    if outcome.evaluation:
        rows += [
            ("held-out loss", f"{outcome.evaluation.loss:.4f}"),
            ("held-out text", outcome.evaluation.extent),
            ("held-out perplexity", f"{outcome.evaluation.perplexity:.2f}"),
            ("bits per byte", f"{outcome.evaluation.bits_per_byte:.4f}"),
        ]
    if outcome.peak_memory:
        rows.append(("peak GPU memory", f"{outcome.peak_memory / 2**30:.2f} GiB"))
    if outcome.checkpoint:
        rows.append(("checkpoint", str(outcome.checkpoint)))
    return rows


def show_plan(recipe: Recipe, as_json: bool, say: Callable[[str], str] = str) -> None:
    """`act24 plan`; `say` takes what is for people to their language."""
    report = plan_recipe(recipe, say).report
    if as_json:
        print(json.dumps(plan_table(report), indent=1))
        return
    print("\n".join(report.lines(say, cell_len)))


def plan_table(report: Report) -> dict[str, object]:
    """A report as JSON values; all counts are whole integers."""
    return {
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "flops_per_token_before": report.flops_before,
        "flops_per_token_after": report.flops_after,
        "matches": [vars(row) for row in report.rows],
        "misses": [{"pass": name, "fqn": fqn, "reason": reason} for name, fqn, reason in report.misses],
        "coverage": [vars(one) for one in report.coverage],
        "checked": report.checked,
    }


def show_evaluations(evaluations: Mapping[str, Evaluation], legacy_average: bool, as_json: bool) -> None:
    """`act24 eval`: one row a form of the model."""
    if as_json:
        print(json.dumps({name: e.as_dict() for name, e in evaluations.items()}, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    columns = ["", "loss", "perplexity", "bits per byte", "tokens"]
    columns += ["legacy n+1 loss", "legacy perplexity"] if legacy_average else []
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, e in evaluations.items():
        extent = e.extent.replace(" tokens", "")
        row = [name, f"{e.loss:.4f}", f"{e.perplexity:.2f}", f"{e.bits_per_byte:.4f}", extent]
        row += [f"{e.legacy_loss:.4f}", f"{e.legacy_perplexity:.2f}"] if legacy_average else []
        table.add_row(*row)
    console.print(table, highlight=False)


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Cells, the head first; the first column is of names, the others of figures."""
    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table, highlight=False, markup=False)


def show_sparsity(outcome: Outcome) -> None:
    """Zeros after relu² and what 2:4 drops, by layer."""
    table = Table(box=None, pad_edge=False, title="relu² activations at the end", title_justify="left")
    for column in ("layer", "zeros", "non-zeros dropped by 2:4", "energy dropped"):
        table.add_column(column, justify="right")
    for site in outcome.sites:
        table.add_row(
            f"{site.layer} {site.site}",
            f"{site.sparsity:.1%}",
            f"{site.dropped_nonzeros:.2%}",
            f"{site.dropped_energy:.2%}",
        )
    console.print(table, highlight=False)


def show_step_bench(result: dict[str, Any], as_json: bool) -> None:
    """`act24 bench step`."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("", "ms a step", "tokens/s", "TFLOP/s", "peak GiB"):
        table.add_column(column, justify="right" if column else "left")
    for side in result["sides"]:
        figures = (f"{side['milliseconds']:.2f}", f"{side['tokens_per_second']:,.0f}")
        table.add_row(side["name"], *figures, f"{side['teraflops']:.0f}", f"{side['peak_gib']:.2f}")
    console.print(table, highlight=False)
    other = result["sides"][1]["name"]
    print(f"rate {result['rate_ratio']:.3f}, memory {result['memory_ratio']:.3f} of the {other} model")
    print(f"{result['tokens_per_step']:,} tokens a step, {result['gpu']}, torch {result['torch']}")


def show_train_bench(result: dict[str, Any], as_json: bool) -> None:
    """`act24 bench train`."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    columns = (
        "",
        "rows × micro-batches",
        "tokens/s",
        "ratio",
        "graphs",
        "allocated, reserved GiB",
        "to begin, s",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for side in result["sides"]:
        table.add_row(
            side["name"],
            f"{side['rows']} × {side['micro_batches']}",
            f"{side['rate']:,.0f}",
            f"{side['ratio']:.3f}",
            "yes" if side["captured"] else "no",
            f"{side['allocated_gib']:.1f}, {side['reserved_gib']:.1f}",
            f"{side['begin_seconds']:.1f}",
        )
    console.print(table, highlight=False)
    print(
        f"{result['gpu']}, torch {result['torch']}, commit {result['commit']}; {result['steps']} steps a turn"
    )


def show_limit(result: dict[str, Any], as_json: bool) -> None:
    """`act24 bench limit`: a table a kind of recipe; paths, and kernels that nobody knows, beneath them."""
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    for kind in dict.fromkeys(side["recipe"] for side in result["sides"]):
        print(limit_table(result, kind), end="\n\n")
    for side in result["sides"]:
        print(f"{side['size']} {side['recipe']}: {side['rows']} rows of {side['length']} × ", end="")
        print(f"{side['micro_batches']}; {side['path']}")
        if side["not_captured"]:
            print(f"  not captured: {side['not_captured']}")
        for group in side["groups"]:
            for kernel in group["kernels"] if group["group"] == UNKNOWN else ():
                print(f"  unknown kernel: {kernel['name']}, {kernel['count']} of {kernel['ms']} ms in all")
    print(
        f"\n{result['gpu']}, torch {result['versions']['torch']}, commit {result['commit']}; a copy moves "
        f"{result['copy_gb_s']:,.0f} GB/s, a large product does {result['large_product_tflop_s']:,.0f} "
        "TFLOP/s"
    )


def limit_table(result: Mapping[str, Any], kind: str) -> str:
    """The sides of one kind as a Markdown table: ms a micro-batch of each group beside its limit."""
    sides = [side for side in result["sides"] if side["recipe"] == kind]
    lines = [[f"{kind}, ms a micro-batch", *(c for side in sides for c in (side["size"], "limit"))]]
    lines.append(["---"] * len(lines[0]))
    by_name = [{group["group"]: group for group in side["groups"]} for side in sides]
    for group in (group for group in GROUPS if any(group in groups for groups in by_name)):
        cells = [_took_and_limit(groups.get(group)) for groups in by_name]
        lines.append([group, *(cell for pair in cells for cell in pair)])
    gaps = [(f"{side['gaps_ms']:.2f}", "") for side in sides]
    lines.append(["gaps between kernels", *(cell for pair in gaps for cell in pair)])
    limits = [sum(group["limit_ms"] or 0 for group in side["groups"]) for side in sides]
    sums = [(f"{side['ms']:.2f}", f"{limit:.2f}") for side, limit in zip(sides, limits, strict=True)]
    lines.append(["all", *(cell for pair in sums for cell in pair)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _took_and_limit(group: Mapping[str, Any] | None) -> tuple[str, str]:
    if group is None:
        return "", ""
    limit = group["limit_ms"]
    return f"{group['ms']:.2f}", "" if limit is None else f"{limit:.2f}"


def show_bench_rows(rows: list[Row], as_json: bool) -> None:
    """`act24 bench pack`, `gemm` and `ffn`."""
    print(json.dumps([row.as_json() for row in rows], indent=1) if as_json else markdown_table(rows))
