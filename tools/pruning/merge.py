"""`act24 merge`: an adapter into the weights that it belongs to, where that loses no zero."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.passes.recovery import has_masks, kept_masks
from act24.pruning.adapters import merged
from act24.tools.files import weights_hash, whole_folder
from act24.tools.huggingface.adapter import Adapter, adapter_of, read_adapter
from act24.tools.huggingface.any_model import AnyModel
from act24.tools.pruning.blocks import decoder_blocks, transposed_weights
from act24.tools.pruning.folder import pruned_from, write_pruned
from act24.tools.pruning.masks import Masks, masks_beside
from act24.tools.run.build import load
from act24.tools.run.opening import open_any

#: Zeros that a dense weight may have by chance, as a share.
_BY_CHANCE = 0.05


def merge(source: str, out: Path, adapter: Path | None = None, allow_dense: bool = False) -> str:
    """Write a model with its adapter merged into it.

    Args:
        source: a run of `lora` or `masked_lora`, or a checkpoint of one; with `adapter` the base model.
        adapter: a folder in PEFT's format.
        allow_dense: merge a plain adapter into a pruned model, whose zeros it fills.

    Returns:
        what was written.

    Raises:
        Act24Error: there is no adapter, it is of another base, or zeros would be lost.
    """
    if out.exists():
        raise Act24Error(f"{out} exists already")
    base, found, masks = _of_folder(source, adapter) if adapter else _of_run(source)
    state = dict(base.model.named_parameters())
    transposed = transposed_weights(base.model)
    _check_fits(found, state, transposed, source)
    if found.masked and masks is None:
        raise Act24Error(f"{source} has no masks, under which this adapter was trained")
    masks = masks or Masks({}, {})
    changed = _merged(found, state, transposed, masks)
    filled = set() if found.masked else {name for name in changed if _is_pruned(state[name], masks, name)}
    before, after = _sparsity(base, {}), _sparsity(base, changed)
    if filled and not allow_dense:
        raise Act24Error(
            f"merging would fill the zeros of {len(filled)} pruned weights, {min(filled)} among them, and "
            f"would leave sparsity {after:.4f} of {before:.4f}: keep the adapter beside the model, train "
            "masked_lora, which merges without losing a zero, or give --allow-dense"
        )
    with torch.no_grad():
        for name, value in changed.items():
            if not torch.isfinite(value).all():
                raise Act24Error(f"{name} would not be finite: the adapter or the model is not")
            state[name].copy_(value)
    kept = masks.without(filled)
    dense, weights = pruned_from(base.folder) if base.folder else (None, None)
    report = {
        "merged": str(adapter or source),
        "sparsity_before": before,
        "sparsity": after,
        **({"dense": dense, "dense_weights": weights} if dense else {}),
    }
    with whole_folder(out) as written:
        write_pruned(base, written, kept, report)
    return f"{out}: {len(found.factors)} adapters merged, sparsity {before:.4f} → {after:.4f}"


def _of_folder(source: str, adapter: Path) -> tuple[AnyModel, Adapter, Masks | None]:
    base, found = open_any(source), read_adapter(adapter)
    if found.base and found.base != weights_hash(dict(base.model.named_parameters())):
        raise Act24Error(f"{adapter} was trained on other weights than those of {source}")
    return base, found, _masks_of(base)


def _of_run(source: str) -> tuple[AnyModel, Adapter, Masks | None]:
    built = load(source)
    found = adapter_of(built)
    began = built.recipe.model.pretrained if built.recipe else None
    if began is None or built.recipe is None:
        raise Act24Error(f"{source} began with no pretrained model; act24 export merges what it can")
    opened = open_any(began)
    if weights_hash(dict(opened.model.named_parameters())) != built.recipe.model.sha256:
        raise Act24Error(f"{began} has other weights than the run {source} began with")
    return opened, found, _masks_of(opened)


def _masks_of(opened: AnyModel) -> Masks | None:
    """Those in a folder, or of the passes of a run."""
    if opened.folder:
        return masks_beside(opened.folder, opened.state())
    pipeline = load(opened.source).pipeline
    return Masks(*kept_masks(pipeline)) if has_masks(pipeline) else None


def _check_fits(
    adapter: Adapter, state: Mapping[str, torch.nn.Parameter], transposed: AbstractSet[str], source: str
) -> None:
    if not adapter.factors:
        raise Act24Error("the adapter has no factors")
    for name, (lora_a, lora_b) in adapter.factors.items():
        wanted = [lora_b.shape[0], lora_a.shape[1]]
        found = _dense(state[name], name, transposed).shape if name in state else None
        if found is None or list(found) != wanted:
            shape = "not there" if found is None else list(found)
            raise Act24Error(
                f"the adapter is of another base: {name} is {shape} in {source}, the adapter's {wanted}"
            )


def _dense(tensor: Tensor, name: str, transposed: AbstractSet[str]) -> Tensor:
    """A tensor of a weight's shape as `[out, in]`, and back."""
    return tensor.T if name in transposed else tensor


def _merged(
    adapter: Adapter, state: Mapping[str, torch.nn.Parameter], transposed: AbstractSet[str], masks: Masks
) -> dict[str, Tensor]:
    """By name, in the shapes in which they are stored."""

    def new(name: str) -> Tensor:
        weight = state[name].detach()
        mask = masks.masks.get(name, torch.ones(weight.shape, dtype=torch.bool))
        own = _dense(mask, name, transposed) if adapter.masked else None
        whole = merged(_dense(weight, name, transposed), *adapter.factors[name], adapter.scale, own)
        return _dense(whole, name, transposed).contiguous()

    return {name: new(name) for name in adapter.factors}


def _is_pruned(weight: Tensor, masks: Masks, name: str) -> bool:
    """By its mask; of a weight that has none, by its zeros: another program may have pruned it."""
    if name in masks.masks:
        return not bool(masks.masks[name].all())
    return float((weight == 0).double().mean()) > _BY_CHANCE


def _sparsity(base: AnyModel, changed: dict[str, Tensor]) -> float:
    """The share of zeros in the matrices of the blocks."""
    zeros = total = 0
    for name, block in decoder_blocks(base.model).items():
        for local, parameter in block.named_parameters():
            if parameter.ndim == 2:
                value = changed.get(f"{name}.{local}", parameter.detach())
                zeros, total = zeros + int((value == 0).sum()), total + value.numel()
    return zeros / max(total, 1)
