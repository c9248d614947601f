"""The published commands of run_c4.py: translated, planned, and trained for five steps at toy size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from act24.errors import Act24Error
from act24.recipes.from_flags import recipe_from_flags
from act24.recipes.load import parse_recipe
from act24.tools.commands.cli import app
from act24.tools.run.train import train

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
    for optimizer in ("loro_adamw", "cola_adamw", "lost_adamw")
    for mode in (1, 2, 3)
} | {
    "usage: CoLA": f"{SHARED} --optimizer adamw_cola --cola_silu True --cola_init True",
    "usage: LoST": f"{SHARED} --optimizer adamw_lost --lost_sparsity 0.01 --lost_sparse_method random "
    "--lost_sparse_svd_rank 256 --lost_gamma 0.25 --cola_silu False --cola_init False",
    "usage: LORO": f"{SHARED} --optimizer loro_adamw",
}
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


@pytest.mark.parametrize("name", COMMANDS)
def test_trains_five_steps(name: str, tiny_file: Path, tmp_path: Path) -> None:
    translation = recipe_from_flags(COMMANDS[name].split())
    method = next(p.name for p in translation.recipe.passes if p.name in ("low_rank", "cola", "lost"))
    folder = tiny_file.parent
    overrides = [line.format(method=method) for line in TOY]
    overrides += [
        f"data.train_files=['{folder}/train-*.txt']",
        f"data.heldout_files=['{folder}/heldout.txt']",
        *(LORO if method == "low_rank" else []),
        *(["optimizer.momentum_reset_steps=2"] if translation.recipe.optimizer.momentum_reset_steps else []),
    ]
    recipe = parse_recipe(translation.text, name, overrides)
    outcome = train(recipe, tmp_path / "run")
    assert outcome.finished
    assert outcome.step == 5
    assert outcome.evaluation is not None
    assert math.isfinite(outcome.loss)
    assert 3 < outcome.evaluation.loss < 7, "near ln 300 after five steps"
    if "dx_direct_sparse" in name:
        inner = 0 if method == "low_rank" else 6
        assert len(outcome.sites) == 2 * (1 + inner)
        tags = set(EventAccumulator(str(tmp_path / "run")).Reload().Tags()["scalars"])
        expected = {f"sparsity_relu/{name}" for name in ("layer_0", "layer_1", "mean_across_layers")}
        if inner:
            expected |= {f"lowrank_relu2_sparsity/layer_1.{linear}" for linear in ("q_proj", "down_proj")}
            expected.add("lowrank_relu2_sparsity/average")
        assert expected <= tags


def test_the_command_prints_the_recipe_and_says_what_is_wrong() -> None:
    words = COMMANDS["cola_adamw, dx_direct_sparse 3"].split()
    result = CliRunner().invoke(app, ["recipe", "from-flags", "--", *words])
    assert result.exit_code == 0, result.output
    assert parse_recipe(result.output, "printed") == recipe_from_flags(words).recipe
    assert "# --grad" not in result.output
    assert "# --momentum_reset_steps 200" in result.output
    wrong = CliRunner().invoke(app, ["recipe", "from-flags", "--", *words, "--batchsize", "3"])
    assert isinstance(wrong.exception, Act24Error)
    assert "did you mean 'batch_size'" in str(wrong.exception)
