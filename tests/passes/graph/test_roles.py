"""What a linear is for, as the graph shows it and as names hint at it; and what a pass reaches of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from toys import SwiGLU, Trunk, features, llama, regions

from act24.passes import (
    Activation24,
    Cola,
    LowRank,
    PartialWarning,
    PassError,
    Relu2FFN,
    Weight24,
    apply_,
    plan,
    trace,
)
from act24.passes.graph.region import RegionModule
from act24.passes.graph.roles import role_by_name


class Scores(nn.Module):
    """Attention under names that say nothing, with scores by hand or by torch, and a network beside it."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        for name in "abcdef":
            setattr(self, name, nn.Linear(16, 16))
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.a(x), self.b(x), self.c(x)
        if self.by_hand:
            mixed = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.d(mixed)
        return x + self.f(F.gelu(self.e(x)))


class Choice(nn.Module):
    """A router beside a network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 4), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        weight, _ = torch.topk(torch.softmax(self.first(x), -1), 1)
        return self.third(F.silu(self.second(x))) * weight


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_graph_tells_attention_from_networks(by_hand: bool) -> None:
    region = trace(nn.ModuleList([Scores(by_hand)]))[0][0]
    roles = {name.removesuffix(".weight"): role for name, role in region.roles.items()}
    assert roles == {"a": "attn", "b": "attn", "c": "attn", "d": "attn", "e": "mlp", "f": "mlp"}


def test_factors_have_the_role_of_their_weight() -> None:
    model = nn.Sequential(Scores(), Scores())
    apply_(model, [Cola(scope="attn", attn_rank=4), Weight24(scope="mlp")])
    names = set(model.state_dict())
    assert {"0.a.weight_in", "0.d.weight_out", "1.e.weight24_mask"} <= names
    assert not any("_in24_mask" in name for name in names)


def test_routers_are_left_alone_unless_named() -> None:
    model = nn.Sequential(Choice(), Choice())
    report = plan(model, [LowRank(scope="mlp", mlp_rank=8)])
    assert {row.fqn.rpartition(".")[2] for row in report.rows} == {"second", "third"}
    assert str(report.coverage[0]).endswith(
        "100% of the feed-forward matrices; left: {0..1}.first (a router)"
    )
    assert {row.fqn for row in plan(model, [Weight24(targets=("*.first",))]).rows} == {"0.first", "1.first"}
    with pytest.raises(PassError, match=r"mlp_rank = 8 is above 4.*ignore = \[\"\*\.first\"\]"):
        plan(model, [LowRank(scope="mlp", mlp_rank=8, targets=("*.first", "*.second"))])


@pytest.mark.parametrize(
    ("fqn", "role"),
    [
        ("attn_layers.0.ffn.w1", "mlp"),
        ("model.decoder.layers.3.fc1", "mlp"),
        ("encoder.layer.0.attention.output.dense", "attn"),
        ("encoder.layer.0.intermediate.dense", "mlp"),
        ("decoder.block.0.layer.1.DenseReluDense.wi", "mlp"),
        ("layers.0.w3", "mlp"),
        ("layers.0.self_attn.q_proj", "attn"),
        ("h.0.query_key_value", "attn"),
        ("rwkv.blocks.0.feed_forward.key", "mlp"),
        ("rwkv.blocks.0.attention.receptance", "attn"),
        ("layers.0.mlp.router", "router"),
        ("layers.0.self_attn.q_proj.lora_A.default", "lora"),
        ("lm_head", "other"),
    ],
)
def test_names_are_read_from_the_inside_out(fqn: str, role: str) -> None:
    assert role_by_name(fqn, {}) == role


# What is reached, and what is left


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.randn(3, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.stacked:
            x = x @ weight
        return x


def test_the_report_says_what_is_left_and_why() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.experts, self.ffn = (
                SwiGLU(),
                Experts(),
                nn.Sequential(nn.Linear(16, 16), nn.GELU()),
            )

        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            return self.ffn(self.experts(self.mlp(x)))

    model = nn.ModuleList([Layer(), Layer()])
    (line,) = plan(model, [Relu2FFN()]).coverage
    total, reached = 2 * (3 * 16 * 32 + 3 * 16 * 16 + 16 * 16), 2 * 3 * 16 * 32
    assert (line.reached, line.total) == (reached, total)
    assert str(line) == (
        "relu2_ffn reaches 60% of the feed-forward matrices; left: {0..1}.experts.stacked 30% (stacked "
        "parameters, which no pass takes apart: make linears of them, or leave it out with ignore = "
        '["{0..1}.experts"]); '
        "{0..1}.ffn.0 10% (its activation is gelu, and nothing gates it: give it relu² (transformers: its "
        'activation "relu2"), and use activation24 alone)'
    )
    ignored = Relu2FFN(ignore=["*.experts"])  # type: ignore[arg-type]
    assert "stacked" not in str(plan(model, [ignored]).coverage[0])
    with pytest.raises(PassError, match="make linears of them, or leave the pass out"):
        plan(nn.ModuleList([Experts(), Experts()]), [Relu2FFN()])
    with pytest.warns(PartialWarning, match="relu2_ffn reaches 60%"):
        apply_(model, [Relu2FFN()])


@pytest.mark.filterwarnings("error")
def test_what_an_earlier_pass_takes_away_is_not_left() -> None:
    pipeline = apply_(Trunk(SwiGLU), [Relu2FFN(), LowRank(scope="mlp", mlp_rank=2)])
    assert [str(line) for line in pipeline.report.coverage] == [
        "relu2_ffn reaches 100% of the feed-forward matrices",
        "low_rank reaches 100% of the feed-forward matrices",
    ]
    assert not pipeline.report.partial


@pytest.mark.filterwarnings("error")
def test_what_is_ignored_or_optional_is_no_remainder() -> None:
    model = Trunk(SwiGLU)
    apply_(model, [Relu2FFN(ignore=("blocks.1.mlp",))])
    assert isinstance(model.blocks[0], RegionModule)
    model = Trunk(SwiGLU)
    model.blocks[1].mlp.requires_grad_(False)
    assert apply_(model, [Relu2FFN(optional=True)]).report.partial


def test_frozen_parameters_stay_unless_targeted() -> None:
    def frozen() -> Trunk:
        model = Trunk(SwiGLU)
        model.blocks[0].requires_grad_(False)
        return model

    report = plan(frozen(), [LowRank(scope="mlp", mlp_rank=2)])
    assert {row.fqn.split(".")[1] for row in report.rows} == {"1"}
    assert {reason for _, _, reason in report.misses} == {
        "frozen: name it in targets to change it all the same"
    }
    assert plan(frozen(), [Weight24(targets=("blocks.0.*",))]).rows
    with pytest.raises(PassError, match="frozen, and what takes its place would never train: unfreeze it"):
        plan(frozen(), [Relu2FFN(targets=("blocks.0.*",))])


def test_factors_of_lora_are_left_alone() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(16, 16)
            self.lora_A, self.lora_B = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = Adapted(), Adapted()

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)).square())

    report = plan(Trunk(MLP), [LowRank(scope="mlp", mlp_rank=4), Activation24()])
    factorised = {row.fqn for row in report.rows if row.pass_name == "low_rank"}
    assert factorised == {f"blocks.{i}.mlp.{name}.base_layer" for i in (0, 1) for name in ("up", "down")}
    assert sum(row.pass_name == "activation24" for row in report.rows) == 2


# What can be a region, and what says why it is none


def test_the_model_itself_can_be_a_region() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    x, names = features(64, 16), list(model.state_dict())
    expected = model(x)
    kept = model
    pipeline = apply_(model, [Activation24(from_step=3)])
    assert pipeline.model is kept
    assert isinstance(model, RegionModule)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == names
    assert [row.fqn for row in pipeline.report.rows] == ["the model"]
    pipeline.lower_(3)
    hidden = F.relu(F.linear(x, model.get_parameter("0.weight"), model.get_parameter("0.bias")))
    groups = hidden.view(64, 8, 4)
    top = torch.zeros_like(groups).scatter(-1, groups.topk(2).indices, 1.0)
    by_hand = F.linear(
        (groups * top).view(64, 32), model.get_parameter("2.weight"), model.get_parameter("2.bias")
    )
    torch.testing.assert_close(model(x), by_hand)
    gated = SwiGLU()
    apply_(gated, [Relu2FFN(), LowRank(scope="mlp", mlp_rank=4, targets=("up", "down"))])
    assert set(gated.state_dict()) == {f"{n}.weight_{part}" for n in ("up", "down") for part in ("in", "out")}
    gated(features(3, 16)).sum().backward()


class Listed(nn.Module):
    """Weights in a list, without modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(32, 16), torch.randn(16, 32)])

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.weights
        return F.linear(F.relu(F.linear(x, up)), down)


class Loop(nn.Module):
    """Layers that are containers alone, whose linears the model calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module(), nn.Module()])
        for layer in self.layers:
            layer.up, layer.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer.down(F.relu(layer.up(x)))
        return x


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda: nn.Sequential(Listed(), Listed()), ["0.weights", "1.weights"]),
        (Loop, ["layers.0", "layers.1"]),
        (lambda: fx.symbolic_trace(Loop()), ["layers.0", "layers.1"]),
    ],
    ids=["ParameterList", "containers", "GraphModule"],
)
def test_linears_without_modules_that_call_them_are_found(make: Any, rows: list[str]) -> None:
    torch.manual_seed(0)
    model = make()
    x = features(2, 3, 16)
    expected = model(x)
    pipeline = apply_(model, [Activation24(from_step=2)], probe=x)
    assert {row.fqn for row in pipeline.report.rows} == set(rows)
    assert torch.equal(model(x), expected)
    pipeline.lower_(2)
    assert not torch.equal(model(x), expected)


def test_what_is_not_traced_says_what_it_hides() -> None:
    class Open(nn.Module):
        def __init__(self, activation: Any) -> None:
            super().__init__()
            self.up, self.act = nn.Linear(16, 32), activation

        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            return self.act(self.up(x))

    class Called(Open):
        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            return F.relu(self.up(x))

    for layer, said in (
        (Open(nn.ReLU()), r"its relu \(act\) is not seen: argument 'again'"),
        (Open(F.relu), r"its relu \(act\) is not seen: argument 'again'"),
        (Called(None), r"its relu is not seen: argument 'again'"),
        (Open(nn.GELU()), r"1 more: argument 'again'"),
    ):
        with pytest.raises(PassError, match=said):
            plan(nn.ModuleList([layer, copy.deepcopy(layer)]), [Activation24()])
    with pytest.raises(PassError, match=r"\[Experts\] and 1 more: stacked parameters, .*: make linears"):
        plan(nn.ModuleList([Experts(), Experts(), nn.Linear(4, 4)]), [Relu2FFN()])


class Plain(nn.Module):
    """Its names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Open(Plain):
    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        return self.b(F.relu(self.a(x)))


@pytest.mark.parametrize("other", [Plain, Open])
def test_what_one_of_several_cannot_is_left_and_counted(other: type[Plain]) -> None:
    """What is not traced has no graph to tell what it is for: its like has, or it has an activation."""
    model = nn.Sequential(Plain(), last := other())
    if other is Plain:
        last.a.forward = lambda x: F.linear(x, last.a.weight)  # as frameworks that offload do
    (line,) = plan(model, [Activation24()], probe=features(2, 16)).coverage
    assert (line.reached, line.total) == (2 * 16 * 32, 4 * 16 * 32)
    (left,) = line.left
    assert left[0] == "1.{a,b}"
    assert left[2].startswith("not traced: its relu is not seen")


def test_what_is_named_beside_everything_is_named() -> None:
    model = llama()
    rows = plan(model, [LowRank(attn_rank=2, mlp_rank=2, targets=("*", "lm_head"))]).rows
    assert "lm_head" in {row.fqn for row in rows}
    assert "lm_head" not in {row.fqn for row in plan(model, [LowRank(attn_rank=2, mlp_rank=2)]).rows}


def test_inference_mode_is_refused() -> None:
    """What it would make could not be written to later."""
    with torch.inference_mode(), pytest.raises(PassError, match=r"torch.inference_mode\(\) .* outside of it"):
        apply_(llama(), [Weight24()])


def test_a_bare_container_is_searched() -> None:
    model = nn.Module()
    model.body = nn.Module()
    model.body.layers = nn.ModuleList([SwiGLU(), SwiGLU()])
    assert regions(model) == {"body.layers.0": "SwiGLU", "body.layers.1": "SwiGLU"}


def test_closed_modules_of_torch_say_why() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), SwiGLU())
    report = plan(model, [LowRank(attn_rank=4, mlp_rank=4)])
    text = str(report.coverage[0])
    assert "torch's own class reads weights past the forward of its linears: write it with nn.Linear" in text


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_with_a_matrix_is_a_linear(transposed: bool) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn((32, 16) if transposed else (16, 32)))
            self.down = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = x @ self.up.T if transposed else torch.matmul(x, self.up)
            return self.down(F.relu(h))

    model = nn.Sequential(Product(), Product())
    x = features(2, 3, 16)
    expected = model(x)
    report = apply_(model, [Activation24(from_step=2)]).report
    assert [row.before for row in report.rows] == ["linear · relu · linear"] * 2
    assert torch.equal(model(x), expected)


# relu2_ffn


class Fused(nn.Module):
    def __init__(self, activation: Any = F.silu, inner: int = 32) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(16, 2 * inner), nn.Linear(inner, 16)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(up * self.activation(gate))


@pytest.mark.parametrize(
    ("width", "inner", "new"), [("parity", 32, 128), ("exact", 32, 48), ("keep", 32, 32), ("parity", 64, 128)]
)
def test_gate_and_up_of_one_linear(width: Any, inner: int, new: int) -> None:
    model = Trunk(lambda: Fused(inner=inner))
    row, *_ = apply_(model, [Relu2FFN(width=width)]).report.rows
    assert row.before == f"silu(gate)·up, F {inner}"
    assert "gate_up.weight" in row.note  # fresh, also where it has the shape of the two together
    assert model.blocks[0].mlp.gate_up.weight.shape == (new, 16)
    assert model.blocks[0].mlp.down.weight.shape == (16, new)
    x, mlp = features(3, 16), model.blocks[0].mlp
    hidden = F.linear(model.blocks[0].norm(x), mlp.gate_up.weight, mlp.gate_up.bias).relu().square()
    torch.testing.assert_close(model.blocks[0](x), x + F.linear(hidden, mlp.down.weight, mlp.down.bias))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_halves_the_other_way_round_are_taken() -> None:
    class Swapped(Fused):
        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.gate_up(x).chunk(2, dim=-1)
            return self.down(up * F.silu(gate))

    assert [row.before for row in plan(Trunk(Swapped), [Relu2FFN()]).rows] == ["silu(gate)·up, F 32"] * 2


def test_networks_gated_by_gelu_are_named_and_taken_where_that_is_asked_for() -> None:
    gelu = lambda x: F.gelu(x, approximate="tanh")  # noqa: E731
    with pytest.raises(PassError, match='gated by gelu: set gate = "gelu" to take it'):
        plan(Trunk(lambda: Fused(gelu)), [Relu2FFN()])
    for gate in ("gelu", "any"):
        rows = plan(Trunk(lambda: Fused(gelu)), [Relu2FFN(gate=gate)]).rows
        assert [row.before for row in rows] == ["gelu(gate)·up, F 32"] * 2
    assert not plan(Trunk(Fused), [Relu2FFN(gate="gelu", optional=True)]).rows
