"""Combinations of tables: what is refused with the reason, and what is only warned about."""

import pytest

from act24.recipes.checks import oddities
from act24.recipes.load import RecipeError, dump_recipe, load_recipe, parse_recipe, recipe_names

BASE = """
[model]
preset = "llama-9m"
[train]
steps = 100
batch_size = 4
total_batch_size = 8
"""


def recipe_of(optimizer="", schedule="", passes=(), options=""):
    tables = [f"[optimizer]\nlr = 0.01\n{optimizer}", f"[schedule]\n{schedule}"]
    tables += [f'[[passes]]\nuse = "{name}"\nattn_rank = 8\nmlp_rank = 8\n{options}' for name in passes]
    return parse_recipe("\n".join([BASE, *tables]), "test")


@pytest.mark.parametrize(
    ("optimizer", "passes", "name"),
    [
        ("", (), "adamw"),
        ("", ("low_rank",), "adamw"),
        ("", ("cola",), "adamw"),
        ('name = "loro_adamw"', ("low_rank",), "loro_adamw"),
        ('name = "cola_adamw"', ("cola",), "cola_adamw"),
        ('name = "adamw_cola"', ("cola",), "cola_adamw"),
        ('name = "lost_adamw"', ("lost",), "lost_adamw"),
        ('name = "adamw_lost"', ("lost",), "lost_adamw"),
    ],
)
def test_what_makes_sense_works(optimizer, passes, name):
    recipe = recipe_of(optimizer, passes=passes)
    assert recipe.optimizer.name == name
    assert parse_recipe(dump_recipe(recipe), "again") == recipe


def test_each_name_has_the_settings_of_its_method_until_the_recipe_says_otherwise():
    loro = recipe_of('name = "loro_adamw"', passes=["low_rank"]).optimizer
    assert (loro.betas, loro.eps, loro.lr_scaler, loro.refresh) == ((0.9, 0.999), 1e-6, -1, "all")
    cola = recipe_of('name = "cola_adamw"', passes=["cola"]).optimizer
    assert (cola.betas, cola.weight_decay, cola.decay) == ((0.9, 0.999), 0.01, "all")
    other = recipe_of('name = "cola_adamw"\nweight_decay = 0.3', passes=["cola"]).optimizer
    assert (other.weight_decay, other.decay) == (0.3, "all")
    assert not hasattr(recipe_of().optimizer, "type")


@pytest.mark.parametrize(
    ("optimizer", "passes", "options", "message"),
    [
        ('name = "loro_adamw"', (), "", "no pass low_rank"),
        ('name = "loro_adamw"', ("cola",), "", 'no product of those of cola: use "cola_adamw"'),
        ('name = "loro_adamw"', ("lost",), "", 'no product of those of lost: use "lost_adamw"'),
        ('name = "cola_adamw"', ("low_rank",), "", "settings of cola"),
        ('name = "lost_adamw"', (), "", "settings of lost"),
        (
            "restarts = 5",
            ("low_rank",),
            "",
            'optimizer.restarts: belongs to name = "loro_adamw", not to "adamw"',
        ),
        ('name = "loro_adamw"\nrestarts = 5', ("low_rank",), "", "use type 'eucl'"),
        ('name = "loro_adamw"\nlr_scaler = -2.0', ("low_rank",), "", "lr_scaler"),
        ('name = "loro_adamw"', ("low_rank",), 'init = "const_0.1"', "factors of rank one"),
        ("momentum_reset_warmup = 5", (), "", "without momentum_reset_steps"),
        ("momentum_reset_steps = 5\nmomentum_reset_warmup = 5", (), "", "below momentum_reset_steps"),
        ("", ("low_rank",), 'init = "xavir"', "did you mean 'xavier'"),
        ("", ("lost",), "sparsity = 0.0", "sparsity: has to be above 0"),
    ],
)
def test_what_does_not_is_refused_with_the_reason(optimizer, passes, options, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(optimizer, passes=passes, options=options)


def test_rank_one_factors_are_fine_without_exact_updates():
    recipe_of('name = "loro_adamw"\ntype = "eucl"', passes=["low_rank"], options='init = "const_0.1"')


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("lr_adjust_steps = -10", 'lr_adjust_steps: belongs to name = "cosine_restart"'),
        ('name = "linear"\nrestart_every = 10', 'restart_every: belongs to name = "cosine_restart"'),
        ('name = "cosine_restart"', "schedule.restart_every: missing"),
        (
            'name = "cosine_restart"\nrestart_every = 10\nlr_adjust_steps = 5',
            "schedule.lr_adjust_steps: has to be",
        ),
        ('name = "cosine_restart"\nrestart_every = 10\nmin_lr_ratio = 0.0', "schedule: .*min_lr_ratio"),
        ("warmup_steps = 100", r"schedule: cosine: warmup_steps \(100\)"),
    ],
)
def test_schedules_that_do_not_exist_are_refused(schedule, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(schedule=schedule)


def test_resets_without_a_warm_up_are_listed():
    (line,) = oddities(recipe_of("momentum_reset_steps = 40"))
    assert "every 40 updates" in line
    assert "step 40, 80" in line
    assert not list(oddities(recipe_of("momentum_reset_steps = 40\nmomentum_reset_warmup = 3")))
    assert not list(oddities(recipe_of()))
    restart = 'name = "cosine_restart"\nrestart_every = 20'
    loro = 'name = "loro_adamw"\nexact_every = '
    assert not list(oddities(recipe_of(f"{loro}20", restart, ["low_rank"])))
    assert len(list(oddities(recipe_of(f"{loro}30", restart, ["low_rank"])))) == 1
    assert not list(oddities(recipe_of(f'{loro}30\nrefresh = "none"', restart, ["low_rank"])))


def test_a_pass_that_never_comes_into_force_is_said():
    text = f'{BASE}[optimizer]\nlr = 0.01\n[[passes]]\nuse = "relu2_ffn"\n[[passes]]\nuse = "activation24"\n'
    assert not list(oddities(parse_recipe(f"{text}from_step = 99", "test")))
    (line,) = oddities(parse_recipe(f"{text}from_step = 100", "test"))
    assert line.startswith(
        "passes.1.from_step: activation24 comes into force at step 100, and the run ends at 100"
    )


@pytest.mark.parametrize(
    ("evaluated", "saved", "said"), [(0, 5, True), (5, 0, True), (7, 3, True), (4, 3, False), (5, 5, False)]
)
def test_a_best_checkpoint_that_there_can_never_be_is_said(evaluated, saved, said):
    """Of 20 steps: the first step with an evaluation and a checkpoint has to be before the last."""
    overrides = ["train.steps=20", f"eval.every={evaluated}", f"checkpoint.every={saved}"]
    overrides += ["schedule.warmup_steps=2", "passes.activation24.from_step=2"]
    lines = [line for line in oddities(load_recipe("demo", [*overrides, "checkpoint.keep_best=2"]))]
    assert [line.startswith("checkpoint.keep_best = 2 keeps nothing") for line in lines] == [True] * said
    assert not [*oddities(load_recipe("demo", overrides))]


def test_very_many_resets_are_looked_at_for_a_second_at_most():
    optimizer = "momentum_reset_steps = 1"
    recipe = parse_recipe(f"{BASE}[optimizer]\nlr = 0.01\n{optimizer}", "test", ["train.steps=1_000_000_000"])
    (line,) = oddities(recipe)
    assert "or more" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer.vocab_size=32001"], "tokenizer.vocab_size: 32001 .* model.vocab_size = 32000"),
        (["model.vocab_size=300"], "tokenizer.vocab_size: 4096 .* model.vocab_size = 300"),
        (["model.hidden_size=130"], "model: hidden_size 130 is not a multiple"),
    ],
)
def test_a_model_that_fits_neither_itself_nor_the_tokenizer_is_refused(overrides, message):
    text = f"{BASE}[optimizer]\nlr = 0.01"
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, "test", overrides)
    for elsewhere in ("tokenizer.name=google-t5/t5-base", "tokenizer.vocab_size=300"):
        parse_recipe(text, "test", ["model.vocab_size=300", elsewhere])


#: Steps at which LORO's published scripts refresh without warming up again.
UNWARMED = {
    "60m": "1000",
    "130m": "2000",
    "350m": "2000, 2500, 3000, 3500, 4000, 4500 and 3 more",
    "1b": "10000",
}


@pytest.mark.parametrize("size", UNWARMED)
def test_the_published_settings_have_the_published_gaps(size):
    (line,) = oddities(load_recipe(f"c4/{size}-loro"))
    assert f"step {UNWARMED[size]}:" in line


def test_every_low_rank_recipe_ships():
    for size in UNWARMED:
        for method in ("loro", "cola", "lost"):
            for variant in ("", "-relu2-act24"):
                recipe = load_recipe(f"c4/{size}-{method}{variant}")
                assert recipe.optimizer.name == f"{method}_adamw"
                assert ("activation24" in [p.name for p in recipe.passes]) == bool(variant)
    assert load_recipe("c4/60m-loro-eucl").optimizer.type == "eucl"
    assert "c4/60m-low-rank-restarts" in recipe_names()
