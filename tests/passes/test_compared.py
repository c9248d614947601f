"""What tracing froze is compared at every way into the rewritten model, and at each once."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toys import features

from act24.passes import LowRank, PassError, Pipeline, apply_
from act24.passes.graph.watched import Fact

X = features(3, 8)
SAID = r"drop\.p was 0\.5 when the model was traced, and is 0\.25"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.relu(self.up(x)))) * self.drop.p


class Stops(nn.Module):
    """Not traced, and does in the middle of a forward what a test has for it."""

    act: Any = staticmethod(lambda: None)

    def forward(self, x: Tensor) -> Tensor:
        type(self).act()
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.stops = nn.Sequential(*(Layer() for _ in range(3))), Stops()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.stops(self.layers(x)))


def rewritten() -> tuple[Any, Pipeline]:
    torch.manual_seed(0)
    model: Any = Model().eval()
    return model, apply_(model, [LowRank(attn_rank=2, mlp_rank=2)])


@pytest.fixture
def model() -> Iterator[Any]:
    yield rewritten()[0]
    Stops.act = staticmethod(lambda: None)


WAYS: dict[str, Callable[[Any], object]] = {
    "model": lambda m: m(X),
    "region": lambda m: m.layers[1](X),
    "blocks": lambda m: m.layers(X),
    "functional": lambda m: torch.func.functional_call(m.layers[1], {}, (X,)),
    "checkpoint": lambda m: checkpoint(m.layers[1], X, use_reentrant=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_value_that_changed_is_found_by_whatever_way_the_region_is_called(model: Any, way: str) -> None:
    WAYS[way](model)
    model.layers[1].drop.p = 0.25
    with pytest.raises(PassError, match=SAID):
        WAYS[way](model)
    model.layers[1].drop.p = 0.5
    WAYS[way](model)


def test_a_region_that_computes_what_it_did_runs(model: Any) -> None:
    expected = model.layers[0](X)
    model.layers[1].drop.p = 0.25
    assert torch.equal(model.layers[0](X), expected)


def test_within_the_models_call_nothing_is_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pipeline = rewritten()
    seen: list[Fact] = []
    monkeypatch.setattr(Fact, "check", lambda self: seen.append(self))
    model(X)
    assert len(seen) == len(pipeline.facts)
    seen.clear()
    model.layers[0](X)
    assert {fact.text for fact in seen} >= {"drop.p"}
    assert len(seen) < len(pipeline.facts)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_call_that_was_broken_off_goes_on_no_more(model: Any, kind: type[BaseException]) -> None:
    def stop() -> None:
        raise kind

    Stops.act = staticmethod(stop)
    with pytest.raises(kind):
        model(X)
    model.layers[1].drop.p = 0.25
    for way in ("region", "blocks"):
        with pytest.raises(PassError, match=SAID):
            WAYS[way](model)


def test_a_region_called_in_another_thread_is_no_part_of_the_call(model: Any) -> None:
    said: list[str] = []

    def other() -> None:
        try:
            model.layers[1](X)
        except PassError as error:
            said.append(str(error))

    def in_another() -> None:
        model.layers[1].drop.p = 0.25
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        model.layers[1].drop.p = 0.5

    Stops.act = staticmethod(in_another)
    model(X)
    assert len(said) == 1


def test_what_a_call_computed_is_freed_with_it(model: Any) -> None:
    gc.disable()
    try:
        x = X.clone()
        seen = weakref.ref(x)
        model(x)
        model.layers[0](x)
        del x
        assert seen() is None
    finally:
        gc.enable()


def test_copies() -> None:
    model, pipeline = rewritten()
    twin, _ = copy.deepcopy((model, pipeline))
    alone = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    for one in (twin, alone, loaded):
        one.layers[1].drop.p = 0.25
        assert torch.equal(one.layers[0](X), model.layers[0](X))
    model.layers[1](X)
    with pytest.raises(PassError, match=SAID):
        twin.layers[1](X)
    alone.layers[1](X)  # nobody knows where its values lie
    loaded.layers[1](X)
