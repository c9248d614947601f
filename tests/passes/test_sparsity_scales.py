"""Scales of soft thresholding: what they are measured on, when they are decided, and when they stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rewritten_llama import IDS, llama, rewritten, scales
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Relu2MLP, Trunk, features

from act24.llama import LlamaForCausalLM
from act24.passes import Activation24, ActivationStatistics, Cola, LowRank, Relu2FFN, Weight24, apply_
from act24.sparse24.feed_forward.calibration import calibration_sums, sample_rows
from act24.sparse24.pattern.soft_threshold import scale_from_sums, scale_sums, soft_threshold24
from act24.sparse24.weight.methods import weight_scale
from act24.tools.run.processes import Processes


def hidden_states(model: LlamaForCausalLM, layer: int) -> Tensor:
    """The pre-activation of a layer's network, all layers before it running as they are."""
    block = model.model.layers[layer]
    kept: list[Tensor] = []
    handle = block.post_attention_layernorm.register_forward_hook(lambda _m, _i, out: kept.append(out))  # type: ignore[union-attr]
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return (kept[0] @ block.get_parameter("mlp.up_proj.weight").T).detach()


def test_dynamic_scale_is_measured_on_the_layer_s_own_activations() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="soft_dynamic", calibration_samples=20))
    before = [hidden_states(model, layer) for layer in (0, 1)]  # under the scales as they are: 1
    text = pipeline.begin_update_(0, IDS)
    for got, hidden in zip(scales(model), before, strict=True):
        rows = sample_rows(None, 48, 20, hidden.device)
        activation = torch.relu(hidden.flatten(0, 1)[rows]).double() ** 2
        expected = scale_from_sums(scale_sums(activation, soft_threshold24(activation)))
        assert got == pytest.approx(float(expected), rel=1e-5)
        assert got > 1.01
    assert text is not None
    assert "β" in text
    assert f"{max(scales(model)):.4f}" in text


def test_scale_is_decided_when_due_and_constant_between() -> None:
    passes = (Relu2FFN(), Activation24(method="soft_dynamic", dynamic_steps=3, from_step=2))
    model, pipeline = rewritten(*passes, ActivationStatistics())
    seen = []
    texts = []
    for step in range(9):
        pipeline.lower_(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)  # as an optimizer would
        texts.append(pipeline.begin_update_(step, IDS))
        for _ in range(2):
            model(IDS)
            seen.append(scales(model))
    assert seen[0] == seen[3] == [1.0, 1.0], "dense warm-up"
    assert [seen[i] == seen[i + 1] for i in range(0, 18, 2)] == [True] * 9, "constant while accumulating"
    changes = [step for step in range(1, 9) if seen[2 * step] != seen[2 * step - 1]]
    assert changes == [2, 5, 8]
    assert [text is not None for text in texts] == [step == 2 for step in range(9)]


def test_measuring_and_evaluating_move_no_other_state() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="soft_dynamic"), ActivationStatistics())
    pipeline.begin_update_(0, IDS)
    counted = {n: b.clone() for n, b in model.named_buffers() if not n.endswith("calibration")}
    assert all(float(b.sum()) == 0 for n, b in counted.items() if n.endswith("statistics"))
    model(IDS)
    counted = {n: b.clone() for n, b in model.named_buffers()}
    with pipeline.evaluation():
        model(IDS + 0)
    with pipeline.evaluation(without=("activation24",)):
        dense = model(IDS)
    assert all(torch.equal(b, counted[n]) for n, b in model.named_buffers())
    plain = llama()
    apply_(plain, [Relu2FFN()], seed=3)
    assert torch.equal(dense, plain(IDS))


def test_a_fixed_scale_from_the_weights() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="soft_threshold_weights"))
    pipeline.begin_update_(0, IDS)
    for layer, scale in enumerate(scales(model)):
        weight = model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")
        assert scale == pytest.approx(float(weight_scale(weight)), rel=1e-6)
        assert scale == pytest.approx(1.48, abs=0.05), "Gaussian weights"
    fixed = scales(model)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").square_()
    pipeline.begin_update_(1, IDS)
    assert scales(model) == fixed


@pytest.mark.parametrize("factors", [(), (LowRank(attn_rank=8, mlp_rank=8),)])
def test_a_fixed_scale_from_the_output(factors: Any) -> None:
    method = Activation24(method="soft_threshold_weights", scale_from="output", calibration_samples=10_000)
    model, pipeline = rewritten(Relu2FFN(), *factors, method)
    if not factors:
        weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
        hidden = hidden_states(model, 0)
    else:
        block = model.model.layers[0]
        weight = block.get_parameter("mlp.down_proj.weight_out") @ block.get_parameter(
            "mlp.down_proj.weight_in"
        )
        up = block.get_parameter("mlp.up_proj.weight_out") @ block.get_parameter("mlp.up_proj.weight_in")
        kept: list[Tensor] = []
        handle = block.post_attention_layernorm.register_forward_hook(lambda _m, _i, out: kept.append(out))  # type: ignore[union-attr]
        model.eval()(IDS)
        model.train()
        handle.remove()
        hidden = kept[0] @ up.T
    pipeline.begin_update_(0, IDS)
    activation = torch.relu(hidden.detach()).double() ** 2
    full = activation @ weight.detach().double().T
    sparse = soft_threshold24(activation) @ weight.detach().double().T
    solution = float((full * sparse).sum() / sparse.square().sum())
    assert scales(model)[0] == pytest.approx(max(solution, 1.0), rel=1e-4)


class _Two(Processes):
    """Two processes, one after the other: the sums of the first are added to those of the second."""

    def sum_(self, tensor: Tensor) -> Tensor:
        totals.append(tensor.clone())
        return tensor.add_(totals[0]) if len(totals) == 2 else tensor


totals: list[Tensor] = []


def test_sums_are_added_over_processes() -> None:
    totals.clear()
    other = IDS.flip(0) + 0
    other[:, ::2] = 5
    for ids in (IDS, other):
        model, pipeline = rewritten(Relu2FFN(), Activation24(method="soft_dynamic"))
        pipeline.begin_update_(0, ids, _Two(0, 2, torch.device("cpu")).sum_)
    expected = scale_from_sums((totals[0] + totals[1])[:, -2:]).tolist()
    assert scales(model) == pytest.approx(expected)


def test_two_passes_with_scales_do_not_disturb_each_other() -> None:
    mlp = Activation24(method="soft_dynamic", targets=("*.mlp",), ignore=("*.mlp.*",), dynamic_steps=1)
    inner = Activation24(method="soft_threshold_weights", targets=("*.self_attn", "*.mlp.*"))
    model, pipeline = rewritten(Relu2FFN(), Cola(attn_rank=8, mlp_rank=8, bottleneck="relu2"), mlp, inner)
    pipeline.begin_update_(0, IDS)
    first = dict(
        zip([n for n, _ in model.named_buffers() if n.endswith("24_scale")], scales(model), strict=True)
    )
    assert len(first) == 14
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    pipeline.begin_update_(1, IDS)
    for (name, old), new in zip(first.items(), scales(model), strict=True):
        assert (old != new) == name.endswith("mlp.activation24_scale"), name


def test_soft_threshold_scale_is_fixed_at_the_first_sparse_update() -> None:
    model, pipeline = rewritten(Weight24(scope="mlp", method="soft_threshold", from_step=2))
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).pow_(3)
    found = []
    for step in range(4):
        pipeline.lower_(step)
        pipeline.begin_update_(step, IDS)
        found.append(float(model.get_buffer(f"{name}24_scale")))
        if step == 2:
            expected = float(weight_scale(model.get_parameter(name)))
            with torch.no_grad():
                model.get_parameter(name).pow_(3)
    assert found[2] == found[3] == pytest.approx(expected)
    assert found[0] != found[2]


def test_calibration_sums_of_nothing_leave_the_scale() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="soft_dynamic", dynamic_steps=2))
    with torch.no_grad():
        for layer in (0, 1):
            model.get_parameter(f"model.layers.{layer}.mlp.up_proj.weight").zero_()
    text = pipeline.begin_update_(0, IDS)
    assert scales(model) == [1, 1]
    assert text is not None
    assert "all zero" in text
    for layer in (0, 1):
        model.get_buffer(f"model.layers.{layer}.mlp.activation24_scale").fill_(1.25)
    pipeline.begin_update_(2, IDS)
    assert scales(model) == [1.25, 1.25]
    assert calibration_sums(torch.zeros(4, 8), None, "activation", 4, "relu2").tolist() == [0.0] * 6


def test_measuring_leaves_buffers_and_generators_as_they_were() -> None:
    """As if it had not run: what the update's own forwards write and draw is what they do without it."""

    class Counting(Trunk):
        def __init__(self) -> None:
            super().__init__(lambda: Relu2MLP(dropout=0.5))
            self.norm = nn.BatchNorm1d(16)
            self.register_buffer("last", torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            self.last = x.mean(0)
            return super().forward(self.norm(F.dropout(x)))

    model, x = Counting(), features(6, 16)
    pipeline = apply_(model, [Activation24(method="soft_dynamic")], probe=x)
    kept = {name: b for name, b in model.named_buffers() if name.startswith(("norm", "last"))}
    before = {name: b.clone() for name, b in kept.items()}
    state = torch.get_rng_state()
    assert pipeline.begin_update_(0, x)
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in kept.items():
        assert torch.equal(buffer, before[name]), name
        assert model.get_buffer(name) is buffer, "CUDA graphs read it there"
    model(x)
    assert model.norm.num_batches_tracked == 1
