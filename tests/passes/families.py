"""Tiny models of transformers families, by the name of their model type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORDS = 99

#: Whatever of these a configuration knows is set; all else is the family's own.
_SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "n_embed": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "d_kv": 8,
    "ffn_hidden_size": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_positions": 64,
    "n_ctx": 64,
    "max_position_embeddings": 64,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "max_seq_len": 64,
    "num_mel_bins": 8,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "rotary_dim": 8,
    "sliding_window": 16,
    "state_size": 4,
    "time_step_rank": 4,
    "attention_hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": WORDS,
    "num_kv_shared_layers": 0,
    "d_embed": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

#: What a family needs besides.
_OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "falcon": {"num_kv_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "mpt": {"expansion_ratio": 2},
    "gptj": {"n_inner": 64},
    "codegen": {"n_inner": 64},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"num_key_value_heads": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "qwen2_moe": {"decoder_sparse_step": 1},
}

CAUSAL = """
    apertus arcee bart biogpt bitnet bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 diffllama ernie4_5
    exaone4 falcon falcon_mamba gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj
    granite granitemoe helium hunyuan_v1_dense jamba lfm2 llama mamba ministral mistral mixtral mpt nemotron
    olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe rwkv seed_oss smollm3
    stablelm starcoder2 xglm
"""
SEQ2SEQ = ("t5", "mt5", "whisper")
MASKED = ("bert", "distilbert", "roberta", "electra")
FAMILIES = (*CAUSAL.split(), *SEQ2SEQ, *MASKED)


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of two layers and width 32, with random weights of seed 0, in evaluation mode."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[family]
    known = config_class()
    often_none = ("pad_token_id", "num_key_value_heads")
    fits = {n: v for n, v in _SIZES.items() if getattr(known, n, None) is not None}
    fits |= {n: _SIZES[n] for n in often_none if hasattr(known, n)}
    given = {n: v for n, v in fits.items() if not isinstance(getattr(type(known), n, None), property)}
    given |= _OWN.get(family, {})
    settable = not isinstance(getattr(type(known), "layer_types", None), property)
    if settable and isinstance(getattr(known, "layer_types", None), list):
        given["layer_types"] = known.layer_types[:2]
    config = config_class(**given)
    auto = transformers.AutoModelForCausalLM
    if family in SEQ2SEQ:
        auto = transformers.AutoModelForSeq2SeqLM
        if family == "whisper":
            auto = transformers.AutoModelForSpeechSeq2Seq
    elif family in MASKED:
        auto = transformers.AutoModelForMaskedLM
    torch.manual_seed(0)
    return auto.from_config(config).to(dtype).eval()


def inputs(family: str, model: Any) -> dict[str, Tensor]:
    """Arguments of a forward: two rows of eight tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, WORDS - 5, (2, 8), generator=generator)
    if family == "whisper":
        sound = torch.randn(2, 8, 64, generator=generator).to(model.dtype)
        return {"input_features": sound, "decoder_input_ids": ids}
    given = {"input_ids": ids}
    if family in SEQ2SEQ:
        given["decoder_input_ids"] = ids
    return given
