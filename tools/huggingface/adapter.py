"""Adapters by themselves, in the format of PEFT: adapter_config.json and adapter_model.safetensors.

What `masked_lora` trained is marked there: PEFT would add B A without the mask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
        "target_modules": sorted({name.split(".")[-2] for name in adapter.factors}),
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


def read_adapter(folder: Path) -> Adapter:
    """An adapter in PEFT's format.

    Raises:
        Act24Error: it is none, damaged, or of a kind that is not read here.
    """
    with reading(f"cannot read the adapter {folder}", safetensors.SafetensorError, KeyError, TypeError):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
            raise Act24Error(f"{folder}: of PEFT's adapters, plain LoRA is read")
        scale = float(config["lora_alpha"]) / int(config["r"]) ** (0.5 if config.get("use_rslora") else 1)
        with safetensors.safe_open(folder / WEIGHTS, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        check_hash(tensors, metadata, folder / WEIGHTS, SEAL)
        factors = {}
        for name in tensors:
            if name.endswith(".lora_A.weight"):
                path = name.removesuffix(".lora_A.weight")
                weight = f"{path.removeprefix(_PREFIX)}.weight"
                factors[weight] = (tensors[name], tensors[f"{path}.lora_B.weight"])
    masked = metadata.get("act24_masked") == "True"
    return Adapter(factors, scale, masked, metadata.get("act24_base_sha256", ""))
