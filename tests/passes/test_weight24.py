"""`weight24`: rewrites linears where it should, numerics, state, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import SwiGLU, Trunk, features, llama, tokens

from act24.options import OptionError
from act24.passes import Activation24, LowRank, PassError, Relu2FFN, Weight24, apply_, plan
from act24.sparse24.pattern.soft_threshold import soft_threshold24
from act24.sparse24.weight.linear24 import linear24
from act24.sparse24.weight.methods import METHODS, WeightMethod, weight_mask, weight_scale


def sparse_by_hand(model: nn.Module, method: Any, prefix: str) -> None:
    """Put the 2:4 form of every linear's weight below `prefix` in its place."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(prefix):
            weight = module.weight.data
            if method == "soft_threshold":
                module.weight.data = soft_threshold24(weight) * weight_scale(weight)
            else:
                module.weight.data = weight * weight_mask(weight, method)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_runs_on_its_sparse_weights(method: Any) -> None:
    model, reference = llama(), llama()
    sparse_by_hand(reference, method, "model.layers")
    apply_(model, [Weight24(method=method)])
    assert torch.allclose(model.eval()(tokens()), reference(tokens()), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_pass_straight_through(method: Any) -> None:
    model, reference = llama(1), llama(1)
    sparse_by_hand(reference, method, "model.layers")
    pipeline = apply_(model, [Weight24(method=method, weight_gradient="dense")])
    pipeline.begin_update_(0, loop_decays=True)  # and nobody does: the gradient as it comes
    for m in (model, reference):
        m(tokens()).square().mean().backward()
    dense = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, dense[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scope", "count"), [("attn", 4), ("mlp", 3), ("all", 7)])
def test_scope(scope: Any, count: int) -> None:
    report = plan(llama(1), [Weight24(scope=scope)])
    assert len(report.rows) == count
    assert all(("self_attn" in row.fqn) == (scope == "attn") for row in report.rows) or scope == "all"
    assert not any("lm_head" in row.fqn for row in report.rows)
    assert "left: lm_head (the head)" in str(report)


def test_the_head_has_to_be_named() -> None:
    report = plan(llama(1, vocab_size=96), [Weight24(targets=("lm_head",))])
    assert [row.fqn for row in report.rows] == ["lm_head"]


def test_report_counts_half_the_products() -> None:
    before, after = (plan(llama(1), [Weight24(scope=s)]) for s in ("all", "attn"))
    dense = before.flops_before
    head = 2 * 97 * 32
    assert before.flops_after - head == (dense - head) // 2
    assert dense - after.flops_after == 4 * 32 * 32


def test_sizes_that_do_not_fit_are_left_and_said() -> None:
    model = Trunk(lambda: SwiGLU(16, 30))
    report = plan(model, [Weight24(scope="mlp", method="ste")])
    assert [row.fqn.rpartition(".")[2] for row in report.rows] == ["gate", "up"] * 2, "30 inputs: not down"
    assert all("multiples of 4" in reason for _, _, reason in report.misses)
    with pytest.raises(PassError, match="multiples of 4"):
        plan(Trunk(lambda: SwiGLU(18, 30), width=18), [Weight24(scope="mlp")])


def test_a_tied_weight_is_left_alone() -> None:
    model = Trunk(lambda: SwiGLU(16, 16))
    model.blocks[1].mlp.up.weight = model.blocks[0].mlp.up.weight
    report = plan(model, [Weight24(scope="mlp")])
    assert len(report.rows) == 4
    assert all("tied" in reason for _, _, reason in report.misses)


def test_a_shared_module_is_rewritten_once_and_everywhere() -> None:
    mlp = SwiGLU()
    model = nn.Sequential(mlp, mlp)
    reference = copy.deepcopy(model)
    sparse_by_hand(reference, "ste", "0")
    apply_(model, [Weight24(targets=("0*",), method="ste")])
    x = features(3, 16)
    assert model[0] is model[1]
    assert torch.allclose(model.eval()(x), reference(x), atol=1e-6)


def test_biases_stay() -> None:
    model = Trunk(lambda: SwiGLU(bias=True))
    reference = copy.deepcopy(model)
    sparse_by_hand(reference, "transposable", "blocks")
    apply_(model, [Weight24(scope="mlp")])
    assert torch.allclose(model.eval()(features(3, 16)), reference(features(3, 16)), atol=1e-6)


class Conv1D(nn.Module):
    """GPT-2's linear, whose weight is stored [in, out]."""

    def __init__(self, out: int, inputs: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.randn(inputs, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class TransposedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(32, 16), Conv1D(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


@pytest.mark.parametrize("method", ["ste", "soft_threshold", "transposable"])
def test_groups_lie_along_the_reduction_of_a_transposed_weight(method: Any) -> None:
    model = Trunk(TransposedMLP)
    reference = copy.deepcopy(model)
    for block in reference.blocks:
        for linear in (block.mlp.c_fc, block.mlp.c_proj):
            weight = linear.weight.data.T
            soft = method == "soft_threshold"
            sparse = (
                soft_threshold24(weight) * weight_scale(weight)
                if soft
                else weight * weight_mask(weight, method)
            )
            linear.weight.data = sparse.T.contiguous()
    apply_(model, [Weight24(scope="mlp", method=method)])
    x = features(3, 16)
    assert torch.allclose(model.eval()(x), reference(x), atol=1e-5)


def test_groups_of_factors_lie_along_the_reduction() -> None:
    """The old overlay grouped along the rank, which no hardware reduces over."""
    model = llama(1)
    apply_(model, [LowRank(attn_rank=8, mlp_rank=8), Weight24(scope="mlp", method="ste")])
    masks = {n: b for n, b in model.named_buffers() if n.endswith("24_mask")}
    assert len(masks) == 6
    for name, mask in masks.items():
        weight = model.get_parameter(name.removesuffix("24_mask"))
        assert torch.equal(mask, weight_mask(weight, "ste"))
        assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_state_is_named_by_the_weight_and_persistent() -> None:
    model = llama(1)
    apply_(model, [Weight24(method="soft_threshold", scope="attn")])
    state = model.state_dict()
    for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
        prefix = f"model.layers.0.self_attn.{linear}.weight"
        weight = model.get_parameter(prefix)
        assert torch.equal(state[f"{prefix}24_mask"], weight_mask(weight, "ste"))
        assert float(state[f"{prefix}24_scale"]) == pytest.approx(float(weight_scale(weight)))
        assert f"{prefix}24_seed" not in state


def test_linears_that_activation24_took_are_none_any_more() -> None:
    report = plan(llama(1), [Relu2FFN(), Activation24(), Weight24()])
    taken = [row.fqn for row in report.rows if row.pass_name == "weight24"]
    assert len(taken) == 4
    assert all("self_attn" in fqn for fqn in taken)


def test_the_dense_finish_is_the_dense_model() -> None:
    model, dense = llama(), llama()
    pipeline = apply_(model, [Weight24(until_step=10)])
    pipeline.begin_update_(9)
    assert not torch.allclose(model(tokens()), dense(tokens()), atol=1e-4)
    pipeline.begin_update_(10)
    assert torch.equal(model(tokens()), dense(tokens()))


def test_planned_on_meta_and_untouched_without_a_match() -> None:
    with torch.device("meta"):
        model = Trunk(SwiGLU)
    assert len(plan(model, [Weight24(scope="mlp")]).rows) == 6
    with pytest.raises(PassError, match='no linear in scope "attn"'):
        plan(model, [Weight24(scope="attn")])


def test_layers_share_one_class_and_copies_keep_their_state() -> None:
    model = llama(3)
    apply_(model, [Weight24()])
    assert len({type(layer) for layer in model.model.layers}) == 1
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(duplicate(tokens()), model(tokens()))
    targets = [node.target for node in model.model.layers[0].graph.nodes]  # type: ignore[union-attr]
    assert targets.count(linear24) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_every": 0}, "mask_every has to be 1 or more"),
        ({"decay": -1.0}, "decay has to be 0 or more"),
        ({"decay": float("inf")}, "decay"),
        ({"method": "topk"}, "weight24: method has no 'topk': .*transposable"),
        ({"weight_gradient": "MVUE"}, "weight_gradient has no 'MVUE': choose from dense, mvue"),
        ({"scope": "att"}, "scope has no 'att': did you mean 'attn'"),
        ({"method": "ste", "decay": 1e-4}, 'method "ste" has no masked decay; transposable, sr_ste have'),
        ({"method": "sr_ste", "mask_every": 40}, "every update"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Weight24(**options)


def test_masks_are_due_when_they_should_be() -> None:
    kept = Weight24(from_step=3, mask_every=5)
    assert [s for s in range(3, 20) if kept.renews_masks(s)] == [3, 8, 13, 18]
    assert [Weight24(method=m).renewal for m in METHODS] == [40, 1, 1, 1]
    assert all(Weight24(method=m).renews_masks(7) for m in ("ste", "sr_ste", "soft_threshold"))
    assert [Weight24(method=m).draws for m in METHODS] == [True, True, False, False]
    assert Weight24(method="ste", weight_gradient="mvue").draws
    assert [Weight24(method=m).masked_decay for m in METHODS] == [6e-5, 0, 0, 2e-4]


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({}, "y, dX, dW"),
        ({"weight_gradient": "dense"}, "y, dX"),
        ({"method": "soft_threshold"}, "y, dW"),
        ({"method": "sr_ste"}, "y"),
    ],
)
def test_the_report_says_which_products_are_sparse(options: dict[str, Any], products: str) -> None:
    rows = plan(llama(1), [Weight24(scope="attn", **options)]).rows
    assert {row.after.partition("; ")[2] for row in rows} == {f"2:4 in {products}"}


def test_the_report_says_where_products_cannot_be_sparse() -> None:
    rows = plan(llama(1, hidden_size=64, intermediate_size=144), [Weight24()]).rows
    noted = {row.fqn.rpartition(".")[2] for row in rows if "multiples of 64" in row.note}
    assert noted == {"gate_proj", "up_proj", "down_proj"}
    assert not any(row.note for row in plan(llama(1), [Weight24(kernels=False)]).rows)


def test_a_method_whose_mask_is_not_2_4_is_refused() -> None:
    """Packed it would drop what dense products keep."""
    every_other = lambda w: torch.arange(w.shape[1]).expand(w.shape) % 2 == 0  # noqa: E731
    assert WeightMethod("toy", mask=every_other).name == "toy"
    for given, message in (
        (
            {"mask": lambda w: w > w.amin(1, keepdim=True)},
            "toy: mask keeps more than two of four .* along in",
        ),
        ({"mask": every_other, "both_ways": True}, "more than two of four .* along out"),
        ({"mask": torch.abs}, "boolean tensor of the weight's shape"),
    ):
        with pytest.raises(OptionError, match=message):
            WeightMethod("toy", **given)


def test_a_method_from_outside_trains() -> None:
    """A record in the table is all that the pass, its state and its report need."""
    toy = WeightMethod("toy", mask=lambda w: torch.arange(w.shape[1]).expand(w.shape) % 4 < 2)
    METHODS.add(toy)
    try:
        model = llama(1)
        pipeline = apply_(model, [Weight24(method="toy", scope="mlp")])
        assert "2:4 toy; 2:4 in y" in str(pipeline)
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        with torch.no_grad():  # what a record of its own drops is not multiplied
            for name, parameter in model.named_parameters():
                if ".mlp." in name:
                    parameter[:, 2::4] = parameter[:, 3::4] = torch.nan
        pipeline.begin_update_(0)
        model(tokens()).sum().backward()
        assert bool(weight.grad.isfinite().all())  # type: ignore[union-attr]
    finally:
        del METHODS._records["toy"]


@pytest.mark.parametrize("rows", [(64,), (8, 64), (2, 8, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_what_it_gives_can_be_written_to_in_place(rows: Any, bias: bool, precision: Any) -> None:
    """As what nn.Linear gives: outside of a traced module, by a host framework's code."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act = nn.Linear(64, 64, bias=bias), nn.ReLU(inplace=True)

        def forward(self, x: Any, **_: Any) -> Any:
            h = self.a(x)
            h += 1
            return self.act(h)

    model = nn.ModuleList([Outer()])
    pipeline = apply_(model, [Weight24(targets=("*.a",), precision=precision)])
    pipeline.begin_update_(0)
    x = features(*rows).requires_grad_()
    found = torch.autograd.grad(model[0](x).sin().sum(), [x, *model.parameters()])
    hidden = model[0].a(x)
    expected = torch.autograd.grad((hidden + 1).relu().sin().sum(), [x, *model.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
