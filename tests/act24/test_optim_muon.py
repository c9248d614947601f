"""Muon and AdamW in one optimizer: the same steps as PyTorch's two apart."""

import copy

import pytest
import torch
from torch import nn

from act24.errors import Act24Error
from act24.initialise import build_llama
from act24.llama import llama_config
from act24.optim import OPTIMIZERS, MuonOptions, Surroundings
from act24.tools.checkpoints import optimizer_state

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def model(**overrides):
    return build_llama(llama_config("llama-9m", **{**SIZES, "num_attention_heads": 4, **overrides}), 0)


def step(model, optimizer, seed):
    ids = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(seed))
    logits = model(ids)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    model.zero_grad()


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_steps_as_pytorchs_two_do(adjust, nesterov):
    ours, theirs = model(), model()
    options = MuonOptions(lr=0.01, weight_decay=0.2, adjust_lr=adjust, nesterov=nesterov, ns_steps=4)
    optimizer = options.build(ours, Surroundings())
    named = dict(theirs.named_parameters())
    hidden = [p for name, p in named.items() if "layers" in name and p.ndim == 2]
    assert len(hidden) == 14  # seven linears a block
    norms = [p for name, p in named.items() if p.ndim == 1 or "embed" in name]
    adamw = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    reference = [
        torch.optim.Muon(
            hidden,
            lr=0.01,
            weight_decay=0.2,
            momentum=0.95,
            nesterov=nesterov,
            ns_steps=4,
            adjust_lr_fn=adjust,
        ),
        torch.optim.AdamW([theirs.lm_head.weight], weight_decay=0.2, **adamw),
        torch.optim.AdamW(norms, weight_decay=0.0, **adamw),
    ]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in ours.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            named[name].grad = parameter.grad.clone()
        for each in (optimizer, *reference):
            each.step()
    for name, parameter in ours.named_parameters():
        same = {"rtol": 0, "atol": 0} if any(parameter.shape == p.shape for p in hidden) else {}
        torch.testing.assert_close(parameter, named[name], **same, msg=name)


def test_a_tied_head_is_an_embedding():
    optimizer = MuonOptions(lr=0.01).build(model(tie_word_embeddings=True), Surroundings())
    assert {group["name"]: len(group["params"]) for group in optimizer.param_groups} == {
        "muon": 14,
        "no_decay": 6,
    }


def test_it_goes_on_from_its_state():
    """As checkpoints keep it: what is in `state` and `param_groups`."""
    whole = model()
    optimizer = MuonOptions(lr=0.01).build(whole, Surroundings())
    step(whole, optimizer, 0)
    again = copy.deepcopy(whole)
    names, others = dict(whole.named_parameters()), dict(again.named_parameters())
    tensors, table = optimizer_state.capture(names, optimizer)
    assert any(name.endswith("momentum_buffer") for name in tensors)
    resumed = MuonOptions(lr=0.5).build(again, Surroundings())
    optimizer_state.assign_(
        others, resumed, {name: tensor.clone() for name, tensor in tensors.items()}, table
    )
    for seed in (1, 2):
        step(whole, optimizer, seed)
        step(again, resumed, seed)
    for name, parameter in names.items():
        assert torch.equal(parameter, others[name]), name


def test_a_model_without_hidden_matrices_is_refused():
    with pytest.raises(Act24Error, match="no matrix beside embeddings and head"):
        MuonOptions(lr=0.01).build(nn.Embedding(4, 4), Surroundings())


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"momentum": 1.0}, {"ns_steps": 0}, {"adjust_lr": "rms"}])
def test_what_it_does_not_take_is_named(wrong):
    with pytest.raises(Act24Error, match=next(iter(wrong))):
        OPTIMIZERS["muon"](**{"lr": 0.01, **wrong})
