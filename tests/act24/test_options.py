"""Options are checked where the object is made: what is refused, in a line that names field and value."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pytest
import torch

from act24.errors import Act24Error
from act24.fp8.casts import cast_both_ways
from act24.fp8.linear import linear_fp8, underflow_counts
from act24.options import OneOf, OptionError, Range, check_options, in_range, one_of
from act24.pruning.methods import PruneMethod, magnitude_score
from act24.pruning.pattern import Pattern, mask_by_row
from act24.records import Table
from act24.sparse24.pattern.feature_wise import token_permutation
from act24.sparse24.pattern.selection import are_densest, densest, densest_features
from act24.sparse24.pattern.token_wise import dense_activation
from act24.sparse24.weight.forms import LinearOptions24
from act24.sparse24.weight.linear24 import masked_decay_


@dataclass(frozen=True)
class Method:
    name: str
    weight: float = 1.0


METHODS: Table[Method] = Table("method of toy", Method("naive"), Method("mvue"))


@dataclass(frozen=True)
class Toy:
    method: Annotated[str, OneOf(METHODS)] = "naive"
    backward: Literal["dense", "sparse"] = "dense"
    ratio: Annotated[float, Range(ge=0, lt=1)] = 0.05
    scale: float = -1.0
    steps: int = 3
    until: Annotated[int | None, Range(ge=1)] = None
    targets: tuple[str, ...] = ("*",)
    betas: tuple[float, float] = (0.9, 0.95)
    kernels: bool = True
    free: Any = None

    def __post_init__(self) -> None:
        check_options(self)


def test_what_fits_is_taken_as_it_is():
    toy = Toy("mvue", "sparse", 0, 2, 0, 1, (), (0, 1), False, object())
    assert (toy.ratio, toy.scale, toy.until) == (0, 2, 1)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("method", "naiv", "did you mean 'naive'"),
        ("method", 3, "a string, got 3"),
        ("method", None, "a string"),
        ("backward", "exact", "choose from dense, sparse"),
        ("backward", ["dense"], "choose from dense, sparse"),
        ("ratio", 1.0, "0 or more and below 1, got 1.0"),
        ("ratio", -1e-9, "0 or more"),
        ("ratio", math.nan, "has to be finite and 0 or more and below 1, got nan"),
        ("ratio", "0.1", "a number, got '0.1'"),
        ("ratio", True, "a number, got True"),
        ("scale", math.inf, "finite, got inf"),
        pytest.param("scale", 10**5000, "more than 30 digits", id="5000 digits"),
        ("steps", 1.0, "an integer, got 1.0"),
        ("steps", True, "an integer, got True"),
        ("until", 0, "1 or more, got 0"),
        ("until", "1", "an integer"),
        ("targets", "*.mlp", r"a tuple, got '\*.mlp'"),
        ("targets", ("*", 1), r"targets\[1\] has to be a string, got 1"),
        ("betas", (0.9,), "2 entries"),
        ("betas", (0.9, math.inf), r"betas\[1\]"),
        ("kernels", 1, "true or false, got 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(field, value, says):
    with pytest.raises(OptionError, match=says) as error:
        Toy(**{field: value})
    assert f"Toy: {field}" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(OptionError, match=says):
        replace(Toy(), **{field: value})


def test_the_error_is_one_that_users_mend_and_one_that_pydantic_reports():
    assert issubclass(OptionError, Act24Error)
    assert issubclass(OptionError, ValueError)


def test_single_values():
    one_of("f", "kind", "a", ("a", "b"))
    in_range("f", "x", 1, Range(gt=0))
    with pytest.raises(OptionError, match="f: kind has no 'c'"):
        one_of("f", "kind", "c", ("a", "b"))
    with pytest.raises(OptionError, match="f: x has to be above 0, got 0"):
        in_range("f", "x", 0, Range(gt=0))


def test_a_table_takes_records_from_outside_and_names_of_its_own_once():
    table: Table[Method] = Table("method", Method("a"), Method("b"))
    assert list(table) == ["a", "b"]
    table.add(Method("c"))
    table.add(Method("c"))
    assert table["c"] == Method("c")
    assert table.get("d") is None
    with pytest.raises(OptionError, match="there is a method named 'a' already"):
        table.add(Method("a", 2.0))
    with pytest.raises(OptionError, match="no method named 'z': choose from a, b, c"):
        table["z"]


def test_a_method_that_is_added_later_is_taken_at_once():
    METHODS.add(Method("later"))
    assert Toy(method="later").method == "later"


def test_functions_take_no_other_values_than_classes_of_options() -> None:
    """What each of them did with such a value before: another scaling, another function, no feature."""
    matrix, counts, nan = torch.randn(16, 16), torch.arange(16), float("nan")
    for wrong, message in (
        (lambda: linear_fp8(matrix, matrix, None, scaling="row"), "linear_fp8: scaling has no 'row'"),  # type: ignore[arg-type]
        (lambda: cast_both_ways(matrix, "rowwise", "tensor"), "turned_scaling has no 'tensor'"),  # type: ignore[arg-type]
        (lambda: underflow_counts(matrix, "row"), "scaling has no 'row'"),  # type: ignore[arg-type]
        (lambda: dense_activation(matrix, "gelu"), "function has no 'gelu'"),  # type: ignore[arg-type]
        (lambda: token_permutation((16,), "rows", matrix.device), "kind has no 'rows'"),  # type: ignore[arg-type]
        (lambda: densest_features(counts, -0.1), "ratio has to be 0 or more and 1 at most, got -0.1"),
        (lambda: are_densest(counts, counts, 1.1), "ratio has to be 0 or more and 1 at most, got 1.1"),
        (lambda: densest(counts, nan), "ratio has to be finite and 0 or more and 1 at most, got nan"),
        (lambda: masked_decay_(matrix, matrix, matrix > 0, nan), "decay has to be finite, got nan"),
        (lambda: LinearOptions24(precision="e4m3"), "LinearOptions24: precision has no 'e4m3'"),  # type: ignore[arg-type]
        (lambda: LinearOptions24()._replace(kernels=1), "kernels has to be true or false, got 1"),
        (lambda: LinearOptions24(algorithms=3), "algorithms has to be a tuple, got 3"),  # type: ignore[arg-type]
        (lambda: Pattern(1.5), "Pattern: sparsity has to be 0 or more and 1 at most, got 1.5"),
        (lambda: Pattern(0.5, 4, 2), r"keep has to be of \(2\) at most, got 4"),
        (lambda: PruneMethod("a", "sums", magnitude_score, mask_by_row), "a: statistic has no 'sums'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(OptionError, match=message):
            wrong()
