"""Values of modules that a forward imports as it runs: to change one later is an error that names it."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from importlib import import_module as brings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import PassError, Weight24, apply_, plan


def simple(x: Tensor) -> Tensor:
    import made_up_cfg  # type: ignore[import-not-found]

    return x * made_up_cfg.val


def taken(x: Tensor) -> Tensor:
    from made_up_cfg import val  # type: ignore[import-not-found]

    return x * val


def renamed(x: Tensor) -> Tensor:
    from made_up_cfg import val as factor  # type: ignore[import-not-found]

    return x * factor


def below(x: Tensor) -> Tensor:
    import made_up_cfg.deep  # type: ignore[import-not-found]

    return x * made_up_cfg.deep.val


def below_renamed(x: Tensor) -> Tensor:
    import made_up_cfg.deep as deep  # type: ignore[import-not-found]

    return x * deep.val


def module_taken(x: Tensor) -> Tensor:
    from made_up_cfg import deep  # type: ignore[import-not-found]

    return x * deep.val


def held(x: Tensor) -> Tensor:
    from made_up_cfg import table  # type: ignore[import-not-found]

    return x * table["val"]


def by_function(x: Tensor) -> Tensor:
    return x * importlib.import_module("made_up_cfg").val


def by_function_renamed(x: Tensor) -> Tensor:
    return x * brings("made_up_cfg").val


def by_builtin(x: Tensor) -> Tensor:
    return x * __import__("made_up_cfg").val


def by_item(x: Tensor) -> Tensor:
    return x * sys.modules["made_up_cfg"].val


def in_helper(x: Tensor) -> Tensor:
    return simple(x)


def is_there(x: Tensor) -> Tensor:
    return x * 3 if "made_up_late" in sys.modules else x


def counts(x: Tensor) -> Tensor:
    import made_up_cfg  # type: ignore[import-not-found]

    made_up_cfg.val += 1
    return x


def other(x: Tensor) -> Tensor:
    import math

    import made_up_cfg  # type: ignore[import-not-found]

    return x * made_up_cfg.val * math.pi


def made_up(x: Tensor) -> Tensor:
    return x * importlib.import_module(NAME).val


NAME = "made_up_cfg"


class Block(nn.Module):
    def __init__(self, factor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.factor = nn.Linear(8, 16), nn.Linear(16, 8), factor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.factor(self.up(x))))


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: Any = types.ModuleType("made_up_cfg")
    deep: Any = types.ModuleType("made_up_cfg.deep")
    made.deep = deep
    made.val, deep.val, made.table, made.unread, made.__path__ = 1.0, 1.0, {"val": 1.0}, 1, []
    monkeypatch.setitem(sys.modules, "made_up_cfg", made)
    monkeypatch.setitem(sys.modules, "made_up_cfg.deep", deep)
    return made


def applied(factor: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(Block(factor), Block(factor)).eval()
    x = features(3, 8)
    expected = model(x)
    apply_(model, [Weight24(from_step=9)], probe=x)
    assert torch.equal(model(x), expected)
    return model, x


READS = [
    simple,
    taken,
    renamed,
    below,
    below_renamed,
    module_taken,
    held,
    by_function,
    by_function_renamed,
    by_builtin,
    by_item,
]


@pytest.mark.parametrize("factor", [*READS, in_helper, is_there])
def test_what_a_forward_imports_is_watched(
    factor: Callable[[Tensor], Tensor], config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = applied(factor)
    config.unread = 2
    model(x)
    config.val = config.deep.val = config.table["val"] = 3.0
    monkeypatch.setitem(sys.modules, "made_up_late", types.ModuleType("made_up_late"))
    said = r"made_up_late in sys\.modules was not there" if factor is is_there else r"val.* was 1\.0 .* is 3"
    with pytest.raises(PassError, match=said):
        model(x)


def test_a_module_that_another_one_replaces_is_another_value(config: Any) -> None:
    model, x = applied(other)
    sys.modules["made_up_cfg"] = another = types.ModuleType("made_up_cfg")
    vars(another)["val"] = 3.0
    with pytest.raises(PassError, match=r"made_up_cfg\.val was 1\.0 .* is 3\.0"):
        model(x)


def test_what_a_forward_writes_into_a_module_that_it_imports_is_refused(config: Any) -> None:
    with pytest.raises(PassError, match="forward writes val of made_up_cfg"):
        plan(nn.Sequential(Block(counts), Block(counts)), [Weight24(targets=("none",))], probe=features(3, 8))


def test_modules_by_names_that_code_makes_up_are_named_in_the_report(config: Any) -> None:
    report = plan(nn.Sequential(Block(made_up), Block(made_up)), [Weight24()], probe=features(3, 8))
    assert report.unwatched == ("which modules made_up imports",)


def test_what_a_module_makes_up_is_named_in_the_report(config: Any) -> None:
    vars(config)["__getattr__"] = {"late": 1.0}.__getitem__

    def late(x: Tensor) -> Tensor:
        from made_up_cfg import late  # type: ignore[import-not-found]

        return x * late

    report = plan(nn.Sequential(Block(late), Block(late)), [Weight24()], probe=features(3, 8))
    assert report.unwatched == ("late of made_up_cfg",)
