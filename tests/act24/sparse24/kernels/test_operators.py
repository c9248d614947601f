"""What holds for every operator in the table."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from layouts import check_layouts
from operator_cases import operator_cases
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from act24.options import OptionError
from act24.relu2 import FUNCTIONS
from act24.sparse24 import kernels
from act24.sparse24.kernels.shared.registry import OPERATORS, _guard
from act24.sparse24.kernels.token_order import _kept_order
from act24.sparse24.pattern.feature_wise import token_permutation


def test_every_operator_has_a_case() -> None:
    assert set(operator_cases()) == set(OPERATORS)


def test_every_operator_is_there_wherever_one_is_asked_for() -> None:
    """By name, as self checks do, which import none."""
    package = Path(kernels.__file__)
    lines = ast.parse(package.read_text(encoding="utf-8")).body
    imported = {name.name for line in lines if isinstance(line, ast.ImportFrom) for name in line.names}
    assert imported == {path.stem for path in package.parent.glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", operator_cases())
def test_operators_keep_their_contracts(name: str) -> None:
    """Schemas, shapes for tracing, and no gradient of their own."""
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    arguments = operator_cases()[name]
    if any(isinstance(a, Tensor) and a.dtype is torch.float8_e4m3fn for a in arguments):
        tests.remove("test_schema")  # which compares arguments by arithmetic that e4m3 does not have
    opcheck(getattr(torch.ops.act24, name).default, arguments, test_utils=tests)


def test_schemas_are_those_of_the_annotations() -> None:
    """One of each type, by hand."""
    assert str(torch.ops.act24.pack_activation.default._schema) == (
        "act24::pack_activation(Tensor hidden, Tensor? seed, Tensor? real, str function, str method, "
        "bool slope, bool dense, bool counts, bool statistics, Tensor? order=None, Tensor? scale=None) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    assert str(torch.ops.act24.token_order.default._schema) == (
        "act24::token_order(Tensor like, SymInt[] shape, str kind) -> (Tensor, Tensor)"
    )


@pytest.mark.parametrize("kind", ["batch", "sequence"])
def test_the_kept_order_and_its_inverse(kind: Literal["batch", "sequence"]) -> None:
    """What CUDA runs, on a CPU: sorted once, and handed out as copies."""
    _kept_order.cache_clear()
    like, numbers = torch.empty(0), torch.arange(3 * 64)
    expected = token_permutation((3, 64), kind, like.device)
    assert expected is not None
    for _ in range(2):
        order, inverse = OPERATORS["token_order"].launch(like, [3, 64], kind)
        assert torch.equal(order, expected)
        assert torch.equal(order[inverse], numbers)
        assert torch.equal(inverse[order], numbers)
        order.zero_()
        inverse.zero_()
    assert _kept_order.cache_info().misses == 1


@pytest.mark.parametrize("name", operator_cases())
def test_a_tensor_in_any_layout_is_read_right_or_refused(name: str) -> None:
    """The references, which run on a CPU; `interpreted/check_layouts.py` has the kernels."""
    check_layouts(name, OPERATORS[name].reference)


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="activation_gradient: tensors on cpu and on meta"):
        OPERATORS["activation_gradient"].reference(torch.zeros(4), torch.zeros(4, device="meta"), "relu")


def test_a_kernel_runs_where_its_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the second of two GPUs while the first is current."""
    entered, ran = [], []

    @contextlib.contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        entered.append(device.index)
        yield
        entered.append(None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)

    def launch(index: Tensor) -> Tensor:
        ran.append(list(entered))
        return index

    with FakeTensorMode():
        first, second = (torch.empty(4, dtype=torch.int64, device=f"cuda:{n}") for n in range(2))
        guarded = _guard(launch, launch, (), ())
        guarded(first)
        guarded(second)
    assert ran == [[], [1]]
    assert entered == [1, None]


@pytest.mark.parametrize(
    "name", ["pack_activation", "count_activation", "pack_gradient", "unpack_gradient", "activation_gradient"]
)
def test_a_kernel_refuses_an_unknown_activation(name: str) -> None:
    """It would run relu for whatever is not relu2."""
    arguments = operator_cases()[name]
    arguments = ["gelu" if isinstance(a, str) and a in FUNCTIONS else a for a in arguments]
    with pytest.raises(OptionError, match="gelu"):
        OPERATORS[name].launch(*arguments)
