"""The published commands of run_c4.py, as they were typed but for the module: trained at toy size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from act24.errors import Act24Error
from act24.recipes.from_flags import recipe_from_flags
from act24.recipes.load import parse_recipe
from act24.tools.commands.cli import app
from act24.tools.commands.run_c4 import SET, TRANSLATED, main, run
from act24.tools.run.lock import RunError

SHARED = (
    "torchrun --nproc_per_node 1 run_c4.py --model_config configs/llama_130m.json --dtype bfloat16 "
    "--batch_size 64 --total_batch_size 512 --num_training_steps 20000 --save_every 1000 --eval_every 1000 "
    "--lr 0.0001 --scheduler cosine_restart --warmup_steps 2000 --min_lr_ratio 0.1 --cosine_restart_freq 500 "
    "--lr_adjust_steps -2000 --weight_decay 0.1 --loro_refresh all --loro_refresh_freq 500 --loro_scope all "
    "--loro_init xavier --loro_attn_rank 256 --loro_mlp_rank 256 --loro_type loro --loro_freq 500 "
    "--loro_lr_scaler -1 --c4_local False --save_ckpt True --seed 43 "
)
SPARSE = SHARED + (
    "--enable_2to4_sparse False --attn_2by4 True --mlp_2by4 True --flip_rate True --activation_2by4 True "
    "--activation_soft_threshold True --squ_relu relu2 --activation_sparse_method soft_threshold_weights "
    "--dynamic_activation_steps 10 --activation_calibration_samples 50 --activation_dense_warmup_steps 0 "
    "--wandb_sparsityrelu True --permute_2by4 False --momentum_reset_steps 200 --more_activation_relu2 True "
    "--cola_sparse_method cola_init "
)
COMMANDS = {
    f"{optimizer}, dx_direct_sparse {mode}": f"{SPARSE} --optimizer {optimizer} --dx_direct_sparse {mode}"
    for optimizer in ("adamw", "loro_adamw", "cola_adamw", "lost_adamw")
    for mode in (1, 2, 3)
} | {
    "usage: CoLA": f"{SHARED} --optimizer adamw_cola --cola_silu True --cola_init True",
    "usage: LoST": f"{SHARED} --optimizer adamw_lost --lost_sparsity 0.01 --lost_sparse_method random "
    "--lost_sparse_svd_rank 256 --lost_gamma 0.25 --cola_silu False --cola_init False",
    "usage: LORO": f"{SHARED} --optimizer loro_adamw",
    "usage: LoST by singular values": f"{SHARED} --optimizer adamw_lost --lost_sparsity 0.01 "
    "--lost_sparse_method svd --lost_gamma 0.25",
    "sparsity: full rank": "torchrun --nproc_per_node 1 run_c4.py --model_config configs/llama_130m.json "
    "--squ_relu relu2 --activation_2by4 True --wandb_sparsityrelu True --batch_size 64 --c4_local False "
    "--optimizer adamw --scheduler cosine_restart --cosine_restart_freq 500 --lr_adjust_steps -2000 "
    "--activation_dense_warmup_steps 2",
}
#: Where another one takes the same ways.
SLOW = (
    "dx_direct_sparse 1",
    "dx_direct_sparse 2",
    "LoST by singular values",
    "usage: LoST",
    "usage: CoLA",
    "usage: LORO",
)
TOY = [
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "tokenizer.name=bpe",
    "tokenizer.vocab_size=300",
    "data.source=files",
    "data.max_length=16",
    "train.steps=5",
    "train.batch_size=4",
    "train.total_batch_size=8",
    "schedule.warmup_steps=1",
    "schedule.restart_every=2",
    "schedule.restart_warmup_steps=1",
    "schedule.lr_adjust_steps=-2",
    "eval.every=0",
    "eval.tokens=500",
    "checkpoint.every=0",
    "log.every=1",
    "passes.{method}.attn_rank=8",
    "passes.{method}.mlp_rank=8",
]
LORO = ["optimizer.exact_every=2", "optimizer.refresh_every=2"]


def toy(name: str, tiny_file: Path) -> tuple[list[str], list[str]]:
    """The words of a command behind run_c4.py, and the overrides that make it small."""
    words = COMMANDS[name].split()
    translation = recipe_from_flags(words)
    methods = [p.name for p in translation.recipe.passes if p.name in ("low_rank", "cola", "lost")]
    folder = tiny_file.parent
    overrides = [line.format(method=method) for method in methods for line in TOY if "{" in line]
    overrides += [line for line in TOY if "{" not in line]
    overrides += [
        f"data.train_files=['{folder}/train-*.txt']",
        f"data.heldout_files=['{folder}/heldout.txt']",
        *(LORO if methods == ["low_rank"] else []),
        *(["optimizer.momentum_reset_steps=2"] if translation.recipe.optimizer.momentum_reset_steps else []),
    ]
    return words[words.index("run_c4.py") + 1 :], overrides


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.endswith(SLOW) else ()) for n in COMMANDS]
)
def test_trains_five_steps(
    name: str,
    tiny_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command behind `python -m act24.run_c4`; overrides in the environment and behind `--`."""
    words, overrides = toy(name, tiny_file)
    monkeypatch.setenv(SET, " ".join(f'"{line}"' for line in overrides[::2]))
    behind = [word for line in overrides[1::2] for word in ("--set", line)]
    outcome = run([*words, "--save_dir", str(tmp_path / "run"), "--", *behind])
    method = words[words.index("--optimizer") + 1].removesuffix("_adamw").removeprefix("adamw_")
    translation = recipe_from_flags(words)
    told = capsys.readouterr().err
    assert all(f"changes results: {line}\n" in told for line in translation.changes)
    written = (tmp_path / "run" / TRANSLATED).read_text()
    assert parse_recipe(written, name) == translation.recipe
    trained = parse_recipe((tmp_path / "run" / "recipe.toml").read_text(), name)
    assert trained == parse_recipe(translation.text, name, overrides)
    assert outcome.finished
    assert outcome.step == 5
    assert outcome.evaluation is not None
    assert math.isfinite(outcome.loss)
    assert 3 < outcome.evaluation.loss < 7, "near ln 300 after five steps"
    if "dx_direct_sparse" in name:
        inner = 6 if method in ("cola", "lost") else 0
        assert len(outcome.sites) == 2 * (1 + inner)
        tags = set(EventAccumulator(str(tmp_path / "run")).Reload().Tags()["scalars"])
        expected = {f"sparsity_relu/{name}" for name in ("layer_0", "layer_1", "mean_across_layers")}
        if inner:
            expected |= {f"lowrank_relu2_sparsity/layer_1.{linear}" for linear in ("q_proj", "down_proj")}
            expected.add("lowrank_relu2_sparsity/average")
            expected |= {
                f"{tag}/layer_1/q_proj"
                for tag in ("sparsity_relu", "sparsity_dropped_energy", "sparsity_crowded_groups")
            }
        assert expected <= tags


def test_the_command_prints_the_recipe_and_says_what_is_wrong() -> None:
    words = COMMANDS["cola_adamw, dx_direct_sparse 3"].split()
    result = CliRunner().invoke(app, ["recipe", "from-flags", "--", *words])
    assert result.exit_code == 0, result.output
    assert parse_recipe(result.output, "printed") == recipe_from_flags(words).recipe
    assert "--grad" not in result.output
    assert "#   --momentum_reset_steps 200 →" in result.output
    wrong = CliRunner().invoke(app, ["recipe", "from-flags", "--", *words, "--batchsize", "3"])
    assert isinstance(wrong.exception, Act24Error)
    assert "did you mean 'batch_size'" in str(wrong.exception)


def test_the_same_command_goes_on_where_it_was(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder is named after the recipe, so that another command does not meet it."""
    monkeypatch.chdir(tmp_path)
    words, overrides = toy("usage: LORO", tiny_file)
    behind = ["--", *(f"--set={line}" for line in overrides)]
    first = run([*words, *behind, "--lang", "zh"])
    assert "会改变结果：更新次数：正好 --num_training_steps 次" in capsys.readouterr().err
    (written,) = tmp_path.glob("runs/*/" + TRANSLATED)
    assert written.read_text(encoding="utf-8").startswith("# 由一条 run_c4.py 命令翻译而来。\n")
    again = run([*words, *behind])
    assert (first.step, again.step, again.checkpoint) == (5, 5, first.checkpoint)
    assert "is the end of this run" in capsys.readouterr().out
    run([*words, "--seed", "7", *behind])
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("mine\n"), os.mkfifo], ids=["a file", "a pipe"]
)
def test_a_users_file_where_the_translation_goes_stays(
    make: Callable[[Path], object], tiny_file: Path, tmp_path: Path
) -> None:
    words, overrides = toy("usage: LORO", tiny_file)
    make(tmp_path / TRANSLATED)
    with pytest.raises(Act24Error, match=rf"/{TRANSLATED} is not as act24 wrote it.*with --save_dir$"):
        run([*words, "--save_dir", str(tmp_path), "--", *(f"--set={line}" for line in overrides)])
    assert [path.name for path in tmp_path.iterdir()] == [TRANSLATED]


def test_what_is_to_be_done_about_a_run_can_be_done_with_this_command(
    tiny_file: Path, tmp_path: Path
) -> None:
    """It was said in options that run_c4.py has not."""
    words, overrides = toy("usage: LORO", tiny_file)
    entry = {"step": 6, "act24": "0.2.0", "time": "2026-11-29T07:35:38+00:00", "from": "/gone"}
    (tmp_path / "history.jsonl").write_text(f"{json.dumps(entry)}\n")
    with pytest.raises(RunError) as error:
        run([*words, "--save_dir", str(tmp_path), "--", *(f"--set={line}" for line in overrides)])
    assert str(error.value).endswith(
        f"say where it is now with act24 train {tmp_path}/recipe.toml --run-dir {tmp_path} --resume, or "
        "choose another folder with --save_dir"
    )


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["--batchsize", "3"], "", "act24: run_c4.py has no option --batchsize"),
        (
            ["--lang", "zh"],
            "",
            "act24: --lang is no option of run_c4.py: those of act24, as --lang, stand behind",
        ),
        (["--set=train.steps=3"], "", "stand behind --"),
        (["--", "train.steps=3"], "", "act24: behind -- stand overrides of the recipe, --set KEY=VALUE"),
        (["--", "--set"], "", "act24: behind -- stand overrides"),
        (["--", "--lang", "cn"], "", "act24: --lang cn: "),
        ([], 'a="', f"act24: {SET}: No closing quotation"),
        ([], "train.stepz=3", "did you mean 'steps'"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str],
    settings: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(SET, settings)
    base = ["--model_config", "configs/llama_60m.json", "--batch_size", "4"]
    monkeypatch.setattr(sys, "argv", ["run_c4", *base, *words])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_says_what_the_command_does(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run_c4", word])
    main()
    said = capsys.readouterr().out
    assert "-- --set data.source=builtin --lang zh" in said
    assert "docs/old-flags.md" in said


def test_an_unknown_option_is_answered_with_each_known_one_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run_c4", "--xyzzy", "1"])
    with pytest.raises(SystemExit):
        main()
    names = capsys.readouterr().err.partition("choose from ")[2].strip().split(", ")
    assert len(names) == len({*names}) > 50


@pytest.mark.slow
def test_torchrun_starts_the_door(tiny_file: Path, tmp_path: Path) -> None:
    words, overrides = toy("usage: CoLA", tiny_file)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "-m", "act24.run_c4"]
    settings = [word for line in overrides for word in ("--set", line)]
    arguments = [*words, "--save_dir", str(tmp_path / "run"), "--", *settings]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "changes results: --dtype bfloat16" in done.stderr
    assert (tmp_path / "run" / "recipe.toml").is_file()
