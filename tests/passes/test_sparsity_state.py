"""What a training loop does for 2:4 between forwards: seeds, padding, masks, decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewritten_llama import ALONE, IDS, loss_of, rewritten, scales
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from act24.errors import Act24Error
from act24.llama import LlamaForCausalLM
from act24.passes import Activation24, ActivationStatistics, LowRank, Relu2FFN, Weight24
from act24.passes.state import (
    begin_micro_batch_,
    begin_update_,
    decay_dropped_weights_,
    refuse_exact_steps,
)
from act24.sparse24.weight.methods import METHODS, weight_mask
from act24.tools.watch.sparsity_watch import take_flip_rates_
from act24.tools.watch.statistics import SiteStatistics, read_activation_statistics_


def test_padding_reaches_statistics_and_calibration() -> None:
    def counts(ids: Tensor, pads: Tensor | None) -> tuple[list[SiteStatistics], list[float]]:
        model, pipeline = rewritten(
            Relu2FFN(), Activation24(method="soft_dynamic", backward="sparse"), ActivationStatistics()
        )
        begin_update_(pipeline, 0, lambda: model(ids), pads)
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
    from act24.rotary import rotary_embedding

    cos, sin = rotary_embedding(12, 8, 1e4, hidden.device)

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        x = hidden
        for layer in model.model.layers:
            x = run(layer, x, cos, sin)
        return list(torch.autograd.grad(x.square().sum(), list(model.model.layers.parameters())))

    plain = gradients(lambda layer, *args: layer(*args))
    recomputed = gradients(lambda layer, *args: checkpoint(layer, *args, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_masks_are_kept_for_mask_every_updates_and_flips_are_measured() -> None:
    model, pipeline = rewritten(Weight24(scope="mlp", mask_every=3, decay=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.get_buffer(f"{name}24_mask").clone()
    expected = 0.0
    for step in range(7):
        begin_update_(pipeline, step, lambda: model(IDS))
        mask = model.get_buffer(f"{name}24_mask")
        if step % 3 == 0:
            assert torch.equal(mask, weight_mask(model.get_parameter(name), "transposable"))
            expected += float((mask != before).float().mean())
        else:
            assert torch.equal(mask, before)
        before = mask.clone()
        begin_micro_batch_(pipeline, seed=0, step=step, micro_batch=0)
        loss_of(model).backward()
        decay_dropped_weights_(pipeline, clipped=True)
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clipped", [False, True])
def test_masked_decay_by_method(method: Any, clipped: bool) -> None:
    """SR-STE's is a part of the gradient that is clipped, that of arXiv 2404.01847 comes after clipping."""
    decay = {"transposable": 0.01, "sr_ste": 0.01}.get(method)
    model, pipeline = rewritten(Weight24(scope="mlp", method=method, decay=decay, weight_gradient="dense"))
    loss_of(model).backward()
    name = "model.layers.1.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    mask = model.get_buffer(f"{name}24_mask")
    assert weight.grad is not None
    before = {
        n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None
    }
    decay_dropped_weights_(pipeline, clipped=clipped)
    old_weight, old_grad = before[name]
    decays = method == ("transposable" if clipped else "sr_ste")
    assert torch.allclose(weight.grad, old_grad + 0.01 * old_weight * ~mask if decays else old_grad)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0]), "decay is of gradients"
        if ".mlp." not in n:
            assert torch.equal(p.grad, before[n][1])  # type: ignore[arg-type]


def test_exact_steps_and_sparse_factors_do_not_go_together() -> None:
    _, pipeline = rewritten(
        LowRank(attn_rank=8, mlp_rank=8), Weight24(scope="mlp", method="ste", from_step=5)
    )
    with pytest.raises(Act24Error, match=r"weight_in.*mask flips"):
        refuse_exact_steps(pipeline)
    refuse_exact_steps(rewritten(LowRank(scope="attn", attn_rank=8), Weight24(scope="mlp"))[1])
    refuse_exact_steps(rewritten(Weight24())[1])
