"""Adapters by themselves, in the format of PEFT: adapter_config.json and adapter_model.safetensors.

What `masked_lora` trained is marked there: PEFT would add B A without the mask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from act24.errors import Act24Error, reading
from act24.passes import Lora, MaskedLora
from act24.tools.files import check_hash, save_file, weights_hash, whole_folder
from act24.tools.huggingface.folder import SEAL
from act24.tools.run.build import Built

PEFT = "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

#: Keys of adapter_config.json that are read, or say no more than the tensors do.
_SELECTS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "r",
    "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "ensure_weight_tying", "eva_config",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
#: Values of other keys that plain LoRA has. Other initialisations change the weights of the base.
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter.

    Attributes:
        factors: A `[r, in]` and B `[out, r]`, by the name of the weight.
        scale: s of s B A.
        masked: trained under the mask of the weight.
        base: sha256 of the weights that it was trained on; empty: it does not say.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    masked: bool
    base: str = ""


def adapter_of(built: Built) -> Adapter:
    """
    Raises:
        Act24Error: the model has none, or several of other scales.
    """
    passes = [p for p in built.pipeline.passes if isinstance(p, Lora)]
    if len(passes) != 1:
        raise Act24Error(
            f"a model with one pass lora or masked_lora has an adapter, and this one has {len(passes)}"
        )
    state = built.model.state_dict()
    factors = {
        name.removesuffix("lora_A") + "weight": (state[name], state[name.removesuffix("lora_A") + "lora_B"])
        for name in state
        if name.endswith(".lora_A")
    }
    base = built.recipe.model.sha256 if built.recipe else None
    return Adapter(factors, passes[0].scale, isinstance(passes[0], MaskedLora), base or "")


def write_adapter(built: Built, out: Path) -> str:
    """Write the adapter of a model into a new folder.

    Raises:
        Act24Error: it has none, or the folder cannot be written.
    """
    adapter = adapter_of(built)
    (p,) = [p for p in built.pipeline.passes if isinstance(p, Lora)]
    base = built.recipe.model.pretrained if built.recipe else None
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": p.rank,
        "lora_alpha": p.alpha,
        "lora_dropout": p.dropout,
        "target_modules": _targets(adapter, built.model.state_dict()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    metadata = {"format": "pt", "act24_base_sha256": adapter.base, "act24_masked": str(adapter.masked)}
    tensors = {}
    for name, pair in adapter.factors.items():
        for letter, value in zip("AB", pair, strict=True):
            path = name.removesuffix(".weight")
            tensors[f"{_PREFIX}{path}.lora_{letter}.weight"] = value.detach().cpu().contiguous()
    with whole_folder(out) as written:
        save_file(tensors, written / WEIGHTS, {**metadata, SEAL: weights_hash(tensors)})
        (written / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size = sum(value.numel() for value in tensors.values())
    told = "; its base is needed with its masks, PEFT would leave them out" if adapter.masked else ""
    return f"{out}: an adapter in PEFT's format, {size:,} parameters, step {built.step}{told}"


def _targets(adapter: Adapter, state: Mapping[str, Tensor]) -> list[str]:
    """The last names of the linears that have adapters; whole ones where others are called the same."""
    whole = {name.removesuffix(".weight") for name in adapter.factors}
    last = {name.rpartition(".")[2] for name in whole}
    called = {name.removesuffix(".weight") for name in state if name.endswith(".weight")}
    others = any(name.rpartition(".")[2] in last for name in called - whole)
    return sorted(whole if others else last)


def read_adapter(folder: Path) -> Adapter:
    """An adapter in PEFT's format.

    Raises:
        Act24Error: it is none, damaged, or of a kind that is not read here: nothing of it is left out.
    """
    with reading(f"cannot read the adapter {folder}", safetensors.SafetensorError, KeyError, TypeError):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        _refuse_what_is_not_read(config, folder)
        rank = int(config["r"])
        if rank < 1:
            raise ValueError(f"r = {rank} in {CONFIG}")
        scale = float(config["lora_alpha"]) / rank ** (0.5 if config.get("use_rslora") else 1)
        with safetensors.safe_open(folder / WEIGHTS, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        check_hash(tensors, metadata, folder / WEIGHTS, SEAL)
        factors = _pairs(tensors, rank, folder / WEIGHTS)
    masked = metadata.get("act24_masked") == "True"
    return Adapter(factors, scale, masked, metadata.get("act24_base_sha256", ""))


def _refuse_what_is_not_read(config: dict[str, Any], folder: Path) -> None:
    """Whatever PEFT's adapters can be beyond s B A beside linears is said in a key of its own."""
    if config.get("peft_type") != "LORA":
        raise Act24Error(f"{folder}: of PEFT's adapters, plain LoRA is read, not {config.get('peft_type')}")
    for key, value in config.items():
        if value and key not in _SELECTS and value not in _PLAIN.get(key, ()):
            raise Act24Error(
                f"{folder}: of PEFT's adapters, plain LoRA is read, and {CONFIG} has {key} = {value!r}: "
                "merge it by PEFT"
            )


def _pairs(tensors: Mapping[str, Tensor], rank: int, file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the weight."""
    factors = {}
    for name in tensors:
        path, _, kind = name.rpartition(".lora_")
        other = {"A.weight": "B.weight", "B.weight": "A.weight"}.get(kind)
        if not path or other is None:
            raise Act24Error(f"{file}: {name} is no factor of a linear's adapter, which is all that is read")
        if f"{path}.lora_{other}" not in tensors:
            raise Act24Error(f"{file} has {name}, and no lora_{other} beside it")
        lora_a, lora_b = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
        if not (lora_a.ndim == lora_b.ndim == 2 and lora_a.shape[0] == lora_b.shape[1] == rank):
            raise Act24Error(
                f"{file}: {path} has factors {list(lora_a.shape)} and {list(lora_b.shape)}, expected "
                f"[{rank}, in] and [out, {rank}]: r is {rank} in {CONFIG}"
            )
        factors[f"{path.removeprefix(_PREFIX)}.weight"] = (lora_a, lora_b)
    return factors
