"""config.json of the models that the stock LLaMA computes, as it is or rewritten by passes: in and out.

`transformers` knows the relu² network as Arcee: LLaMA's block with down(relu²(up(x))). The type "act24" is a
LLaMA and the passes that rewrite it (`act24.tools.huggingface.model_type`). Nothing is guessed. What is not
computed here is refused by name, and everything that a reader has its own default for is written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from act24.errors import Act24Error
from act24.llama import LlamaConfig
from act24.options import one_of
from act24.passes import Cola, Pass, Relu2FFN
from act24.recipes.load import passes_of_tables
from act24.recipes.records import as_table
from act24.rotary import FIELDS_OF, RotaryScaling

logger = logging.getLogger("act24")

CONFIG = "config.json"
LLAMA, ARCEE, ACT24 = "llama", "arcee", "act24"

#: Of the code that was published with CoLA (arXiv 2502.10940); read, never written.
COLA = "cola"

#: By model type: the class in `transformers` (of ours for "act24"), and the activation that it stands for.
_ARCHITECTURES = {
    LLAMA: ("LlamaForCausalLM", "silu"),
    ARCEE: ("ArceeForCausalLM", "relu2"),
    ACT24: ("Act24ForCausalLM", "silu"),
    COLA: ("ColaForCausalLM", "silu"),
}

#: Beside config.json, for type "act24": what `trust_remote_code=True` runs where act24 was not imported.
MODULE = "modeling_act24.py"
MODULE_TEXT = '''"""Runs with act24 (pip install act24), which applies the model's passes to a LLaMA."""

from act24.tools.huggingface.model_type import Act24Config, Act24ForCausalLM

__all__ = ["Act24Config", "Act24ForCausalLM"]
'''
#: What says so in config.json.
AUTO_MAP = {
    "AutoConfig": "modeling_act24.Act24Config",
    "AutoModelForCausalLM": "modeling_act24.Act24ForCausalLM",
}

#: Fields of `transformers`' configs that the stock model lacks, with the one value it stands for.
_ONLY = {
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "sliding_window": None,
}

#: Of rotary settings: what is no field of `RotaryScaling`; what `transformers` takes for none where it is 0.
_NO_FIELDS = ("rope_theta", "type", "rope_type", "partial_rotary_factor")
_ZERO_IS_NONE = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_ORIGINAL = "original_max_position_embeddings"

#: What a config.json leaves out means this, where that is not the default of LlamaConfig.
_DEFAULTS_OF = {
    LLAMA: {},
    ARCEE: {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ACT24: {},
    COLA: {},
}


def read_config(folder: Path) -> tuple[LlamaConfig, tuple[Pass, ...]]:
    """The configuration of the stock LLaMA in `folder`, and the passes that rewrite it.

    Raises:
        Act24Error: no such file, or something in it that would change the numbers.
    """
    path = folder / CONFIG
    return config_of(read_json(path), str(path))


def config_of(raw: dict[str, Any], path: str) -> tuple[LlamaConfig, tuple[Pass, ...]]:
    """`read_config` of the content of a config.json; `path` is what errors call it."""
    kind = raw.get("model_type")
    if kind not in _ARCHITECTURES:
        raise Act24Error(
            f"{path}: model_type is {kind!r}; {', '.join(map(repr, _ARCHITECTURES))} are what the stock "
            "model computes: open another with AutoModelForCausalLM.from_pretrained of transformers"
        )
    raw = {**_DEFAULTS_OF[kind], **raw}
    rope = _rope(raw, path)
    _, activation = _ARCHITECTURES[kind]
    for name, only in (_ONLY | {"hidden_act": activation}).items():
        value = rope.get(name, raw.get(name, only))
        if value is not None and value != only:
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
        values["rope_scaling"] = _scaling(rope, raw, path)
        return LlamaConfig(**values), _passes(kind, raw)
    except Act24Error as error:
        raise Act24Error(f"{path}: {error}") from error


def _passes(kind: str, raw: dict[str, Any]) -> tuple[Pass, ...]:
    if kind == ARCEE:
        return (Relu2FFN(width="keep"),)
    if kind == LLAMA:
        return ()
    if kind == COLA:  # its lr_act_type is never read: the bottleneck's activation is hidden_act
        rank = raw.get("rank") or raw["hidden_size"] // 4
        silu = "drop" if raw.get("only_lr_act", True) else "keep"
        return (Cola(attn_rank=rank, mlp_rank=rank, mlp_activation=silu),)
    tables = raw.get("act24_passes")
    if not isinstance(tables, list):
        raise Act24Error('a model of type "act24" has act24_passes, a list of tables')
    return passes_of_tables(tables, "act24_passes")


def _rope(raw: dict[str, Any], path: str) -> dict[str, Any]:
    """The rotary settings of a config.json, without fields that are null. transformers 5 keeps rope_theta
    inside rope_parameters; 4 has it beside rope_scaling, null if unused. Where both are there, 4 and 5 read
    rope_scaling."""
    rope, older = (_set(raw.get(name) or {}) for name in ("rope_parameters", "rope_scaling"))
    if rope and older:
        one, other = ({**table, "rope_type": _kind(table)} for table in (rope, older))
        for name in ("rope_type", *sorted((one.keys() | other.keys()) - {"rope_type", "type", "rope_theta"})):
            if one.get(name) != other.get(name):
                raise Act24Error(
                    f"{path}: rope_parameters says {name} = {one.get(name)!r} and rope_scaling "
                    f"{other.get(name)!r}: remove the wrong one"
                )
    thetas = {
        "in rope_scaling": older.get("rope_theta"),
        "in rope_parameters": rope.get("rope_theta"),
        "beside them": raw.get("rope_theta"),
    }
    given = {place: theta for place, theta in thetas.items() if theta is not None}
    if older and [*given] == ["in rope_parameters"]:
        given["where transformers looks beside rope_scaling"] = LlamaConfig.rope_theta
    if len({*given.values()}) > 1:
        told = " and ".join(f"{theta} {place}" for place, theta in given.items())
        raise Act24Error(f"{path}: rope_theta is {told}: remove the wrong one")
    return {**older, **rope}


def _set(table: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if value is not None}


def _scaling(rope: dict[str, Any], raw: dict[str, Any], path: str) -> RotaryScaling | None:
    """What `transformers` computes of these settings."""
    kind = _kind(rope)
    one_of("rope_parameters", "rope_type", kind, ("default", *FIELDS_OF))
    given = {name: value for name, value in rope.items() if name not in _NO_FIELDS}
    read = FIELDS_OF.get(kind, ())
    if unread := sorted(given.keys() - read):
        logger.warning(
            "warning: %s: rope_parameters of type %r have no %s, which transformers does not read either",
            path,
            kind,
            ", ".join(unread),
        )
    if kind == "default":
        return None
    given = {name: value for name, value in given.items() if name in read}
    given |= {name: None for name in _ZERO_IS_NONE if given.get(name) == 0}
    if kind in ("llama3", "yarn"):
        # In the table, or beside it as in Phi-3's files; else that of the model.
        inside, beside = given.get(_ORIGINAL), raw.get(_ORIGINAL)
        longest = raw.get("max_position_embeddings", LlamaConfig.max_position_embeddings)
        if inside != beside and None not in (inside, beside):
            raise Act24Error(
                f"{_ORIGINAL} is {inside} in the rotary settings and {beside} beside them: remove the wrong "
                "one"
            )
        given[_ORIGINAL] = next(length for length in (inside, beside, longest) if length is not None)
        if kind == "yarn" and isinstance(longest, int) and given[_ORIGINAL]:
            given.setdefault("factor", longest / given[_ORIGINAL])
    if "factor" not in given:
        raise Act24Error(f'rope_parameters: rope_type "{kind}" needs factor')
    if isinstance(length := given.get(_ORIGINAL), float) and length.is_integer():  # JSON writes 8192.0
        given[_ORIGINAL] = int(length)
    return RotaryScaling(rope_type=kind, **given)


def _kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def config_json(
    config: LlamaConfig, kind: str, dtype: torch.dtype, passes: Sequence[Pass] = (), pattern: str = ""
) -> dict[str, Any]:
    """The config.json of a model, in the spelling that transformers 4 and 5, vLLM and SGLang all read.

    Args:
        config: of the stock LLaMA; for `"arcee"` with the width of the relu² network.
        kind: `"llama"`, `"arcee"` or `"act24"`.
        dtype: of the weights.
        passes: of `"act24"`, as they act in evaluation.
        pattern: what zeros the weights have, `"2:4"`; written as `act24_weight_pattern` if there is any.
    """
    architecture, activation = _ARCHITECTURES[kind]
    fields = dataclasses.asdict(config)
    scaling = fields.pop("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling:
        rope = {name: value for name, value in scaling.items() if value is not None}
    content = {
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
    if pattern:
        content["act24_weight_pattern"] = pattern
    if kind == ACT24:
        content["act24_passes"] = [as_table(p, "use") for p in passes]
        content["auto_map"] = AUTO_MAP
    return content


def uneven_heads(config: LlamaConfig) -> str:
    """Why `transformers` opens no LLaMA or Arcee of this configuration, though it would compute it; or ""."""
    if config.hidden_size % config.num_attention_heads == 0:
        return ""
    return (
        f"transformers wants a hidden_size that is a multiple of num_attention_heads, which "
        f"{config.hidden_size} is not of {config.num_attention_heads}"
    )


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
