"""From the three commands of the public Wanda repository to those of act24 (`act24 recipe from-flags -- …`).

    main.py              prunes                act24 prune …
    finetune_lm.py       trains an adapter     a recipe for act24 train
    evaluate_ppl.py      measures              act24 eval … --protocol wikitext

(locuslab/wanda, November 2023.) What the scripts overrule of their own options is said.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from act24.errors import nearest
from act24.recipes.load import RecipeError, parse_recipe
from act24.recipes.records import toml_text


@dataclass(frozen=True)
class Script:
    """A script: its options with a value, those without, and which have to be given."""

    name: str
    values: tuple[str, ...]
    switches: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


_MAIN = Script(
    "main.py",
    (
        "model",
        "prune_method",
        "sparsity_ratio",
        "sparsity_type",
        "nsamples",
        "seed",
        "cache_dir",
        "save",
        "save_model",
    ),
    ("use_variant", "eval_zero_shot"),
    ("model", "prune_method"),
)
_TUNE = Script(
    "finetune_lm.py",
    (
        "model_name_or_path",
        "config_name",
        "dataset_name",
        "num_train_epochs",
        "block_size",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "max_train_samples",
        "max_eval_samples",
        "learning_rate",
        "output_dir",
    ),
    ("do_train", "do_eval", "overwrite_output_dir"),
    ("model_name_or_path", "output_dir"),
)
_EVALUATE = Script("evaluate_ppl.py", ("model", "lora_weights", "ctx_length"), (), ("model",))
SCRIPTS = (_MAIN, _TUNE, _EVALUATE)

#: Rows of an update, whatever the options say: `finetune_lm.py` sets it.
_EFFECTIVE_BATCH = 128
_METHODS = ("magnitude", "wanda", "sparsegpt")


def script_of(arguments: Sequence[str]) -> Script | None:
    """The script of the Wanda repository that a command line calls; None for another one."""
    for word in arguments:
        for script in SCRIPTS:
            if PurePath(word).name == script.name:
                return script
    return None


def translated(arguments: Sequence[str]) -> str:
    """A command of act24, or a recipe, with remarks as comments.

    Raises:
        RecipeError: an option that is unknown, lacks its value or has one that act24 has nothing for.
    """
    script = script_of(arguments)
    assert script is not None
    given = _parsed(script, arguments)
    if missing := [f"--{name}" for name in script.required if name not in given]:
        raise RecipeError(f"{script.name} needs {' and '.join(missing)}")
    return {_MAIN.name: _prune, _TUNE.name: _finetune, _EVALUATE.name: _evaluate}[script.name](given)


def _parsed(script: Script, arguments: Sequence[str]) -> dict[str, str]:
    words = [word for word in arguments if word.strip() not in ("", "\\")]
    start = next(i for i, word in enumerate(words) if PurePath(word).name == script.name)
    given: dict[str, str] = {}
    rest = list(reversed(words[start + 1 :]))
    while rest:
        word = rest.pop()
        if not word.startswith("--"):
            raise RecipeError(f"'{word}' belongs to no option")
        name, equals, value = word[2:].partition("=")
        if name in script.switches:
            given[name] = "True"
            continue
        if name not in script.values:
            raise RecipeError(
                f"{script.name} has no option --{name}: {nearest(name, (*script.values, *script.switches))}"
            )
        if not equals:
            if not rest or rest[-1].startswith("--"):
                raise RecipeError(f"--{name} needs a value")
            value = rest.pop()
        given[name] = value
    return given


def _number(given: Mapping[str, str], name: str, default: float) -> float:
    try:
        return float(given.get(name, default))
    except ValueError:
        raise RecipeError(f"--{name} takes a number, not '{given[name]}'") from None


def _prune(given: Mapping[str, str]) -> str:
    method = given["prune_method"]
    if method not in _METHODS:
        raise RecipeError(
            f"act24 has no pruning method like --prune_method {method}: {nearest(method, _METHODS)}"
        )
    remarks = ["Text: --data takes C4's files or allenai/c4; the scripts read C4's first shard."]
    ratio, kind = _number(given, "sparsity_ratio", 0.0), given.get("sparsity_type", "unstructured")
    if "sparsity_type" not in given:
        remarks.append("--sparsity_type was not given: main.py fails there; here the share is unstructured")
    pattern = f"{ratio:g}"
    if kind != "unstructured":
        if kind not in ("2:4", "4:8") or ratio != 0.5:
            raise RecipeError(
                f"--sparsity_type {kind} with --sparsity_ratio {ratio:g}: main.py takes 2:4 or 4:8, with 0.5"
            )
        pattern = kind
    if "use_variant" in given:
        if method != "wanda" or kind != "unstructured":
            raise RecipeError("--use_variant is of --prune_method wanda, unstructured")
        method = "wanda_cumulative"
    if method == "sparsegpt" or kind != "unstructured":
        remarks.append("Of equal scores the lower index stays; main.py takes what topk or sort gives")
    if method == "magnitude" and kind == "unstructured":
        remarks.append("As many go as the share says; main.py takes all at its threshold too")
    if "seed" in given:
        remarks.append("--seed chose the windows; here they are the first rows of the shuffled text")
    if "cache_dir" in given:
        remarks.append("--cache_dir: HF_HOME says where the Hub's files lie")
    if "eval_zero_shot" in given:
        remarks.append("--eval_zero_shot: no counterpart; score the folder with lm-eval")
    out = given.get("save_model") or given.get("save") or "pruned"
    words = ["act24", "prune", given["model"], "--method", method, "--pattern", pattern]
    words += ["--samples", f"{_number(given, 'nsamples', 128):g}", "--data", "allenai/c4", "--out", out]
    remarks.append("main.py ends in a perplexity: act24 eval OUT --protocol wikitext --seqlen N --text FILE")
    return _with_remarks(remarks, shlex.join(words) + "\n")


def _finetune(given: Mapping[str, str]) -> str:
    length = min(int(_number(given, "block_size", 1024)), 2**31 - 1)
    rows = int(_number(given, "per_device_train_batch_size", 8))
    if rows < 1 or _EFFECTIVE_BATCH % rows:
        raise RecipeError(
            f"--per_device_train_batch_size {rows}: it has to divide {_EFFECTIVE_BATCH}, an update's rows"
        )
    samples = int(_number(given, "max_train_samples", 30000) * _number(given, "num_train_epochs", 3))
    model, data = given["model_name_or_path"], given.get("dataset_name", "c4")
    if data not in ("c4", "allenai/c4"):
        raise RecipeError(f"--dataset_name {data}: of data sets the script reads c4")
    sections = {
        "model": {"pretrained": model},
        "tokenizer": {"name": f"{model}/tokenizer.json"},
        "data": {
            "source": "hf",
            "dataset": "allenai/c4",
            "subset": "en",
            "rows": "packed",
            "max_length": length,
        },
        "train": {
            "steps": max(samples // _EFFECTIVE_BATCH, 6),
            "batch_size": rows,
            "total_batch_size": _EFFECTIVE_BATCH,
            "dtype": "bfloat16_autocast",
            "seed": 42,
            "grad_clip": 1.0,
        },
        "optimizer": {
            "name": "adamw",
            "lr": _number(given, "learning_rate", 1e-4),
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.0,
        },
        "schedule": {"name": "linear", "warmup_steps": 5, "min_lr_ratio": 0.0},
        "eval": {"every": 0, "tokens": max(int(_number(given, "max_eval_samples", 128)) * length, 1)},
        "checkpoint": {"every": 50, "keep": 15},
        "log": {"every": 10, "activation_statistics": False},
        "passes": [
            {
                "use": "lora",
                "targets": ("*.q_proj", "*.v_proj"),
                "rank": 8,
                "alpha": 16.0,
                "dropout": 0.05,
            }
        ],
    }
    text = toml_text(sections)
    parse_recipe(text, "the recipe of this command")
    remarks = [
        f"act24 train THIS.toml --run-dir {shlex.quote(given['output_dir'])}, then act24 export … --as peft",
        f"An update has {_EFFECTIVE_BATCH} rows, whatever the options say: the script sets it",
        "float16 with a loss scale there, bfloat16 here",
        'The base lay in float16 there, in float32 here (train.dtype = "bfloat16" halves that)',
        "masked_lora in the place of lora merges without losing a zero",
    ]
    return _with_remarks(remarks, text)


def _evaluate(given: Mapping[str, str]) -> str:
    length = f"{_number(given, 'ctx_length', 2048):g}"
    model = given["model"]
    remarks = [
        "The script measures the last, shorter window too and weighs it like the others; act24 drops it",
        "FILE is the text, wikitext-2-raw-v1's test split; the script loads it from the Hub",
    ]
    commands = []
    if "lora_weights" in given:
        remarks.append("An adapter is measured as merged with its base, which is the same function")
        merge = ["act24", "merge", model, "merged", "--adapter", given["lora_weights"], "--allow-dense"]
        commands.append(shlex.join(merge))
        model = "merged"
    words = ["act24", "eval", model, "--protocol", "wikitext", "--seqlen", length, "--text", "FILE"]
    commands.append(shlex.join(words))
    return _with_remarks(remarks, "\n".join(commands) + "\n")


def _with_remarks(remarks: Sequence[str], text: str) -> str:
    return "".join(f"# {line}\n" for line in remarks) + "\n" + text
