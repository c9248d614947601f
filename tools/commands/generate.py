"""`act24 generate` and `act24 sample`: text from a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from act24.errors import Act24Error, reading
from act24.inference.generator import Completion, Generator
from act24.inference.sampling import Sampling
from act24.options import one_of
from act24.passes import Activation24
from act24.passes.served import fold_weights_
from act24.recipes.load import read_utf8
from act24.tools.run.build import Built, load
from act24.tools.run.processes import chosen_device
from act24.tools.run.tuning import known_table, use_table_

Activations = Literal["24", "dense"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """What is asked of each prompt. Fields as for `act24.inference.generator.Generator.stream`."""

    tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    seed: int = 0


def open_model(
    path: Path,
    activations: Activations | None = None,
    device: torch.device | str | None = None,
    dtype: str = "auto",
) -> Built:
    """The model at a path, ready to generate: 2:4 weights folded, on its device and in its dtype.

    Args:
        activations: of a model that was trained with 2:4 activations: `"24"`, and None, keep them, `"dense"`
            computes plain relu², which is another function; `act24 eval` says what it costs in loss.
        device: None for the CUDA device where there is one, else the CPU.
        dtype: "auto": as stored, but bfloat16 on a GPU for what was trained under autocast.

    Raises:
        Act24Error: nothing there that can be opened, no tokenizer, or no 2:4 activations that `"24"` keeps.
    """
    one_of("generate", "dtype", dtype, ("auto", *DTYPES))
    device = chosen_device(device)
    built = load(path, device)
    if built.tokenizer_section is None:
        raise Act24Error(f"{path} has no tokenizer.json, without which there is no text")
    fold_weights_(built.pipeline)
    kept = [p for p in built.pipeline.active if not isinstance(p, Activation24)]
    if activations == "24" and len(kept) == len(built.pipeline.active):
        raise Act24Error(
            f"--activations 24: {path} has no 2:4 activations in force at step {built.step}, and what they "
            "would cost in loss nobody measured: leave the option out"
        )
    if activations == "dense":
        built.pipeline.lower_to_(kept)
    use_table_(built.pipeline, device)
    autocast = built.recipe is not None and built.recipe.train.dtype == "bfloat16_autocast"
    if dtype == "auto":
        dtype = "bfloat16" if autocast and device.type == "cuda" else ""
    if dtype:
        for parameter in built.model.parameters():  # buffers are scales, which stay float32
            parameter.data = parameter.data.to(DTYPES[dtype])
    return built


def open_generator(built: Built) -> Generator:
    """A generator of an opened model."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    table = known_table(built.model.head_weight.device)
    return Generator(built.model, built.tokenizer, memory=memory, table=table)


def sample_text(path: Path, prompt: str, request: Request) -> str:
    """A prompt and its continuation.

    Raises:
        Act24Error: as `open_model` and `Generator.stream`.
    """
    generator = open_generator(open_model(path))
    done = generator([prompt], request.tokens, request.sampling, request.stop, request.seed)
    return prompt + done[0].text


def print_text(generator: Generator, prompt: str, request: Request) -> None:
    """Show a prompt and its continuation as it comes."""
    done: dict[int, Completion] = {}
    shown = False
    for piece in generator.stream(
        [prompt], request.tokens, request.sampling, request.stop, request.seed, done
    ):
        print(piece.text if shown else prompt + piece.text, end="", flush=True)
        shown = True
    print()
    _tell_unmet(request.stop, done.values())


def print_lines(generator: Generator, prompts: Sequence[str], request: Request, rows: int) -> None:
    """A line of JSON for each prompt, in their order: prompt, text, number of tokens, reason of its end.

    Args:
        rows: prompts in one batch.
    """
    generator.check(prompts, request.tokens)
    everything = []
    for start in range(0, len(prompts), rows):
        some = prompts[start : start + rows]
        done = generator(some, request.tokens, request.sampling, request.stop, request.seed + start)
        for prompt, row in zip(some, done, strict=True):
            line = {"prompt": prompt, "text": row.text, "tokens": len(row.tokens), "reason": row.reason}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        everything += done
    _tell_unmet(request.stop, everything)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file of JSON lines, each `{"prompt": "…"}`.

    Raises:
        Act24Error: names the line that is none.
    """
    with reading(f"cannot read {file}"):
        text = read_utf8(file)
    prompts = list(_prompts(text, file))
    if not prompts:
        raise Act24Error(f'{file} has no prompts; each line is {{"prompt": "…"}}')
    return prompts


def _prompts(text: str, file: Path) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise Act24Error(f'{file}, line {number}: expected {{"prompt": "…"}}, got {line.strip()[:60]}')
        yield prompt


def _tell_unmet(stop: Sequence[str], done: Iterable[Completion]) -> None:
    if stop and not any(row.reason == "stop" for row in done):
        told = ", ".join(map(repr, stop))
        print(f"act24: no continuation met a stop string ({told})", file=sys.stderr)
