"""config.json of the models that the stock LLaMA, or the stock LLaMA with relu², computes: in and out.

`transformers` knows the relu² network as Arcee: LLaMA's block with down(relu²(up(x))). Nothing is guessed.
What is not computed here is refused by name, and everything that a reader has its own default for is written.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from act24.errors import Act24Error
from act24.llama import LlamaConfig
from act24.rotary import RotaryScaling

CONFIG = "config.json"
LLAMA, ARCEE = "llama", "arcee"

#: By model type: the class in `transformers`, and the activation that it stands for.
_ARCHITECTURES = {LLAMA: ("LlamaForCausalLM", "silu"), ARCEE: ("ArceeForCausalLM", "relu2")}

#: Fields of `transformers`' configs that the stock model lacks, with the one value it stands for.
_ONLY = {
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "sliding_window": None,
}

#: What a config.json leaves out means this, where that is not the default of LlamaConfig.
_DEFAULTS_OF = {LLAMA: {}, ARCEE: {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}}


def read_config(folder: Path) -> tuple[LlamaConfig, str]:
    """The configuration in `folder`, and its model type, `"llama"` or `"arcee"`.

    Raises:
        Act24Error: no such file, or something in it that would change the numbers.
    """
    path = folder / CONFIG
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in _ARCHITECTURES:
        raise Act24Error(
            f"{path}: model_type is {kind!r}; {' and '.join(map(repr, _ARCHITECTURES))} are what the stock "
            "model computes"
        )
    raw = {**_DEFAULTS_OF[kind], **raw}
    # transformers 5 keeps rope_theta inside rope_parameters; 4 has it beside rope_scaling, null if unused.
    rope, older = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if rope and older and _kind(rope) != _kind(older):
        raise Act24Error(
            f"{path}: rope_parameters says {_kind(rope)!r} and rope_scaling {_kind(older)!r}: "
            "remove the wrong one"
        )
    rope = rope or older
    _, activation = _ARCHITECTURES[kind]
    for name, only in (_ONLY | {"hidden_act": activation}).items():
        value = rope.get(name, raw.get(name, only))
        if value != only:
            raise Act24Error(f"{path}: {name} = {value!r} is not supported; only {only!r} is")
    fields = {field.name: field for field in dataclasses.fields(LlamaConfig)}
    values = {name: value for name, value in raw.items() if name in fields}
    values |= {name: value for name, value in rope.items() if name == "rope_theta"}
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise Act24Error(f"{path}: {name} is missing")
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    # The low-rank literature's way to say "none"; transformers 5 refuses to save it.
    if values.get("pad_token_id") == -1:
        values["pad_token_id"] = None
    try:
        values["rope_scaling"] = _scaling(rope, values)
        return LlamaConfig(**values), kind
    except Act24Error as error:
        raise Act24Error(f"{path}: {error}") from error


def _scaling(rope: dict[str, Any], values: dict[str, Any]) -> RotaryScaling | None:
    kind = _kind(rope)
    if kind == "default":
        return None
    given = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
    given["rope_type"] = kind
    fields = {field.name for field in dataclasses.fields(RotaryScaling)}
    given.pop("partial_rotary_factor", None)
    if unknown := sorted(given.keys() - fields):
        raise Act24Error(f"rope_parameters: {', '.join(unknown)} not supported")
    if kind == "yarn":  # as transformers has it where the file says nothing
        given.setdefault(
            "original_max_position_embeddings",
            values.get("max_position_embeddings", LlamaConfig.max_position_embeddings),
        )
    return RotaryScaling(**{name: _number(value) for name, value in given.items()})


def _kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _number(value: Any) -> Any:
    """JSON writes 8192.0 for what is a count."""
    return int(value) if isinstance(value, float) and value.is_integer() and value > 1000 else value


def config_json(config: LlamaConfig, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a model, in the spelling that transformers 4 and 5, vLLM and SGLang all read.

    Args:
        kind: `"llama"` or `"arcee"`.
        dtype: of the weights.
    """
    architecture, activation = _ARCHITECTURES[kind]
    fields = dataclasses.asdict(config)
    scaling = fields.pop("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling:
        rope = {name: value for name, value in scaling.items() if value is not None}
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_act": activation,
        **fields,
        "head_dim": config.head_width,  # resolved, because transformers 4 does not read null as absent
        "num_key_value_heads": config.key_value_heads,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        **({"rope_scaling": rope} if scaling else {}),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        Act24Error: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Act24Error(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise Act24Error(f"{path} holds no JSON object")
    return content
