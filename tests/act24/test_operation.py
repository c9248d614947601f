"""Operations are one node to every tracer, however often, and keep the backward that they came with."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.func import grad

import act24
from act24.errors import Act24Error
from act24.fp8.linear import linear_fp8
from act24.loss import cross_entropy_sum
from act24.operation import cast_for_autocast, operation
from act24.pruning.stored import packed_bits
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.pattern.mvue import mvue24
from act24.sparse24.weight.linear24 import linear24
from act24.sparse24.weight.methods import weight_mask


class _Tripled(torch.autograd.Function):
    """The identity, with a gradient that no tracing through its forward could know."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * grad


@operation
def tripled(x: Tensor, scale: float = 1.0) -> Tensor:
    """x · scale, whose gradient is three times too large."""
    return _Tripled.apply(x) * scale


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def test_why_there_are_operations() -> None:
    """What they guard against: fx opens an autograd.Function and drops its backward."""
    x = torch.randn(3)
    graph = fx.symbolic_trace(lambda x: _Tripled.apply(x))
    assert torch.equal(gradient(graph, x), torch.ones(3))


def _operations() -> dict[str, Callable[[Tensor], Tensor]]:
    """Those with a backward of their own, of rows `[4, 16]`."""
    generator = torch.Generator().manual_seed(0)
    w, v = (torch.randn(16, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    mask, labels = weight_mask(w, "ste"), torch.arange(4)
    return {
        "linear24": lambda x: linear24(x, w, None, mask),
        "activation24": lambda x: activation24(x, w, None, v, None)[0],
        "linear_fp8": lambda x: linear_fp8(x, w, None),
        "cross_entropy_sum": lambda x: cross_entropy_sum(x[None], w, labels[None])[0],
        "mvue24": lambda x: mvue24(x, 3),
    }


@pytest.mark.parametrize("name", _operations())
def test_no_derivative_in_forward_mode(name: str) -> None:
    function = _operations()[name]
    x = torch.randn(4, 16, dtype=torch.float64)
    message = rf"{name} has no derivative in forward mode .* take it in reverse"
    with pytest.raises(Act24Error, match=message):
        torch.func.jvp(function, (x,), (x,))
    with pytest.raises(Act24Error, match=message), forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))
    _, tangent = torch.func.jvp(lambda y: function(x) * y.sum(), (x,), (x,))  # of it nothing is wanted
    torch.testing.assert_close(tangent, function(x) * x.sum())


@pytest.mark.parametrize("name", [name for name in _operations() if name != "mvue24"])
def test_no_second_derivative(name: str) -> None:
    """In torch.func and in autograd."""
    function = lambda x: _operations()[name](x).square().sum()  # noqa: E731
    x = torch.randn(4, 16, dtype=torch.float64)

    def penalty(y: Tensor) -> Tensor:
        return grad(function)(y).square().sum()

    with pytest.raises(Act24Error, match="can be differentiated once"):
        grad(penalty)(x)
    x.requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    with pytest.raises(Act24Error, match="can be differentiated once"):
        (function(x) + first.square().sum()).backward()


def test_no_second_derivative_by_way_of_what_is_saved() -> None:
    """The gradient of a sum comes in as ones; that of relu² depends on x all the same."""
    x = torch.randn(4, 16, dtype=torch.float64)
    of_sum = grad(lambda z: activation24(z, None, None, None, None)[0].sum())
    with pytest.raises(Act24Error, match="can be differentiated once"):
        grad(lambda y: of_sum(y).square().sum())(x)
    first_order = grad(lambda y: (of_sum(y.detach()) * y).sum())(x)
    torch.testing.assert_close(first_order, of_sum(x))
    assert not of_sum(x.requires_grad_()).requires_grad
    total = activation24(x, None, None, None, None)[0].sum()
    (first,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(Act24Error, match="can be differentiated once"):
        (total + first.square().sum()).backward()


def test_no_rule_for_vmap() -> None:
    x = torch.randn(3, 4, 16)
    with pytest.raises(Act24Error, match=r"linear_fp8 has no rule for torch\.func\.vmap: run one sample"):
        torch.func.vmap(lambda rows: linear_fp8(rows, x.new_ones(16, 16), None))(x)


def test_custom_backward_survives_tracing_and_tracing_again() -> None:
    x = torch.randn(3)
    traced: Callable[[Tensor], Tensor] = lambda x: tripled(x, scale=2.0)  # noqa: E731
    for _ in range(3):
        traced = fx.symbolic_trace(traced)
        calls = [node for node in traced.graph.nodes if node.op == "call_function"]
        assert [node.target for node in calls] == [tripled]
        assert torch.equal(gradient(traced, x), torch.full((3,), 6.0))


def test_any_tracer_sees_one_node() -> None:
    class Opens(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return False

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return tripled(x) + 1

    graph = Opens().trace(Own())
    assert next(node.target for node in graph.nodes if node.op == "call_function") is tripled
    run = fx.Interpreter(fx.GraphModule(Own(), graph)).run
    assert torch.equal(gradient(run, torch.ones(2)), torch.full((2,), 3.0))


def test_it_is_the_function_itself_without_a_tracer() -> None:
    x = torch.randn(3)
    assert torch.equal(tripled(x, 2.0), 2 * x)
    assert tripled.__name__ == "tripled"
    assert tripled.__doc__ == "x · scale, whose gradient is three times too large."
    assert list(inspect.signature(tripled).parameters) == ["x", "scale"]


def test_tensor_subclasses_may_take_it_over() -> None:
    class Logged(Tensor):
        calls: list[Any] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.calls.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    tripled(torch.ones(2).as_subclass(Logged))
    assert Logged.calls[0] is tripled


def test_compiles_without_a_break() -> None:
    x = torch.randn(4)
    compiled = torch.compile(tripled, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, 2.0), tripled(x, 2.0))
    assert torch.equal(gradient(compiled, x), gradient(tripled, x))


# Every operation that there is


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


#: Arguments for every operation that there is. A new one needs a line here, which has its gradient tested.
INPUTS: dict[str, tuple[Any, ...]] = {
    "relu2": (normal(5, 8),),
    "activation24": (normal(5, 8), normal(16, 8), normal(16), normal(8, 16), normal(8)),
    "dense_statistics": (normal(5, 8),),
    "calibration_sums": (normal(5, 8), None, "weight", 3, "relu2", normal(6, 8)),
    "soft_threshold24": (normal(5, 8),),
    "mvue24": (normal(5, 8).abs(), torch.tensor(7)),
    "linear24": (normal(5, 8), normal(8, 8), normal(8), normal(8, 8) > 0),
    "cross_entropy_sum": (normal(5, 8), normal(11, 8), torch.tensor([3, 0, 10, -100, 7])),
    "select_columns": (normal(5, 8), torch.tensor([6, 1])),
    "low_rank_beside_columns": (
        *(normal(5, 8), normal(3, 8), normal(6, 3), normal(6, 2), torch.tensor([6, 1])),
        *(0.7, "silu"),
    ),
    "linear_fp8": (normal(5, 16), normal(16, 16), normal(16)),
    "document_attention": (
        *(normal(2, 3, 5, 4), normal(2, 3, 5, 4), normal(2, 3, 5, 4)),
        torch.tensor([[0, 0, 2, 2, 2], [0, 0, 0, 0, 4]]),
    ),
    "underflow_counts": (normal(5, 8), "rowwise"),
    "masked_adapter_weight": (normal(6, 8), normal(3, 8), normal(6, 3), packed_bits(normal(6, 8) > 0), 2.0),
}


def operations() -> list[Callable[..., Any]]:
    """What `@operation` has made, in all of the core."""
    found = {}
    for module in pkgutil.walk_packages(act24.__path__, "act24."):
        if module.name.startswith(("act24.passes", "act24.recipes", "act24.tools", "act24.__main__")):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isfunction(value) and value.__code__ is tripled.__code__:
                found[value.__module__ + "." + value.__qualname__] = value
    return [found[name] for name in sorted(found)]


def flat(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("function", operations(), ids=lambda f: f.__name__)
def test_each_operation_keeps_its_gradient_when_traced_twice(function: Callable[..., Any]) -> None:
    assert function.__name__ in INPUTS, f"give {function.__name__} arguments in INPUTS"
    first, *others = INPUTS[function.__name__]
    leaves = [a.requires_grad_() for a in (first, *others) if isinstance(a, Tensor) and a.is_floating_point()]

    def call(x: Tensor) -> Any:
        return function(x, *others)

    def run(f: Callable[[Tensor], Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        results = flat(f(first))
        if not results[0].requires_grad:
            return results, ()
        return results, torch.autograd.grad(results[0].square().sum(), leaves)

    expected = run(call)
    once = fx.symbolic_trace(call)
    for traced in (once, fx.symbolic_trace(once)):
        assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]
        for actual, wanted in zip(run(traced), expected, strict=True):
            assert len(actual) == len(wanted)
            assert all(map(torch.equal, actual, wanted))


def test_options_pass_through_a_graph() -> None:
    options = Options24(function="relu", backward="sparse", token_permutation="none")
    x, *weights = INPUTS["activation24"]

    def call(x: Tensor) -> Tensor:
        return activation24(x, *weights, None, None, None, options)[0]

    traced = fx.symbolic_trace(call)
    assert torch.equal(gradient(traced, x), gradient(call, x))


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_as_autocast_casts_a_product(dtype: torch.dtype) -> None:
    tensors = (torch.ones(2, 2), None, torch.ones(2, 2, dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype):
        product = (tensors[0] @ tensors[0]).dtype
        cast = cast_for_autocast(*tensors)
    assert [None if t is None else t.dtype for t in cast] == [product, None, product]
    assert product == dtype


def test_float64_and_meta_are_left_alone() -> None:
    double, meta = torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_for_autocast(double)[0] is double
        assert (double @ double).dtype == torch.float64
        assert cast_for_autocast(meta)[0] is meta


def test_without_autocast_nothing_moves() -> None:
    tensor = torch.ones(2)
    assert cast_for_autocast(None, tensor) == (None, tensor)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert cast_for_autocast(tensor)[0] is tensor
