"""An optimizer and a schedule as a package from outside would have them; a test installs this very file."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from act24.optim import OPTIMIZERS, OptimizerOptions
from act24.options import Range
from act24.schedules import SCHEDULES, Schedule


@dataclass(frozen=True, kw_only=True)
class ToyMomentum(OptimizerOptions):
    name: ClassVar[str] = "toy_momentum"

    momentum: Annotated[float, Range(ge=0, lt=1)] = 0.5

    def build(self, model, surroundings):
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True, kw_only=True)
class ToyStairs(Schedule):
    name: ClassVar[str] = "toy_stairs"

    stairs: Annotated[int, Range(ge=1)] = 2

    def multiplier(self, step, total_steps):
        return 1 - (step * self.stairs // total_steps) / self.stairs


def register():
    OPTIMIZERS.add(ToyMomentum)
    SCHEDULES.add(ToyStairs)
