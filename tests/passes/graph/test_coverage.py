"""What a pass leaves of a traced module is named, and counted where it is in the scope of the pass."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import weight_norm
from toys import features

from act24.passes import Activation24, LowRank, PassError, Relu2FFN, Weight24, apply_, plan

RANKS = {"attn_rank": 4, "mlp_rank": 4}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Normed(Network):
    def __init__(self) -> None:
        super().__init__()
        weight_norm(self.first)


class Spectral(Network):
    def __init__(self) -> None:
        super().__init__()
        spectral_norm(self.first)


class Signs(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + (self.weight.sign() - self.weight).detach(), self.bias)


class Straight(Network):
    def __init__(self) -> None:
        super().__init__()
        self.first = Signs(16, 32)


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(64, 16)), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(F.linear(x, self.first[:32])) * F.linear(x, self.first[32:]))


class Summed(Network):
    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x) + self.beside(x.cumsum(1))))


class Mixed(Network):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.mix(x) + x)


@pytest.mark.parametrize(
    ("kind", "share"), [(Normed, 1 / 2), (Spectral, 1 / 2), (Straight, 1 / 2), (Sliced, 1 / 3)]
)
@pytest.mark.parametrize("one", [LowRank(**RANKS), Weight24(), Activation24()], ids=lambda p: p.name)
def test_a_weight_that_is_computed_is_left_and_said_to_be(kind: Any, share: float, one: Any) -> None:
    if kind is Sliced and one.name == "activation24":
        return  # a gated network, of which it takes the activation alone
    report = plan(nn.Sequential(kind(), kind()), [one])
    (coverage,) = report.coverage
    assert coverage.reached / coverage.total == pytest.approx(share)
    assert [reason.partition(",")[0] for *_, reason in coverage.left] == ["its weight is computed in forward"]
    assert bool(report.partial) == one.promises


def test_linears_that_are_added_into_an_activation_are_a_feed_forward_network() -> None:
    report = plan(nn.Sequential(Summed(), Summed()), [LowRank(**RANKS)])
    places = {f"{n}.{part}" for n in "01" for part in ("first", "second", "beside")}
    assert {row.fqn for row in report.rows} == places
    assert report.coverage[0].reached == report.coverage[0].total


def test_a_linear_beside_is_named_and_not_counted() -> None:
    report = plan(nn.Sequential(Mixed(), Mixed()), [LowRank(**RANKS)])
    (coverage,) = report.coverage
    assert coverage.left == (("*.mix", 0.0, coverage.left[0][2]),)
    assert coverage.left[0][2].startswith("neither attention nor feed-forward")
    assert not report.partial
    (coverage,) = plan(
        nn.Sequential(Mixed(), Mixed()), [LowRank(**RANKS, targets=("*.mix", "*.first"))]
    ).coverage
    assert not any("neither" in reason for *_, reason in coverage.left)


def test_biases_of_several_matrices_are_none() -> None:
    class Biased(Network):
        def __init__(self) -> None:
            super().__init__()
            self.mlp_bias = nn.Parameter(torch.zeros(4, 16))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.mlp_bias.sum(0)

    (coverage,) = plan(nn.Sequential(Biased(), Biased()), [LowRank(**RANKS)]).coverage
    assert coverage.reached == coverage.total == 4 * 16 * 32
    assert not coverage.left


def test_a_size_that_a_pass_changes_is_not_frozen() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x)) * self.up.weight.shape[0] ** -0.5

    with pytest.raises(PassError, match=r"asks in forward for the shape of up\.weight.*keep its width"):
        plan(nn.Sequential(Scaled(), Scaled()), [Relu2FFN()])
    assert plan(nn.Sequential(Scaled(), Scaled()), [Relu2FFN(width="keep")]).rows
    model = nn.Sequential(Scaled(), Scaled())
    x, expected = features(3, 16), model(features(3, 16))
    apply_(model, [LowRank(attn_rank=16, mlp_rank=16, init="svd")])  # whose factors have the size in common
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_weights_that_lie_on_one_memory_are_tied() -> None:
    class Tied(Network):
        def __init__(self) -> None:
            super().__init__()
            self.second.weight = nn.Parameter(self.first.weight.data.t())

    with pytest.raises(PassError, match=r"0\.first: tied to 0\.second\.weight"):
        plan(nn.Sequential(Tied(), Tied()), [LowRank(**RANKS)])
    flat = torch.randn(2, 32 * 16)
    model = nn.Sequential(Network(), Network())
    for row, network in zip(flat, model, strict=True):  # one storage, as a file has it, and no byte in common
        network.first.weight = nn.Parameter(row.view(32, 16))
    assert not plan(model, [LowRank(**RANKS)]).misses


def test_what_cannot_be_copied_is_not_run_and_said_to_be() -> None:
    class Meter:
        def __init__(self) -> None:
            self.values, self.lock = [], threading.Lock()

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.meter = nn.Sequential(Network(), Network()), Meter()

        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks(x)
            self.meter.values.append(float(y.norm()))
            return y

    model = Root()
    report = plan(model, [Weight24()])
    assert "holds Root.meter" in report.checked
    assert "2 regions compute what their modules do" in report.checked
    assert not model.meter.values


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_script_is_refused_before_anything_is_run() -> None:
    model = nn.Sequential(Network(), Network())
    model[0].first = torch.jit.script(nn.Linear(16, 32))
    with pytest.raises(PassError, match=r"0\.first \[RecursiveScriptModule\] is a script"):
        plan(model, [Weight24()])
