"""Every option of run_c4.py: what it becomes, that it had no effect, or why it cannot be had."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from slow import slow_but

from act24.llama import LlamaForCausalLM
from act24.passes import Pipeline
from act24.recipes.checks import oddities
from act24.recipes.flags import FLAGS
from act24.recipes.from_flags import Translation, recipe_from_flags
from act24.recipes.load import RecipeError, parse_recipe
from act24.recipes.schema import Recipe

BASE = "--model_config configs/llama_130m.json --batch_size 64"
RELU2 = "--squ_relu relu2 --activation_2by4 True"
LORO = "--optimizer loro_adamw --loro_scope all"
COLA = "--optimizer cola_adamw --loro_scope all"
LOST = "--optimizer lost_adamw --loro_scope all"
WEIGHTS = "--optimizer adamw --enable_2to4_sparse True"
SOFT = f"{RELU2} --activation_sparse_method soft_threshold"
RESTART = "--scheduler cosine_restart --cosine_restart_freq 500"


def translate(*parts: str) -> Translation:
    return recipe_from_flags(" ".join(parts).split())


def at(recipe: Recipe, key: str) -> Any:
    """The value at a dotted key; a pass by its name, True if only the pass is named, None without it."""
    head, *rest = key.split(".")
    if head != "passes":
        return getattr(getattr(recipe, head), rest[0])
    found = [p for p in recipe.passes if p.name == rest[0]]
    if not found:
        return None
    return getattr(found[0], rest[1]) if rest[1:] else True


# (option with value, what else the command needs, key, value of the recipe)
MAPPED: list[tuple[str, str, str, Any]] = [
    (
        "--attn_2by4 True --mlp_2by4 False",
        "--optimizer adamw --enable_2to4_sparse True",
        "passes.weight24.scope",
        "attn",
    ),
    ("--mlp_2by4 True", "--optimizer adamw --enable_2to4_sparse True", "passes.weight24.scope", "mlp"),
    ("--enable_2to4_sparse True", "--optimizer adamw", "passes.weight24.method", "soft_threshold"),
    ("--enable_2to4_sparse True", f"{LORO} --loro_type eucl", "passes.weight24", True),
    ("--activation_2by4 True", "--squ_relu relu2", "passes.activation24", True),
    ("--squ_relu relu2", "", "passes.relu2_ffn.activation", "relu2"),
    ("--squ_relu relu", "", "passes.relu2_ffn.activation", "relu"),
    ("--squ_relu silu", "", "passes.relu2_ffn", None),
    *(
        (f"--activation_sparse_method {m}", RELU2, "passes.activation24.method", m)
        for m in ("naive", "mvue", "soft_threshold_weights", "soft_dynamic")
    ),
    ("--permute_2by4 False", RELU2, "passes.activation24.token_permutation", "none"),
    ("--permute_2by4 True", RELU2, "passes.activation24.token_permutation", "batch"),
    (
        "--permute_2by4 False",
        f"{RELU2} --dx_direct_sparse 3",
        "passes.activation24.token_permutation",
        "none",
    ),
    ("--activation_2by4 True", "--squ_relu relu2", "passes.activation24.token_permutation", "none"),
    ("--cola_silu False", LOST, "passes.lost.bottleneck", "none"),
    ("--cola_silu True", LOST, "passes.lost.bottleneck", "silu"),
    ("--optimizer lost_adamw", "--loro_scope all", "passes.lost.bottleneck", "silu"),
    ("--cola_sparse_method cola_init", COLA, "passes.cola.init", "cola"),
    (
        "--dynamic_activation_steps 7",
        f"{RELU2} --activation_sparse_method soft_dynamic",
        "passes.activation24.dynamic_steps",
        7,
    ),
    ("--activation_calibration_samples 50", RELU2, "passes.activation24.calibration_samples", 50),
    ("--activation_dense_warmup_steps 30", RELU2, "passes.activation24.from_step", 30),
    ("--dx_direct_sparse 1", RELU2, "passes.activation24.backward", "split_gemm"),
    ("--dx_direct_sparse 2", RELU2, "passes.activation24.backward", "sparse"),
    ("--dx_direct_sparse 3", RELU2, "passes.activation24.backward", "dense"),
    ("--wandb_sparsityrelu True", "", "log.activation_statistics", True),
    ("--c4_local False", "", "data.source", "hf"),
    ("--c4_local True", "", "data.source", "files"),
    ("--train_data_path a/*.json.gz", "", "data.train_files", ("a/*.json.gz",)),
    ("--val_data_path b/*.json.gz", "", "data.heldout_files", ("b/*.json.gz",)),
    ("--batch_size 32", "", "train.batch_size", 32),
    ("--gradient_accumulation 4", "", "train.total_batch_size", 256),
    ("--total_batch_size 512", "", "train.total_batch_size", 512),
    ("--max_length 128", "", "data.max_length", 128),
    ("--optimizer AdamW", "", "optimizer.name", "adamw"),
    ("--optimizer adam", "", "optimizer.name", "adamw"),
    ("--optimizer loro_adamw", "--loro_scope all", "optimizer.name", "loro_adamw"),
    ("--optimizer cola_adamw", "--loro_scope all", "passes.cola", True),
    ("--optimizer lost_adamw", "--loro_scope all", "passes.lost", True),
    ("--lr 0.01", "", "optimizer.lr", 0.01),
    ("--scheduler const", "", "schedule.name", "constant"),
    ("--scheduler linear", "", "schedule.name", "linear"),
    ("--scheduler cosine_restart", "--cosine_restart_freq 500", "schedule.name", "cosine_restart"),
    ("--scheduler cosine_restart_zero", "--cosine_restart_freq 500", "schedule.name", "cosine_restart"),
    ("--cosine_restart_freq 250", "--scheduler cosine_restart", "schedule.restart_every", 250),
    ("--cosine_restart_warmup 9", RESTART, "schedule.restart_warmup_steps", 9),
    ("--lr_jag_after_warmup", RESTART, "schedule.restart_in_warmup", False),
    ("--lr_adjust_steps -2000", RESTART, "schedule.lr_adjust_steps", -2000),
    ("--min_lr_ratio 0.2", "", "schedule.min_lr_ratio", 0.2),
    ("--activation_checkpointing", "", "train.activation_checkpointing", True),
    ("--weight_decay 0.1", "", "optimizer.weight_decay", 0.1),
    ("--warmup_steps 77", "", "schedule.warmup_steps", 77),
    ("--eval_every 123", "", "eval.every", 123),
    ("--num_training_steps 4321", "", "train.steps", 4321),
    (
        "--max_train_tokens 100M",
        "--total_batch_size 512 --warmup_steps 10",
        "train.steps",
        10**8 // (512 * 256),
    ),
    (
        "--max_train_tokens 1.1B",
        "--total_batch_size 512 --warmup_steps 10",
        "train.steps",
        11 * 10**8 // (512 * 256),
    ),
    ("--save_every 55", "", "checkpoint.every", 55),
    ("--dtype float32", "", "train.dtype", "float32"),
    ("--dtype bf16", "", "train.dtype", "bfloat16"),
    ("--seed 43", "", "train.seed", 43),
    ("--lost_sparsity 0.01", LOST, "passes.lost.sparsity", 0.01),
    ("--lost_sparse_method gradient", LOST, "passes.lost.method", "gradient"),
    ("--lost_sparse_svd_rank 128", f"{LOST} --lost_sparse_method svd", "passes.lost.svd_rank", 128),
    ("--lost_gamma 0.25", LOST, "passes.lost.gamma", 0.25),
    ("--momentum_reset_steps 200", "", "optimizer.momentum_reset_steps", 200),
    ("--more_activation_relu2 True", COLA, "passes.cola.bottleneck", "relu2"),
    ("--more_activation_relu2 True", LOST, "passes.lost.bottleneck", "relu2"),
    ("--loro_type eucl", LORO, "optimizer.type", "eucl"),
    ("--loro_freq 500", LORO, "optimizer.exact_every", 500),
    ("--loro_refresh all --loro_refresh_freq 250", LORO, "optimizer.refresh", "all"),
    ("--loro_refresh_freq 250", f"{LORO} --loro_refresh all", "optimizer.refresh_every", 250),
    ("--loro_refresh all", LORO, "optimizer.refresh", "none"),  # its frequency defaults to 0
    ("--loro_attn_rank 64", LORO, "passes.low_rank.attn_rank", 64),
    ("--loro_mlp_rank 96", COLA, "passes.cola.mlp_rank", 96),
    ("--loro_init auto", LORO, "passes.low_rank.init", "auto"),
    ("--loro_scope attn", "--optimizer loro_adamw", "passes.low_rank.scope", "attn"),
    ("--loro_scope None", "--optimizer loro_adamw", "passes.low_rank", None),
    ("--loro_lr_scaler -1", LORO, "optimizer.lr_scaler", -1.0),
    ("--loro_lr_scaler -1", f"{LORO} --loro_type eucl", "optimizer.lr_scaler", 1.0),
    ("--weight_decay 0.1", LORO, "optimizer.decay", "matrices_and_embeddings"),
    ("--weight_decay 0.1", "--optimizer loro_adamw", "optimizer.decay", "matrices_and_embeddings"),
    ("--weight_decay 0.1", LOST, "optimizer.decay", "all"),
    ("--weight_decay 0.1", "--optimizer cola_adamw", "optimizer.decay", "all"),
    ("--enable_2to4_sparse True", "--optimizer adamw", "optimizer.betas", (0.9, 0.95)),
    ("--scheduler const", "--warmup_steps 100", "schedule.warmup_steps", 0),
    ("--scheduler linear", "--min_lr_ratio 0.1", "schedule.min_lr_ratio", 0.0),
    ("--scheduler cosine", "--warmup_steps 100", "schedule.skip_zero", True),
    ("--scheduler cosine", "--warmup_steps 0", "schedule.skip_zero", False),
    ("--model_config configs/llama_1b.json", "", "model.preset", "llama-1b"),
]

# (option with value, what else the command needs, part of the remark)
EXPLAINED: list[tuple[str, str, str]] = [
    ("--eval_commonsense True", "", "lm-eval"),
    ("--flip_rate True", "", "weight24"),
    ("--sparse_init_scale 2.0", "", "never had an effect"),
    ("--activation_soft_threshold True", "", "never had an effect"),
    ("--use_hf_model", RELU2, "without effect beside it"),
    ("--continue_from ckpt/model_1000", "", "--resume"),
    ("--save_ckpt True", "", "always saved"),
    ("--save_dir out", "", "--run-dir FOLDER"),
    ("--tags a,b", "", "never had an effect"),
    ("--workers 4", "", "no counterpart"),
    ("--name run", "", "never had an effect"),
    ("--grad_clipping 0.5", "", "never had an effect"),
    ("--beta1 0.9", "", "adafactor"),
    ("--rank 256", "", "GaLore"),
    ("--update_proj_gap 200", "", "GaLore"),
    ("--galore_scale 0.25", "", "GaLore"),
    ("--proj_type std", "", "GaLore"),
    ("--cola_silu True", COLA, "always has its SiLU"),
    ("--cola_sparse_method svd", COLA, "random factors"),
    ("--cola_sparse_method svd", LOST, "as published"),
    ("--lost_sparse_svd_inverse", LOST, "of --lost_sparse_method svd"),
    ("--lost_sparse_svd_inverse", COLA, "of LoST"),
    ("--lost_sparse_svd_inverse", f"{LOST} --lost_sparse_method svd", "is left out"),
    ("--loro_fallback_freq 10", LORO, "never had an effect"),
    ("--loro_mlp_dense", LORO, "never had an effect"),
    ("--single_gpu", "", "one process"),
    # Options with a key that do nothing in this command.
    ("--attn_2by4 True", "", "need --enable_2to4_sparse"),
    ("--mlp_2by4 False", WEIGHTS, "neither --attn_2by4 nor"),
    ("--enable_2to4_sparse True", LORO, "exact step"),
    ("--enable_2to4_sparse True", COLA, "adamw and loro_adamw only"),
    ("--enable_2to4_sparse True", f"--optimizer adamw {RELU2}", "dense inputs"),
    ("--activation_2by4 True", "--squ_relu relu", "need --activation_2by4 True and --squ_relu relu2"),
    ("--activation_sparse_method mvue", "", "need --activation_2by4"),
    ("--dx_direct_sparse 1", "", "need --activation_2by4"),
    ("--dynamic_activation_steps 3", RELU2, "of soft_dynamic"),
    ("--lost_gamma 0.3", COLA, "of LoST"),
    ("--lost_sparse_svd_rank 128", LOST, "of --lost_sparse_method svd"),
    ("--loro_init xavier", COLA, "start as published"),
    ("--loro_freq 500", COLA, "plain AdamW"),
    ("--loro_type loro", LOST, "plain AdamW"),
    ("--more_activation_relu2 True", LORO, "LORO has no activation"),
    ("--more_activation_relu2 True", "--optimizer adamw", "only LORO, CoLA and LoST"),
    ("--loro_attn_rank 64", "--optimizer cola_adamw", "only LORO, CoLA and LoST"),
    ("--lr_adjust_steps -2000", "", "of the cosine_restart schedules"),
    ("--lr_jag_after_warmup", "", "of the cosine_restart schedules"),
    ("--min_lr_ratio 0.1", "--scheduler const", "constant schedule"),
    ("--train_data_path x", "--c4_local False", "from the Hub"),
    ("--gradient_accumulation 8", "--total_batch_size 512", "follows from"),
    ("--num_training_steps 10", "--max_train_tokens 1B", "beside --max_train_tokens"),
    # Changed meanings.
    ("--dtype bfloat16", "", "second moment"),
    ("--permute_2by4 True", RELU2, "within each sequence"),
    ("--activation_sparse_method soft_dynamic", RELU2, "optimizer updates"),
    ("--activation_sparse_method soft_threshold_weights", RELU2, "about 1.48"),
    ("--dx_direct_sparse 3", RELU2, "straight through"),
    ("--momentum_reset_steps 200", "", "after the very first"),
    ("--loro_refresh reg", f"{LORO} --loro_refresh_freq 5", "signs of singular vectors"),
    ("--max_train_tokens 1M", "--warmup_steps 10", "max_length times as long"),
]


@pytest.mark.parametrize(("option", "needs", "key", "value"), MAPPED)
def test_becomes_a_key(option: str, needs: str, key: str, value: Any) -> None:
    translation = translate(BASE, needs, option)
    assert at(translation.recipe, key) == value


@pytest.mark.parametrize(("option", "needs", "remark"), EXPLAINED)
def test_is_explained(option: str, needs: str, remark: str) -> None:
    """By its own remark, or by what is said to change results, which the recipe's text says too."""
    translation = translate(BASE, needs, option)
    (own,) = [r for r in translation.remarks if r.option.split()[0] == option.split()[0]]
    changed = [line for line in translation.changes if line.split(":")[0].split()[0] == option.split()[0]]
    assert remark in " ".join([str(own), *changed])
    assert all(f"#   {line}\n" in translation.text for line in changed)
    assert (f"#   {own}\n" in translation.text) == (own.effect != "none")


def test_the_table_has_every_option() -> None:
    tested = {row[0].split()[0].lstrip("-") for row in (*MAPPED, *EXPLAINED)}
    assert {flag.name for flag in FLAGS} == tested
    assert len(FLAGS) == 75


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_given_option_is_remarked_once(flag: Any) -> None:
    values = {"bool": "True", "int": "3", "float": "0.3", "tokens": "10M", "flag": "", "str": "x"}
    value = flag.choices[-1] if flag.choices else values[flag.kind]
    sensible = {
        "optimizer": "adamw",
        "model_config": "llama_60m",
        "total_batch_size": "128",
        "cosine_restart_freq": "50",
        "lr_adjust_steps": "-20",
        "num_training_steps": "2000",
        "max_train_tokens": "1B",
    }
    translation = translate(BASE, RESTART, f"--{flag.name} {sensible.get(flag.name, value)}")
    assert sum(remark.option.split()[0] == f"--{flag.name}" for remark in translation.remarks) == 1


def test_unused_options_change_nothing() -> None:
    plain = translate(BASE).recipe
    unused = [f for f in FLAGS if f.unused]
    assert {f.name for f in unused} >= {"tags", "name", "grad_clipping", "sparse_init_scale", "rank"}
    for flag in unused:
        value = {"bool": "True", "int": "3", "float": "0.3", "flag": "", "str": "x"}[flag.kind]
        translation = translate(BASE, f"--{flag.name} {value}")
        assert translation.recipe == plain
        assert [r.effect for r in translation.remarks if r.option.startswith(f"--{flag.name}")] == ["none"]


def test_remarks_are_sorted_by_what_they_change() -> None:
    """What changes results first, in a block of its own; what has no effect in one line at the end."""
    text = translate(BASE, RELU2, COLA, "--tags a --name b --lr 0.1 --loro_freq 5").text
    comments = text.partition("\n\n[model]")[0].splitlines()
    titles = [line for line in comments if re.match(r"# \S.*:", line)]
    assert [title.split(":")[0] for title in titles[:2]] == ["# Changes results", "# As it was"]
    assert titles[2:] == ["# No effect: --tags a; --name b; --loro_freq 5"]
    assert comments[-1] == titles[2]
    assert "#   --lr 0.1 → optimizer.lr" in comments[comments.index("# As it was:") :]


def test_what_train_would_warn_of_is_warned_of() -> None:
    translation = translate(
        BASE, RELU2, RESTART, "--momentum_reset_steps 200 --activation_dense_warmup_steps 20000"
    )
    assert translation.warnings == tuple(oddities(translation.recipe))
    assert len(translation.warnings) == 2
    assert all(f"#   {line}\n" in translation.text for line in translation.warnings)


def test_without_a_scope_the_layers_stay_dense_and_that_is_said() -> None:
    translation = translate(BASE, "--optimizer loro_adamw --loro_freq 10")
    assert translation.recipe.optimizer.name == "adamw"
    assert '--optimizer loro_adamw → optimizer.name = "adamw": no --loro_scope' in translation.text


@pytest.mark.parametrize(
    ("written", "modern"),
    [
        (f"{RELU2} --2by4_permute False", f"{RELU2} --permute_2by4 False"),
        ("--cola_init True", "--cola_sparse_method cola_init"),
        ("--optimizer adamw_cola --loro_scope all", COLA),
        ("--optimizer adamw_lost --loro_scope mlp", "--optimizer lost_adamw --loro_scope mlp"),
        ("--squ_relu True --activation_2by4 True", RELU2),
        (f"{RELU2} --dx_direct_sparse False", f"{RELU2} --dx_direct_sparse 1"),
        (f"{RELU2} --dx_direct_sparse True", f"{RELU2} --dx_direct_sparse 2"),
        (
            f"{RELU2} --activation_sparse_method soft_threshold",
            f"{RELU2} --activation_sparse_method soft_threshold_weights",
        ),
    ],
)
def test_old_spellings(written: str, modern: str) -> None:
    old, new = translate(BASE, written), translate(BASE, modern)
    assert old.recipe == new.recipe
    assert any("old spelling" in line for line in old.spellings)
    assert new.spellings == ()


def test_cola_init_false_leaves_the_factors_as_loro_init_made_them() -> None:
    recipe = translate(BASE, COLA, "--loro_init auto --cola_init False").recipe
    assert at(recipe, "passes.cola.init") == "auto"
    assert at(translate(BASE, COLA, "--loro_init auto --cola_init True").recipe, "passes.cola.init") == "cola"


@pytest.mark.parametrize(
    "written",
    ["--max_len 128", "--max_length=128", "--max-length 128", "\\ --max_length 128 \\"],
)
def test_spellings_that_argparse_and_shells_allow(written: str) -> None:
    assert translate(BASE, written).recipe.data.max_length == 128


def test_a_whole_command_line() -> None:
    translation = translate("torchrun --nproc_per_node 4 run_c4.py", BASE, "--lr 0.01")
    assert translation.recipe.optimizer.lr == 0.01
    assert "processes are not of the recipe" in translation.spellings[0]
    assert translate("--lr 0.5 --tag a.py", BASE, "--name b.py").recipe.optimizer.lr == 0.5  # no script
    assert (
        translate("A=1 python -m torch.distributed.run --nnodes=1 a.py", BASE, "--lr 0.5").recipe.optimizer.lr
        == 0.5
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{BASE} --batchsize 3", "did you mean 'batch_size'"),
        (f"{BASE} --permute_2by8 True", "did you mean 'permute_2by4'"),
        (f"{BASE} --loro 3", "--loro may be --loro_type or"),
        (f"{BASE} --lr", "--lr needs a value"),
        (f"{BASE} --lr --seed 3", "--lr needs a value"),
        (f"{BASE} --lr fast", "--lr takes a number, not 'fast'"),
        (f"{BASE} --use_hf_model=False", "--use_hf_model takes no value, not 'False'"),
        (f"{BASE} --seed 1.5", "--seed takes a whole number"),
        (f"{BASE} --flip_rate maybe", "--flip_rate takes True or False"),
        (f"{BASE} --cola_init maybe", "--cola_init takes True or False"),
        (f"{BASE} --squ_relu relu3", "did you mean 'relu"),
        (f"{BASE} --dx_direct_sparse 4", "choose from 1, 2, 3"),
        (f"{BASE} --max_train_tokens lots", "K, M or B"),
        (f"{BASE} --optimizer galore_adamw", "no optimizer like --optimizer galore_adamw"),
        (f"{BASE} --scheduler cosine_restart", "needs --cosine_restart_freq"),
        (f"{BASE} stray", "'stray' belongs to no option"),
        ("--batch_size 64", "needs --model_config"),
        ("", "needs --model_config and --batch_size"),
        ("--batch_size 64 --model_config llama_131m", "did you mean 'llama-130m'"),
    ],
)
def test_what_cannot_be_translated(command: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        recipe_from_flags(command.split())


def test_defaults_are_those_of_the_script() -> None:
    recipe = translate(BASE).recipe
    assert recipe.optimizer.lr == 1e-4
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.optimizer.weight_decay == 0.0
    assert recipe.train.grad_clip == 0.0
    assert recipe.train.total_batch_size == 64
    assert (recipe.train.steps, recipe.schedule.warmup_steps) == (10_000, 1000)
    assert (recipe.data.rows, recipe.data.max_length) == ("padded", 256)
    assert recipe.train.dtype == "bfloat16"
    assert recipe.optimizer.state_dtype == "float32"
    assert recipe.passes == ()


def test_exact_steps_refuse_sparse_factors_in_any_recipe() -> None:
    text = translate(BASE, LORO, "--loro_attn_rank 8 --loro_mlp_rank 8").text
    sparse = '\n[[passes]]\nuse = "weight24"\nmethod = "ste"\nscope = "{}"\n'
    with pytest.raises(RecipeError, match="tears a 2:4 mask"):
        parse_recipe(text + sparse.format("mlp"), "recipe")
    parse_recipe(text + sparse.format("mlp"), "recipe", ["optimizer.type=eucl"])
    attention = ["passes.low_rank.scope=attn"]
    parse_recipe(text + sparse.format("mlp"), "recipe", attention)
    with pytest.raises(RecipeError, match="tears a 2:4 mask"):
        parse_recipe(text + sparse.format("all"), "recipe", attention)


def test_the_text_is_the_recipe() -> None:
    translation = translate(BASE, RELU2, COLA, RESTART, "--more_activation_relu2 True")
    assert parse_recipe(translation.text, "printed") == translation.recipe


EXAMPLE = (
    "torchrun --nproc_per_node 1 run_c4.py --model_config configs/llama_130m.json --dtype bfloat16 "
    "--batch_size 64 --total_batch_size 512 --num_training_steps 20000 --save_every 1000 --eval_every 1000 "
    "--lr 0.0001 --scheduler cosine_restart --warmup_steps 2000 --min_lr_ratio 0.1 --cosine_restart_freq 500 "
    "--lr_adjust_steps -2000 --weight_decay 0.1 --optimizer {optimizer} --loro_refresh all "
    "--loro_refresh_freq 500 --loro_scope all --loro_init xavier --loro_attn_rank 256 --loro_mlp_rank 256 "
    "--loro_type loro --loro_freq 500 --loro_lr_scaler -1 --c4_local False --enable_2to4_sparse False "
    "--save_ckpt True --attn_2by4 True --mlp_2by4 True --seed 43 --flip_rate True --activation_2by4 True "
    "--activation_soft_threshold True --squ_relu relu2 --activation_sparse_method soft_threshold_weights "
    "--dynamic_activation_steps 10 --activation_calibration_samples 50 --activation_dense_warmup_steps 0 "
    "--dx_direct_sparse {mode} --wandb_sparsityrelu True --permute_2by4 False --momentum_reset_steps 200 "
    "--more_activation_relu2 True --cola_sparse_method cola_init"
)
QUICK = [(1, "adamw"), (2, "loro_adamw"), (3, "cola_adamw"), (3, "lost_adamw")]
ROWS = [(mode, name) for mode in (1, 2, 3) for name in ("adamw", "loro_adamw", "cola_adamw", "lost_adamw")]


@pytest.mark.parametrize(("mode", "optimizer"), slow_but(QUICK, ROWS))
def test_the_published_commands_translate_and_plan(optimizer: str, mode: int) -> None:
    translation = translate(EXAMPLE.format(optimizer=optimizer, mode=mode))
    recipe = translation.recipe
    from act24.llama import llama_config

    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(recipe.model.preset))
    report = Pipeline(model, recipe.passes).report
    sites = [row for row in report.rows if row.pass_name == "activation24"]
    inner = optimizer in ("cola_adamw", "lost_adamw")
    assert len(sites) == 12 * (1 + (6 if inner else 0))
    backward = {1: "split_gemm", 2: "sparse", 3: "dense"}[mode]
    alone = [row for row in sites if "does nothing here" in row.note]  # LoST's, outside the bottlenecks
    assert len(alone) == (12 if optimizer == "lost_adamw" and mode != 3 else 0)
    assert all("dense backward" in row.after for row in alone)
    assert all(f"{backward} backward" in row.after for row in sites if row not in alone)
    assert any("no token permutation" in row.note for row in sites) == (mode != 3)
    assert recipe.optimizer.momentum_reset_steps == 200
    if optimizer == "loro_adamw":
        assert (recipe.optimizer.exact_every, recipe.optimizer.refresh_every) == (500, 500)
