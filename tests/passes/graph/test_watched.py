"""Plain values that tracing freezes, wherever they lie: to change one later is an error that names it."""

from __future__ import annotations

import array
import functools
import operator
import sys
import time
import types
import weakref
from collections import UserList, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Trunk, features

from act24.passes import PassError, Weight24, apply_, plan

HERE = sys.modules[__name__]
NUMBER = 2.0
TABLE: dict[str, Any] = {"scale": 2.0, "deep": {"er": [1.0, 2.0]}, "act": F.relu}
LONG = {number: float(number) for number in range(500)}
LONGER = {number: float(number) for number in range(5000)}
ACTIVATION: Callable[[Tensor], Tensor] = torch.tanh
SEEN: list[int] = []
RAW = array.array("d", [2.0])


class Settings:
    """As configurations often are: defaults in the class."""

    scale = 2.0
    unread = 0


@dataclass(slots=True)
class Slotted:
    scale: float = 2.0


class Mapped:
    """Finds its attributes as it likes, as transformers' configurations do."""

    def __init__(self) -> None:
        self.held = {"scale": 2.0}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["held"][name]
        except KeyError:
            raise AttributeError(name) from None


GLOBAL = Settings()
elsewhere = types.ModuleType("elsewhere")
elsewhere.scale = 2.0  # type: ignore[attr-defined]
EMPTY = types.SimpleNamespace()


class Base(nn.Module):
    """A feed-forward network of which only `factor` differs."""

    shared = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.cfg: Any = {"scale": 2.0, "list": [2.0, 3.0]}
        self.settings, self.slotted, self.mapped = Settings(), Slotted(), Mapped()
        self.names = ["a"]
        self.flags = {"on"}
        self.listing = UserList([2.0])

    def factor(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.factor(self.up(x))))


def helper(x: Tensor) -> Tensor:
    return inner(x) * NUMBER


def inner(x: Tensor) -> Tensor:
    return x * TABLE["scale"]


def closure(values: list[float]) -> Callable[[Tensor], Tensor]:
    def scaled(x: Tensor) -> Tensor:
        return x * values[0]

    return scaled


CLOSED = [2.0]
SCALED = closure(CLOSED)


def counter() -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    factor = 2.0

    def scaled(x: Tensor) -> Tensor:
        return x * factor

    def rebind(value: float) -> None:
        nonlocal factor
        factor = value

    return scaled, rebind


REBOUND, rebind = counter()


def with_default(x: Tensor, factors: list[float] = [2.0]) -> Tensor:  # noqa: B006
    return x * factors[0]


def tagged(x: Tensor) -> Tensor:
    return x * tagged.scale  # type: ignore[attr-defined]


tagged.scale = 2.0  # type: ignore[attr-defined]

WEAK = weakref.ref(GLOBAL)
GIVES = {"scale": 2.0}.get
SET, WEAK_SET = {GLOBAL}, weakref.WeakSet([GLOBAL])
GETS, GETS_SCALE = operator.attrgetter("scale"), functools.partial(getattr, GLOBAL, "scale")


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def twice(*args: Any) -> Any:
        return function(*args) * NUMBER

    return twice


#: What a forward reads, by name; then what is done to it, and what the error says.
READS: dict[str, Callable[[Any, Any], Any]] = {
    "class_attribute": lambda self, x: x * self.shared,
    "class_of": lambda self, x: x * Base.shared,
    "dictionary": lambda self, x: x * self.cfg["scale"],
    "missing_key": lambda self, x: x * self.cfg.get("other", 1.0),
    "listed": lambda self, x: x * self.cfg["list"][1],
    "length": lambda self, x: x * len(self.names),
    "member": lambda self, x: x * 2 if "on" in self.flags else x,
    "configuration": lambda self, x: x * self.settings.scale,
    "slots": lambda self, x: x * self.slotted.scale,
    "mapping": lambda self, x: x * self.mapped.scale,
    "absent": lambda self, x: x * getattr(EMPTY, "scale", 1.0),
    "global_table": lambda self, x: x * TABLE["deep"]["er"][1],
    "global_object": lambda self, x: x * GLOBAL.scale,
    "global_function": lambda self, x: ACTIVATION(x),
    "function_in_a_table": lambda self, x: TABLE["act"](x),
    "in_a_module": lambda self, x: x * elsewhere.scale,  # type: ignore[attr-defined]
    "in_a_long_table": lambda self, x: x * LONG[7],
    "helpers_global": lambda self, x: helper(x),
    "helpers_table": lambda self, x: helper(x),
    "property_of": lambda self, x: x * self.current,
    "list_in_a_closure": lambda self, x: SCALED(x),
    "closure_rebound": lambda self, x: REBOUND(x),
    "default": lambda self, x: with_default(x),
    "of_a_function": lambda self, x: tagged(x),
    "partial": lambda self, x: PARTIAL(x),
    "decorated": doubled(lambda self, x: x),
    "method": lambda self, x: x,
    "weak": lambda self, x: x * WEAK().scale,  # type: ignore[union-attr]
    "bound": lambda self, x: x * GIVES("scale"),  # type: ignore[operator]
    "listing": lambda self, x: x * self.listing[0],
}

UNDO: list[tuple[list[float], int, float]] = []


def exchange(held: list[float], index: int, value: float) -> None:
    """As `monkeypatch.setitem`, which takes no lists."""
    UNDO.append((held, index, held[index]))
    held[index] = value


PARTIAL = functools.partial(lambda x, factors: x * factors[0], factors=[2.0])

CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "class_attribute": lambda m, p: p.setattr(type(m), "shared", 3.0),
    "class_of": lambda m, p: p.setattr(Base, "shared", 3),
    "dictionary": lambda m, p: p.setitem(m.cfg, "scale", 3.0),
    "missing_key": lambda m, p: p.setitem(m.cfg, "other", 3.0),
    "listed": lambda m, p: exchange(m.cfg["list"], 1, 9.0),
    "length": lambda m, p: m.names.append("b"),
    "member": lambda m, p: m.flags.clear(),
    "configuration": lambda m, p: setattr(m.settings, "scale", 3.0),
    "slots": lambda m, p: setattr(m.slotted, "scale", 3.0),
    "mapping": lambda m, p: m.mapped.held.update(scale=3.0),
    "absent": lambda m, p: p.setattr(EMPTY, "scale", 3.0, raising=False),
    "global_table": lambda m, p: exchange(TABLE["deep"]["er"], 1, 9.0),
    "global_object": lambda m, p: p.setattr(HERE, "GLOBAL", types.SimpleNamespace(scale=3.0)),
    "global_function": lambda m, p: p.setattr(HERE, "ACTIVATION", torch.relu),
    "function_in_a_table": lambda m, p: p.setitem(TABLE, "act", F.silu),
    "in_a_module": lambda m, p: p.setattr(elsewhere, "scale", 3.0),
    "in_a_long_table": lambda m, p: p.setitem(LONG, 7, 3.0),
    "helpers_global": lambda m, p: p.setattr(HERE, "NUMBER", 3.0),
    "helpers_table": lambda m, p: p.setitem(TABLE, "scale", 3.0),
    "property_of": lambda m, p: setattr(m.settings, "scale", 3.0),
    "list_in_a_closure": lambda m, p: exchange(CLOSED, 0, 3.0),
    "closure_rebound": lambda m, p: rebind(3.0),
    "default": lambda m, p: exchange(with_default.__defaults__[0], 0, 3.0),
    "of_a_function": lambda m, p: p.setattr(tagged, "scale", 3.0),
    "partial": lambda m, p: exchange(PARTIAL.keywords["factors"], 0, 3.0),
    "decorated": lambda m, p: p.setattr(HERE, "NUMBER", 3.0),
    "method": lambda m, p: p.setattr(Base, "forward", lambda s, x: x),
    "weak": lambda m, p: p.setattr(GLOBAL, "scale", 3.0),
    "bound": lambda m, p: p.setitem(GIVES.__self__, "scale", 3.0),
    "listing": lambda m, p: exchange(m.listing, 0, 3.0),
}
SAID = {
    "class_attribute": r"shared of Class_attribute was 2\.0.* 3\.0",
    "class_of": r"shared of \w+ was 2\.0 .* is 3:",
    "dictionary": r"mlp\.cfg\['scale'\] was 2\.0",
    "missing_key": r"the names in \w*\.?cfg was \('scale', 'list'\)",
    "listed": r"cfg\['list'\]\[1\] was 3\.0",
    "length": r"the length of \w*\.?names was 1 .* is 2",
    "member": r"what is in \w*\.?flags was frozenset\({'on'}\)",
    "configuration": r"settings\.scale was 2\.0",
    "slots": r"slotted\.scale was 2\.0",
    "mapping": r"mapped\.(held\['scale'\]|scale) was 2\.0",
    "absent": r"EMPTY of \w+\.scale was not there",
    "global_table": r"TABLE of \w+\['deep'\]\['er'\]\[1\] was 2\.0",
    "global_object": r"GLOBAL of \w+\.scale was 2\.0",
    "global_function": r"ACTIVATION of \w+ was .*tanh.* is .*relu",
    "function_in_a_table": r"TABLE of \w+\['act'\] was .*relu",
    "in_a_module": r"elsewhere of \w+\.scale was 2\.0",
    "in_a_long_table": r"what is in LONG of \w+ was \(0, 0\.0, 1",
    "helpers_global": r"NUMBER of \w+ was 2\.0",
    "helpers_table": r"TABLE of \w+\['scale'\] was 2\.0",
    "property_of": r"settings\.scale was 2\.0",
    "list_in_a_closure": r"values in the closure of closure\.scaled\[0\] was 2\.0",
    "closure_rebound": r"factor in the closure of counter\.scaled was 2\.0",
    "default": r"__defaults__ of with_default\[0\]\[0\] was 2\.0",
    "of_a_function": r"tagged\.scale was 2\.0",
    "partial": r"PARTIAL of \w+\.keywords\['factors'\]\[0\] was 2\.0",
    "decorated": r"NUMBER of \w+ was 2\.0",
    "method": r"forward of \w+ was .*Base\.forward",
    "weak": r"WEAK of \w+\(\)\.scale was 2\.0",
    "bound": r"GIVES of \w+\.__self__\['scale'\] was 2\.0",
    "listing": r"listing\[0\] was 2\.0",
}


def block(name: str) -> type[Base]:
    current = property(lambda self: self.settings.scale)
    return type(name.capitalize(), (Base,), {"factor": READS[name], "current": current})


@pytest.mark.parametrize("name", CHANGES)
def test_a_frozen_value_that_changes_is_an_error_that_names_it(name: str, monkeypatch: Any) -> None:
    model = Trunk(block(name), layers=1).eval()
    stock = model.blocks[0].mlp
    x = features(4, 16)
    expected = model(x)
    pipeline = apply_(model, [Weight24(scope="mlp", from_step=5)])
    assert torch.equal(model(x), expected)
    assert not pipeline.report.unwatched
    CHANGES[name](stock, monkeypatch)
    message = SAID[name]
    try:
        with pytest.raises(PassError, match=message):
            model(x)
        with pytest.raises(PassError, match=message):
            pipeline.lower_(0)
    finally:
        rebind(2.0)
        while UNDO:
            held, index, before = UNDO.pop()
            held[index] = before


@pytest.mark.parametrize("name", ["configuration", "global_object", "dictionary", "helpers_table"])
def test_what_nobody_reads_may_change(name: str, monkeypatch: Any) -> None:
    model = Trunk(block(name), layers=1).eval()
    settings = model.blocks[0].mlp.settings
    apply_(model, [Weight24(scope="mlp", from_step=5)])
    monkeypatch.setattr(Settings, "unread", 1)
    monkeypatch.setattr(HERE, "LONG", {})
    settings.unread = settings.new = 2
    model(features(4, 16))


def test_a_class_attribute_is_not_hidden_by_one_of_the_module() -> None:
    model = Trunk(block("class_attribute"), layers=1).eval()
    apply_(model, [Weight24(scope="mlp", from_step=5)])
    mlp = model.blocks[0].mlp
    assert mlp.shared == 2.0
    with pytest.raises(PassError, match="shared of a Class_attribute cannot be set any more"):
        mlp.shared = 3.0


def test_an_attribute_that_was_asked_for_and_absent_cannot_be_set() -> None:
    class Merges(Base):
        def factor(self, x: Tensor) -> Tensor:
            return x * 2 if getattr(self, "merged", False) else x

    model = Trunk(Merges, layers=1).eval()
    apply_(model, [Weight24(scope="mlp", from_step=5)])
    with pytest.raises(PassError, match="merged of a Merges cannot be set any more"):
        model.blocks[0].mlp.merged = True


def test_what_cannot_be_compared_is_named_in_the_report() -> None:
    class Looks(Base):
        def __init__(self) -> None:
            super().__init__()
            self.index = 7

        def factor(self, x: Tensor) -> Tensor:
            return x * LONGER[self.index] * float(RAW[0])

    report = plan(Trunk(Looks, layers=1), [Weight24(scope="mlp")])
    assert {*report.unwatched} == {f"LONGER of {__name__} (5,000 entries)", f"RAW of {__name__} (array)"}
    assert (
        f"frozen by tracing, and not watched: LONGER of {__name__} (5,000 entries)"
        in str(report).splitlines()
    )


def test_what_has_no_names_or_takes_them_itself_is_named_in_the_report() -> None:
    class Reads(Base):
        def factor(self, x: Tensor) -> Tensor:
            return x * (next(iter(SET)).scale + next(iter(WEAK_SET)).scale) * GETS(GLOBAL) * GETS_SCALE()

    unwatched = plan(Trunk(Reads, layers=1), [Weight24(scope="mlp")]).unwatched
    found = {
        name for name in ("SET", "WEAK_SET", "GETS", "GETS_SCALE") for u in unwatched if f"{name} of" in u
    }
    assert (len(found), len(unwatched)) == (4, 4)


def counts(x: Tensor) -> Tensor:
    SEEN.append(len(SEEN))
    return x


@pytest.mark.parametrize("kind", ["helper", "class", "closure"])
def test_a_list_outside_that_forward_fills_is_refused(kind: str) -> None:
    seen: list[int] = []

    def closed(x: Tensor) -> Tensor:
        seen.append(1)
        return x

    class Fills(Base):
        calls: list[int] = []  # noqa: RUF012

        def factor(self, x: Tensor) -> Tensor:
            if kind == "class":
                self.calls.append(1)
            return counts(x) if kind == "helper" else closed(x) if kind == "closure" else x

    said = {
        "helper": f"SEEN of {__name__}",
        "class": "Fills.calls",
        "closure": "seen in the closure of closed",
    }
    with pytest.raises(PassError, match=f"forward writes {said[kind]}"):
        plan(nn.Sequential(Fills(), Fills()), [Weight24(scope="mlp", targets=("none",))])


class Restless:
    """In the place of another thread: while it is looked at, something is added beside it."""

    __slots__ = ("add",)

    def __init__(self, add: Callable[[object], None]) -> None:
        self.add = add

    def __reduce_ex__(self, _: object) -> Any:
        self.add(object())
        return Restless, (self.add,)


BUSY: Any = None


@pytest.mark.parametrize("kind", ["dict", "set", "deque", "object"])
def test_containers_that_others_write_into_meanwhile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"dict": {}, "set": set(), "deque": deque(), "object": types.SimpleNamespace()}[kind]
    entries: Any = held.__dict__ if kind == "object" else held
    if isinstance(entries, dict):
        entries["first"] = Restless(lambda one: entries.update({f"{id(one)}_{len(entries)}": one}))
    else:
        add = entries.add if kind == "set" else entries.append
        add(Restless(add))
    monkeypatch.setattr(HERE, "BUSY", held)

    class Reads(Base):
        def factor(self, x: Tensor) -> Tensor:
            return x if BUSY else -x

    with pytest.raises(PassError, match=f"forward writes BUSY of {__name__}"):
        plan(nn.Sequential(Reads(), Reads()), [Weight24(scope="mlp", targets=("none",))])


def test_watching_is_cheap() -> None:
    """Two microseconds a value and call, each value once however many layers read it; no tensor is read, so
    nothing waits for a device, and torch.compile sees none of it."""
    layers = [block("configuration") for _ in range(2)]
    shared = Settings()

    class Deep(layers[0]):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.settings = shared

    model = Trunk(Deep, layers=32).eval()
    pipeline = apply_(model, [Weight24(scope="mlp", from_step=5)], check=False)
    facts = pipeline.facts
    assert len([fact for fact in facts if fact.text.endswith("settings.scale")]) == 1
    assert len(facts) < 40  # of 32 layers
    assert not any(isinstance(fact.value, Tensor) for fact in facts)
    took = []
    for _ in range(20):
        start = time.perf_counter()
        for fact in facts:
            fact.check()
        took.append(time.perf_counter() - start)
    assert min(took) < len(facts) * 20e-6  # ten times what it takes here
