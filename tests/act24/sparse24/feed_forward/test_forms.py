"""Which form a 2:4 network takes, with the reason, and what a compiled graph has of it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from functorch.compile import min_cut_rematerialization_partition as min_cut
from small_network import FEATURES, FORCED, PACKED, TOKENS, WIDTH, WIDTH_OUT, network
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from act24.sparse24.feed_forward import forms, operation, packed
from act24.sparse24.feed_forward.forms import network_of
from act24.sparse24.feed_forward.masked import MASKED
from act24.sparse24.feed_forward.methods import ESTIMATORS, METHODS
from act24.sparse24.feed_forward.narrow import NARROW
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.feed_forward.packed_fp8 import PACKED_FP8
from act24.sparse24.format import device
from act24.sparse24.format.products import feed_forward_products

pytestmark = pytest.mark.usefixtures("capable_machine")


@pytest.mark.parametrize(
    ("options", "linears"),
    [
        (PACKED._replace(backward="split_gemm"), True),
        (PACKED._replace(backward="split_gemm", precision="fp8"), True),
        (Options24(function="relu"), True),
        (Options24(), True),
        (Options24(), False),
    ],
    ids=["packed", "packed, fp8", "around dense products", "narrow", "around none"],
)
def test_compiles_without_a_break(options: Options24, linears: bool) -> None:
    tensors = network(bias=False)
    tensors = tensors if linears else (tensors[0], None, None, None, None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(activation24, fullgraph=True, backend="aot_eager")
    y, _ = compiled(*tensors, options=options)
    leaves = [tensor for tensor in tensors if tensor is not None]
    grads = torch.autograd.grad(y.sum(), leaves)
    expected, _ = activation24(*tensors, options=options)
    for a, b in zip((y, *grads), (expected, *torch.autograd.grad(expected.sum(), leaves)), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch._dynamo.utils.counters["graph_break"]


class Launched(TorchDispatchMode):
    """Collects the widths of rows that are gathered, and how often the order of the tokens is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []
        self.orders = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index.Tensor:
            self.widths.append(result.shape[-1])
        self.orders += func is torch.ops.act24.token_order.default
        return result


@pytest.mark.parametrize("method", ["naive", "mvue"])
def test_only_narrow_rows_are_put_in_order_and_only_in_training(method: str) -> None:
    x, weight_in, _, weight_out, _ = network(bias=False, features=256)
    table = tuple((product._replace(features=256), measured) for product, measured in FORCED)
    plain = Options24(method=method, algorithms=table)  # type: ignore[arg-type]
    for options, training, permuted in (
        (plain._replace(backward="split_gemm"), True, True),
        (plain._replace(backward="sparse", token_permutation="sequence"), True, True),
        (plain._replace(backward="sparse"), False, False),
        (plain._replace(backward="sparse", token_permutation="none"), True, False),
        (plain, True, False),
    ):
        with Launched() as launched, torch.set_grad_enabled(training):
            y, _ = activation24(x, weight_in, None, weight_out, None, None, torch.tensor(3), None, options)
            if training:
                y.sum().backward()
        assert launched.orders == permuted
        assert launched.widths == ([WIDTH, WIDTH_OUT, WIDTH_OUT, WIDTH] if permuted else [])


def test_in_a_compiled_block_only_gathers_read_what_they_gather() -> None:
    """The compiler makes them part of the kernels around: x is put in order where it is normalised, y is put
    back where it is added to the residual, and the gradient of x in the backward of the norm."""
    x, weight_in, _, _, _ = network(bias=False)
    weight_out, gain = torch.randn(WIDTH, FEATURES).bfloat16(), torch.ones(WIDTH).bfloat16()
    leaves = (x, gain.requires_grad_(), weight_in, weight_out.requires_grad_())
    table = tuple((product._replace(width=WIDTH), measured) for product, measured in FORCED)
    options = Options24(backward="split_gemm", algorithms=table)
    graphs: list[torch.fx.Graph] = []

    def block(x: Tensor, gain: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return x + activation24(F.rms_norm(x, (WIDTH,), gain), w, None, v, None, options=options)[0]

    def keep(module: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut)
    y = torch.compile(block, fullgraph=True, backend=backend)(*leaves)
    for ours, theirs in zip(
        (y, *torch.autograd.grad(y.sum(), leaves)),
        (block(*leaves), *torch.autograd.grad(block(*leaves).sum(), leaves)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    for graph, orders in zip(graphs, (1, 0), strict=True):
        gathers = graph.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor)
        assert [node.meta["val"].shape for node in gathers] == [(TOKENS, WIDTH)] * 2
        # The gradient of y comes from outside, and the residual takes it as it is.
        sources = [node.args[0] for node in gathers[1 - orders :]]
        assert all(len(source.users) == 1 for source in sources)
        asked = graph.find_nodes(op="call_function", target=torch.ops.act24.token_order.default)
        assert [node.args[0].op for node in asked] == ["placeholder"] * orders


@pytest.mark.parametrize("named", [True, False])
def test_a_compiled_graph_has_the_products_of_the_table(named: bool) -> None:
    """To torch.compile a tuple and the named tuple that equals it are different keys: with either kind of
    table the graph has the operators, not the reference."""
    table = FORCED if named else tuple((tuple(product), tuple(measured)) for product, measured in FORCED)
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs = (m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule))
        targets.extend(str(node.target) for graph in graphs for node in graph.nodes)
        return module

    torch._dynamo.reset()
    options = Options24(backward="split_gemm", algorithms=table)
    compiled = torch.compile(
        lambda *tensors: activation24(*tensors, options=options)[0], backend=backend, fullgraph=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        compiled(*(None if t is None else t.detach().float().requires_grad_() for t in network(bias=False)))
    assert "act24.pack_activation" in targets
    assert "act24.product24" in targets


@pytest.mark.parametrize("method", ["soft_dynamic", "mvue"])
def test_exact_gradients_that_have_no_other_form_are_packed(method: str) -> None:
    options = Options24(method=method)  # type: ignore[arg-type]
    assert MASKED.why_not(network_of(network()), options)
    assert packed.PACKED.why_not(network_of(network()), options) == ""


def test_fp8_runs_packed_or_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow and naive with exact gradients too, which in bfloat16 have other forms."""
    tensors, options = network(bias=False), Options24(precision="fp8")
    assert PACKED_FP8.why_not(network_of(tensors), options) == ""
    assert "do not know fp8" in packed.PACKED.why_not(network_of(tensors), options)
    assert "do not know bfloat16" in PACKED_FP8.why_not(network_of(tensors), PACKED)
    assert "do not know fp8" in NARROW.why_not(network_of(tensors), options)
    assert "do not know fp8" in MASKED.why_not(network_of(tensors), options)
    assert MASKED.why_not(network_of((*tensors[:3], None, None)), options) == ""  # nothing to do in fp8
    narrower = (*tensors[:3], tensors[3][:24], None)
    assert "multiples of 16" in PACKED_FP8.why_not(network_of(narrower), options)
    monkeypatch.setattr(device, "fp8_obstacle", lambda _: "another layout")
    assert PACKED_FP8.why_not(network_of(tensors), options) == "another layout"
    assert packed.PACKED.why_not(network_of(tensors), PACKED) == ""


def test_one_sentence_for_each_reason() -> None:
    x, _, _, weight_out, _ = tensors = network(bias=False)
    float32 = tuple(None if t is None else t.float() for t in tensors)
    form = packed.PACKED
    assert "switched off" in form.why_not(network_of(tensors), PACKED._replace(kernels=False))
    assert 'estimator "ste"' in form.why_not(network_of(tensors), PACKED._replace(estimator="ste"))
    assert "bfloat16" in form.why_not(network_of(float32), PACKED)
    assert "dense products are faster" in form.why_not(network_of(tensors), Options24())
    # The reference costs more than any product.
    assert form.why_not(network_of(tensors), Options24(backward="sparse")) == ""
    for other in (form, NARROW):
        assert "both sides" in other.why_not(network_of((x, None, None, weight_out, None)), Options24())
    assert "multiples of 64" in form.why_not(network_of((x[:1, :10], *tensors[1:])), PACKED)
    assert "multiples of 8" in form.why_not(network_of((*tensors[:3], weight_out[:-3], None)), PACKED)
    assert '"sparse" backward' in MASKED.why_not(network_of(tensors), Options24(backward="sparse"))
    assert "multiples of 64" in MASKED.why_not(network_of((x[:1, :10], *tensors[1:])), Options24())
    assert "no bias" in NARROW.why_not(network_of(network()), Options24())
    assert '"sparse" backward' in NARROW.why_not(network_of(tensors), Options24(backward="sparse"))
    wide = network_of((*tensors[:3], weight_out.repeat(8, 1), None))
    assert "256 at most" in NARROW.why_not(wide, Options24())
    for without in (MASKED, NARROW):
        assert "no scale" in without.why_not(network_of(tensors, scaled=True), Options24())


def test_what_no_form_serves_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function, method, estimator, backward, precision, with and without its linears: a form that runs
    lists each of them, and the reference runs where none does."""
    table = tuple((tuple(product), tuple(measured)) for product, measured in FORCED)
    tensors = network(bias=False)
    shapes = (tensors, (*tensors[:3], None, None), (tensors[0], None, None, None, None))
    met = set()
    for function, method, estimator, precision in itertools.product(
        ("relu2", "relu"), METHODS, ESTIMATORS, ("bfloat16", "fp8")
    ):
        for backward, shape in itertools.product(ESTIMATORS[estimator].backwards, shapes):
            options = Options24(function, method, backward, estimator, precision, algorithms=table)
            form = operation.form_of(network_of(shape, METHODS[method].scaled), options)
            met.add(form.name if form else "reference")
            if form is None:
                continue
            assert METHODS[method].kernel in form.sparsifiers
            assert function in form.functions
            assert estimator in form.estimators
            assert backward in form.backwards
            assert precision in form.precisions or shape[3] is None
            assert not METHODS[method].scaled or form.scales
    assert met == {"narrow", "packed", "packed e4m3", "masked", "reference"}


def test_elsewhere_than_on_hopper_a_tuner_has_to_find_packed_products_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rule for shapes that nobody tuned was measured on Hopper."""
    wide = network_of(network())._replace(tokens=2**15, features=8192, width=2048, width_out=2048)
    sparse = Options24(backward="sparse")
    assert packed.PACKED.why_not(wide, sparse) == ""
    monkeypatch.setattr(forms, "rule_holds_on", lambda _: False)
    assert "nobody tuned" in packed.PACKED.why_not(wide, sparse)
    shape = (wide.tokens, wide.width, wide.features, wide.width_out, False)
    products = feed_forward_products(*shape).values()
    for sparse_time, runs in ((1.0, True), (float("inf"), False)):
        table = tuple((tuple(product), (3, sparse_time, 2.0)) for product in products)
        assert (packed.PACKED.why_not(wide, sparse._replace(algorithms=table)) == "") is runs


#: Options, whether the network has a bias before its activation, the form from 64 tokens on with and without
#: a table in which y is faster from 128 tokens on.
INFERENCE = {
    "naive": (Options24(), True, "masked", "packed"),
    "trained with split_gemm": (Options24(backward="split_gemm"), True, "masked", "packed"),
    "narrow": (Options24(), False, "narrow", "narrow"),
    "relu": (Options24(function="relu"), True, "masked", "packed"),
    "soft": (Options24(method="soft_dynamic"), True, "packed", "packed"),
    "fp8": (Options24(precision="fp8", backward="split_gemm"), True, "packed e4m3", "packed e4m3"),
    "straight through": (Options24(estimator="ste"), True, "reference", "reference"),
    "off": (Options24(kernels=False), True, "reference", "reference"),
}


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("kind", INFERENCE)
def test_inference_pads_any_number_of_tokens_to_whole_tiles(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, biased, untuned, tuned = INFERENCE[kind]
    _, weight_in, bias, weight_out, bias_out = network(bias=biased, exact=True)
    x = (torch.randint(-2, 3, (tokens, WIDTH)) / 4).bfloat16()[None]
    scale = torch.tensor(1.5) if METHODS[options.method].scaled else None
    ran: list[tuple[str, int]] = []
    noted = tuple(
        dataclasses.replace(
            form,
            run=lambda tensors, state, options, form=form: (
                ran.append((form.name, tensors[0].shape[:-1].numel())),
                form.run(tensors, state, options),
            )[1],
        )
        for form in operation.FORMS
    )
    monkeypatch.setattr(operation, "FORMS", noted)
    arguments = (x, weight_in, bias, weight_out, bias_out, scale)
    plain = options._replace(kernels=False)
    expected, _ = activation24(*(None if t is None else t.detach() for t in arguments), options=plain)
    key = feed_forward_products(128, WIDTH, FEATURES, WIDTH_OUT, True)["y"]
    for table, form in (((), untuned), ((((*key,), (3, 1.0, 2.0)),), tuned)):
        ran.clear()
        with torch.no_grad():
            y, statistics = activation24(*arguments, options=options._replace(algorithms=table))
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        assert not statistics.any()
        if tokens == 64:  # below those of the table, and half a tile of the narrow form
            form = "masked" if untuned == "narrow" else untuned
        whole = -(-tokens // 128) * 128 if tokens > 64 else 64
        assert ran == ([] if tokens < 64 or form == "reference" else [(form, whole)])
    # Training has the tokens that it has.
    ran.clear()
    activation24(*arguments, options=options)
    assert not ran or tokens == 64


def test_inference_compiles_without_a_break_for_any_number_of_tokens() -> None:
    _, *weights = network(exact=True)
    torch._dynamo.reset()
    compiled = torch.compile(activation24, fullgraph=True, backend="aot_eager")
    for options in (Options24(backward="split_gemm"), Options24(precision="fp8")):
        x = torch.randn(1, 100, WIDTH).bfloat16()
        with torch.no_grad():
            y, expected = (run(x, *weights, options=options)[0] for run in (compiled, activation24))
        torch.testing.assert_close(y, expected)
