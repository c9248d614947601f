"""`activation24` in models: every method and backward, chains of activations, bottlenecks, state by name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slow import slow_but
from torch import Tensor, nn
from toys import Trunk, features, llama, tokens

from act24.errors import Act24Error
from act24.passes import (
    Activation24,
    ActivationStatistics,
    Cola,
    Lost,
    LowRank,
    PassError,
    Relu2FFN,
    Weight24,
    apply_,
    plan,
)
from act24.passes.activation24 import SCALE, SEED, SUMS
from act24.passes.activation_calibration import ActivationCalibration
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.pattern.selection import top2_of_4

METHODS = ("naive", "mvue", "soft_dynamic", "soft_threshold_weights")
BACKWARDS = ("dense", "split_gemm", "sparse")


class ReluMLP(nn.Module):
    def __init__(self, activation: Any = F.relu) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def activation_nodes(model: nn.Module) -> list[Any]:
    return [
        node
        for module in model.modules()
        if hasattr(module, "graph")
        for node in module.graph.nodes  # type: ignore[union-attr]
        if node.target is activation24
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backward", slow_but(("split_gemm",), BACKWARDS))
def test_every_method_and_backward_trains(method: Any, backward: Any) -> None:
    model = llama()
    passes = [Relu2FFN(), Activation24(method=method, backward=backward), ActivationStatistics()]
    apply_(model, passes).begin_update_(0, tokens())
    loss = F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten())
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("activation", [F.relu, torch.relu, nn.ReLU(), lambda x: x.relu()])
def test_relu_networks_too(activation: Any) -> None:
    model = Trunk(lambda: ReluMLP(activation))
    x = features(3, 16)
    mlp = model.blocks[0].mlp
    norm = model.blocks[0].norm
    hidden = F.relu(mlp.up(norm(x)))
    expected = x + mlp.down(hidden * top2_of_4(hidden))
    apply_(model, [Activation24()])
    assert torch.allclose(model.blocks[0](x), expected, atol=1e-6)


def test_the_ffn_of_relu2_ffn_can_be_relu() -> None:
    model = llama()
    report = plan(llama(), [Relu2FFN(activation="relu"), Activation24()])
    assert "relu(up)" in str(report)
    apply_(model, [Relu2FFN(activation="relu"), Activation24()])
    options = [node.args[-1] for node in activation_nodes(model)]
    assert [o.function for o in options] == ["relu", "relu"]


def test_exact_width_takes_multiples_of_four_only() -> None:
    assert "F 72" in str(plan(llama(1), [Relu2FFN(width="exact")]))  # 1.5 · 48
    with pytest.raises(PassError, match="F would be 81, not a multiple of 4"):
        plan(llama(1, intermediate_size=54), [Relu2FFN(width="exact")])


def low_rank_passes(name: str) -> list[Any]:
    rank = {"attn_rank": 8, "mlp_rank": 8}
    return {
        "low_rank": [LowRank(**rank)],
        "cola": [Cola(**rank)],
        "cola-relu2": [Cola(**rank, bottleneck="relu2")],
        "lost": [Lost(**rank, sparsity=0.1)],
        "lost-relu2": [Lost(**rank, sparsity=0.1, bottleneck="relu2")],
    }[name]


@pytest.mark.parametrize("name", ["low_rank", "cola", "cola-relu2", "lost", "lost-relu2"])
def test_lists_the_mlp_and_every_bottleneck(name: str) -> None:
    """With a relu2 bottleneck this is `more_activation_relu2` of the old scripts."""
    report = plan(llama(1), [Relu2FFN(), *low_rank_passes(name), Activation24()])
    sites = {row.fqn for row in report.rows if row.pass_name == "activation24"}
    expected = {"model.layers.0.mlp"}
    if name.endswith("relu2"):
        linears = ("q_proj", "k_proj", "v_proj", "o_proj")
        expected |= {f"model.layers.0.self_attn.{linear}" for linear in linears}
        expected |= {f"model.layers.0.mlp.{linear}" for linear in ("up_proj", "down_proj")}
    assert sites == expected


@pytest.mark.parametrize(
    ("backward", "name"),
    slow_but(
        [("dense", "low_rank"), ("sparse", "cola-relu2"), ("split_gemm", "lost-relu2")],
        itertools.product(BACKWARDS, ["low_rank", "cola-relu2", "lost-relu2"]),
    ),
)
def test_chains_compute_what_their_parts_compute(name: str, backward: Any) -> None:
    """2:4 in every activation of a chain, against the same model with each relu² masked by hand."""
    passes = [Relu2FFN(), *low_rank_passes(name)]
    model, reference = llama(), llama()
    apply_(model, [*passes, Activation24(backward=backward)])
    apply_(reference, [*passes, Activation24(backward="dense")])
    logits, expected = model(tokens()), reference(tokens())
    assert torch.equal(logits, expected)
    nodes = activation_nodes(model)
    assert len(nodes) == 2 * (1 if name == "low_rank" else 7)
    owners = [w for node in nodes for w in (node.args[1], node.args[3]) if w is not None]
    assert len(owners) == len(set(owners)), "a linear belongs to one 2:4 product"
    logits.square().sum().backward()
    expected.square().sum().backward()
    exact = dict(reference.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if not any(part in parameter_name for part in ("proj", "factor")) or backward == "dense":
            # Norms, embeddings, head: their gradients never pass a feature-wise selection.
            torch.testing.assert_close(parameter.grad, exact[parameter_name].grad, rtol=1e-4, atol=1e-5)


def test_colas_inner_activation_stays_under_a_relu2_ffn() -> None:
    """The old scripts lost it: their CoLA + relu² was plain low rank, bit for bit."""
    model, plain = llama(), llama()
    apply_(model, [Relu2FFN(), Cola(attn_rank=8, mlp_rank=8), Activation24()])
    apply_(plain, [Relu2FFN(), LowRank(attn_rank=8, mlp_rank=8), Activation24()])
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(model(tokens()), plain(tokens()), atol=1e-3)
    graph = model.model.layers[0].graph  # type: ignore[union-attr]
    silus = [node for node in graph.nodes if node.target is F.silu]
    assert len(silus) == 6, "q, k, v, o, up and down, each with its own"


def test_state_is_named_by_the_site_and_outlives_a_change_of_pipeline() -> None:
    model = llama()
    passes = [Relu2FFN(), Activation24(method="soft_dynamic", from_step=3), ActivationStatistics()]
    pipeline = apply_(model, passes)
    scales = {n: b for n, b in model.named_buffers() if n.endswith(SCALE)}
    assert set(scales) == {f"model.layers.{i}.mlp.activation24_scale" for i in range(2)}
    assert all(float(b) == 1.0 for b in scales.values())
    assert set(scales) <= set(model.state_dict()), "in checkpoints from the start"
    for buffer in scales.values():
        buffer.fill_(1.5)
    model.eval()
    dense = model(tokens())
    pipeline.lower_(3)
    sparse = model(tokens())
    assert not torch.equal(dense, sparse)
    assert all(float(b) == 1.5 for b in scales.values())
    pipeline.lower_(0)
    assert torch.equal(model(tokens()), dense)


def test_scale_multiplies_the_activation() -> None:
    x = features(5, 16)
    results = []
    for scale in (1.0, 1.25):
        model = Trunk(ReluMLP, layers=1)
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        apply_(model, [Activation24(method="soft_dynamic")])
        model.get_buffer("blocks.0.mlp.activation24_scale").fill_(scale)
        bias = model.get_parameter("blocks.0.mlp.down.bias")
        results.append(model.eval()(x) - x - bias)
    assert torch.allclose(results[1], 1.25 * results[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_mvue_draws_by_its_seed_and_is_naive_in_evaluation() -> None:
    model, naive = llama(), llama()
    pipeline = apply_(model, [Relu2FFN(), Activation24(method="mvue"), ActivationStatistics()])
    apply_(naive, [Relu2FFN(), Activation24()])
    first = model(tokens())
    assert torch.equal(model(tokens()), first)
    for name, buffer in model.named_buffers():
        if name.endswith(SEED):
            buffer.fill_(7)
    assert not torch.equal(model(tokens()), first)
    passes = [q for p in pipeline.active if (q := p.in_evaluation()) is not None]
    with pipeline.lowered(passes):
        assert torch.equal(model(tokens()), naive(tokens()))
        counted = [b.clone() for n, b in model.named_buffers() if n.endswith("activation_statistics")]
        model(tokens())
    after = [b for n, b in model.named_buffers() if n.endswith("activation_statistics")]
    assert all(torch.equal(a, b) for a, b in zip(after, counted, strict=True)), "evaluation counts nothing"
    assert not torch.equal(model(tokens()), naive(tokens()))


def test_layers_share_one_class_whatever_their_state() -> None:
    model = llama(layers=4)
    apply_(model, [Relu2FFN(), Activation24(method="mvue"), ActivationStatistics()])
    assert len({type(layer) for layer in model.model.layers}) == 1


def test_options_reach_the_operation() -> None:
    model = llama(1)
    options = {"backward": "split_gemm", "dense_ratio": 0.1, "token_permutation": "sequence"}
    options |= {"precision": "fp8"}
    apply_(model, [Relu2FFN(), Activation24(**options)])
    (node,) = activation_nodes(model)
    assert node.args[-1] == Options24(**options)


def test_a_weight24_before_it_leaves_only_the_activation() -> None:
    model = llama(1)
    apply_(model, [Relu2FFN(), Weight24(method="ste"), Activation24()]).begin_update_(0)
    (node,) = activation_nodes(model)
    assert node.args[1:5] == (None,) * 4
    model(tokens()).sum().backward()


def test_switching_the_permutation_off_is_remarked() -> None:
    report = str(plan(llama(1), [Relu2FFN(), Activation24(backward="sparse", token_permutation="none")]))
    assert "no token permutation" in report
    assert "no token permutation" not in str(
        plan(llama(1), [Relu2FFN(), Activation24(token_permutation="none")])
    )


def test_fp8_is_in_the_plan_where_there_is_a_product_for_it() -> None:
    fp8 = Activation24(precision="fp8")
    (row,) = (row for row in plan(llama(1), [Relu2FFN(), fp8]).rows if row.after.startswith("2:4"))
    assert (row.after, row.note) == ("2:4 naive, dense backward, fp8", "")
    (row,) = plan(drops_between(), [fp8]).rows
    assert row.after == "2:4 naive, dense backward"
    assert "no fp8" in row.note


def test_without_a_linear_of_its_own_a_site_has_no_weight_gradient_to_make_2_4() -> None:
    passes = [Relu2FFN(), *low_rank_passes("lost"), Activation24(backward="split_gemm")]
    (row,) = (row for row in plan(llama(1), passes).rows if row.after.startswith("2:4"))
    assert row.after == "2:4 naive, dense backward"
    assert 'backward = "split_gemm" does nothing here' in row.note


def drops_between() -> nn.Module:
    """Networks with a dropout between relu² and the linear behind it."""
    activation = nn.Sequential(nn.ReLU(), nn.Dropout(0.1))
    return Trunk(lambda: ReluMLP(activation), layers=1)


@pytest.mark.parametrize("scale_from", slow_but(("output",), ["weight", "output"]))
@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([Relu2FFN()], ""),
        ([Relu2FFN(), *low_rank_passes("low_rank")], ""),
        ([Relu2FFN(), *low_rank_passes("cola")], ""),
        ([Relu2FFN(), *low_rank_passes("cola-relu2")], ""),
        ([Relu2FFN(), Weight24(method="ste")], ""),
        ([Relu2FFN(), *low_rank_passes("lost")], "leaves out"),
        ([Relu2FFN(), *low_rank_passes("lost"), Weight24(method="ste")], "leaves out"),
        (
            [Relu2FFN(), *low_rank_passes("lost-relu2"), Activation24(targets=("*.self_attn", "*.mlp.*"))],
            "leaves out",
        ),
        ([], "no linear reads it"),
    ],
)
def test_a_fixed_scale_that_is_not_from_all_it_should_be_is_remarked(
    passes: Any, said: str, scale_from: Any
) -> None:
    model, x = (llama(1), tokens()) if passes else (drops_between(), features(5, 16))
    inside = any(getattr(p, "bottleneck", "") == "relu2" for p in passes)
    where = {"targets": ("*.mlp",), "ignore": ("*.mlp.*",) if inside else ()}
    soft = Activation24(method="soft_threshold_weights", scale_from=scale_from, **where)
    pipeline = apply_(model, [*passes, soft])
    (note,) = (row.note for row in pipeline.report.rows if row.after.startswith("2:4 soft_threshold_weights"))
    assert (said in note) if said else not note
    (measured,) = (p for p in pipeline.active if isinstance(p, Activation24) and p.method == soft.method)
    with pipeline.lowered([*pipeline.active, ActivationCalibration(of=measured)]), torch.no_grad():
        model(x)
    (sums,) = (b for n, b in model.named_buffers() if n.endswith(SUMS))
    of_activation, of_scale = sums[2:4], sums[4:6]
    assert torch.equal(of_activation, of_scale) == ("no linear" in said)


def test_only_a_fixed_scale_asks_who_reads() -> None:
    for method in METHODS[:-1]:
        report = plan(drops_between(), [Activation24(method=method)])
        assert [row.note for row in report.rows] == [""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "ste", "backward": "sparse"}, "straight through"),
        ({"recompute": True, "precision": "fp8"}, "no fp8"),
        ({"dense_ratio": 1.0}, "dense_ratio"),
        ({"dense_ratio": -0.1}, "dense_ratio"),
        ({"dynamic_steps": -1}, "dynamic_steps"),
        ({"calibration_samples": 0}, "calibration_samples"),
        ({"from_step": 5, "until_step": 5}, "until_step"),
        ({"precision": "e4m3"}, "precision has no 'e4m3'"),
        ({"backward": "exact"}, "backward has no 'exact'"),
        ({"method": "soft"}, "method has no 'soft'"),
        ({"estimator": "straight"}, "estimator has no 'straight'"),
        ({"dense_ratio": float("nan")}, "dense_ratio"),
        ({"dynamic_steps": 2.5}, "dynamic_steps has to be an integer"),
        ({"scale_from": "activation"}, "scale_from"),
        ({"token_permutation": "random"}, "token_permutation"),
        ({"kernels": "no"}, "kernels has to be true or false"),
        ({"algorithms": [1]}, "algorithms has to be a tuple"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Act24Error, match=message):
        Activation24(**options)


def test_calibration_is_due_when_it_should_be() -> None:
    dynamic = Activation24(method="soft_dynamic", from_step=5, dynamic_steps=4)
    assert [s for s in range(5, 20) if dynamic.calibrates(s)] == [5, 9, 13, 17]
    every = Activation24(method="soft_dynamic", dynamic_steps=0)
    assert all(every.calibrates(s) for s in range(5))
    fixed = Activation24(method="soft_threshold_weights", from_step=5)
    assert [s for s in range(5, 20) if fixed.calibrates(s)] == [5]
    assert not any(Activation24(method=m).calibrates(0) for m in ("naive", "mvue"))
