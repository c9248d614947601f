"""Regions: what is one, what stands alone, and that the search leaves no trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from toys import Block, Net, SwiGLU, Trunk, features, llama, regions, stand, tokens

from act24.passes import PassError, Relu2FFN, apply_, trace
from act24.passes.graph.region import RegionModule


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


# What the search opens, and what it leaves alone


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
    why = "calls no linear: write its products as F.linear(x, weight), or leave it"
    assert unclean == {f"{i} [Table]": why for i in (0, 1)}


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


class Half(float):
    """A number of a class of its own, whose text is no code."""

    def __repr__(self) -> str:
        return "a half"


def test_a_number_of_numpys_or_of_a_class_of_its_own_is_a_number_in_the_graph() -> None:
    class Scaled(Net):
        many, single, own, zero = np.float64(0.5), np.float32(0.3), Half(0.5), np.int64(0)
        name = np.str_("tanh")

        def forward(self, x: Tensor) -> Tensor:
            h = torch.add(self.single * self.a(x), x, alpha=self.many) * self.own
            h = F.gelu(h * self.single, approximate=self.name).sum((self.zero,), keepdim=True)
            return self.b(h.expand(np.int64(2), -1) / self.many)

    model = nn.ModuleList([Scaled()])
    x = features(2, 4)
    expected = model[0](x)
    assert torch.equal(stand(model)[0](x), expected)  # type: ignore[index]
    code = str(model[0].code)
    assert all(name not in code for name in ("np.", "numpy", "a half"))
