"""Recipes, overrides and the flags of run_c4.py."""

import json
from pathlib import Path

from conftest import fuzzing
from damage import TOML_VALUES, WORDS, altered, damaged
from hypothesis import given
from hypothesis import strategies as st

from act24.recipes import load
from act24.recipes.flags import FLAGS
from act24.recipes.from_flags import recipe_from_flags
from act24.tools.run.build import plan_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [(ROOT / "recipes" / f"{name}.toml").read_bytes() for name in ("demo", "c4/60m-loro-relu2-act24")]
KEYS = [
    f"{section}.{key}"
    for section, field in load.Recipe.model_fields.items()
    if hasattr(field.annotation, "model_fields")
    for key in field.annotation.model_fields
]
OPTIONS = ("use", "from_step", "method", "targets")
PASS_KEYS = [f"passes.{p}.{option}" for p in ("0", "activation24") for option in OPTIONS]
HOSTILE_KEYS = ["", ".", "a.b", "passes", "passes.9", "passes.0", "extends", "model", "train.steps.x", "é"]
HOSTILE_NAMES = ["demo.toml", "c4", "c4/", "/", "a" * 300 + ".toml", "~nobody/x.toml", "\0.toml"]


@fuzzing
@given(st.sampled_from(RECIPES).flatmap(damaged))
def test_damaged_recipe_files(tried, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("recipe") / "a.toml"
    path.write_bytes(content)
    tried(lambda: load.load_recipe(str(path)))


@fuzzing
@given(
    st.lists(st.tuples(st.sampled_from(KEYS + PASS_KEYS + HOSTILE_KEYS), TOML_VALUES), min_size=1, max_size=3)
)
def test_overrides(tried, pairs):
    tried(lambda: load.load_recipe("demo", [f"{key}={value}" for key, value in pairs]))


@fuzzing
@given(st.sampled_from(KEYS + PASS_KEYS), TOML_VALUES)
def test_one_override_and_the_plan(tried, key, value):
    big = ("model.", "tokenizer.vocab")  # a model on the meta device takes no memory, but modules take time
    if key.startswith(big) and sum(character.isdigit() for character in value) > 3:
        value = "7"
    tried(lambda: plan_recipe(load.load_recipe("demo", [f"{key}={value}"])))


@fuzzing
@given(
    WORDS | st.sampled_from(["demo.toml", "c4", "c4/", "/", "a" * 300 + ".toml", "~nobody/x.toml", "\0.toml"])
)
def test_recipe_names(tried, name):
    tried(lambda: load.load_recipe(name))
    tried(lambda: load.load_recipe(f"{name}.toml"))


CONFIG = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "model_type": "llama",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def test_the_undamaged_config_is_taken(tmp_path):
    """Or whatever is done to it would be refused for the same reason, and nothing be tried."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    recipe_from_flags(["--model_config", str(tmp_path / "config.json"), "--batch_size", "8"])


@fuzzing
@given(altered(CONFIG) | damaged(json.dumps(CONFIG).encode()))
def test_model_configs_of_flags(tried, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    words = ["--model_config", str(path), "--batch_size", "8"]
    tried(lambda: recipe_from_flags(words))


@fuzzing
@given(
    st.lists(
        st.tuples(st.sampled_from([flag.name for flag in FLAGS]) | st.text(max_size=8), WORDS),
        max_size=6,
    )
)
def test_flags(tried, pairs):
    words = ["--model_config", "llama_60m", "--batch_size", "8"]
    for name, value in pairs:
        words += [f"--{name}", value]
    tried(lambda: recipe_from_flags(words))
