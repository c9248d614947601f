"""Optimizers: update rules as functions over lists of tensors, under a thin torch.optim.Optimizer."""

from act24.optim.adamw import AdamW, adam_direction, adamw_, parameter_groups, reset_due, reset_moments_

__all__ = ["AdamW", "adam_direction", "adamw_", "parameter_groups", "reset_due", "reset_moments_"]
