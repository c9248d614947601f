"""Optimizers: update rules as functions over lists of tensors, under a thin torch.optim.Optimizer."""

from act24.optim.adamw import (
    AdamW,
    AdamWOptions,
    ColaAdamWOptions,
    LostAdamWOptions,
    adam_direction,
    adamw_,
    parameter_groups,
    reset_due,
    reset_moments_,
)
from act24.optim.base import OptimizerOptions, Surroundings
from act24.optim.loro import LOROAdamW, LOROAdamWOptions, loro_parameter_groups
from act24.optim.muon import Muon, MuonOptions
from act24.records import Table

#: The optimizers that a recipe can name.
OPTIMIZERS: Table[type[OptimizerOptions]] = Table(
    "optimizer", AdamWOptions, LOROAdamWOptions, ColaAdamWOptions, LostAdamWOptions, MuonOptions
)

__all__ = [
    "OPTIMIZERS",
    "AdamW",
    "AdamWOptions",
    "ColaAdamWOptions",
    "LOROAdamW",
    "LOROAdamWOptions",
    "LostAdamWOptions",
    "Muon",
    "MuonOptions",
    "OptimizerOptions",
    "Surroundings",
    "adam_direction",
    "adamw_",
    "loro_parameter_groups",
    "parameter_groups",
    "reset_due",
    "reset_moments_",
]
