"""Masks beside the weights: `masks.safetensors`, eight to a byte. They, and not zeros, say what is pruned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import safetensors
from torch import Tensor

from act24.errors import Act24Error, reading
from act24.pruning.pattern import Pattern, follows, stored_pattern
from act24.pruning.stored import fault, packed_bits, unpacked_bits
from act24.tools.files import check_hash, save_file, weights_hash, whole_file
from act24.tools.huggingface.folder import seal_

MASKS = "masks.safetensors"
FORMAT = "act24-masks-1"
_BITS = ".mask"


@dataclass(frozen=True)
class Masks:
    """The masks of a model.

    Attributes:
        masks: by the weight's name, boolean, in the shape in which the weight is stored; True stays.
        patterns: by the same names.
        transposed: the names of weights that are stored `[in, out]`.
    """

    masks: Mapping[str, Tensor]
    patterns: Mapping[str, Pattern]
    transposed: frozenset[str] = frozenset()

    def dense(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a weight's shape as `[out, in]`."""
        return tensor.T if name in self.transposed else tensor

    def without(self, names: AbstractSet[str]) -> Masks:
        """The masks of all other weights."""
        masks = {name: mask for name, mask in self.masks.items() if name not in names}
        return Masks(masks, {name: self.patterns[name] for name in masks}, self.transposed - names)

    @property
    def pattern(self) -> str:
        """The one that all have, or the empty string."""
        kinds = {str(pattern) for pattern in self.patterns.values()}
        return kinds.pop() if len(kinds) == 1 else ""

    @property
    def sparsity(self) -> float:
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return 1 - kept / max(sum(mask.numel() for mask in self.masks.values()), 1)


def check_pruned(state: Mapping[str, Tensor], masks: Masks, subject: str) -> None:
    """What every save of a pruned model verifies.

    Raises:
        Act24Error: names the first weight that is missing, of another shape than its mask, not finite, not
            zero where it is pruned, -0.0, or whose mask does not follow its pattern.
    """
    for name, mask in masks.masks.items():
        if name not in state:
            raise Act24Error(f"{subject} has no {name}, of which there is a mask")
        weight = state[name].detach().cpu()
        why = fault(masks.dense(name, weight), masks.dense(name, mask), masks.patterns[name])
        if why:
            raise Act24Error(f"{subject}: {name}: {why}")


def write_masks(folder: Path, masks: Masks) -> None:
    """Write the masks of the weights that are in the folder, which are sealed.

    Raises:
        OSError, safetensors.SafetensorError: writing fails.
    """
    table = {
        name: {
            "pattern": str(masks.patterns[name]),
            "columns": masks.dense(name, mask).shape[1],
            "transposed": name in masks.transposed,
        }
        for name, mask in masks.masks.items()
    }
    tensors = {name + _BITS: packed_bits(masks.dense(name, mask)) for name, mask in masks.masks.items()}
    with whole_file(folder / MASKS) as partial:
        metadata = {"format": FORMAT, "masks": json.dumps(table), "sha256": weights_hash(tensors)}
        save_file(tensors, partial, metadata)
    seal_(folder)


def masks_beside(folder: Path, state: Mapping[str, Tensor]) -> Masks | None:
    """The masks in a folder, of its weights `state`; None if it has none.

    Raises:
        Act24Error: of `read_masks`, or they are of other weights (`check_pruned`).
    """
    masks = read_masks(folder)
    if masks is not None:
        check_pruned(state, masks, str(folder))
    return masks


def read_masks(folder: Path) -> Masks | None:
    """The masks in a folder; None if it has none.

    Raises:
        Act24Error: the file is damaged, or of another format.
    """
    file = folder / MASKS
    if not file.is_file():
        return None
    with reading(f"cannot read {file}", safetensors.SafetensorError, KeyError, TypeError, AttributeError):
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise Act24Error(f"{file} is no file of masks: its format is {metadata.get('format')!r}")
            table = json.loads(metadata["masks"])
            bits = {name: opened.get_tensor(name + _BITS) for name in table}
        check_hash({name + _BITS: value for name, value in bits.items()}, metadata, file)
        masks, patterns, transposed = {}, {}, set()
        for name, entry in table.items():
            mask = unpacked_bits(bits[name], int(entry["columns"]))
            patterns[name] = stored_pattern(entry["pattern"])
            if not follows(mask, patterns[name]):
                raise Act24Error(
                    f"{file}: the mask of {name} does not follow {patterns[name]}: it is damaged"
                )
            if entry["transposed"]:
                transposed.add(name)
                mask = mask.T.contiguous()
            masks[name] = mask
    return Masks(masks, patterns, frozenset(transposed))
