"""The reference of recipe keys: the page is the command's, and every key it names is one."""

import re
from pathlib import Path

import pytest

from act24.recipes.keys import elsewhere, recipe_keys
from act24.recipes.load import RecipeError, load_recipe
from act24.recipes.schema import Recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe-keys.md"


def test_the_page_is_what_the_command_writes(act24_command):
    assert PAGE.read_text(encoding="utf-8") == act24_command("recipe", "keys", "--markdown")


@pytest.fixture
def act24_command(capsys, monkeypatch):
    def run(*arguments):
        from act24.tools.commands.cli import app

        with pytest.raises(SystemExit) as ended:
            app(list(arguments), prog_name="act24")
        assert not ended.value.code
        return capsys.readouterr().out

    return run


def test_every_key_of_every_shipped_recipe_is_on_the_page():
    known = {key.path for key in recipe_keys()}
    recipe = load_recipe("c4/60m-loro-relu2-act24")
    for table, values in recipe.model_dump(exclude={"passes"}, exclude_none=True).items():
        if isinstance(values, dict):
            assert {f"{table}.{name}" for name in values if name != "name"} <= known
    assert {"passes.activation24.from_step", "passes.low_rank.mlp_rank", "optimizer.exact_every"} <= known
    assert "passes.activation24.algorithms" not in known  # Python only


@pytest.mark.parametrize(
    "key", [k for k in recipe_keys() if not k.record and k.default not in ("required", "not given")]
)
def test_a_default_on_the_page_is_taken(key):
    """Said as `--set`, every default is a valid value, and changes nothing."""
    section, _, name = key.path.rpartition(".")
    field = (Recipe.model_fields[section].annotation if section else Recipe).model_fields[name]
    shown = load_recipe("demo", ["model.vocab_size=4096", f"{key.path}={key.default}"])
    assert getattr(getattr(shown, section) if section else shown, name) == field.default


def test_choices_and_bounds_are_those_that_are_checked():
    takes = {(key.path, key.record): key.takes for key in recipe_keys()}
    assert takes["train.dtype", ""] == '`"float32"`, `"bfloat16"`, `"bfloat16_autocast"`'
    assert takes["optimizer.lr", "adamw"] == "a number, above 0"
    assert takes["passes.activation24.dense_ratio", "activation24"] == "a number, 0 or more and below 1"
    with pytest.raises(RecipeError, match="below 1"):
        load_recipe("demo", ["passes.activation24.dense_ratio=1.0"])


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train.lr=1e-3", "train.lr: unknown key: did you mean optimizer.lr?"),
        (
            "optimizer.warmup_steps=3",
            "optimizer.warmup_steps: unknown key: did you mean schedule.warmup_steps?",
        ),
        ("train.max_length=64", "train.max_length: unknown key: did you mean data.max_length?"),
        ("model.mlp_rank=64", "did you mean passes.low_rank.mlp_rank or passes.cola.mlp_rank or "),
        ("train.from_step=3", "train.from_step: unknown key: choose from"),  # of four passes: no help
    ],
)
def test_a_key_in_the_wrong_table_is_found_in_its_own(wrong, meant):
    with pytest.raises(RecipeError, match=re.escape(meant)):
        load_recipe("demo", [wrong])


def test_a_key_of_no_table_is_elsewhere_nowhere():
    assert elsewhere("stps") == []
