"""The normal form: every spelling becomes one node, nothing else does, and numbers do not move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import Pipeline, Region, trace
from act24.passes.graph.check import Check
from act24.passes.graph.normal_form import common_path, is_transposed, nodes_of, readers, weight_name
from act24.relu2 import relu2


class MLP(nn.Module):
    """Two linears around `activation`, which is called with the module and the hidden state."""

    def __init__(self, activation: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self, self.up(x)))


def region_of(mlp: nn.Module) -> Region:
    """The one region of a list that holds the module."""
    regions, unclean = trace(nn.ModuleList([mlp]))
    assert not unclean
    (region,) = regions
    return region


def stands(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module that takes the place of another."""
    holder = nn.ModuleList([mlp])
    Pipeline(holder, [], keep_all=True).commit_()
    return holder[0]


def _inplace(m: nn.Module, h: Tensor) -> Tensor:
    return F.relu(h, inplace=True) ** 2


def _product(m: nn.Module, h: Tensor) -> Tensor:
    positive = torch.relu(h)
    return positive * positive


SPELLINGS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "square()": lambda m, h: F.relu(h).square(),
    "torch.square": lambda m, h: torch.square(torch.relu(h)),
    "** 2": lambda m, h: F.relu(h) ** 2,
    "** 2.0": lambda m, h: h.relu() ** 2.0,
    "pow": lambda m, h: torch.pow(F.relu(h), 2),
    ".pow": lambda m, h: F.relu(h).pow(2),
    "product": _product,
    "module": lambda m, h: nn.ReLU()(h) ** 2,
    "in place": _inplace,
    "relu2": lambda m, h: relu2(h),
}


@pytest.mark.parametrize("spelling", sorted(set(SPELLINGS) - {"module"}))
def test_relu_squared_in_any_spelling(spelling: str) -> None:
    mlp = MLP(SPELLINGS[spelling])
    region = region_of(mlp)
    assert len(list(nodes_of(region.graph, relu2))) == 1
    assert [node.op for node in region.graph.nodes].count("call_function") == 3
    x = features(5, 8)
    assert torch.equal(stands(mlp)(x), mlp(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_module_squared(inplace: bool) -> None:
    class Own(MLP):
        def __init__(self) -> None:
            super().__init__(lambda m, h: m.act(h).square())
            self.act = nn.ReLU(inplace)

    mlp = Own()
    assert len(list(nodes_of(region_of(mlp).graph, relu2))) == 1
    x = features(5, 8)
    assert torch.equal(stands(mlp)(x), mlp(x))


@pytest.mark.parametrize(
    "other",
    [
        lambda m, h: F.relu(h) ** 3,
        lambda m, h: F.relu(h) * h,
        lambda m, h: F.gelu(h).square(),
        lambda m, h: h.square(),
        lambda m, h: 2 ** F.relu(h),
        lambda m, h: F.relu(h) * F.relu(h + 1),
    ],
)
def test_what_is_not_relu_squared(other: Callable[[nn.Module, Tensor], Tensor]) -> None:
    mlp = MLP(other)
    assert not list(nodes_of(region_of(mlp).graph, relu2))
    x = features(5, 8)
    assert torch.equal(stands(mlp)(x), mlp(x))


def test_relu_with_another_reader_stays() -> None:
    def both(m: nn.Module, h: Tensor) -> Tensor:
        positive = F.relu(h)
        return positive.square() + positive

    mlp = MLP(both)
    assert not list(nodes_of(region_of(mlp).graph, relu2))
    x = features(5, 8)
    assert torch.equal(stands(mlp)(x), mlp(x))


def test_a_write_in_place_that_others_see_stays_one() -> None:
    def written(m: nn.Module, h: Tensor) -> Tensor:
        squared = F.relu(h, inplace=True).square()
        return squared + h  # h is relu(h) by now

    class Own(MLP):
        def __init__(self) -> None:
            super().__init__(lambda m, h: m.act(h).square() + h)
            self.act = nn.ReLU(inplace=True)

    def gate(m: nn.Module, h: Tensor) -> Tensor:
        return F.silu(h, inplace=True) + h

    x = features(5, 8)
    for mlp in (MLP(written), MLP(gate), Own()):
        assert not list(nodes_of(region_of(mlp).graph, relu2))
        assert torch.equal(stands(mlp)(x), mlp(x))


def test_names_of_submodules_mean_nothing() -> None:
    """A leaf that is called `relu` or `square` is no relu and no square."""

    class Misnamed(MLP):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(lambda m, h: getattr(m, second)(getattr(m, first)(h)))
            self.add_module(first, nn.GELU())
            self.add_module(second, nn.Tanh())

    x = features(5, 8)
    for names in (("relu", "square"), ("square", "relu")):
        mlp = Misnamed(*names)
        assert not list(nodes_of(region_of(mlp).graph, relu2))
        assert torch.equal(stands(mlp)(x), mlp(x))

    class Half(MLP):
        def __init__(self) -> None:
            super().__init__(lambda m, h: m.relu(h).square())
            self.relu = nn.GELU()

    half = Half()
    assert not list(nodes_of(region_of(half).graph, relu2))
    assert torch.equal(stands(half)(x), half(x))


def test_silu_module_and_keywords_become_one_form() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.act = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.a(input=x))
            return F.silu(input=F.linear(weight=self.a.weight, input=x))

    mlp = Own()
    region = region_of(mlp)
    assert [len(node.args) for node in nodes_of(region.graph, F.linear)] == [3, 3]
    assert all(not node.kwargs for target in (F.linear, F.silu) for node in nodes_of(region.graph, target))
    assert len(list(nodes_of(region.graph, F.silu))) == 2
    assert readers(region.graph, "a.weight") == 2
    assert readers(region.graph, "a.bias") == 1
    x = features(5, 8)
    assert torch.equal(stands(mlp)(x), mlp(x))


class Conv1D(nn.Module):
    """GPT-2's linear, as `transformers` has it: x W + b with W `[in, out]`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(features(nx, nf))
        self.bias = nn.Parameter(features(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def test_conv1d_is_a_linear_with_a_transposed_weight() -> None:
    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = Conv1D(16, 8)
            self.proj = Conv1D(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(F.relu(self.fc(x)).square())

    mlp = GPT()
    region = region_of(mlp)
    linears = list(nodes_of(region.graph, F.linear))
    assert [weight_name(node) for node in linears] == ["fc.weight", "proj.weight"]
    assert all(is_transposed(node) for node in linears)
    x = features(2, 5, 8)
    torch.testing.assert_close(stands(mlp)(x), mlp(x))


class Scaled(Conv1D):
    """What a fork may make of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


Scaled.__name__ = "Conv1D"


class Rounding(nn.Linear):
    """The forward is nn.Linear's; what it reads is rounded."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__(wide, narrow)
        nn.init.normal_(self._parameters["weight"])

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value.round(decimals=1) if name == "weight" else value


def test_linears_of_other_classes_are_compared_with_what_they_compute() -> None:
    """A name and a forward that is nn.Linear's say nothing of a multiplier or of the weight that is read."""

    class MLP(nn.Module):
        def __init__(self, kind: type) -> None:
            super().__init__()
            self.up, self.down = kind(8, 8), kind(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    for kind in (Scaled, Rounding):
        model = nn.Sequential(MLP(kind), MLP(kind))
        found, unclean = trace(model, Check(model, features(2, 8)))
        assert not found
        assert (
            "gives other numbers than the module in evaluation: write it as an nn.Linear"
            in unclean[f"0.up [{kind.__name__}]"]
        )
    model = nn.Sequential(MLP(Conv1D), MLP(Conv1D))
    assert trace(model, Check(model, features(2, 8)))[0]


@pytest.mark.parametrize(
    ("names", "path"),
    [
        (("mlp.up_proj.weight", "mlp.down_proj.weight"), "mlp"),
        (("self_attn.q_proj.weight_in", "self_attn.q_proj.weight_out"), "self_attn.q_proj"),
        (("mlp.up_proj.weight",), "mlp.up_proj"),
        (("up.weight", "down.weight"), ""),
        (("a.b.weight", "a.bc.weight"), "a"),
        (("weight",), ""),
    ],
)
def test_common_path(names: tuple[str, ...], path: str) -> None:
    assert common_path(*names) == path
