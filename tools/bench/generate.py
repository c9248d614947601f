"""`act24 bench generate`: tokens a second of whole models, the same weights dense, with zeros skipped, with
2:4 weights read packed, and both; beside `transformers`' generate with a static cache, compiled.

Weights are drawn, not trained, since a model of 7b width takes too long to train: a bias in front of relu²
makes the share of active features what is asked for, and two of four weights are zero on every side. What is
measured of trained models is in `act24 bench decode`.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from act24.errors import Act24Error
from act24.inference.cache import cache_bytes
from act24.inference.decoder import Decoder, plan_text
from act24.inference.layer import DENSE, Choice
from act24.inference.linears import PACKED_TOKENS, SKIPPING_TOKENS
from act24.inference.prompts import chunks
from act24.inference.sampling import Sampling
from act24.llama import PRESETS, LlamaConfig, LlamaForCausalLM
from act24.passes import Relu2FFN, apply_
from act24.passes.relu2_ffn import parity_width
from act24.sparse24.format.device import obstacle
from act24.sparse24.format.products import Table
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.weight.forms import prompt_linear, tunable_products
from act24.tools.bench.rows import graph_milliseconds, needed_gpu, versions
from act24.tools.bench.train import commit
from act24.tools.run.tuning import tuned_table

SIZES = {"130m": "llama-130m", "1b": "llama-1b", "7b": "llama-7b"}
PACKED = Choice(packed=True, fused=True, streamed=True)
#: In the order in which they are timed. Those without sparsity come first: the others are beside the faster
#: of them. None: what the decoder measures and takes, block by block, of what is compiled by then.
SIDES = (
    DENSE,
    Choice(fused=True),
    Choice(fused=True, streamed=True),
    Choice(skipping=True, fused=True, streamed=True),
    PACKED,
    Choice(skipping=True, packed=True, fused=True, streamed=True),
    None,
)
GREEDY = Sampling(temperature=0)

#: Tokens of the prompts, and steps that are timed, three times.
PROMPT, STEPS = 128, 48

#: Milliseconds of calls in each of ten graphs by which one of cuSPARSELt's algorithms is timed.
TUNED_MILLISECONDS = 4

#: Rows of the prompts that are timed beside single ones: together enough tokens for 2:4 products.
PROMPT_ROWS = 8


def bench_generate(
    sizes: Sequence[str],
    batches: Sequence[int],
    prefills: Sequence[int],
    density: float = 0.1,
    layers: int | None = None,
    transformers: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        sizes: names in `SIZES`.
        batches: rows of decoding.
        prefills: lengths of one prompt.
        density: share of the features that relu² leaves active, for each token.
        layers: as many of the models' layers; None for all.
        transformers: also its generate, with the same weights as an Arcee.
        say: is told of each figure as it comes.

    Returns:
        JSON values: rows, machine, versions and commit. A side that raised has a row with "failed", and the
        others go on; after an interrupt, "interrupted" and the rows so far.

    Raises:
        Act24Error: no GPU, or an unknown size.
    """
    if unknown := [size for size in sizes if size not in SIZES]:
        raise Act24Error(f"unknown size {unknown[0]!r}: choose from {', '.join(SIZES)}")
    device = needed_gpu()
    begun = time.monotonic()
    read = _bandwidth(device)
    say(f"{torch.cuda.get_device_name(device)}: a copy moves {read / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    result = {
        "commit": commit(),
        "gpu": torch.cuda.get_device_name(device),
        "versions": versions(),
        "copy_bytes_per_second": read,
        "density": density,
        "layers": {size: drawn_config(SIZES[size], layers).num_hidden_layers for size in sizes},
        "rows": rows,
    }
    try:
        for size in sizes:
            config = drawn_config(SIZES[size], layers)
            for row in _size(size, config, batches, prefills, density, transformers, device):
                if "bytes" in row:
                    row["share of a copy's bandwidth"] = row.pop("bytes") / row["seconds"] / read
                rows.append(row)
                told = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                say(f"{time.monotonic() - begun:.0f} s: {', '.join(told)}")
    except KeyboardInterrupt:
        result["interrupted"] = True
    return result


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| model | what | rows | tokens/s | to dense | share of bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "failed" in row:
            lines.append(f"| {row['model']} | {row['what']} | | failed: {row['failed']} | | |")
            continue
        ratio = f"{row['to dense']:.2f}" if "to dense" in row else ""
        share = row.get("share of a copy's bandwidth")
        told = f"{row['tokens/s']:,.0f} | {ratio} | {'' if share is None else f'{share:.0%}'}"
        lines.append(f"| {row['model']} | {row['what']} | {row['rows']} | {told} |")
    if "interrupted" in result:
        lines.append("Interrupted: the rows so far.")
    return "\n".join(lines)


def _size(
    size: str,
    config: LlamaConfig,
    batches: Sequence[int],
    prefills: Sequence[int],
    density: float,
    transformers: bool,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """The first batch, prompts, `transformers`, then the other batches: whatever a run has time for comes in
    this order."""

    def failed(what: str, error: Exception) -> dict[str, Any]:
        told = str(error).partition("\n")[0]
        return {"model": size, "what": what, "failed": f"{type(error).__name__}: {told}"}

    prompts = [(1, length) for length in sorted(prefills, reverse=True)]  # one cache does for them
    prompts += [(PROMPT_ROWS, length) for length in prefills[:1]]
    try:
        model = drawn_model(config, density, device)
    except Exception as error:  # whatever a model or a side meets, the others keep their figures
        yield failed("the model", error)
        return
    decoder = Decoder(model)
    weights = sum(p.numel() * p.itemsize for p in model.model.layers.parameters())
    weights += model.head_weight.numel() * model.head_weight.itemsize
    dense: dict[int, float] = {}
    for batch in batches:
        for side in SIDES:
            if side is not None and batch > most_rows(side):
                continue
            what = "measured, block by block" if side is None else str(side)
            try:
                row = {"model": size, "what": what, "rows": batch} | _step(decoder, side, batch, dense)
                if side == DENSE:
                    cache = cache_bytes(config, batch, PROMPT + STEPS, torch.bfloat16)
                    row["bytes"] = weights + cache
                yield row
            except Exception as error:
                yield failed(what, error)
        if batch == batches[0]:
            try:
                decoder.prompts.table = _tuned(model, prompts, device)
            except Exception as error:
                yield failed("2:4 products of prompts", error)
            for rows, length in prompts:
                try:
                    for row in _prompt(decoder, rows, length):
                        yield {"model": size} | row
                except Exception as error:
                    yield failed(f"prefill of {length}", error)
        gc.collect()
        torch.cuda.empty_cache()
        if transformers:
            try:
                yield {"model": size} | _theirs(model, batch, dense)
            except Exception as error:
                yield failed("transformers", error)


def _step(decoder: Decoder, side: Choice | None, batch: int, dense: dict[int, float]) -> dict[str, Any]:
    """A step of one side. `dense` has the fastest without sparsity, by rows, which the others are beside."""
    decoder.take(batch, side)
    seconds = _step_seconds(decoder, batch)
    row: dict[str, Any] = {"tokens/s": batch / seconds, "seconds": seconds}
    row["to dense"] = dense.get(batch, seconds) / seconds
    if side is None:
        row["plan"] = plan_text(decoder.plans[batch])
    elif not (side.skipping or side.packed):
        dense[batch] = min(seconds, dense.get(batch, seconds))  # the faster of these is to be beaten
    return row


def _prompt(decoder: Decoder, rows: int, length: int) -> Iterator[dict[str, Any]]:
    """A prompt dense, with the 2:4 products of the table, and with what the decoder takes."""
    sizes = {size for _, size in chunks(length, True)}
    prompts = decoder.prompts
    prompts.take(rows, None)  # what another prompt was measured to be is not the table's
    known = {size: prompts.products(rows, size) for size in sizes}
    sides = {"dense": {size: {} for size in sizes}, "2:4 weights": known, "measured": None}
    dense = None
    for what, products in sides.items():
        prompts.take(rows, products)
        seconds = _prefill_seconds(decoder, rows, length)
        dense = dense or seconds
        row = {"what": f"prefill of {length}, {what}", "rows": rows, "tokens/s": rows * length / seconds}
        taken = {shape for size in sizes for shape in prompts.products(rows, size)}
        told = ", ".join(f"{n}×{k}" for n, k in sorted(taken)) or "none"
        yield row | {"seconds": seconds, "to dense": dense / seconds, "2:4 products": told}


def _tuned(model: LlamaForCausalLM, prompts: Sequence[tuple[int, int]], device: torch.device) -> Table:
    """What cuSPARSELt's products take for the prompts' tokens, measured here where nobody did before."""
    if obstacle(device):
        return ()
    weights = [p for p in model.model.layers.parameters() if p.ndim == 2]
    shapes = dict.fromkeys((len(weight), weight.shape[1]) for weight in weights)
    tokens = dict.fromkeys(rows * size for rows, length in prompts for _, size in chunks(length, True))
    linears = [prompt_linear(t, *shape, torch.bfloat16, device) for t in tokens for shape in shapes]
    products = [tunable_products(n.tokens, n.out_features, n.in_features, ("y",)) for n in linears]
    timed = functools.partial(graph_milliseconds, budget=TUNED_MILLISECONDS)
    return tuned_table(itertools.chain(*products), device, timed)


def most_rows(side: Choice) -> float:
    """Of a batch for which the decoder would try this choice."""
    if side.streamed and not (side.skipping or side.packed):
        return 1  # the same as without
    skipping = SKIPPING_TOKENS if side.skipping else math.inf
    return min(skipping, PACKED_TOKENS if side.packed else math.inf)


def drawn_config(preset: str, layers: int | None = None) -> LlamaConfig:
    """A preset as a relu² model of as many parameters, with biases in its networks."""
    config = PRESETS[preset]
    return replace(
        config,
        mlp_bias=True,
        max_position_embeddings=16_384,
        intermediate_size=parity_width(config.intermediate_size),
        num_hidden_layers=layers or config.num_hidden_layers,
    )


def drawn_model(config: LlamaConfig, density: float, device: torch.device) -> LlamaForCausalLM:
    """A relu² model in bfloat16 with drawn 2:4 weights and this share of active features."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    apply_(model, [Relu2FFN(width="keep")])
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, config.initializer_range)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    # A row of W_in times a normed input is normal: 0.02 √(D / 2) with half of its weights.
    cut = statistics.NormalDist().inv_cdf(1 - density)
    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(top2_of_4(torch.rand_like(parameter)))
            elif name.endswith("up_proj.bias"):
                parameter.fill_(-cut * config.initializer_range * (config.hidden_size / 2) ** 0.5)
    return model.eval()


def _prompts(batch: int, length: int) -> list[list[int]]:
    return [[(7 * row + 3 * place) % 31_000 for place in range(length)] for row in range(batch)]


def _step_seconds(decoder: Decoder, batch: int) -> float:
    decoder.begin(_prompts(batch, PROMPT), range(batch), PROMPT + 4 * STEPS + 8, GREEDY)
    decoder.step(GREEDY)
    turns = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(STEPS):
            decoder.step(GREEDY)
        end.record()
        end.synchronize()
        turns.append(start.elapsed_time(end) / STEPS / 1e3)
    return min(turns)


def _prefill_seconds(decoder: Decoder, rows: int, length: int) -> float:
    turns = []
    for _ in range(3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        decoder.begin(_prompts(rows, length), range(rows), length + 8, GREEDY)
        torch.cuda.synchronize()
        turns.append(time.perf_counter() - begun)
    return min(turns)


def _theirs(model: LlamaForCausalLM, batch: int, dense: dict[int, float]) -> dict[str, Any]:
    """`transformers`' Arcee with the same tensors: generation of two lengths, which differ by decoding."""
    from transformers import ArceeForCausalLM

    theirs = _arcee(ArceeForCausalLM, model)
    lengths = (8, 3 * STEPS + 8)
    for length in lengths:
        _their_seconds(theirs, batch, length)
    short, long = (min(_their_seconds(theirs, batch, length) for _ in range(2)) for length in lengths)
    step = (long - short) / (3 * STEPS)
    row = {"what": "transformers, static cache, compiled", "rows": batch, "tokens/s": batch / step}
    return row | {"seconds": step, "to dense": dense.get(batch, step) / step}


def _their_seconds(theirs: Any, batch: int, tokens: int) -> float:
    from transformers import GenerationConfig

    ids = torch.tensor(_prompts(batch, PROMPT), device=theirs.device)
    config = GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        max_length=None,
        do_sample=False,
        use_cache=True,
        cache_implementation="static",
        pad_token_id=0,
    )
    config.max_cache_len = PROMPT + 4 * STEPS
    torch.cuda.synchronize()
    begun = time.perf_counter()
    theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _arcee(kind: Any, model: LlamaForCausalLM) -> Any:
    from transformers import ArceeConfig

    own: LlamaConfig = model.config
    config = ArceeConfig(
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_hidden_layers=own.num_hidden_layers,
        num_attention_heads=own.num_attention_heads,
        max_position_embeddings=own.max_position_embeddings,
        rms_norm_eps=own.rms_norm_eps,
        mlp_bias=own.mlp_bias,
        tie_word_embeddings=own.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        theirs = kind(config).to(torch.bfloat16)
    # Their rotary frequencies are a buffer that no state dict has.
    with torch.device(model.head_weight.device):
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    state = {
        name: tensor.contiguous() for name, tensor in model.state_dict().items()
    }  # whatever side was last
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval()


def _bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    turns = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(4):
            target.copy_(source)
        end.record()
        end.synchronize()
        turns.append(start.elapsed_time(end) / 1e3 / 4)
    return 2 * 2**30 / min(turns)
