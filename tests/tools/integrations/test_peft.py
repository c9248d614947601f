"""The package peft beside rewritten linears, and under passes. Skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from act24 import apply_, integrations
from act24.passes import Activation24, Cola, Fp8, LowRank, Pass, PassError, Pipeline, Weight24

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

RANKS: dict[str, Any] = {"attn_rank": 4, "mlp_rank": 4}
IDS = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(0))
PASSES: list[Pass] = [LowRank(**RANKS), Cola(**RANKS), Weight24(), Fp8()]


def stock(family: str = "Llama") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    config = getattr(transformers, f"{family}Config")(
        **sizes, num_hidden_layers=2, num_key_value_heads=4, bos_token_id=1, eos_token_id=2
    )
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def adapted(targets: list[str], **options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)


def rewritten(p: Pass) -> tuple[Any, Pipeline]:
    model = stock()
    return model, apply_(model, [p], probe={"input_ids": IDS})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("p", PASSES, ids=lambda p: p.name)
def test_lora_beside_rewritten_linears(p: Pass, tmp_path: Path) -> None:
    model, pipeline = rewritten(p)
    before = logits(model)
    x = torch.randn(3, 32)
    q = model.model.layers[0].self_attn.q_proj
    alone = q(x)
    wrapped = peft.get_peft_model(model, integrations.lora_config(adapted(["q_proj", "v_proj"]))).eval()
    # The product is added to whatever the linear computes.
    layer = model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), alone + 2 * x @ a.T @ b.T)  # alpha 8 over rank 4
    found = logits(wrapped)
    assert not torch.equal(found, before)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)
    # It trains, alone, with what the pipeline renews.
    wrapped.train()
    pipeline.begin_update_(0, IDS)
    wrapped(IDS).logits.square().mean().backward()
    trained = {n for n, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert len(trained) == 8
    assert all(".lora_" in name for name in trained)
    # Its file comes back.
    wrapped.save_pretrained(tmp_path)
    again, _ = rewritten(p)
    config = integrations.lora_config(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(again, tmp_path, config=config).eval()
    assert torch.equal(logits(loaded), found)
    with pytest.raises(PassError, match="no weight to be merged into"):
        loaded.merge_and_unload()


def test_what_cannot_be_adapted_is_said() -> None:
    model, _ = rewritten(LowRank(**RANKS))
    for targets, said in ((["up_proj"], "give the model to PEFT first"), (["mlp"], "is no linear")):
        with pytest.raises(PassError, match=said):
            peft.get_peft_model(model, integrations.lora_config(adapted(targets)))
    for config, said in (
        (peft.LoraConfig(init_lora_weights="pissa"), "choose from True, False, 'gaussian'"),
        (peft.LoraConfig(target_modules="all-linear"), "name them"),
    ):
        with pytest.raises(PassError, match=said):
            integrations.lora_config(config)
    # PEFT's own way to a parameter, which would be read past it.
    with pytest.raises(PassError, match="ParamWrapper in the place of up_proj would not be called"):
        peft.get_peft_model(model, adapted([], target_parameters=["up_proj.weight_in"]))


def test_activation24_on_linears_that_carry_lora(tmp_path: Path) -> None:
    """Against the model whose weights have the adapters in them."""
    targets = ["up_proj", "down_proj", "q_proj"]
    model = peft.get_peft_model(stock("Arcee"), adapted(targets)).eval()
    merged = peft.get_peft_model(stock("Arcee"), adapted(targets)).eval()
    merged.load_state_dict(model.state_dict())
    merged = merged.merge_and_unload()
    pipelines = [apply_(m, [Activation24()], probe={"input_ids": IDS}) for m in (model, merged)]
    (row, *_) = pipelines[0].report.rows
    assert "up_proj and down_proj carry LoRA" in row.note
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        plain = stock("Arcee")
        apply_(plain, [Activation24()], probe={"input_ids": IDS})
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    pipelines[0].begin_update_(0, IDS)
    model.train()
    model(IDS).logits.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_" in n)
    model.save_pretrained(tmp_path)  # the adapters alone, as PEFT does
    assert (tmp_path / "adapter_model.safetensors").is_file()
    back = model.eval().merge_and_unload()  # PEFT's layers stand where they stood
    with pytest.raises(PassError, match="save_pretrained would leave out activation24"):
        back.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(back), logits(merged), rtol=1e-3, atol=1e-4)


def test_low_rank_under_lora_is_named_by_the_base_layer() -> None:
    model = peft.get_peft_model(stock(), adapted(["q_proj", "up_proj"]))
    with pytest.raises(PassError, match="frozen: name it in targets"):
        apply_(model, [LowRank(**RANKS)], probe={"input_ids": IDS})
    pipeline = apply_(model, [LowRank(targets=("*.base_layer",), **RANKS)], probe={"input_ids": IDS})
    assert {row.fqn.split(".")[-2] for row in pipeline.report.rows} == {"q_proj", "up_proj"}
    model(IDS).logits.square().mean().backward()
    trained = {n for n, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(trained) == 8
    assert all(".lora_" in name for name in trained)
