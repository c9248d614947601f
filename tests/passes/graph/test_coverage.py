"""What a pass leaves of a traced module is named, and counted where it is in the scope of the pass."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.nn.utils.parametrizations import weight_norm
from toys import SwiGLU, Trunk, features, llama

from act24.passes import (
    REGISTRY,
    Activation24,
    Cola,
    Fp8,
    Lora,
    Lost,
    LowRank,
    MaskedLora,
    PartialWarning,
    PassError,
    Recompute,
    Relu2FFN,
    SparseMask,
    Weight24,
    apply_,
    plan,
)
from act24.passes.graph.coverage import Coverage

RANKS = {"attn_rank": 4, "mlp_rank": 4}
EVERY = (
    Relu2FFN(),
    LowRank(**RANKS),
    Cola(**RANKS),
    Lost(**RANKS),
    SparseMask(),
    Lora(targets=("*",)),
    MaskedLora(),
    Activation24(),
    Weight24(),
    Fp8(),
    Recompute(),
)


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
    assert coverage.left == (("{0..1}.mix", 0.0, coverage.left[0][2]),)
    assert coverage.left[0][2].startswith("neither attention nor feed-forward")
    assert not report.partial
    (coverage,) = plan(
        nn.Sequential(Mixed(), Mixed()), [LowRank(**RANKS, targets=("*.mix", "*.first"))]
    ).coverage
    assert not any("neither" in reason for *_, reason in coverage.left)


class Projected(nn.Module):
    """As OPT's projections stand, around the layers, and a router in each of these."""

    def __init__(self) -> None:
        super().__init__()
        self.project_in, self.layers = nn.Linear(16, 16), nn.Sequential(Routed(), Routed())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.project_in(x))


class Routed(Network):
    def __init__(self) -> None:
        super().__init__()
        self.choice = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x) * self.choice(x).softmax(-1).topk(1, dim=-1).values


@pytest.mark.parametrize("one", EVERY, ids=lambda p: p.name)
def test_linears_of_no_role_and_routers_are_named_by_every_pass(one: Any) -> None:
    passes = [Cola(**RANKS), one] if one.name == "recompute" else [replace(one, optional=True)]
    (*_, coverage) = plan(Projected(), passes).coverage
    said = {names: (share, reason) for names, share, reason in coverage.left}
    if one.name != "recompute":  # which takes whole regions
        assert said["layers.{0..1}.choice"] == (0.0, "a router")
    share, reason = said["project_in"]
    assert share == 0.0
    assert reason.startswith("neither attention nor feed-forward")
    other = replace(one, targets=("*", "project_in"), optional=True)
    (*_, coverage) = plan(Projected(), [*passes[:-1], other]).coverage
    assert reason.endswith("name it in targets to take it") == ("project_in" not in str(coverage.left))


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

    first = r'^0 \[Scaled\] asks in forward for the shape of up\.weight.*keep its width.*ignore = \["0"\]$'
    with pytest.raises(PassError, match=first):
        plan(nn.Sequential(Scaled(), SwiGLU()), [Relu2FFN()])
    rows = plan(nn.Sequential(Scaled(), SwiGLU()), [Relu2FFN(ignore=("0",))]).rows
    assert {row.fqn for row in rows} == {"1"}
    with pytest.raises(PassError, match=r"^the model \[Scaled\] asks.* or leave the pass out$"):
        plan(Scaled(), [Relu2FFN()])
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


# Every pass: what it reaches, what of nothing, and nothing of what there is


def test_every_pass_is_here() -> None:
    assert {p.name for p in EVERY} == {name for name, p in REGISTRY.items() if not p.observes}


@pytest.mark.parametrize("one", EVERY, ids=lambda p: p.name)
def test_every_pass_says_what_it_reaches(one: Any) -> None:
    passes = [one]
    if one.name in ("activation24", "recompute"):
        passes.insert(0, Relu2FFN() if one.name == "activation24" else Cola(**RANKS))
    reach = plan(Trunk(SwiGLU), passes).coverage[-1]
    assert (reach.pass_name, reach.reached) == (one.name, reach.total)
    assert str(reach).startswith(f"{one.name} reaches 100% of the ")


@pytest.mark.parametrize("one", EVERY, ids=lambda p: p.name)
def test_a_pass_that_reaches_nothing_of_what_there_is_says_so(one: Any) -> None:
    class Computed(Network):
        def __init__(self) -> None:
            super().__init__()
            weight_norm(self.first)
            weight_norm(self.second)

    model = nn.Sequential(Computed(), Computed())
    with pytest.raises(PassError, match="matches nothing"):
        plan(model, [one])
    report = plan(model, [replace(one, optional=True)])
    (reach,) = report.coverage
    assert reach.reached == 0 < reach.total
    assert f"{one.name} reaches 0% of the " in str(report)
    assert bool(report.partial) == one.promises
    assert "its weight is computed in forward" in str(reach)


@pytest.mark.parametrize("one", EVERY, ids=lambda p: p.name)
def test_a_pass_with_nothing_in_its_scope_promises_nothing(one: Any) -> None:
    report = plan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [replace(one, optional=True)])
    assert f"{one.name} finds no " in str(report)
    assert not report.partial


def test_products_that_stay_dense_behind_lost_are_left() -> None:
    """Its columns read the activation beside its factors, so that no product has it alone."""
    passes = [Relu2FFN(), Lost(scope="mlp", mlp_rank=4), Activation24()]
    with pytest.warns(PartialWarning, match=r"activation24 reaches 0% .*up.*other passes have made parts"):
        report = apply_(Trunk(SwiGLU), passes).report
    assert [one.pass_name for one in report.partial] == ["activation24"]


def test_of_two_passes_of_one_kind_the_one_that_insists_is_heard() -> None:
    model = nn.Sequential(*Trunk(SwiGLU).blocks, Normed())
    passes = [
        LowRank(scope="mlp", mlp_rank=4, targets=("2", "2.*")),
        LowRank(scope="mlp", mlp_rank=2, ignore=("2",), optional=True),
    ]
    with pytest.warns(PartialWarning, match="low_rank reaches 50%"):
        apply_(model, passes)


@pytest.mark.filterwarnings("ignore::act24.passes.PartialWarning")
def test_targets_are_said_and_those_that_name_nothing_too() -> None:
    report = plan(Trunk(SwiGLU), [Lora(targets=("*.up", "*.dwon"), ignore=("blocks.0.*",))])
    (line,) = map(str, report.coverage)
    where = "within targets ['*.up', '*.dwon'] without ['blocks.0.*']"
    assert line == (
        f"lora reaches 100% of the attention and feed-forward matrices {where}; no module is named *.dwon: "
        "correct that, or leave it out"
    )
    assert report.partial


def test_nearly_all_is_not_all() -> None:
    assert str(Coverage("low_rank", "head", 999, 1000, ())) == "low_rank reaches 99% of the head matrices"
    assert str(Coverage("low_rank", "head", 1000, 1000, ())) == "low_rank reaches 100% of the head matrices"


REMADE = {
    'torch.nn.utils.prune.remove(module, "weight")': lambda m: prune.l1_unstructured(m, "weight", 0.5),
    'torch.nn.utils.remove_weight_norm(module, "weight")': torch.nn.utils.weight_norm,
    'torch.nn.utils.remove_spectral_norm(module, "weight")': torch.nn.utils.spectral_norm,
    'torch.nn.utils.parametrize.remove_parametrizations(module, "weight")': parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm")
@pytest.mark.parametrize("call", REMADE)
def test_what_torchs_tools_compute_before_every_forward_is_left_and_how_it_becomes_a_weight(call):
    """And what is done as it says makes a linear of it like any other, with the values that it had."""
    model = llama()
    module = model.model.layers[0].mlp.up_proj
    REMADE[call](module)
    report = plan(model, [Relu2FFN(optional=True), Weight24()], check=False)
    networks, weights = report.coverage
    assert [reason for *_, reason in weights.left] == [
        f"its weight is computed in forward, not read: call {call} first, or leave it out with ignore",
        "the head",
    ]
    *networks_left, (head, _, _) = networks.left
    assert all(call in reason and len(reason) < 180 for *_, reason in networks_left)
    assert (len(networks_left), head) == (2, "lm_head")
    expected = module.eval()(torch.eye(32)).detach()
    eval(call, {"torch": torch, "module": module})
    assert plan(model, [Weight24()], check=False).partial == ()
    torch.testing.assert_close(module(torch.eye(32)), expected)
