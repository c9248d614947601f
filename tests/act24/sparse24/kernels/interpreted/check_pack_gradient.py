"""The backward kernels against their references, bit for bit, through the operators' reference outputs."""

from __future__ import annotations

import pytest
import torch
from check_pack_activation import SEED, awkward
from torch import Tensor

import act24.sparse24.kernels.gather_features
import act24.sparse24.kernels.pack_activation
import act24.sparse24.kernels.pack_gradient
import act24.sparse24.kernels.unpack_gradient  # noqa: F401  (fill OPERATORS)
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.kernels.shared.registry import OPERATORS


def saved(tokens: int, features: int, function: str, method: str) -> tuple[Tensor, Tensor | None]:
    """What forward saves: the packed activation, and the slope where it is not a function of it."""
    arguments = (
        awkward(tokens, features),
        torch.tensor(SEED),
        None,
        function,
        method,
        True,
        False,
        False,
        False,
    )
    packed, slope, _, _ = OPERATORS["pack_activation"].reference(*arguments)
    return packed, None if method == "naive" else slope


SMALL, WALKED, STRIPS = (64, 64), (64 * 3, 64), (64, 128)
#: Whether tokens are padded, and whether there are dense features.
EXTRAS = ((False, False), (True, True), (False, True))


@pytest.mark.parametrize(
    ("function", "method", "shape", "extras"),
    [
        ("relu2", "naive", STRIPS, EXTRAS),
        ("relu", "naive", SMALL, EXTRAS[1:2]),
        ("relu2", "mvue", SMALL, EXTRAS[1:2]),
        ("relu", "soft_threshold", SMALL, EXTRAS),
        ("relu2", "naive", WALKED, EXTRAS[1:2]),
        ("relu", "soft_threshold", WALKED, EXTRAS[1:2]),
    ],
)
def test_pack_gradient_equals_the_reference(
    function: str, method: str, shape: tuple[int, int], extras: tuple[tuple[bool, bool], ...]
) -> None:
    """More tiles than a program walks, several strips; padding, dense features."""
    tokens, features = shape
    value, slope = saved(tokens, features, function, method)
    for padded, dense in extras:
        real = torch.rand(tokens) < 0.8 if padded else None
        grad = awkward(tokens, features, seed=1)
        index = torch.randperm(features)[: features // 10] if dense else None
        arguments = (grad, value, slope, real, index, function)
        expected = OPERATORS["pack_gradient"].reference(*arguments)
        outputs = OPERATORS["pack_gradient"].launch(*arguments)
        for ours, theirs in zip(outputs[:3], expected[:3], strict=True):
            assert torch.equal(unpack(Packed24(ours)), unpack(Packed24(theirs)))
        for ours, theirs in zip(outputs[3:], expected[3:], strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(Packed24(outputs[0]).metadata, Packed24(value).metadata)


@pytest.mark.parametrize(("function", "method"), [("relu2", "naive"), ("relu", "naive"), ("relu2", "mvue")])
def test_unpack_gradient_equals_the_reference(function: str, method: str) -> None:
    value, slope = saved(192, 128, function, method)
    grad = awkward(192, 128, seed=1)
    expected = OPERATORS["unpack_gradient"].reference(grad, value, slope, function)
    packed, *dense = OPERATORS["unpack_gradient"].launch(grad, value, slope, function)
    assert torch.equal(unpack(Packed24(packed)), unpack(Packed24(expected[0])))
    assert torch.equal(dense[0], expected[1])
    assert torch.equal(dense[1], expected[2])


def test_what_is_not_finite_stays_as_in_the_reference() -> None:
    """In the gradient, of either sign, and in what forward saved."""
    tokens, features = 64, 64
    value, _ = saved(tokens, features, "relu2", "naive")
    grad = awkward(tokens, features, seed=1)
    (kept, *_), (other, *_) = (
        unpack(Packed24(value))[token].nonzero().flatten().tolist() for token in (9, 18)
    )
    grad[8:12, kept] = torch.tensor([float("inf"), float("nan"), float("-inf"), 1.0])
    grad.view(torch.int16)[16:20, other] = -1
    Packed24(value).values.view(torch.int16)[20, 7] = 0x7FFF
    for name, arguments in (
        ("pack_gradient", (grad, value, None, None, torch.arange(features), "relu2")),
        ("unpack_gradient", (grad, value, None, "relu2")),
    ):
        ours, expected = OPERATORS[name].launch(*arguments), OPERATORS[name].reference(*arguments)
        for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
            if number < (3 if name == "pack_gradient" else 1):
                a, b = unpack(Packed24(a)), unpack(Packed24(b))
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            assert b.isnan().any()


@pytest.mark.parametrize("number", [1, 5, 40])
def test_gather_features_equals_the_reference(number: int) -> None:
    value, _ = saved(192, 128, "relu2", "naive")
    index, real = torch.randperm(128)[:number], torch.rand(192) < 0.8
    for arguments, tokens in (((index, None), 192), ((index, real), 192), ((index, real), 100)):
        of = OPERATORS["gather_features"]
        expected = of.reference(value, *arguments, tokens)
        assert torch.equal(expected, of.reference(value, *arguments, 192)[:, :tokens])
        assert torch.equal(of.launch(value, *arguments, tokens), expected)
