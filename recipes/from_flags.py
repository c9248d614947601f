"""From a `run_c4.py` command to the recipe that does the same (`act24 recipe from-flags -- …`).

Options that were not given have the script's defaults, so that the recipe is that of the command and not of
act24. What the script got wrong is not reproduced; each remark says where that changes what a run does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act24.errors import nearest, reading
from act24.llama import PRESETS, LlamaConfig, llama_config
from act24.options import shown
from act24.recipes.checks import oddities
from act24.recipes.flag_remarks import Remark, changes, remarks, unread_of_model
from act24.recipes.flag_values import parse_flags
from act24.recipes.flags import FLAGS, REQUIRED
from act24.recipes.load import RecipeError, parse_recipe
from act24.recipes.old_command import OPTIMIZERS, Command
from act24.recipes.records import toml_text
from act24.recipes.schema import Recipe

_BACKWARDS = {1: "split_gemm", 2: "sparse", 3: "dense"}
_SCHEDULES = {"const": "constant", "cosine_restart_zero": "cosine_restart"}

#: Fields of a model's JSON: those that recipes have, and those that the stock model has one value for.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_CONFIG_FIELDS = (
    "vocab_size",
    *_SIZES,
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)
_ONLY = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "model_type": "llama",
}


@dataclass(frozen=True)
class Translation:
    """A recipe, and what became of the command's options.

    Attributes:
        recipe: checked.
        text: its TOML, with all the rest as comments at the top.
        changes: what the recipe's run computes otherwise than the command's did.
        warnings: what `act24 train` would warn of.
        remarks: one for each option given, in order.
        spellings: what the command spelled in an older way.
        save_dir, continue_from: of the command, or None: where a run goes and comes from is of no recipe.
    """

    recipe: Recipe
    text: str
    changes: tuple[str, ...]
    warnings: tuple[str, ...]
    remarks: tuple[Remark, ...]
    spellings: tuple[str, ...]
    save_dir: str | None
    continue_from: str | None


def recipe_from_flags(arguments: Sequence[str]) -> Translation:
    """Translate a command.

    Args:
        arguments: of `run_c4.py`; the whole command line, `torchrun … run_c4.py` and trailing backslashes
            included, does as well.

    Raises:
        RecipeError: an option that is unknown, lacks its value or has one that it cannot have; or something
            that act24 does not do at all, such as an optimizer.
    """
    given, spellings = parse_flags(arguments)
    if missing := [f"--{f.name}" for f in FLAGS if f.default is REQUIRED and f.name not in given]:
        raise RecipeError(f"run_c4.py needs {' and '.join(missing)}")
    command = Command({flag.name: flag.default for flag in FLAGS} | given, tuple(given))
    model = _model(command.model_config)
    text = toml_text({"model": model, **_table(command)})
    recipe = parse_recipe(text, "the recipe of this command")
    config = llama_config(recipe.model.preset, **recipe.model.overrides())
    changed = (*unread_of_model(command, config), *changes(command))
    warned, told = tuple(oddities(recipe)), remarks(command)
    comments = _comments(changed, warned, told, spellings)
    return Translation(
        recipe=recipe,
        text=f"{comments}\n{text}",
        changes=changed,
        warnings=warned,
        remarks=told,
        spellings=tuple(spellings),
        save_dir=command.save_dir,
        continue_from=command.continue_from,
    )


def _comments(
    changed: Sequence[str], warned: Sequence[str], told: Sequence[Remark], spellings: Sequence[str]
) -> str:
    """The top of the recipe: what changes results first, and what has no effect in one line at the end."""
    idle = "; ".join(remark.option for remark in told if remark.effect == "none")
    blocks = {
        "Changes results": changed,
        "act24 train warns": warned,
        "As it was": [*spellings, *(str(remark) for remark in told if remark.effect != "none")],
    }
    lines = ["Translated from a run_c4.py command."]
    for title, block in blocks.items():
        if block:
            lines += ["", f"{title}:", *(f"  {line}" for line in block)]
    lines += ["", f"No effect: {idle}"] if idle else []
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


# ------------------------------------------------------------------------------------------ translating


def _table(command: Command) -> dict[str, Any]:
    """The recipe but for its model, as a table, without what equals act24's defaults by their nature."""
    rows = _total_batch_size(command)
    steps = command.num_training_steps
    if command.max_train_tokens is not None:
        if rows * command.max_length < 1:
            raise RecipeError("--max_train_tokens needs --batch_size and --max_length of 1 or more")
        steps = max(1, command.max_train_tokens // (rows * command.max_length))
    return {
        "tokenizer": {"name": "google-t5/t5-base"},
        "data": _data(command),
        "train": {
            "steps": steps,
            "batch_size": command.batch_size,
            "total_batch_size": rows,
            "dtype": "bfloat16" if command.dtype in ("bf16", "bfloat16") else "float32",
            "seed": command.seed,
            "grad_clip": 0.0,
            "activation_checkpointing": command.activation_checkpointing,
        },
        "optimizer": _optimizer(command),
        "schedule": _schedule(command),
        "eval": {"every": command.eval_every, "tokens": 10_000_000},
        "checkpoint": {"every": command.save_every},
        "log": {"activation_statistics": command.wandb_sparsityrelu},
        "passes": list(_passes(command)),
    }


def _total_batch_size(command: Command) -> int:
    if command.total_batch_size is not None:
        return command.total_batch_size
    return command.batch_size * (command.gradient_accumulation or 1)


def _model(config: str) -> dict[str, Any]:
    """The file, if it is there, beside the preset of its name; the preset alone if it is not."""
    preset = Path(config).stem.replace("_", "-")
    if not Path(config).is_file():
        if preset in PRESETS:
            return {"preset": preset}
        raise RecipeError(
            f"--model_config {config}: no such file, and no preset of that name: {nearest(preset, PRESETS)}"
        )
    with reading(f"--model_config {config}: not valid JSON", error=RecipeError):
        settings = json.loads(Path(config).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise RecipeError(f"--model_config {config}: has to hold an object of settings, such as hidden_size")
    if missing := [name for name in _SIZES if name not in settings]:
        raise RecipeError(f"--model_config {config}: {missing[0]} is missing")
    rope = settings.get("rope_parameters") or {}  # of transformers 5
    if not isinstance(rope, dict):
        raise RecipeError(f"--model_config {config}: rope_parameters = {shown(rope)} is no object")
    for name, value in (*settings.items(), *rope.items()):
        if name in _CONFIG_FIELDS and isinstance(value, list | dict):
            raise RecipeError(f"--model_config {config}: {name} = {shown(value)} is no single value")
    for name, only in _ONLY.items():
        if settings.get(name) not in (None, only):
            raise RecipeError(
                f"--model_config {config}: {name} = {shown(settings[name])} is not supported: only {only!r}"
            )
    defaults = {name: getattr(LlamaConfig, name) for name in _CONFIG_FIELDS if hasattr(LlamaConfig, name)}
    values = {"vocab_size": 32000} | defaults  # as transformers has it where the file says nothing
    values |= {name: settings[name] for name in _CONFIG_FIELDS if settings.get(name) is not None}
    if (kind := rope.get("rope_type", "default")) != "default":
        raise RecipeError(
            f"--model_config {config}: rope_type {shown(kind)} is not supported; only 'default' is"
        )
    if (theta := rope.get("rope_theta")) is not None:
        if settings.get("rope_theta") not in (None, theta):
            raise RecipeError(f"--model_config {config}: two values of rope_theta: remove the wrong one")
        values["rope_theta"] = theta
    base = preset if preset in PRESETS else "llama-9m"
    own = {name: value for name, value in values.items() if value != getattr(PRESETS[base], name)}
    return {"preset": base} | own


def _data(command: Command) -> dict[str, Any]:
    table: dict[str, Any] = {"source": "hf", "dataset": "allenai/c4", "subset": "en"}
    if command.c4_local:
        table = {
            "source": "files",
            "train_files": [command.train_data_path],
            "heldout_files": [command.val_data_path],
        }
    return table | {"rows": "padded", "max_length": command.max_length, "shuffle_seed": 42}


def _optimizer(command: Command) -> dict[str, Any]:
    if command.optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise RecipeError(f"act24 has no optimizer like --optimizer {command.optimizer}: choose from {known}")
    table: dict[str, Any] = {
        "name": command.optimizer if command.method else "adamw",
        "lr": command.lr,
        "weight_decay": command.weight_decay,
        "state_dtype": "float32",
        "momentum_reset_steps": command.momentum_reset_steps,
    }
    # What stood in its "no decay" groups was decayed too, but in two branches.
    if command.optimizer == "adamw" and command.enable_2to4_sparse:
        return table | {"betas": [0.9, 0.95], "decay": "matrices_and_embeddings"}
    if command.optimizer in ("adam", "adamw"):
        return table | {"betas": [0.9, 0.999], "decay": "all"}
    if command.optimizer != "loro_adamw":
        return table | {"betas": [0.9, 0.95], "decay": "all"}
    table |= {"betas": [0.9, 0.999], "eps": 1e-6, "decay": "matrices_and_embeddings"}
    if not command.method:
        return table
    table |= {
        "type": command.loro_type,
        "exact_every": command.loro_freq,
        "lr_scaler": 1.0 if command.loro_type == "eucl" else _scaler(command.loro_lr_scaler),
        "refresh": command.loro_refresh if command.refreshes else "none",
    }
    return table | ({"refresh_every": command.loro_refresh_freq} if command.refreshes else {})


def _scaler(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"--loro_lr_scaler takes a number, not '{text}'") from None


def _schedule(command: Command) -> dict[str, Any]:
    name = _SCHEDULES.get(command.scheduler, command.scheduler)
    if name == "constant":
        return {"name": name, "warmup_steps": 0}  # the script's has none
    table: dict[str, Any] = {
        "name": name,
        "warmup_steps": command.warmup_steps,
        # The script's linear schedule is that of transformers, which ends at 0.
        "min_lr_ratio": 0.0 if name == "linear" else command.min_lr_ratio,
    }
    if command.warms_up_from_zero and name != "cosine_restart":
        table["skip_zero"] = True  # the script made no update with learning rate 0
    if name == "cosine_restart":
        if command.cosine_restart_freq is None:
            raise RecipeError(f"--scheduler {command.scheduler} needs --cosine_restart_freq")
        table |= {
            "restart_every": command.cosine_restart_freq,
            "restart_warmup_steps": command.cosine_restart_warmup,
            "lr_adjust_steps": command.lr_adjust_steps,
            "restart_in_warmup": not command.lr_jag_after_warmup,
        }
    return table


def _passes(command: Command) -> Iterator[dict[str, Any]]:
    if not command.dense_ffn:
        yield {"use": "relu2_ffn"} | ({"activation": "relu"} if command.squ_relu == "relu" else {})
    if command.method:
        ranks = {
            kind: rank
            for kind, rank in (("attn_rank", command.loro_attn_rank), ("mlp_rank", command.loro_mlp_rank))
            if command.loro_scope in ("all", kind.removesuffix("_rank"))
        }
        yield (
            {"use": command.method, "scope": command.loro_scope}
            | ranks
            | {
                "low_rank": {"init": command.loro_init},
                "cola": {"bottleneck": command.bottleneck} | _cola(command),
                "lost": {"bottleneck": command.bottleneck} | _lost(command),
            }[command.method]
        )
    if command.sparse_activations:
        yield _activation24(command)
    if command.sparse_weights:
        scope = "all" if len(command.weights24) == 2 else command.weights24[0]
        yield {"use": "weight24", "method": "soft_threshold", "scope": scope}


def _cola(command: Command) -> dict[str, Any]:
    return {"init": command.loro_init} if command.cola_sparse_method == "none" else {}


def _lost(command: Command) -> dict[str, Any]:
    method = command.lost_sparse_method
    table = {"sparsity": command.lost_sparsity, "gamma": command.lost_gamma, "method": method}
    return table | ({"svd_rank": command.lost_sparse_svd_rank} if method == "svd" else {})


def _activation24(command: Command) -> dict[str, Any]:
    method = command.activation_sparse_method
    table = {
        "use": "activation24",
        "method": method,
        "backward": _BACKWARDS[command.dx_direct_sparse],
        "from_step": command.activation_dense_warmup_steps,
        "calibration_samples": command.activation_calibration_samples,
    }
    if method == "soft_dynamic":
        table["dynamic_steps"] = command.dynamic_activation_steps
    return table | {"token_permutation": "batch" if command.permute_2by4 else "none"}
