"""What training asks of a causal language model, the stock one or one of `transformers`' classes: hidden
states, the head's weight, the blocks."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from act24.errors import Act24Error, reading
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.tools.huggingface.config import ACT24, ARCEE, LLAMA, config_of

#: In `model.config` of a recipe: the source's generation_config.json, which a run's exports have again.
GENERATION = "generation_config"


def hidden_states(model: nn.Module, input_ids: Tensor) -> Tensor:
    """input_ids `[B, S]` to what the head reads, `[B, S, D]`."""
    if isinstance(model, LlamaForCausalLM):
        return model.model(input_ids)
    foreign: Any = model
    return foreign.base_model(input_ids, use_cache=False).last_hidden_state


def head_weight(model: nn.Module) -> Tensor:
    """The weight from hidden states to logits, `[V, D]`."""
    if isinstance(model, LlamaForCausalLM):
        return model.head_weight
    foreign: Any = model
    return foreign.get_output_embeddings().weight


def block_list(model: nn.Module) -> nn.ModuleList:
    """The list of the model's blocks."""
    if isinstance(model, LlamaForCausalLM):
        return model.model.layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def config_from_json(text: str, origin: str) -> Any:
    """The configuration of a model that a recipe starts from: `LlamaConfig`, or one of `transformers`.

    Raises:
        Act24Error: it cannot be read, or is of a model that this `transformers` does not know.
    """
    with reading(f"{origin}: model.config cannot be read"):
        content = json.loads(text)
        content.pop(GENERATION, None)
    if content.get("model_type") in (LLAMA, ARCEE, ACT24):
        return config_of(content, f"{origin}: model.config")[0]
    import transformers

    with reading(f"{origin}: transformers has no such model", Exception):
        return transformers.AutoConfig.for_model(**content)


def unset_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration: the stock one on the meta device, others with values of their own."""
    if isinstance(config, LlamaConfig):
        with torch.device("meta"):
            return LlamaForCausalLM(config).to(dtype)
    import transformers

    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


@torch.no_grad()
def check_loss(model: nn.Module, source: str) -> None:
    """Refuse a model whose logits are not its head's product with its hidden states: the loop's loss would
    train another function.

    Raises:
        Act24Error: so it is, and why.
    """
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    training = model.training
    model.eval()
    try:
        with reading(f"{source}: {type(model).__name__} cannot be trained here", Exception):
            logits = model(ids).logits.float()
            product = nn.functional.linear(hidden_states(model, ids), head_weight(model)).float()
    finally:
        model.train(training)
    if logits.shape != product.shape or not torch.allclose(logits, product, rtol=1e-2, atol=1e-2):
        raise Act24Error(
            f"{source}: {type(model).__name__} changes its logits behind the head (a bias, a cap, a scale), "
            "which the loss of training does not do"
        )
