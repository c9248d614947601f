"""The kernels of decoding against products with dense weights."""

from __future__ import annotations

import pytest
import torch
from slow import slow_but

from act24.sparse24.kernels.packed_decode import launch, packed_for_decode, tilings, unpacked
from act24.sparse24.kernels.shared.registry import OPERATORS
from act24.sparse24.kernels.shared.self_check import _CASES
from act24.sparse24.kernels.skipping_product import FUNCTIONS, split_number
from act24.sparse24.pattern.selection import top2_of_4


def draw(*shape: int) -> torch.Tensor:
    """Multiples of 1/4, which add up exactly in any order."""
    return (torch.randint(-2, 3, shape) / 4).bfloat16()


def activated(hidden: torch.Tensor, function: str) -> torch.Tensor:
    return {"relu2": hidden.relu().square(), "relu": hidden.relu(), "none": hidden}[function].double()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 16])
@pytest.mark.parametrize(("features", "width"), [(256, 64), (1000, 300)])
def test_skipping_is_the_dense_product(tokens, features, width, function):
    hidden, weight = draw(tokens, features), draw(features, width)
    hidden = torch.where(torch.rand(hidden.shape) < 0.8, -hidden.abs() if function != "none" else 0, hidden)
    hidden[:, :40] = 1  # a cluster
    hidden[:, -3] = -0.0
    parts = OPERATORS["skipping_product"].launch(hidden, weight, function)
    assert parts.shape == (split_number(features), tokens, width)
    assert torch.equal(parts.sum(0).double(), activated(hidden, function) @ weight.double())
    assert torch.equal(parts, OPERATORS["skipping_product"].reference(hidden, weight, function))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_nothing_active_and_what_is_not_finite(tokens, value):
    """A row of NaN weights is not read where no token is active, and a NaN activation is seen."""
    hidden, weight = torch.full((tokens, 256), -1.0).bfloat16(), draw(256, 64)
    weight[7] = torch.nan
    hidden[0, 9] = value
    y = OPERATORS["skipping_product"].launch(hidden, weight, "relu2").sum(0)
    assert bool(y[0].isnan().all()) == (value != value)
    if value == 0:
        assert not y.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5000), (37, 300), (1, 8)])
def test_one_token_by_a_program_a_row(outputs, inputs, dtype):
    x, weight = draw(1, inputs).to(dtype), draw(outputs, inputs).to(dtype)
    y = OPERATORS["dense_decode"].launch(x, weight)
    assert y.shape == OPERATORS["dense_decode"].fake(x, weight).shape
    assert torch.equal(y.double(), x.double() @ weight.double().T)
    assert torch.equal(y, OPERATORS["dense_decode"].reference(x, weight))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(2, 8).bfloat16(), torch.ones(4, 8).bfloat16()),
        (torch.ones(1, 8).bfloat16(), torch.ones(4, 6).bfloat16()),
        (torch.ones(1, 8), torch.ones(4, 8)),
        (torch.ones(1, 8).half(), torch.ones(4, 8).bfloat16()),
    ],
    ids=["two tokens", "another length", "float32", "two dtypes"],
)
def test_what_one_token_is_not_is_refused(x, weight):
    for form in (OPERATORS["dense_decode"].launch, OPERATORS["dense_decode"].reference):
        with pytest.raises(ValueError, match=r"dense_decode: .*one token, and both of one 16-bit dtype"):
            form(x, weight)


def weight24(outputs: int, inputs: int) -> torch.Tensor:
    weight = draw(outputs, inputs)
    weight = torch.where(top2_of_4(torch.rand(weight.shape)), weight, 0)
    weight[0] = 0
    return weight


TOKENS, SIZES = (1, 2, 8, 11), ((37, 640), (70, 1152))


@pytest.mark.parametrize(
    ("outputs", "inputs", "tokens"),
    slow_but(
        [(70, 1152, 11), *((37, 640, tokens) for tokens in TOKENS)],
        [(*size, tokens) for size in SIZES for tokens in TOKENS],
    ),
)
def test_packed_is_the_dense_product(outputs, inputs, tokens):
    """However it is shared out: sums of these numbers are exact in any order."""
    weight, x = weight24(outputs, inputs), draw(tokens, inputs)
    packed = packed_for_decode(weight)
    assert torch.equal(unpacked(*packed), weight)
    assert sum(part.numel() * part.itemsize for part in packed) * 16 == weight.numel() * 2 * 9
    exact = x.double() @ weight.double().T
    parts = OPERATORS["packed_decode"].launch(x, *packed)
    assert parts.shape == OPERATORS["packed_decode"].fake(x, *packed).shape
    assert torch.equal(parts, OPERATORS["packed_decode"].reference(x, *packed))
    assert torch.equal(parts.sum(0).double(), exact)
    offered = tilings(tokens, outputs, inputs)
    assert parts.shape[0] == offered[0].split_number(inputs)
    for tiling in (*offered[1:], offered[0]._replace(splits=1), offered[0]._replace(splits=3)):
        parts = launch(x, *packed, tiling)
        assert parts.shape == (tiling.split_number(inputs), tokens, outputs)
        assert torch.equal(parts.sum(0).double(), exact), tiling


@pytest.mark.parametrize("tokens", [1, 5])
def test_packed_rounds_to_float32_alone(tokens):
    """Numbers of any size beside float64: bfloat16 products are exact, and sums are of float32."""
    weight, x = torch.randn(40, 1152).bfloat16(), torch.randn(tokens, 1152).bfloat16()
    weight = torch.where(top2_of_4(weight.abs()), weight, 0)
    y = OPERATORS["packed_decode"].launch(x, *packed_for_decode(weight)).sum(0)
    exact = x.double() @ weight.double().T
    assert float((y.double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("inputs", [128, 768, 2048, 4096, 16512])
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_splits_share_out_every_tile_once(tokens, inputs):
    for outputs in (64, 4096, 16512):
        for tiling in tilings(tokens, outputs, inputs):
            tiles, length = -(-inputs // 32 // tiling.groups), tiling.length(inputs)
            number = tiling.split_number(inputs)
            assert (number - 1) * length < tiles <= number * length
            assert 1 <= number <= tiling.splits


def test_every_place_of_two_in_four():
    """All pairs of places, one alone among them, in every eighth of a row."""
    patterns = [[float(1 + p) * (p in kept) for p in range(4)] for kept in _subsets()]
    flat = torch.tensor(patterns).flatten().bfloat16()  # 40 entries, ten groups
    weight = torch.stack([flat.roll(4 * n).repeat(4)[:128] for n in range(10)])
    packed = packed_for_decode(weight)
    assert torch.equal(unpacked(*packed), weight)
    for tokens in (1, 4):
        x = draw(tokens, 128)
        y = OPERATORS["packed_decode"].launch(x, *packed).sum(0)
        assert torch.equal(y.double(), x.double() @ weight.double().T)


def _subsets() -> list[set[int]]:
    return [{a, b} for a in range(4) for b in range(a, 4)]


@pytest.mark.parametrize(("tokens", "inputs"), [(17, 128), (0, 128), (1, 64)])
def test_what_the_kernel_does_not_take_is_refused(tokens, inputs):
    packed = packed_for_decode(weight24(8, inputs))
    for form in (OPERATORS["packed_decode"].launch, OPERATORS["packed_decode"].reference):
        with pytest.raises(ValueError, match=r"packed_decode: .* one to 16 tokens, and inputs a multiple"):
            form(draw(tokens, inputs), *packed)


@pytest.mark.parametrize("name", ["skipping_product", "packed_decode"])
def test_on_what_the_self_check_of_a_gpu_runs(name):
    splits = set()
    for arguments, *_ in _CASES[name](torch.device("cpu")):
        ours, expected = OPERATORS[name].launch(*arguments), OPERATORS[name].reference(*arguments)
        assert torch.equal(ours, expected)
        splits.add(len(ours))
    assert max(splits) > 1
