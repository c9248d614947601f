"""Seed 003's three commands, as they are written there, and what the public scripts make of their options."""

import shlex

import pytest

from act24.passes import Lora
from act24.recipes.load import RecipeError, parse_recipe
from act24.recipes.wanda_flags import translated

PRUNE = "python main.py --model M --prune_method wanda --sparsity_ratio 0.5"
TUNE = r"""
CUDA_VISIBLE_DEVICES=0 python finetune_lm.py \
    --model_name_or_path out/llama2_7b/unstructured/wanda/pruned_model \
    --config_name "meta-llama/Llama-2-7b-hf" \
    --dataset_name c4 \
    --num_train_epochs 1 \
    --block_size 1024 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 8 \
    --do_train \
    --do_eval \
    --max_train_samples 30000 \
    --max_eval_samples 128 \
    --learning_rate 1e-4 \
    --overwrite_output_dir \
    --output_dir out/lora_weights
"""
EVALUATE = "python evaluate_ppl.py --model out/pruned_model --lora_weights out/lora_weights"


def command(text):
    """The lines that are no comments."""
    return [line for line in translated(shlex.split(text)).splitlines() if line and not line.startswith("#")]


def test_pruning():
    assert command(PRUNE) == [
        "act24 prune M --method wanda --pattern 0.5 --samples 128 --data allenai/c4 --out pruned"
    ]
    assert "main.py fails there" in translated(shlex.split(PRUNE))
    (line,) = command(f"{PRUNE} --sparsity_type 2:4 --save_model out --nsamples 32")
    assert line == "act24 prune M --method wanda --pattern 2:4 --samples 32 --data allenai/c4 --out out"
    (line,) = command(f"{PRUNE} --use_variant")
    assert "--method wanda_cumulative" in line


def test_the_adapter_is_trained_as_the_script_does_it():
    text = translated(shlex.split(TUNE))
    recipe = parse_recipe(text, "test")
    assert recipe.model.pretrained == "out/llama2_7b/unstructured/wanda/pruned_model"
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.total_batch_size) == (234, 1, 128)
    assert recipe.data.max_length == 1024
    assert recipe.optimizer.lr == 1e-4
    assert recipe.lr_multiplier(233) < 0.01  # linear to 0
    assert recipe.passes == (Lora(targets=("*.q_proj", "*.v_proj"), rank=8, alpha=16.0, dropout=0.05),)
    assert "act24 train THIS.toml --run-dir out/lora_weights" in text


def test_evaluation():
    merge, evaluate = command(EVALUATE)
    assert merge == "act24 merge out/pruned_model merged --adapter out/lora_weights --allow-dense"
    assert evaluate == "act24 eval merged --protocol wikitext --seqlen 2048 --text FILE"
    assert command("evaluate_ppl.py --model M --ctx_length 4096") == [
        "act24 eval M --protocol wikitext --seqlen 4096 --text FILE"
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("main.py --model M", "needs --prune_method"),
        ("main.py --model M --prune_method search", "no pruning method like"),
        (f"{PRUNE} --sparsity_type 1:4", "takes 2:4 or 4:8, with 0.5"),
        (f"{PRUNE} --sparsity_typ 2:4", "did you mean 'sparsity_type'"),
        (f"{PRUNE} --nsamples", "--nsamples needs a value"),
        (f"{PRUNE} --nsamples many", "takes a number"),
        (f"{TUNE} --per_device_train_batch_size 3", "has to divide 128"),
        (f"{TUNE} stray", "belongs to no option"),
    ],
)
def test_bad_commands_are_one_line(text, match):
    with pytest.raises(RecipeError, match=match):
        translated([word for word in shlex.split(text) if word.strip()])
