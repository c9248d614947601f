"""Initial values that depend on the run seed and the parameter's own name, and on nothing else."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.options import check_values


class _Seed(NamedTuple):
    seed: int


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for the parameter `name` (its fully qualified name) in the run `seed`.

    So a parameter that is added, removed or reshaped never moves another one's start, and neither does the
    order in which they are drawn, nor the device they end up on.

    Raises:
        OptionError: the seed is no integer.
    """
    check_values(_Seed, "initial values", seed=seed)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


@torch.no_grad()
def initialise_(model: LlamaForCausalLM, seed: int) -> None:
    """Fill every parameter in place: matrices N(0, initializer_range²), biases zero, norms one.

    Matrices are drawn in float32 on the CPU and then copied to the parameter's dtype and device, which makes
    the start the same everywhere. The cost is one CPU core's time: some 15 s for each thousand million
    parameters.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            start = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            parameter.copy_(
                start.normal_(0.0, model.config.initializer_range, generator=generator_for(seed, name))
            )
        else:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)


def build_llama(
    config: LlamaConfig,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A stock LLaMA with initial values, its parameters allocated once, in `dtype` on `device`."""
    with torch.device("meta"):  # spares torch's own initialisation, which would be overwritten
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    initialise_(model, seed)
    return model
