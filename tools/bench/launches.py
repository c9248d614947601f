"""What Python and launches cost on this machine, and which micro-batches wait for them if not captured."""

from __future__ import annotations

import time

import torch
from torch import nn

from act24.llama import LlamaConfig, LlamaDecoderLayer, rotary_embedding
from act24.tools.bench.rows import graph_milliseconds

_TINY = LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2
)
_CALLS, _SIDE = 30, 8192


def launch_seconds(device: torch.device) -> float:
    """Seconds the CPU takes for forward and backward of a decoder block, compiled, launched operator by
    operator. The block is so small that the GPU is never what is waited for; its size makes no difference to
    the CPU."""
    with device:
        block = LlamaDecoderLayer(_TINY)
        x = torch.randn(2, 32, _TINY.hidden_size, requires_grad=True)
    cos, sin = rotary_embedding(32, _TINY.head_width, _TINY.rope_theta, device)
    compiled: nn.Module = torch.compile(block, fullgraph=True)  # type: ignore[assignment]

    def call() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            compiled(x, cos, sin).sum().backward()

    for _ in range(3):
        call()
    begin = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - begin) / _CALLS


def product_rate(device: torch.device) -> float:
    """Operations a second of a large bfloat16 product."""
    left, right = torch.randn(2, _SIDE, _SIDE, device=device).bfloat16()
    return 2 * _SIDE**3 / (graph_milliseconds(lambda: left @ right) / 1e3)


def is_launch_bound(config: LlamaConfig, tokens: int, launch: float, rate: float) -> bool:
    """Whether a micro-batch of so many tokens takes the CPU longer to launch than the GPU to compute, were
    all that it computes products at full rate. What is near that limit waits as well.

    Args:
        launch: of `launch_seconds`.
        rate: of `product_rate`.
    """
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads, config.key_value_heads
    weights = 2 * width * config.head_width * (queries + keys) + 3 * width * inner
    blocks = config.num_hidden_layers
    operations = 6 * tokens * (blocks * weights + width * config.vocab_size)
    return blocks * launch > operations / rate
