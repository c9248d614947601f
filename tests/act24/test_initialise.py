"""Initial values: right in distribution, and each parameter's its own affair."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from act24.initialise import build_llama, generator_for, initialise_
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.options import OptionError

CONFIG = LlamaConfig(
    vocab_size=211,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    initializer_range=0.05,
    attention_bias=True,
)


@pytest.mark.parametrize("seed", ["1", 1.0, True])
def test_a_seed_is_an_integer(seed) -> None:
    """Its text is hashed: 1.0 had another start than 1, without a word."""
    with pytest.raises(OptionError, match="seed has to be an integer"):
        generator_for(seed, "weight")


def test_matrices_are_normal_norms_one_and_biases_zero() -> None:
    for name, parameter in build_llama(CONFIG, seed=1).named_parameters():
        if parameter.ndim == 2:
            # Four standard errors of a mean, and of a standard deviation, over this many values.
            spread = 4 / parameter.numel() ** 0.5
            assert abs(parameter.mean()) < 0.05 * spread, name
            assert abs(parameter.std() / 0.05 - 1) < spread, name
        else:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name


def test_a_parameter_depends_on_seed_and_name_only() -> None:
    one = build_llama(CONFIG, seed=7).state_dict()
    assert all(torch.equal(one[name], value) for name, value in build_llama(CONFIG, 7).state_dict().items())
    other = build_llama(CONFIG, seed=8).state_dict()
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].ndim == 2)
    name = "model.layers.1.mlp.down_proj.weight"
    expected = torch.empty(64, 96).normal_(0.0, 0.05, generator=generator_for(7, name))
    assert torch.equal(one[name], expected)


@pytest.mark.parametrize(
    "change",
    [{"intermediate_size": 128}, {"num_hidden_layers": 5}, {"vocab_size": 99}, {"tie_word_embeddings": True}],
    ids=str,
)
def test_reshaping_one_parameter_moves_no_other(change: dict) -> None:
    before = build_llama(CONFIG, seed=0).state_dict()
    after = build_llama(dataclasses.replace(CONFIG, **change), seed=0).state_dict()
    assert before.keys() != after.keys() or any(before[k].shape != after[k].shape for k in before)
    for name in before.keys() & after.keys():
        if before[name].shape == after[name].shape:
            assert torch.equal(before[name], after[name]), name


def test_all_matrices_differ() -> None:
    matrices = [p for p in build_llama(CONFIG, seed=0).parameters() if p.ndim == 2]
    corners = {tuple(matrix.flatten()[:4].tolist()) for matrix in matrices}
    assert len(corners) == len(matrices)


def test_dtype_rounds_the_same_draw() -> None:
    exact, rounded = build_llama(CONFIG, 0), build_llama(CONFIG, 0, dtype=torch.bfloat16)
    for name, parameter in rounded.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16())


def test_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build_llama(CONFIG, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(build_llama(CONFIG, seed=2).head_weight, first.head_weight)


def test_in_place_equals_built() -> None:
    model = LlamaForCausalLM(CONFIG)
    initialise_(model, seed=4)
    for name, value in build_llama(CONFIG, seed=4).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
