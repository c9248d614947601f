"""Regions: what is one, what is not and why, and that looking leaves no trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from toys import Block, Relu2MLP, SwiGLU, Trunk, features, llama, tokens

from act24.passes import PassError, Pipeline, Relu2FFN, apply_, trace
from act24.passes.region import RegionModule


def regions(model: nn.Module) -> dict[str, str]:
    """Name to class of every region."""
    return {fqn: type(r.module).__name__ for r in trace(model)[0] for fqn in r.fqns}


def unclean(mlp: nn.Module) -> str:
    """Why a module is no region; its linears still are."""
    found, reasons = trace(nn.ModuleDict({"a": mlp, "b": copy.deepcopy(mlp)}))
    assert {type(r.module) for r in found} <= {nn.Linear}
    return reasons[f"a [{type(mlp).__name__}]"]


def stand(model: nn.Module) -> nn.Module:
    """The model with every region standing as a graph module."""
    Pipeline(model, [], keep_all=True).commit_()
    return model


class Net(nn.Module):
    """Two linears; subclasses say what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)


def test_blocks_of_the_stock_llama_are_the_regions() -> None:
    assert regions(llama(3)) == {
        "model.layers.0": "LlamaDecoderLayer",
        "model.layers.1": "LlamaDecoderLayer",
        "model.layers.2": "LlamaDecoderLayer",
        "lm_head": "Linear",
    }
    assert "lm_head" not in regions(llama(tie_word_embeddings=True))


def test_every_linear_is_a_functional_node_under_its_own_name() -> None:
    model = llama()
    region = trace(model)[0][0]
    linears = [node for node in region.graph.nodes if node.target is F.linear]
    names = {n.removesuffix(".weight") for n in region.parameters if n.endswith("proj.weight")}
    assert {node.args[1].target.removesuffix(".weight") for node in linears} == names
    assert all(len(node.args) == 3 and not node.kwargs for node in linears)
    leaves = {node.target for node in region.graph.nodes if node.op == "call_module"}
    assert leaves == {"input_layernorm", "post_attention_layernorm"}


def test_traced_model_computes_the_same() -> None:
    model = llama(num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    expected, state = model(tokens()), dict(model.state_dict())
    parameters = dict(model.named_parameters())
    stand(model)
    assert isinstance(model.model.layers[0], RegionModule)
    assert torch.equal(model(tokens()), expected)
    assert list(model.state_dict()) == list(state)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_a_module_that_does_not_repeat_is_a_region_where_nothing_below_repeats() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = SwiGLU()
            self.trunk = Trunk(SwiGLU)

    assert regions(Model()) == {"body": "SwiGLU", "trunk.blocks.0": "Block", "trunk.blocks.1": "Block"}


def test_sequential_is_opened_and_repeats_by_its_position() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)), nn.Linear(4, 2))
    x = features(3, 4)
    expected = model(x)
    assert regions(model) == {"0": "Sequential", "1": "Linear"}
    assert torch.equal(stand(model)(x), expected)


def test_planning_leaves_the_model_alone() -> None:
    model = Trunk(SwiGLU)
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    trace(model)
    for name, module in model.named_modules():
        kind, attributes = before[name]
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
        assert all(value is attributes[key] for key, value in vars(module).items())


def test_arguments_keep_their_names() -> None:
    class Keywords(Net):
        def forward(self, input: Tensor, filter: Tensor, *, scale: Tensor) -> Tensor:
            return self.b(self.a(input) * filter) * scale

    model = nn.ModuleList([Keywords(), nn.Linear(4, 4)])
    x, y, z = features(3, 4), features(4, seed=1), features(1, seed=2)
    expected = model[0](x, filter=y, scale=z)
    apply_(model, [Relu2FFN(optional=True)])
    stand(model)
    assert isinstance(model[0], RegionModule)
    assert torch.equal(model[0](x, filter=y, scale=z), expected)
    assert torch.equal(model[0](scale=z, filter=y, input=x), expected)
    with pytest.raises(TypeError):
        model[0](x, y)


# What makes a module unclean


def test_default_argument() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return self.b(self.a(x)) * scale

    assert "'scale'" in unclean(Scaled())


@pytest.mark.parametrize("star", ["args", "kwargs"])
def test_open_arguments(star: str) -> None:
    class Args(Net):
        def forward(self, x: Tensor, *args: Any) -> Tensor:
            return self.b(self.a(x))

    class Kwargs(Net):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.b(self.a(x))

    assert "open arguments" in unclean(Args() if star == "args" else Kwargs())


def test_decorated_forward() -> None:
    class Quiet(Net):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    assert "decorated" in unclean(Quiet())


def test_forward_replaced_on_the_instance() -> None:
    """As offloading hooks do; a linear so treated is not opened either."""
    net = SwiGLU()
    net.up.forward = lambda x: nn.Linear.forward(net.up, x) + 1  # type: ignore[method-assign]
    model = nn.ModuleDict({"a": net})
    assert regions(model) == {"a.gate": "Linear", "a.down": "Linear"}
    own = SwiGLU()
    own.forward = own.forward  # type: ignore[method-assign]
    assert "decorated" in trace(nn.ModuleDict({"a": own}))[1]["a [SwiGLU]"]


def test_branch_on_values() -> None:
    class Branch(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.sum() > 0 else x

    class Loop(Net):
        def forward(self, x: Tensor) -> Tensor:
            for row in x:
                x = x + self.b(self.a(row))
            return x

    assert "control flow" in unclean(Branch())
    assert unclean(Loop())


@pytest.mark.parametrize("hidden", [False, True])
def test_branch_on_an_argument_being_none(hidden: bool) -> None:
    """A proxy is never None, so tracing would freeze `is_causal` to False."""

    def attend(q: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=mask is None)

    class Attention(Net):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            x = self.a(x)
            if hidden:
                return self.b(attend(x, mask))
            return self.b(x if mask is None else x + mask)

    assert "'mask' is None" in unclean(Attention())


def test_an_argument_that_may_be_none_and_makes_no_difference_is_clean() -> None:
    class Attention(Net):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            x = self.a(x)
            return self.b(F.scaled_dot_product_attention(x, x, x, attn_mask=mask))

    model = nn.ModuleList([Attention()])
    x = features(2, 3, 4)
    expected = model[0](x, None), model[0](x, torch.eye(3).bool())
    assert regions(model) == {"0": "Attention"}
    stand(model)
    assert torch.equal(model[0](x, None), expected[0])
    assert torch.equal(model[0](x, torch.eye(3).bool()), expected[1])


@pytest.mark.parametrize("kind", ["no_grad", "autocast"])
def test_mode_set_inside_forward(kind: str) -> None:
    class Inner(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            with torch.no_grad() if kind == "no_grad" else torch.autocast("cpu", torch.bfloat16):
                x = x * 2
            return self.b(x)

    assert "mode of its own" in unclean(Inner())


def test_tracing_under_autocast_is_no_mode_of_the_module() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert regions(nn.ModuleList([SwiGLU()])) == {"0": "SwiGLU"}


def test_attribute_written_in_forward_is_refused_and_undone() -> None:
    class Recorder(Net):
        def __init__(self) -> None:
            super().__init__()
            self.last: Tensor | None = None
            self.calls = [1]

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.last = x
            self.new = x
            return self.b(x)

    net = Recorder()
    assert "Recorder.last, Recorder.new" in unclean(net)
    assert net.last is None
    assert not hasattr(net, "new")


def test_container_filled_in_forward_is_refused_and_undone() -> None:
    class Recorder(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []
            self.cache = {"old": 1}

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.seen.append(x)
            self.cache["x"] = x
            return self.b(x)

    net = Recorder()
    assert "Recorder.cache, Recorder.seen" in unclean(net)
    assert net.seen == []
    assert net.cache == {"old": 1}


def test_buffer_reassigned_in_forward() -> None:
    class Counter(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return self.b(self.a(x))

    net = Counter()
    unclean(net)
    assert net.count.item() == 0


def test_buffer_changed_in_place_stays_alive() -> None:
    class Counter(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.b(self.a(x)) * self.count

    model = nn.ModuleList([Counter()])
    stand(model)
    model[0](features(2, 4))
    model[0](features(2, 4))
    assert dict(model.named_buffers())["0.count"].item() == 2
    assert not any("count" in name for name in model.state_dict())


def test_tensor_that_is_neither_parameter_nor_buffer() -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.tensor(2.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale)

    class Inline(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * torch.tensor(2.0))

    assert "scale" in unclean(Plain())
    unclean(Inline())


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def test_custom_backward_of_the_user_is_not_lost() -> None:
    class Rounded(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(StraightThrough.apply(self.a(x)))

    model = nn.ModuleList([Rounded()])
    assert "autograd.Function" in unclean(model[0])
    stand(model)
    model[0](features(3, 4)).sum().backward()
    assert model[0].a.weight.grad.abs().sum() > 0
    assert StraightThrough.apply(torch.tensor(0.6)).item() == 1  # and works again after tracing


# Leaves: what depends on the mode stays a module


def test_dropout_follows_the_mode_after_tracing() -> None:
    model = Trunk(lambda: Relu2MLP(dropout=0.5))
    x = features(4, 16)
    stand(model)
    assert isinstance(model.blocks[0], RegionModule)
    model.eval()
    quiet = model(x)
    assert torch.equal(model(x), quiet)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(x), quiet)


def test_mode_of_the_model_is_kept() -> None:
    model = Trunk(lambda: Relu2MLP(dropout=0.5)).eval()
    stand(model)
    assert not any(module.training for module in model.modules())


class OwnDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class HiddenDropout(nn.Module):
    """Reads the mode where no look at its code would find it."""

    def forward(self, x: Tensor) -> Tensor:
        return _drop(self, x)


def _drop(module: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, module.training)


@pytest.mark.parametrize("dropout", [OwnDropout, HiddenDropout])
def test_modules_that_read_training_never_freeze(dropout: type[nn.Module]) -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop = dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.drop(self.a(x)))

    model = nn.ModuleList([Mixed()])
    stand(model)
    assert isinstance(model[0], RegionModule) == (dropout is OwnDropout)
    x = features(64, 4)
    model.train()
    assert not torch.equal(model[0](x), model[0](x))
    model.eval()
    assert torch.equal(model[0](x), model[0](x))


def test_a_leaf_with_linears_sends_the_search_inside() -> None:
    class Outer(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = SwiGLU(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.mlp(self.a(x)), 0.1, self.training)

    class Outermost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Outer()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = nn.ModuleList([Outermost(), Outermost()])
    assert regions(model) == {
        f"{i}.inner.{name}": kind
        for i in (0, 1)
        for name, kind in (("a", "Linear"), ("b", "Linear"), ("mlp", "SwiGLU"))
    }


def test_attention_of_torch_is_left_alone() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
            self.mlp = SwiGLU(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.inner(x, x, x)[0])

    model = nn.ModuleList([Attention()])
    x = features(2, 3, 8)
    expected = model[0].inner(x, x, x)[0]
    assert regions(model) == {"0.mlp": "SwiGLU"}
    apply_(model, [Relu2FFN()])
    assert torch.equal(model[0].inner(x, x, x)[0], expected)


def test_computed_weights_are_no_linears() -> None:
    net = SwiGLU()
    parametrizations.weight_norm(net.up)
    model = nn.ModuleList([net])
    x = features(2, 16)
    expected = net(x)
    graph = trace(model)[0][0].graph
    assert sum(node.target is F.linear for node in graph.nodes) == 2
    assert torch.equal(stand(model)[0](x), expected)  # type: ignore[index]


def test_own_linear_classes_are_seen_through() -> None:
    """A subclass of Linear that casts, and parameters that are read by a function."""

    class Cast(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight.to(input.dtype))

    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_in, self.weight_out = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight_in), self.weight_out)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cast, self.factors = Cast(4, 4), Factors()

        def forward(self, x: Tensor) -> Tensor:
            return self.factors(self.cast(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 4)
            self.positions = nn.Embedding(5, 4)
            self.body = Mixed()

    model = Model()
    assert regions(model) == {"body": "Mixed"}
    x = features(2, 4)
    expected = model.body(x)
    assert torch.equal(stand(model).body(x), expected)


def test_matrices_without_a_linear_are_no_region() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.ones(3, 4))

        def forward(self, index: Tensor) -> Tensor:
            return self.rows[index]

    found, unclean = trace(nn.ModuleList([Table(), Table()]))
    assert not found
    assert unclean == {f"{i} [Table]": "holds no linear" for i in (0, 1)}


# Sharing


def test_a_module_in_two_places_is_one_region() -> None:
    block = Block(SwiGLU())
    model = nn.ModuleList([block, Block(SwiGLU()), block])
    found = trace(model)[0]
    assert [region.fqns for region in found] == [("0", "2"), ("1",)]
    assert not any(spec.shared for region in found for spec in region.parameters.values())
    apply_(model, [Relu2FFN()])
    assert model[0] is model[2]


def test_a_module_shared_with_the_inside_of_a_region() -> None:
    """It is a region of its own only where it stands alone, and nothing may change its parameters."""
    mlp = SwiGLU()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(mlp), Block(SwiGLU())])
            self.extra = mlp

    model = Model()
    found = {region.fqns: region for region in trace(model)[0]}
    assert set(found) == {("blocks.0",), ("blocks.1",), ("extra",)}
    assert found["extra",].parameters["up.weight"].shared == ("blocks.0.mlp.up.weight",)
    report = apply_(model, [Relu2FFN()]).report
    assert [row.fqn for row in report.rows] == ["blocks.1.mlp"]
    assert {fqn for _, fqn, _ in report.misses} == {"blocks.0.mlp", "extra"}


def test_a_rewritten_model_is_refused_by_name() -> None:
    model = Trunk(SwiGLU)
    apply_(model, [Relu2FFN()])
    with pytest.raises(PassError, match=r"blocks\.0 was already rewritten"):
        trace(model)


def test_leaf_operations_of_a_graph_stay_plain_fx() -> None:
    """A traced region is an ordinary GraphModule to anybody else's tools."""
    model = stand(Trunk(SwiGLU))
    block = model.blocks[0]
    x = features(3, 16)
    again = fx.symbolic_trace(block)
    assert torch.equal(again(x), block(x))
    assert torch.equal(fx.Interpreter(block).run(x), block(x))


def test_math_on_plain_numbers_stays_a_number() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) / math.sqrt(self.a.in_features))

    model = nn.ModuleList([Scaled()])
    x = features(2, 4)
    expected = model[0](x)
    assert regions(model) == {"0": "Scaled"}
    assert torch.equal(stand(model)[0](x), expected)  # type: ignore[index]
