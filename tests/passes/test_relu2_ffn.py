"""relu2_ffn: a gated feed-forward network becomes a plain one with relu²."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Block, Relu2MLP, SwiGLU, Trunk, features, llama, tokens

from act24.options import OptionError
from act24.passes import PassError, Pipeline, Relu2FFN, apply_, plan
from act24.passes.graph.region import RegionModule


def linear_names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters() if name.endswith("weight")}


# Rewrites


@given(width=st.integers(1, 20_000))
def test_width_is_parity_to_the_nearest_multiple_of_128(width: int) -> None:
    with torch.device("meta"):
        model = nn.ModuleList([SwiGLU(8, width)])
    row = plan(model, [Relu2FFN()]).rows[0]
    new = row.parameters_after // 16
    assert new % 128 == 0
    assert new >= 128
    assert row.after == f"relu2(up), F {new}"
    if width >= 86:  # below, one multiple is the least there is
        assert abs(new - 1.5 * width) <= 64


def test_rewrites_every_block_of_the_stock_llama() -> None:
    model = llama(3)
    report = apply_(model, [Relu2FFN()]).report
    assert [row.fqn for row in report.rows] == [f"model.layers.{i}.mlp" for i in range(3)]
    for layer in model.model.layers:
        assert isinstance(layer, RegionModule)
        assert layer.mlp.up_proj.weight.shape == (128, 32)
        assert layer.mlp.down_proj.weight.shape == (32, 128)
        assert not hasattr(layer.mlp, "gate_proj")
    before = 3 * 3 * 32 * 48
    assert report.parameters_before - before == report.parameters_after - 3 * 2 * 32 * 128
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert model(tokens()).isfinite().all()


def test_the_plan_says_what_is_fresh() -> None:
    row = plan(llama(1), [Relu2FFN()]).rows[0]
    assert row.note == "fresh: up_proj.weight, down_proj.weight"
    assert plan(llama(1), [Relu2FFN(width="keep")]).rows[0].note == "weights kept"


def test_fresh_weights_are_normal_and_fresh_biases_zero() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([SwiGLU(64, 256, bias=True)])
    bias = model[0].down.bias
    apply_(model, [Relu2FFN(initializer_range=0.5)])
    for weight in (model[0].up.weight, model[0].down.weight):
        assert abs(weight.mean().item()) < 0.02
        assert abs(weight.std().item() - 0.5) < 0.02
    assert model[0].up.bias.shape == (384,)
    assert not model[0].up.bias.any()
    assert model[0].down.bias is bias  # its size does not depend on F


# Leaves what is clean as it is, and says so


@pytest.mark.parametrize("other", [Relu2MLP, lambda: nn.Sequential(nn.Linear(16, 16))])
def test_no_gated_network(other: Any) -> None:
    model = Trunk(other)
    blocks = list(model.blocks)
    with pytest.raises(
        PassError,
        match=r"no down\(silu\(gate\(x\)\) \* up\(x\)\)|a single linear|already relu²: use activation24",
    ):
        apply_(model, [Relu2FFN()])
    apply_(model, [Relu2FFN(optional=True)])
    assert all(block is before for block, before in zip(model.blocks, blocks, strict=True))


class Between(nn.Module):
    """A gated network with something in a place that matters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        match self.kind:
            case "gelu":
                return self.down(F.gelu(gate) * up)
            case "silu twice":
                return self.down(F.silu(gate) * F.silu(gate))
            case "scaled":
                return self.down(F.silu(gate) * up * 2)
            case "added":
                return self.down(F.silu(gate) + up)
            case "by a number":
                return self.down(F.silu(gate) * 3)
            case "product read twice":
                product = F.silu(gate) * up
                return self.down(product) + product.mean()
            case "no gate":
                return self.down(F.silu(gate))
        raise AssertionError


@pytest.mark.parametrize(
    "kind", ["gelu", "silu twice", "scaled", "added", "by a number", "product read twice", "no gate"]
)
def test_lookalikes_stay(kind: str) -> None:
    with pytest.raises(PassError, match="relu2_ffn matches nothing"):
        plan(Trunk(lambda: Between(kind)), [Relu2FFN()])


class Reread(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.silu(self.gate(x)) * up) + up.mean()


class TwoInputs(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x + 1))


class Twice(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Computed(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * F.linear(x, self.up.weight * 2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Reread, "the output of mlp.up.weight is used elsewhere too"),
        (TwoInputs, "gate and up read different inputs"),
        (Twice, "blocks.{0..1}.mlp.gate.weight is used more than once"),
        (Computed, "a weight is not a plain parameter"),
    ],
)
def test_near_misses_say_why(make: type[nn.Module], reason: str) -> None:
    report = plan(Trunk(make), [Relu2FFN(optional=True)])
    assert not report.rows
    one = reason.replace("{0..1}", "0")
    assert any(why.startswith(one) and "leave it out" in why for _, _, why in report.misses)
    assert str(report).count(f"relu2_ffn leaves blocks.{{0..1}}.mlp as it is: {reason}") == 1
    with pytest.raises(PassError, match=one):
        plan(Trunk(make), [Relu2FFN()])


class Dropped(SwiGLU):
    """As T5 and ModernBERT have it."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.silu(self.gate(x)) * self.up(x))
        return self.down(hidden.to(self.down.weight.dtype))


def test_dropout_and_a_cast_between_product_and_down_stay() -> None:
    model, x = nn.Sequential(Dropped(), Dropped()), features(3, 16)
    report = apply_(model, [Relu2FFN()]).report
    assert [row.fqn for row in report.rows] == ["0", "1"]
    up, down = (model[0].get_parameter(f"{name}.weight") for name in ("up", "down"))
    expected = F.linear(F.relu(F.linear(x, up)).square(), down)
    torch.testing.assert_close(model[0].eval()(x), expected)
    assert not torch.equal(model[0].train()(x), expected)


class Second(SwiGLU):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.back(torch.tanh(self.wide(x)))


def test_a_network_beside_one_that_is_taken_has_its_own_reason() -> None:
    (coverage,) = plan(nn.Sequential(Second(), Second()), [Relu2FFN()]).coverage
    ((names, _, reason),) = coverage.left
    assert names == "{0..1}.{wide,back}"
    assert reason.startswith("no part of a down(silu(gate(x)) * up(x)): give it relu²")


# Numerics


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", ["keep", "parity"])
def test_computes_down_of_relu_squared_of_up(width: Any, bias: bool) -> None:
    model = Trunk(lambda: SwiGLU(16, 24, bias)).double()
    x = features(2, 5, 16).double().requires_grad_()
    apply_(model, [Relu2FFN(width=width)])

    def by_hand(block: nn.Module, x: Tensor) -> Tensor:
        h = F.linear(block.norm(x), block.mlp.up.weight, block.mlp.up.bias if bias else None)
        positive = torch.where(h > 0, h, torch.zeros_like(h))
        return x + F.linear(positive**2, block.mlp.down.weight, block.mlp.down.bias if bias else None)

    expected = by_hand(model.blocks[1], by_hand(model.blocks[0], x))
    actual = model(x)
    torch.testing.assert_close(actual, expected)
    leaves = [x, *(p for p in model.parameters())]
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
    )


def test_keep_leaves_the_weights_themselves() -> None:
    model = Trunk(SwiGLU)
    up, down = model.blocks[0].mlp.up.weight, model.blocks[0].mlp.down.weight
    pipeline = apply_(model, [Relu2FFN(width="keep")])
    assert model.blocks[0].mlp.up.weight is up
    assert model.blocks[0].mlp.down.weight is down
    assert pipeline.report.parameters_after == pipeline.report.parameters_before - 2 * 16 * 32
    stock = Trunk(SwiGLU)
    mapped, fresh = pipeline.state_from_stock(stock.state_dict())
    assert fresh == ()
    model.load_state_dict(mapped)
    assert torch.equal(model.blocks[0].mlp.up.weight, stock.blocks[0].mlp.up.weight)
    with pytest.raises(PassError, match="SwiGLU and relu² are different functions"):
        pipeline.state_to_stock(model.state_dict())


# Shared and tied


def test_a_shared_block_is_rewritten_once() -> None:
    block = Block(SwiGLU())
    model = nn.ModuleList([block, block])
    report = apply_(model, [Relu2FFN()]).report
    assert len(report.rows) == 1
    assert model[0] is model[1]
    assert isinstance(model[0], RegionModule)


def test_a_shared_mlp_is_left_alone() -> None:
    todo = "untie them, or leave it out with ignore"
    mlp = SwiGLU()
    model = Trunk(lambda: mlp)
    report = plan(model, [Relu2FFN(optional=True)])
    assert [(fqn, why) for _, fqn, why in report.misses] == [
        (f"blocks.{i}.mlp", f"blocks.{i}.mlp.gate.weight is tied to blocks.{1 - i}.mlp.gate.weight: {todo}")
        for i in (0, 1)
    ]


def test_one_tied_bias_is_enough() -> None:
    model = Trunk(lambda: SwiGLU(bias=True), layers=3)
    model.blocks[2].mlp.down.bias = model.blocks[0].mlp.down.bias
    report = apply_(model, [Relu2FFN()]).report
    assert [row.fqn for row in report.rows] == ["blocks.1.mlp"]
    assert model.blocks[2].mlp.down.bias is model.blocks[0].mlp.down.bias


def test_tied_embeddings_stay_tied_and_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.trunk = Trunk(SwiGLU)
            self.head = nn.Linear(16, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.trunk(self.embed(ids)))

    model = Tied()
    before = sum(p.numel() for p in model.parameters())
    report = apply_(model, [Relu2FFN()]).report
    assert model.head.weight is model.embed.weight
    assert report.parameters_before == before
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


# Nested and biased variants


HALVES = [
    "h.chunk(2, dim=-1)",
    "h.split(32, -1)",
    "torch.split(h, [32, 32], dim=-1)",
    "h.tensor_split(2, -1)",
    "(h[..., :32], h[..., 32:])",
    "(h[..., 32:64], h[..., 0:32])",
    "(h.narrow(-1, 0, 32), h.narrow(-1, 32, 32))",
    "(lambda h: (h[..., 0, :], h[..., 1, :]))(h.unflatten(-1, (2, -1)))",
]
NO_HALVES = ["(h[..., ::2], h[..., 1::2])", "(h[..., :32], h[..., :32])", "(h[..., :32] * 2, h[..., 32:])"]


def test_a_fused_linear_is_halved_in_any_spelling() -> None:
    class Fused(nn.Module):
        halves = ""

        def __init__(self) -> None:
            super().__init__()
            self.gate_up, self.down = nn.Linear(16, 64), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            parts = eval(self.halves, {"h": self.gate_up(x), "torch": torch})
            return self.down(F.silu(parts[0]) * parts[1])

    x = features(3, 16)
    for halves in HALVES:
        kind = type("Fused", (Fused,), {"halves": halves})
        net = nn.Sequential(kind(), kind())
        apply_(net, [Relu2FFN(width="keep")], probe=x)
        expected = x
        for part in net:
            h = F.linear(expected, part.gate_up.weight, part.gate_up.bias)
            expected = F.linear(h.relu() ** 2, part.down.weight, part.down.bias)
        torch.testing.assert_close(net(x), expected)
    for halves in NO_HALVES:
        kind = type("Fused", (Fused,), {"halves": halves})
        with pytest.raises(PassError, match=r"gated by silu, but \w+.* lies between its product"):
            plan(nn.Sequential(kind(), kind()), [Relu2FFN()], check=False)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_variants_of_the_spelling(swapped: bool, square: bool) -> None:
    """Either order of the product; F equal to D, where shapes do not tell the two apart."""

    class Variant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = 16 if square else 32
            self.inner = nn.ModuleDict({"w1": nn.Linear(16, inner), "w3": nn.Linear(16, inner)})
            self.act = nn.SiLU()
            self.w2 = nn.Linear(inner, 16)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.act(self.inner["w1"](x)), self.inner["w3"](x)
            return self.w2(torch.mul(up, gate) if swapped else gate.mul(up))

    model = Trunk(Variant)
    apply_(model, [Relu2FFN()])
    mlp = model.blocks[0].mlp
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == {
        "inner.w3.weight": (128, 16),
        "inner.w3.bias": (128,),
        "w2.weight": (16, 128),
        "w2.bias": (16,),
    }
    assert model(features(3, 16)).shape == (3, 16)


def test_bias_on_one_linear_only() -> None:
    class Uneven(SwiGLU):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 32, bias=True)
            self.down = nn.Linear(32, 16, bias=True)

    model = Trunk(Uneven)
    down = model.blocks[0].mlp.down.bias
    row = apply_(model, [Relu2FFN()]).report.rows[0]
    assert model.blocks[0].mlp.down.bias is down
    assert row.parameters_before == 3 * 16 * 32 + 32 + 16
    assert row.parameters_after == 2 * 16 * 128 + 16


def test_two_networks_in_one_block() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SwiGLU(), SwiGLU(16, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Trunk(Two)
    report = apply_(model, [Relu2FFN(ignore=("*.0.mlp.second",))]).report
    assert [row.fqn for row in report.rows] == [
        "blocks.0.mlp.first",
        "blocks.1.mlp.first",
        "blocks.1.mlp.second",
    ]
    assert model.blocks[0].mlp.second.gate.weight.shape == (64, 16)


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="relu2_ffn: initializer_range has to be above 0, got 0"):
        Relu2FFN(initializer_range=0)
    with pytest.raises(OptionError, match="relu2_ffn: activation has no 'gelu'"):
        Relu2FFN(activation="gelu")  # type: ignore[arg-type]


def test_the_traced_model_is_the_only_one_that_changes() -> None:
    """A plan for one model does not reach another of the same class."""
    first, second = llama(), llama()
    Pipeline(first, [Relu2FFN()]).commit_()
    assert linear_names(second.model.layers[0]) > linear_names(first.model.layers[0])


def test_a_network_with_a_frozen_weight_stays_unless_it_is_named() -> None:
    model = Trunk(SwiGLU)
    gate = model.blocks[0].mlp.gate.requires_grad_(False).weight
    report = apply_(model, [Relu2FFN(optional=True)]).report
    assert [row.fqn for row in report.rows] == ["blocks.1.mlp"]
    assert model.blocks[0].mlp.gate.weight is gate
    ((_, where, reason),) = report.misses
    assert (where, reason.partition(":")[0]) == ("blocks.0.mlp", "blocks.0.mlp.gate.weight is frozen")
    model = Trunk(SwiGLU)
    model.blocks[0].mlp.up.requires_grad_(False)
    report = apply_(model, [Relu2FFN(targets=("blocks.*.mlp",))]).report
    assert [row.note for row in report.rows] == [
        "fresh: up.weight, down.weight; frozen before, and train: up.weight",
        "fresh: up.weight, down.weight",
    ]
    assert all(p.requires_grad for p in model.parameters())  # fresh ones that are frozen would stay as drawn
    model = Trunk(SwiGLU)
    model.blocks[0].mlp.up.requires_grad_(False)
    report = apply_(model, [Relu2FFN(width="keep", targets=("blocks.*.mlp",))]).report
    assert report.rows[0].note == "weights kept; stay frozen: up.weight"
    assert not model.blocks[0].mlp.up.weight.requires_grad


def test_a_gated_network_with_something_between_says_what_stands_in_the_way() -> None:
    class Dropped(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(F.silu(self.gate(x)) * self.up(x), 0.0))

    with pytest.raises(
        PassError, match="gated by silu, but dropout lies between its product and the linears"
    ):
        plan(Trunk(Dropped), [Relu2FFN()])
