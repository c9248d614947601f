"""activation24: linear → relu² → linear, wherever it came from, becomes one 2:4 operation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from toys import Block, Relu2MLP, SwiGLU, Trunk, features, llama, tokens

from act24.passes import Activation24, PassError, Pipeline, Region, Relu2FFN, Weight24, apply_, plan, trace
from act24.passes.graph.region import RegionModule
from act24.relu2 import relu2
from act24.sparse24.feed_forward.operation import activation24


def sparse(h: Tensor) -> Tensor:
    """relu² with the two largest of four, by sorting."""
    groups = h.relu().square().unflatten(-1, (-1, 4))
    ranks = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (groups * (ranks < 2)).flatten(-2)


def functions(module: nn.Module) -> list[Callable[..., object]]:
    assert isinstance(module, RegionModule)
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


# Rewrites


class Cast(nn.Module):
    """As T5 in half precision: something lies between the activation and the linear that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.dropout, self.b = nn.Linear(16, 32), nn.Dropout(0.0), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.dropout(F.relu(self.a(x))).to(self.b.weight.dtype))


def test_a_linear_that_does_not_read_the_activation_itself_is_not_reached() -> None:
    report = plan(Cast(), [Activation24()])
    (coverage,) = report.partial  # which is warned of
    assert coverage.reached * 2 == coverage.total
    ((name, share, reason),) = coverage.left
    assert (name, share) == ("b", 0.5)
    assert reason.startswith("to stands between it and the activation")


def test_a_product_that_stays_dense_has_the_reason() -> None:
    """An identity is none, nor is a dropout that drops nothing; and what the remedy says helps."""

    def network(between: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), between, nn.Linear(16, 8))

    def left(model: nn.Module, *before: Any) -> list[tuple[str, str]]:
        reach = plan(model, [*before, Activation24()]).coverage[-1]
        return [(names, reason) for names, _, reason in reach.left]

    dropped = "2 [Dropout] stands between it and the activation: put nn.Identity() there"
    assert left(network(nn.Dropout(0.1))) == [("3", dropped)]
    for between in (nn.Identity(), nn.Dropout(0.0)):
        model = network(between)
        assert left(model) == []
        x = torch.randn(3, 8)
        expected = model[3](sparse(model[0](x).relu().sqrt()))
        pipeline = apply_(model, [Activation24()])
        torch.testing.assert_close(model(x), expected)
    (row,) = plan(network(between), [Activation24(method="soft_threshold_weights")]).rows
    assert not row.note  # the linear behind the dropout says the scale
    assert [node.op for node in pipeline.modules[0].graph.nodes].count("call_module") == 0
    model[2].p = 0.5  # of what is not called any more
    with pytest.raises(PassError, match=r"2\.p was 0\.0 when the model was traced, and is 0\.5"):
        model(x)
    ((_, of_weight24),) = left(network(nn.Identity()), Weight24())
    assert of_weight24.startswith("weight24 has it: put activation24 in front")
    for act in ("relu", "relu2"):
        gated = nn.Sequential(Gated(act))
        ((names, reason),) = left(gated)
        assert names == "0.{up,down}"
        assert re.match("the activation gates it.*, and put relu2_ffn in front", reason)
        with pytest.raises(PassError, match=f"gated by {act}: give the gate silu"):
            plan(gated, [Relu2FFN()])
    assert left(nn.Sequential(Gated("silu")), Relu2FFN()) == []


class Gated(SwiGLU):
    def __init__(self, act: str) -> None:
        super().__init__()
        self.act = {"relu": F.relu, "silu": F.silu, "relu2": lambda x: F.relu(x).square()}[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def test_after_relu2_ffn_every_mlp_of_the_stock_llama_is_one_operation() -> None:
    model = llama(3)
    report = apply_(model, [Relu2FFN(), Activation24()]).report
    rows = [row for row in report.rows if row.pass_name == "activation24"]
    assert [row.fqn for row in rows] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert {(row.before, row.after) for row in rows} == {
        ("linear · relu2 · linear", "2:4 naive, dense backward")
    }
    assert {(row.parameters_before, row.parameters_after) for row in rows} == {(2 * 32 * 128, 2 * 32 * 128)}
    for layer in model.model.layers:
        assert functions(layer).count(activation24) == 1
        assert relu2 not in functions(layer)
        assert functions(layer).count(F.linear) == 4  # those of attention
    assert model(tokens()).isfinite().all()


def test_parameters_and_state_dict_do_not_change() -> None:
    model = Trunk(lambda: Relu2MLP(bias=True))
    parameters = dict(model.named_parameters())
    state = list(model.state_dict())
    apply_(model, [Activation24()])
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == state


# Leaves what is clean as it is, and says so


@pytest.mark.parametrize("make", [SwiGLU, lambda: nn.Sequential(nn.Linear(16, 16), nn.GELU())])
def test_nothing_to_do(make: Callable[[], nn.Module]) -> None:
    model = Trunk(make)
    blocks = list(model.blocks)
    with pytest.raises(PassError, match=r"blocks\.0 \[Block\] and 1 more: no relu"):
        apply_(model, [Activation24()])
    assert apply_(model, [Activation24(optional=True)]).report.rows == ()
    assert all(block is before for block, before in zip(model.blocks, blocks, strict=True))


def test_a_width_that_is_no_multiple_of_four_is_left_and_named() -> None:
    model = nn.ModuleList([Relu2MLP(16, 30), Relu2MLP(16, 32)])
    report = apply_(model, [Activation24()]).report
    assert [row.fqn for row in report.rows] == ["1"]
    assert report.misses == (
        (
            "activation24",
            "0",
            "F is 30, not a multiple of 4: build the model with such a size, or leave it out with ignore",
        ),
    )
    with pytest.raises(PassError, match="F is 30, not a multiple of 4"):
        plan(nn.ModuleList([Relu2MLP(16, 30)]), [Activation24()])


# Numerics


@pytest.mark.parametrize("bias", [False, True])
def test_computes_the_masked_function_and_its_gradient(bias: bool) -> None:
    model = Trunk(lambda: Relu2MLP(bias=bias)).double()
    x = features(2, 5, 16).double().requires_grad_()

    def by_hand(x: Tensor) -> Tensor:
        for block in model.blocks:
            mlp = block.mlp
            h = F.linear(block.norm(x), mlp.up.weight, mlp.up.bias if bias else None)
            x = x + F.linear(sparse(h), mlp.down.weight, mlp.down.bias if bias else None)
        return x

    apply_(model, [Activation24()])
    leaves = [x, *model.parameters()]
    torch.testing.assert_close(model(x), by_hand(x))
    torch.testing.assert_close(
        torch.autograd.grad(model(x).square().sum(), leaves),
        torch.autograd.grad(by_hand(x).square().sum(), leaves),
    )


def test_two_of_four_at_most_reach_the_second_product() -> None:
    """Seen from outside: with the identity behind it, the output is the activation."""
    mlp = Relu2MLP(16, 16)
    with torch.no_grad():
        mlp.down.weight.copy_(torch.eye(16))
    model = nn.ModuleList([mlp])
    x = features(64, 16)
    dense = mlp(x)
    apply_(model, [Activation24()])
    y = model[0](x)
    assert ((y != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
    assert ((dense != 0).unflatten(-1, (-1, 4)).sum(-1) > 2).any()
    assert torch.equal(y[y != 0], dense[y != 0])


# Shared and tied


def test_a_shared_or_tied_child_is_no_obstacle_because_parameters_stay() -> None:
    mlp = Relu2MLP()
    tied = Relu2MLP()
    tied.up.weight = mlp.up.weight
    model = nn.ModuleList([Block(mlp), Block(mlp), Block(tied)])
    x = features(4, 16).double()
    model.double()
    expected = [block(x) for block in (*model,)]
    report = apply_(model, [Activation24()]).report
    assert len(report.rows) == 3
    assert model[2].mlp.up.weight is model[0].mlp.up.weight
    for block, dense in zip(model, expected, strict=True):
        assert not torch.equal(block(x), dense)
        h = F.linear(block.norm(x), block.mlp.up.weight)
        torch.testing.assert_close(block(x), x + F.linear(sparse(h), block.mlp.down.weight))


def test_a_module_called_twice_is_two_places() -> None:
    class Twice(Relu2MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model = nn.ModuleList([Twice()])
    apply_(model, [Activation24()])
    assert functions(model[0]).count(activation24) == 2


# Nested, and other surroundings


class Surrounded(nn.Module):
    """relu² in surroundings other than between two linears of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(16, 32), nn.Linear(16, 32)
        self.c, self.d = nn.Linear(32, 16), nn.Linear(32, 16)

    def hidden(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if self.kind == "sum before" else self.a(x)

    def out(self, h: Tensor, activation: Tensor) -> Tensor:
        match self.kind:
            case "two readers":
                return self.c(activation) + self.d(activation)
            case "read before":
                return self.c(activation) + h.mean()
            case "scaled after":
                return self.c(activation * 0.5)
            case "as weight":
                return F.linear(h, activation[:1])
            case "no linear behind":
                return activation
        return self.c(activation)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.out(h, F.relu(h).square())


KINDS = ("plain", "sum before", "two readers", "read before", "scaled after", "as weight", "no linear behind")


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_sees_the_same_2_4_activation(kind: str) -> None:
    net = Surrounded(kind).double()
    x = features(3, 16).double()
    h = net.hidden(x)
    expected = net.out(h, sparse(h))
    assert not torch.equal(expected, net(x))
    model = nn.ModuleList([net])
    apply_(model, [Activation24()])
    assert functions(model[0]).count(activation24) == 1
    torch.testing.assert_close(model[0](x), expected)


def test_inside_a_bottleneck() -> None:
    """linear → relu² → linear in place of one projection, as low-rank passes leave it."""

    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_in = nn.Parameter(features(8, 16) / 4)
            self.weight_out = nn.Parameter(features(16, 8) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(relu2(F.linear(x, self.weight_in)), self.weight_out)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = Bottleneck(), Bottleneck()

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) * self.v_proj(x)

    model = Trunk(Attention)
    report = apply_(model, [Activation24(ignore=("blocks.1.*.q_proj",))]).report
    assert [row.fqn for row in report.rows] == [
        "blocks.0.mlp.q_proj",
        "blocks.0.mlp.v_proj",
        "blocks.1.mlp.v_proj",
    ]


def test_transposed_weights() -> None:
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf = nf
            self.weight = nn.Parameter(features(nx, nf) / 4)
            self.bias = nn.Parameter(features(nf))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.proj = Conv1D(32, 16), Conv1D(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(F.relu(self.fc(x)) ** 2)

    model = Trunk(GPT).double()
    x = features(3, 16).double()

    def by_hand(x: Tensor) -> Tensor:
        for block in model.blocks:
            h = block.norm(x) @ block.mlp.fc.weight + block.mlp.fc.bias
            x = x + sparse(h) @ block.mlp.proj.weight + block.mlp.proj.bias
        return x

    report = apply_(model, [Activation24()]).report
    assert report.rows[0].parameters_before == 2 * 16 * 32 + 32 + 16
    torch.testing.assert_close(model(x), by_hand(x))


def test_names_of_sites_are_the_same_dense_and_sparse() -> None:
    """Buffers under these names outlive a change of pipeline."""
    model = Trunk(Relu2MLP)
    names: list[list[str]] = []
    for region in trace(model)[0]:
        dense = Activation24().plan(region)
        names.append([match.path for match in dense.matches])
    assert names == [["mlp"], ["mlp"]]


def test_the_backward_survives_being_traced_again() -> None:
    """Tracing through the operation would leave the gradient to autograd, or drop it."""
    model = Trunk(Relu2MLP).double()
    apply_(model, [Activation24(backward="split_gemm", dense_ratio=0.0)])
    block = model.blocks[0]
    again = fx.symbolic_trace(fx.symbolic_trace(block))
    assert sum(node.target is activation24 for node in again.graph.nodes) == 1
    x = features(8, 16).double()
    weight = model.blocks[0].mlp.up.weight
    expected = torch.autograd.grad(block(x).square().sum(), weight)
    assert torch.equal(torch.autograd.grad(again(x).square().sum(), again.mlp.up.weight)[0], expected[0])
    exact = Trunk(Relu2MLP).double()
    exact.load_state_dict(model.state_dict(), strict=False)
    apply_(exact, [Activation24()])
    dense = torch.autograd.grad(exact.blocks[0](x).square().sum(), exact.blocks[0].mlp.up.weight)
    assert not torch.allclose(dense[0], expected[0])  # so it is not what autograd would have said


def test_linears_far_away_give_the_name_too() -> None:
    """Past forty forks and joins, which have a million million paths."""

    class Far(Relu2MLP):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            for _ in range(40):
                h = h + h.cos()
            h = F.relu(h).square()
            for _ in range(40):
                h = h + h.sin()
            return self.down(h)

    assert [row.fqn for row in plan(Trunk(Far), [Activation24()]).rows] == ["blocks.0.mlp", "blocks.1.mlp"]


def test_the_plan_does_not_touch_the_region() -> None:
    region: Region = trace(Trunk(Relu2MLP))[0][0]
    before = str(region.graph)
    Activation24().plan(region)
    assert str(region.graph) == before


def test_dense_and_sparse_share_parameters_through_the_same_pipeline() -> None:
    model = Trunk(Relu2MLP)
    pipeline = Pipeline(model, [Activation24(from_step=1)])
    pipeline.commit_()
    x = features(4, 16)
    dense = model(x)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.mul_(2)
    pipeline.lower_(1)
    pipeline.lower_(0)
    assert not torch.equal(model(x), dense)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.div_(2)
    assert torch.equal(model(x), dense)
