"""Packed weights in a model: made once an update, of the weights and masks of that update, and of no
other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slow import slow_after
from torch import Tensor

from act24.initialise import build_llama
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.passes import Pipeline, Weight24, apply_
from act24.passes import state as state_module
from act24.sparse24.format.products import Measured

IDS = torch.randint(97, (3, 2, 2, 64), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("capable_machine")


def packed_model(method: str, keep: bool, kernels: bool = True) -> tuple[LlamaForCausalLM, Pipeline]:
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2
    )
    model = build_llama(config, 0).bfloat16()
    pipeline = apply_(model, [Weight24(method=method, kernels=kernels)])
    p = pipeline.active[0]
    assert isinstance(p, Weight24)
    products = sorted({q for _, match in pipeline.matches(p) for q in p.products(match, 128)})
    assert len(products) == 3 * len(p.sparse_products)  # attention, up and gate, down
    table = tuple((product, Measured(0, 0.0, 1.0)) for product in products)
    pipeline.exchange_(p, replace(p, algorithms=table, keep_packed=keep))
    return model, pipeline


def train(model: LlamaForCausalLM, pipeline: Pipeline, updates: int = 3) -> Iterator[list[Tensor]]:
    """The gradients of each update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(updates):
        pipeline.begin_update_(step)
        for ids in IDS[step]:
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        yield [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()


def packed_buffers(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {n: b for n, b in model.named_buffers() if n.endswith(("24_packed", "24_packed_transposed"))}


@pytest.mark.parametrize("method", slow_after(1, ["transposable", "soft_threshold", "sr_ste"]))
def test_once_an_update_is_as_good_as_every_time(method: str) -> None:
    kept, packing = (list(train(*packed_model(method, keep))) for keep in (True, False))
    for ours, theirs in zip(kept, packing, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_each_weight_is_packed_once_an_update_into_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    pack = state_module.packed_operands
    monkeypatch.setattr(state_module, "packed_operands", lambda *a: calls.append(a[0].shape) or pack(*a))
    model, pipeline = packed_model("transposable", keep=True)
    assert all(not buffer.numel() for buffer in packed_buffers(model).values())
    places: list[list[int]] = []
    for _ in train(model, pipeline):
        places.append([buffer.data_ptr() for buffer in packed_buffers(model).values()])
    assert len(calls) == 3 * 14
    assert places[0] == places[1] == places[2]
    assert len(set(places[0])) == 2 * 14
    assert not [name for name in model.state_dict() if "packed" in name]


def test_evaluation_is_of_the_weights_as_they_are() -> None:
    """After an update the packed ones are those that it began with."""
    model, pipeline = packed_model("transposable", keep=True)
    reference, plain = packed_model("transposable", keep=False, kernels=False)
    list(train(model, pipeline, 2))
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    with torch.no_grad():
        with pipeline.evaluation():
            ours = model(IDS[2, 0])
        with plain.evaluation():
            expected = reference(IDS[2, 0])
        stale = model(IDS[2, 0])
    error = float((ours - expected).norm() / expected.norm())
    assert error < 2e-2
    assert float((stale - expected).norm() / expected.norm()) > 5 * error


@pytest.mark.slow
def test_kernels_train_as_plain_pytorch_does() -> None:
    """60 updates on the same rows: losses of both come down together."""
    losses = []
    for kernels in (True, False):
        model, pipeline = packed_model("transposable", keep=kernels, kernels=kernels)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids, run = IDS[0, 0], []
        for step in range(60):
            pipeline.begin_update_(step)
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[0][-1] < 0.8 * losses[0][0]
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)
