"""Small models that nobody at act24 wrote: what a user's code may look like."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from act24.initialise import build_llama
from act24.llama import LlamaConfig, LlamaForCausalLM


def llama(layers: int = 2, seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A stock LLaMA of width 32, F 48 and 97 words."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "num_hidden_layers": layers, **overrides})  # type: ignore[arg-type]
    return build_llama(config, seed)


def tokens(batch: int = 2, sequence: int = 9, seed: int = 0) -> Tensor:
    """Random token ids for `llama`."""
    return torch.randint(97, (batch, sequence), generator=torch.Generator().manual_seed(seed))


class SwiGLU(nn.Module):
    def __init__(self, width: int = 16, inner: int = 32, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Relu2MLP(nn.Module):
    """linear → relu² → linear, with a dropout behind it that has to follow `.eval()`."""

    def __init__(self, width: int = 16, inner: int = 32, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.relu(self.up(x)).square()))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Trunk(nn.Module):
    """Blocks around the modules that `make` gives."""

    def __init__(self, make: Callable[[], nn.Module], layers: int = 2, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(make(), width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def features(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
