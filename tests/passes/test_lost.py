"""lost: split and branches against the dense weight, the columns of each method, and what is saved."""

import copy

import pytest
import torch
import torch.nn.functional as F
from slow import slow_but
from toys import llama, tokens

from act24.errors import Act24Error
from act24.initialise import generator_for
from act24.llama import LlamaForCausalLM, llama_config
from act24.passes import Activation24, Lost, PassError, Pipeline, Recompute, Relu2FFN, apply_, plan
from act24.relu2 import relu2
from act24.rotary import rotary_embedding

RANKS = {"attn_rank": 6, "mlp_rank": 8}
UP = "model.layers.0.mlp.up_proj"
ACTIVATIONS = {"silu": F.silu, "relu2": relu2, "none": lambda x: x}

#: Millions of parameters with 1% and 5% of the columns.
PUBLISHED = {"60m": (128, 43.02, 44.01), "130m": (256, 94.78, 98.21), "350m": (256, 188.18, 200.28)}


@pytest.mark.parametrize("size", slow_but(("60m",), PUBLISHED))
def test_parameters_are_as_many_as_published(size):
    rank, *totals = PUBLISHED[size]
    for sparsity, total in zip((0.01, 0.05), totals, strict=True):
        with torch.device("meta"):
            model = LlamaForCausalLM(llama_config(f"llama-{size}"))
        report = plan(model, [Lost(attn_rank=rank, mlp_rank=rank, sparsity=sparsity)])
        assert round(report.parameters_after / 1e6, 2) == total


@pytest.mark.parametrize("svd_rank", [0, 3])
def test_it_starts_from_the_dense_weight(svd_rank):
    """Factors: the best approximation. Columns: those of the weight itself where most is left over."""
    model, dense = llama(), llama().get_submodule(UP).weight.detach()
    apply_(model, [Lost(**RANKS, sparsity=0.2, svd_rank=svd_rank)])
    made = model.get_submodule(UP)
    u, s, vh = torch.linalg.svd(dense)
    best = u[:, :8] * s[:8] @ vh[:8]
    torch.testing.assert_close(made.weight_out @ made.weight_in, best, rtol=1e-4, atol=1e-6)
    end = 8 + svd_rank if svd_rank else 32
    left = (u[:, 8:end] * s[8:end] @ vh[8:end]).norm(dim=0)
    expected = left.argsort(descending=True)[:6].sort().values
    assert torch.equal(made.column_indices, expected)
    assert torch.equal(made.weight_columns, dense[:, expected])


@pytest.mark.parametrize("bottleneck", ACTIVATIONS)
def test_it_computes_both_branches(bottleneck):
    """With a bias, on one linear, and the gradient that reaches its parameters and its input."""
    model = llama(mlp_bias=True)
    gamma = 0.7
    apply_(model, [Lost(scope="mlp", mlp_rank=8, sparsity=0.1, gamma=gamma, bottleneck=bottleneck)])
    made = model.get_submodule(UP)
    torch.nn.init.normal_(made.bias)
    seen = {}
    region = model.model.layers[0]

    class Recorder(torch.fx.Interpreter):
        def call_module(self, target, args, kwargs):
            value = super().call_module(target, args, kwargs)
            if target == "post_attention_layernorm":
                seen["x"] = value
            return value

        def call_function(self, target, args, kwargs):
            value = super().call_function(target, args, kwargs)
            if target is torch.add and args[-1] is made.bias:
                seen["y"] = value
            return value

    cos, sin = rotary_embedding(5, 8, 10_000.0, torch.device("cpu"))
    Recorder(region).run(torch.randn(2, 5, 32), cos, sin)
    x = seen["x"]
    low = F.linear(ACTIVATIONS[bottleneck](F.linear(x, made.weight_in)), made.weight_out)
    columns = F.linear(x[..., made.column_indices], made.weight_columns)
    torch.testing.assert_close(seen["y"], gamma * low + (1 - gamma) * columns + made.bias)


def test_gradients_reach_factors_and_columns_and_nothing_dense_is_left():
    model = llama()
    apply_(model, [Lost(**RANKS)])
    names = {name.rpartition(".")[2] for name, _ in model.model.layers.named_parameters()}
    assert names == {"weight", "weight_in", "weight_out", "weight_columns"}  # `weight`: of the norms
    assert not any(name[-12:] == "_proj.weight" for name, _ in model.named_parameters())
    model(tokens()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_random_columns_depend_on_seed_and_name():
    made = {}
    for seed in (0, 0, 1):
        model = llama()
        apply_(model, [Lost(**RANKS, method="random", sparsity=0.3)], seed=seed)
        made.setdefault(seed, []).append(
            {name: buffer for name, buffer in model.named_buffers() if name.endswith("column_indices")}
        )
    first, again, other = *made[0], made[1][0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    layers = [first[f"model.layers.{i}.mlp.up_proj.column_indices"] for i in (0, 1)]
    assert not torch.equal(*layers)
    drawn = torch.randperm(32, generator=generator_for(0, f"{UP}.column_indices"))[:9].sort().values
    assert torch.equal(layers[0], drawn)


def test_gradient_columns_need_the_shells_measurement_and_follow_it():
    model = llama()
    pipeline = Pipeline(model, [Lost(**RANKS, method="gradient", sparsity=0.2)])
    wanted = pipeline.measurements
    assert len(wanted) == 14
    up = wanted[f"{UP}.column_scores"]
    assert (up.what, up.parameter, up.shape) == ("column_scores", f"{UP}.weight", (32,))
    before = copy.deepcopy(model.state_dict())
    first = r"14 measurements are missing, column_scores of model\.layers\.0\.self_attn\.q_proj\.weight the"
    with pytest.raises(PassError, match=first):
        pipeline.commit_()
    scores = {name: torch.rand(one.shape) for name, one in wanted.items()}
    with pytest.raises(PassError, match=r"up_proj\.weight has to have shape \[32\], got \[31\]"):
        pipeline.commit_({**scores, f"{UP}.column_scores": torch.rand(31)})
    assert model.state_dict().keys() == before.keys()
    pipeline.commit_(scores)
    best = scores[f"{UP}.column_scores"].argsort(descending=True)[:6].sort().values
    assert torch.equal(model.get_submodule(UP).column_indices, best)
    assert Pipeline(llama(), [Lost(**RANKS)]).measurements == {}


def test_indices_are_saved_and_loaded_without_being_drawn_again():
    model, other = llama(seed=0), llama(seed=5)
    for m in (model, other):
        apply_(m, [Lost(**RANKS, sparsity=0.2)])
    assert not torch.equal(model.get_submodule(UP).column_indices, other.get_submodule(UP).column_indices)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(tokens()), model(tokens()))
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama().config)
    apply_(empty, [Lost(**RANKS, sparsity=0.2, method="gradient")])  # values come from a checkpoint
    empty.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(empty(tokens()), model(tokens()))


def test_without_an_activation_there_is_a_dense_form():
    model, stock = llama(), llama()
    pipeline = apply_(model, [Lost(**RANKS, bottleneck="none", gamma=0.4)])
    stock.load_state_dict(pipeline.state_to_stock(model.state_dict()))
    torch.testing.assert_close(model(tokens()), stock(tokens()), rtol=1e-4, atol=1e-5)
    silu = Pipeline(llama(), [Lost(**RANKS)])
    with pytest.raises(PassError, match="between the factors stands silu"):
        silu.state_to_stock(model.state_dict())


def test_activation24_finds_the_network_and_every_bottleneck():
    passes = [Relu2FFN(), Lost(attn_rank=8, mlp_rank=8, bottleneck="relu2"), Activation24()]
    report = plan(llama(layers=1), passes)
    found = {row.fqn: row.before for row in report.rows if row.pass_name == "activation24"}
    attention = [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    mlp = [f"model.layers.0.mlp{x}" for x in ("", ".up_proj", ".down_proj")]
    assert sorted(found) == sorted(attention + mlp)
    # Of the network itself the pre-activation is a sum of two branches.
    assert found["model.layers.0.mlp"] == "relu2"


def test_layers_share_one_class_though_their_columns_differ():
    pipeline = apply_(llama(), [Lost(**RANKS)])
    assert len({type(module) for module in pipeline.modules}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, "lost: sparsity has to be above 0 and 1 at most, got 0.0"),
        ({"sparsity": 1.5}, "lost: sparsity has to be above 0 and 1 at most, got 1.5"),
        ({"gamma": 1.2}, "lost: gamma has to be 0 or more and 1 at most, got 1.2"),
        ({"svd_rank": -1}, "lost: svd_rank has to be 0 or more and .* at most, got -1"),
        ({"bottleneck": "gelu"}, "lost: bottleneck has no 'gelu'"),
        ({"svd_rank": 4, "method": "random"}, "no meaning"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(Act24Error, match=message):
        Lost(**RANKS, **options)


@pytest.mark.parametrize(
    ("sparsity", "others", "fused"),
    [(0.05, [], 7), (0.5, [], 0), (0.05, [Recompute()], 0), (0.05, [Activation24()], 4)],
    ids=["few columns", "many", "recomputed", "2:4 where the rank allows"],
)
def test_branches_are_fused_where_no_pass_has_taken_a_part(sparsity, others, fused):
    lost = Lost(**RANKS, sparsity=sparsity, bottleneck="relu2")
    model, apart = llama(), llama()
    pipeline = apply_(model, [lost, *others])
    block = next(module for module in pipeline.modules if "q_proj" in module.code)
    assert block.code.count("low_rank_beside_columns(") == fused
    assert block.code.count("select_columns(") == 7 - fused or "recomputed" in block.code
    if not any(isinstance(p, Activation24) for p in others):  # which changes the function
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Lost, "finish", lambda self, region: None)
            apply_(apart, [lost])
        apart.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(tokens()), apart(tokens()))
