"""Checkpoints in Hugging Face's layout, config.json beside model.safetensors or beside shards and their
index, in and out: of LLaMA, of Arcee (relu² networks), and of our own type "act24"; in only, of the code that
was published with CoLA, CoLA-M's names included.

Every parameter that is missing, left over or of another shape is refused by name.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from act24.errors import Act24Error
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.passes import Pass, Pipeline, Relu2FFN
from act24.tools.files import check_hash, save_file, weights_hash, whole_file
from act24.tools.huggingface.by_transformers import config_fields
from act24.tools.huggingface.config import (
    ACT24,
    ARCEE,
    CONFIG,
    LLAMA,
    MODULE,
    MODULE_TEXT,
    config_json,
    read_config,
    read_json,
)

logger = logging.getLogger("act24")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PACKED = "packed.safetensors"  # of `act24 pack` (tools/pruning/packed.py)

#: In the header of a file of weights that act24 wrote and nobody wrote over: the hash of its tensors.
SEAL = "act24_sha256"

#: Bytes of a file of weights; what does not fit goes into more of them.
SHARD = 5 * 10**9

#: The name of a factor or a bias in CoLA-M: layer, part of it that is computed anew in backward, linear.
_OF_COLA_M = re.compile(r"model\.layers\.(\d+)\.(\w+)\.(?:pre|post)_(\w+_proj)\.(cola_a|cola_b|bias)")


def is_pretrained(folder: Path) -> bool:
    """Whether a folder has a config.json, as Hugging Face's do and ours, runs and checkpoints, do not."""
    return (folder / CONFIG).is_file()


def load_pretrained(folder: str | Path) -> LlamaForCausalLM:
    """The model stored in `folder`: see `open_pretrained`."""
    return open_pretrained(folder)[0]


def open_pretrained(
    folder: str | Path, state: Mapping[str, Tensor] | None = None
) -> tuple[LlamaForCausalLM, Pipeline]:
    """The LLaMA, Arcee, act24 or CoLA model stored in `folder`, on the CPU, and the pipeline that
    rewrote the stock LLaMA into it.

    Its parameters have the dtype in which they are stored; of several, that of config.json, as
    `transformers` has it. Reads config.json and model.safetensors, or the shards that
    model.safetensors.index.json lists.

    Args:
        state: the weights, where they lie otherwise in the folder.

    Raises:
        Act24Error: names the file and the field or parameter that is missing, unknown or unsupported.
    """
    folder = Path(folder)
    config, passes = read_config(folder)
    model, pipeline = unset(config, passes)
    state = read_state(folder) if state is None else state
    # Old checkpoints store this buffer; it follows from rope_theta.
    state = {name: value for name, value in state.items() if not name.endswith(".rotary_emb.inv_freq")}
    state = dict(_under_our_name(*item) for item in state.items())
    state = without_tied_head(state, config, str(folder))
    check_state(state, model, str(folder))
    state = _of_one_dtype(state, model, folder)
    model.load_state_dict(state, assign=True)
    fill_buffers_(model)
    return model, pipeline


def without_tied_head(state: Mapping[str, Tensor], config: LlamaConfig, subject: str) -> dict[str, Tensor]:
    """A state dict, that of `subject`, without the head that is the embedding: `transformers` lists it twice,
    and some files have it under the head's name alone.

    Raises:
        Act24Error: the configuration ties the two, and their weights differ.
    """
    state = dict(state)
    if config.tie_word_embeddings and "lm_head.weight" in state:
        head = state.pop("lm_head.weight")
        if not torch.equal(head, state.setdefault("model.embed_tokens.weight", head)):
            raise Act24Error(
                f"{subject}: tie_word_embeddings is set, but lm_head.weight is not model.embed_tokens.weight"
            )
    return state


def _of_one_dtype(state: dict[str, Tensor], model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """A state dict whose parameters can be computed with together; buffers as they are.

    Raises:
        Act24Error: several dtypes are stored, and config.json does not say in which to compute.
    """
    parameters = [name for name, _ in model.named_parameters()]
    stored = sorted({str(state[name].dtype).removeprefix("torch.") for name in parameters})
    if len(stored) == 1:
        return state
    raw = read_json(folder / CONFIG)
    name = raw.get("dtype") or raw.get("torch_dtype")
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise Act24Error(
            f"{folder} has parameters in {' and '.join(stored)}, and dtype in its {CONFIG} is {name!r}: "
            'write there which one to compute in, "float32" or "bfloat16"'
        )
    told = "warning: %s has parameters in %s: all are read as %s, the dtype of its config.json"
    logger.warning(told, folder, " and ".join(stored), name)
    return state | {name: state[name].to(dtype) for name in parameters}


def fill_buffers_(model: torch.nn.Module) -> None:
    """Zeros for what no file holds: the padding of the next forward, and the like."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def save_pretrained(
    model: LlamaForCausalLM, folder: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a stock model so that `transformers`' `AutoModelForCausalLM.from_pretrained` computes the same
    logits. `metadata` goes into the headers of the weights.

    Raises:
        Act24Error: the parameters are no longer those of a stock LLaMA, or writing fails.
    """
    state = model.state_dict()
    stock, _ = unset(model.config, ())
    check_state(state, stock, "this model is no stock LLaMA, whose form was asked for")
    write_pretrained(folder, model.config, LLAMA, state, metadata)


def write_pretrained(
    folder: str | Path,
    config: LlamaConfig,
    kind: str,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    passes: Sequence[Pass] = (),
    pattern: str = "",
    shard: int = SHARD,
) -> None:
    """Write the weights `state` of a model and its config.json. Each file appears under its name only when it
    is whole, with the rights that the process gives new files, and config.json last.

    Args:
        kind, passes, pattern: as for `act24.tools.huggingface.config.config_json`.
        shard: bytes of a file.

    Raises:
        Act24Error: `state` does not fit the configuration, `transformers` would not open it, or writing
            fails.
    """
    folder = Path(folder)
    state = {name: value.detach().contiguous() for name, value in state.items()}
    model, _ = unset(config, (Relu2FFN(width="keep"),) if kind == ARCEE else passes)
    check_state(state, model, f"this is no {kind} model")
    dtype = state["model.embed_tokens.weight"].dtype
    content = config_fields(config_json(config, kind, dtype, passes, pattern))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, state, metadata, shard)
        if kind == ACT24:
            (folder / MODULE).write_text(MODULE_TEXT, encoding="utf-8")
        with whole_file(folder / CONFIG) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except (OSError, safetensors.SafetensorError) as error:
        raise Act24Error(f"cannot write the checkpoint {folder}: {error}") from error


def write_weights(
    folder: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, shard: int = SHARD
) -> None:
    """model.safetensors, or shards with their index, in an existing folder, in the place of the other.

    Raises:
        OSError, safetensors.SafetensorError: writing fails.
    """
    split = split_torch_state_dict_into_shards(dict(state), max_shard_size=shard)
    for name, tensors in split.filename_to_tensors.items():
        with whole_file(folder / name) as partial:
            content = {tensor: state[tensor].contiguous() for tensor in tensors}
            save_file(content, partial, {**(metadata or {}), "format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        with whole_file(folder / INDEX) as partial:
            partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / (WEIGHTS if split.is_sharded else INDEX)).unlink(missing_ok=True)


def _under_our_name(name: str, value: Tensor) -> tuple[str, Tensor]:
    """CoLA's A is `[in, R]` and its B `[R, out]` in files of its authors; ours are `[R, in]`, `[out, R]`.
    Those of CoLA-M keep A and B in two modules, and some B in the next layer."""
    if (split := _OF_COLA_M.fullmatch(name)) is not None:
        layer, part, linear, leaf = split.groups()
        block = "self_attn" if linear in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        name = f"model.layers.{int(layer) - (part == 'last_layer_post_mlp')}.{block}.{linear}.{leaf}"
    module, _, leaf = name.rpartition(".")
    ours = {"cola_a": "weight_in", "cola_b": "weight_out"}.get(leaf)
    return (f"{module}.{ours}", value.T.contiguous()) if ours else (name, value)


def unset(config: LlamaConfig, passes: Sequence[Pass]) -> tuple[LlamaForCausalLM, Pipeline]:
    """The model of a configuration, on the meta device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    pipeline = Pipeline(model, passes, keep_all=True)
    pipeline.commit_()
    return model, pipeline


def read_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, by name, from one file or from all shards of the index."""
    refuse_packed(folder)
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        pickles = [name for name in (PICKLE, PICKLE_INDEX) if (folder / name).is_file()]
        told = f", only {pickles[0]}, whose pickles are read of run_c4.py's folders alone" if pickles else ""
        raise Act24Error(
            f"{folder} has no {WEIGHTS} and no {INDEX}{told}. Where transformers opens the model, its "
            f"AutoModelForCausalLM.from_pretrained(…).save_pretrained(OUT) writes a folder that has"
        )
    state: dict[str, Tensor] = {}
    for name in weight_files(folder):
        tensors, metadata = _read(folder / name)
        check_hash(tensors, metadata, folder / name, SEAL)
        state.update(tensors)
    return state


def weight_files(folder: Path, whole: str = WEIGHTS, index: str = INDEX) -> list[str]:
    """The files of a checkpoint's weights: the whole one, or else the shards that the index lists. Of both,
    which other writers leave, `transformers` reads the whole one."""
    if not (folder / index).is_file():
        return [whole]
    if (folder / whole).is_file():
        told = "warning: %s has %s and shards of %s: the first is read, as transformers does"
        logger.warning(told, folder, whole, index)
        return [whole]
    return sorted(set(read_json(folder / index).get("weight_map", {}).values()))


def seal_(folder: Path) -> None:
    """Put the hash of its tensors into the header of each file of weights in a folder.

    Raises:
        Act24Error, OSError, safetensors.SafetensorError: reading or writing fails.
    """
    for file in (folder / name for name in weight_files(folder)):
        tensors, metadata = _read(file)
        with whole_file(file) as partial:
            save_file(tensors, partial, {**metadata, SEAL: weights_hash(tensors)})


def check_seal(folder: Path) -> None:
    """Check the files of weights that are sealed; what another program writes over them is not.

    Raises:
        Act24Error: one is damaged.
    """
    for file in (folder / name for name in weight_files(folder)):
        if file.is_file():
            check_hash(*_read(file), file, SEAL)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise Act24Error(f"cannot read {file}: {error}") from error


def refuse_packed(folder: Path) -> None:
    """
    Raises:
        Act24Error: the folder's weights are packed.
    """
    if (folder / PACKED).is_file():
        raise Act24Error(f"{folder} holds packed weights: act24 pack {folder} OUT makes them dense again")


def check_state(state: Mapping[str, Tensor], model: LlamaForCausalLM, subject: str) -> None:
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
