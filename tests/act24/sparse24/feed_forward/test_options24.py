"""Options24 checks itself where it is made, and stays a constant of graphs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import fx

from act24.options import OptionError
from act24.sparse24.feed_forward.methods import BACKWARDS, ESTIMATORS, METHODS
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.format.products import Measured, Product

WRONG: dict[str, Any] = {
    "function": st.sampled_from(["gelu", "RELU2", "", None, 1]),
    "method": st.text().filter(lambda name: name not in METHODS),
    "backward": st.sampled_from(["exact", "Dense", None, True]),
    "estimator": st.sampled_from(["straight", "", None]),
    "precision": st.sampled_from(["e4m3", "float16", torch.bfloat16]),
    "dense_ratio": st.one_of(
        st.floats(min_value=1.0001), st.floats(max_value=-1e-6), st.just(float("nan")), st.just("0.1")
    ),
    "token_permutation": st.sampled_from(["random", None]),
    "statistics": st.sampled_from([1, "yes", None]),
    "kernels": st.sampled_from([0, "no", None]),
    "recompute": st.sampled_from([2, "yes"]),
    "algorithms": st.sampled_from([[1], (1,), ((1, 2),), {"y": 1}, ((("y", 1, 2), (0, 1.0, 1.0)),)]),
}


@given(data=st.data(), name=st.sampled_from([*WRONG]))
def test_a_wrong_value_of_any_field_is_named(data: st.DataObject, name: str) -> None:
    assert {*WRONG} == {*Options24._fields}
    with pytest.raises(OptionError, match=rf"^Options24: {name}"):
        Options24(**{name: data.draw(WRONG[name])})
    with pytest.raises(OptionError, match=rf"^Options24: {name}"):
        Options24()._replace(**{name: data.draw(WRONG[name])})


def test_what_equals_options_that_were_made_before_is_checked_all_the_same() -> None:
    assert Options24(statistics=True).statistics
    with pytest.raises(OptionError, match="statistics has to be true or false, got 1"):
        Options24(statistics=1)  # type: ignore[arg-type]


def test_every_combination_of_the_tables_is_taken_or_named() -> None:
    for method in METHODS:
        for estimator in ESTIMATORS:
            for backward in BACKWARDS:
                given = {"method": method, "estimator": estimator, "backward": backward}
                if backward in ESTIMATORS[estimator].backwards:
                    assert Options24(**given)._asdict() | given == Options24(**given)._asdict()
                else:
                    with pytest.raises(OptionError, match="does not go with backward"):
                        Options24(**given)


def test_it_is_a_tuple_that_copies_and_is_pickled() -> None:
    product, measured = Product("y", 1, 2, 3), Measured(0, float("inf"), 1.0)
    options = Options24(method="mvue", algorithms=((product, measured),))
    assert isinstance(options, tuple)
    assert copy.deepcopy(options) == pickle.loads(pickle.dumps(options)) == options
    assert hash(options) == hash(Options24(*options))


def test_it_is_a_constant_of_an_fx_graph() -> None:
    options = Options24(method="soft_dynamic", backward="sparse", dense_ratio=0.25)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(activation24, (x, None, None, None, None, None, None, None, options)))
    module = fx.GraphModule({}, graph)
    hidden = torch.randn(8, 16)
    expected, _ = activation24(hidden, None, None, None, None, options=options)
    assert torch.equal(module(hidden)[0], expected)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden)[0], expected)
