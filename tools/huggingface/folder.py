"""Stock LLaMA checkpoints in Hugging Face's layout: config.json beside model.safetensors, in and out.

Nothing is guessed. What the stock model does not compute (scaled rotary embeddings, other activations,
quantised weights) is refused by name; so is every parameter that is missing, left over or of another shape.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.llama import LlamaConfig, LlamaForCausalLM

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Fields of `transformers`' LlamaConfig that the stock model lacks, with the one value it stands for.
_ONLY = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "sliding_window": None,
}


def load_pretrained(folder: str | Path) -> LlamaForCausalLM:
    """The LLaMA stored in `folder`, in the dtype it is stored in, on the CPU.

    Reads config.json and model.safetensors, or the shards that model.safetensors.index.json lists. Raises
    Act24Error, naming the file and the field or parameter, for what is missing, unknown or unsupported.
    """
    folder = Path(folder)
    config = _config_from(folder / CONFIG)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = _read_state(folder)
    # Old checkpoints store this buffer; it follows from rope_theta.
    state = {name: value for name, value in state.items() if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in state:
        head = state.pop("lm_head.weight")
        if not torch.equal(head, state.get("model.embed_tokens.weight", head)):
            raise Act24Error(
                f"{folder}: tie_word_embeddings is set, but lm_head.weight is not model.embed_tokens.weight"
            )
    _check_state(state, model, str(folder))
    model.load_state_dict(state, assign=True)
    return model


def save_pretrained(
    model: LlamaForCausalLM, folder: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `model` so that `transformers`' `AutoModelForCausalLM.from_pretrained` computes the same logits.

    `metadata` goes into the header of model.safetensors. Each file appears under its name only when it is
    whole. Raises Act24Error for a model whose parameters are no longer those of a stock LLaMA, or where
    writing fails.
    """
    folder = Path(folder)
    with torch.device("meta"):
        stock = LlamaForCausalLM(model.config)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    _check_state(state, stock, "this model is no stock LLaMA and has no Hugging Face form")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _whole(folder / WEIGHTS) as partial:
            safetensors.torch.save_file(state, partial, {**(metadata or {}), "format": "pt"})
        with _whole(folder / CONFIG) as partial:
            partial.write_text(json.dumps(_config_to(model), indent=2) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        raise Act24Error(f"cannot write the checkpoint {folder}: {error}") from error


def _config_from(path: Path) -> LlamaConfig:
    """Translate a config.json, refusing what would change the numbers."""
    raw = _read_json(path)
    if raw.get("model_type") != "llama":
        raise Act24Error(f"{path}: model_type is {raw.get('model_type')!r}; only 'llama' is the stock LLaMA")
    # transformers 5 keeps rope_theta inside rope_parameters; 4 has it beside rope_scaling, null if unused.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise Act24Error(f"{path}: rotary embeddings of type {kind!r} are not supported; only 'default' is")
    for name, only in _ONLY.items():
        value = rope.get(name, raw.get(name, only))
        if value != only:
            raise Act24Error(f"{path}: {name} = {value!r} is not supported; only {only!r} is")
    fields = {field.name: field for field in dataclasses.fields(LlamaConfig)}
    values = {name: value for name, value in raw.items() if name in fields}
    values.update({name: value for name, value in rope.items() if name == "rope_theta"})
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise Act24Error(f"{path}: {name} is missing")
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    # The low-rank literature's way to say "none"; transformers 5 refuses to save it.
    if values.get("pad_token_id") == -1:
        values["pad_token_id"] = None
    try:
        return LlamaConfig(**values)
    except Act24Error as error:
        raise Act24Error(f"{path}: {error}") from error


def _config_to(model: LlamaForCausalLM) -> dict[str, Any]:
    """The config.json of a stock model, in the spelling that transformers 4 and 5 both read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **dataclasses.asdict(model.config),
        "head_dim": model.config.head_width,  # resolved, because transformers 4 does not read null as absent
        "num_key_value_heads": model.config.key_value_heads,
        "torch_dtype": str(model.head_weight.dtype).removeprefix("torch."),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Act24Error(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise Act24Error(f"{path} holds no JSON object")
    return content


def _read_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, by name, from one file or from all shards of the index."""
    if (folder / INDEX).exists():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
    else:
        names = [WEIGHTS]
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            state.update(safetensors.torch.load_file(folder / name))
        except (OSError, safetensors.SafetensorError) as error:
            raise Act24Error(f"cannot read {folder / name}: {error}") from error
    return state


def _check_state(state: Mapping[str, Tensor], model: LlamaForCausalLM, subject: str) -> None:
    """Refuse a state dict, that of `subject`, which does not fit `model` by names and shapes."""
    expected = model.state_dict()
    faults = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {list(state[name].shape)} for {list(value.shape)}"
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    told = [f"{kind}: {_some(names)}" for kind, names in faults.items() if names]
    if told:
        raise Act24Error(f"{subject}: parameters {'; '.join(told)}")


def _some(names: list[str], limit: int = 4) -> str:
    """The first names, and how many more there are: a whole model's would fill the terminal."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to beside `path`, moved onto it when the writing is done and removed when it fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
