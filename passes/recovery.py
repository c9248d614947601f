"""What a training loop does for a pruned model whose accuracy it wins back: `sparse_mask`, `lora`,
`masked_lora`.

    backward of all micro-batches
    clear_pruned_gradients_(pipeline)      before they are clipped: what is pruned has no part in the norm
    optimizer.step()
    impose_zeros_(pipeline)                whatever the optimizer did

or, in a loop that cannot be written so, `keep_zeros_(pipeline)` once, which hooks gradients and optimizers.

Masks are packed in buffers beside the weights. Sharded parameters take their part of a mask, which every
process has whole; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from act24.errors import PassError
from act24.passes.graph.region import joined
from act24.passes.pipeline import Pipeline
from act24.passes.sparse_mask import MASK_BITS, TRANSPOSED, SparseMask
from act24.pruning.methods import masked
from act24.pruning.pattern import Pattern
from act24.pruning.stored import bits_to_mask, fault, packed_bits

#: The patterns that the masks of a model have, by weight.
_PATTERNS: WeakKeyDictionary[Pipeline, dict[str, Pattern]] = WeakKeyDictionary()


@dataclass(frozen=True)
class PrunedWeight:
    """A weight with a mask.

    Attributes:
        name: of the weight, fully qualified.
        bits: the buffer with its mask.
        transposed: stored `[in, out]`.
    """

    name: str
    parameter: nn.Parameter
    bits: Tensor
    transposed: bool

    def mask(self) -> Tensor:
        """Boolean, in the shape in which the whole weight is stored; on the device, without waiting."""
        shape = self.parameter.shape
        columns = shape[0] if self.transposed else shape[1]
        mask = bits_to_mask(self.bits)[:, :columns]
        return mask.T if self.transposed else mask


def pruned_weights(pipeline: Pipeline) -> Iterator[PrunedWeight]:
    """The weights that have masks."""
    for fqn, module in pipeline.regions.items():
        for name, (kind, of) in module.buffer_kinds.items():
            if kind in (MASK_BITS, TRANSPOSED):
                weight, bits = module.get_parameter(of), module.get_buffer(name)
                yield PrunedWeight(joined(fqn, of), weight, bits, kind == TRANSPOSED)


def has_masks(pipeline: Pipeline) -> bool:
    """Whether a pass keeps zeros."""
    return next(pruned_weights(pipeline), None) is not None


@torch.no_grad()
def clear_pruned_gradients_(pipeline: Pipeline) -> None:
    """Write zeros into the gradients of what is pruned."""
    for weight in pruned_weights(pipeline):
        if weight.parameter.grad is not None:
            _clear_(weight.parameter.grad, weight.mask())


@torch.no_grad()
def impose_zeros_(pipeline: Pipeline) -> None:
    """Write zeros into what is pruned, none of them -0; frozen weights are as they were."""
    for weight in pruned_weights(pipeline):
        if weight.parameter.requires_grad:
            _clear_(weight.parameter, weight.mask())


def keep_zeros_(pipeline: Pipeline) -> Callable[[], None]:
    """Keep zeros in somebody else's loop: the gradient of what is pruned is cleared as it is added up, and
    zeros are imposed behind every step of an optimizer that has the weight, wrapped or made later.

    Returns:
        what ends that.

    Raises:
        PassError: by the optimizer's step: of `check_optimizer`.
    """
    weights = {id(weight.parameter): weight for weight in pruned_weights(pipeline)}

    def clear(parameter: Tensor) -> None:
        if parameter.grad is not None:
            _clear_(parameter.grad, weights[id(parameter)].mask())

    def before(optimizer: Optimizer, *_: Any) -> None:
        check_optimizer(pipeline, optimizer)

    @torch.no_grad()
    def after(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if weight := weights.get(id(parameter)):
                    _clear_(parameter, weight.mask())

    trained = [weight.parameter for weight in weights.values() if weight.parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(clear) for parameter in trained]
    handles += [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def check_optimizer(pipeline: Pipeline, optimizer: Optimizer) -> None:
    """Refuse what makes NaN of zeros: Adam divides by √v̂ + eps, which is 0 / 0 where v̂ is 0 and eps is lost
    in float16 (as 1e-8 is).

    Raises:
        PassError: names the weight.
    """
    names = {id(weight.parameter): weight.name for weight in pruned_weights(pipeline)}
    for group in optimizer.param_groups:
        eps = group.get("eps")
        if not isinstance(eps, float) or group.get("state_dtype") == "float32":
            continue
        for parameter in group["params"]:
            lost = parameter.dtype == torch.float16 and not torch.tensor(eps, dtype=torch.float16)
            if lost and id(parameter) in names:
                raise PassError(
                    f"{names[id(parameter)]} is float16, in which the optimizer's eps = {eps:g} is 0, and "
                    "what is pruned would be NaN: train in bfloat16 or float32, or give eps = 1e-7"
                )


def _clear_(tensor: Tensor, mask: Tensor) -> None:
    if isinstance(tensor, DTensor):
        local = distribute_tensor(mask, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor, mask = tensor.to_local(), local.to_local()
    tensor.masked_fill_(~mask, 0)


@torch.no_grad()
def set_masks_(pipeline: Pipeline, masks: Mapping[str, Tensor] | None) -> None:
    """Put masks beside the weights of `sparse_mask` and `masked_lora`, and zeros into what is pruned.

    Args:
        masks: by the weight's name, boolean, in the shape in which it is stored; None: nobody has said any,
            and passes have to take them from zeros.

    Raises:
        PassError: a pass wants masks and there are none, a weight has none or one of another shape, or is not
            zero where it is pruned.
    """
    _PATTERNS.pop(pipeline, None)
    passes = [p for p in pipeline.passes if isinstance(p, SparseMask)]
    of_zeros = bool(passes) and all(p.masks == "zeros" for p in passes)
    for weight in pruned_weights(pipeline):
        if of_zeros:
            mask = torch.ne(weight.parameter, 0)
        elif masks is None:
            raise PassError(
                f"{weight.name}: no masks lie beside these weights: prune the model first (act24 prune), "
                'or where another program pruned it, set masks = "zeros" of sparse_mask'
            )
        elif weight.name not in masks:
            weight.bits.fill_(255)  # kept dense when the model was pruned
            weight.bits.copy_(packed_bits(torch.ones(_dense_shape(weight), dtype=torch.bool)))
            continue
        else:
            mask = masks[weight.name].to(weight.parameter.device)
        if mask.shape != weight.parameter.shape:
            raise PassError(
                f"{weight.name}: its mask is {list(mask.shape)}, and it is {list(weight.parameter.shape)}: "
                "give the masks that were written with these weights"
            )
        if bool((weight.parameter[~mask] != 0).any()):
            raise PassError(
                f"{weight.name} is not zero where its mask says so, and the mask is of other weights: give "
                "those that were written with these"
            )
        weight.parameter.copy_(masked(weight.parameter, mask))
        weight.bits.copy_(packed_bits(mask.T if weight.transposed else mask))


def _dense_shape(weight: PrunedWeight) -> tuple[int, int]:
    rows, columns = weight.parameter.shape
    return (columns, rows) if weight.transposed else (rows, columns)


def kept_masks(pipeline: Pipeline) -> tuple[dict[str, Tensor], dict[str, Pattern], frozenset[str]]:
    """Masks by weight in the shape in which it is stored, the patterns that they have, and which weights are
    stored `[in, out]`; on the CPU."""
    masks, patterns, transposed = {}, {}, set()
    for weight in pruned_weights(pipeline):
        mask = weight.mask().cpu().contiguous()
        masks[weight.name] = mask
        patterns[weight.name] = found_pattern(mask.T if weight.transposed else mask)
        if weight.transposed:
            transposed.add(weight.name)
    return masks, patterns, frozenset(transposed)


def found_pattern(mask: Tensor) -> Pattern:
    """N:M of a mask `[out, in]`, for the least M of 2, 4, 8 and 16 of whose groups each has as many; else its
    share of zeros."""
    for of in (2, 4, 8, 16):
        if mask.shape[1] % of == 0:
            kept = mask.unflatten(-1, (-1, of)).sum(-1)
            least = int(kept.min())
            if 0 < least < of and bool((kept == least).all()):
                return Pattern(1 - least / of, least, of)
    return Pattern(1 - float(mask.double().mean()))


@torch.no_grad()
def check_zeros(pipeline: Pipeline) -> None:
    """What every save verifies, weight by weight; collective where parameters are sharded.

    Raises:
        PassError: names a weight that is not finite, not zero where it is pruned, or -0.0, or whose mask has
            another pattern than at the first check since `set_masks_`.
    """
    known = _PATTERNS.setdefault(pipeline, {})
    for weight in pruned_weights(pipeline):
        mask = weight.mask()
        pattern = found_pattern(mask.T if weight.transposed else mask)
        if (was := known.setdefault(weight.name, pattern)) != pattern:
            raise PassError(
                f"{weight.name}: its mask was {was} and is {pattern}, and masks are fixed. Go back to the "
                "last checkpoint before that"
            )
        whole = weight.parameter.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if why := fault(whole, mask, None):
            raise PassError(f"{weight.name}: {why}. Go back to the last checkpoint before that")
