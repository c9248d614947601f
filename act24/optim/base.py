"""What an optimizer is: its options, which say all that recipes, the training loop and checks need to know.

An optimizer is one record, a frozen dataclass of options with a name, in one table
(`act24.optim.OPTIMIZERS`). Everything that depends on which optimizer it is, is asked of the record. A
package from outside adds its own with `OPTIMIZERS.add`.

    @dataclass(frozen=True, kw_only=True)
    class SignDescent(OptimizerOptions):
        name: ClassVar[str] = "sign_descent"
        momentum: Annotated[float, Range(ge=0, lt=1)] = 0.9

        def build(self, model, surroundings):
            return MyOptimizer(model.parameters(), lr=self.lr, momentum=self.momentum)

Checkpoints keep what an optimizer has in `state` and `param_groups`, which by torch.optim's contract is all
that it has: anything else is made from the options again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from act24.low_rank.exact_step import Eigh
from act24.options import Range, check_options

#: Shares modules out over processes: (a function from a part of a stack to its results, size of the stack)
#: -> the results of the whole stack, the same bits on every process.
Share = Callable[[Callable[[slice], tuple[Tensor, ...]], int], tuple[Tensor, ...]]


def unshared(compute: Callable[[slice], tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
    """The `Share` of a single process: it computes the whole stack."""
    return compute(slice(0, count))


@dataclass(frozen=True)
class Surroundings:
    """What whoever builds an optimizer hands in beside the model, since the core cannot know it.

    Attributes:
        places: the name of a pass to the fully qualified names of the modules that it rewrote.
        eigh: the eigendecomposition of stacks that is fastest on this device.
        share: shares work out over the processes of the run.
    """

    places: Callable[[str], Sequence[str]] = lambda name: ()
    eigh: Eigh = torch.linalg.eigh
    share: Share = unshared


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The options that every optimizer has, and what is asked of one.

    Attributes:
        name: as recipes have it; `aliases`: names that mean the same.
        needs: the pass that a recipe must have for this optimizer to make sense; empty: none.
        why: what the optimizer does with that pass, for the error: "steps on factors of low_rank".
        refuses: passes beside which it makes no sense, and why not.
        lr: the peak learning rate, which the schedule multiplies.

    Raises:
        OptionError: when made with a value that a field does not take, naming both.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[str] = ""
    why: ClassVar[str] = ""
    refuses: ClassVar[Mapping[str, str]] = {}

    lr: Annotated[float, Range(gt=0)]

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, model: nn.Module, surroundings: Surroundings) -> Optimizer:
        """The optimizer over the trainable parameters of a model."""
        raise NotImplementedError

    def exact_steps(self) -> bool:
        """Whether it replaces factors of `low_rank` now and then by others of about the same product."""
        return False

    def reset_periods(self) -> tuple[int, ...]:
        """Updates from one reset of moments to the next, for each cause of resets."""
        return ()

    def softened(self, step: int) -> float:
        """A factor on the learning rate of update `step`, counted from 0, beside that of the schedule."""
        return 1.0

    def diagnostics_(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """What to log of the optimizer that was built, by tag: 0-D tensors on the device."""
        return {}
