"""What stands in a GGUF, read by the package's own reader, and undone by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tokenizers
import torch
from slow import slow_after

from act24.errors import Act24Error
from act24.passes import Cola, Relu2FFN
from act24.rotary import RotaryScaling
from act24.tools.data import Tokenizer
from act24.tools.huggingface.export import export_run
from act24.tools.huggingface.gguf_file import write_gguf
from act24.tools.run.build import load
from act24.tools.run.train import train

gguf = pytest.importorskip("gguf")


def run(tiny, folder, *passes, **changes):
    overrides = [f"{name}={value}" for name, value in changes.items()]
    recipe = tiny("train.steps=2", "schedule.warmup_steps=1", "eval.every=0", *overrides)
    train(recipe.model_copy(update={"passes": passes}), folder)
    return folder


def value(reader, name: str):
    field = reader.fields[name]
    parts = [field.parts[index] for index in field.data]
    texts = field.types[-1] == gguf.GGUFValueType.STRING
    found = [bytes(part).decode() if texts else part.tolist()[0] for part in parts]
    return found if field.types[0] == gguf.GGUFValueType.ARRAY else found[0]


@pytest.mark.parametrize(("kind", "passes"), [("arcee", (Relu2FFN(),)), ("llama", ())])
@pytest.mark.parametrize("tied", slow_after(1, ["true", "false"]))
def test_the_file_says_what_the_model_is(tiny, tmp_path, kind, passes, tied):
    changes = {"model.num_key_value_heads": 1, "model.rope_theta": 5000, "model.tie_word_embeddings": tied}
    path = run(tiny, tmp_path / "run", *passes, **changes)
    told = export_run(path, tmp_path / "model.gguf", "gguf")
    assert f'a GGUF of architecture "{kind}"' in told
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    built = load(path)
    config, state, tokenizer = built.model.config, built.model.state_dict(), built.open_tokenizer()
    wanted = {
        "general.architecture": kind,
        "general.file_type": 0,
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": 32,
        f"{kind}.block_count": 2,
        f"{kind}.feed_forward_length": len(state["model.layers.0.mlp.up_proj.weight"]),
        f"{kind}.attention.head_count": 2,
        f"{kind}.attention.head_count_kv": 1,
        f"{kind}.attention.key_length": 16,
        f"{kind}.rope.dimension_count": 16,
        f"{kind}.rope.freq_base": 5000.0,
        f"{kind}.vocab_size": 300,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: value(reader, name) for name in wanted} == wanted
    assert value(reader, f"{kind}.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert tokens == [backend.id_to_token(id) or f"[PAD{id}]" for id in range(300)]
    kinds = value(reader, "tokenizer.ggml.token_type")
    assert kinds[tokenizer.eos_id] == 3
    assert [kind == 5 for kind in kinds] == [token.startswith("[PAD") for token in tokens]
    assert len(value(reader, "tokenizer.ggml.merges")) > 10

    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert ("output.weight" in tensors) == (tied == "false")
    assert ("blk.1.ffn_gate.weight" in tensors) == (kind == "llama")
    for theirs, ours in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        assert torch.equal(tensors[f"blk.1.{theirs}.weight"], state[f"model.layers.1.{ours}.weight"])
    for theirs, ours, heads in (("attn_q", "q_proj", 2), ("attn_k", "k_proj", 1)):
        rows = state[f"model.layers.0.self_attn.{ours}.weight"].view(heads, 16, 32)
        # Row 2i of a head is its row i, row 2i + 1 is its row 8 + i.
        expected = rows[:, [half * 8 + i for i in range(8) for half in range(2)]]
        assert torch.equal(tensors[f"blk.0.{theirs}.weight"].view(heads, 16, 32), expected)


@pytest.mark.parametrize(("dtype", "kind"), slow_after(1, [(torch.bfloat16, "BF16"), (torch.float16, "F16")]))
def test_16_bit_weights_stay_what_they_are(tiny, tmp_path, dtype, kind):
    built = load(run(tiny, tmp_path / "run", Relu2FFN()))
    model = built.model.to(dtype)
    config = dataclasses.replace(model.config, intermediate_size=128)
    write_gguf(tmp_path / "x.gguf", config, "arcee", model.state_dict(), built.open_tokenizer(), "x")
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        assert tensor.tensor_type.name == ("F32" if "norm" in tensor.name else kind)
        if tensor.name == "blk.0.ffn_up.weight":
            found = torch.from_numpy(tensor.data.copy()).view(dtype)
            assert torch.equal(found, model.state_dict()["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("change", "told"),
    slow_after(
        1,
        [
            ({"attention_bias": True}, "attention_bias = true"),
            ({"mlp_bias": True}, "mlp_bias = true"),
            ({"rope_scaling": RotaryScaling("linear", 2.0)}, 'rope_type "linear"'),
        ],
    ),
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tiny, tmp_path, change, told):
    built = load(run(tiny, tmp_path / "run"))
    config = dataclasses.replace(built.model.config, **change)
    with pytest.raises(Act24Error, match=told):
        write_gguf(
            tmp_path / "x.gguf", config, "llama", built.model.state_dict(), built.open_tokenizer(), "x"
        )
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    "change",
    slow_after(
        1,
        [
            {"normalizer": {"type": "NFC"}},
            {"pre_tokenizer": {"type": "Whitespace"}},
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        ],
    ),
)
def test_another_way_to_split_text_is_refused(tiny, tmp_path, change):
    built = load(run(tiny, tmp_path / "run"))
    content = json.loads(built.open_tokenizer().to_json()) | change
    other = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), "other")
    with pytest.raises(Act24Error, match="'other' is no byte-level BPE"):
        write_gguf(tmp_path / "x.gguf", built.model.config, "llama", built.model.state_dict(), other, "x")


def test_a_model_that_is_neither_is_refused(tiny, tmp_path):
    path = run(tiny, tmp_path / "run", Relu2FFN(), Cola(attn_rank=8, mlp_rank=8))
    with pytest.raises(Act24Error, match='no form "gguf"'):
        export_run(path, tmp_path / "x.gguf", "gguf")
