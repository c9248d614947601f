"""Rotary position embeddings (Su et al., arXiv 2104.09864) and the ways to stretch them to longer
contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from act24.options import OptionError, Range, check_options

Positive = Annotated[float, Range(gt=0)]


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are changed for contexts beyond those of the first training.

    Field names and defaults are those of `rope_parameters` in a Hugging Face config.json.

    Attributes:
        rope_type: `"linear"` divides all frequencies by `factor` (position interpolation, arXiv 2306.15595).
            `"llama3"` divides those whose wavelength is above `original_max_position_embeddings` /
            `low_freq_factor`, leaves those below / `high_freq_factor`, and blends between. `"yarn"` does so
            by the number of turns within the original context, `beta_slow` to `beta_fast`, and scales the
            attention's logits (arXiv 2309.00071).
        factor: new over original context, 1 or more.
        original_max_position_embeddings: needed by llama3 and yarn.
        low_freq_factor, high_freq_factor: of llama3, which needs both.
        beta_fast, beta_slow, truncate, attention_factor, mscale, mscale_all_dim: of yarn.

    Raises OptionError for values out of range and for fields that another type has.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: Annotated[float, Range(ge=1)]
    original_max_position_embeddings: Annotated[int | None, Range(gt=0, le=10**9)] = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    truncate: bool | None = None
    attention_factor: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None

    def __post_init__(self) -> None:
        check_options(self, "rope_parameters")
        needed = _NEEDED[self.rope_type]
        for name in needed:
            if getattr(self, name) is None:
                raise OptionError(f'rope_parameters: rope_type "{self.rope_type}" needs {name}')
        for name in _OWN:
            if getattr(self, name) is not None and name not in (*needed, *_OPTIONAL[self.rope_type]):
                raise OptionError(f'rope_parameters: rope_type "{self.rope_type}" has no {name}')
        if self.rope_type == "llama3" and not (self.low_freq_factor or 0) < (self.high_freq_factor or 0):
            raise OptionError("rope_parameters: high_freq_factor has to be above low_freq_factor")


_NEEDED = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings",),
}
_OPTIONAL = {
    "linear": ("original_max_position_embeddings",),  # some files have it; it has no effect
    "llama3": (),
    "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
}
#: What each type reads.
FIELDS_OF = {kind: ("factor", *_NEEDED[kind], *_OPTIONAL[kind]) for kind in _NEEDED}
_OWN = tuple(dict.fromkeys(name for names in (*_NEEDED.values(), *_OPTIONAL.values()) for name in names))


def rotary_embedding(
    sequence: int, head_dim: int, theta: float, device: torch.device, scaling: RotaryScaling | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the rotary angles, each `[S, head_dim / 2]`, float32, times yarn's attention factor."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    factor = 1.0
    if scaling is not None:
        frequency, factor = _SCALED[scaling.rope_type](frequency, theta, scaling)
    angle = torch.arange(sequence, dtype=torch.float32, device=device)[:, None] * frequency
    return angle.cos() * factor, angle.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[..., i], x[..., i + d/2]) by their angles. x [..., d]; cos, sin [..., d/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _linear(frequency: Tensor, theta: float, scaling: RotaryScaling) -> tuple[Tensor, float]:
    return frequency / scaling.factor, 1.0


def _llama3(frequency: Tensor, theta: float, scaling: RotaryScaling) -> tuple[Tensor, float]:
    context, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    assert context is not None
    assert low is not None
    assert high is not None
    turns = context * frequency / (2 * math.pi)  # within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling.factor, 1.0


def _yarn(frequency: Tensor, theta: float, scaling: RotaryScaling) -> tuple[Tensor, float]:
    context = scaling.original_max_position_embeddings
    assert context is not None
    head_dim = 2 * len(frequency)

    def index(turns: float) -> float:
        """The (fractional) index of the frequency that makes so many turns within the original context."""
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast or 32), index(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last = last + 0.001 if first == last else last  # as published, against a division by zero
    place = torch.arange(len(frequency), dtype=torch.float32, device=frequency.device)
    interpolated = ((place - first) / (last - first)).clamp(0, 1)
    scaled = interpolated * frequency / scaling.factor + (1 - interpolated) * frequency
    return scaled, _attention_factor(scaling)


def _attention_factor(scaling: RotaryScaling) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


_SCALED = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
