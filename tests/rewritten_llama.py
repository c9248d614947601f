"""A small LLaMA that passes have rewritten, without a recipe, and what its buffers hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.initialise import build_llama
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.passes import Pipeline, apply_
from act24.tools.run.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
IDS = torch.randint(97, (4, 12), generator=torch.Generator().manual_seed(0))


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    )
    return build_llama(config, 0)


def rewritten(*passes: Any) -> tuple[LlamaForCausalLM, Pipeline]:
    model = llama()
    return model, apply_(model, passes, seed=3)


def scales(model: LlamaForCausalLM) -> list[float]:
    return [float(b) for n, b in model.named_buffers() if n.endswith("activation24_scale")]


def loss_of(model: LlamaForCausalLM) -> Tensor:
    return F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())


def train(model: LlamaForCausalLM, pipeline: Pipeline, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in steps:
        pipeline.begin_update_(step, IDS)
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
