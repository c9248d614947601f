"""A plain training loop around the LLaMA of `transformers`, compiled, as the other side of `act24 bench
train`: its own loss, PyTorch's fused AdamW, gradients clipped, the loss read once a logging window."""

from __future__ import annotations

import time

import torch
from torch import nn

from act24.errors import Act24Error, not_imported
from act24.recipes.schema import Recipe
from act24.tools.bench.loop_timing import LoopTiming
from act24.tools.data import open_rows, open_tokenizer
from act24.tools.run.build import model_config, parameter_dtype
from act24.tools.run.processes import Processes
from act24.tools.run.step import accumulation


def time_transformers(recipe: Recipe, steps: int, processes: Processes) -> LoopTiming:
    """Time the loop on a recipe's data, batch and precision; of its model only the preset's sizes are used.

    Raises:
        Act24Error: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Act24Error(
            f"bench train --transformers needs transformers, which {not_imported(error, 'transformers')}: "
            "pip install 'act24[hf]'"
        ) from error
    if recipe.data.attention == "document":
        raise Act24Error("bench train --transformers: its side has causal attention, set data.attention so")
    config, device, train = model_config(recipe), processes.device, recipe.train
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    with device:
        model = LlamaForCausalLM(LlamaConfig(**{size: getattr(config, size) for size in sizes}))
    model.to(dtype=parameter_dtype(recipe)).train()  # type: ignore[call-arg]
    compiled = torch.compile(model, dynamic=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.optimizer.lr, fused=True)
    autocast, count = train.dtype == "bfloat16_autocast", accumulation(train, 1)
    every = recipe.log.every
    rows = open_rows(
        recipe.data,
        open_tokenizer(recipe.data, recipe.tokenizer),
        batch_size=train.batch_size,
        vocab_size=config.vocab_size,
    )

    def window() -> float:
        """Train for a logging window; its seconds."""
        begin, total = time.perf_counter(), torch.zeros((), device=device)
        for _ in range(every):
            for _ in range(count):
                ids = next(rows).input_ids.pin_memory().to(device, non_blocking=True)
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss / count
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(parameters, train.grad_clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        total.item()
        return time.perf_counter() - begin

    with rows:
        begin = window()
        seconds = [window() for _ in range(-(-steps // every))]
    tokens = train.total_batch_size * recipe.data.max_length
    return LoopTiming(
        "transformers",
        train.batch_size,
        count,
        tokens,
        (tokens * every * len(seconds) / sum(seconds),),
        begin - sum(seconds) / len(seconds),
        torch.cuda.max_memory_allocated() / 2**30,
        torch.cuda.max_memory_reserved() / 2**30,
        False,
        False,
    )
