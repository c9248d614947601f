"""What became of the options of a `run_c4.py` command: what changes results, what not, what never did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

from act24.llama import LlamaConfig
from act24.recipes.flags import BY_NAME, Flag
from act24.recipes.old_command import Command
from act24.schedules import Cosine, CosineRestart

_METHOD_CHANGES = {
    "naive": "keeps two of four also on ties; run_c4.py kept three or four",
    "mvue": "is finite, and naive in evaluation; run_c4.py's was NaN wherever a value of 2 or more stood "
    "alone",
    "soft_threshold_weights": (
        "takes its scale from the weights before and after 2:4, as its author describes it: about 1.48, "
        'which inflates sparse activations; run_c4.py tried the output\'s, near 1 (scale_from = "output")'
    ),
    "soft_dynamic": (
        "renews its scale every so many optimizer updates; run_c4.py counted micro-batches, and only under "
        "--wandb_sparsityrelu: without it the scale was computed once"
    ),
}

_BACKWARD_CHANGES = {
    1: (
        "both weight gradients are 2:4 along the tokens but for the 5% densest features, and dX is never "
        "split, "
        "as in the paper; run_c4.py took the sparsest, or the last 5%, left dW2 dense and split dX"
    ),
    2: (
        "both weight gradients are 2:4 along the tokens, and dX keeps the forward's mask, as in the paper; "
        "run_c4.py grouped along the features, where the product does not reduce"
    ),
    3: "the backward is dense; run_c4.py still split dW1 in full-rank networks",
}


@dataclass(frozen=True)
class Remark:
    """What became of an option that was given.

    Attributes:
        option: as it was written, `--lr 0.01`.
        effect: `"key"`, it became one; `"elsewhere"`, it is not of the recipe; `"none"`, it has no effect
            here or never had one.
        text: why, or what to know about it.
    """

    option: str
    effect: Literal["key", "elsewhere", "none"]
    text: str

    def __str__(self) -> str:
        return f"{self.option}{self.text}"


def remarks(command: Command) -> tuple[Remark, ...]:
    """One remark for each option given, in order."""
    return tuple(_remark(BY_NAME[name], command.values[name], command) for name in command.given)


def _remark(flag: Flag, value: Any, command: Command) -> Remark:
    option = f"--{flag.name}" + ("" if flag.kind == "flag" else f" {value}")
    idle = _idle(flag, command)
    if flag.unused:
        return Remark(option, "none", f": never had an effect: {flag.remark}")
    if idle:
        return Remark(option, "none", f": {idle}")
    key = _key(flag, command)
    text = (f" → {key}" if key else "") + (f": {flag.remark}" if flag.remark else "")
    return Remark(option, "key" if key else "elsewhere", text)


def _key(flag: Flag, command: Command) -> str:
    if flag.name == "optimizer" and command.optimizer not in ("adam", "adamw") and not command.method:
        return 'optimizer.name = "adamw": no --loro_scope, so all layers stay dense'
    return flag.key.replace("{method}", command.method)


def _idle(flag: Flag, command: Command) -> str:
    """Why an option that has a key does nothing in this command, or the empty string."""
    name = flag.name
    if flag.key.startswith("passes.{method}") and not command.method:
        return "only LORO, CoLA and LoST with a --loro_scope have factors"
    if name == "more_activation_relu2" and command.method == "low_rank":
        return "LORO has no activation between the factors"
    if name == "cola_silu" and command.method != "lost":
        return "CoLA always has its SiLU, and nothing else ever has it"
    if name == "cola_silu" and command.more_activation_relu2:
        return "beside --more_activation_relu2 the activation is relu²"
    if name == "cola_sparse_method" and command.method != "cola":
        return "of CoLA; LoST starts from the dense weight's own SVD, as published"
    if flag.key.startswith("passes.lost") and command.method != "lost":
        return "of LoST"
    if name.startswith("lost_sparse_svd") and command.method != "lost":
        return "of LoST"
    if name.startswith("lost_sparse_svd") and command.lost_sparse_method != "svd":
        return "of --lost_sparse_method svd"
    if name == "lost_sparse_svd_inverse":
        return "left out, see above"
    if name == "loro_init" and (
        command.method == "lost" or (command.method == "cola" and command.cola_sparse_method != "none")
    ):
        return "of LORO; CoLA and LoST start as published"
    return _idle_of_training(name, command) or _idle_of_sparsity(flag, command)


def _idle_of_training(name: str, command: Command) -> str:
    loro_only = ("loro_type", "loro_freq", "loro_refresh", "loro_refresh_freq", "loro_lr_scaler")
    if name in loro_only and (command.optimizer != "loro_adamw" or not command.method):
        return "of LORO's optimizer; in run_c4.py neither for CoLA and LoST, which are plain AdamW"
    if name in ("loro_lr_scaler", "loro_freq") and command.loro_type == "eucl":
        return "of --loro_type loro: eucl has neither exact updates nor another learning rate"
    if name == "loro_refresh" and not command.refreshes:
        return (
            "its --loro_refresh_freq is 0, at which run_c4.py died" if command.loro_refresh != "None" else ""
        )
    if name == "loro_refresh_freq" and not command.refreshes:
        return "of --loro_refresh"
    restarting = {f.name for f in fields(CosineRestart)} - {f.name for f in fields(Cosine)}
    if BY_NAME[name].key.removeprefix("schedule.") in restarting and not command.scheduler.startswith(
        "cosine_restart"
    ):
        return "of the cosine_restart schedules"
    if name == "min_lr_ratio" and command.scheduler in ("const", "linear"):
        return "a constant schedule has none, and a linear one ends at 0"
    if name == "warmup_steps" and command.scheduler == "const":
        return "a constant schedule has no warm-up there"
    if name in ("train_data_path", "val_data_path") and not command.c4_local:
        return "C4 comes from the Hub"
    if name == "gradient_accumulation" and command.total_batch_size is not None:
        return "follows from --total_batch_size, --batch_size and the number of processes"
    if name == "num_training_steps" and command.max_train_tokens is not None:
        return "beside --max_train_tokens"
    return ""


def _idle_of_sparsity(flag: Flag, command: Command) -> str:
    if flag.key.startswith("passes.activation24") and not command.sparse_activations:
        return "2:4 activations need --activation_2by4 True and --squ_relu relu2"
    if flag.name == "dynamic_activation_steps" and command.activation_sparse_method != "soft_dynamic":
        return "of soft_dynamic"
    if flag.key.startswith("passes.weight24") and not command.sparse_weights:
        return _why_no_sparse_weights(command)
    if flag.key.startswith("passes.relu2_ffn") and command.use_hf_model:
        return "beside --use_hf_model"
    return ""


def _why_no_sparse_weights(command: Command) -> str:
    if not command.enable_2to4_sparse:
        return "2:4 weights need --enable_2to4_sparse True"
    if command.weights24:
        return "left out, see above"
    if command.use_hf_model:
        return "beside --use_hf_model"
    if not (command.attn_2by4 or command.mlp_2by4):
        return "neither --attn_2by4 nor --mlp_2by4"
    if command.optimizer == "loro_adamw":
        return "with loro_adamw run_c4.py had them for factors only, and of these linears none has any"
    return "run_c4.py had 2:4 weights for adamw and loro_adamw only"


# ------------------------------------------------------------------------------- what changes results


def changes(command: Command) -> tuple[str, ...]:
    """What the recipe's run computes otherwise than the command's run did, each with what has it as it "
    "was."""
    return (*_in_the_model(command), *_in_sparsity(command), *_in_training(command))


def unread_of_model(command: Command, config: LlamaConfig) -> Iterator[str]:
    """What a model has of its file, and run_c4.py's, unless it was that of transformers, had not."""
    heads = config.num_attention_heads
    fixed = {
        "num_key_value_heads": config.key_value_heads == heads,
        "head_dim": config.head_width * heads == config.hidden_size,
        "rope_theta": config.rope_theta == 10000,
        "attention_bias": not config.attention_bias,
        "mlp_bias": not config.mlp_bias,
    }
    names = ", ".join(name for name, same in fixed.items() if not same)
    if names and not command.use_hf_model:
        yield (
            f"--model_config: {names} as the file says; run_c4.py's own model read none of it: as many key "
            "as query heads, of hidden_size / heads, rope_theta 10000, no bias"
        )


def _in_the_model(command: Command) -> Iterator[str]:
    if not command.dense_ffn:
        yield (
            "--squ_relu: the network's width is 1.5 F rounded to a multiple of 128, where run_c4.py rounded "
            'down to a whole number (8191 at 1b, which is no multiple of 4): passes.relu2_ffn.width = "exact"'
        )
    if command.method == "low_rank" and command.loro_init in ("orth", "xavorth", "kaiming"):
        yield (
            f"--loro_init {command.loro_init} is what its name says; in run_c4.py orth and xavorth left "
            f"plain "
            "normal entries, and kaiming took the rank for the fan-in"
        )
    if command.method == "cola" and command.sparse_activations:
        yield (
            "CoLA keeps the activation between its factors; run_c4.py dropped it under 2:4 activations, so "
            "that its results are those of plain low rank"
        )
    if command.method == "cola" and command.cola_sparse_method == "svd":
        yield (
            "--cola_sparse_method svd: CoLA starts as published; run_c4.py took the SVD of a product of "
            "random factors"
        )
    if command.bottleneck == "relu2" and command.method in ("cola", "lost"):
        yield (
            "--more_activation_relu2 True: relu² between the factors, found by activation24; run_c4.py "
            "crashed "
            "on it since August 2025, and before that halved CoLA's first values, which act24 does not"
        )
    if command.method == "lost":
        yield from _in_lost(command)


def _in_lost(command: Command) -> Iterator[str]:
    if command.bottleneck == "silu":
        yield (
            "LoST has its SiLU, as published; run_c4.py's had none, whatever --cola_silu said: "
            'passes.lost.bottleneck = "none", or --cola_silu False, has it so'
        )
    yield (
        "LoST's factors and columns come from the dense first weight, and there is no bias; run_c4.py took "
        "both from a product of random factors, drew those anew, and added a bias to every projection"
    )
    if command.lost_sparse_method == "gradient":
        yield (
            "--lost_sparse_method gradient measures the dense model's gradient; run_c4.py drew columns at "
            "random"
        )
    if command.lost_sparse_svd_inverse and command.lost_sparse_method == "svd":
        yield "--lost_sparse_svd_inverse is left out: act24 scores by the singular values behind the first R"


def _in_sparsity(command: Command) -> Iterator[str]:
    if command.sparse_activations:
        method = command.activation_sparse_method
        yield f"--activation_sparse_method {method} {_METHOD_CHANGES[method]}"
        yield (
            f"--dx_direct_sparse {command.dx_direct_sparse}: {_BACKWARD_CHANGES[command.dx_direct_sparse]}. "
            "Gradients are those of the masked function; run_c4.py went straight through "
            '(estimator = "ste", with the dense backward)'
        )
        if command.dx_direct_sparse != 3 and command.permute_2by4:
            yield (
                "--permute_2by4 True: one fixed permutation of all tokens of a micro-batch, as in the paper "
                '("batch"); run_c4.py permuted within each sequence ("sequence"), unseeded'
            )
    if command.sparse_weights:
        yield (
            "--enable_2to4_sparse True: S-STE's soft threshold in bfloat16 throughout, where run_c4.py "
            "cast to "
            "float16"
        )
        if command.method:
            yield (
                "--enable_2to4_sparse True: factors are 2:4 along the inputs of each, with the scale of "
                "least squared error, and dX is that of the 2:4 factor; run_c4.py grouped along the rank and "
                "along the outputs, scaled by ‖W‖/‖S‖, and took dX of the dense factor"
            )
    elif command.weights24 and command.exact_steps:
        yield (
            "--enable_2to4_sparse True is left out: LORO's exact step mixes the columns of the factors, "
            "which "
            "tears a 2:4 mask at each such step; run_c4.py also grouped along the rank, where no hardware "
            "can "
            "use it"
        )
    elif command.weights24 and command.sparse_inputs:
        yield (
            "--enable_2to4_sparse True is left out: run_c4.py made the dense inputs of linears 2:4 here, "
            "which "
            "act24 does not offer"
        )


def _in_training(command: Command) -> Iterator[str]:
    if command.dtype in ("bf16", "bfloat16"):
        yield (
            "--dtype bfloat16: optimizer state is float32 all the same: in bfloat16 Adam's second moment "
            "cannot "
            'shrink (optimizer.state_dtype = "parameter" has it as run_c4.py did)'
        )
    if command.optimizer == "adam" and command.weight_decay:
        yield "--optimizer adam: weight decay is decoupled (AdamW); torch's Adam adds it to the gradient"
    if command.optimizer == "loro_adamw" and not command.method:
        yield (
            "--optimizer loro_adamw without a --loro_scope: AdamW with LORO's settings; run_c4.py added "
            "eps to "
            "the root of the second moment before correcting it, which tells where gradients are near 1e-6"
        )
    if command.exact_steps and (not command.refreshes or command.loro_refresh == "reg"):
        yield (
            "--loro_refresh: exact updates without it, or with reg, keep moments of factors that are gone; "
            "what they do to the new ones depends on the signs of singular vectors, which differ by library, "
            "so that run_c4.py's run is followed only up to the first one"
        )
    if command.scheduler == "cosine_restart_zero":
        yield (
            "--scheduler cosine_restart_zero: cosine_restart warms up from min_lr_ratio and restarts from "
            "1e-6; "
            "cosine_restart_zero did from 0 and from a tenth of the peak"
        )
    if command.momentum_reset_steps:
        yield (
            "--momentum_reset_steps: after that many updates and multiples; run_c4.py reset one update "
            "later, "
            "and after the very first"
        )
    if command.max_train_tokens is not None:
        yield (
            "--max_train_tokens: tokens over rows × length; run_c4.py divided by rows and so trained "
            "max_length "
            "times as long"
        )
    yield "updates: exactly --num_training_steps; run_c4.py made one more"
    yield "first values: of the same distributions, drawn by another generator"
    yield ("held-out loss: the exact mean over tokens; act24 eval --legacy-average has run_c4.py's sum/(n+1)")
