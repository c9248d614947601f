"""A model as a GGUF file, which llama.cpp runs: architecture "llama", or "arcee" for relu² networks.

Written here and not by llama.cpp's converter, which knows a tokenizer by the ids that it gives a test string,
so that it stops at every vocabulary that was trained anew. What llama.cpp would load and compute wrong is
refused: it checks neither rotary scalings nor how text is split before the merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act24.errors import Act24Error, not_imported
from act24.llama import LlamaConfig
from act24.tools.data import Tokenizer
from act24.tools.files import whole_file

#: general.file_type, and the name in gguf.GGMLQuantizationType.
_TYPES = {torch.float32: (0, "F32"), torch.float16: (1, "F16"), torch.bfloat16: (32, "BF16")}

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # kinds of tokens

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path, config: LlamaConfig, kind: str, state: Mapping[str, Tensor], tokenizer: Tokenizer, name: str
) -> None:
    """Write the file, which appears under its name only when it is whole.

    Args:
        kind: "llama" or "arcee"; `state` has the names of either in `transformers`.
        name: what the file calls the model.

    Raises:
        Act24Error: something that llama.cpp computes otherwise, the package gguf is missing, or writing
            fails.
    """
    gguf = _library()
    _check(config)
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    file_type, quantised = _TYPES[state["model.embed_tokens.weight"].dtype]
    try:
        with whole_file(path) as partial:
            writer = gguf.GGUFWriter(partial, kind)
            _add_sizes(writer, config, name, file_type)
            _add_tokenizer(writer, vocabulary, tokenizer)
            for tensor, value in _tensors(config, state):
                array = value.float().numpy()
                if value.ndim == 1:
                    writer.add_tensor(tensor, array)
                else:
                    of = gguf.GGMLQuantizationType[quantised]
                    writer.add_tensor(tensor, gguf.quants.quantize(array, of), raw_dtype=of)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise Act24Error(f"cannot write {path}: {error}") from error


def _library() -> Any:
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        why = not_imported(error, "gguf")
        raise Act24Error(f"--as gguf needs the package gguf, which {why}: pip install act24[gguf]") from error
    return gguf


def _check(config: LlamaConfig) -> None:
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field):
            raise Act24Error(f"a GGUF has no place for biases, and this model has {field} = true")
    if config.rope_scaling is not None:
        raise Act24Error(
            f'rope_type "{config.rope_scaling.rope_type}" is not written to a GGUF, and llama.cpp would '
            "compute the plain one without a word"
        )


def _add_sizes(writer: Any, config: LlamaConfig, name: str, file_type: int) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, vocabulary: tuple[list[str], list[int], list[str]], of: Tokenizer) -> None:
    tokens, kinds, merges = vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(of.eos_id)
    writer.add_eos_token_id(of.eos_id)
    writer.add_pad_token_id(of.pad_id)
    writer.add_add_bos_token(False)


def _vocabulary(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens by id, their kinds, and merges.

    Raises:
        Act24Error: the tokenizer is no byte-level BPE with GPT-2's way to split text.
    """
    content = json.loads(tokenizer.to_json())
    model, split = content["model"], content.get("pre_tokenizer") or {}
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if (
        model.get("type") != "BPE"
        or content.get("normalizer")
        or any(split.get(key, True if key == "use_regex" else None) != value for key, value in gpt2.items())
    ):
        raise Act24Error(
            f"tokenizer {tokenizer.name!r} is no byte-level BPE with GPT-2's way to split text, the only one "
            "that is written to a GGUF: llama.cpp would tokenise otherwise without a word"
        )
    added = {token["id"]: token for token in content.get("added_tokens", ())}
    pieces = {id: piece for piece, id in model["vocab"].items()}
    pieces |= {id: token["content"] for id, token in added.items()}
    kinds = [
        _UNUSED if id not in pieces else _CONTROL if added.get(id, {}).get("special") else _NORMAL
        for id in range(size)
    ]
    tokens = [pieces.get(id, f"[PAD{id}]") for id in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return tokens, kinds, merges


def _tensors(config: LlamaConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.key_value_heads}
    for full, value in state.items():
        name, block = full.removesuffix(".weight"), ""
        if name.startswith("model.layers."):
            index, _, name = name.removeprefix("model.layers.").partition(".")
            block = f"blk.{index}."
        short = _NAMES[name]
        if short in heads:  # its rotation turns neighbours, ours entries half a head apart
            rows = value.unflatten(0, (heads[short], 2, -1))
            value = rows.transpose(1, 2).flatten(0, 2)
        yield f"{block}{short}.weight", value.detach().contiguous()
