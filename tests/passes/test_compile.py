"""What torch.compile makes of rewritten models: one graph for equal layers, no breaks, no surprises later."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from slow import slow_after, slow_but
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx.experimental.proxy_tensor import make_fx
from toys import Relu2MLP, SwiGLU, Trunk, features, llama, tokens

from act24.errors import Act24Error
from act24.passes import Activation24, ActivationStatistics, Pipeline, Relu2FFN, Weight24, apply_

PASSES: dict[str, list[Any]] = {
    "dense": [],
    "relu2": [Relu2FFN()],
    "2:4": [Relu2FFN(), Activation24(), ActivationStatistics()],
    "2:4 sparse backward": [Relu2FFN(), Activation24(backward="split_gemm"), ActivationStatistics()],
}


class Compiled:
    """Compiles every region of a model on its own and counts the graphs; a graph break is an error.

    Args:
        counts: nothing but the number of graphs is looked at, and they run as they are, which takes less.
    """

    def __init__(self, pipeline: Pipeline, counts: bool = False) -> None:
        self.graphs, self.counts = 0, counts
        for module in pipeline.modules:
            module.compile(backend=self._backend, fullgraph=True)

    def _backend(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward if self.counts else aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pipeline_for(model: nn.Module, passes: list[Any], **options: Any) -> Pipeline:
    pipeline = Pipeline(model, passes, keep_all=True, **options)
    pipeline.commit_()
    return pipeline


@pytest.mark.parametrize("name", slow_but(("2:4 sparse backward",), PASSES))
def test_twelve_equal_layers_are_one_graph(name: str) -> None:
    model, eager = llama(12), llama(12)
    compiled = Compiled(pipeline_for(model, PASSES[name]))
    pipeline_for(eager, PASSES[name])
    for seed in range(3):
        losses = []
        for network in (model, eager):
            network.zero_grad()
            loss = network(tokens(seed=seed)).square().mean()
            loss.backward()
            losses.append(loss)
            with torch.no_grad():
                for p in network.parameters():
                    p -= 0.1 * p.grad
        torch.testing.assert_close(losses[0], losses[1])
        assert compiled.graphs == 1, f"step {seed}"
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_the_whole_model_is_one_graph() -> None:
    model = llama(2)
    expected_model = llama(2)
    for network in (model, expected_model):
        apply_(network, PASSES["2:4"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), expected_model(tokens()))


def test_one_more_graph_at_a_boundary_and_none_on_the_way_back() -> None:
    model = llama(3)
    pipeline = pipeline_for(model, [Relu2FFN(), Activation24(from_step=2, until_step=4)])
    compiled = Compiled(pipeline, counts=True)
    seen = []
    for step in (0, 1, 2, 3, 4, 5, 2, 0, 3):
        pipeline.lower_(step)
        model(tokens(seed=step)).sum().backward()
        seen.append(compiled.graphs)
    assert seen == [1, 1, 2, 2, 2, 2, 2, 2, 2]


def test_leaving_a_pass_out_for_evaluation_costs_one_graph_once() -> None:
    model = llama(2)
    pipeline = pipeline_for(model, [Relu2FFN(), Activation24()])
    compiled = Compiled(pipeline, counts=True)
    seen = []
    for _ in range(3):
        model(tokens())
        seen.append(compiled.graphs)
        pipeline.lower_(0, without=["activation24"])
        model(tokens())
        seen.append(compiled.graphs)
        pipeline.lower_(0)
    assert seen == [1, 2, 2, 2, 2, 2]


def test_evaluation_without_gradients_costs_one_graph_once() -> None:
    model = llama(2)
    compiled = Compiled(pipeline_for(model, PASSES["2:4"]), counts=True)
    for _ in range(2):
        model(tokens()).sum().backward()
        model.eval()
        with torch.no_grad():
            model(tokens())
        model.train()
    assert compiled.graphs == 2


@pytest.mark.slow
def test_more_pipelines_than_the_compilers_limit_for_one_function() -> None:
    """A limit of 8 graphs for one function would stop a run in the middle."""
    assert torch._dynamo.config.recompile_limit <= 8
    ranges = [
        Activation24(from_step=i, until_step=i + 1, backward="split_gemm", dense_ratio=i / 10)
        for i in range(5)
    ]
    model = llama(1)
    pipeline = pipeline_for(model, [Relu2FFN(), *ranges])
    compiled = Compiled(pipeline)
    for step in range(6):
        pipeline.lower_(step)
        model(tokens()).sum().backward()
        with torch.no_grad():
            model(tokens())
    assert compiled.graphs == 12


def test_statistics_are_counted_in_compiled_graphs() -> None:
    model, eager = Trunk(Relu2MLP, layers=3), Trunk(Relu2MLP, layers=3)
    eager.load_state_dict(model.state_dict())
    Compiled(pipeline_for(model, [Activation24(), ActivationStatistics()]))
    pipeline_for(eager, [Activation24(), ActivationStatistics()])
    for seed in range(2):
        for network in (model, eager):
            network(features(4, 16, seed=seed)).sum().backward()
    for (name, buffer), (_, expected) in zip(model.named_buffers(), eager.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)
    assert model.get_buffer("blocks.2.mlp.activation_statistics")[0] == 2 * 4 * 32


def test_layers_that_differ_are_graphs_of_their_own() -> None:
    model = llama(4)
    passes = [Relu2FFN(), Activation24(ignore=("model.layers.[03].*",))]
    compiled = Compiled(pipeline_for(model, passes), counts=True)
    model(tokens())
    assert compiled.graphs == 2


@pytest.mark.parametrize("dtype", slow_after(1, [torch.bfloat16, torch.float32]))
def test_dtypes_under_autocast_are_those_of_eager(dtype: torch.dtype) -> None:
    model, eager = Trunk(SwiGLU), Trunk(SwiGLU)
    eager.load_state_dict(model.state_dict())
    compiled = Compiled(pipeline_for(model, PASSES["2:4"]))
    pipeline_for(eager, PASSES["2:4"])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = [network(features(4, 16).requires_grad_()) for network in (model, eager)]
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.02)
    assert compiled.graphs == 1


def test_a_copy_compiles_to_the_same_graph() -> None:
    model = llama(3)
    pipeline = pipeline_for(model, PASSES["2:4"])
    duplicate = copy.deepcopy(model)
    compiled = Compiled(pipeline)
    for module in duplicate.model.layers:
        module.compile(backend=compiled._backend, fullgraph=True)
    torch.testing.assert_close(model(tokens()), duplicate(tokens()))
    assert compiled.graphs == 1


@pytest.mark.parametrize("training", [False, True])
def test_what_is_renewed_beside_a_forward_is_not_exported_with_it(training: bool) -> None:
    """The search for masks would be a part of the program: minutes to trace, and done again in every call."""
    model, x = Trunk(SwiGLU).eval(), features(2, 8, 16)
    pipeline = apply_(model, [Weight24()])
    expected = model(x)
    copied = r"copy\.deepcopy\(model\), made inside `with pipeline\.evaluation\(\):`"
    with pytest.raises(Act24Error, match=copied):
        torch.export.export(model.train(training), (x,), strict=False)
    with pytest.raises(Exception, match=copied):
        torch.export.export(model, (x,), strict=True)
    model.eval()
    assert torch.equal(model(x), expected)
    if not training:
        with pipeline.evaluation():
            program = torch.export.export(copy.deepcopy(model), (x,), strict=False)
        assert not any("argmax" in str(node.target) for node in program.graph.nodes)
        assert torch.equal(program.module()(x), expected)


def test_a_program_holds_masks_that_nobody_changes() -> None:
    """Those of a live model are the last update's again, once the context is left."""
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval(), features(4, 16)
    pipeline = apply_(model, [Weight24()])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
        expected = model(x)
    ways: dict[str, Callable[[nn.Module], Any]] = {
        "export": lambda m: torch.export.export(m, (x,)).module(),
        "trace": lambda m: torch.jit.trace(m, (x,), check_trace=False),
        "make_fx": lambda m: make_fx(m)(x),
    }
    with pytest.raises(Act24Error, match="made inside"):  # it runs the graph itself, without hooks
        ways["export"](model)
    for name, way in ways.items():
        with pipeline.evaluation(), torch.no_grad():
            with pytest.raises(Act24Error, match="trace a copy that is made there"):
                way(model)
            program = way(copy.deepcopy(model))
            with pipeline.evaluation(without=["weight24"]):
                assert torch.equal(model(x), way(model)(x))
        pipeline.begin_update_(0)
        assert torch.equal(program(x), expected), name
        assert torch.equal(model(x), expected), name
