"""The backward kernels against their references, bit for bit, through the operators' reference outputs."""

from __future__ import annotations

import pytest
import torch
from check_pack_activation import SEED, awkward
from torch import Tensor

import act24.sparse24.kernels.operators  # noqa: F401  (fills REFERENCES)
from act24.sparse24.format.packed import Packed24, empty_packed, unpack
from act24.sparse24.kernels.gather_features import gather_features
from act24.sparse24.kernels.pack_gradient import pack_gradient
from act24.sparse24.kernels.shared.registry import REFERENCES
from act24.sparse24.kernels.unpack_gradient import unpack_gradient


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
    packed, slope, _, _ = REFERENCES["pack_activation"](*arguments)
    return packed, None if method == "naive" else slope


@pytest.mark.parametrize("shape", [(64 * 9, 64), (64, 128)])
@pytest.mark.parametrize(
    ("function", "method"),
    [("relu2", "naive"), ("relu", "naive"), ("relu2", "mvue"), ("relu", "soft_threshold")],
)
def test_pack_gradient_equals_the_reference(shape: tuple[int, int], function: str, method: str) -> None:
    """More tiles than a program walks, several strips; padding, dense features."""
    tokens, features = shape
    value, slope = saved(tokens, features, function, method)
    for padded, dense in ((False, False), (True, True), (False, True)):
        real = torch.rand(tokens) < 0.8 if padded else None
        grad = awkward(tokens, features, seed=1)
        grad = grad if real is None else grad * real[:, None]
        index = torch.randperm(features)[: features // 10] if dense else None
        expected = REFERENCES["pack_gradient"](grad, value, slope, real, index, function)
        places = None
        if index is not None:
            places = torch.full((features,), -1, dtype=torch.int32)
            places[index] = torch.arange(len(index), dtype=torch.int32)
        shapes = ((tokens, features), (features, tokens), (features, tokens))
        outputs = [Packed24(empty_packed(*s, grad).fill_(7)) for s in shapes]
        rows = [torch.full_like(e, 7) for e in expected[3:]]
        pack_gradient(grad, Packed24(value), slope, real, places, *outputs, *rows, function)
        for ours, theirs in zip(outputs, expected, strict=False):
            assert torch.equal(unpack(ours), unpack(Packed24(theirs)))
        for ours, theirs in zip(rows, expected[3:], strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(outputs[0].metadata, Packed24(value).metadata)


@pytest.mark.parametrize(("function", "method"), [("relu2", "naive"), ("relu", "naive"), ("relu2", "mvue")])
def test_unpack_gradient_equals_the_reference(function: str, method: str) -> None:
    value, slope = saved(192, 128, function, method)
    grad = awkward(192, 128, seed=1)
    expected = REFERENCES["unpack_gradient"](grad, value, slope, function)
    packed = Packed24(empty_packed(192, 128, grad).fill_(7))
    dense = [torch.full_like(grad, 7) for _ in range(2)]
    unpack_gradient(grad, Packed24(value), slope, packed, *dense, function)
    assert torch.equal(unpack(packed), unpack(Packed24(expected[0])))
    assert torch.equal(dense[0], expected[1])
    assert torch.equal(dense[1], expected[2])


@pytest.mark.parametrize("number", [1, 5, 40])
def test_gather_features_equals_the_reference(number: int) -> None:
    value, _ = saved(192, 128, "relu2", "naive")
    index, real = torch.randperm(128)[:number], torch.rand(192) < 0.8
    for arguments in ((index, None), (index, real)):
        expected = REFERENCES["gather_features"](value, *arguments)
        rows = torch.full_like(expected, 7)
        gather_features(Packed24(value), *arguments, rows)
        assert torch.equal(rows, expected)
