"""What a region reads of a module in it that stays a module: by whatever way it is read, it is recorded."""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import LowRank, PassError, apply_, plan

X = features(3, 8)
RANKS = {"attn_rank": 2, "mlp_rank": 2}


class Leaf(nn.Module):
    """Reads `self.training`, so that it stays one call; it has a part."""

    kept = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.p, self.act, self.sizes = nn.Dropout(0.5), 0.5, F.relu, (1.0, 0.5)
        self.table, self.held = {"p": 0.5}, types.SimpleNamespace(p=0.5)

    def twice(self) -> float:
        return 2 * self.p

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.training else x


def matched(held: dict[str, Any]) -> float:
    match held:
        case {"p": p}:
            return p
    raise KeyError("p")


def read_by_vars(m: Any) -> float:
    return vars(m)["p"]


#: How a region reads `p` of a module in it.
WAYS: dict[str, Callable[[Any], float]] = {
    "attribute": lambda m: m.p,
    "getattr": lambda m: getattr(m, "p"),  # noqa: B009
    "attrgetter": lambda m: operator.attrgetter("p")(m),
    "vars": lambda m: vars(m)["p"],
    "dict": lambda m: m.__dict__["p"],
    "get": lambda m: m.__dict__.get("p", 7.0),
    "setdefault": lambda m: vars(m).setdefault("p", 7.0),
    "itemgetter": lambda m: operator.itemgetter("p")(vars(m)),
    "items": lambda m: next(value for name, value in vars(m).items() if name == "p"),
    "values": lambda m: [*vars(m).values()][list(vars(m)).index("p")],
    "unpacked": lambda m: {**vars(m)}["p"],
    "copied": lambda m: dict(vars(m))["p"],
    "united": lambda m: (vars(m) | {"q": 1})["p"],
    "into": lambda m: ({"q": 1} | vars(m))["p"],
    "matched": lambda m: matched(vars(m)),
    "getstate": lambda m: m.__getstate__()["p"],
    "helper": read_by_vars,
    "past getattr": lambda m: object.__getattribute__(m, "p"),
    "static": lambda m: inspect.getattr_static(m, "p"),
}


def block(read: Callable[[Any], Any], child: Callable[[], nn.Module] = nn.Dropout) -> type[nn.Module]:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.child = nn.Linear(8, 16), nn.Linear(16, 8), child()

        def forward(self, x: Tensor) -> Tensor:
            return self.child(self.down(F.relu(self.up(x)))) * read(self.child)

    return Block


def rewritten(read: Callable[[Any], Any], child: Callable[[], nn.Module] = nn.Dropout) -> Any:
    kind = block(read, child)
    model = nn.Sequential(kind(), kind()).eval()
    expected = model(X)
    report = apply_(model, [LowRank(attn_rank=8, mlp_rank=8, init="svd")]).report
    assert len(report.rows) == 4
    assert not report.unwatched
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    return model


@pytest.mark.parametrize("child", [nn.Dropout, Leaf])
@pytest.mark.parametrize("way", WAYS)
def test_a_plain_value_is_watched_by_whatever_way_it_is_read(way: str, child: Any) -> None:
    model = rewritten(WAYS[way], child)
    model[1].child.p = 0.25
    with pytest.raises(PassError, match=r"child\.p was 0\.5 when the model was traced, and is 0\.25"):
        model(X)
    model[1].child.p = 0.5
    model(X)


#: What else may be read of a module that stays; how it changes, and what is said.
ELSE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], object], str]] = {
    "part": (lambda m: m.inner.p, lambda m: setattr(m.inner, "p", 0.1), r"child\.inner\.p was 0\.5"),
    "method": (lambda m: m.twice(), lambda m: setattr(m, "p", 0.1), r"child\.p was 0\.5"),
    "table": (lambda m: m.table["p"], lambda m: m.table.update(p=1), r"child\.table\['p'\] was 0\.5"),
    "object": (lambda m: m.held.p, lambda m: setattr(m.held, "p", 1), r"child\.held\.p was 0\.5"),
    "tuple": (lambda m: m.sizes[1], lambda m: setattr(m, "sizes", (1.0, 2.0)), r"child\.sizes\[1\] was 0\.5"),
    "of class": (lambda m: m.kept, lambda m: setattr(m, "kept", 1.0), r"child\.kept was 2\.0"),
    "function": (
        lambda m: 1.0 if m.act is F.relu else 2.0,
        lambda m: setattr(m, "act", F.silu),
        r"child\.act was .*relu when .* and is .*silu",
    ),
    "hasattr": (
        lambda m: 2.0 if hasattr(m, "extra") else 1.0,
        lambda m: setattr(m, "extra", 1),
        r"child\.extra was not there",
    ),
    "default": (
        lambda m: getattr(m, "extra", 1.0),
        lambda m: setattr(m, "extra", 2.0),
        r"child\.extra was not there",
    ),
    "in vars": (
        lambda m: 2.0 if "extra" in vars(m) else 1.0,
        lambda m: setattr(m, "extra", 1),
        r"child\.extra was not there",
    ),
}


@pytest.mark.parametrize("name", ELSE)
def test_what_else_is_read_of_such_a_module_is_watched(name: str) -> None:
    read, change, said = ELSE[name]
    model = rewritten(read, Leaf)
    change(model[0].child)
    with pytest.raises(PassError, match=said):
        model(X)


@pytest.mark.parametrize("child", [nn.Dropout, Leaf])
def test_what_is_not_read_may_change(child: Any) -> None:
    model = rewritten(lambda m: vars(m).get("q", 1.0), child)
    model[0].child.p = 0.25
    model[0].child.other = 1
    model(X)
    model = rewritten(lambda m: 1.0, child)
    model[0].child.p = 0.25
    model(X)


def test_a_write_by_the_dictionary_is_one() -> None:
    def counts(m: Any) -> float:
        vars(m)["count"] = vars(m).get("count", 0) + 1
        return 1.0

    kind = block(counts)
    model: Any = nn.Sequential(kind(), kind())
    with pytest.raises(PassError, match=r"forward writes Dropout\.count"):
        plan(model, [LowRank(**RANKS)])  # type: ignore[arg-type]
    assert "count" not in vars(model[0].child)
