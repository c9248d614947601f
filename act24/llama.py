"""The stock LLaMA: a plain nn.Module with Hugging Face's parameter names and config fields.

It knows nothing of sparsity, low rank or training. Passes rewrite its decoder blocks from outside, which is
why `LlamaDecoderLayer.forward` is closed: three tensors in, one out, nothing that depends on data, on the
layer's index or on `self.training`, and no shape that is not read off a tensor.

Sources: Touvron et al., "LLaMA" (arXiv 2302.13971); grouped-query attention as in Llama 2 (arXiv 2307.09288);
numerics as in `transformers`' `LlamaForCausalLM`, to float32 rounding. The presets are the configurations of
ReLoRA and GaLore (`configs/llama_*.json`), which the low-rank literature trains on C4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn
from torch.nn import functional as F

from act24.errors import Act24Error, nearest
from act24.options import Range, Width, check_options
from act24.rotary import RotaryScaling, rotary_embedding, rotate

#: How many layers, or heads in one.
Count = Annotated[int, Range(ge=1, le=10_000)]
Positive = Annotated[float, Range(gt=0)]


@dataclass(frozen=True)
class LlamaConfig:
    """Hugging Face's field names, and its defaults for all but the sizes, which must be given.

    Raises:
        Act24Error: names the field whose value is no size, absurdly large, or does not fit to another one.
    """

    vocab_size: Width
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None  # None: as many as attention heads
    head_dim: Width | None = None  # None: hidden_size // num_attention_heads
    max_position_embeddings: Annotated[int, Range(ge=1, le=10**9)] = 2048
    rope_theta: Positive = 10000.0
    rope_scaling: RotaryScaling | None = None
    rms_norm_eps: Positive = 1e-6
    initializer_range: Positive = 0.02  # standard deviation
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    # The tokenizer's, so presets leave them out; carried for whoever reads a saved checkpoint.
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_options(self, "model")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise Act24Error(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}: change one of them, or set head_dim"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise Act24Error(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.key_value_heads}"
            )
        if self.head_width % 2:
            raise Act24Error(f"rotary embeddings need an even head_dim, not {self.head_width}")

    # Resolved on reading, not in __post_init__: `dataclasses.replace(config, hidden_size=...)` stays right.
    @property
    def head_width(self) -> int:
        """`head_dim`, or what it defaults to."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """`num_key_value_heads`, or what it defaults to."""
        return self.num_key_value_heads or self.num_attention_heads


def _preset(
    hidden_size: int, intermediate_size: int, heads: int, layers: int, vocab_size: int = 32000
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


# Kept as published. 1368, 1708 and 5461 are no multiples of 16, which costs tensor-core efficiency and rules
# out 2:4 kernels: override intermediate_size (5472 for 1b, say). It is never done silently.
PRESETS: dict[str, LlamaConfig] = {
    "llama-9m": _preset(128, 352, heads=4, layers=4),
    "llama-20m": _preset(256, 688, heads=4, layers=4),
    "llama-35m": _preset(384, 1024, heads=8, layers=6),
    "llama-40m": _preset(416, 1024, heads=8, layers=8),
    "llama-60m": _preset(512, 1376, heads=8, layers=8),
    "llama-71m": _preset(512, 1368, heads=8, layers=12),
    "llama-100m": _preset(640, 1708, heads=10, layers=12, vocab_size=32100),
    "llama-130m": _preset(768, 2048, heads=12, layers=12),
    "llama-250m": _preset(768, 2560, heads=16, layers=24),
    "llama-350m": _preset(1024, 2736, heads=16, layers=24),
    "llama-1b": _preset(2048, 5461, heads=32, layers=24),
    "llama-3b": _preset(2560, 6848, heads=32, layers=32),
    "llama-7b": _preset(4096, 11008, heads=32, layers=32),
}


def llama_config(preset: str, **overrides: Any) -> LlamaConfig:
    """The preset of that name with single fields replaced.

    Raises:
        Act24Error: an unknown preset or field, or a value that `LlamaConfig` does not take.
    """
    if preset not in PRESETS:
        raise Act24Error(f"unknown preset '{preset}': {nearest(preset, PRESETS)}")
    fields = [field.name for field in dataclasses.fields(LlamaConfig)]
    for name in overrides:
        if name not in fields:
            raise Act24Error(f"unknown model field '{name}': {nearest(name, fields)}")
    return dataclasses.replace(PRESETS[preset], **overrides)


class LlamaAttention(nn.Module):
    """Causal grouped-query attention. [B, S, D] -> [B, S, D]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_width
        # Said only where it holds, because the memory-efficient attention kernel refuses the flag.
        self.grouped = config.key_value_heads != config.num_attention_heads
        width, bias = config.hidden_size, config.attention_bias
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_width, bias=bias)
        self.v_proj = nn.Linear(width, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=bias)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden_states [B, S, D]; cos, sin [S, head_dim / 2], float32. Returns [B, S, D]."""
        query, key, value = (
            linear(hidden_states).unflatten(-1, (-1, self.head_dim))
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Turned as the linears lay them out, [B, S, H, d]: attention reads that as it is, and writes its
        # gradients so; the other order costs copies. The float32 angles promote the rotation to float32;
        # attention wants one dtype again, which is free once compiled.
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        query = rotate(query, cos, sin).type_as(value).transpose(1, 2)
        key = rotate(key, cos, sin).type_as(value).transpose(1, 2)
        value = value.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202). [..., D] -> [..., D]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D]. Returns [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class LlamaDecoderLayer(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)). The region that passes rewrite."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden_states [B, S, D]; cos, sin [S, head_dim / 2], float32. Returns [B, S, D]."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), cos, sin)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlamaModel(nn.Module):
    """Embedding, blocks and last norm: token ids to the hidden states that the head reads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, S], int64. Returns [B, S, D]."""
        # Computed anew each time: a few small kernels, for which no buffer can be lost between meta and
        # device.
        cos, sin = rotary_embedding(
            input_ids.shape[1],
            self.config.head_width,
            self.config.rope_theta,
            input_ids.device,
            self.config.rope_scaling,
        )
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin)
        return self.norm(hidden_states)


class LlamaForCausalLM(nn.Module):
    """The language model. Training reads `model.model(input_ids)` and `model.head_weight` into
    `act24.loss.cross_entropy_sum`, which never holds all logits at once.

    With tied embeddings there is no `lm_head`: one parameter under one name, `model.embed_tokens.weight`, as
    in a saved Hugging Face checkpoint. So nothing (meta construction, `to_empty`, FSDP2, safetensors) can
    part the two.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @property
    def head_weight(self) -> Tensor:
        """The weight from hidden states to logits, [V, D]."""
        return (self.lm_head or self.model.embed_tokens).weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, S], int64. Returns logits [B, S, V] in the dtype of the linears."""
        hidden_states = self.model(input_ids)
        if self.lm_head is None:
            return F.linear(hidden_states, self.head_weight)
        return self.lm_head(hidden_states)
