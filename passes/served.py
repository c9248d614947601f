"""A model as it is served: its passes, its weights, and its operations, which neither draw nor count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from act24.passes import Activation24, OperationalPass, Pass, Pipeline, Weight24, weight24
from act24.passes.activation24 import SCALE
from act24.passes.graph.region import buffers_of, joined
from act24.passes.state import as_evaluated
from act24.passes.stock_form import as_multiplied, buffer_kinds
from act24.passes.updates import updates_of


def lower_to_serve_(pipeline: Pipeline, step: int) -> None:
    """`Pipeline.lower_` to the operations of evaluation, which neither draw nor count, for one text a row."""
    pipeline.lower_to_([p for p in as_evaluated(pipeline.in_force(step)) if not p.of_rows])
    if (updates := updates_of(pipeline.model)) is not None:
        updates.serves = True


def served_passes(pipeline: Pipeline, without: Sequence[str] = ()) -> tuple[Pass, ...]:
    """The passes of the model as it is served: structural ones, and operational ones in force as they act in
    evaluation, for every step.

    Args:
        without: names of passes to leave out.
    """
    served: list[Pass] = []
    for p in pipeline.passes:
        if p.observes or p.of_rows or p.name in without:
            continue
        if not isinstance(p, OperationalPass):
            served.append(p)
        elif _in_force(pipeline, p) and (evaluated := p.in_evaluation()) is not None:
            served.append(replace(evaluated, from_step=0, until_step=None))
    return tuple(served)


def _in_force(pipeline: Pipeline, p: OperationalPass) -> bool:
    """As in training, or as in evaluation."""
    return p in pipeline.active or p.in_evaluation() in pipeline.active


@torch.no_grad()
def served_weights(pipeline: Pipeline, masked: bool = True) -> dict[str, Tensor]:
    """The state dict of the model as it is served, without the state of `weight24`.

    Args:
        masked: weights that a `weight24` in force makes 2:4 are as their linears multiply with them; else all
            weights are the dense masters.
    """
    state = pipeline.model.state_dict()
    for name in _unread_scales(pipeline):
        state.pop(name, None)
    if masked:
        state = as_multiplied(pipeline, state, pipeline.updates_made)
    for name, kind in buffer_kinds(pipeline).items():
        if kind in (weight24.MASK, weight24.SCALE):
            state.pop(name, None)
    return state


@torch.no_grad()
def fold_weights_(pipeline: Pipeline) -> None:
    """Put weights that `weight24` makes 2:4 into the model as they are multiplied, and let plain linears read
    them: the function stays, and nothing is masked again for every token. Training cannot go on from there.
    """
    state = served_weights(pipeline)
    pipeline.lower_to_([p for p in pipeline.active if not isinstance(p, Weight24)])
    for name, parameter in pipeline.model.named_parameters():
        parameter.copy_(state[name])


def _unread_scales(pipeline: Pipeline) -> set[str]:
    """The scales of `activation24` passes that are not in force, which no served model has."""
    read = {
        joined(fqn, match.path)
        for p in pipeline.active
        if isinstance(p, Activation24) and p.soft
        for fqn, match in pipeline.matches(p)
    }
    return {joined(name, SCALE) for name in buffers_of(pipeline.regions, SCALE).keys() - read}
