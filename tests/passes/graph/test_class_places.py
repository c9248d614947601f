"""Methods that subclasses override: what ran is watched where it stands, and what did not is not."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import PassError, Weight24, apply_


class Act:
    def run(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Scaled(Act):
    def run(self, x: Tensor) -> Tensor:
        return 2 * F.relu(x)


class Inherits(Act):
    def run(self, x: Tensor) -> Tensor:
        return 2 * super().run(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.a, self.b, self.big = Act(), Scaled(), False
        self.inherits, self.held = Inherits(), types.SimpleNamespace(one=Act(), other=Scaled)

    def act(self, x: Tensor) -> Tensor:
        return (self.b if self.big else self.a).run(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class Middle(Block):
    """Overrides, and is not what runs."""

    def act(self, x: Tensor) -> Tensor:
        return super().act(x)


class Last(Middle):
    def act(self, x: Tensor) -> Tensor:
        return Block.act(self, x)


class OfClasses(Block):
    def act(self, x: Tensor) -> Tensor:
        return (self.held.other if self.big else Act)().run(x) + self.held.one.run(x)


class Inheriting(Block):
    def act(self, x: Tensor) -> Tensor:
        return self.inherits.run(x)


def applied(cls: type[Block]) -> nn.Module:
    model = nn.Sequential(cls(), cls()).eval()
    apply_(model, [Weight24(from_step=9)], probe=features(3, 8))
    return model


@pytest.mark.parametrize("cls", [Block, Middle, Last, OfClasses, Inheriting])
def test_an_override_that_does_not_run_is_no_change(cls: type[Block]) -> None:
    x = features(3, 8)
    torch.manual_seed(0)
    expected = nn.Sequential(cls(), cls())(x)
    torch.manual_seed(0)
    assert torch.equal(applied(cls)(x), expected)


def another(self: Any, x: Tensor) -> Tensor:
    return -F.relu(x)


@pytest.mark.parametrize(
    ("cls", "changed", "name"),
    [
        (Block, Act, "run"),
        (OfClasses, Act, "run"),
        (Inheriting, Act, "run"),
        (Inheriting, Inherits, "run"),
        (Middle, Block, "act"),
        (Middle, Middle, "act"),
        (Last, Block, "act"),
    ],
)
def test_a_method_that_ran_is_watched_where_it_stands(
    cls: type[Block], changed: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = applied(cls), features(3, 8)
    model(x)
    monkeypatch.setattr(changed, name, another)
    with pytest.raises(PassError, match=rf"{name} of \w+ was .*{changed.__name__}\.{name} .* is .*another"):
        model(x)


def test_an_override_that_does_not_run_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = applied(Block), features(3, 8)
    monkeypatch.setattr(Scaled, "run", another)
    model(x)
    monkeypatch.setattr(Last, "act", another)
    model(x)
