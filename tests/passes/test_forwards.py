"""Forwards within each other, and in several threads."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import Relu2MLP, Trunk, features

from act24.errors import Act24Error
from act24.passes import Activation24, Pipeline, Weight24, apply_

X = features(4, 8, 16)
PASSES = {"masks": Weight24(scope="mlp"), "draws": Activation24(method="mvue")}


class Deep(Trunk):
    """Calls itself, as models of recurrent depth do."""

    def forward(self, x: Tensor, again: int = 0) -> Tensor:
        return super().forward(self(x, again - 1) if again else x)


@torch.enable_grad()
def trained(name: str) -> tuple[Deep, Pipeline]:
    """Behind an update, whose masks are others than those of the weights."""
    torch.manual_seed(0)
    model = Deep(Relu2MLP)
    pipeline = apply_(model, [PASSES[name]], probe=X)
    pipeline.begin_update_(0)
    model(X).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model, pipeline


def at_once(*calls: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("name", PASSES)
@torch.no_grad()
def test_a_forward_in_evaluation_mode_is_what_is_served_wherever_it_is_called(name: str) -> None:
    model, pipeline = trained(name)
    with pipeline.evaluation():
        once, deep = model.eval()(X), model(X, 2)
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(model(X, 2), deep)

    calls: list[Tensor | None] = []

    def call(*_: Any) -> None:  # as a hook that logs does
        if calls.count(None) < 3:
            calls.append(None)
            calls.append(model(X))

    handle = model.blocks[0].register_forward_hook(call)
    assert torch.equal(model(X), once)
    handle.remove()
    results = [one for one in calls if one is not None]
    assert len(results) == 3
    assert all(torch.equal(one, once) for one in results)

    with pytest.raises(TypeError):
        model(X, "often")  # type: ignore[arg-type]
    found: list[Tensor] = []
    at_once(*2 * [lambda: found.extend(model(X, 1) for _ in range(20))])
    assert len(found) == 40
    with pipeline.evaluation():
        assert all(torch.equal(one, model(X, 1)) for one in found)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_an_evaluation_within_a_training_forward_leaves_that_one_as_it_is() -> None:
    """Both what it draws from and, at its end, that its backward is to come."""
    model, pipeline = trained("draws")
    with pipeline.evaluation(), torch.no_grad():
        served = model.eval()(X)
    found = []

    def evaluate(*_: Any) -> None:
        handle.remove()
        with torch.no_grad():
            found.append(model.eval()(X))
        model.train()

    def gradients(*, evaluated: bool) -> list[Tensor]:
        nonlocal handle
        model.train().zero_grad()
        pipeline.begin_update_(1)
        if evaluated:
            handle = model.blocks[1].register_forward_pre_hook(evaluate)
        loss = model(X).square().sum()
        model(X)  # draws from other seeds, before the backward
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    handle: Any = None
    expected = gradients(evaluated=False)
    assert all(map(torch.equal, gradients(evaluated=True), expected))
    assert torch.equal(found[0], served)


def test_a_training_forward_that_calls_itself_is_one_micro_batch() -> None:
    model, pipeline = trained("draws")
    pipeline.begin_update_(1)
    once, again = model(X), model(model(X))
    pipeline.begin_update_(1)
    assert torch.equal(model(X), once)
    assert not torch.equal(model(X, 1), again), "the second call draws from the seeds of the first"
    loss = model(X, 1).sum()
    model(X)
    loss.backward()


@torch.no_grad()
def test_state_of_a_forward_that_has_not_ended_is_not_read() -> None:
    model, pipeline = trained("masks")
    model.eval()
    acts = (model.state_dict, lambda: copy.deepcopy(model), lambda: pipeline.begin_update_(1))
    for act in (*acts, lambda: pipeline.lower_(1)):
        handle = model.blocks[0].register_forward_hook(lambda *_, act=act: act() and None)
        with pytest.raises(Act24Error, match="has not ended"):
            model(X)
        handle.remove()
        act()


def test_threads_do_not_train_and_evaluate_one_model_at_once() -> None:
    model, pipeline = trained("masks")
    pipeline.begin_update_(1)
    waits, goes_on, errors = threading.Event(), threading.Event(), list[str]()

    def stop(*_: Any) -> None:
        waits.set()
        goes_on.wait(10)

    def train() -> None:
        model(X)

    handle = model.blocks[1].register_forward_pre_hook(stop)
    thread = threading.Thread(target=train)
    thread.start()
    waits.wait(10)
    handle.remove()
    model.eval()
    try:
        model(X)
    except Act24Error as error:
        errors.append(str(error))
    goes_on.set()
    thread.join()
    assert errors
    assert errors[0].startswith("two threads run this model at once")
    with torch.no_grad():
        assert torch.equal(model(X), model(X))


def test_what_a_forward_computed_is_freed_with_its_result() -> None:
    """And not when the garbage collector comes: until then a GPU would have no room for the next."""
    model, pipeline = trained("masks")
    pipeline.begin_update_(1)
    gc.collect()
    gc.disable()
    try:
        seen = weakref.ref(model(X, 1))
        assert seen() is None
        model(X, 1).sum().backward()
        seen = weakref.ref(model.eval()(X, 1))
        assert seen() is None
    finally:
        gc.enable()
