"""A recipe that trains in a second: two blocks of width 32 on text made of a few words."""

import random
from collections.abc import Callable
from pathlib import Path

from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe

WORDS = ["low", "rank", "sparse", "two", "of", "four", "tokens", "graph", "pass", "relu", "the", "a", "model"]

#: Of a configuration of `transformers`, as small.
TINY_SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

RECIPE = """
[model]
preset = "llama-9m"
vocab_size = 300
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2

[tokenizer]
vocab_size = 300

[data]
source = "files"
train_files = ["{folder}/train-*.txt"]
heldout_files = ["{folder}/heldout.txt"]
max_length = 16

[train]
steps = 20
batch_size = 4
total_batch_size = 8
dtype = "float32"

[optimizer]
lr = 1e-2
weight_decay = 0.1

[schedule]
warmup_steps = 4

[eval]
every = 5
tokens = 500

[checkpoint]
every = 0

[log]
every = 1
weight_sparsity_every = 5

[[passes]]
use = "relu2_ffn"

[[passes]]
use = "activation24"
from_step = 10
"""

Tiny = Callable[..., Recipe]


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write_recipe(folder: Path) -> Path:
    """The recipe and its text, in a folder."""
    for index in range(4):
        (folder / f"train-{index}.txt").write_text(text(2000, index))
    (folder / "heldout.txt").write_text(text(600, 9))
    (folder / "tiny.toml").write_text(RECIPE.format(folder=folder))
    return folder / "tiny.toml"


def load_tiny(path: Path, *overrides: str) -> Recipe:
    return load_recipe(str(path), overrides)
