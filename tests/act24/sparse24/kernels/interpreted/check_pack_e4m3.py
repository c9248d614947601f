"""Packing in e4m3 against its references, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import act24.sparse24.kernels.gather_features
import act24.sparse24.kernels.pack_activation
import act24.sparse24.kernels.pack_gradient_e4m3  # noqa: F401  (fill OPERATORS)
from act24.sparse24.format.fp8 import power_scales
from act24.sparse24.kernels.shared.registry import OPERATORS
from act24.sparse24.kernels.shared.self_check import mismatch

SHAPES = [(64, 64), (128, 192)]


def hidden(tokens: int, features: int) -> Tensor:
    """Rows of different sizes, with ties, zeros of both signs and an empty one."""
    values = torch.randn(tokens, features, generator=torch.Generator().manual_seed(0))
    values = torch.where(values.abs() < 0.3, (4 * values).round() / 4, values)
    values *= torch.logspace(-2, 1, tokens)[:, None]
    values[3], values[5, ::2] = 0, -0.0
    return values.bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["naive", "soft_threshold", "mvue"])
def test_activations(shape: tuple[int, int], method: str) -> None:
    rows, seed = hidden(*shape), torch.tensor(2**40 + 17)
    scale = power_scales(rows.float().square().amax(1)) * (2 if method == "mvue" else 1)
    for function in ("relu2", "relu") if shape == SHAPES[0] else ("relu2",):
        arguments: tuple[Any, ...] = (
            rows,
            seed,
            None,
            function,
            method,
            method != "naive",
            False,
            True,
            True,
        )
        ours, expected = (
            form(*arguments, None, scale)
            for form in (OPERATORS["pack_activation"].launch, OPERATORS["pack_activation"].reference)
        )
        assert ours[0].dtype is torch.float8_e4m3fn
        assert mismatch(ours, expected, 1, method != "naive") <= (0.01 if method == "mvue" else 0)


#: Function of the network, and whether the gradient is packed too.
FORMS = tuple(itertools.product(("relu2", "relu"), (True, False)))


@pytest.mark.parametrize(
    ("shape", "method", "pads", "forms"),
    [
        (SHAPES[0], "naive", False, FORMS),
        (SHAPES[0], "soft_threshold", True, FORMS),
        (SHAPES[1], "naive", True, FORMS[:1]),
        (SHAPES[1], "soft_threshold", False, FORMS[3:]),
        pytest.param(SHAPES[0], "naive", True, FORMS, marks=pytest.mark.slow),
        pytest.param(SHAPES[0], "soft_threshold", False, FORMS, marks=pytest.mark.slow),
    ],
)
def test_gradients(
    shape: tuple[int, int], method: str, pads: bool, forms: tuple[tuple[str, bool], ...]
) -> None:
    tokens, features = shape
    rows, grad = hidden(*shape), hidden(features, tokens).T.contiguous()
    scale = power_scales(rows.float().square().amax(1))
    real = torch.arange(tokens) % 5 != 0 if pads else None
    index = torch.tensor([3, 1, features - 2]) if pads else None
    scales = (
        torch.logspace(-3, 3, tokens),
        torch.logspace(-6, 0, features),
        torch.logspace(-4, -1, features),
    )
    for function, sparse in forms:
        first = (rows, None, None, function, method, method != "naive", False, False, False, None, scale)
        saved, slope, *_ = OPERATORS["pack_activation"].reference(*first)
        arguments = (
            grad,
            saved,
            scale,
            slope if slope.numel() else None,
            real,
            index,
            *scales,
            function,
            sparse,
        )
        ours, expected = (
            form(*arguments)
            for form in (OPERATORS["pack_gradient_e4m3"].launch, OPERATORS["pack_gradient_e4m3"].reference)
        )
        packed = 3 if sparse else 1
        assert [a.shape for a in ours] == [b.shape for b in expected]
        assert mismatch(ours, expected, packed, False) == 0


def test_some_features() -> None:
    rows = hidden(128, 192)
    scale = power_scales(rows.float().square().amax(1))
    arguments: tuple[Any, ...] = (rows, None, None, "relu2", "naive", False, False, False, False, None, scale)
    saved, *_ = OPERATORS["pack_activation"].reference(*arguments)
    for real in (None, torch.arange(128) % 3 != 0):
        given = (saved, torch.arange(0, 192, 7), real, 96, scale)
        ours, expected = (
            form(*given)
            for form in (OPERATORS["gather_features"].launch, OPERATORS["gather_features"].reference)
        )
        assert torch.equal(ours, expected)
