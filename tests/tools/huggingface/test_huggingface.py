"""Checkpoints against `transformers`, both ways, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from slow import slow_after, slow_but

from act24.errors import Act24Error
from act24.initialise import build_llama
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.passes import Relu2FFN, apply_
from act24.tools.huggingface.folder import load_pretrained, save_pretrained, write_pretrained

transformers = pytest.importorskip("transformers")

CONFIG = LlamaConfig(
    vocab_size=67,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=6,
    rope_theta=50000.0,
    rms_norm_eps=1e-4,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=(1, 3),
)
VARIANTS = [
    {},
    {"num_key_value_heads": 2},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "head_dim": 12, "num_key_value_heads": 3},
]
INPUT_IDS = torch.randint(0, 67, (2, 17), generator=torch.Generator().manual_seed(0))


def close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("change", slow_after(2, VARIANTS), ids=str)
def test_what_we_save_transformers_loads(change: dict, tmp_path: Path) -> None:
    model = build_llama(dataclasses.replace(CONFIG, **change), seed=0)
    save_pretrained(model, tmp_path / "new" / "folder", {"recipe": "demo"})
    folder = tmp_path / "new" / "folder"
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    close(theirs(INPUT_IDS).logits, model(INPUT_IDS))
    assert theirs.config.eos_token_id == [1, 3]
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": "demo"}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("change", "shard"),
    slow_but(
        [(VARIANTS[0], "20KB"), *((change, "5GB") for change in VARIANTS)],
        itertools.product(VARIANTS, ("5GB", "20KB")),
    ),
    ids=str,
)
def test_what_transformers_saves_we_load(change: dict, shard: str, tmp_path: Path) -> None:
    fields = dataclasses.asdict(dataclasses.replace(CONFIG, **change))
    theta = fields.pop("rope_theta")
    fields["eos_token_id"] = list(fields["eos_token_id"])
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**fields, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    )
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours = load_pretrained(tmp_path)
    close(ours(INPUT_IDS), theirs(INPUT_IDS).logits)
    assert ours.config.rope_theta == theta
    assert ours.config.eos_token_id == (1, 3)
    assert all(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("change", "dtype"),
    slow_but(
        [(VARIANTS[0], torch.float32), (VARIANTS[1], torch.bfloat16)],
        itertools.product(VARIANTS, (torch.float32, torch.bfloat16)),
    ),
    ids=str,
)
def test_round_trip_is_exact(change: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_llama(dataclasses.replace(CONFIG, **change), seed=0, dtype=dtype)
    save_pretrained(model, tmp_path)
    back = load_pretrained(tmp_path)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, value in back.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, model.state_dict()[name])
    resolved = {"head_dim": model.config.head_width, "num_key_value_heads": model.config.key_value_heads}
    assert back.config == dataclasses.replace(model.config, **resolved)


@pytest.mark.parametrize("wide", slow_after(1, ["lm_head.weight", "model.norm.weight"]))
def test_of_several_dtypes_that_of_the_config_is_computed_in(
    wide: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`transformers` does; the product of two dtypes is a traceback."""
    edit_weights(saved, lambda s: s.update({n: v.bfloat16() for n, v in s.items() if n != wide}))
    edit_config(saved, torch_dtype="bfloat16", dtype="bfloat16")
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(saved), load_pretrained(saved)
    assert "parameters in bfloat16 and float32: all are read as bfloat16" in caplog.text
    for name, value in theirs.state_dict().items():
        assert value.dtype == ours.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(value, ours.state_dict()[name])
    assert ours(INPUT_IDS).isfinite().all()
    edit_config(saved, torch_dtype="absent", dtype="absent")
    with pytest.raises(Act24Error, match=r"bfloat16 and float32, and dtype in its config\.json is None"):
        load_pretrained(saved)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained(build_llama(CONFIG, seed=0), folder)
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_once, tmp_path, dirs_exist_ok=True)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


def edit_weights(folder: Path, edit) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    edit(state)
    safetensors.torch.save_file(state, folder / "model.safetensors")


LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type = 'default' and rope_scaling 'linear'",
        ),
        (
            {"rope_parameters": {**LINEAR, "factor": 4.0}, "rope_scaling": LINEAR},
            "factor = 4.0 and rope_scaling 2.0: remove the wrong one",
        ),
        (
            {"rope_parameters": {**YARN, "beta_fast": 8}, "rope_scaling": YARN},
            "beta_fast = 8 and rope_scaling None",
        ),
        (
            {"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_scaling": LINEAR},
            "rope_theta is 10000.0 in rope_parameters and 50000.0 beside them",
        ),
        (
            {
                "rope_parameters": {**LINEAR, "rope_theta": 5e5},
                "rope_scaling": LINEAR,
                "rope_theta": "absent",
            },
            "rope_theta is 500000.0 in rope_parameters and 10000.0 where transformers looks",
        ),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 10000.0 in rope_parameters and 50000.0"),
        (
            {
                "rope_parameters": {**YARN, "original_max_position_embeddings": 32},
                "original_max_position_embeddings": 64,
            },
            "original_max_position_embeddings is 32 in the rotary settings and 64 beside them",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": None}}, 'rope_type "linear" needs factor'),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type has no 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor has to be 1 or more"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        (
            {"rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_size": "48"}, "hidden_size .* got '48'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"intermediate_size": 80}, r"mlp.gate_proj.weight \[72, 48\] for \[80, 48\].* and 2 more"),
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
    ],
)
def test_unsupported_and_ill_fitting_configurations_are_named(saved: Path, changes: dict, told: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(Act24Error, match=told) as caught:
        load_pretrained(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_harmless_spellings_of_other_writers_are_read(saved: Path) -> None:
    expected = load_pretrained(saved)(INPUT_IDS)
    # As LLaMA 1 conversions and the low-rank literature's configurations write them.
    edit_config(
        saved,
        rope_scaling=None,
        pad_token_id=-1,
        max_sequence_length=1024,
        num_key_value_heads="absent",
        head_dim="absent",
    )
    edit_weights(saved, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    model = load_pretrained(saved)
    assert torch.equal(model(INPUT_IDS), expected)
    assert model.config.pad_token_id is None


def test_tied_head_in_the_file_must_be_the_embedding(saved: Path) -> None:
    edit_config(saved, tie_word_embeddings=True)
    with pytest.raises(Act24Error, match="lm_head"):
        load_pretrained(saved)
    edit_weights(saved, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    assert load_pretrained(saved).lm_head is None


def test_a_tied_head_may_be_stored_under_its_own_name_alone(saved: Path) -> None:
    edit_config(saved, tie_word_embeddings=True)
    edit_weights(saved, lambda s: s.update({"lm_head.weight": s.pop("model.embed_tokens.weight")}))
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(told.values()), told
    close(load_pretrained(saved)(INPUT_IDS), theirs(INPUT_IDS).logits)


def test_a_folder_of_pickles_is_told_the_way_to_safetensors(saved: Path) -> None:
    torch.save(safetensors.torch.load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(Act24Error, match=r"only pytorch_model\.bin.*from_pretrained\(…\)\.save_pretrained"):
        load_pretrained(saved)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved)
    theirs.save_pretrained(saved / "out")
    close(load_pretrained(saved / "out")(INPUT_IDS), theirs(INPUT_IDS).logits)


def test_missing_and_broken_files_are_named(saved: Path) -> None:
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(Act24Error, match=r"model\.safetensors"):
        load_pretrained(saved)
    weights.unlink()
    with pytest.raises(Act24Error, match=r"model\.safetensors"):
        load_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(Act24Error, match=r"config\.json"):
        load_pretrained(saved)


def test_a_rewritten_model_is_not_saved(tmp_path: Path) -> None:
    model = build_llama(CONFIG, seed=0)
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(Act24Error, match=r"missing: model\.layers\.1\.mlp\.gate_proj\.weight"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(state, path, metadata) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fill_the_disk)
    with pytest.raises(Act24Error, match="No space left"):
        save_pretrained(build_llama(CONFIG, seed=0), tmp_path)
    assert not list(tmp_path.iterdir())


SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
]
LONG = torch.randint(0, 67, (1, 200), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scaling", slow_after(3, SCALINGS), ids=str)
def test_rotary_scalings_are_those_of_transformers_both_ways(scaling: dict, tmp_path: Path) -> None:
    fields = dataclasses.asdict(CONFIG) | {"eos_token_id": [1, 3]}
    theta = fields.pop("rope_theta")
    del fields["rope_scaling"]
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**fields, rope_parameters={"rope_theta": theta, **scaling})
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    close(ours(LONG), theirs(LONG).logits)
    save_pretrained(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    close(again(LONG).logits, theirs(LONG).logits)


#: Settings that transformers opens, as other writers have them.
FOUND: list[dict] = [
    {"rope_parameters": YARN, "original_max_position_embeddings": 64},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64},
    {"rope_parameters": LLAMA3},
    {"rope_parameters": None, "rope_scaling": YARN, "original_max_position_embeddings": 64},
    {"rope_parameters": LINEAR, "original_max_position_embeddings": 64},
    {"rope_parameters": {**YARN, "factor": None}, "original_max_position_embeddings": 64},
    {"rope_parameters": {**YARN, "original_max_position_embeddings": 64.0}},
    {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0, "beta_fast": None}},
    {"rope_parameters": {**YARN, "attention_factor": 2, "finetuned": True, "partial_rotary_factor": 1}},
    {"rope_parameters": {**LINEAR, "beta_fast": 8, "low_freq_factor": 1}},
    {"rope_parameters": {**LLAMA3, "attention_factor": 2.0, "truncate": False}},
    {"rope_parameters": {"rope_type": "default", "factor": 8.0}},
    {"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": LINEAR, "partial_rotary_factor": None, "rope_scaling": {}},
]


@pytest.mark.parametrize(
    "settings",
    [s if n == 0 else pytest.param(s, marks=pytest.mark.slow) for n, s in enumerate(FOUND)],
    ids=str,
)
def test_rotary_settings_are_read_as_transformers_reads_them(settings: dict, saved: Path) -> None:
    edit_config(saved, **settings)
    with torch.no_grad():
        ours, theirs = load_pretrained(saved), transformers.AutoModelForCausalLM.from_pretrained(saved)
        close(ours(LONG), theirs(LONG).logits)
    save_pretrained(ours, saved / "again")
    with torch.no_grad():
        close(transformers.AutoModelForCausalLM.from_pretrained(saved / "again")(LONG).logits, ours(LONG))


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({**YARN, "finetuned": True, "low_freq_factor": 2}, "'yarn' have no finetuned, low_freq_factor"),
        ({**LINEAR, "beta_fast": 8}, "'linear' have no beta_fast"),
        ({"rope_type": "default", "factor": 8.0}, "'default' have no factor"),
        (YARN, ""),
    ],
)
def test_what_nobody_reads_of_rotary_settings_is_said(
    table: dict, told: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(saved, rope_parameters=table)
    load_pretrained(saved)
    assert told in caplog.text
    assert bool(caplog.text) == bool(told)


@pytest.mark.parametrize("scaling", slow_after(1, SCALINGS[:3]), ids=str)
def test_the_older_spelling_of_rotary_scalings_is_read(scaling: dict, saved: Path) -> None:
    edit_config(saved, rope_parameters={"rope_theta": 50000.0, **scaling}, rope_scaling=None)
    expected = load_pretrained(saved)(LONG)
    older = {"type" if name == "rope_type" else name: value for name, value in scaling.items()}
    edit_config(saved, rope_parameters="absent", rope_scaling=older)
    assert torch.equal(load_pretrained(saved)(LONG), expected)


@pytest.mark.parametrize(
    "change",
    slow_after(2, [*VARIANTS, {"mlp_bias": True}, {"head_dim": 16, "attention_bias": True}]),
    ids=str,
)
def test_arcee_is_the_stock_model_with_relu2_both_ways(change: dict, tmp_path: Path) -> None:
    fields = dataclasses.asdict(dataclasses.replace(CONFIG, **change)) | {"eos_token_id": [1, 3]}
    theta = fields.pop("rope_theta")
    del fields["rope_scaling"]
    theirs = transformers.ArceeForCausalLM(
        transformers.ArceeConfig(**fields, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    close(ours(INPUT_IDS), theirs(INPUT_IDS).logits)
    write_pretrained(tmp_path / "ours", ours.config, "arcee", ours.state_dict())
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(again).__name__ == "ArceeForCausalLM"
    assert not any(told.values()), told
    close(again(INPUT_IDS).logits, theirs(INPUT_IDS).logits)


def test_what_arcee_has_its_own_defaults_for_is_written(tmp_path: Path) -> None:
    """A config.json without them would be read with eps 1e-5 and end-of-text 128001."""
    config = dataclasses.replace(CONFIG, bos_token_id=None, eos_token_id=None, rms_norm_eps=1e-6)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    apply_(model, [Relu2FFN(width="keep")])
    state = {name: torch.zeros(value.shape) for name, value in model.state_dict().items()}
    write_pretrained(tmp_path, config, "arcee", state)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    read = {name: getattr(theirs, name) for name in ("rms_norm_eps", "bos_token_id", "eos_token_id")}
    assert read == {"rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None}
    assert theirs.rope_parameters["rope_theta"] == 50000.0


def test_large_checkpoints_are_sharded_and_come_back(tmp_path: Path) -> None:
    model = build_llama(CONFIG, seed=0)
    write_pretrained(tmp_path, CONFIG, "llama", model.state_dict(), shard=40_000)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[1].startswith("model-00001-of-0000")
    assert len(names) > 5
    assert names[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert torch.equal(load_pretrained(tmp_path)(INPUT_IDS), model(INPUT_IDS))
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    close(theirs(INPUT_IDS).logits, model(INPUT_IDS))


def test_files_have_the_rights_that_the_process_gives_new_files(tmp_path: Path) -> None:
    save_pretrained(build_llama(CONFIG, seed=0), tmp_path / "out")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
