"""What a training loop does for 2:4 between forwards: scales, masks, seeds, padding, decay, watching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from act24.errors import Act24Error
from act24.initialise import build_llama
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.passes import (
    Activation24,
    ActivationStatistics,
    Cola,
    LowRank,
    Pipeline,
    Relu2FFN,
    Weight24,
    apply_,
)
from act24.sparse24.calibration import calibration_sums, sample_rows
from act24.sparse24.soft_threshold import scale_from_sums, scale_sums, soft_threshold24
from act24.sparse24.weight import weight_mask, weight_scale
from act24.tools.processes import Processes
from act24.tools.sparsity_state import (
    begin_micro_batch_,
    begin_update_,
    decay_dropped_weights_,
    evaluation,
    refuse_exact_steps,
)
from act24.tools.sparsity_watch import alarms, gradient_cosines, take_flip_rates_
from act24.tools.statistics import SiteStatistics, read_activation_statistics_, weight_sparsity

ALONE = Processes(0, 1, torch.device("cpu"))
IDS = torch.randint(97, (4, 12), generator=torch.Generator().manual_seed(0))


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    )
    return build_llama(config, 0)


def rewritten(*passes: Any) -> tuple[LlamaForCausalLM, Pipeline]:
    model = llama()
    return model, apply_(model, passes, seed=3)


def scales(model: LlamaForCausalLM) -> list[float]:
    return [float(b) for n, b in model.named_buffers() if n.endswith("activation24_scale")]


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
    text = begin_update_(pipeline, 0, lambda: model(IDS), ALONE)
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
        texts.append(begin_update_(pipeline, step, lambda: model(IDS), ALONE))
        for micro_batch in range(2):
            begin_micro_batch_(pipeline, seed=0, step=step, micro_batch=micro_batch)
            model(IDS)
            seen.append(scales(model))
    assert seen[0] == seen[3] == [1.0, 1.0], "dense warm-up"
    assert [seen[i] == seen[i + 1] for i in range(0, 18, 2)] == [True] * 9, "constant while accumulating"
    changes = [step for step in range(1, 9) if seen[2 * step] != seen[2 * step - 1]]
    assert changes == [2, 5, 8]
    assert [text is not None for text in texts] == [step == 2 for step in range(9)]


def test_measuring_and_evaluating_move_no_other_state() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="soft_dynamic"), ActivationStatistics())
    begin_update_(pipeline, 0, lambda: model(IDS), ALONE)
    counted = {n: b.clone() for n, b in model.named_buffers() if not n.endswith("calibration")}
    assert all(float(b.sum()) == 0 for n, b in counted.items() if n.endswith("statistics"))
    model(IDS)
    counted = {n: b.clone() for n, b in model.named_buffers()}
    with evaluation(pipeline):
        model(IDS + 0)
    with evaluation(pipeline, without=("activation24",)):
        dense = model(IDS)
    assert all(torch.equal(b, counted[n]) for n, b in model.named_buffers())
    plain = llama()
    apply_(plain, [Relu2FFN()], seed=3)
    assert torch.equal(dense, plain(IDS))


def test_a_fixed_scale_from_the_weights() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="soft_threshold_weights"))
    begin_update_(pipeline, 0, lambda: model(IDS), ALONE)
    for layer, scale in enumerate(scales(model)):
        weight = model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")
        assert scale == pytest.approx(float(weight_scale(weight)), rel=1e-6)
        assert scale == pytest.approx(1.48, abs=0.05), "Gaussian weights"
    fixed = scales(model)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").square_()
    begin_update_(pipeline, 1, lambda: model(IDS), ALONE)
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
        model(IDS)
        handle.remove()
        hidden = kept[0] @ up.T
    begin_update_(pipeline, 0, lambda: model(IDS), ALONE)
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
        begin_update_(pipeline, 0, lambda ids=ids, model=model: model(ids), _Two(0, 2, torch.device("cpu")))
    expected = scale_from_sums((totals[0] + totals[1])[:, -2:]).tolist()
    assert scales(model) == pytest.approx(expected)


def test_two_passes_with_scales_do_not_disturb_each_other() -> None:
    mlp = Activation24(method="soft_dynamic", targets=("*.mlp",), dynamic_steps=1)
    inner = Activation24(method="soft_threshold_weights", ignore=("*.mlp",))
    model, pipeline = rewritten(Relu2FFN(), Cola(attn_rank=8, mlp_rank=8, bottleneck="relu2"), mlp, inner)
    begin_update_(pipeline, 0, lambda: model(IDS), ALONE)
    first = dict(
        zip([n for n, _ in model.named_buffers() if n.endswith("24_scale")], scales(model), strict=True)
    )
    assert len(first) == 14
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    begin_update_(pipeline, 1, lambda: model(IDS), ALONE)
    for (name, old), new in zip(first.items(), scales(model), strict=True):
        assert (old != new) == name.endswith("mlp.activation24_scale"), name


def test_padding_reaches_statistics_and_calibration() -> None:
    def counts(ids: Tensor, pads: Tensor | None) -> tuple[list[SiteStatistics], list[float]]:
        model, pipeline = rewritten(
            Relu2FFN(), Activation24(method="soft_dynamic", backward="sparse"), ActivationStatistics()
        )
        begin_update_(pipeline, 0, lambda: model(ids), ALONE, pads)
        begin_micro_batch_(pipeline, seed=0, step=0, micro_batch=0, pads=pads)
        model(ids)
        return read_activation_statistics_(model, ALONE), scales(model)

    pads = torch.zeros(4, 12, dtype=torch.bool)
    pads[:, 8:] = True
    other = torch.where(pads, 96 - IDS, IDS)
    first, second = counts(IDS, pads), counts(other, pads)
    for a, b in zip(first[0], second[0], strict=True):
        assert a.sparsity == pytest.approx(b.sparsity, rel=1e-6)
        assert a.feature_dropped_energy == pytest.approx(b.feature_dropped_energy, rel=1e-4)
    assert first[1] == pytest.approx(second[1])
    assert counts(IDS, None)[0][0].crowded_groups != counts(other, None)[0][0].crowded_groups


def test_padding_is_taken_out_again() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(), ActivationStatistics())
    pads = torch.zeros(4, 12, dtype=torch.bool)
    begin_micro_batch_(pipeline, seed=0, step=0, micro_batch=0, pads=pads)
    assert all(b is pads for n, b in model.named_buffers() if n.endswith("pad_rows"))
    begin_micro_batch_(pipeline, seed=0, step=0, micro_batch=1)
    assert all(b.ndim == 0 and not b for n, b in model.named_buffers() if n.endswith("pad_rows"))
    assert "pad_rows" not in "".join(model.state_dict())


def seeds(model: LlamaForCausalLM) -> list[int]:
    return [int(b) for n, b in model.named_buffers() if n.endswith("24_seed")]


def test_seeds_differ_where_they_should_and_repeat_where_they_must() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="mvue"), Weight24(scope="attn"))
    found: dict[Any, list[int]] = {}
    for key in [(0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0)]:
        seed, step, micro_batch, rank = key
        begin_micro_batch_(pipeline, seed=seed, step=step, micro_batch=micro_batch, rank=rank)
        found[key] = seeds(model)
    everything = [value for values in found.values() for value in values]
    assert len(found[0, 0, 0, 0]) == 2 * (1 + 4)
    assert len(set(everything)) == len(everything)
    begin_micro_batch_(pipeline, seed=0, step=0, micro_batch=0, rank=0)
    assert seeds(model) == found[0, 0, 0, 0]


def test_recomputation_draws_the_same() -> None:
    """Activation checkpointing runs the forward twice; the gradients are those of one forward."""
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="mvue", backward="sparse"))
    begin_micro_batch_(pipeline, seed=0, step=0, micro_batch=0)
    hidden = model.model.embed_tokens(IDS).detach()
    from act24.llama import rotary_embedding

    cos, sin = rotary_embedding(12, 8, 1e4, hidden.device)

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        x = hidden
        for layer in model.model.layers:
            x = run(layer, x, cos, sin)
        return list(torch.autograd.grad(x.square().sum(), list(model.model.layers.parameters())))

    plain = gradients(lambda layer, *args: layer(*args))
    recomputed = gradients(lambda layer, *args: checkpoint(layer, *args, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def loss_of(model: LlamaForCausalLM) -> Tensor:
    return F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())


def test_masks_are_kept_for_mask_every_updates_and_flips_are_measured() -> None:
    model, pipeline = rewritten(Weight24(scope="mlp", mask_every=3, decay=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.get_buffer(f"{name}24_mask").clone()
    expected = 0.0
    for step in range(7):
        begin_update_(pipeline, step, lambda: model(IDS), ALONE)
        mask = model.get_buffer(f"{name}24_mask")
        if step % 3 == 0:
            assert torch.equal(mask, weight_mask(model.get_parameter(name), "transposable"))
            expected += float((mask != before).float().mean())
        else:
            assert torch.equal(mask, before)
        before = mask.clone()
        begin_micro_batch_(pipeline, seed=0, step=step, micro_batch=0)
        loss_of(model).backward()
        decay_dropped_weights_(pipeline, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    rates = take_flip_rates_(pipeline, 7)
    assert expected > 0
    assert rates[name.removesuffix(".weight")] == pytest.approx(expected / 7, rel=1e-5)
    modules = [rate for key, rate in rates.items() if key.startswith("model.")]
    assert len(modules) == 6
    assert rates["total"] == pytest.approx(sum(modules))
    assert (rates["max"], rates["min"]) == (max(modules), min(modules))
    assert rates["mean"] == pytest.approx(sum(modules) / 6)
    assert set(take_flip_rates_(pipeline, 1).values()) == {0.0}, "taken"


@pytest.mark.parametrize("method", ["transposable", "sr_ste", "ste", "soft_threshold"])
def test_masked_decay_by_method(method: Any) -> None:
    model, pipeline = rewritten(Weight24(scope="mlp", method=method, decay=0.01, weight_gradient="dense"))
    loss_of(model).backward()
    name = "model.layers.1.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    mask = model.get_buffer(f"{name}24_mask")
    assert weight.grad is not None
    old_weight, old_grad = weight.detach().clone(), weight.grad.clone()
    head = model.get_parameter("lm_head.weight")
    old_head, old_head_grad = head.detach().clone(), head.grad.clone()  # type: ignore[union-attr]
    decay_dropped_weights_(pipeline, lr=0.5)
    dropped = old_weight * ~mask
    gradient = old_grad + 0.01 * dropped if method == "transposable" else old_grad
    value = old_weight - 0.5 * 0.01 * dropped if method == "sr_ste" else old_weight
    assert torch.allclose(weight.grad, gradient)
    assert torch.allclose(weight, value)
    assert torch.equal(head, old_head)
    assert torch.equal(head.grad, old_head_grad)  # type: ignore[arg-type]


def test_soft_threshold_scale_is_fixed_at_the_first_sparse_update() -> None:
    model, pipeline = rewritten(Weight24(scope="mlp", method="soft_threshold", from_step=2))
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).pow_(3)
    found = []
    for step in range(4):
        pipeline.lower_(step)
        begin_update_(pipeline, step, lambda: model(IDS), ALONE)
        found.append(float(model.get_buffer(f"{name}24_scale")))
        if step == 2:
            expected = float(weight_scale(model.get_parameter(name)))
            with torch.no_grad():
                model.get_parameter(name).pow_(3)
    assert found[2] == found[3] == pytest.approx(expected)
    assert found[0] != found[2]


def test_gradient_cosines_against_two_models() -> None:
    sparse = Activation24(backward="sparse", token_permutation="none")
    model, pipeline = rewritten(Relu2FFN(), sparse, ActivationStatistics())
    twin, _ = rewritten(Relu2FFN(), replace(sparse, backward="dense"))
    loss_of(model).backward()
    loss_of(twin).backward()
    cosines = gradient_cosines(pipeline, lambda: loss_of(model))
    names = {f"model.layers.{i}.mlp.{linear}.weight" for i in (0, 1) for linear in ("up_proj", "down_proj")}
    assert set(cosines) == names
    for name, cosine in cosines.items():
        a, b = model.get_parameter(name).grad, twin.get_parameter(name).grad
        assert a is not None
        assert b is not None
        assert float(cosine) == pytest.approx(
            float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)), abs=1e-5
        )
        assert 0.5 < float(cosine) < 0.9999
    assert gradient_cosines(rewritten(Relu2FFN(), Activation24())[1], lambda: loss_of(model)) == {}


def test_alarms_name_the_worst() -> None:
    def site(layer: int, dropped: float, feature: float | None = None) -> SiteStatistics:
        return SiteStatistics(layer, "mlp", 0.5, 0.1, 0.1, dropped, feature_dropped_energy=feature)

    assert alarms([site(0, 0.001, 0.002), site(1, 0.0)]) == []
    texts = alarms([site(0, 0.02), site(1, 0.05), site(2, 0.0, 0.3)])
    assert len(texts) == 2
    assert "5.0%" in texts[0]
    assert "layer 1" in texts[0]
    assert "1 others" in texts[0]
    assert "30.0%" in texts[1]
    assert "layer 2" in texts[1]
    assert "others" not in texts[1]


def test_exact_steps_and_sparse_factors_do_not_go_together() -> None:
    _, pipeline = rewritten(
        LowRank(attn_rank=8, mlp_rank=8), Weight24(scope="mlp", method="ste", from_step=5)
    )
    with pytest.raises(Act24Error, match=r"weight_in.*mask flips"):
        refuse_exact_steps(pipeline)
    refuse_exact_steps(rewritten(LowRank(scope="attn", attn_rank=8), Weight24(scope="mlp"))[1])
    refuse_exact_steps(rewritten(Weight24())[1])


def test_statistics_report_what_the_backward_drops_only_where_there_is_one() -> None:
    for backward, known in (("dense", False), ("split_gemm", True)):
        model, pipeline = rewritten(
            Relu2FFN(), Activation24(method="soft_dynamic", backward=backward), ActivationStatistics()
        )
        begin_update_(pipeline, 0, lambda model=model: model(IDS), ALONE)
        model(IDS)
        sites = read_activation_statistics_(model, ALONE)
        assert [s.layer for s in sites] == [0, 1]
        for site, scale in zip(sites, scales(model), strict=True):
            assert site.scale == pytest.approx(scale)
            assert 0 < site.dropped_energy < site.dropped_nonzeros < site.crowded_groups < 1
            values = (site.feature_dropped_energy, site.feature_dropped_nonzeros, site.dense_feature_energy)
            assert all((value is not None) == known for value in values)


def test_calibration_sums_of_nothing_leave_the_scale() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="soft_dynamic"))
    with torch.no_grad():
        for layer in (0, 1):
            model.get_parameter(f"model.layers.{layer}.mlp.up_proj.weight").zero_()
            model.get_buffer(f"model.layers.{layer}.mlp.activation24_scale").fill_(1.25)
    text = begin_update_(pipeline, 0, lambda: model(IDS), ALONE)
    assert scales(model) == [1.25, 1.25]
    assert text is not None
    assert "all zero" in text
    assert calibration_sums(torch.zeros(4, 8), None, "activation", 4, "relu2").tolist() == [0.0] * 6


@pytest.mark.parametrize("method", ["transposable", "soft_threshold", "ste"])
def test_weight_sparsity_is_that_of_the_weights_in_force(method: Any) -> None:
    model, pipeline = rewritten(Weight24(scope="mlp", method=method, until_step=5))
    shares = weight_sparsity(model)
    assert {name: share for name, share in shares.items() if "mlp" in name} == {
        f"layer_{i}/mlp_{linear}_proj": 0.5 for i in (0, 1) for linear in ("gate", "up", "down")
    }
    assert {share for name, share in shares.items() if "attn" in name} == {0.0}
    pipeline.lower_(5)
    assert set(weight_sparsity(model).values()) == {0.0}, "the dense finish"
