"""--model_config of run_c4.py: a JSON file, beside the preset of its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from act24.recipes.from_flags import Translation, recipe_from_flags
from act24.recipes.load import RecipeError
from act24.recipes.schema import Model
from act24.tools.run.build import model_config

SIZES = '{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, %s}'


def translate(command: str) -> Translation:
    return recipe_from_flags(command.split())


def test_a_model_configuration_in_a_file(tmp_path: Path) -> None:
    fields = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 6}
    more = {
        "vocab_size": 500,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.01,
        "tie_word_embeddings": True,
    }
    path = tmp_path / "custom.json"
    path.write_text(json.dumps({**fields, **more, "max_sequence_length": 1024, "hidden_act": "silu"}))
    config = model_config(translate(f"--model_config {path} --batch_size 4").recipe)
    assert {key: getattr(config, key) for key in fields | more} == fields | more


def test_what_a_model_configuration_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    fields = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 6}
    path = tmp_path / "custom.json"
    path.write_text(json.dumps(fields))
    config = model_config(translate(f"--model_config {path} --batch_size 4").recipe)
    theirs = transformers.LlamaConfig(**fields)
    for name in ("vocab_size", "rms_norm_eps", "initializer_range", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs, name)


def test_an_edited_configuration_of_a_preset_s_name_is_read(tmp_path: Path) -> None:
    path = tmp_path / "llama_130m.json"
    fields = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    path.write_text(json.dumps({**fields, "num_attention_heads": 12}))
    command = f"--model_config {path} --batch_size 4"
    assert translate(command).recipe.model == Model(preset="llama-130m")
    path.write_text(json.dumps({**fields, "num_attention_heads": 6, "rms_norm_eps": 1e-5}))
    model = translate(command).recipe.model
    assert model == Model(preset="llama-130m", num_attention_heads=6, rms_norm_eps=1e-5)


def test_all_that_a_file_says_of_the_model_is_taken_and_what_the_script_never_read_is_said(
    tmp_path: Path,
) -> None:
    fields = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 6}
    path = tmp_path / "custom.json"

    def found(**more: object) -> tuple[dict[str, object], list[str], list[str]]:
        path.write_text(json.dumps({**fields, **more}))
        command = f"--model_config {path} --batch_size 4"
        config = model_config(translate(command).recipe)
        own, theirs = (
            [line for line in translate(text).changes if line.startswith("--model_config")]
            for text in (command, f"{command} --use_hf_model")
        )
        return {name: getattr(config, name) for name in more if hasattr(config, name)}, own, theirs

    for more in (
        {"head_dim": 32},
        {"num_key_value_heads": 2},
        {"rope_theta": 5e5},
        {"attention_bias": True},
        {"mlp_bias": True},
    ):
        values, (said,), theirs = found(**more)
        assert values == more
        assert said.startswith(f"--model_config: {next(iter(more))} as the file says")
        assert theirs == [], "transformers' model reads it"
    same = {"head_dim": 16, "num_key_value_heads": 6, "rope_theta": 1e4, "mlp_bias": False}
    assert found(**same, attention_dropout=0, model_type="llama", partial_rotary_factor=None)[1] == []
    path.write_text(json.dumps({**fields, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}))
    assert model_config(translate(f"--model_config {path} --batch_size 4").recipe).rope_theta == 5e5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "an object of settings"),
        ('{"hidden_size": 8}', "intermediate_size is missing"),
        (
            '{"hidden_act": "gelu", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, '
            '"num_attention_heads": 1}',
            "hidden_act = 'gelu' is not supported",
        ),
        (SIZES % '"attention_dropout": 0.1', "attention_dropout = 0.1 is not supported"),
        (SIZES % '"model_type": "t5"', "model_type = 't5' is not supported"),
        (
            SIZES % '"rope_parameters": {"rope_type": "yarn", "factor": 2}',
            "rope_type 'yarn' is not supported",
        ),
        (
            SIZES % '"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}',
            "two values of rope_theta",
        ),
        (SIZES % '"vocab_size": [null]', r"vocab_size = \[None\] is no single value"),
        (SIZES % '"rope_parameters": [1]', r"rope_parameters = \[1\] is no object"),
        (SIZES % '"rope_parameters": {"rope_theta": {}}', r"rope_theta = \{\} is no single value"),
    ],
)
def test_a_model_configuration_that_cannot_be_had(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "custom.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        translate(f"--model_config {path} --batch_size 4")
