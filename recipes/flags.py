"""The 75 options of `run_c4.py`, and what became of each.

`run_c4.py` is the public training script of the LORO, CoLA and LoST experiments with 2:4 activations
(JiaxiLi1/Lora-init, September 2025), from which this project's predecessors were run. What an option did
there was read from its source; see docs/findings.md where that differs from what it was meant to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["bool", "int", "float", "str", "flag", "tokens"]

#: What a `"bool"` may be, in any case.
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


@dataclass(frozen=True)
class Flag:
    """An option.

    Attributes:
        name: without the dashes.
        kind: `"bool"` takes True or False, `"flag"` nothing, `"tokens"` a number with K, M or B behind it.
        default: what it was when not given; `REQUIRED` for the two that had to be.
        key: the recipe's key that it becomes; empty where there is none.
        remark: why there is none, or what to know about it; empty where key and value say it all. What a run
            computes otherwise than it did is said by `act24.recipes.flag_remarks.changes`.
        unused: it was parsed and never had an effect.
        choices: what a `"str"` may be; empty: anything.
    """

    name: str
    kind: Kind
    default: Any
    key: str = ""
    remark: str = ""
    choices: tuple[str, ...] = ()
    unused: bool = False


REQUIRED = object()

_UNUSED = "parsed and not used"
_GALORE = "of GaLore, which act24 does not have"
_WEIGHT24 = "chooses the linears of weight24"

FLAGS: tuple[Flag, ...] = (
    Flag("eval_commonsense", "bool", True, "", "no counterpart: score an exported checkpoint with lm-eval"),
    Flag(
        "flip_rate",
        "bool",
        False,
        "",
        "flip_rate/* is logged wherever weight24 is in the recipe; in run_c4.py it was constant 0 for "
        "full-rank weights and, for LORO's, of another mask than the forward's",
    ),
    Flag("attn_2by4", "bool", False, "passes.weight24.scope", _WEIGHT24),
    Flag("mlp_2by4", "bool", True, "passes.weight24.scope", _WEIGHT24),
    Flag("enable_2to4_sparse", "bool", False, "passes.weight24"),
    Flag(
        "sparse_init_scale",
        "float",
        1.0,
        "",
        "overwritten by the first forward; the scale is that of least squared error",
        unused=True,
    ),
    Flag("activation_2by4", "bool", False, "passes.activation24"),
    Flag(
        "activation_soft_threshold",
        "bool",
        False,
        "",
        "had one only with adamw, --enable_2to4_sparse and --activation_2by4, where it sparsified the dense "
        "inputs of attention, which act24 does not offer",
        unused=True,
    ),
    Flag("squ_relu", "str", "silu", "passes.relu2_ffn", "", ("silu", "relu", "relu2")),
    Flag(
        "activation_sparse_method",
        "str",
        "naive",
        "passes.activation24.method",
        "",
        ("naive", "mvue", "soft_threshold_weights", "soft_dynamic"),
    ),
    Flag("permute_2by4", "bool", False, "passes.activation24.token_permutation"),
    Flag("dynamic_activation_steps", "int", 10, "passes.activation24.dynamic_steps"),
    Flag(
        "activation_calibration_samples",
        "int",
        100,
        "passes.activation24.calibration_samples",
        "token rows without padding, by each process, their sums added",
    ),
    Flag(
        "activation_dense_warmup_steps",
        "int",
        1000,
        "passes.activation24.from_step",
        "counts on after a resume; run_c4.py began anew in every process",
    ),
    Flag("dx_direct_sparse", "int", 1, "passes.activation24.backward", "", ("1", "2", "3")),
    Flag(
        "wandb_sparsityrelu",
        "bool",
        False,
        "log.activation_statistics",
        "TensorBoard has sparsity_relu/* under the same names; it no longer drives soft_dynamic",
    ),
    Flag("c4_local", "bool", True, "data.source"),
    Flag("train_data_path", "str", "en/c4-train.*.json.gz", "data.train_files"),
    Flag("val_data_path", "str", "en/c4-validation.*.json.gz", "data.heldout_files"),
    Flag("model_config", "str", REQUIRED, "model.preset"),
    Flag(
        "use_hf_model",
        "flag",
        False,
        "",
        "the stock model equals transformers'; as in run_c4.py, every option of 2:4 and --squ_relu is "
        "without effect beside it",
    ),
    Flag(
        "continue_from",
        "str",
        None,
        "",
        "not of the recipe: act24.run_c4 begins with its weights; a run of act24 goes on with act24 train … "
        "--resume",
    ),
    Flag("batch_size", "int", REQUIRED, "train.batch_size"),
    Flag("gradient_accumulation", "int", None, "train.total_batch_size"),
    Flag("total_batch_size", "int", None, "train.total_batch_size"),
    Flag("max_length", "int", 256, "data.max_length"),
    Flag("optimizer", "str", "adam", "optimizer.name"),
    Flag("lr", "float", 1e-4, "optimizer.lr"),
    Flag(
        "scheduler",
        "str",
        "cosine",
        "schedule.name",
        "",
        ("const", "linear", "cosine", "cosine_restart", "cosine_restart_zero"),
    ),
    Flag("cosine_restart_freq", "int", None, "schedule.restart_every"),
    Flag("cosine_restart_warmup", "int", 5, "schedule.restart_warmup_steps"),
    Flag("lr_jag_after_warmup", "flag", False, "schedule.restart_in_warmup"),
    Flag("lr_adjust_steps", "int", 0, "schedule.lr_adjust_steps"),
    Flag("min_lr_ratio", "float", 0.1, "schedule.min_lr_ratio"),
    Flag("activation_checkpointing", "flag", False, "train.activation_checkpointing"),
    Flag("weight_decay", "float", 0.0, "optimizer.weight_decay"),
    Flag("warmup_steps", "int", 1000, "schedule.warmup_steps"),
    Flag("eval_every", "int", 5000, "eval.every"),
    Flag("num_training_steps", "int", 10_000, "train.steps"),
    Flag("max_train_tokens", "tokens", None, "train.steps"),
    Flag("save_every", "int", 10_000, "checkpoint.every"),
    Flag("save_ckpt", "bool", False, "", "no counterpart: the last step is always saved"),
    Flag("save_dir", "str", None, "", "not of the recipe: act24 train … --run-dir FOLDER"),
    Flag("tags", "str", None, "", _UNUSED, unused=True),
    Flag("dtype", "str", "bfloat16", "train.dtype", "", ("bf16", "bfloat16", "float32", "fp32")),
    Flag("workers", "int", 8, "", "no counterpart: one thread prefetches"),
    Flag("seed", "int", 0, "train.seed"),
    Flag("name", "str", "test", "", _UNUSED, unused=True),
    Flag(
        "grad_clipping",
        "float",
        0.0,
        "",
        "written into the run's name and not applied; train.grad_clip is 0 so that this recipe does the "
        "same: "
        "set it there to clip",
        unused=True,
    ),
    Flag("beta1", "float", 0.0, "", "of adafactor and sgd, which act24 does not have", unused=True),
    Flag("rank", "int", 128, "", _GALORE, unused=True),
    Flag("update_proj_gap", "int", 50, "", _GALORE, unused=True),
    Flag("galore_scale", "float", 1.0, "", _GALORE, unused=True),
    Flag("proj_type", "str", "std", "", _GALORE, unused=True),
    Flag("cola_silu", "bool", False, "passes.lost.bottleneck"),
    Flag("cola_sparse_method", "str", "cola_init", "passes.cola.init", "", ("cola_init", "svd", "none")),
    Flag("lost_sparsity", "float", 0.05, "passes.lost.sparsity"),
    Flag("lost_sparse_method", "str", "random", "passes.lost.method", "", ("random", "gradient", "svd")),
    Flag("lost_sparse_svd_rank", "int", 256, "passes.lost.svd_rank"),
    Flag("lost_gamma", "float", 0.5, "passes.lost.gamma"),
    Flag(
        "lost_sparse_svd_inverse",
        "flag",
        False,
        "",
        "no counterpart: scores by the smallest singular values instead of those behind the first R",
    ),
    Flag("momentum_reset_steps", "int", 0, "optimizer.momentum_reset_steps"),
    Flag("more_activation_relu2", "bool", False, "passes.{method}.bottleneck"),
    Flag("loro_type", "str", "loro", "optimizer.type", "", ("loro", "eucl")),
    Flag("loro_freq", "int", 1, "optimizer.exact_every"),
    Flag("loro_fallback_freq", "int", None, "", _UNUSED, unused=True),
    Flag("loro_refresh", "str", None, "optimizer.refresh", "", ("reg", "lrk", "all", "None")),
    Flag("loro_refresh_freq", "int", 0, "optimizer.refresh_every"),
    Flag("loro_attn_rank", "int", 128, "passes.{method}.attn_rank"),
    Flag("loro_mlp_rank", "int", 128, "passes.{method}.mlp_rank"),
    Flag("loro_init", "str", "xavier", "passes.{method}.init"),
    Flag("loro_scope", "str", None, "passes.{method}.scope", "", ("all", "mlp", "attn", "None")),
    Flag("loro_lr_scaler", "str", "1.0", "optimizer.lr_scaler"),
    Flag("loro_mlp_dense", "flag", False, "", "its guard is never true", unused=True),
    Flag("single_gpu", "flag", False, "", "not of the recipe: start one process"),
)

BY_NAME: dict[str, Flag] = {flag.name: flag for flag in FLAGS}

#: Spellings in notes and old commands that run_c4.py itself no longer took: (name, value or None for any) to
#: (name, value or None for the same). `--cola_init False` left the factors as --loro_init made them.
OLD_SPELLINGS: dict[tuple[str, str | None], tuple[str, str | None]] = {
    ("2by4_permute", None): ("permute_2by4", None),
    **{("cola_init", word): ("cola_sparse_method", "cola_init") for word in TRUE},
    **{("cola_init", word): ("cola_sparse_method", "none") for word in FALSE},
    ("optimizer", "adamw_cola"): ("optimizer", "cola_adamw"),
    ("optimizer", "adamw_lost"): ("optimizer", "lost_adamw"),
    ("squ_relu", "true"): ("squ_relu", "relu2"),
    ("squ_relu", "false"): ("squ_relu", "silu"),
    ("dx_direct_sparse", "false"): ("dx_direct_sparse", "1"),
    ("dx_direct_sparse", "true"): ("dx_direct_sparse", "2"),
    ("activation_sparse_method", "soft_threshold"): ("activation_sparse_method", "soft_threshold_weights"),
}
