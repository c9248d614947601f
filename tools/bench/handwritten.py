"""LLaMA as a researcher writes it for one experiment: plain modules, compiled block by block, no tracing.

The other side of `act24 bench step`. It shares nothing with the traced model but the mathematics, the loss
and the optimizer, so that the comparison shows what tracing and passes cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from act24.llama import LlamaConfig

#: The feed-forward network; `gated` is SwiGLU without its SiLU, as in CoLA's larger models.
Network = Literal["swiglu", "gated", "relu2"]
#: (in, out, whether it belongs to attention) -> a linear without bias, or what stands in its place.
Linear = Callable[[int, int, bool], nn.Module]


def dense(in_features: int, out_features: int, _: bool) -> nn.Module:
    """A plain linear."""
    return nn.Linear(in_features, out_features, bias=False)


class Bottleneck(nn.Module):
    """LORO's two factors, or CoLA's with an activation between them."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, activation: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x)
        return self.up(h if self.activation is None else self.activation(h))


class BesideColumns(nn.Module):
    """LoST: a bottleneck beside some columns of a dense weight."""

    indices: Tensor

    def __init__(self, low: Bottleneck, columns: int, gamma: float) -> None:
        super().__init__()
        self.low, self.gamma = low, gamma
        in_features, out_features = low.down.in_features, low.up.out_features
        self.columns = nn.Linear(columns, out_features, bias=False)
        self.register_buffer("indices", torch.randperm(in_features)[:columns].sort().values)

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.low(x) + (1 - self.gamma) * self.columns(x[..., self.indices])


class Block(nn.Module):
    """One decoder block with its feed-forward network written out."""

    def __init__(self, config: LlamaConfig, network: Network, width: int, linear: Linear) -> None:
        super().__init__()
        d = config.hidden_size
        self.network: Network = network
        self.heads = config.num_attention_heads
        self.norm1, self.norm2 = (
            nn.RMSNorm(d, eps=config.rms_norm_eps),
            nn.RMSNorm(d, eps=config.rms_norm_eps),
        )
        self.query, self.key, self.value, self.out = (linear(d, d, True) for _ in range(4))
        self.up, self.down = linear(d, width, False), linear(width, d, False)
        self.gate = None if network == "relu2" else linear(d, width, False)

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
        if self.gate is None:
            inner = F.relu(inner).square()
        else:
            gate = self.gate(h)
            inner = (F.silu(gate) if self.network == "swiglu" else gate) * inner
        return x + self.down(inner)


class Handwritten(nn.Module):
    """The whole model up to the hidden states that the head reads."""

    def __init__(self, config: LlamaConfig, network: Network, width: int, linear: Linear = dense) -> None:
        super().__init__()
        if config.key_value_heads != config.num_attention_heads:
            raise ValueError("the hand-written model has no grouped-query attention")
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, network, width, linear) for _ in range(config.num_hidden_layers)
        )
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
