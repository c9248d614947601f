"""`act24 generate` and `act24 sample` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from act24.tools.commands.options import refuse_ignored

TokensOption = Annotated[int, typer.Option(min=1, help="Tokens to add at most.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Draw among the k most likely.")]
ActivationsOption = Annotated[
    Literal["24", "dense"] | None,
    typer.Option(help="Of what has 2:4 activations: 24 keeps them, as no option does; dense: plain relu²."),
]


def generate(
    path: Annotated[
        Path, typer.Argument(help="A run, a checkpoint, a pruned, packed or Hugging Face folder.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; shown as it comes.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Lines of {"prompt": "…"}; a line of JSON comes for each.')
    ] = None,
    tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the most likely that together have this probability.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62 - 1, help="Of the draws; prompt i draws from seed + i.")
    ] = 0,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Prompts at once, of --prompts; default 16.")
    ] = None,
    activations: ActivationsOption = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
) -> None:
    """Continue prompts with a trained model: a cache of keys and values, and one CUDA graph a token."""
    from act24.errors import Act24Error
    from act24.inference.sampling import Sampling
    from act24.tools.commands.generate import (
        Request,
        open_generator,
        open_model,
        print_lines,
        print_text,
        read_prompts,
    )

    if (prompt is None) == (prompts is None):
        raise Act24Error("give one of --prompt TEXT and --prompts FILE.jsonl")
    if prompt is not None:
        refuse_ignored({"--batch": batch}, "--prompt gives one prompt")
    request = Request(tokens, Sampling(temperature, top_k, top_p), tuple(stop or ()), seed)
    several = read_prompts(prompts) if prompts is not None else []
    generator = open_generator(open_model(path, activations, device, dtype))
    if prompt is not None:
        print_text(generator, prompt, request)
    else:
        print_lines(generator, several, request, batch or 16)


def sample(
    path: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    tokens: TokensOption = 64,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**62 - 1, help="Of the draw.")] = 0,
) -> None:
    """`generate` for a look at a model: a prompt of its own, and few tokens."""
    generate(path, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)


def bench_decode(
    path: Annotated[Path, typer.Argument(help="A run with relu² networks, or an exported folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The networks of a trained model on a few tokens: features that are active, skipping beside dense."""
    from act24.tools.bench.decode import bench_decode as run_bench
    from act24.tools.commands.show import show_bench_rows

    show_bench_rows(run_bench(path), as_json)


def bench_generate(
    sizes: Annotated[str, typer.Option(help="130m, 1b, 7b; several separated by commas.")] = "130m,1b,7b",
    batches: Annotated[str, typer.Option(help="Rows of decoding.")] = "1,4,16,64",
    prefill: Annotated[str, typer.Option(help="Tokens of prompts.")] = "2048,8192",
    density: Annotated[float, typer.Option(min=0.001, max=0.5, help="Active share behind relu².")] = 0.1,
    layers: Annotated[int | None, typer.Option(min=1, help="Of each model; default all.")] = None,
    transformers: Annotated[bool, typer.Option(help="Also transformers' generate, compiled.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr.")] = False,
) -> None:
    """Whole models, tokens a second: dense, skipping zeros, 2:4 weights, both, and transformers'."""
    import json
    import sys

    from act24.tools.bench.generate import bench_generate as run_bench
    from act24.tools.bench.generate import table
    from act24.tools.bench.rows import stoppable
    from act24.tools.bench.train import row_numbers

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    names = [name.strip() for name in sizes.split(",")]
    numbers = row_numbers(batches, "--batches"), row_numbers(prefill, "--prefill")
    with stoppable():
        result = run_bench(names, *numbers, density, layers, transformers, say)
        print(json.dumps(result, indent=1) if as_json else table(result))
    if "interrupted" in result or any("failed" in row for row in result["rows"]):
        raise typer.Exit(1)
