"""What a training loop does for 2:4 between forwards: seeds, padding, masks, decay."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_llama import ALONE, IDS, llama, loss_of, rewritten, scales
from slow import slow_after, slow_but
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from act24.errors import Act24Error
from act24.llama import LlamaForCausalLM
from act24.passes import Activation24, ActivationStatistics, LowRank, Relu2FFN, Weight24, apply_
from act24.passes.state import refuse_exact_steps
from act24.sparse24.weight.methods import METHODS, weight_mask
from act24.tools.watch.sparsity_watch import take_flip_rates_
from act24.tools.watch.statistics import SiteStatistics, read_activation_statistics_


def test_padding_reaches_statistics_and_calibration() -> None:
    def counts(ids: Tensor, pads: Tensor | None) -> tuple[list[SiteStatistics], list[float]]:
        model, pipeline = rewritten(
            Relu2FFN(), Activation24(method="soft_dynamic", backward="sparse"), ActivationStatistics()
        )
        pipeline.set_pads_(pads)
        pipeline.begin_update_(0, ids)
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
    pipeline.set_pads_(pads)
    assert all(b is pads for n, b in model.named_buffers() if n.endswith("pad_rows"))
    pipeline.set_pads_(None)
    assert all(b.ndim == 0 and not b for n, b in model.named_buffers() if n.endswith("pad_rows"))
    assert "pad_rows" not in "".join(model.state_dict())


def seeds(model: LlamaForCausalLM) -> list[int]:
    return [int(b) for n, b in model.named_buffers() if n.endswith("24_seed")]


def test_seeds_differ_where_they_should_and_repeat_where_they_must() -> None:
    """By micro-batch, update, process and run; and by the site."""

    def drawn(seed: int, step: int, rank: int) -> list[list[int]]:
        model = llama()
        pipeline = apply_(model, [Relu2FFN(), Activation24(method="mvue"), Weight24(scope="attn")], seed=seed)
        pipeline.begin_update_(step, rank=rank)
        found = []
        for _ in range(3):
            model(IDS)
            found.append(seeds(model))
        return found

    keys = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    found = {key: drawn(*key) for key in keys}
    everything = [value for micro_batches in found.values() for values in micro_batches for value in values]
    assert len(everything) == 4 * 3 * 2 * (1 + 4)
    assert len(set(everything)) == len(everything)
    assert drawn(0, 0, 0) == found[0, 0, 0]


def test_only_training_forwards_are_micro_batches() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="mvue"))
    pipeline.begin_update_(0)
    began = seeds(model)
    with torch.no_grad():
        model(IDS)
    with pipeline.evaluation():
        model(IDS)
    model.eval()(IDS)
    assert seeds(model) == began
    model.train()(IDS)
    assert seeds(model) != began


@pytest.mark.parametrize(
    ("whole", "reentrant"), slow_after(2, [(False, False), (False, True), (True, False)])
)
def test_recomputation_draws_the_same(whole: bool, reentrant: bool) -> None:
    """Activation checkpointing of the blocks, or of the whole model, runs forwards twice; the gradients of
    two micro-batches are those of forwards that ran once."""

    def gradients(recompute: bool) -> list[Tensor]:
        model, pipeline = rewritten(
            Relu2FFN(), Activation24(method="mvue", backward="sparse"), Weight24(scope="attn")
        )
        run: Callable[..., Tensor] = model
        if recompute and whole:
            run = functools.partial(checkpoint, model, use_reentrant=reentrant)
        elif recompute:
            for layer in model.model.layers:
                plain = layer.forward
                layer.forward = functools.partial(checkpoint, plain, use_reentrant=reentrant)
        pipeline.begin_update_(0)
        for ids in IDS.chunk(2):
            F.cross_entropy(run(ids).flatten(0, 1), ids.flatten()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


NEEDING = {
    "mvue": Activation24(method="mvue"),
    "soft_dynamic": Activation24(method="soft_dynamic"),
    "soft_threshold_weights": Activation24(method="soft_threshold_weights"),
    "transposable": Weight24(),
    "ste": Weight24(method="ste"),
}


@pytest.mark.parametrize("name", NEEDING)
def test_a_training_forward_of_an_update_that_nobody_began_raises(name: str) -> None:
    model, pipeline = rewritten(Relu2FFN(), NEEDING[name])
    optimizers = [torch.optim.SGD(list(model.parameters())[i::2], lr=0.1) for i in (0, 1)]
    for step in range(2):
        with pytest.raises(
            Act24Error, match=rf"{NEEDING[name].name} .*pipeline\.begin_update_\(step, batch=…\)"
        ):
            model(IDS)
        with torch.no_grad():
            model(IDS)
        model.eval()(IDS)
        model.train()
        pipeline.begin_update_(step, IDS)
        for _ in range(2):
            loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
    foreign = nn.Linear(4, 4)
    pipeline.begin_update_(2, IDS)
    loss_of(model)
    foreign(torch.ones(4)).sum().backward()
    torch.optim.SGD(foreign.parameters()).step()
    loss_of(model)


def test_a_scale_that_is_due_wants_rows() -> None:
    _, pipeline = rewritten(Relu2FFN(), Activation24(method="soft_dynamic", from_step=3, dynamic_steps=2))
    for step in (0, 3, 4, 5):
        if step in (3, 5):
            with pytest.raises(Act24Error, match=rf"step {step}.*begin_update_\(step, batch=…\)"):
                pipeline.begin_update_(step)
        else:
            pipeline.begin_update_(step)


def test_what_needs_no_renewal_is_trained_without_a_call() -> None:
    model, _ = rewritten(Relu2FFN(), Activation24(), ActivationStatistics())
    loss_of(model).backward()


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_kept_for_mask_every_updates_and_flips_have_one_unit(method: Any) -> None:
    """The share of a mask's entries that changed, by optimizer update, whatever the updates between masks."""
    kept = 3 if METHODS[method].mask_every else None
    decay = 0.0 if METHODS[method].decay else None
    model, pipeline = rewritten(Weight24(method=method, scope="mlp", mask_every=kept, decay=decay))
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.get_buffer(f"{name}24_mask").clone()
    expected = 0.0
    for step in range(7):
        pipeline.begin_update_(step, IDS)
        mask = model.get_buffer(f"{name}24_mask")
        if step % (kept or 1) == 0:
            assert torch.equal(mask, weight_mask(model.get_parameter(name), method))
            expected += float((mask != before).float().mean())
        else:
            assert torch.equal(mask, before)
        before = mask.clone()
        loss_of(model).backward()
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


@pytest.mark.parametrize(
    ("method", "loop_decays"),
    slow_but(
        [(method, method in ("ste", "transposable")) for method in METHODS],
        itertools.product(METHODS, [False, True]),
    ),
)
def test_masked_decay_enters_where_it_is_published_once_an_update(method: Any, loop_decays: bool) -> None:
    """SR-STE's is a part of the gradient and clipped with it, that of arXiv 2404.01847 is not. Only gradients
    of the optimizer that steps have it."""
    decay = {"transposable": 0.5, "sr_ste": 0.5}.get(method)
    options: Any = {"scope": "mlp", "method": method, "weight_gradient": "dense"}
    plain, pipeline = rewritten(Weight24(**options, decay=0.0 if decay else None))
    pipeline.begin_update_(0)
    loss_of(plain).backward()
    model, pipeline = rewritten(Weight24(**options, decay=decay))
    other = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    rest = [p for p in model.parameters() if p is not other]
    optimizers = [torch.optim.SGD(rest, lr=1.0), torch.optim.SGD([other], lr=1.0)]
    pipeline.begin_update_(0, loop_decays=loop_decays)
    for _ in range(2):
        (loss_of(model) / 2).backward()
    if loop_decays:
        pipeline.decay_gradients_()

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
    decays = {
        n: decay * before[n] * ~model.get_buffer(f"{n}24_mask") if decay and ".mlp." in n else torch.zeros(())
        for n in gradients
    }
    clipped = {n: g + decays[n] if method == "sr_ste" else g for n, g in gradients.items()}
    norm = torch.stack([g.norm() for g in clipped.values()]).norm()
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)) == pytest.approx(float(norm), rel=1e-5)
    assert norm > 0.2
    for optimizer in optimizers:
        optimizer.step()
    for n, p in model.named_parameters():
        update = clipped[n] * 0.1 / norm
        if method == "transposable":
            update = update + decays[n]
        torch.testing.assert_close(p, before[n] - update, rtol=1e-5, atol=1e-6, msg=n)


@pytest.mark.parametrize(
    ("keyword", "method"),
    slow_but(
        [(False, "transposable"), (True, "sr_ste")],
        itertools.product([False, True], ["transposable", "sr_ste"]),
    ),
)
def test_decay_enters_gradients_that_a_closure_of_the_step_makes(method: Any, keyword: bool) -> None:
    """Lightning's loop hands zero_grad, forward and backward to the step as a closure."""

    def stepped(by_closure: bool) -> dict[str, Tensor]:
        model, pipeline = rewritten(Weight24(scope="mlp", method=method, weight_gradient="dense", decay=0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        for step in range(2):
            pipeline.begin_update_(step)
            if by_closure:
                loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
                assert isinstance(loss, Tensor)
            else:
                closure()
                optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters()}

    expected = stepped(False)
    for name, found in stepped(True).items():
        assert torch.equal(found, expected[name]), name


def test_an_evaluation_that_was_interrupted_leaves_no_masks_behind() -> None:
    """PyTorch calls no hook behind a forward that Ctrl-C ends."""

    def trained(interrupted: bool) -> dict[str, Tensor]:
        model, pipeline = rewritten(Weight24(scope="mlp", method="transposable", mask_every=2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            if interrupted and step == 2:

                def stop(*_: Any) -> None:
                    raise KeyboardInterrupt

                handle = model.get_submodule("model.layers.1").register_forward_pre_hook(stop)
                with pytest.raises(KeyboardInterrupt):
                    loss_of(model.eval())
                handle.remove()
                model.train()
            pipeline.begin_update_(step)
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {**dict(model.named_buffers()), **{n: p.detach() for n, p in model.named_parameters()}}

    expected = trained(False)
    for name, found in trained(True).items():
        assert torch.equal(found, expected[name]), name


def test_a_gradient_that_autograd_did_not_add_up_has_its_decay_at_the_optimizers_step() -> None:
    model, pipeline = rewritten(Weight24(scope="mlp", method="sr_ste", decay=0.5))
    name = "model.layers.0.mlp.up_proj.weight"
    weight, mask = model.get_parameter(name), model.get_buffer(f"{name}24_mask")
    pipeline.begin_update_(0)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()
    torch.testing.assert_close(weight, before - 1 - 0.5 * before * ~mask)


def test_decay_is_refused_in_gradients_that_a_scaler_scales() -> None:
    model, pipeline = rewritten(Weight24(method="sr_ste"))
    with torch.autocast("cpu", torch.float16):
        pipeline.begin_update_(0)
        with pytest.raises(Act24Error, match=r"sr_ste.*float16.*decay_gradients_\(\)"):
            model(IDS)
        pipeline.begin_update_(0, loop_decays=True)
        model(IDS)


def test_weights_that_were_written_without_a_trace_are_evaluated_with_masks_of_their_own() -> None:
    """As averages of weights are, for an evaluation."""
    model, pipeline = rewritten(Weight24(scope="mlp"))
    model.eval()
    with torch.no_grad():
        first = model(IDS)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
        second = model(IDS)
        with pipeline.evaluation():
            expected = model(IDS)
    assert torch.equal(second, expected)
    assert not torch.equal(first, second)


def test_each_forward_in_evaluation_mode_has_the_masks_of_its_weights() -> None:
    """Also the second one, and the third: none of them leaves anything behind."""
    model, pipeline = rewritten(Weight24(scope="mlp", method="ste"))
    model.eval()
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        found = model(IDS)
        assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
        with pipeline.evaluation():
            assert torch.equal(found, model(IDS))


def test_exact_steps_and_sparse_factors_do_not_go_together() -> None:
    _, pipeline = rewritten(
        LowRank(attn_rank=8, mlp_rank=8), Weight24(scope="mlp", method="ste", from_step=5)
    )
    with pytest.raises(Act24Error, match=r"weight_in.*mask flips"):
        refuse_exact_steps(pipeline)
    refuse_exact_steps(rewritten(LowRank(scope="attn", attn_rank=8), Weight24(scope="mlp"))[1])
    refuse_exact_steps(rewritten(Weight24())[1])
