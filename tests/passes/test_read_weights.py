"""A model that is read in the middle of training: what an interrupted evaluation leaves, and scales that no
update has set."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewritten_llama import IDS, rewritten, train
from torch import Tensor

from act24.llama import LlamaForCausalLM
from act24.passes import Activation24, Relu2FFN, Weight24
from act24.passes.served import served_weights
from act24.passes.weight24 import SCALE
from act24.sparse24.pattern.soft_threshold import soft_threshold24
from act24.sparse24.weight.methods import weight_scale


def interrupt(model: LlamaForCausalLM) -> None:
    """End a forward in evaluation mode as Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_submodule("model.layers.1").register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model.eval()(IDS)
    handle.remove()
    model.train()


def pickled(model: LlamaForCausalLM) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False).state_dict()


READING: dict[str, Callable[[LlamaForCausalLM], dict[str, Tensor]]] = {
    "state_dict": lambda model: model.state_dict(),
    "of a part": lambda model: {
        f"model.layers.{name}": tensor for name, tensor in model.model.layers.state_dict().items()
    },
    "of a block": lambda model: {
        f"model.layers.0.{name}": tensor for name, tensor in model.model.layers[0].state_dict().items()
    },
    "deepcopy": lambda model: copy.deepcopy(model).state_dict(),
    "pickle": pickled,
}


@pytest.mark.parametrize("way", READING)
def test_what_is_saved_behind_an_interrupted_evaluation_is_the_state_of_training(way: str) -> None:
    model, pipeline = rewritten(Weight24(method="transposable", mask_every=3))
    train(model, pipeline, range(2))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    interrupt(model)
    found = READING[way](model)
    assert any(name.endswith("24_mask") for name in found)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_lowering_behind_an_interrupted_evaluation_stays() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(method="mvue"), Weight24(scope="attn", until_step=2))
    train(model, pipeline, range(1))
    interrupt(model)
    pipeline.lower_(2)
    with torch.no_grad():
        model(IDS)
    assert pipeline.active == pipeline.passes[1:2]


def test_a_scale_that_no_update_has_set_is_that_of_the_weights_at_hand() -> None:
    """At `from_step`, behind `lower_`: in evaluation mode, in the context, in what is saved; and afterwards
    the buffer is as before."""
    model, pipeline = rewritten(Weight24(method="soft_threshold", scope="mlp", from_step=2))
    train(model, pipeline, range(2))
    pipeline.lower_(2)
    name = "model.layers.0.mlp.up_proj.weight"
    stale, weight = model.get_buffer(name + SCALE).clone(), model.get_parameter(name).detach()
    fresh = weight_scale(weight)
    assert fresh != stale
    with torch.no_grad():
        found = model.eval()(IDS)
        with pipeline.evaluation():
            assert model.get_buffer(name + SCALE) == fresh
            assert torch.equal(model(IDS), found)
        with pipeline.evaluation(step=2):
            assert torch.equal(model(IDS), found)
    assert model.get_buffer(name + SCALE) == stale
    assert torch.equal(served_weights(pipeline)[name], soft_threshold24(weight) * fresh)
    duplicate, its = copy.deepcopy((model, pipeline))
    assert torch.equal(duplicate(IDS), found)
    assert torch.equal(served_weights(its)[name], soft_threshold24(weight) * fresh)
    model.train()
    train(model, pipeline, range(2, 4))
    assert model.get_buffer(name + SCALE) == fresh
    with pipeline.evaluation(), torch.no_grad():
        assert model.get_buffer(name + SCALE) == fresh, "fixed from then on"
        expected = model(IDS)
    pipeline.lower_(3)
    assert torch.equal(model.eval()(IDS), expected)


def test_a_scale_that_was_loaded_is_read_as_it_is() -> None:
    model, pipeline = rewritten(Weight24(method="soft_threshold"))
    train(model, pipeline, range(3))
    other, its = rewritten(Weight24(method="soft_threshold"))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(IDS)
        assert torch.equal(other.eval()(IDS), expected)
        its.lower_(3)
        assert torch.equal(other(IDS), expected)
        with its.evaluation(step=3):
            assert torch.equal(other(IDS), expected)
