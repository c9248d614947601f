"""Updates that no optimizer makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewritten_llama import IDS, loss_of, rewritten
from torch import nn

from act24.errors import Act24Error
from act24.passes import Activation24, Relu2FFN, Weight24

NEEDING: dict[str, tuple[Any, ...]] = {
    "masks": (Weight24(mask_every=1),),
    "scales": (Relu2FFN(), Activation24(method="soft_dynamic", dynamic_steps=1)),
    "seeds": (Relu2FFN(), Activation24(method="mvue")),
}


@torch.no_grad()
def through_data(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.data -= 0.01 * p.grad
            p.grad.data.zero_()


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.sub_(p.grad, alpha=0.01)
            p.grad = None


@pytest.mark.parametrize("update", [through_data, in_place])
@pytest.mark.parametrize("needing", NEEDING)
def test_an_update_by_hand_that_is_not_begun_is_noticed(
    needing: str, update: Callable[[nn.Module], None]
) -> None:
    model, pipeline = rewritten(*NEEDING[needing])
    for step in range(2):
        pipeline.begin_update_(step, IDS)
        for _ in range(2):
            loss_of(model).backward()
        update(model)
        with torch.no_grad():
            model(IDS)
            model.eval()(IDS)
        model.train()
    with pytest.raises(Act24Error, match=r"changed since update 1 began.*begin_update_\(step, batch=…\)"):
        model(IDS)
    pipeline.begin_update_(2, IDS)
    loss_of(model).backward()


def test_weights_that_are_exchanged_for_an_evaluation_and_put_back_are_no_update() -> None:
    """As averages of weights are."""
    model, pipeline = rewritten(*NEEDING["masks"])
    pipeline.begin_update_(0)
    loss_of(model).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(0.9)
        model.eval()(IDS)
        for p, own in zip(model.parameters(), before, strict=True):
            p.data.copy_(own)
    loss_of(model.train()).backward()


def test_where_no_pass_is_in_force_nobody_looks() -> None:
    model, pipeline = rewritten(Weight24(from_step=5))
    pipeline.begin_update_(0)
    loss_of(model).backward()
    through_data(model)
    loss_of(model).backward()
