"""Optimizers: update rules as functions over lists of tensors, under a thin torch.optim.Optimizer."""

from act24.optim.adamw import AdamW, adam_direction, adamw_, parameter_groups, reset_due, reset_moments_
from act24.optim.loro import LOROAdamW, loro_parameter_groups

__all__ = [
    "AdamW",
    "LOROAdamW",
    "adam_direction",
    "adamw_",
    "loro_parameter_groups",
    "parameter_groups",
    "reset_due",
    "reset_moments_",
]
