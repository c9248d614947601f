"""Updates that nobody began, and optimizers and copies that would not follow."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewritten_llama import IDS, llama, loss_of, rewritten
from slow import slow_after
from torch import nn

from act24.errors import Act24Error
from act24.passes import Activation24, LowRank, Relu2FFN, Weight24, apply_

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


@pytest.mark.parametrize("update", slow_after(1, [through_data, in_place]))
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


def test_where_no_pass_is_in_force_or_to_come_nobody_looks() -> None:
    model, pipeline = rewritten(Weight24(until_step=1))
    for step in (0, 1):
        pipeline.begin_update_(step)
        loss_of(model).backward()
        through_data(model)
    loss_of(model).backward()


WAITING: dict[str, tuple[Any, ...]] = {
    "begins": (Relu2FFN(), Activation24(from_step=2)),
    "ends": (Relu2FFN(), Activation24(until_step=2)),
    "masks": (Weight24(from_step=2),),
}


def by_optimizer(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


@pytest.mark.parametrize(
    ("update", "begun"), slow_after(1, [(by_optimizer, False), (by_optimizer, True), (through_data, True)])
)
@pytest.mark.parametrize("waiting", WAITING)
def test_updates_that_nobody_begins_before_a_step_to_come_are_noticed(
    waiting: str, update: Callable[[nn.Module], None], begun: bool
) -> None:
    """A pass would never come into force, or never end. Where none was begun, weights may have been loaded:
    only an optimizer tells."""
    model, pipeline = rewritten(*WAITING[waiting])
    if begun:
        pipeline.begin_update_(0)
    for _ in range(2):  # micro-batches
        loss_of(model).backward()
    update(model)
    model.eval()(IDS)
    model.train()
    with pytest.raises(Act24Error, match=r"\w+24 .*call pipeline\.begin_update_\(step, batch=…\)"):
        model(IDS)
    pipeline.lower_(1)  # as a loop may that only has steps
    loss_of(model).backward()
    update(model)
    pipeline.begin_update_(2)
    loss_of(model).backward()


def test_behind_its_last_step_a_pass_that_renews_nothing_asks_for_nothing() -> None:
    model, pipeline = rewritten(*WAITING["begins"])
    pipeline.begin_update_(2)
    for _ in range(2):
        loss_of(model).backward()
        by_optimizer(model)


@pytest.mark.parametrize("copied", slow_after(1, [copy.deepcopy, torch.optim.swa_utils.AveragedModel]))
@pytest.mark.parametrize("waiting", WAITING)
def test_copies_that_would_not_follow_the_steps_say_so(
    waiting: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model, pipeline = rewritten(*WAITING[waiting])
    other = copied(model)
    pipeline.begin_update_(2)
    other.load_state_dict(model.state_dict() if copied is copy.deepcopy else other.state_dict())
    for mode, match in ((False, r"copy\.deepcopy\(\(model, pipeline\)\)"), (True, "to train it, copy both")):
        with pytest.raises(Act24Error, match=match):
            other.train(mode)(IDS)


def test_copies_that_have_no_step_to_come_run() -> None:
    model, pipeline = rewritten(*WAITING["begins"])
    with pipeline.evaluation():
        dense = copy.deepcopy(model)
    before = model.eval()(IDS)
    assert torch.equal(dense.eval()(IDS), before)
    pipeline.begin_update_(2)
    sparse = copy.deepcopy(model)
    assert torch.equal(sparse.train()(IDS), model(IDS))
    assert not torch.equal(model(IDS), before)


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("name", slow_after(1, ["masks", "begins", "seeds"]))
def test_copies_of_blocks_say_that_no_pipeline_knows_them(name: str) -> None:
    """However they come about: of a block, of a list, or out of a copy of the whole model."""
    passes = NEEDING.get(name) or WAITING[name]
    model, pipeline = rewritten(*passes)
    pipeline.begin_update_(0, IDS)
    layers = model.model.layers
    blocks = {
        "deepcopy": copy.deepcopy(layers[1]),
        "pickle": pickled(layers[1]),
        "list": copy.deepcopy(layers)[1],
        "whole": copy.deepcopy(model).model.layers[1],
    }
    for block in blocks.values():
        layers.append(block)
        for mode in (True, False):
            with pytest.raises(Act24Error, match="this block is a copy, and no pipeline renews"):
                model.train(mode)(IDS)
        twin, its = copy.deepcopy((model, pipeline))  # whose own blocks it knows
        with pytest.raises(Act24Error, match="this block is a copy"):
            twin(IDS)
        del twin.model.layers[2]
        assert torch.equal(twin(IDS), model_without(model, 2)(IDS))
        assert its.modules[0] is twin.model.layers[0]
    model.train()
    loss_of(model).backward()


def model_without(model: Any, block: int) -> Any:
    """The same model, less a block."""
    del model.model.layers[block]
    return model


def test_copies_of_blocks_that_are_served_run() -> None:
    model, pipeline = rewritten(*NEEDING["masks"])
    with pipeline.evaluation():
        block = copy.deepcopy(model.model.layers[1])
    expected = model.eval()(IDS)
    stood, model.model.layers[1] = model.model.layers[1], block.eval()
    assert torch.equal(model(IDS), expected)
    model.model.layers[1] = stood
    dense, _ = rewritten(Relu2FFN())
    dense.model.layers.append(copy.deepcopy(dense.model.layers[0]))
    loss_of(dense).backward()


@pytest.mark.parametrize("step", [-1, 1.5, None, "3", True])
@pytest.mark.parametrize("calls", slow_after(1, ["begin_update_", "lower_"]))
def test_a_step_that_is_none_is_refused_in_a_line(calls: str, step: Any) -> None:
    _, pipeline = rewritten(*WAITING["begins"])
    with pytest.raises(Act24Error, match=rf"^updates already made: step has to be .*, got {step!r}$"):
        getattr(pipeline, calls)(step)
    pipeline.begin_update_(2)
    assert [p.name for p in pipeline.active] == ["activation24"]


RANKS: dict[str, Any] = {"attn_rank": 4, "mlp_rank": 4}


@pytest.mark.parametrize("passes", [(LowRank(**RANKS),), (LowRank(**RANKS), Weight24()), (Relu2FFN(),)])
def test_an_optimizer_that_was_made_before_the_passes_were_applied_is_told(passes: Any) -> None:
    model = llama()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    pipeline = apply_(model, passes)
    pipeline.begin_update_(0)
    loss_of(model).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    match = r"made before the passes.*holds model\.layers\..*weight as it was.*make it after apply_"
    with pytest.raises(Act24Error, match=match):
        early.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    pipeline.begin_update_(1)
    held = {id(p) for group in early.param_groups for p in group["params"]}
    early.add_param_group({"params": [p for p in model.parameters() if id(p) not in held]})
    early.step()


def test_an_optimizer_from_before_that_lacks_nothing_goes_on() -> None:
    """Two of three matrices stay, and the third is gone."""
    model = llama()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_(model, [Relu2FFN(width="keep")])
    loss_of(model).backward()
    up = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = up.clone()
    early.step()
    assert not torch.equal(up, before)
