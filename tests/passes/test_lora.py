"""`lora` and `masked_lora`: against the formulas and against PEFT."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from act24 import apply_, plan
from act24.errors import PassError
from act24.passes import Cola, FrozenWarning, Lora, LowRank, MaskedLora, Recompute, Relu2FFN
from act24.passes.recovery import set_masks_
from tests.passes.test_sparse_mask import IDS, dense_llama, loss_of, pruned_llama

NAME = "model.layers.0.self_attn.q_proj.weight"


def drawn_factors_(model):
    """B is zero at first: give it values."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.1, generator=generator)


def by_hand(masked):
    """The logits of a plain model whose weights have the adapters in them, in float64 products."""
    model, masks = pruned_llama()
    rewritten, _ = pruned_llama()
    pipeline = apply_(rewritten, [MaskedLora() if masked else Lora(targets=("*",), dropout=0.0)])
    if masked:
        set_masks_(pipeline, masks)
    drawn_factors_(rewritten)
    state = rewritten.state_dict()
    with torch.no_grad():
        for name, mask in masks.items():
            path = name.removesuffix("weight")
            change = 2.0 * state[f"{path}lora_B"].double() @ state[f"{path}lora_A"].double()
            model.get_parameter(name).add_((change * mask if masked else change).float())
    return rewritten, model


@pytest.mark.parametrize("masked", [False, True])
def test_the_function_is_the_formula(masked):
    rewritten, plain = by_hand(masked)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(IDS), plain(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [Lora(), MaskedLora()], ids=lambda p: p.name)
def test_at_first_nothing_changes_and_only_adapters_learn(p):
    model, masks = pruned_llama()
    before = model(IDS)
    pipeline = apply_(model, [p])
    if p.name == "masked_lora":
        set_masks_(pipeline, masks)
    assert torch.equal(model(IDS), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    sites = 14 if p.name == "masked_lora" else 4
    assert len(trained) == 2 * sites
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    loss_of(model).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_only_what_it_makes_trains_and_what_is_optional_freezes_nothing():
    model = dense_llama()
    with pytest.warns(FrozenWarning):
        report = apply_(model, [LowRank(scope="mlp", mlp_rank=8), Lora(dropout=0.0)]).report
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B"}
    assert {row.note for row in report.rows if row.pass_name == "lora"} == {"all else in the model is frozen"}
    model = dense_llama()
    apply_(model, [Lora(targets=("*.none",), optional=True)])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_fresh_weights_that_adapters_freeze_are_named():
    """In either order, in the report and as a warning; not where they are the weights' own best factors, nor
    on meta, where values come later."""
    fresh = [Cola(scope="attn", attn_rank=8), Relu2FFN()]
    with pytest.warns(FrozenWarning) as caught:
        report = apply_(dense_llama(), [MaskedLora(targets=("lm_head",)), *fresh]).report
    (line,) = {str(one.message) for one in caught if one.category is FrozenWarning}
    assert line in str(report).splitlines()
    assert "masked_lora freezes all but its adapters" in line
    assert "cola, relu2_ffn makes fresh never trains: load trained weights" in line
    with torch.device("meta"):
        apply_(dense_llama(), [fresh[1], Lora()])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrozenWarning)
        kept = [LowRank(scope="attn", attn_rank=8, init="svd"), Relu2FFN(width="keep")]
        nowhere = Lora(targets=("*.x",), optional=True)
        for passes in ([*kept, Lora(targets=("lm_head",))], [*fresh, nowhere]):
            assert "never trains" not in str(apply_(dense_llama(), passes))


def test_gradients_of_a_masked_adapter_see_kept_weights_only():
    """dB = s (M ∘ G) Aᵀ with G the gradient of the whole weight, by autograd of the plain formula."""
    model, masks = pruned_llama()
    pipeline = apply_(model, [MaskedLora()])
    set_masks_(pipeline, masks)
    drawn_factors_(model)
    model.get_parameter(NAME).requires_grad_(True)
    loss_of(model).backward()
    path = NAME.removesuffix("weight")
    a, b = model.get_parameter(f"{path}lora_A"), model.get_parameter(f"{path}lora_B")
    # G: of the weight itself, which the graph reads through W + s M ∘ (B A).
    whole = model.get_parameter(NAME).grad * masks[NAME]
    torch.testing.assert_close(b.grad, 2.0 * whole @ a.T, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(a.grad, 2.0 * b.T @ whole, rtol=1e-4, atol=1e-7)


def test_products_are_counted_under_a_mask_too():
    assert plan(dense_llama(), [MaskedLora()]).flops_after == plan(dense_llama(), []).flops_after


def test_dropout_is_of_training_alone():
    model, _ = pruned_llama()
    apply_(model, [Lora(dropout=0.5)])
    drawn_factors_(model)
    torch.manual_seed(0)
    assert not torch.equal(model(IDS), model(IDS))
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


def gradients_of(*passes):
    model = dense_llama()
    pipeline = apply_(model, passes)
    drawn_factors_(model)
    pipeline.begin_update_(0)
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_adapters_under_recompute():
    """Beside bottlenecks they get the gradients that they get without it, their dropout too."""
    low_rank = LowRank(scope="mlp", mlp_rank=8)
    for adapters in (Lora(dropout=0.0), Lora(dropout=0.3)):
        torch.manual_seed(3)
        plain = gradients_of(low_rank, adapters)
        torch.manual_seed(3)
        again = gradients_of(low_rank, adapters, Recompute())
        assert plain.keys() == again.keys()
        assert len(plain) == 8  # A and B of q and v in two layers
        for name, value in plain.items():
            torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)
    with pytest.raises(PassError, match="no bottleneck to keep"):
        apply_(dense_llama(), [Lora(), Recompute()])


def test_the_logits_are_those_of_peft():
    peft = pytest.importorskip("peft")
    rewritten, _ = by_hand(masked=False)
    from act24.tools.huggingface.folder import save_pretrained

    plain, _ = pruned_llama()
    import tempfile

    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(plain, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=leaves, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(theirs, config).eval()
    state = rewritten.state_dict()
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            path = name.removeprefix("base_model.model.").replace(".default.weight", "")
            parameter.data.copy_(state[path])
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS).logits, rewritten(IDS), rtol=1e-4, atol=1e-4)


def test_more_than_a_token_in_front():
    """Shapes other than a batch of rows, as generation has."""
    rewritten, plain = by_hand(masked=True)
    with torch.no_grad():
        out = F.log_softmax(rewritten(IDS[:1, :1]), -1)
        torch.testing.assert_close(out, F.log_softmax(plain(IDS[:1, :1]), -1), rtol=1e-4, atol=1e-4)
