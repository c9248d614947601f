"""Forwards whose backward is still to come when the next one begins, and what they draw."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_llama import IDS, rewritten
from slow import slow_after
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from act24.llama import LlamaForCausalLM
from act24.passes import Activation24, Cola, Recompute, Relu2FFN, Weight24

DRAWING: dict[str, tuple[Any, ...]] = {
    "activation24": (Relu2FFN(), Activation24(method="mvue", backward="sparse")),
    "weight24": (Weight24(),),
    "soft weight24": (Weight24(method="soft_threshold"),),
    "recompute": (Relu2FFN(), Cola(attn_rank=8, mlp_rank=8), Activation24(method="mvue"), Recompute()),
}


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def gradients(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", DRAWING)
def test_two_forwards_before_one_backward_draw_as_two_micro_batches_do(name: str) -> None:
    """As in DPO, and where two losses are added up: the sum of the gradients of one after the other."""
    first, second = IDS.chunk(2)

    def by(joint: bool) -> dict[str, Tensor]:
        model, pipeline = rewritten(*DRAWING[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            pipeline.begin_update_(step, IDS)
            if joint:
                with torch.no_grad():
                    model(IDS)  # as a reference
                losses = [loss_of(model, first), loss_of(model, second)]
                (losses[0] + losses[1]).backward()
            else:
                for ids in (first, second):
                    loss_of(model, ids).backward()
            last = gradients(model)
            optimizer.step()
        return last

    expected, found = by(False), by(True)
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-5, msg=key)


def test_a_backward_that_comes_behind_the_next_update_s_beginning_is_its_own() -> None:
    """A loop that prepares the next update early."""
    model, pipeline = rewritten(*DRAWING["activation24"])
    pipeline.begin_update_(0)
    loss_of(model, IDS).backward()
    expected = gradients(model)
    model.zero_grad()
    pipeline.begin_update_(0)
    late = loss_of(model, IDS)
    pipeline.begin_update_(1)
    late.backward()
    for key, value in gradients(model).items():
        assert torch.equal(value, expected[key]), key


def test_seeds_stay_at_their_addresses_where_backward_follows_forward() -> None:
    """A captured forward reads them there."""
    model, pipeline = rewritten(*DRAWING["weight24"])
    places = {n: b.data_ptr() for n, b in model.named_buffers() if n.endswith("24_seed")}
    for step in range(2):
        pipeline.begin_update_(step)
        for _ in range(3):
            loss_of(model, IDS).backward()
    assert {n: b.data_ptr() for n, b in model.named_buffers() if n.endswith("24_seed")} == places


@pytest.mark.parametrize("reentrant", slow_after(1, [False, True]))
@pytest.mark.parametrize("name", DRAWING)
def test_of_two_forwards_each_is_computed_again_with_its_own_seeds(name: str, reentrant: bool) -> None:
    """Blocks that are checkpointed: the gradients of two forwards before one backward are those without."""

    def by(recompute: bool) -> dict[str, Tensor]:
        model, pipeline = rewritten(*DRAWING[name])
        for layer in model.model.layers if recompute else ():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=reentrant)
        pipeline.begin_update_(0)
        losses = []
        for ids in IDS.chunk(2):
            pads = torch.zeros(ids.shape, dtype=torch.bool)
            pads[:, 5 + int(ids[0, 0]) % 5 :] = True
            pipeline.set_pads_(pads)
            losses.append(loss_of(model, ids))
        sum(losses).backward()  # type: ignore[union-attr]
        return gradients(model)

    expected, found = by(False), by(True)
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-5, msg=key)


def test_a_copy_of_a_model_with_overlapping_forwards_is_evaluated() -> None:
    model, pipeline = rewritten(*DRAWING["activation24"])
    pipeline.begin_update_(0)
    losses = [loss_of(model, ids) for ids in IDS.chunk(2)]
    (losses[0] + losses[1]).backward()
    with pipeline.evaluation():
        duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate.eval()(IDS), model.eval()(IDS))
