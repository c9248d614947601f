"""Names of places: few patterns that stand for those places and no others."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act24.passes.graph.places import Pattern, patterns, shared, text

NAMES = st.lists(st.lists(st.sampled_from(["0", "1", "2", "a", "b_x"]), min_size=1, max_size=4).map(".".join))


def every(found: list[Pattern]) -> list[str]:
    return [".".join(parts) for pattern in found for parts in itertools.product(*pattern)]


@given(NAMES)
def test_patterns_stand_for_each_name_once_and_for_no_other(names: list[str]) -> None:
    assert sorted(every(patterns(names))) == sorted(set(names))


@pytest.mark.parametrize(
    ("names", "written"),
    [
        ([f"layers.{i}.{n}_proj" for i in range(12) for n in "qkvo"], ["layers.{0..11}.{q,k,v,o}_proj"]),
        ([f"h.{i}.w{j}" for i in (0, 2, 1) for j in (1, 2)], ["h.{0..2}.{w1,w2}"]),
        ([f"l.{i}.experts.{j}.up" for i in range(3) for j in range(8)], ["l.{0..2}.experts.{0..7}.up"]),
        (["l.0.up", "l.1.up", "l.3.up", "l.1.down"], ["l.{0,3}.up", "l.1.{up,down}"]),
        (["l.0.mlp", "head"], ["l.0.mlp", "head"]),
        (["the model"], ["the model"]),
        ([], []),
    ],
)
def test_a_pattern_is_written_as_a_shell_would(names: list[str], written: list[str]) -> None:
    assert [text(pattern) for pattern in patterns(names)] == written


def test_what_they_share_leaves_something_of_each() -> None:
    assert shared(patterns(["m.0.a", "m.0.b.c"])) == 2
    assert shared(patterns(["m.0.a", "m.0"])) == 1
    assert shared(patterns(["m.0.a", "head"])) == 0
    assert shared(patterns(["m.0.a"])) == 2
