"""Wrong values for every key of every table: refused in a line that names the key, and never a traceback."""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from act24.optim import OPTIMIZERS
from act24.passes import REGISTRY
from act24.recipes.from_flags import recipe_from_flags
from act24.recipes.load import RecipeError, parse_recipe
from act24.recipes.records import recipe_fields
from act24.recipes.schema import Recipe, Section
from act24.schedules import SCHEDULES

BASE = """
[model]
preset = "llama-9m"
[train]
steps = 100
batch_size = 4
total_batch_size = 8
[optimizer]
lr = 0.01
"""
REQUIRED = {"restart_every": 10, "attn_rank": 8, "mlp_rank": 8}

#: Whatever these take, they take values below zero, or integers of 64 bits.
BELOW_ZERO = ("lr_scaler", "lr_adjust_steps")
LONG = ("seed", "shuffle_seed", "tokens")

HUGE = "9" * 5000
NOT_FINITE = ("inf", "-inf", "nan", "+nan")


def plain(annotation: Any) -> list[Any]:
    """The types that an annotation comes to, without bounds and None."""
    if get_origin(annotation) is Annotated:
        return plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in plain(part)]
    return [] if annotation is type(None) else [annotation]


def wrong(name: str, annotation: Any) -> st.SearchStrategy[str]:
    """TOML that no value of this annotation is written as, or is beyond every use."""
    kinds = plain(annotation)
    texts = st.text("abcxyz", min_size=1, max_size=5).map(lambda text: f'"no{text}"')
    numbers = st.integers(-9, 9).map(str) | st.floats(0.1, 9).map(repr)
    truths = st.sampled_from(["true", "false"])
    tables = st.sampled_from(["[]", "[[]]", "{}", "{ a = 1 }", "[[1], 2]", "1979-05-27"])
    drawn: list[st.SearchStrategy[str]] = [tables, st.just(HUGE)]
    if str in kinds:
        return st.one_of(*drawn, numbers, truths)
    if any(get_origin(kind) is Literal for kind in kinds):
        return st.one_of(*drawn, numbers, truths, texts)
    if bool in kinds:
        return st.one_of(*drawn, numbers, texts)
    if int in kinds or float in kinds:
        drawn += [texts, truths, st.sampled_from(NOT_FINITE)]
        if int in kinds:
            drawn.append(st.floats(0.1, 0.9).map(repr))
        if name not in BELOW_ZERO:
            drawn.append(st.integers(-(10**6), -1).map(str))
        if int in kinds and name not in LONG:
            drawn.append(st.just(str(10**18)))
        return st.one_of(*drawn)
    (kind,) = kinds
    assert get_origin(kind) is tuple, f"{name}: what is wrong for {annotation}?"
    no_selectors = ('""', '"re:("', '"klass:A"') if name in ("targets", "ignore") else ()
    wrong_entry = [f'["*", {value}]' for value in ("1", "true", "nan", "[]", *no_selectors)]
    wrong_pair = ["[0.9]", "[2, -1]", "[0.9, inf]", "[0.9, 0.95, 0.99]", '["0.9", 0.95]']
    entries = wrong_pair if float in plain(get_args(kind)[0]) else wrong_entry
    return st.one_of(numbers, truths, texts, st.sampled_from(entries), st.just(HUGE))


def keys() -> list[tuple[str, list[str], str, Any]]:
    """(id, overrides that choose the table, path of the key, its annotation)."""
    found = []
    for section, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            for name, hint in get_type_hints(kind, include_extras=True).items():
                if name in kind.model_fields:
                    found.append((f"{section}.{name}", [], f"{section}.{name}", hint))
    for section, table in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        for record in table.values():
            given = {"name": record.name} | ({"lr": 0.01} if section == "optimizer" else {})
            found += of_record(record, section, given, f"{section}={{%s}}")
    for record in REGISTRY.values():
        found += of_record(record, "passes.0", {"use": record.name}, "passes=[{%s}]")
    return found


def of_record(record, path, given, override):
    hints = get_type_hints(record, include_extras=True)
    names = [field.name for field in recipe_fields(record)]
    given |= {name: REQUIRED[name] for name in names if name in REQUIRED}
    text = override % ", ".join(f"{key} = {value!r}" for key, value in given.items())
    return [(f"{path}.{record.name}.{n}", [text], f"{path}.{n}", hints[n]) for n in names]


KEYS = keys()


@pytest.mark.parametrize(("table", "path", "annotation"), [k[1:] for k in KEYS], ids=[k[0] for k in KEYS])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_wrong_value_is_refused_by_its_key(table, path, annotation, data):
    name = path.rpartition(".")[2]
    value = data.draw(wrong(name, annotation))
    with pytest.raises(RecipeError) as error:
        parse_recipe(BASE, "test", [*table, f"{path}={value}"])
    assert name in str(error.value)
    assert str(error.value).startswith((f"test: {path.split('.')[0]}", f"override '{path}"))
    assert all(len(line) < 300 for line in str(error.value).splitlines())


def test_every_table_is_drawn_from():
    drawn = {key[0].partition(".")[0] for key in KEYS}
    assert drawn | {"description", "strict"} == set(Recipe.model_fields)


@pytest.mark.parametrize("key", ["steps", "batch_size", "seed"])
def test_a_literal_of_thousands_of_digits_in_a_file(key):
    text = BASE.replace("[train]\n", f"[train]\n{key} = {HUGE}\n" if key == "seed" else "[train]\n")
    text = text.replace(f"{key} = 100\n", f"{key} = {HUGE}\n").replace(
        f"\n{key} = 4\n", f"\n{key} = {HUGE}\n"
    )
    with pytest.raises(RecipeError, match="test: not valid TOML: a number has too many digits") as error:
        parse_recipe(text, "test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", "inf"),
        ("lr", HUGE),
        ("num_training_steps", str(10**18)),
        ("num_training_steps", HUGE),
        ("max_train_tokens", "9" * 400 + "B"),
        ("batch_size", "0"),
        ("max_length", "-1"),
        ("loro_lr_scaler", "fast"),
    ],
)
def test_wrong_values_of_old_options(option, value):
    given = {"model_config": "llama_60m", "lr": "0.01", "max_train_tokens": "10M", "total_batch_size": "0"}
    given |= {"optimizer": "loro_adamw", "loro_scope": "all", "cosine_restart_freq": "500", option: value}
    if option == "num_training_steps":
        del given["max_train_tokens"]
    if option != "batch_size":
        given["total_batch_size"] = "512"
    words = [word for name, text in given.items() for word in (f"--{name}", text)]
    with pytest.raises(RecipeError) as error:
        recipe_from_flags(words)
    assert max(map(len, str(error.value).splitlines())) < 6000
