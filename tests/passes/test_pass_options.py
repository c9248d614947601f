"""No option of a pass takes what it should not, and every refusal says which; from recipes, with those of all
other tables, in `tests/recipes/test_wrong_values.py`.

The wrong values are drawn by what a field's annotation is made of: a name outside of the choices, a number
that is not finite or negative, and whatever is of another kind altogether.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from act24.errors import Act24Error
from act24.options import OptionError
from act24.passes import REGISTRY, Cola, plan
from tests.passes.toys import llama

#: What passes need to be made at all.
NEEDED = {name: {"attn_rank": 8, "mlp_rank": 8} for name in ("low_rank", "cola", "lost")}

FIELDS = [
    (name, field.name)
    for name, cls in REGISTRY.items()
    for field in dataclasses.fields(cls)
    if not field.metadata.get("python_only")
]
assert len(FIELDS) > 40

WORDS = st.text(max_size=12).map(lambda text: f"no-{text}")  # no choice of any field begins so
NOT_FINITE = st.sampled_from([math.inf, -math.inf, math.nan])
NEGATIVE = st.integers(max_value=-1) | st.floats(max_value=-1e-9, allow_infinity=False)
HUGE = st.sampled_from([10**400, -(10**400)])
BEYOND_USE = st.integers(min_value=10**10)  # no rank, step or count of anything
LISTS = st.lists(st.integers(), min_size=1, max_size=2).map(tuple)
SELECTORS = st.sampled_from(["re:(", "re:[z-a]", "class:", "klass:LlamaMLP", ""]).map(
    lambda text: ("*", text)
)


def wrong_values(name: str, field: str) -> st.SearchStrategy[Any]:
    """What a field must refuse, all of it sayable in TOML."""
    kinds = kinds_of(get_type_hints(REGISTRY[name])[field])
    if bool in kinds:
        return st.integers() | WORDS | LISTS | NOT_FINITE
    if int in kinds:
        return NOT_FINITE | NEGATIVE | HUGE | BEYOND_USE | WORDS | LISTS | st.booleans() | st.just(2.5)
    if float in kinds:
        return NOT_FINITE | NEGATIVE | HUGE | WORDS | LISTS | st.booleans()
    if tuple in kinds:
        return SELECTORS | LISTS | WORDS | st.integers() | st.booleans()
    assert str in kinds, f"what would be wrong for {name}.{field}?"
    return WORDS | LISTS | st.integers() | st.booleans() | NOT_FINITE


def kinds_of(hint: Any) -> set[type]:
    if get_origin(hint) in (Union, types.UnionType):
        return {kind for part in get_args(hint) for kind in kinds_of(part)}
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    return {get_origin(hint) or hint}


def refusal(make: Any) -> list[str]:
    """What is said, line by line."""
    with pytest.raises(Act24Error) as caught:
        make()
    return str(caught.value).split("\n")


@pytest.mark.parametrize(("name", "field"), FIELDS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_wrong_values_are_refused_from_python(name: str, field: str, data: st.DataObject) -> None:
    beyond_toml = st.sampled_from([object(), {}, b"2", 1j, int])
    value = data.draw(wrong_values(name, field) | beyond_toml)
    (said,) = refusal(lambda: REGISTRY[name](**{**NEEDED.get(name, {}), field: value}))
    assert said.startswith(f"{name}: ")
    assert field in said


@pytest.mark.parametrize(
    ("name", "field"), [(n, f) for n, f in FIELDS if int in kinds_of(get_type_hints(REGISTRY[n])[f])]
)
def test_no_number_of_anything_is_without_bound(name: str, field: str) -> None:
    for value in (10**18, 10**10):
        with pytest.raises(OptionError, match=rf"{field} has to be .*\d at most, got {value}"):
            REGISTRY[name](**{**NEEDED.get(name, {}), field: value})


@pytest.mark.parametrize("name", REGISTRY)
def test_defaults_are_options(name: str) -> None:
    """What the tests above start from is not refused itself."""
    REGISTRY[name](**NEEDED.get(name, {}))


def test_a_remedy_can_be_followed_as_it_is_written() -> None:
    """Lists of selectors, as errors and recipes spell them."""
    model, written = llama(num_key_value_heads=1), re.compile(r"\[['\"].*?\]")
    needed = {"attn_rank": 16, "mlp_rank": 8}

    def remedy(**options: Any) -> Any:
        with pytest.raises(Act24Error) as refused:
            plan(model, [Cola(**needed, **options)])
        return ast.literal_eval(written.findall(str(refused.value))[-1])

    ignored = remedy()
    assert ignored == ["model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj"]
    report = plan(model, [Cola(**needed, ignore=ignored)])
    assert len(report.rows) == 2 * 5
    with pytest.raises(OptionError, match=r"write \['\*\.q_proj'\]"):
        Cola(**needed, targets="*.q_proj")  # type: ignore[arg-type]
    passed = Cola(**needed, targets=["*.q_proj"])  # type: ignore[arg-type]
    assert {passed: 1}[Cola(**needed, targets=("*.q_proj",))]
    assert len(plan(model, [passed]).rows) == 2
