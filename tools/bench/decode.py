"""`act24 bench decode`: the feed-forward networks of a trained model on one token and a few, layer by layer:
how many of their features are active, and what skipping the others gives beside the compiled dense network.

Weights are read out of cache: calls take turns with more copies of them than any L2 holds.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import textwrap
from collections.abc import Callable, Sequence
from json import decoder, encoder, scanner
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from act24.errors import Act24Error
from act24.inference.generator import Generator
from act24.inference.linears import skipping_linear
from act24.inference.sampling import Sampling
from act24.relu2 import relu2
from act24.tools.bench.rows import Row, needed_gpu
from act24.tools.commands.generate import open_model

#: Bytes of different weights that are read in turn, beyond the L2 cache of any GPU.
OUT_OF_CACHE = 400 * 2**20

BATCHES = (1, 2, 4, 8)

#: At the densities of trained models, at 7b width.
BARS = {1: 1.6, 4: 1.25}

#: Their sources are prompts.
_SOURCES: tuple[ModuleType, ...] = (argparse, ast, inspect, json, textwrap, decoder, encoder, scanner)


class _Networks(TorchFunctionMode):
    """Notes what each network between two linears and relu² is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []  # x, hidden, W_in
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):  # a block that is traced before it first runs
            return result
        if func is F.linear:
            self._last = args[0], result, args[1]
        elif func is relu2 and self._last is not None and args[0] is self._last[1]:
            self.seen.append(self._last)
        return result


def bench_decode(path: Path, tokens: int = 24) -> list[Row]:
    """A row for each layer and number of tokens.

    Args:
        path: a run with relu² networks, or an exported folder.
        tokens: generated before the figures are taken.

    Raises:
        Act24Error: no GPU, or no relu² network between two linears.
    """
    device = needed_gpu()
    built = open_model(path, "dense", device, "bfloat16")
    tokenizer = built.open_tokenizer()
    prompts = [tokenizer.encode(inspect.getsource(m))[:96].tolist() for m in _SOURCES]
    generator = Generator(built.model, tokenizer, compiled=False)
    noted: list[tuple[Tensor, Tensor, Tensor]] = []
    step = Sampling()
    generator.decoder.begin(prompts, range(len(prompts)), 96 + tokens + 1, step)
    for _ in range(tokens):
        with _Networks() as networks:
            generator.decoder.step(step)
        noted = networks.seen
    if not noted:
        raise Act24Error(f"{path} has no network linear, relu², linear")
    downs = _downs(built.model, [weight for _, _, weight in noted])
    rows = []
    for layer, ((x, hidden, weight_in), weight_out) in enumerate(zip(noted, downs, strict=True)):
        rows += _rows(layer, x[:, 0], hidden[:, 0], weight_in, weight_out)
    return rows


def _downs(model: torch.nn.Module, ups: Sequence[Tensor]) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    names = {parameter.data_ptr(): name for name, parameter in parameters.items()}
    return [parameters[names[up.data_ptr()].replace("up_proj", "down_proj")] for up in ups]


def _rows(layer: int, x: Tensor, hidden: Tensor, weight_in: Tensor, weight_out: Tensor) -> list[Row]:
    copies = max(2, -(-OUT_OF_CACHE // (2 * weight_in.numel() * weight_in.itemsize)))
    plain = [(weight_in.clone(), weight_out.contiguous().clone()) for _ in range(copies)]
    by_feature = [(up, down.T.contiguous().T) for up, down in plain]
    dense, skipping = torch.compile(_dense, dynamic=False), torch.compile(_skipping, dynamic=False)
    rows = []
    for batch in BATCHES:
        active = (hidden[:batch] > 0).float()
        one, union = float(active.mean()), float(active.amax(0).mean())
        given = x[:batch].contiguous()
        with torch.inference_mode():
            other = microseconds(dense, [(given, *weights) for weights in plain])
            ours = microseconds(skipping, [(given, *weights) for weights in by_feature])
        shape = f"D {x.shape[-1]} F {hidden.shape[-1]}"
        name = f"layer {layer}, {shape}, {batch} tokens, {one:.1%} active, {union:.1%} of any"
        note = "beside the compiled dense network; weights out of cache"
        rows.append(Row(name, ours / 1e3, other / 1e3, "ms", BARS.get(batch), note))
    return rows


def _dense(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(relu2(F.linear(x, up)), down)


def _skipping(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return skipping_linear(F.linear(x, up), down, None, "relu2")


def microseconds(run: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> float:
    """Of a call, in a CUDA graph of all calls, so that each finds its weights out of cache."""
    for _ in range(2):
        run(*calls[0])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            run(*call)
    turns = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        turns.append(start.elapsed_time(end))
    return sorted(turns)[len(turns) // 2] * 1e3 / len(calls)


def copies_of(weight: Tensor) -> list[Tensor]:
    """As many as no cache holds."""
    return [weight.clone() for _ in range(max(2, -(-OUT_OF_CACHE // (weight.numel() * weight.itemsize))))]
