"""The tables of methods, estimators and backwards, and what a method from outside gets of all that reads
them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_network import network

from act24.options import OptionError
from act24.sparse24.feed_forward import forms
from act24.sparse24.feed_forward.methods import BACKWARDS, ESTIMATORS, METHODS, Method
from act24.sparse24.feed_forward.operation import FORMS, activation24, form_of
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.kernels.shared.self_check import kernel_obstacle
from act24.sparse24.pattern.token_wise import SPARSIFIERS, Dense, Selected, naive


def first_two(dense: Dense, seed: Any = None) -> Selected:
    """Of every four the first two stay, whatever they are."""
    mask = torch.arange(dense.value.shape[-1]) % 4 < 2
    return Selected(mask.expand_as(dense.value), dense.value * mask, dense.derivative * mask)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setattr(METHODS, "_records", {**METHODS})
    return METHODS.add(Method(name="first_two", summary="the first two of four", sparsifier=first_two))


@pytest.mark.usefixtures("capable_machine")
@pytest.mark.parametrize("backward", [*BACKWARDS])
def test_a_method_that_no_kernel_knows_runs_the_reference_on_a_capable_machine(
    toy: Method, backward: str
) -> None:
    """Where naive would run by kernels, whatever the products take."""
    tensors = network(bias=False)
    shape = forms.network_of(tensors)
    assert form_of(shape, Options24(backward=backward)) is not None
    options = Options24(method=toy.name, backward=backward)
    assert form_of(shape, options) is None
    for form in FORMS:
        assert form.why_not(shape, options) == 'no kernel knows the method "first_two"'
    x, weight_in, _, weight_out, bias_out = tensors
    y, _ = activation24(*tensors, options=options)
    mask = torch.arange(weight_in.shape[0]) % 4 < 2
    value = torch.relu(x @ weight_in.T).square() * mask
    torch.testing.assert_close(y, value @ weight_out.T + bias_out)


def test_a_record_cannot_name_the_kernel_of_another_sparsifier() -> None:
    with pytest.raises(OptionError, match="computes another sparsifier"):
        Method(name="wrong", summary="", sparsifier=first_two, kernel="naive")
    with pytest.raises(OptionError, match="kernel has no 'first_two'"):
        Method(name="wrong", summary="", sparsifier=first_two, kernel="first_two")
    with pytest.raises(OptionError, match="sparsifier"):
        Method(name="wrong", summary="", sparsifier="naive")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="set scaled"):
        Method(name="wrong", summary="", sparsifier=naive, remeasured=True)


def test_every_name_that_a_record_or_a_form_has_is_in_a_table() -> None:
    for method in METHODS.values():
        assert not method.in_evaluation or method.in_evaluation in METHODS
    for estimator in ESTIMATORS.values():
        assert {*estimator.backwards} <= {*BACKWARDS}
    for form in FORMS:
        assert {*form.sparsifiers} <= {*SPARSIFIERS}
        assert {*form.estimators} <= {*ESTIMATORS}
        assert {*form.backwards} <= {*BACKWARDS}


def test_kernels_check_themselves_and_are_not_used_where_they_are_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is a CPU that says it is a GPU; what one operator gives is changed."""
    from act24.sparse24.kernels.shared import self_check

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check = self_check.check_operator
    monkeypatch.setattr(self_check, "check_operator", lambda name, _: check(name, torch.device("cpu")))
    everything = tuple(self_check._CASES)
    assert {name for form in FORMS for name in form.operators} <= set(everything)
    assert kernel_obstacle.__wrapped__(gpu, everything) == ""
    for case in everything:
        name = case.partition(":")[0]
        operator = self_check.OPERATORS[name]

        def wrong(*arguments: Any, right: Any = operator.reference) -> Any:
            result = right(*arguments)
            return tuple(map(_changed, result)) if isinstance(result, tuple) else _changed(result)

        with monkeypatch.context() as patch:
            patch.setitem(self_check.OPERATORS, name, operator._replace(reference=wrong))
            assert f"{case} is wrong on this GPU" in kernel_obstacle.__wrapped__(gpu, (case,))
        with monkeypatch.context() as patch:
            patch.setitem(self_check.OPERATORS, name, operator._replace(reference=lambda *_: 1 / 0))
            assert "does not run on this GPU" in kernel_obstacle.__wrapped__(gpu, (case,))


def test_memory_that_runs_out_is_raised_and_not_kept_as_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from act24.sparse24.kernels.shared import self_check

    def none_left(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(self_check._CASES, "gather_features", none_left)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            kernel_obstacle(torch.device("cuda", 7), ("gather_features",))
    monkeypatch.setitem(self_check._CASES, "gather_features", lambda _: iter(()))
    assert kernel_obstacle(torch.device("cuda", 7), ("gather_features",)) == ""
    kernel_obstacle.cache_clear()


def _changed(result: torch.Tensor) -> torch.Tensor:
    if result.dtype is torch.bool:
        return ~result
    return (result.float() + 1).to(result.dtype)  # e4m3 has no sum of its own


def test_the_first_use_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(Exception, match="run the model once before"):
        kernel_obstacle.__wrapped__(torch.device("cuda", 0), ("pack_activation",))
