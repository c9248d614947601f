"""Pruned models in less space: `act24 pack` and back.

OUT/
    config.json, tokenizer…       as before
    packed.safetensors            of each pruned weight `<weight>.values`, what is kept, row by row, and
                                  `<weight>.positions`, eight to a byte; every other tensor as it is. The
                                  header has pattern, shape and dtype of each

2:4 in 16 bits takes 9/16 of the dense weight and a header. What comes back is bit for bit what was there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import safetensors
from torch import Tensor

from act24.errors import Act24Error, reading
from act24.pruning.pattern import follows, stored_pattern
from act24.pruning.stored import compressed, expanded
from act24.tools.files import check_hash, save_file, weights_hash, whole_file, whole_folder
from act24.tools.huggingface.folder import INDEX, PACKED, WEIGHTS, read_state, write_weights
from act24.tools.pruning.masks import MASKS, Masks, check_pruned, read_masks, write_masks

FORMAT = "act24-packed-1"
_VALUES, _POSITIONS = ".values", ".positions"


def write_packed(folder: Path, state: dict[str, Tensor], masks: Masks) -> None:
    """Write the weights of a pruned model, each of them what its mask says (`check_pruned`).

    Raises:
        OSError, safetensors.SafetensorError: writing fails.
    """
    tensors = {name: value.contiguous() for name, value in state.items() if name not in masks.masks}
    table = {}
    for name, mask in masks.masks.items():
        dense, kept = masks.dense(name, state[name]), masks.dense(name, mask)
        tensors[name + _VALUES], tensors[name + _POSITIONS] = compressed(dense, kept)
        table[name] = {
            "pattern": str(masks.patterns[name]),
            "shape": list(dense.shape),
            "dtype": str(dense.dtype).removeprefix("torch."),
            "transposed": name in masks.transposed,
        }
    with whole_file(folder / PACKED) as partial:
        metadata = {"format": FORMAT, "packed": json.dumps(table), "sha256": weights_hash(tensors)}
        save_file(tensors, partial, metadata)


def read_packed(folder: Path) -> tuple[dict[str, Tensor], Masks]:
    """The weights, dense again, and their masks.

    Raises:
        Act24Error: the file is missing, damaged, or of another format.
    """
    file = folder / PACKED
    kinds = (safetensors.SafetensorError, KeyError, TypeError, AttributeError)
    with reading(f"cannot read {file}", *kinds), safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise Act24Error(f"{file} is no packed model: its format is {metadata.get('format')!r}")
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        check_hash(tensors, metadata, file)
        masks, patterns, transposed = {}, {}, set()
        for name, entry in json.loads(metadata["packed"]).items():
            values, bits = tensors.pop(name + _VALUES), tensors.pop(name + _POSITIONS)
            weight, mask = expanded(values, bits, int(entry["shape"][1]))
            patterns[name] = stored_pattern(entry["pattern"])
            dtype = str(weight.dtype).removeprefix("torch.")
            if (
                list(weight.shape) != entry["shape"]
                or dtype != entry["dtype"]
                or not follows(mask, patterns[name])
            ):
                raise Act24Error(f"{file}: {name} is not the {entry['pattern']} weight that its header says")
            if entry["transposed"]:
                transposed.add(name)
                weight, mask = weight.T.contiguous(), mask.T.contiguous()
            tensors[name], masks[name] = weight, mask
    return tensors, Masks(masks, patterns, frozenset(transposed))


def pack(source: Path, out: Path) -> str:
    """A pruned folder (`act24 prune`, or an export of a run with masks) in less space; a packed one dense
    again.

    Returns:
        what was written, and its size beside the other.

    Raises:
        Act24Error: the folder has neither masks nor packed weights, or `out` exists or cannot be written.
    """
    if out.exists():
        raise Act24Error(f"{out} exists already")
    unpack = (source / PACKED).is_file()
    if unpack:
        state, masks = read_packed(source)
    else:
        found = read_masks(source)
        if found is None:
            raise Act24Error(f"{source} has no {MASKS}: prune a model first (act24 prune)")
        state, masks = read_state(source), found
        check_pruned(state, masks, str(source))
    weights = (WEIGHTS, INDEX, PACKED, MASKS)
    with whole_folder(out) as written:
        for file in sorted(source.iterdir()):
            if (
                file.is_file()
                and file.name not in weights
                and not file.name.startswith(("model-", "events."))
            ):
                shutil.copyfile(file, written / file.name)
        if unpack:
            write_weights(written, state)
            write_masks(written, masks)
        else:
            write_packed(written, state, masks)
    sizes = [
        sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.name != MASKS)
        for folder in (source, out)
    ]
    how = "dense again" if unpack else "packed"
    return f"{out}: {len(masks.masks)} weights {how}, {sizes[0]:,} → {sizes[1]:,} bytes"
