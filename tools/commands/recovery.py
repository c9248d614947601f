"""Commands that prune a model and recover it, and those that evaluate one."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from act24.tools.commands.options import refuse_ignored, refuse_ignored_keys
from act24.words import counted

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="An act24 run or checkpoint, an old checkpoint, a Hugging Face folder or Hub name, a .gguf file."
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")]
DataOption = Annotated[
    str, typer.Option("--data", help="Text: builtin, a file, folder or glob, OWNER/NAME[:SUBSET], a recipe.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Override of data.*: data.rows=padded. Repeatable."
    ),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key: eval.tokens=100. Repeatable."),
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Calibration rows.")]
SeqlenOption = Annotated[
    int | None, typer.Option(min=2, help="Tokens a row; default what the model knows, 2048 at most.")
]
ProtocolOption = Annotated[
    str | None, typer.Option(help="wikitext: perplexity on --text in windows of --seqlen tokens.")
]
WindowOption = Annotated[int | None, typer.Option(help="Tokens a window, with --protocol.")]
TextOption = Annotated[list[str] | None, typer.Option(help="A text file, with --protocol. Repeatable.")]
WindowsOption = Annotated[int | None, typer.Option(min=1, help="At most so many windows, the first.")]
BesideOption = Annotated[Path | None, typer.Option(help="A result (--json) to compare with.")]


def prune(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    method: Annotated[
        str, typer.Option(help="magnitude, wanda, wanda_cumulative (rows of their own share), sparsegpt.")
    ] = "wanda",
    pattern: Annotated[
        str, typer.Option(help="0.5: half of the weights go. 2:4: two of every four inputs stay.")
    ] = "2:4",
    data: DataOption = "builtin",
    set_: SetOption = None,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = None,
    table: Annotated[
        Path | None, typer.Option(help='TOML: patterns by selector, "model.layers.0.*" = "dense".')
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Zero the weights that matter least, block by block; masks are stored beside the weights.

    Interrupted, the same command goes on with the next block.
    """
    from act24.tools.pruning.folder import prune_model
    from act24.tools.run.processes import chosen_device

    done = prune_model(
        model,
        out,
        method=method,
        pattern=pattern,
        data=calibration_data(data, set_ or ()),
        samples=samples,
        seqlen=seqlen,
        by_layer=_table(table),
        device=str(chosen_device(device)),
        say=lambda line: print(line, flush=True),
    )
    for name, why in done.left.items():
        print(f"left dense: {name}: {why}")
    pruned = counted(len(done.masks), "weight")
    of_all = f", of all in the blocks {done.sparsity_of_blocks:.4f}" if done.left else ""
    print(f"{out}: {pruned} pruned by {done.method}, sparsity {done.sparsity:.4f}{of_all}")
    if done.pattern.count(":"):
        keep, of = done.pattern.split(":")
        print(f"{done.pattern}: {keep} of every {of} inputs stay")


def calibration_data(source: str, overrides: Any) -> Any:
    """What `--data` and `--set` say.

    Raises:
        Act24Error: no such source, or an override of anything but data.
    """
    from act24.errors import Act24Error
    from act24.recipes.load import dump_recipe, load_recipe, parse_recipe, recipe_names
    from act24.tools.data import data_from_argument

    if wrong := [o for o in overrides if not o.strip().startswith("data.")]:
        raise Act24Error(f"--set takes data.* here, not {wrong[0]}")
    refuse_ignored_keys(overrides, ["data.max_length"], "--seqlen says how many tokens a row has")
    named = source.endswith(".toml") or source in recipe_names()
    data = load_recipe(source).data if named else data_from_argument(source)
    recipe = load_recipe("demo").model_copy(update={"data": data})
    return parse_recipe(dump_recipe(recipe), "--set", tuple(overrides)).data


def _table(path: Path | None) -> dict[str, str]:
    from act24.errors import Act24Error, reading
    from act24.recipes.load import read_utf8

    if path is None:
        return {}
    with reading(f"cannot read {path}", tomllib.TOMLDecodeError):
        content = tomllib.loads(read_utf8(path))
    for selector, pattern in content.items():
        if not isinstance(pattern, str):
            raise Act24Error(
                f'{path}: {selector}: expected a pattern such as "2:4", or "dense", got {pattern!r}'
            )
    return content


def evaluate(
    path: Annotated[Path, typer.Argument(help="A run or checkpoint; with --protocol any model.")],
    set_: OverrideOption = None,
    protocol: ProtocolOption = None,
    seqlen: WindowOption = None,
    text: TextOption = None,
    windows: WindowsOption = None,
    beside: BesideOption = None,
    device: DeviceOption = None,
    legacy_average: Annotated[
        bool,
        typer.Option(
            "--legacy-average", help="Also the sum/(n+1) mean of the public scripts, for their tables."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Held-out loss of a checkpoint, with and without 2:4; with --protocol, perplexity of any model."""
    if protocol is not None:
        whole = {"--set": set_, "--legacy-average": legacy_average}
        refuse_ignored(whole, "with --protocol the text is --text, and the mean that of the papers")
        options = (protocol, seqlen, text or [], windows, beside, device, as_json)
        return evaluate_by_protocol(str(path), *options)
    of_protocol = {"--seqlen": seqlen, "--text": text, "--windows": windows, "--beside": beside}
    refuse_ignored(of_protocol | {"--device": device}, "they belong to --protocol wikitext")
    from act24.tools.commands.show import show_evaluations
    from act24.tools.run.evaluate import evaluate_checkpoint
    from act24.tools.run.processes import own_rank

    evaluations = evaluate_checkpoint(path, set_ or ())
    if own_rank() == 0:
        show_evaluations(evaluations, legacy_average, as_json)


def evaluate_by_protocol(
    model: str,
    protocol: str,
    seqlen: int | None,
    text: list[str],
    windows: int | None,
    beside: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """`act24 eval --protocol`."""
    from act24.errors import Act24Error
    from act24.options import one_of
    from act24.tools.run.opening import open_any
    from act24.tools.run.processes import chosen_device
    from act24.tools.run.protocol import PROTOCOLS, compared, perplexity

    one_of("eval", "--protocol", protocol, PROTOCOLS)
    if seqlen is None:
        raise Act24Error("--protocol wikitext needs --seqlen, without which a perplexity says nothing")
    on = str(chosen_device(device))
    found = perplexity(open_any(model, as_trained=True), text, seqlen, windows, on)
    print(json.dumps(found.as_dict(), indent=1) if as_json else found)
    if beside is not None:
        print(compared(found, beside), file=sys.stderr if as_json else sys.stdout)


def recover(
    model: Annotated[str, typer.Argument(help="A folder that act24 prune wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    blockwise: Annotated[
        bool, typer.Option("--blockwise", help="Fit each block to the dense one; the one way there is.")
    ] = False,
    dense: Annotated[str | None, typer.Option(help="What it was pruned from; default what it says.")] = None,
    data: DataOption = "builtin",
    set_: SetOption = None,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often a block sees all rows.")] = 4,
    lr: Annotated[
        float, typer.Option(min=0, help="Of AdamW, as a share of the weights' size, falling to 0.")
    ] = 1e-2,
    device: DeviceOption = None,
) -> None:
    """Fit what each block kept to the outputs of the dense block. Training with masks (sparse_mask, lora,
    masked_lora) is a recipe, for act24 train.

    Interrupted, the same command goes on with the next block.
    """
    from act24.errors import Act24Error
    from act24.tools.pruning.blockwise import recover_blockwise
    from act24.tools.run.processes import chosen_device

    if not blockwise:
        raise Act24Error(
            "act24 recover needs --blockwise; other ways are recipes for act24 train: [model] pretrained and "
            "a pass sparse_mask, lora or masked_lora"
        )
    errors = recover_blockwise(
        model,
        out,
        data=calibration_data(data, set_ or ()),
        dense=dense,
        samples=samples,
        seqlen=seqlen,
        epochs=epochs,
        lr=lr,
        device=str(chosen_device(device)),
        say=lambda line: print(line, flush=True),
    )
    *_, last = errors.values()
    print(f"{out}: {counted(len(errors), 'block')}, the last one's error {last:.4f}")


def merge(
    model: Annotated[
        str, typer.Argument(help="A run of lora or masked_lora; with --adapter the base model.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    adapter: Annotated[Path | None, typer.Option(help="A folder in PEFT's format.")] = None,
    allow_dense: Annotated[
        bool, typer.Option("--allow-dense", help="A plain adapter into a pruned model, whose zeros it fills.")
    ] = False,
) -> None:
    """Merge an adapter into the weights that it was trained on, where that loses no zero."""
    from act24.tools.pruning.merge import merge as merge_adapter

    print(merge_adapter(model, out, adapter, allow_dense))


def pack(
    model: Annotated[Path, typer.Argument(help="A folder of act24 prune, or of act24 export with masks.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
) -> None:
    """A pruned model in less space: 9/16 of the dense weights for 2:4 in 16 bits. A packed one is made dense
    again, bit for bit."""
    from act24.tools.pruning.packed import pack as pack_folder

    print(pack_folder(model, out))
