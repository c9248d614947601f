"""`act24 bench`: measurements on this machine's GPU. Imports are those of the commands that run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from act24.tools.commands.options import JsonOption, RecipeArgument, SetOption, refuse_ignored_keys

bench_app = typer.Typer(help="Benchmarks on this machine's GPU.", no_args_is_help=True)


@bench_app.command("step")
def bench_step(
    recipe: RecipeArgument,
    set_: SetOption = None,
    beside: Annotated[
        str | None, typer.Option(help="Another recipe as the other side; --set holds for both.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows a step, in one micro-batch.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps a turn; each side has two turns.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """A whole training step beside the same model written by hand, or beside another recipe's: time,
    tokens/s, TFLOP/s, memory."""
    from act24.recipes.load import load_recipe
    from act24.tools.bench.step import bench_step as run_bench
    from act24.tools.commands.show import show_step_bench

    of_rows = ["train.batch_size", "train.total_batch_size"]
    refuse_ignored_keys(set_ or (), of_rows, "--rows says how many rows a step has")
    other = load_recipe(beside, set_ or ()) if beside else None
    show_step_bench(run_bench(load_recipe(recipe, set_ or ()), rows, steps, beside=other), as_json)


@bench_app.command("train")
def bench_train(
    recipes: Annotated[list[str], typer.Argument(help="Recipes; ratios are to the first one.")],
    set_: SetOption = None,
    rows: Annotated[str, typer.Option(help="Rows a micro-batch, several separated by commas.")] = "64",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps a turn, after a window to warm up.")] = 20,
    turns: Annotated[int, typer.Option(min=1, help="How often each side is built and timed.")] = 2,
    without: Annotated[
        bool, typer.Option("--without-24", help="Each recipe also without its 2:4 passes.")
    ] = False,
    transformers: Annotated[
        bool,
        typer.Option("--transformers", help="Also transformers' LLaMA of the first recipe's size, compiled."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr.")] = False,
) -> None:
    """The training loop as `act24 train` runs it, recipes side by side: tokens/s, memory, time to begin."""
    from act24.recipes.load import load_recipe
    from act24.tools.bench.train import bench_train as run_bench
    from act24.tools.bench.train import row_numbers, with_dense_sides
    from act24.tools.commands.show import show_train_bench

    numbers = row_numbers(rows)
    refuse_ignored_keys(set_ or (), ["train.batch_size"], "--rows says how many rows a micro-batch has")
    of_text = ["data.source", "data.shards", "tokenizer.name", "tokenizer.vocab_size"]
    refuse_ignored_keys(set_ or (), of_text, "bench train reads tokens of its own")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    loaded = {name: load_recipe(name, set_ or ()) for name in recipes}
    if without:
        loaded = with_dense_sides(loaded)
    show_train_bench(run_bench(loaded, numbers, steps, turns, transformers, say), as_json)


@bench_app.command("peers")
def bench_peers(
    sizes: Annotated[str, typer.Option(help="130m, 350m, 1b or 7b (4 layers), by commas.")] = "7b",
    precisions: Annotated[str, typer.Option(help="autocast or bfloat16, by commas.")] = "bfloat16",
    rows: Annotated[int | None, typer.Option(min=1, help="Rows a step; by size if not given.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="How often each side is built and timed.")] = 2,
    side: Annotated[list[str] | None, typer.Option(help="Only this side, repeatable; all if none.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Whole training steps beside transformers, and transformers with torchao's fp8. Stopped, it reports what
    it has timed."""
    from act24.tools.bench.peers import bench_peers as run_bench
    from act24.tools.commands.show import show_bench_rows

    found = run_bench(sizes.split(","), precisions.split(","), rows, turns=turns, sides=side or ())
    show_bench_rows(found, as_json)


@bench_app.command("limit")
def bench_limit(
    sizes: Annotated[str, typer.Option(help="130m, 350m or 7b (4 layers), by commas.")] = "130m,350m,7b",
    kinds: Annotated[
        str, typer.Option(help="relu2-act24, dense or relu2, by commas: recipes of each size.")
    ] = "relu2-act24,dense",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr.")] = False,
) -> None:
    """Where the time of a captured training step goes, beside what the machine could do."""
    from act24.tools.bench.limit import bench_limit as run_bench
    from act24.tools.commands.show import show_limit

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    show_limit(run_bench(sizes.split(","), kinds.split(","), say), as_json)


@bench_app.command("pack")
def bench_pack(as_json: JsonOption = False) -> None:
    """The elementwise passes of 2:4, as a share of what a copy moves."""
    from act24.tools.bench.pack import bench_pack as run_bench
    from act24.tools.commands.show import show_bench_rows

    show_bench_rows(run_bench(), as_json)


@bench_app.command("gemm")
def bench_gemm(as_json: JsonOption = False) -> None:
    """2:4 products, the fastest valid algorithm of each, beside the dense product."""
    from act24.tools.bench.gemm import bench_gemm as run_bench
    from act24.tools.commands.show import show_bench_rows

    show_bench_rows(run_bench()[0], as_json)


@bench_app.command("fp8")
def bench_fp8(as_json: JsonOption = False) -> None:
    """What e4m3 gives the products of a network and of the head, and what each choice of scales costs."""
    from act24.tools.bench.fp8 import bench_fp8 as run_bench
    from act24.tools.commands.show import show_bench_rows

    show_bench_rows(run_bench(), as_json)


@bench_app.command("precision")
def bench_precision(
    sizes: Annotated[str, typer.Option(help="60m, 130m, 350m, 1b or 7b, by commas.")] = "60m,130m,350m,1b,7b",
    precisions: Annotated[str, typer.Option(help="autocast or bfloat16, by commas.")] = "autocast",
    rows: Annotated[int | None, typer.Option(min=1, help="Rows; by size if not given.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What precision = "auto" takes of each layer: e4m3 beside bfloat16, forward and backward."""
    from act24.tools.bench.precision import bench_precision as run_bench
    from act24.tools.commands.show import show_bench_rows

    show_bench_rows(run_bench(sizes.split(","), precisions.split(","), rows), as_json)


@bench_app.command("weight")
def bench_weight(as_json: JsonOption = False) -> None:
    """A SwiGLU network with 2:4 weights beside the compiled dense one, and the passes that they need."""
    from act24.tools.bench.weight import bench_weight as run_bench
    from act24.tools.commands.show import show_bench_rows

    show_bench_rows(run_bench(), as_json)


@bench_app.command("ffn")
def bench_ffn(as_json: JsonOption = False) -> None:
    """A feed-forward network with 2:4 activations, full and low-rank, beside the compiled dense one."""
    from act24.tools.bench.ffn import bench_ffn as run_bench
    from act24.tools.bench.ffn import bench_low_rank
    from act24.tools.commands.show import show_bench_rows

    show_bench_rows(run_bench() + bench_low_rank(), as_json)
