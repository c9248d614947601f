"""Weights that torch's tools compute anew before every forward: pruning, weight norm, spectral norm and
parametrizations; and how each becomes a parameter again."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def remade(module: nn.Module) -> str:
    """The call that makes a parameter of what a module computes before its forward, as text; the empty string
    where none of these tools is at work."""
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        return f'torch.nn.utils.parametrize.remove_parametrizations(module, "{name}")'
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            return f'torch.nn.utils.prune.remove(module, "{hook._tensor_name}")'
        if isinstance(hook, WeightNorm):
            return f'torch.nn.utils.remove_weight_norm(module, "{hook.name}")'
        if isinstance(hook, SpectralNorm):
            return f'torch.nn.utils.remove_spectral_norm(module, "{hook.name}")'
    return ""
