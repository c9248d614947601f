"""`sparse_mask`: the function stays, the masks lie beside the weights, and a loop keeps the zeros."""

import pytest
import torch
import transformers
from slow import slow_but

from act24 import LlamaForCausalLM, apply_, llama_config
from act24.errors import PassError
from act24.initialise import initialise_
from act24.passes import LowRank, SparseMask
from act24.passes.recovery import (
    check_optimizer,
    check_zeros,
    clear_pruned_gradients_,
    found_pattern,
    impose_zeros_,
    keep_zeros_,
    kept_masks,
    pruned_weights,
    set_masks_,
)
from act24.pruning.pattern import mask_by_row, parse_pattern
from act24.pruning.stored import unpacked_bits

IDS = torch.arange(24).reshape(2, 12)


def dense_llama():
    model = LlamaForCausalLM(
        llama_config("llama-9m", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    )
    initialise_(model, 0)
    return model


def test_a_model_that_is_one_region_has_names_that_its_state_dict_has():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    masks, _, _ = kept_masks(apply_(model, [SparseMask()]))
    assert masks.keys() == {"0.weight", "2.weight"} <= model.state_dict().keys()


def pruned_llama(pattern="2:4"):
    """A model with the larger magnitudes kept, and its masks."""
    model = dense_llama()
    masks = {}
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            masks[name] = mask_by_row(parameter.detach().abs(), parse_pattern(pattern))
            parameter.data[~masks[name]] = 0
    return model, masks


def loss_of(model):
    return torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_the_function_stays_and_the_masks_are_those_of_the_zeros():
    model, masks = pruned_llama()
    before = model(IDS)
    pipeline = apply_(model, [SparseMask(masks="zeros")])
    assert torch.equal(model(IDS), before)
    state = model.state_dict()
    for name, mask in masks.items():
        assert torch.equal(unpacked_bits(state[f"{name}_mask_bits"], mask.shape[1]), mask)
    assert {weight.name for weight in pruned_weights(pipeline)} == masks.keys()
    found, patterns, transposed = kept_masks(pipeline)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert {str(pattern) for pattern in patterns.values()} == {"2:4"}
    assert not transposed


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("dtype", slow_but((torch.bfloat16,), [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_under_any_optimizer(kind, dtype):
    model, masks = pruned_llama()
    model.to(dtype)
    pipeline = apply_(model, [SparseMask()])
    set_masks_(pipeline, masks)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    before, first = {n: p.clone() for n, p in model.named_parameters()}, loss_of(model).item()
    broke = False
    for _ in range(5):
        loss_of(model).backward()
        clear_pruned_gradients_(pipeline)
        for name, mask in masks.items():
            assert (model.get_parameter(name).grad[~mask] == 0).all()
        optimizer.step()
        broke |= any((model.get_parameter(n)[~m] != 0).any() for n, m in masks.items())
        impose_zeros_(pipeline)
        optimizer.zero_grad()
        check_zeros(pipeline)
    assert broke is (kind == "muon")  # it mixes entries, which masked gradients alone do not mend
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert not torch.signbit(weight[weight == 0]).any()
        if dtype is torch.float32:  # bfloat16 rounds Adafactor's steps away
            assert (weight[mask] != before[name][mask]).float().mean() > 0.5
    if dtype is torch.float32:
        assert loss_of(model).item() < first


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_in_a_loop_that_knows_nothing_of_them(kind):
    model, masks = pruned_llama()
    pipeline = apply_(model, [SparseMask()])
    set_masks_(pipeline, masks)
    end = keep_zeros_(pipeline)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    for _ in range(3):
        for _ in range(2):  # accumulated
            loss_of(model).backward()
        for name, mask in masks.items():
            assert (model.get_parameter(name).grad[~mask] == 0).all()
        optimizer.step()
        optimizer.zero_grad()
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            assert (weight[~mask] == 0).all()
            assert not torch.signbit(weight[weight == 0]).any()
    end()
    loss_of(model).backward()
    optimizer.step()
    assert any((model.get_parameter(n)[~m] != 0).any() for n, m in masks.items())


@pytest.mark.parametrize("eps", [1e-8, 1e-7])
def test_float16_adamw_whose_eps_is_lost_is_refused(eps):
    """T8: AdamW of PyTorch makes NaN of what is pruned, from 0 / (0 + 0)."""
    model, masks = pruned_llama()
    pipeline = apply_(model.half(), [SparseMask()])
    set_masks_(pipeline, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=eps)
    loss_of(model).backward()
    clear_pruned_gradients_(pipeline)
    if eps == 1e-7:
        check_optimizer(pipeline, optimizer)
        optimizer.step()
        impose_zeros_(pipeline)
        check_zeros(pipeline)
        return
    with pytest.raises(
        PassError, match=r"q_proj\.weight is float16, in which the optimizer.s eps = 1e-08 is 0"
    ):
        check_optimizer(pipeline, optimizer)
    optimizer.step()
    assert all(model.get_parameter(name)[~mask].isnan().all() for name, mask in masks.items())


def test_a_mask_that_changed_is_found_at_the_next_save():
    model, masks = pruned_llama()
    pipeline = apply_(model, [SparseMask()])
    set_masks_(pipeline, masks)
    check_zeros(pipeline)
    bits = dict(model.named_buffers())["model.layers.0.mlp.up_proj.weight_mask_bits"]
    bits[0, 0] = 255
    with pytest.raises(PassError, match=r"layers.0.mlp.up_proj.weight: its mask was 2:4 and is 0\.49"):
        check_zeros(pipeline)
    set_masks_(pipeline, masks)
    check_zeros(pipeline)


def test_momentum_from_before_the_mask_does_not_bring_weights_back():
    """Measured for the reference: without the zeros written again none stays."""
    model, masks = pruned_llama()
    pipeline = apply_(model, [SparseMask()])
    set_masks_(pipeline, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model).backward()
    optimizer.step()  # dense: nothing was cleared
    impose_zeros_(pipeline)
    optimizer.zero_grad()
    loss_of(model).backward()
    clear_pruned_gradients_(pipeline)
    optimizer.step()
    with pytest.raises(PassError, match="pruned are not zero"):
        check_zeros(pipeline)
    impose_zeros_(pipeline)
    check_zeros(pipeline)


def test_transposed_weights():
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    masks = {}
    for name, parameter in model.named_parameters():
        if ".h." in name and parameter.ndim == 2:
            masks[name] = mask_by_row(parameter.detach().abs().T, parse_pattern("2:4")).T
            parameter.data[~masks[name]] = 0
    pipeline = apply_(model, [SparseMask()])
    set_masks_(pipeline, masks)
    found, patterns, transposed = kept_masks(pipeline)
    assert found.keys() == masks.keys() == transposed
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert {str(pattern) for pattern in patterns.values()} == {"2:4"}


def test_masks_that_do_not_fit_are_refused_by_name():
    def refused(match, change):
        model, masks = pruned_llama()
        pipeline = apply_(model, [SparseMask()])
        with pytest.raises(PassError, match=match):
            set_masks_(pipeline, change(masks))

    name = "model.layers.0.self_attn.q_proj.weight"
    refused("no masks lie beside", lambda masks: None)
    refused(f"{name}: its mask is", lambda masks: masks | {name: masks[name][:4]})
    refused(f"{name} is not zero where", lambda masks: masks | {name: ~masks[name]})


def test_two_passes_that_change_a_place_are_refused():
    model, _ = pruned_llama()
    with pytest.raises(PassError, match="both rewrite"):
        apply_(model, [LowRank(attn_rank=4, mlp_rank=4), SparseMask()])


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "0.5", "0.25"])
def test_the_pattern_of_a_mask_is_found(text):
    scores = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    assert str(found_pattern(mask_by_row(scores, parse_pattern(text)))) == text
