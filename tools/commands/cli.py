"""The command line. Every command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from act24.tools.commands import recovery
from act24.tools.commands.bench import bench_app
from act24.tools.commands.chinese import LangOption, comments, speaker
from act24.tools.commands.cli_generate import bench_decode, bench_generate, generate, sample
from act24.tools.commands.edge import ends_in_one_line
from act24.tools.commands.options import (
    RecipeArgument,
    ScaleOption,
    SetOption,
    refuse_ignored,
    refuse_ignored_keys,
)

if TYPE_CHECKING:
    from act24.recipes.schema import Recipe

app = typer.Typer(
    name="act24",
    help="Train LLaMA-style language models with low-rank weights and 2:4 sparsity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(help="List, show, check and copy recipes.", no_args_is_help=True)
data_app = typer.Typer(help="Prepare data for training.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

DataOnResume = Literal["same", "grow"]
ScheduleOnResume = Literal["hold", "stretch"]

#: What `probe-decay` tries: λ of the scripts of arXiv 2404.01847, 6e-5 and 2e-4, and one on each side.
DECAYS = [2e-5, 6e-5, 2e-4, 6e-4]


def main() -> None:
    """Run the command line: user errors are one line and status 2, anything else is a bug."""
    with ends_in_one_line():
        app(prog_name="act24")  # also where it runs as `python -m act24`


def _warn_of_oddities(recipe: Recipe, say: Callable[[str], str] = str) -> None:
    """Say on stderr what training would say when it starts."""
    from act24.recipes.checks import oddities

    for line in oddities(recipe):
        print(say(f"warning: {line}"), file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"act24 {version('act24')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Train LLaMA-style language models with low-rank weights and 2:4 sparsity."""


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    # Not --run: torchrun, which reads all options first, takes that for one of its own.
    run_dir: Annotated[
        Path | None, typer.Option(help="The run's folder; default runs/<recipe>[,key=value].")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(help="never, auto (the run's last checkpoint, if any), a checkpoint or a run."),
    ] = "never",
    data: Annotated[
        DataOnResume,
        typer.Option(
            help="On --resume: the same files, or grow: those that were added from the next epoch on."
        ),
    ] = "same",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Build, plan, print, make one step (with --resume the next); write no file."
        ),
    ] = False,
    schedule: Annotated[
        ScheduleOnResume,
        typer.Option(
            help="On --resume with other train.steps: hold the learning rate as it was, then at its last "
            "value, or stretch it over the new steps."
        ),
    ] = "hold",
    scale_steps: ScaleOption = False,
) -> None:
    """Train a recipe. Several GPUs: torchrun --nproc-per-node N -m act24 train …

    Exits with 75 when a signal stopped it: start it again with --resume auto, and it goes on. torchrun makes
    1 of 75, so below it a stop that was saved leaves the file RUN/stopped, which the next start deletes.
    """
    from act24.tools.run.signals import STOPPED_STATUS, stop_on_signal, stopped_status

    with stopped_status():
        with stop_on_signal():  # loading PyTorch takes seconds, in which a scheduler may change its mind
            from act24.recipes.load import load_recipe
            from act24.tools.commands.show import show_outcome
            from act24.tools.run.folder import default_run_dir
            from act24.tools.run.train import train as run_training

            loaded = load_recipe(recipe, set_ or (), scale_steps)
        if run_dir is None:
            run_dir, plain = default_run_dir(recipe, set_ or (), scale_steps), default_run_dir(recipe)
            if resume == "auto" and plain.exists() and not run_dir.exists():
                line = f"warning: a variant begins in {run_dir}; to go on with {plain}: --run-dir {plain}"
                print(line, file=sys.stderr)
        outcome = run_training(
            loaded, run_dir, resume=resume, dry_run=dry_run, grow=data == "grow", schedule=schedule
        )
        show_outcome(loaded, outcome, None if dry_run else run_dir)
        if outcome.stopped:
            raise typer.Exit(STOPPED_STATUS)


app.command()(generate)
app.command()(sample)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(help="The folder, or GGUF, to write; it must not exist.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="llama, arcee, act24; auto: the first that holds the model; gguf: a file for llama.cpp; "
            "peft: of lora the adapter.",
        ),
    ] = "auto",
    dense_weights: Annotated[
        bool, typer.Option(help="Of weight24 the dense masters, not the masked weights that were trained.")
    ] = False,
) -> None:
    """Write a run's model as a folder that transformers opens: as LLaMA, as Arcee (relu² networks), or as
    act24's own type, which brings the passes along."""
    from act24.tools.huggingface.export import export_run

    print(export_run(path, out, form, dense_weights))


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, counts as whole integers.")] = False,
    scale_steps: ScaleOption = False,
    lang: LangOption = None,
) -> None:
    """What each pass would rewrite, with parameters and FLOPs before and after. Allocates no weights."""
    from act24.recipes.load import load_recipe
    from act24.tools.commands.show import show_plan

    loaded, say = load_recipe(recipe, set_ or (), scale_steps), speaker(lang)
    show_plan(loaded, as_json, say)
    _warn_of_oddities(loaded, say)


@app.command("probe-decay")
def probe_decay(
    recipe: RecipeArgument,
    set_: SetOption = None,
    decay: Annotated[list[float], typer.Option(help="A λ to try. Repeatable.")] = DECAYS,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimizer steps a run; default ten times mask_every.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr.")] = False,
) -> None:
    """Which λ of weight24's masked decay to take: a short run each, by flip rates beside dense training."""
    import json

    from act24.recipes.load import load_recipe
    from act24.tools.commands.decay_probe import BOUNDS, default_steps, probe_decays, verdict
    from act24.tools.run.processes import own_rank

    def say(line: str) -> None:
        if own_rank() == 0:
            print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    refuse_ignored_keys(set_ or (), ["passes.weight24.decay"], "--decay says which are tried")
    loaded = load_recipe(recipe, set_ or ())
    steps = steps or default_steps(loaded)
    probes = probe_decays(loaded, decay, steps, say)
    say(verdict(probes))
    if as_json and own_rank() == 0:
        runs = [probe.as_dict() for probe in probes]
        result = {"steps": steps, "bounds": BOUNDS, "runs": runs, "verdict": verdict(probes)}
        print(json.dumps(result, indent=1))


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Option(help="The run's folder; a run there is replaced.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train the demo recipe, evaluate it dense and 2:4, print a sample: about three minutes on two cores."""
    from act24.tools.run.signals import STOPPED_STATUS, stop_on_signal, stopped_status

    with stopped_status("stopped before its end; the same command begins it anew"), stop_on_signal():
        from act24.tools.commands.demo import run_demo

        if not run_demo(run_dir):
            raise typer.Exit(STOPPED_STATUS)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves too: a .png to write.")] = None,
) -> None:
    """Runs side by side: loss, sparsity, tokens/s, and the keys in which their recipes differ."""
    from act24.tools.commands.compare import compare_runs, markdown, open_run, plot_runs
    from act24.tools.commands.show import show_table

    opened = [open_run(run) for run in runs]
    table = compare_runs(opened)
    if as_markdown:
        print(markdown(table))
    else:
        show_table(table)
    if plot is not None:
        plot_runs(opened, plot)


@app.command()
def doctor(lang: LangOption = None) -> None:
    """What this machine can do: GPU, libraries, the self-check of kernels, the path of each operation."""
    from act24.tools.commands.doctor import doctor as examine

    print(examine(speaker(lang)))


app.command(name="eval")(recovery.evaluate)
for command in (recovery.prune, recovery.recover, recovery.merge, recovery.pack):
    app.command()(command)


@recipe_app.command("ls")
def recipe_ls() -> None:
    """List the recipes that ship with act24."""
    from act24.recipes.load import load_recipe, recipe_names

    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name.ljust(width)}  {load_recipe(name).description}")


@recipe_app.command("show")
def recipe_show(recipe: RecipeArgument, set_: SetOption = None, scale_steps: ScaleOption = False) -> None:
    """Print a recipe resolved: extended, overridden, every default filled in."""
    from act24.recipes.load import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(recipe, set_ or (), scale_steps)), end="")


@recipe_app.command("keys")
def recipe_keys(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the whole reference, docs/recipe-keys.md.")
    ] = False,
) -> None:
    """List every key that a recipe may have, with what it takes and its default."""
    from act24.recipes.keys import markdown, recipe_keys
    from act24.recipes.plugins import load_plugins

    load_plugins()
    if as_markdown:
        print(markdown(), end="")
        return
    keys = recipe_keys()
    width = max(len(key.path) for key in keys)
    for key in keys:
        owner = f" [{key.record}]" if key.record and not key.path.startswith("passes.") else ""
        print(f"{key.path.ljust(width)}  {key.takes}; default {key.default}{owner}")


@recipe_app.command("validate")
def recipe_validate(recipe: RecipeArgument, set_: SetOption = None, scale_steps: ScaleOption = False) -> None:
    """Check a recipe: its keys and values, and that every pass finds something to rewrite."""
    from act24.recipes.load import load_recipe
    from act24.tools.run.pretrained import plan as plan_recipe

    loaded = load_recipe(recipe, set_ or (), scale_steps)
    plan_recipe(loaded)
    _warn_of_oddities(loaded)
    print(f"{recipe}: valid")


@recipe_app.command("cp")
def recipe_cp(
    recipe: RecipeArgument,
    destination: Annotated[Path, typer.Argument(help="The .toml file to write.")],
) -> None:
    """Copy a shipped recipe's file, comments and all, to start your own from."""
    from act24.recipes.load import RecipeError, recipe_source

    text, _ = recipe_source(recipe)
    if destination.is_dir():
        destination = destination / f"{Path(recipe).name.removesuffix('.toml')}.toml"
    if destination.exists():
        raise RecipeError(f"{destination} exists already")
    try:
        destination.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write {destination}: {error.strerror}") from None
    print(destination)


@recipe_app.command("from-flags", context_settings={"ignore_unknown_options": True})
def recipe_from_flags(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ARGUMENTS…", help="Of run_c4.py, or with the script's name."),
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print what becomes of every option, docs/old-flags.md.")
    ] = False,
    lang: LangOption = None,
) -> None:
    """Translate a run_c4.py command: the recipe, with a remark on every option as comments. Of Wanda's
    scripts (main.py, finetune_lm.py, evaluate_ppl.py): the command of act24, or the recipe."""
    from act24.recipes.from_flags import recipe_from_flags as translate
    from act24.recipes.wanda_flags import script_of, translated
    from act24.tools.commands.old_flags import markdown as old_flags

    say, given = speaker(lang), arguments or ()
    if as_markdown:
        refuse_ignored({"ARGUMENTS": arguments}, "--markdown prints what becomes of every option")
        return print(old_flags(say), end="")
    text = translated(given) if script_of(given) is not None else translate(given).text
    print(comments(text, say), end="")


@data_app.command("prepare")
def data_prepare(
    source: Annotated[
        str,
        typer.Argument(help="builtin, a file, folder or glob, OWNER/NAME[:SUBSET] of the Hub, a recipe."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="bpe (trained on the source), a tokenizer.json, a Hub name; default bpe, or the recipe's."
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=257, max=2**20, help="Of the trained BPE; default 32000, or the recipe's.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop the training split there.")] = None,
    max_heldout_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop the held-out split there.")
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Of a record; default text.")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of text files and JSON; default UTF-8, or as detected.")
    ] = None,
    skip_bad_records: Annotated[
        bool, typer.Option("--skip-bad-records", help="Leave out records that cannot be used; count them.")
    ] = False,
    end_of_text: Annotated[
        str | None, typer.Option(help="The tokenizer's token for it, if it is none of the known ones.")
    ] = None,
) -> None:
    """Tokenise a source once, into memory-mapped shards for later runs (data.source = "shards").

    Interrupted, the same command goes on where it was; stopped by a signal, it exits with 75.
    """
    from act24.tools.run.signals import stop_on_signal, stopped_status

    with stopped_status("stopped; the same command goes on where it was"), stop_on_signal():
        from act24.tools.commands.prepare import prepare_source

        prepare_source(
            source,
            out,
            tokenizer,
            vocab_size,
            max_tokens,
            max_heldout_tokens,
            text_field,
            encoding,
            skip_bad_records,
            end_of_text,
        )


bench_app.command("decode")(bench_decode)
bench_app.command("generate")(bench_generate)
