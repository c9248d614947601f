"""The pass `fp8`: which linears it takes, what it leaves, and what a training loop owes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from slow import slow_but
from torch import Tensor
from toys import llama, tokens

from act24.errors import PassError
from act24.fp8.linear import linear_fp8, underflow_counts
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.passes import (
    Activation24,
    ActivationStatistics,
    Cola,
    Fp8,
    LowRank,
    Pass,
    Pipeline,
    Recompute,
    Relu2FFN,
    Weight24,
    apply_,
    plan,
)
from act24.passes.fp8 import PARTS, pays
from act24.passes.graph.normal_form import nodes_of
from act24.precision import Decided
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.weight.linear24 import linear24
from act24.tools.watch.fp8_watch import take_underflow_

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def taken(*passes: Pass, **sizes: int) -> list[str]:
    """The names of what fp8 takes in the first block."""
    report = plan(llama(**sizes), passes)
    return [r.fqn for r in report.rows if r.pass_name == "fp8" and ".0." in r.fqn]


def losses(model: LlamaForCausalLM, pipeline: Pipeline, updates: int = 3) -> list[Tensor]:
    optimizer, result = torch.optim.SGD(model.parameters(), lr=0.5), []
    for step in range(updates):
        pipeline.begin_update_(step)
        for index in range(2):
            ids = tokens(seed=2 * step + index)
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            result.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return result


def test_it_takes_every_linear_of_the_blocks() -> None:
    names = [name.rpartition(".")[2] for name in taken(Fp8())]
    assert sorted(names) == sorted(LINEARS)


def test_it_takes_what_others_leave() -> None:
    assert [n.rpartition(".")[2] for n in taken(Relu2FFN(), Activation24(), Fp8())] == list(LINEARS[:4])
    assert not taken(Weight24(method="ste"), Fp8(optional=True))
    factors = taken(LowRank(attn_rank=16, mlp_rank=16), Fp8())
    assert len(factors) == 2 * len(LINEARS)
    with pytest.raises(PassError, match="activation24 stands behind fp8"):
        taken(Relu2FFN(), Fp8(), Activation24())


def test_targets_ignore_and_sizes_are_said() -> None:
    names = taken(Fp8(targets=("*mlp*",), ignore=("*down_proj",)))
    assert [n.rpartition(".")[2] for n in names] == ["gate_proj", "up_proj"]
    report = plan(llama(), [Fp8(precision="auto")])  # too small, and no error: it may be decided otherwise
    assert not [r for r in report.rows if r.pass_name == "fp8"]
    assert "casts would take what products gain, by its shape" in str(report)
    assert 'set precision = "fp8" to take it all the same; a run on a GPU times both' in str(report)
    odd = plan(llama(intermediate_size=40), [Fp8()])
    assert "its weight is 40 × 32, and e4m3 wants multiples of 16" in str(odd)


def test_auto_takes_large_linears_only() -> None:
    assert all(pays(*shape) for shape in ((4096, 4096), (2048, 2048), (16384, 4096)))
    assert not any(pays(*shape) for shape in ((768, 768), (4096, 256)))


def test_auto_takes_what_was_decided_of_the_very_layer() -> None:
    """Whatever the shape says; the buffers that it then reads were there from the start."""
    found: Decided = (
        (("network", (32, 128, 32), "relu2, naive, dense"), ("fp8", 2.0, 1.0)),
        (("linears", (32, 32, 32, 32), "rowwise"), ("fp8", 2.0, 1.0)),
        (("linears", (32, 32), "rowwise"), ("bfloat16", 1.0, 2.0)),
        (("weight24", (32, 32), "ste, dense"), ("fp8", 2.0, 1.0)),
    )
    for passes, expected in (
        ((Relu2FFN(), Activation24(precision="auto"), Fp8(precision="auto")), (1, 3, 0)),
        ((Weight24(method="ste", scope="attn", precision="auto"),), (0, 0, 4)),
    ):
        model = llama(1)
        pipeline = apply_(model, [*passes, ActivationStatistics(optional=True)])
        for p in pipeline.passes:
            if isinstance(p, Activation24 | Fp8):
                pipeline.exchange_(p, replace(p, keep_cast=True, decided=found))
            elif isinstance(p, Weight24):
                pipeline.exchange_(p, replace(p, decided=found))
        nodes = [node for module in pipeline.modules for node in module.graph.nodes]
        options = [n.args[-1].precision for n in nodes if n.target in (activation24, linear24)]
        linears = sum(n.target is linear_fp8 for n in nodes)
        counts = (options.count("fp8") * (expected[0] > 0), linears, options.count("fp8") * (expected[2] > 0))
        assert counts == expected
        assert all(torch.isfinite(loss) for loss in losses(model, pipeline, 2))
        assert len(take_underflow_(pipeline)) > 2


def test_it_trains_close_to_the_model_without_it_and_is_gone_in_evaluation() -> None:
    narrow, plain = llama(), llama()
    pipeline = apply_(narrow, [Fp8()])
    ids = tokens()
    with pipeline.evaluation():
        assert torch.equal(narrow(ids), plain(ids))
    assert torch.equal(narrow.eval()(ids), plain(ids))
    narrow.train()
    pipeline.begin_update_(0)
    difference = (narrow(ids) - plain(ids)).norm() / plain(ids).norm()
    assert 1e-3 < difference < 0.1
    ours, theirs = losses(narrow, pipeline), losses(plain, apply_(plain, []))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)
    assert ours != theirs


def test_casts_that_are_kept_are_those_of_every_update_at_one_address() -> None:
    kept, casting = llama().bfloat16(), llama().bfloat16()
    pipelines = []
    for model, keep in ((kept, True), (casting, False)):
        pipeline = apply_(model, [Fp8()])
        (p,) = pipeline.active
        assert isinstance(p, Fp8)
        pipeline.exchange_(p, replace(p, keep_cast=keep))
        pipelines.append(pipeline)
    pipelines[0].begin_update_(0)
    places = {n: b.data_ptr() for n, b in kept.named_buffers() if n.endswith(PARTS)}
    assert len(places) == 2 * len(LINEARS) * len(PARTS)
    assert losses(kept, pipelines[0]) == losses(casting, pipelines[1])
    assert {n: b.data_ptr() for n, b in kept.named_buffers() if n.endswith(PARTS)} == places
    assert not [n for n in kept.state_dict() if n.endswith(PARTS)]


def test_step_ranges_and_recomputation() -> None:
    model = llama()
    pipeline = apply_(model, [Fp8(from_step=1, until_step=2)])
    found = []
    for step in range(3):
        pipeline.lower_(step)
        found.append(sum(len(list(nodes_of(m.graph, linear_fp8))) for m in pipeline.modules))
    assert found == [0, 2 * len(LINEARS), 0]
    results = []
    for extra in ((), (Recompute(),)):
        model = llama()
        pipeline = apply_(model, [Cola(attn_rank=16, mlp_rank=16), Fp8(), *extra])
        results.append(losses(model, pipeline, 1))
    torch.testing.assert_close(*results)


def test_activation24_goes_along_unless_it_says_otherwise() -> None:
    def options(*passes: Pass) -> str:
        model = llama(1)
        apply_(model, [Relu2FFN(), *passes])
        nodes = [n for m in model.modules() if hasattr(m, "graph") for n in nodes_of(m.graph, activation24)]
        return nodes[0].args[-1].precision

    assert options(Activation24()) == "bfloat16"
    assert options(Activation24(), Fp8()) == "fp8"
    assert options(Activation24(precision="bfloat16"), Fp8()) == "bfloat16"
    assert options(Activation24(precision="auto")) == "bfloat16"  # 32 wide
    assert options(Activation24(), Fp8(precision="auto", optional=True)) == "bfloat16"
    with torch.device("meta"):
        large = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=97,
                hidden_size=2048,
                intermediate_size=5504,
                num_attention_heads=16,
                num_hidden_layers=1,
            )
        )
    report = str(plan(large, [Relu2FFN(), Activation24(), Fp8(precision="auto")]))
    assert "2:4 naive, dense backward, fp8" in report


WEIGHT24 = {
    "dense gradient": (
        Weight24(method="ste"),
        "2:4 ste; 2:4 in y",
        "2:4 ste; e4m3 in y, dX, dW",
    ),
    "drawn": (
        Weight24(),
        "2:4 transposable; 2:4 in y, dX, dW",
        "2:4 transposable; e4m3 in y, dX; 2:4 in dW",
    ),
}


@pytest.mark.parametrize("kind", slow_but(("drawn",), WEIGHT24))
def test_weight24_goes_along_unless_it_says_otherwise(kind: str) -> None:
    pass_, plain, narrow = WEIGHT24[kind]
    rest = Fp8(optional=True)
    for passes, told in (
        ((pass_,), plain),
        ((pass_, rest), narrow),
        ((replace(pass_, precision="bfloat16"), rest), plain),
        ((replace(pass_, precision="fp8"),), narrow),
        ((replace(pass_, precision="auto"),), plain),  # 32 wide
        ((pass_, Fp8(precision="auto", optional=True)), plain),
    ):
        model = llama(1)
        pipeline = apply_(model, passes)
        assert {row.after for row in pipeline.report.rows if row.pass_name == "weight24"} == {told}
        nodes = [n for m in pipeline.modules for n in nodes_of(m.graph, linear24)]
        report = pipeline.report
        halved = 0 if told == narrow else sum(row.parameters_before for row in report.rows)
        assert report.flops_before - report.flops_after == halved
        wanted = "fp8" if told == narrow else "bfloat16"
        assert {n.args[-1].precision for n in nodes} == {wanted}
        assert all(torch.isfinite(loss) for loss in losses(model, pipeline, 2))
        with pipeline.evaluation():  # is of the weights in their own dtype
            nodes = [n for m in pipeline.modules for n in nodes_of(m.graph, linear24)]
            assert {n.args[-1].precision for n in nodes} == {"bfloat16"}


@pytest.mark.parametrize("precision", ["fp8", "bfloat16"])
def test_what_a_network_makes_zero_of_its_input_is_counted(precision: Literal["fp8", "bfloat16"]) -> None:
    """A norm's weight that makes all but the first of 32 features too small is counted as 31 of 32."""
    model = llama()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[1:] = 1e-12
    pipeline = apply_(model, [Relu2FFN(), Activation24(precision=precision), ActivationStatistics()])
    pipeline.begin_update_(0)
    model(tokens())
    shares = take_underflow_(pipeline)
    if precision == "bfloat16":
        assert not shares
        return
    first, second = (shares[f"model.layers.{layer}.mlp.up_proj"] for layer in range(2))
    assert first < 0.05
    assert second == 31 / 32
    assert shares["max"] == second
    assert len(shares) == 4
    model(tokens()).square().sum().backward()
    shares = take_underflow_(pipeline)
    assert len(shares) == 8
    assert 0 <= shares["gradient/model.layers.0.mlp.up_proj"] <= shares["gradient/max"] < 0.05


def test_what_weight24_makes_zero_in_e4m3_is_counted() -> None:
    for precision in ("fp8", "bfloat16"):
        model = llama()
        passes = [Weight24(method="ste", precision=precision), ActivationStatistics(optional=True)]
        pipeline = apply_(model, passes)
        losses(model, pipeline, 1)
        shares = take_underflow_(pipeline)
        assert len(shares) == (2 * (2 * len(LINEARS) + 2) if precision == "fp8" else 0)
        assert all(0 <= share < 0.05 for share in shares.values())


def test_weight24_in_fp8_learns_as_in_bfloat16_and_says_what_it_leaves() -> None:
    results = []
    for precision in ("bfloat16", "fp8"):
        model = llama(1)
        pipeline = apply_(model, [Weight24(method="ste", precision=precision)])
        results.append(torch.stack(losses(model, pipeline, 6)))
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=3e-2, atol=0)
    odd = LlamaForCausalLM(
        LlamaConfig(97, 32, 72, 1, 2)  # 72 is no multiple of 16
    )
    rows = plan(odd, [Weight24(method="ste", precision="fp8")]).rows
    notes = {row.fqn.rpartition(".")[2]: (row.after, row.note) for row in rows}
    assert notes["q_proj"][0].endswith("e4m3 in y, dX, dW")
    assert notes["up_proj"][0].endswith("2:4 in y")
    assert "in bfloat16: e4m3 wants sides that are multiples of 16" in notes["up_proj"][1]


def test_what_becomes_zero_is_counted() -> None:
    """By hand: of 32 entries of a token 3 are below half of the smallest number beside a 1, and one is
    zero."""
    x = torch.ones(2, 16, 32)
    x[..., 1:4], x[..., 4], x[..., 5] = 2.0**-19, 0, 2.0**-9 * 0.9
    assert underflow_counts(x, "rowwise").tolist() == [2 * 31, 2 * 3]
    model = llama()
    pipeline = apply_(model, [Fp8(), ActivationStatistics(optional=True)])
    losses(model, pipeline, 1)
    shares = take_underflow_(pipeline)
    gradients = {name for name in shares if name.startswith("gradient/")}
    assert {name.removeprefix("gradient/") for name in gradients} == shares.keys() - gradients
    assert len(gradients) == 2 * len(LINEARS) + 2
    assert all(0 <= share < 0.05 for share in shares.values())
    assert not take_underflow_(pipeline)
    with pipeline.evaluation():
        model(tokens())
    assert not take_underflow_(pipeline)


# Weights of networks, cast once an update


def test_networks_keep_their_weights_in_e4m3_for_an_update() -> None:
    """Beside the same run that casts in every micro-batch: the same bits, at addresses that stay; and what
    is evaluated behind an update is of the weights as they are then."""
    models, pipelines, found = [], [], []
    for keep in (True, False):
        model = llama(hidden_size=32).bfloat16()
        pipeline = apply_(model, [Relu2FFN(), Activation24(precision="fp8", backward="split_gemm")])
        p = pipeline.active[-1]
        assert isinstance(p, Activation24)
        pipeline.exchange_(p, replace(p, keep_cast=keep))
        pipeline.begin_update_(0)
        places = {n: b.data_ptr() for n, b in model.named_buffers() if n.endswith(PARTS) and b.numel()}
        assert len(places) == (2 * 2 * len(PARTS) if keep else 0)
        found.append(losses(model, pipeline))
        now = {n: b.data_ptr() for n, b in model.named_buffers() if n.endswith(PARTS) and b.numel()}
        assert now == places
        models.append(model)
        pipelines.append(pipeline)
    assert found[0] == found[1]
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    logits = []
    for model, pipeline in zip(models, pipelines, strict=True):
        with pipeline.evaluation():
            logits.append(model(tokens()))
    assert torch.equal(*logits)
    assert not [n for n in models[0].state_dict() if n.endswith(PARTS)]
    with torch.no_grad():  # the buffers are what is read
        pipelines[0].begin_update_(3)
        before = models[0](tokens())
        for name, buffer in models[0].named_buffers():
            if name.endswith("_e4m3_scale"):
                buffer.mul_(2)
        assert not torch.equal(models[0](tokens()), before)


def test_casts_are_shared_with_what_fp8_has_before_the_network_is_sparse() -> None:
    """From step 2 on activation24 has weights that fp8 had, over other scales: as without keeping them."""
    found = []
    for keep in (True, False):
        model = llama(hidden_size=32).bfloat16()
        pipeline = apply_(model, [Relu2FFN(), Activation24(from_step=2), Fp8()])
        for p in pipeline.passes:
            if isinstance(p, Activation24 | Fp8):
                pipeline.exchange_(p, replace(p, keep_cast=keep))
        found.append(losses(model, pipeline, 4))
    assert found[0] == found[1]
