"""LLaMA as a researcher writes it for one experiment: plain modules, compiled block by block, no tracing.

The other side of `act24 bench step`. It shares nothing with the traced model but the mathematics, the loss
and the optimizer, so that the comparison shows what tracing and passes cost.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from act24.llama import LlamaConfig


class Block(nn.Module):
    """One decoder block with its feed-forward network written out."""

    def __init__(self, config: LlamaConfig, network: Literal["swiglu", "relu2"], width: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1, self.norm2 = (
            nn.RMSNorm(d, eps=config.rms_norm_eps),
            nn.RMSNorm(d, eps=config.rms_norm_eps),
        )
        self.query, self.key, self.value, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, width, bias=False), nn.Linear(width, d, bias=False)
        self.gate = nn.Linear(d, width, bias=False) if network == "swiglu" else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            linear(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        q, k = _rotate(q, cos, sin).type_as(v), _rotate(k, cos, sin).type_as(v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        inner = self.up(h)
        inner = F.relu(inner).square() if self.gate is None else F.silu(self.gate(h)) * inner
        return x + self.down(inner)


class Handwritten(nn.Module):
    """The whole model up to the hidden states that the head reads."""

    def __init__(self, config: LlamaConfig, network: Literal["swiglu", "relu2"], width: int) -> None:
        super().__init__()
        if config.key_value_heads != config.num_attention_heads:
            raise ValueError("the hand-written model has no grouped-query attention")
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, network, width) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_dim, self.theta = config.head_width, config.rope_theta
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, S]` to `[B, S, D]`."""
        half = torch.arange(0, self.head_dim, 2, device=tokens.device, dtype=torch.float32)
        positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        angle = positions[:, None] / self.theta ** (half / self.head_dim)
        cos, sin = angle.cos(), angle.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
