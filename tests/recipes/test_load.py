"""Recipes from text: order of precedence, words for every mistake, and what the shipped ones come to."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from slow import slow_but

from act24.errors import Act24Error
from act24.llama import PRESETS, llama_config
from act24.passes import REGISTRY, Activation24, Relu2FFN
from act24.recipes.load import (
    RecipeError,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_source,
)
from act24.recipes.schema import Recipe, Section
from act24.tools.huggingface.config import config_json
from act24.tools.run.build import build, plan_recipe

GOLDEN = Path(__file__).with_name("golden")

SMALL = """
[model]
preset = "llama-9m"
[train]
steps = 10
batch_size = 2
total_batch_size = 4
[optimizer]
lr = 1e-3
"""

#: Millions of parameters as published (ReLoRA, GaLore).
PUBLISHED = {"60m": 58.07, "130m": 134.11, "350m": 367.97, "1b": 1339.08}


def changed(**sections):
    """SMALL with lines put in front of those of a section, or a new section."""
    text = SMALL
    for name, lines in sections.items():
        header = f"[{name}]\n"
        text = text.replace(header, header + lines + "\n") if header in text else f"{text}{header}{lines}\n"
    return text


def errors(text, *overrides):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "mine.toml", overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_whole(name):
    recipe = load_recipe(name)
    assert recipe.description
    text = dump_recipe(recipe)
    assert parse_recipe(text, "again") == recipe
    assert dump_recipe(parse_recipe(text, "again")) == text
    assert recipe.optimizer.lr == load_recipe(name, ["train.seed=7"]).optimizer.lr


def on_a_model(recipe):
    """What starts from a trained model, from one of the least preset's shape."""
    if recipe.model.pretrained is None:
        return recipe
    config = json.dumps(config_json(llama_config("llama-9m"), "llama", torch.float32))
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})


def figures(name):
    """The resolved recipe, and its plan."""
    recipe = load_recipe(name)
    pipeline = plan_recipe(on_a_model(recipe))
    return f"{dump_recipe(recipe)}\n{pipeline}\n", pipeline


#: 12 and 24 layers are planned as 8 are, and take several times as long as all others together.
_QUICK = ("branch-24", "c4/60m-cola-relu2-act24", "c4/60m-loro-relu2-act24", "c4/60m-lost-relu2-act24")
_QUICK += ("c4/60m-low-rank-restarts", "c4/60m-muon", "demo", "recover-mask", "recover-masked-lora")
_BY_SIZE = slow_but(_QUICK, recipe_names())


@pytest.mark.parametrize("name", _BY_SIZE)
def test_what_a_shipped_recipe_comes_to(name):
    """On a difference that is meant: ACT24_GOLDEN=write pytest tests/recipes, and read the diff."""
    text, pipeline = figures(name)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("ACT24_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
    size = next((size for size in PUBLISHED if name.startswith(f"c4/{size}-")), None)
    if size:
        assert round(pipeline.report.parameters_before / 1e6, 2) == PUBLISHED[size]


def test_a_plan_is_one_row_a_pass_and_fits_on_100_columns():
    for path in GOLDEN.rglob("*.txt"):
        lines = path.read_text(encoding="utf-8").partition("\nin model.layers.")[2].splitlines()[1:]
        table = lines[: next((i for i, line in enumerate(lines) if line.startswith("parameters ")), 0)]
        named = [line.split()[0] for line in table[1:] if not line.startswith(" ")]
        assert len(named) == len({*named}), path
        assert [line for line in table if len(line) > 100] == [], path


def test_no_golden_file_is_left_over():
    found = {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.txt")}
    assert found == {f"{name}.txt" for name in recipe_names()}


def test_a_strict_recipe_refuses_what_a_pass_leaves():
    """F 62 is no multiple of 4, so weight24 leaves the networks."""
    weight24 = '\n[[passes]]\nuse = "weight24"\nscope = "all"\noptional = OPTIONAL\n'
    for optional in ("false", "true"):
        for strict in ("false", "true"):
            text = f"strict = {strict}\n" + SMALL + weight24.replace("OPTIONAL", optional)
            recipe = parse_recipe(text, "small", ["model.intermediate_size=62"])
            if strict == "true" and optional == "false":
                with pytest.raises(
                    Act24Error, match=r"weight24 reaches \d+%.*multiples of 4.*strict = false"
                ):
                    plan_recipe(recipe)
            else:
                (line,) = plan_recipe(recipe).report.partial
                assert 0 < line.reached < line.total
    assert all(load_recipe(name).strict for name in recipe_names())


def test_what_was_begun_under_other_rules_goes_on():
    """A recipe is judged where a run begins, and not where its checkpoint is opened."""
    leaves = '\n[[passes]]\nuse = "weight24"\n'
    recipe = parse_recipe(f"strict = true\n{SMALL}{leaves}", "small", ["model.intermediate_size=62"])
    with pytest.raises(Act24Error, match="The recipe is strict"):
        build(recipe, torch.device("cpu"))
    assert build(recipe, torch.device("cpu"), step=1).pipeline.report.partial


def test_lost_leaves_2_4_activations_no_product_and_its_recipes_mean_that():
    recipe = load_recipe("c4/60m-lost-relu2-act24", ["model.num_hidden_layers=1"])
    *_, line = plan_recipe(recipe).report.coverage
    assert (line.reached, line.optional) == (0, True)
    recipe = load_recipe(
        "c4/60m-lost-relu2-act24", ["model.num_hidden_layers=1", "passes.activation24.optional=false"]
    )
    with pytest.raises(Act24Error, match=r"activation24 reaches 0% .* The recipe is strict"):
        plan_recipe(recipe)


def test_planning_allocates_no_weights():
    recipe = load_recipe("c4/130m-relu2-act24")
    allocated = []

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                allocated.append(result.numel())
            return result

    with Allocations():
        assert plan_recipe(recipe).report.parameters_after > 100_000_000
    assert sum(allocated) < 1000


def test_order_of_precedence(tmp_path):
    (tmp_path / "low.toml").write_text(
        changed(train="seed = 1", log="every = 2") + '[[passes]]\nuse = "cola"'
    )
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "middle.toml").write_text('extends = "../low.toml"\n[log]\nevery = 3\n')
    (tmp_path / "top.toml").write_text(
        'extends = "deeper/middle.toml"\n[train]\nsteps = 4\n[[passes]]\nuse = "relu2_ffn"\n'
    )
    recipe = load_recipe(str(tmp_path / "top.toml"), ["train.steps=5", "optimizer.betas=[0.5, 0.6]"])
    assert recipe.train.seed == 1
    assert recipe.log.every == 3
    assert recipe.train.steps == 5
    assert recipe.optimizer.betas == (0.5, 0.6)
    assert recipe.passes == (Relu2FFN(),)  # a list replaces a list
    assert recipe.checkpoint.every == Recipe.model_fields["checkpoint"].default.every
    assert load_recipe(str(tmp_path / "top.toml")).train.steps == 4


def test_a_file_extends_a_shipped_recipe(tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "c4/130m-relu2-act24"\n[train]\nbatch_size = 64\n')
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert recipe.train.batch_size == 64
    assert recipe.passes == load_recipe("c4/130m-relu2-act24").passes


@pytest.mark.parametrize("names", [("a.toml",), ("a.toml", "b.toml"), ("a.toml", "../{folder}/b.toml")])
def test_a_circle_of_extends(tmp_path, monkeypatch, names):
    names = [name.format(folder=tmp_path.name) for name in names]
    for name, parent in zip(names, (*names[1:], names[0]), strict=True):
        (tmp_path / name).write_text(f'extends = "{parent}"')
    for reference in (str(tmp_path / "a.toml"), "a.toml", "./a.toml"):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(RecipeError, match=r"extends goes in a circle: .*a\.toml → .*a\.toml|a\.toml$"):
            load_recipe(reference)


def test_overrides_are_toml_or_bare_words():
    text = changed() + '[[passes]]\nuse = "relu2_ffn"\n[[passes]]\nuse = "activation24"\n'
    given = [
        "train.dtype=float32",
        'data.source="builtin"',
        "model.tie_word_embeddings=true",
        "train.steps = 1_0",
    ]
    given += ["passes.activation24.from_step=5", "passes.0.width=keep", "description=two words = fine"]
    recipe = parse_recipe(text, "mine.toml", given)
    assert (recipe.train.dtype, recipe.data.source, recipe.train.steps) == ("float32", "builtin", 10)
    assert recipe.model.tie_word_embeddings is True
    assert recipe.description == "two words = fine"
    assert recipe.passes == (Relu2FFN(width="keep"), Activation24(from_step=5))
    assert parse_recipe(text, "mine.toml", ["passes=[]"]).passes == ()


TWO_PASSES = SMALL + 2 * '[[passes]]\nuse = "activation24"\n'

MISTAKES = {
    "unknown key": (changed(train="step = 4"), ["train.step: unknown key: did you mean 'steps'?"]),
    "unknown table": (
        SMALL.replace("[train]", "[trian]"),
        ["train: missing", "trian: unknown key: did you mean 'train'?"],
    ),
    "unknown key at the top": ('extend = "demo"\n' + SMALL, ["extend: unknown key: did you mean 'extends'?"]),
    "wrong type": (
        changed(data='max_length = "256"'),
        ["data.max_length: Input should be a valid integer, got '256'"],
    ),
    "no whole number": (
        SMALL.replace("steps = 10", "steps = 10.5"),
        ["train.steps: Input should be a valid integer, got 10.5"],
    ),
    "below the least": (
        SMALL.replace("steps = 10", "steps = 0"),
        ["train.steps: Input should be greater than 0, got 0"],
    ),
    "no such choice": (
        changed(train='dtype = "float16"'),
        ["train.dtype: Input should be 'float32', 'bfloat16' or 'bfloat16_autocast', got 'float16'"],
    ),
    "not divisible": (
        SMALL.replace("total_batch_size = 4", "total_batch_size = 5"),
        ["train.total_batch_size (5) must be a multiple of train.batch_size (2)"],
    ),
    "missing key": (SMALL.replace("lr = 1e-3", ""), ["optimizer.lr: missing"]),
    "files without a name": (
        changed(data='source = "files"'),
        ['data: source = "files" needs data.train_files, a list of globs'],
    ),
    "unknown pass": (
        SMALL + '[[passes]]\nuse = "activaton24"',
        ["passes.0.use: there is no pass named 'activaton24': did you mean 'activation24'?"],
    ),
    "unknown option of a pass": (
        SMALL + '[[passes]]\nuse = "activation24"\nfrom_stp = 4',
        ["passes.0.from_stp: unknown key: did you mean 'from_step'?"],
    ),
    "wrong type of an option": (
        SMALL + '[[passes]]\nuse = "activation24"\nfrom_step = "4"',
        ["passes.0.from_step: has to be an integer, got '4'"],
    ),
    "an option's choice": (
        SMALL + '[[passes]]\nuse = "activation24"\nbackward = "spares"',
        ["passes.0.backward: has no 'spares': did you mean 'sparse'?"],
    ),
    "step range on a structural pass": (
        SMALL + '[[passes]]\nuse = "relu2_ffn"\nfrom_step = 4',
        ["passes.0.from_step: relu2_ffn changes parameters: it holds all run long, without step range"],
    ),
    "an empty step range": (
        SMALL + '[[passes]]\nuse = "activation24"\nfrom_step = 4\nuntil_step = 4',
        ["passes.0: activation24: until_step (4) is not above from_step (4): set a later one"],
    ),
    "no name": (
        SMALL + "[[passes]]\nfrom_step = 4",
        [f'passes.0: expected a table with use = "<pass>"; choose from {", ".join(sorted(REGISTRY))}'],
    ),
    "passes as a table": (SMALL + "[passes]", ['passes: expected [[passes]] tables, each with use = "..."']),
    "warm-up longer than the run": (
        changed(schedule="warmup_steps = 10"),
        ["schedule: cosine: warmup_steps (10) has to be below total_steps (10)"],
    ),
    "several at once": (
        changed(train="step = 4", data="max_length = 0") + '[[passes]]\nuse = "none"',
        None,
    ),
    "two parents": (
        'extends = ["demo", "c4/base"]',
        ["extends names one recipe, a string, not ['demo', 'c4/base']"],
    ),
    "not TOML": ("[model", None),
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_every_mistake_has_its_path_and_the_nearest_name(text, expected):
    found = errors(text)
    assert all(line.startswith("mine.toml: ") for line in found)
    if expected is not None:
        assert sorted(line.removeprefix("mine.toml: ") for line in found) == sorted(expected)


def test_all_mistakes_are_told_at_once():
    found = errors(MISTAKES["several at once"][0])
    assert [line.split(": ")[1] for line in found] == ["passes.0.use", "data.max_length", "train.step"]


OVERRIDES = {
    "train.steps": "override 'train.steps' is not of the form key.path=value",
    "train..steps=4": "override 'train..steps=4' is not of the form key.path=value",
    "train.steps.more=4": "override 'train.steps.more': 'steps' is a value, not a table",
    "passes.0=4": "override 'passes.0': name a key of the pass, as in passes.0.optional=true",
    "passes.activation.from_step=4": "no single pass 'activation' in this recipe: did you mean",
    "passes.activation24.from_step=4": "it is there more than once: use its position",
    "passes.2.from_step=4": "no single pass '2' in this recipe",
    "extends=demo": "override 'extends': only a file extends a recipe",
    "train.stps=4": "train.stps: unknown key: did you mean 'steps'?",
    "train.steps=many": "train.steps: Input should be a valid integer, got 'many'",
}


@pytest.mark.parametrize(("override", "message"), OVERRIDES.items())
def test_wrong_overrides(override, message):
    (found,) = errors(TWO_PASSES, override)
    assert message in found


def test_recipes_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"unknown recipe 'c4/130m': did you mean 'c4/130m-\w+'\?"):
        load_recipe("c4/130m")
    with pytest.raises(RecipeError, match=r"recipe file 'nowhere\.toml' does not exist"):
        load_recipe("nowhere.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for name in ("folder", "bytes"):
        with pytest.raises(RecipeError, match=rf"{name}\.toml' cannot be read: "):
            load_recipe(str(tmp_path / f"{name}.toml"))
    (tmp_path / "orphan.toml").write_text('extends = "c4/bse"')
    with pytest.raises(RecipeError, match=r"unknown recipe 'c4/bse': did you mean 'c4/base'\?"):
        load_recipe(str(tmp_path / "orphan.toml"))
    with pytest.raises(RecipeError, match="does not exist"):
        recipe_source("../demo.toml")


@given(
    st.text(st.characters(codec="utf-8")),
    st.floats(1e-30, 1e30),
    st.lists(st.text(max_size=5).map("*".__add__)),
)
@example('a "b" \\ \t\r\n \x00\x7f 🙂', 1e-9, [])
def test_every_value_comes_back(description, rate, targets):
    recipe = parse_recipe(SMALL, "mine.toml")
    optimizer = replace(recipe.optimizer, lr=rate)
    passes = (Activation24(targets=tuple(targets), from_step=3, until_step=9),)
    recipe = recipe.model_copy(update={"description": description, "optimizer": optimizer, "passes": passes})
    assert parse_recipe(dump_recipe(recipe), "again") == recipe


def test_every_preset_and_pass_can_be_named():
    for preset in PRESETS:
        assert parse_recipe(SMALL.replace("llama-9m", preset), "mine.toml").model.preset == preset
    for name, cls in REGISTRY.items():
        assert cls.name == name
        ranks = {"attn_rank": 8, "mlp_rank": 8} if "attn_rank" in {f.name for f in fields(cls)} else {}
        options = "".join(f"{key} = {value}\n" for key, value in ranks.items())
        (made,) = parse_recipe(f'{SMALL}[[passes]]\nuse = "{name}"\n{options}', "mine.toml").passes
        assert made == cls(**ranks)


def test_a_recipe_cannot_be_changed():
    recipe = parse_recipe(SMALL, "mine.toml")
    for section in (recipe, *(value for _, value in recipe if isinstance(value, Section))):
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, name, None)


def test_what_needs_whole_parameters_is_refused_where_they_are_sharded():
    text = changed(train='parallel = "fsdp"', log="gradient_cosine_every = 10")
    assert errors(text) == [
        "mine.toml: log.gradient_cosine_every: compares gradients of whole weights: "
        'use train.parallel = "ddp"',
    ]
    assert parse_recipe(text, "mine.toml", ["train.parallel=ddp"]).train.parallel == "ddp"


def test_scale_steps_scales_what_is_a_part_of_the_run():
    """A hundredth of the run: warm-up, restarts and exact updates with it; what was set itself stands."""
    whole = load_recipe("c4/60m-loro")
    short = load_recipe("c4/60m-loro", ["train.steps=1000", "optimizer.lr=0.5"], scale_steps=True)
    assert (whole.train.steps, whole.schedule.warmup_steps, whole.schedule.restart_every) == (
        10_000,
        1000,
        500,
    )
    assert (short.train.steps, short.schedule.warmup_steps, short.schedule.restart_every) == (1000, 100, 50)
    assert (whole.schedule.lr_adjust_steps, short.schedule.lr_adjust_steps) == (-1000, -100)
    assert (whole.optimizer.exact_every, short.optimizer.exact_every) == (500, 50)
    assert short.optimizer.lr == 0.5
    kept = load_recipe("c4/60m-loro", ["train.steps=1000", "schedule.warmup_steps=7"], scale_steps=True)
    assert kept.schedule.warmup_steps == 7
    restarts = load_recipe("c4/60m-low-rank-restarts", ["train.steps=100"], scale_steps=True).schedule
    assert (restarts.restart_every, restarts.restart_warmup_steps) == (2, 2)  # 5 updates of climb do not fit
    demo = load_recipe("demo", ["train.steps=40"], scale_steps=True)
    assert [p.from_step for p in demo.passes if isinstance(p, Activation24)] == [10]
    assert demo.eval == load_recipe("demo").eval


def test_steps_that_do_not_fit_name_the_option_that_scales_them():
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", ["train.steps=30"])
    first, last = str(caught.value).splitlines()
    assert "warmup_steps (40) has to be below total_steps (30)" in first
    assert last == "--scale-steps scales them with train.steps"
    with pytest.raises(RecipeError) as caught:  # which would not help here
        load_recipe("demo", ["train.steps=30", "optimizer.lr=0"])
    assert "--scale-steps" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"needs --set train\.steps=N"):
        load_recipe("demo", ["optimizer.lr=1"], scale_steps=True)
