"""Values that code reads by names that it makes up, all at once, or by way of a cache; and settings of
modules that the graph calls as they are."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable
from operator import attrgetter as renamed
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import PassError, Weight24, apply_, trace
from act24.passes.graph.region import Region

TEMPLATE = "{0.a_scale}"


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    a_scale: float = 1.0


CONFIG = Config()


@functools.lru_cache
def settings() -> Config:
    return CONFIG


@functools.lru_cache
def settings_of(_: str) -> Config:
    return CONFIG


@functools.cache
def scale() -> float:
    return CONFIG.a_scale


class Network(nn.Module):
    """A network with a factor read in some way."""

    def __init__(self, factor: Callable[[Any], float]) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.0)
        self.cfg, self.kind, self.names, self.factor = CONFIG, "a", ["scale", "a_scale"], factor

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.relu(self.up(x)))) * self.factor(self)


def by_keywords(scale: float, a_scale: float) -> float:
    return scale * a_scale


def by_helper(held: Any, name: str) -> Any:
    return getattr(held, name, "scale")


def by_variable(m: Any) -> float:
    name = m.kind + "_scale"
    return getattr(m.cfg, name)


def by_list(m: Any) -> float:
    return sum(getattr(m.cfg, name) for name in m.names)


FORMS: dict[str, Callable[[Any], float]] = {
    "asdict": lambda m: by_keywords(**dataclasses.asdict(m.cfg)),
    "astuple": lambda m: dataclasses.astuple(m.cfg)[1],
    "fields": lambda m: [getattr(m.cfg, f.name) for f in dataclasses.fields(m.cfg)][1],
    "vars": lambda m: by_keywords(**vars(m.cfg)),
    "members": lambda m: dict(inspect.getmembers(m.cfg))["a_scale"],
    "made up": lambda m: getattr(m.cfg, f"{m.kind}_scale"),
    "made up, beside a default": lambda m: getattr(m.cfg, f"{m.kind}_scale", m.cfg.scale + abs(2)),
    "helper": lambda m: by_helper(m.cfg, f"{m.kind}_scale"),
    "variable": by_variable,
    "list": by_list,
    "one of two": lambda m: getattr(m.cfg, "scale" if m.kind == "b" else "a_scale"),
    "attrgetter": lambda m: operator.attrgetter("cfg.a_scale")(m),
    "attrgetter renamed": lambda m: renamed(f"cfg.{m.kind}_scale")(m),
    "past getattr": lambda m: object.__getattribute__(m.cfg, m.kind + "_scale"),
    "format": lambda m: float("{c.a_scale:.3f}".format(c=m.cfg)),  # noqa: UP032
    "format elsewhere": lambda m: float(TEMPLATE.format(m.cfg)),
    "cache": lambda m: settings().a_scale,
    "cached value": lambda m: scale(),
    "setting of a leaf": lambda m: 1 + m.drop.p,
    "setting of a leaf by name": lambda m: 1 + getattr(m.drop, "p"),  # noqa: B009
}


def check(region: Region) -> None:
    for fact in region.frozen.facts:
        fact.check()


def test_what_is_read_by_names_that_code_makes_up_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    for of in (settings, scale):
        of.cache_clear()
        of()
    model = nn.ModuleList(Network(form) for form in FORMS.values())
    regions, unclean = trace(model)
    assert not unclean
    for region in regions:
        assert not region.frozen.unwatched
        check(region)
    monkeypatch.setattr(CONFIG, "a_scale", 3.0)
    scale.cache_clear()
    for layer in model:
        layer.drop.p = 0.5  # type: ignore[union-attr]
    for name, region in zip(FORMS, regions, strict=True):
        with pytest.raises(PassError, match=r"drop\.p was" if "leaf" in name else "scale.* was"):
            check(region)
    scale.cache_clear()


def test_names_that_are_constants_watch_no_more_than_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(m: Any) -> float:
        total = 0.0
        for name in ("scale", "scale"):
            total += getattr(m.cfg, name, abs(m.down.in_features)) + operator.attrgetter("cfg.scale")(m)
        return total + len(f"{m.kind}_scale")

    model = nn.ModuleList([Network(constant)])
    ((region,), _) = trace(model)
    monkeypatch.setattr(CONFIG, "a_scale", 3.0)
    model[0].drop.p = 0.5  # type: ignore[union-attr]
    check(region)
    assert any(fact.text == "cfg.scale" for fact in region.frozen.facts)


def test_a_cache_by_arguments_is_named_and_a_leafs_setting_is_heeded_or_refused() -> None:
    ((region,), _) = trace(nn.ModuleList([Network(lambda m: settings_of("a").scale)]))
    assert region.frozen.unwatched == (f"what settings_of of {__name__} gives",)
    x = features(3, 8)
    model = nn.Sequential(Network(lambda m: 1 + m.drop.p), Network(lambda m: 2.0)).eval()
    stock = copy.deepcopy(model)
    apply_(model, [Weight24(from_step=9, method="ste")])
    for one in (model, stock):
        one[1].drop.p = 0.5  # type: ignore[union-attr]
    assert torch.equal(model(x), stock(x))  # its graph only calls it
    model[0].drop.p = 0.5  # type: ignore[union-attr]
    with pytest.raises(PassError, match=r"drop\.p was 0\.0 when the model was traced, and is 0\.5"):
        model(x)
