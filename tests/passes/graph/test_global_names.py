"""Globals are told from attributes of the same name by the instructions that read them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import Activation24, PassError, apply_, plan

HERE = sys.modules[__name__]
step = 0
fc1: list[int] = []
scale = 2.0


class Restless:
    """In the place of another thread: while the list beside it is looked at, it grows."""

    __slots__ = ()

    def __reduce_ex__(self, _: object) -> Any:
        fc1.append(1)
        return Restless, ()


class Config:
    scale = 5.0


CONFIG = Config()


class Block(nn.Module):
    """A feed-forward network with attributes that are called as globals of this script are."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 2.0
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.cfg = CONFIG

    def factor(self, x: Tensor) -> Any:
        return self.step

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(x))) * self.factor(x)


def applied(cls: type[Block]) -> nn.Module:
    model = nn.Sequential(cls(), cls()).eval()
    apply_(model, [Activation24(from_step=9)], probe=features(3, 8))
    return model


def test_a_global_that_only_an_attribute_is_called_like_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nested(Block):
        def factor(self, x: Tensor) -> Any:
            def inner() -> float:
                return sum(block.step for block in (self, self))

            return inner()

    for cls in (Block, Nested):
        model, x = applied(cls), features(3, 8)
        expected = model(x)
        for number in range(3):
            monkeypatch.setattr(HERE, "step", number)
            assert torch.equal(model(x), expected)
        monkeypatch.setattr(HERE, "step", 0)


def test_a_list_that_only_an_attribute_is_called_like_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HERE, "fc1", [Restless()])
    report = plan(nn.Sequential(Block(), Block()), [Activation24()], probe=features(3, 8))
    assert "forward writes" not in str(report)
    assert "100%" in str(report)


def test_an_attribute_that_only_a_global_is_called_like_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(Block):
        def factor(self, x: Tensor) -> Any:
            return scale if self.cfg else 1.0

    model = applied(Reads)
    monkeypatch.setattr(Config, "scale", 7.0)
    model(features(3, 8))
    model[0].scale = 3.0  # type: ignore[assignment]  # which no graph would read


FORMS: dict[str, Callable[[], float]] = {
    "named": lambda: scale,
    "in a generator": lambda: sum(scale for _ in range(1)),
    "in a nested function": lambda: (lambda: scale)(),
    "in a class": lambda: type("Made", (), {"value": scale}).value,  # type: ignore[attr-defined]
    "by its name": lambda: globals()["scale"],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_global_that_is_read_is_watched_however_it_is(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(Block):
        def factor(self, x: Tensor) -> Any:
            return FORMS[form]()

    model = applied(Reads)
    monkeypatch.setattr(HERE, "scale", 3.0)
    with pytest.raises(PassError, match=rf"scale of {__name__} was 2\.0 .* is 3\.0"):
        model(features(3, 8))
