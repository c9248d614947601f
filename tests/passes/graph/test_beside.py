"""What a forward writes outside of its module: refused by name, and no proxy stays in it."""

from __future__ import annotations

import array
import itertools
import sys
import threading
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from act24.passes import trace

HERE = sys.modules[__name__]
LAST: Any = None
CALLS = 0
LIST: list[Any] = []
QUEUE: deque[Any] = deque(maxlen=4)
BY_NAME: OrderedDict[str, Any] = OrderedDict(lists=[])
COUNTED: Counter[str] = Counter()
NUMBERS, BYTES = array.array("d", [0.0]), bytearray(b"a")
SPACE, LOCAL, MODULE = types.SimpleNamespace(n=0), threading.local(), types.ModuleType("elsewhere")
NUMBER = itertools.count()
LINEAR, TENSOR = nn.Linear(2, 2), torch.zeros(2)


class Meter:
    n = 0


class Base(nn.Module):
    """A network of linears whose forward also does `note`."""

    last: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def note(self, x: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        return self.down(F.relu(self.up(x)))


def rebinds(self: Any, x: Tensor) -> None:
    global LAST
    LAST = x


def makes(self: Any, x: Tensor) -> None:
    global NEW
    NEW = x  # type: ignore[name-defined]


def counts(self: Any, x: Tensor) -> None:
    global CALLS
    CALLS += 1


def by_string(self: Any, x: Tensor) -> None:
    globals()["LAST"] = x
    for name in ("last",):
        setattr(Meter, name, x)


def holds(self: Any, x: Tensor) -> None:
    LIST.append(("x", x))
    QUEUE.append(x)
    BY_NAME["lists"].append(x)
    BY_NAME["x"] = x
    Meter.last = SPACE.last = LOCAL.last = MODULE.last = LINEAR.last = TENSOR.last = rebinds.last = x  # type: ignore


def of_the_class(self: Any, x: Tensor) -> None:
    self.__class__.last = x


def of_its_type(self: Any, x: Tensor) -> None:
    type(self).kept = x


def adds(self: Any, x: Tensor) -> None:
    COUNTED["x"] += 1
    NUMBERS[0] += 1
    BYTES.append(1)
    SPACE.n += 1
    MODULE.n = getattr(MODULE, "n", 0) + 1  # type: ignore[attr-defined]
    next(NUMBER)


def _around() -> Callable[[Any, Tensor], None]:
    seen = 0

    def counting(self: Any, x: Tensor) -> None:
        nonlocal seen
        seen += 1

    return counting


@pytest.mark.parametrize(
    ("note", "said"),
    [
        (rebinds, ["LAST"]),
        (makes, ["NEW"]),
        (counts, ["CALLS"]),
        (by_string, ["LAST", "last of Meter"]),
        (
            holds,
            ["LIST", "QUEUE", "BY_NAME"]
            + [f"last of {n}" for n in ("Meter", "SPACE", "LOCAL", "MODULE", "LINEAR", "TENSOR", "rebinds")],
        ),
        (of_the_class, ["last of Writes"]),
        (of_its_type, ["kept of Writes"]),
        (adds, ["COUNTED", "NUMBERS", "BYTES", "n of SPACE", "n of MODULE", "NUMBER"]),
        (_around(), ["seen in the closure of counting"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("of", ["root", "block"])
def test_what_a_forward_writes_outside_is_refused_and_no_proxy_stays(
    note: Callable[[Any, Tensor], None], said: list[str], of: str
) -> None:
    writes = type("Writes", (Base,), {"note": note})
    model = writes() if of == "root" else nn.Sequential(writes(), writes())
    regions, reasons = trace(model)
    assert {type(region.module) for region in regions} == {nn.Linear}
    reason = next(iter(reasons.values()))
    assert "forward writes" in reason
    for name in said:
        assert name in reason
    assert not list(_proxies([vars(HERE), vars(Meter), vars(SPACE), vars(LOCAL), vars(MODULE), vars(LINEAR)]))
    assert not list(_proxies([vars(TENSOR), vars(rebinds), {**vars(writes)}, {**vars(Base)}]))
    assert LAST is None
    assert not hasattr(HERE, "NEW")


def _proxies(value: Any) -> Any:
    if issubclass(type(value), fx.Proxy):
        yield value
    elif isinstance(value, dict | types.MappingProxyType):
        yield from _proxies([*value.values()])
    elif isinstance(value, list | tuple | deque):
        for part in value:
            yield from _proxies(part)


def test_what_others_write_meanwhile_stays() -> None:
    """Only proxies are taken out: the rest may be another thread's."""

    def note(self: Any, x: Tensor) -> None:
        LIST.extend([1, x])
        SPACE.n = 7

    LIST.clear()
    SPACE.n = 0
    model = type("Writes", (Base,), {"note": note})()
    trace(model)
    assert LIST == [1]
    assert SPACE.n == 7
