"""Largest magnitudes and casts to e4m3 against their references, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from slow import slow_but
from torch import Tensor

import act24.sparse24.kernels.cast_e4m3
import act24.sparse24.kernels.largest_magnitudes
import act24.sparse24.kernels.product24_e4m3
import act24.sparse24.kernels.product_e4m3  # noqa: F401  (fill OPERATORS)
from act24.sparse24.format.fp8 import scales_of
from act24.sparse24.format.packed import empty_packed
from act24.sparse24.kernels.shared.registry import OPERATORS

SHAPES = [(8, 64), (37, 80), (300, 528)]


def awkward(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes, one of zeros of both signs, one that ends among the subnormal numbers."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values *= 10 ** torch.linspace(-3, 3, len(values))[:, None]
    values[3] = 0
    values[3, ::2] = -0.0
    values[5] = 2 ** torch.linspace(-20, 0, values.shape[1])
    return values.to(dtype)


def same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """With any NaN equal to any other."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, expected, strict=True)]
    return all(
        a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in pairs
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_largest_magnitudes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = awkward(shape, dtype)
    for wanted in itertools.product((False, True), repeat=2):
        rows, columns = OPERATORS["largest_magnitudes"].launch(matrix, *wanted)
        assert rows.tolist() == (matrix.abs().amax(1).tolist() if wanted[0] else [])
        assert columns.tolist() == (matrix.abs().amax(0).tolist() if wanted[1] else [])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    slow_but(
        [(SHAPES[2], torch.bfloat16), *((shape, torch.float32) for shape in SHAPES[:2])],
        itertools.product(SHAPES, (torch.bfloat16, torch.float32)),
    ),
)
def test_casts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """With a scale for each row and column, with one, with one that is too small, and one side alone."""
    matrix = awkward(shape, dtype)
    rows, columns = scales_of(matrix.abs().float().amax(1)), scales_of(matrix.abs().float().amax(0))
    one = scales_of(matrix.abs().float().max()[None])
    for scales in ((rows, columns), (one, one / 8), (rows / 8, one), (None, columns), (one, None)):
        ours, expected = (
            form(matrix, *scales, True)
            for form in (OPERATORS["cast_e4m3"].launch, OPERATORS["cast_e4m3"].reference)
        )
        assert same(ours, expected)
        lost = sum(
            int((matrix.float().abs() / scale <= 2.0**-10)[matrix != 0].sum())  # a tie goes to zero
            for scale in (None if scales[0] is None else scales[0][:, None], scales[1])
            if scale is not None
        )
        made = sum(scale is not None for scale in scales)
        assert ours[2].tolist() == [made * int((matrix != 0).sum()), lost]
        assert lost


def test_nan_and_infinity_spoil_what_shares_their_scale() -> None:
    matrix = torch.ones(48, 64).bfloat16()
    matrix[3, 5], matrix[7, 9] = float("inf"), float("nan")
    largest = OPERATORS["largest_magnitudes"].launch(matrix, True, True)
    assert same(largest, OPERATORS["largest_magnitudes"].reference(matrix, True, True))
    scales = [scales_of(side) for side in largest]
    ours, expected = (
        form(matrix, *scales) for form in (OPERATORS["cast_e4m3"].launch, OPERATORS["cast_e4m3"].reference)
    )
    assert same(ours, expected)
    bad_rows = torch.zeros(48, dtype=torch.bool)
    bad_rows[[3, 7]] = True
    assert torch.equal(ours[0].float().isnan(), bad_rows[:, None].expand(48, 64))


@pytest.mark.parametrize("shape", [(0, 64), (48, 0)])
def test_of_nothing(shape: tuple[int, int]) -> None:
    """No tokens, on either side: launchers start nothing, and give what their references do."""
    matrix, one = torch.ones(shape).bfloat16(), torch.ones(1)
    for name, arguments in (
        ("largest_magnitudes", (matrix, True, True)),
        ("cast_e4m3", (matrix, one, one, True)),
        ("cast_e4m3", (matrix, torch.ones(shape[0]), torch.ones(shape[1]))),
    ):
        ours, expected = (getattr(OPERATORS[name], form)(*arguments) for form in ("launch", "reference"))
        assert same(ours, expected)
    left = torch.empty(shape).to(torch.float8_e4m3fn)
    right = torch.ones(32, shape[1]).to(torch.float8_e4m3fn)
    product = OPERATORS["product_e4m3"].launch(left, right, one, one)
    assert torch.equal(product, torch.zeros(shape[0], 32).bfloat16())


def test_a_2_4_product_with_no_dense_rows_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `dense_ratio = 0`: the library is not asked for a product of no rows."""
    monkeypatch.setattr(
        "act24.sparse24.kernels.product24_e4m3.multiply24",
        lambda packed, right, *_: torch.ones(64, right.shape[1]),
    )
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: pytest.fail("it was asked"))
    packed = empty_packed(64, 128, torch.empty(0, dtype=torch.float8_e4m3fn))
    right = torch.ones(32, 128).to(torch.float8_e4m3fn)
    rows, index = right[:0], torch.zeros(0, dtype=torch.int64)
    result = OPERATORS["product24_e4m3"].launch(packed, right, 21, False, rows, index)
    assert torch.equal(result, torch.ones(64, 32))
