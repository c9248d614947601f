"""The packed form of the 2:4 linear on a CPU, where operators run their references: against the reference of
the operation, with products and draws counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.sparse24.format.multiply import relative_error
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.format.products import Measured, linear_products
from act24.sparse24.kernels.pack_weight import pack_weight
from act24.sparse24.weight import packed
from act24.sparse24.weight.forms import Linear, LinearOptions24, product_algorithms, why_not_packed
from act24.sparse24.weight.linear24 import FORMS, linear24
from act24.sparse24.weight.methods import METHODS, weight_mask, weight_scale
from act24.sparse24.weight.module import SparseLinear24
from act24.sparse24.weight.packed import packed_weight

TOKENS, OUT, IN = 128, 64, 192
FASTER = tuple((tuple(p), Measured(0, 0, 1)) for p in linear_products(TOKENS, OUT, IN).values())
SLOWER = tuple((tuple(p), Measured(0, 2, 1)) for p in linear_products(TOKENS, OUT, IN).values())

pytestmark = pytest.mark.usefixtures("capable_machine")


def tensors(bias: bool = True) -> list[Any]:
    x = torch.randn(2, TOKENS // 2, IN).bfloat16().requires_grad_()
    weight = torch.randn(OUT, IN).bfloat16().requires_grad_()
    return [x, weight, torch.randn(OUT).bfloat16().requires_grad_() if bias else None]


def run(leaves: list[Any], grad: Tensor, *state: Any) -> list[Tensor]:
    y = linear24(*leaves, *state)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def state_of(method: str, weight: Tensor, seed: int | None) -> tuple[Any, ...]:
    record = METHODS[method]
    scale = weight_scale(weight) if record.soft else None
    mask = None if record.soft else weight_mask(weight, method)
    return mask, scale, None if seed is None else torch.tensor(seed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("table", [FASTER, SLOWER])
def test_it_is_the_reference(
    method: str, seed: int | None, bias: bool, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, grad = tensors(bias), torch.randn(2, TOKENS // 2, OUT).bfloat16()
    state = state_of(method, leaves[1], seed)
    both_ways = METHODS[method].both_ways
    calls: list[tuple[int, int]] = []
    product = packed.product24

    def counted(matrix: Tensor, *arguments: Any) -> Tensor:
        calls.append(Packed24(matrix).shape)
        return product(matrix, *arguments)

    monkeypatch.setattr(packed, "product24", counted)
    ours = run(leaves, grad, *state, None, None, LinearOptions24(both_ways, True, table))
    expected = run(leaves, grad, *state, None, None, LinearOptions24(both_ways, False))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < 1e-2
    pays = table is FASTER
    shapes = [(OUT, IN)] * pays + [(IN, OUT)] * (pays and both_ways) + [(OUT, TOKENS)] * (seed is not None)
    assert calls == shapes, "the products that the method makes 2:4, and no other"


@pytest.mark.parametrize("both_ways", [False, True])
def test_weights_that_are_handed_in_are_those_that_are_multiplied(both_ways: bool) -> None:
    leaves, grad = tensors(), torch.randn(2, TOKENS // 2, OUT).bfloat16()
    state = state_of("transposable", leaves[1], 5)
    buffers = pack_weight(leaves[1].detach(), state[0])
    options = LinearOptions24(both_ways, True, FASTER)
    ours = run(leaves, grad, *state, *buffers, options)
    for a, b in zip(ours, run(leaves, grad, *state, None, None, options), strict=True):
        assert torch.equal(a, b)
    other = [torch.zeros_like(buffer) for buffer in buffers]
    y, grad_x, *_ = run(leaves, grad, *state, *other, options)
    assert torch.equal(y, leaves[2].expand_as(y))
    assert bool((grad_x == 0).all()) is both_ways, "dX reads what is packed where it is 2:4"
    empty = torch.empty(0, dtype=torch.bfloat16)
    for a, b in zip(ours, run(leaves, grad, *state, empty, empty, options), strict=True):
        assert torch.equal(a, b)


def test_soft_thresholding_is_packed_with_its_scale() -> None:
    weight = torch.randn(OUT, IN).bfloat16()
    mask, scale, _ = state_of("soft_threshold", weight, None)
    dense = unpack(Packed24(packed_weight(weight, mask, scale)))
    one = torch.eye(IN).bfloat16()
    assert torch.equal(
        dense, linear24(one, weight, None, mask, scale, options=LinearOptions24(kernels=False)).T
    )


def test_under_autocast_and_compiled_without_a_break() -> None:
    torch._dynamo.reset()
    x, weight, bias = (leaf.detach().float().requires_grad_() for leaf in tensors())
    mask, grad = weight_mask(weight, "transposable"), torch.randn(2, TOKENS // 2, OUT).bfloat16()
    seed, options = torch.tensor(7), LinearOptions24(True, True, FASTER)
    compiled = torch.compile(linear24, fullgraph=True, backend="aot_eager")
    results = []
    for call in (linear24, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x, weight, bias, mask, None, seed, None, None, options)
        results.append([y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert [t.dtype for t in results[0]] == [torch.bfloat16, *[torch.float32] * 3]


def test_a_second_derivative_is_refused() -> None:
    leaves = tensors()
    state = state_of("transposable", leaves[1], None)
    y = linear24(*leaves, *state, None, None, LinearOptions24(True, True, FASTER))
    (grad_x,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(Act24Error, match="can be differentiated once"):
        grad_x.square().sum().backward()


@pytest.mark.parametrize(("method", "products"), [("transposable", 3), ("soft_threshold", 2), ("ste", 1)])
def test_the_module_outside_a_pipeline_has_the_same_products(
    method: str, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = SparseLinear24(IN, OUT, method=method, dtype=torch.bfloat16, seed=3)
    layer.algorithms = FASTER
    calls: list[Any] = []
    product = packed.product24
    monkeypatch.setattr(packed, "product24", lambda *a: calls.append(a[0].shape) or product(*a))
    x, grad = torch.randn(TOKENS, IN).bfloat16().requires_grad_(), torch.randn(TOKENS, OUT).bfloat16()
    leaves = (x, layer.weight, layer.bias)
    results = []
    for layer.kernels in (True, False):
        layer.seed.fill_(3)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-2
    assert len(calls) == products


def test_when_it_cannot_be_and_why() -> None:
    device, bfloat16 = torch.device("cpu"), torch.bfloat16
    options = LinearOptions24(True, True, FASTER)
    fits = Linear(TOKENS, OUT, IN, bfloat16, device, True)
    (form,) = FORMS
    assert form.why_not(fits, options) == ""
    assert "switched off" in form.why_not(fits, options._replace(kernels=False))
    assert "bfloat16" in why_not_packed(fits._replace(dtype=torch.float32), options)
    for size in ("tokens", "out_features", "in_features"):
        assert "multiples of 64" in why_not_packed(fits._replace(**{size: 100}), options)
    slower = LinearOptions24(True, True, SLOWER)
    assert "dense products are faster at T 128, 192→64" in why_not_packed(fits._replace(draws=False), slower)
    assert product_algorithms(fits, slower) == {"grad_weight": 0}, "a drawn gradient is packed anyway"
    large = Linear(16384, 4096, 4096, bfloat16, device, True)
    assert set(product_algorithms(large, LinearOptions24(True))) == {"y", "grad_x", "grad_weight"}
    assert set(product_algorithms(large, LinearOptions24(False))) == {"y", "grad_weight"}
