"""From a `run_c4.py` command to the recipe that does the same (`act24 recipe from-flags -- …`).

Options that were not given have the script's defaults, so that the recipe is that of the command and not of
act24. What the script got wrong is not reproduced; each remark says where that changes what a run does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from act24.errors import nearest, reading
from act24.llama import PRESETS
from act24.optim import ColaAdamWOptions, LOROAdamWOptions, LostAdamWOptions
from act24.recipes.flag_values import parse_flags
from act24.recipes.flags import BY_NAME, FLAGS, REQUIRED, Flag
from act24.recipes.load import RecipeError, parse_recipe, toml_value
from act24.recipes.schema import Recipe
from act24.schedules import Cosine, CosineRestart

_BACKWARDS = {1: "split_gemm", 2: "sparse", 3: "dense"}
_SCHEDULES = {"const": "constant", "cosine_restart_zero": "cosine_restart"}
_METHODS = {o.name: o.needs for o in (LOROAdamWOptions, ColaAdamWOptions, LostAdamWOptions)}
_CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Translation:
    """A recipe, and what became of the command's options.

    Attributes:
        recipe: checked.
        text: its TOML, with the remarks as comments at the top.
        remarks: one line for each option given, in order, and then for what else changes.
    """

    recipe: Recipe
    text: str
    remarks: tuple[str, ...]


def recipe_from_flags(arguments: Sequence[str]) -> Translation:
    """Translate a command.

    Args:
        arguments: of `run_c4.py`; the whole command line, `torchrun … run_c4.py` and trailing backslashes
            included, does as well.

    Raises:
        RecipeError: an option that is unknown, lacks its value or has one that it cannot have; or something
            that act24 does not do at all, such as an optimizer.
    """
    given, remarks = parse_flags(arguments)
    if missing := [f"--{f.name}" for f in FLAGS if f.default is REQUIRED and f.name not in given]:
        raise RecipeError(f"run_c4.py needs {' and '.join(missing)}")
    command = _Command({flag.name: flag.default for flag in FLAGS} | given, frozenset(given))
    table = _table(command)
    remarks += [_remark(BY_NAME[name], value, command) for name, value in given.items()]
    remarks += _further_remarks(command)
    text = _to_toml(table)
    recipe = parse_recipe(text, "the recipe of this command")
    comments = "".join(f"# {line}\n" for line in ("Translated from a run_c4.py command.", *remarks))
    return Translation(recipe, f"{comments}\n{text}", tuple(remarks))


@dataclass(frozen=True)
class _Command:
    """The value of every option, and which were given."""

    values: dict[str, Any]
    given: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def method(self) -> str:
        """The low-rank pass, or the empty string: without a scope LORO's layers stay dense."""
        return _METHODS.get(self.optimizer, "") if self.loro_scope not in (None, "None") else ""

    @property
    def dense_ffn(self) -> bool:
        """Whether SwiGLU stays."""
        return self.squ_relu == "silu" or self.use_hf_model

    @property
    def sparse_activations(self) -> bool:
        return self.activation_2by4 and self.squ_relu == "relu2" and not self.use_hf_model

    @property
    def exact_steps(self) -> bool:
        return self.optimizer == "loro_adamw" and bool(self.method) and self.loro_type != "eucl"

    @property
    def sparse_weights(self) -> bool:
        """Whether run_c4.py would have had 2:4 weights, and they can be had."""
        trained = self.optimizer in ("adamw", "loro_adamw") and not self.use_hf_model
        inputs = self.optimizer == "adamw" and self.activation_2by4  # 2:4 inputs then, instead of weights
        scope = self.attn_2by4 or self.mlp_2by4
        return self.enable_2to4_sparse and trained and scope and not inputs and not self.exact_steps


# ------------------------------------------------------------------------------------------ translating


def _table(command: _Command) -> dict[str, Any]:
    """The recipe as a table, without what equals act24's defaults by their nature."""
    rows = _total_batch_size(command)
    steps = command.num_training_steps
    if command.max_train_tokens is not None:
        if rows * command.max_length < 1:
            raise RecipeError("--max_train_tokens needs --batch_size and --max_length of 1 or more")
        steps = max(1, command.max_train_tokens // (rows * command.max_length))
    return {
        "model": _model(command.model_config),
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


def _total_batch_size(command: _Command) -> int:
    if command.total_batch_size is not None:
        return command.total_batch_size
    return command.batch_size * (command.gradient_accumulation or 1)


def _model(config: str) -> dict[str, Any]:
    preset = Path(config).stem.replace("_", "-")
    if preset in PRESETS:
        return {"preset": preset}
    with reading(f"--model_config {config}: not valid JSON", error=RecipeError):
        if not Path(config).is_file():
            raise RecipeError(
                f"--model_config {config}: no such file, and no preset of that name: "
                f"{nearest(preset, PRESETS)}"
            )
        settings = json.loads(Path(config).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise RecipeError(f"--model_config {config}: has to hold an object of settings, such as hidden_size")
    return {"preset": "llama-9m"} | {key: settings[key] for key in _CONFIG_FIELDS if key in settings}


def _data(command: _Command) -> dict[str, Any]:
    table: dict[str, Any] = {"source": "hf", "dataset": "allenai/c4", "subset": "en"}
    if command.c4_local:
        table = {
            "source": "files",
            "train_files": [command.train_data_path],
            "heldout_files": [command.val_data_path],
        }
    return table | {"rows": "padded", "max_length": command.max_length, "shuffle_seed": 42}


def _optimizer(command: _Command) -> dict[str, Any]:
    known = ("adam", "adamw", *_METHODS)
    if command.optimizer not in known:
        raise RecipeError(
            f"act24 has no optimizer like --optimizer {command.optimizer}: choose from {', '.join(known)}"
        )
    table: dict[str, Any] = {
        "name": "adamw",
        "lr": command.lr,
        "weight_decay": command.weight_decay,
        "state_dtype": "float32",
        "momentum_reset_steps": command.momentum_reset_steps,
    }
    if command.optimizer in ("adam", "adamw"):
        return table | {"betas": [0.9, 0.999], "decay": "all"}  # its "no decay" group was decayed too
    if command.optimizer != "loro_adamw":
        return table | {"name": command.optimizer if command.method else "adamw", "betas": [0.9, 0.95]}
    if not command.method:
        return table | {"betas": [0.9, 0.999], "eps": 1e-6}
    refreshes = command.loro_refresh not in (None, "None") and command.loro_refresh_freq > 0
    table |= {
        "name": "loro_adamw",
        "type": command.loro_type,
        "exact_every": command.loro_freq,
        "lr_scaler": _scaler(command.loro_lr_scaler),
        "refresh": command.loro_refresh if refreshes else "none",
    }
    return table | ({"refresh_every": command.loro_refresh_freq} if refreshes else {})


def _scaler(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"--loro_lr_scaler takes a number, not '{text}'") from None


def _schedule(command: _Command) -> dict[str, Any]:
    name = _SCHEDULES.get(command.scheduler, command.scheduler)
    table: dict[str, Any] = {"name": name, "warmup_steps": command.warmup_steps}
    if name != "constant":
        table["min_lr_ratio"] = command.min_lr_ratio
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


def _passes(command: _Command) -> Iterator[dict[str, Any]]:
    if not command.dense_ffn:
        yield {"use": "relu2_ffn"} | ({"activation": "relu"} if command.squ_relu == "relu" else {})
    bottleneck = "relu2" if command.more_activation_relu2 else "silu"
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
                "cola": {"bottleneck": bottleneck},
                "lost": {"bottleneck": bottleneck} | _lost(command),
            }[command.method]
        )
    if command.sparse_activations:
        yield _activation24(command)
    if command.sparse_weights:
        scope = {(True, True): "all", (True, False): "attn", (False, True): "mlp"}
        yield {
            "use": "weight24",
            "method": "soft_threshold",
            "scope": scope[command.attn_2by4, command.mlp_2by4],
        }


def _lost(command: _Command) -> dict[str, Any]:
    method = command.lost_sparse_method
    table = {"sparsity": command.lost_sparsity, "gamma": command.lost_gamma, "method": method}
    return table | ({"svd_rank": command.lost_sparse_svd_rank} if method == "svd" else {})


def _activation24(command: _Command) -> dict[str, Any]:
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
    if "permute_2by4" in command.given and not command.permute_2by4 and table["backward"] != "dense":
        table["token_permutation"] = "none"
    return table


# -------------------------------------------------------------------------------------------- remarks


def _remark(flag: Flag, value: Any, command: _Command) -> str:
    """What became of an option given."""
    option = f"--{flag.name}" + ("" if flag.kind == "flag" else f" {value}")
    key = flag.key.replace("{method}", command.method)
    idle = _idle(flag, command)
    if idle:
        return f"{option}: {idle}"
    target = f" → {key}" if key else ""
    return f"{option}{target}" + (f": {flag.remark}" if flag.remark else "")


def _idle(flag: Flag, command: _Command) -> str:
    """Why an option that has a key does nothing in this command, or the empty string."""
    name = flag.name
    if flag.key.startswith("passes.{method}") and not command.method:
        return "no effect: only LORO, CoLA and LoST with a --loro_scope have factors"
    if name == "more_activation_relu2" and command.method == "low_rank":
        return "no effect: LORO has no activation between the factors"
    if flag.key.startswith("passes.lost") and command.method != "lost":
        return "no effect: of LoST"
    if name == "lost_sparse_svd_rank" and command.lost_sparse_method != "svd":
        return "no effect: of --lost_sparse_method svd"
    if flag.key == "passes.low_rank.init" and command.method != "low_rank":
        return "no effect: of LORO; CoLA and LoST start as published"
    loro_only = ("loro_type", "loro_freq", "loro_refresh", "loro_refresh_freq", "loro_lr_scaler")
    if name in loro_only and (command.optimizer != "loro_adamw" or not command.method):
        return "no effect: of LORO's optimizer; in run_c4.py neither for CoLA and LoST, which are plain AdamW"
    if flag.key.startswith("passes.activation24") and not command.sparse_activations:
        return "no effect: 2:4 activations need --activation_2by4 True and --squ_relu relu2"
    if name == "dynamic_activation_steps" and command.activation_sparse_method != "soft_dynamic":
        return "no effect: of soft_dynamic"
    if flag.key.startswith("passes.weight24") and not command.sparse_weights:
        return _why_no_sparse_weights(command)
    if flag.key.startswith("passes.relu2_ffn") and command.use_hf_model:
        return "no effect beside --use_hf_model"
    restarting = {f.name for f in fields(CosineRestart)} - {f.name for f in fields(Cosine)}
    if flag.key.removeprefix("schedule.") in restarting and not command.scheduler.startswith(
        "cosine_restart"
    ):
        return "no effect: of the cosine_restart schedules"
    if name == "min_lr_ratio" and command.scheduler == "const":
        return "no effect: a constant schedule has none"
    if name in ("train_data_path", "val_data_path") and not command.c4_local:
        return "no effect: C4 comes from the Hub"
    if name == "gradient_accumulation" and command.total_batch_size is not None:
        return "follows from --total_batch_size, --batch_size and the number of processes"
    if name == "num_training_steps" and command.max_train_tokens is not None:
        return "no effect beside --max_train_tokens"
    return ""


def _why_no_sparse_weights(command: _Command) -> str:
    if not command.enable_2to4_sparse:
        return "no effect: 2:4 weights need --enable_2to4_sparse True"
    if command.exact_steps:
        return (
            "left out: LORO's exact step mixes the columns of the factors, which tears a 2:4 mask at each "
            "such step; run_c4.py also grouped along the rank, where no hardware can use it"
        )
    if command.optimizer == "adamw" and command.activation_2by4:
        return "left out: run_c4.py made the dense inputs of linears 2:4 here, which act24 does not offer"
    if not (command.attn_2by4 or command.mlp_2by4):
        return "no effect: neither --attn_2by4 nor --mlp_2by4"
    return "no effect: run_c4.py had 2:4 weights for adamw and loro_adamw only"


def _further_remarks(command: _Command) -> Iterator[str]:
    """What changes that no option given says."""
    if command.sparse_activations and "permute_2by4" not in command.given and command.dx_direct_sparse != 3:
        yield (
            "tokens are permuted, as in the paper; run_c4.py did not unless told to, which plateaus early "
            '(2.919 beside 2.652): passes.activation24.token_permutation = "none" has it so'
        )
    if not command.dense_ffn:
        yield (
            "the network's width is 1.5 F rounded to a multiple of 128, where run_c4.py rounded down to a "
            'whole number (8191 at 1b, which is no multiple of 4): passes.relu2_ffn.width = "exact"'
        )
    if command.method == "cola" and not command.dense_ffn and command.sparse_activations:
        yield (
            "CoLA keeps the activation between its factors; run_c4.py dropped it under 2:4 activations, so "
            "that its results are those of plain low rank"
        )
    if command.scheduler == "cosine_restart_zero":
        yield (
            "cosine_restart warms up from min_lr_ratio and restarts from 1e-6; cosine_restart_zero did from "
            "0 and from a tenth of the peak"
        )
    if command.optimizer == "adam" and command.weight_decay:
        yield "weight decay is decoupled (AdamW); torch's Adam adds it to the gradient"
    yield (
        "held-out loss is the exact mean over tokens; act24 eval --legacy-average has run_c4.py's sum/(n+1)"
    )


def _to_toml(table: dict[str, Any]) -> str:
    lines: list[str] = []
    for section, values in table.items():
        for entry in values if isinstance(values, list) else [values]:
            lines += ["", f"[[{section}]]" if isinstance(values, list) else f"[{section}]"]
            lines += [f"{key} = {toml_value(value)}" for key, value in entry.items()]
    return "\n".join(lines).lstrip() + "\n"
