"""The optimizer and the learning rate that a recipe asks for."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from act24 import schedules
from act24.recipes import schema


def build_optimizer(model: nn.Module, section: schema.Optimizer) -> Optimizer:
    """AdamW over the trainable parameters; weight decay acts as `section.decay` says."""
    decayed, other = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 or section.decay == "all" else other).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": other, "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for p in decayed)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=section.lr, betas=section.betas, eps=section.eps, fused=fused
    )


def learning_rate(recipe: schema.Recipe, step: int) -> float:
    """The learning rate of update `step`, counted from 0."""
    return recipe.optimizer.lr * schedules.cosine(
        step,
        total_steps=recipe.train.steps,
        warmup_steps=recipe.schedule.warmup_steps,
        min_lr_ratio=recipe.schedule.min_lr_ratio,
    )
