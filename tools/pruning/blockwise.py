"""Blockwise recovery: what each block kept is fitted to what the dense block gives, block after block.

Inputs of a pruned block are those that the blocks before it, recovered already, give; its outputs are fitted
to those of the dense model at the same place, so that a block also makes up for the ones before it. No
gradient passes more than one block, and one block of each model is on the device. (Reconstruction after
pruning: EBFT, arXiv 2402.12419; the target of the dense model's own chain is this module's choice.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from act24.errors import Act24Error
from act24.pruning.methods import masked
from act24.recipes.schema import Data
from act24.tools.files import weights_hash
from act24.tools.huggingface.any_model import AnyModel
from act24.tools.pruning.blocks import Chain
from act24.tools.pruning.calibration import calibration_rows, tokens_of, window
from act24.tools.pruning.folder import pruned_from, write_pruned
from act24.tools.pruning.kept import BlockFiles, becoming
from act24.tools.pruning.masks import Masks, masks_beside
from act24.tools.run.opening import open_any

#: Tokens of an update, or one row. Small: what a block kept needs many updates more than exact ones.
_TOKENS = 512
#: Batches, the first ones, on which errors before and after are measured.
_MEASURED = 8


def recover_blockwise(
    source: str,
    out: Path,
    *,
    data: Data,
    dense: str | None = None,
    samples: int = 128,
    seqlen: int | None = None,
    epochs: int = 4,
    lr: float = 1e-2,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Recover a pruned model into a new folder. Interrupted, the same call goes on with the next block.

    Args:
        source: a folder that `act24 prune` wrote.
        dense: the model whose blocks are fitted to; None: the one that its prune.json says, with the weights
            that were pruned or fitted to then.
        data, samples, seqlen: the rows to fit on, as for `act24.tools.pruning.folder.prune_model`.
        epochs: how often each block sees all rows.
        lr: of AdamW, as a share of the root mean square of each tensor, so that it does not depend on how
            large a model's weights are; it falls linearly to 0 over a block's updates.

    Returns:
        by block the relative error of its outputs on the first rows, after.

    Raises:
        Act24Error: no masks, no dense model, one of other shapes or weights, or a loss that is not finite.
    """
    began = time.perf_counter()
    with becoming(out) as partial:
        opened, masks, target, named = _open_both(source, dense)
        data = data.model_copy(update={"max_length": window(seqlen, opened.positions)})
        rows = max(1, _TOKENS // data.max_length)
        batches, pads = calibration_rows(data, opened.open_tokenizer(), samples, opened.vocab_size, rows=rows)
        asked: dict[str, Any] = {
            "source": source,
            "weights": opened.sha256(),
            **named,
            "calibration": {
                "data": data.model_dump(mode="json"),
                "samples": samples,
                "seqlen": data.max_length,
                "tokens": tokens_of(batches, pads),
            },
            "epochs": epochs,
            "lr": lr,
        }
        files = BlockFiles(partial, asked)
        errors, left = _recover_(
            opened.model, target.model, masks, batches, pads, epochs, lr, device, say, files
        )
        report = {
            **asked,
            "recovered": "blockwise",
            "block_errors": errors,
            "left": left,
            "seconds": time.perf_counter() - began,
        }
        write_pruned(opened, partial, masks, report)
    return errors


def _open_both(source: str, dense: str | None) -> tuple[AnyModel, Masks, AnyModel, dict[str, str]]:
    """The pruned model with its masks, and the dense one, with its name and hash."""
    opened = open_any(source)
    masks = masks_beside(opened.folder, opened.state()) if opened.folder else None
    if masks is None or opened.folder is None:
        raise Act24Error(f"{source} has no masks: blockwise recovery begins with a folder of act24 prune")
    said, hashed = (None, None) if dense else pruned_from(opened.folder)
    dense = dense or said
    if not dense:
        raise Act24Error(f"{source} does not say what it was pruned from: give --dense MODEL")
    try:
        target = open_any(dense)
    except Act24Error as error:
        raise Act24Error(f"the model that {source} was pruned from: {error}; --dense names it") from error
    dense_weights = weights_hash(target.state())
    if hashed not in (None, dense_weights):
        raise Act24Error(
            f"{dense} has other weights than {source} was pruned from: give --dense MODEL, as it was then, "
            f"or --dense {dense} to fit to it as it is"
        )
    shapes = [{n: tuple(p.shape) for n, p in m.model.named_parameters()} for m in (opened, target)]
    if shapes[0] != shapes[1]:
        raise Act24Error(f"{dense} is not what {source} was pruned from: its parameters are others")
    return opened, masks, target, {"dense": dense, "dense_weights": dense_weights}


def _recover_(
    model: nn.Module,
    target: nn.Module,
    masks: Masks,
    batches: Sequence[Tensor],
    pads: Sequence[Tensor | None],
    epochs: int,
    lr: float,
    device: str,
    say: Callable[[str], None],
    files: BlockFiles,
) -> tuple[dict[str, float], list[str]]:
    """Errors by block, and the blocks that are as they were."""
    where = torch.device(device)
    sparse, dense = (Chain(m.eval(), batches, pads, where) for m in (model, target))
    errors: dict[str, float] = {}
    left: list[str] = []
    # No cache: it would hold the weights of before an update.
    with torch.autocast(where.type, torch.bfloat16, cache_enabled=False):
        for index, name in enumerate(sparse.blocks):
            began = time.perf_counter()
            with dense.on_device(index), torch.no_grad():
                dense.advance(index)  # what goes into the dense block behind is what this one gives
            with sparse.on_device(index) as block:
                parameters = dict(block.named_parameters(prefix=name))
                found = files.read(index)
                if found:
                    tensors, content = found
                    with torch.no_grad():
                        for full, value in tensors.items():
                            parameters[full].copy_(value)
                else:
                    before, fitted = _fit_(sparse, dense, index, name, masks, epochs, lr)
                    content = {"before": before, "fitted": fitted}
                    files.write(index, parameters, content)
                sparse.advance(index)
            errors[name] = after = _error(sparse, dense)
            how = "found finished" if found else f"{time.perf_counter() - began:.1f} s"
            line = f"{name}: error of the outputs {content['before']:.4f} → {after:.4f}, {how}"
            if not content["fitted"] < content["before"]:
                left.append(name)
                line += (
                    f"; left as it was: fitting came to {content['fitted']:.4f}. "
                    "Give more --samples, or a smaller --lr"
                )
            say(line)
    return errors, left


def _error(sparse: Chain, dense: Chain) -> float:
    """The root of the mean of `_relative` over the first batches, of what both chains have got to."""
    each = [
        _relative(sparse.inputs(number), dense.inputs(number), sparse.pads[number])
        for number in range(min(_MEASURED, len(sparse)))
    ]
    return float(torch.stack(each).mean().sqrt())


def _fit_(
    sparse: Chain, dense: Chain, index: int, name: str, masks: Masks, epochs: int, lr: float
) -> tuple[float, float]:
    """Fit what a block kept, float32 weights under bfloat16 autocast; what makes it no better is undone.

    Returns:
        the errors of its outputs on the first batches, before, and after the fit.
    """
    block = sparse.blocks[name]
    as_it_was = {local: p.detach().to("cpu", copy=True) for local, p in block.named_parameters()}
    block.float()
    parameters = dict(block.named_parameters())
    device = next(iter(parameters.values())).device
    own = {
        n.removeprefix(f"{name}."): m.to(device) for n, m in masks.masks.items() if n.startswith(f"{name}.")
    }
    pruned = {local: ~mask for local, mask in own.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    before = _measured(sparse, dense, index)
    sizes = {local: _size(p) for local, p in parameters.items()}
    # A tensor of zeros, as biases may begin, has no size of its own.
    usual = statistics.median([size for size in sizes.values() if size] or [1.0])
    groups = [{"params": [p], "lr": lr * (sizes[local] or usual)} for local, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps = epochs * len(sparse)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        loss = _difference(sparse, dense, index, step % len(sparse))
        if not torch.isfinite(loss):
            raise Act24Error(f"{name}: the loss is not finite: a smaller --lr")
        loss.backward()
        for local, gone in pruned.items():
            grad = parameters[local].grad
            if grad is not None:
                grad.masked_fill_(gone, 0)  # without momentum or decay, so the update is zero too
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for local, parameter in parameters.items():
            parameter.grad = None
            parameter.data = parameter.data.to(as_it_was[local].dtype)
            if local in own:
                parameter.copy_(masked(parameter, own[local]))
        after = _measured(sparse, dense, index)
        if not after < before:
            for local, parameter in parameters.items():
                parameter.copy_(as_it_was[local])
    return before, after


@torch.no_grad()
def _measured(sparse: Chain, dense: Chain, index: int) -> float:
    """The root of the mean of `_difference` over the first batches."""
    each = [_difference(sparse, dense, index, number) for number in range(min(_MEASURED, len(sparse)))]
    return float(torch.stack(each).mean().sqrt())


def _size(parameter: Tensor) -> float:
    """The root mean square of what is not zero; 0 where all is."""
    kept = parameter.detach()[parameter.detach() != 0]
    return float(kept.square().mean().sqrt()) if kept.numel() else 0.0


def _difference(sparse: Chain, dense: Chain, index: int, number: int) -> Tensor:
    """The mean over tokens of ‖f̂(x̂) - f(x)‖² / ‖f(x)‖², of a batch, padding left out.

    By token, as the norm in front of the next block has it: the first token of a row is often a hundred times
    as long as others, and a sum over tokens would fit little else.
    """
    dtype = next(sparse.blocks[list(sparse.blocks)[index]].parameters()).dtype
    output = sparse.run(index, sparse.inputs(number).to(dtype), number)
    return _relative(output, dense.inputs(number), sparse.pads[number])


def _relative(output: Tensor, wanted: Tensor, pads: Tensor | None) -> Tensor:
    output, wanted = output.float(), wanted.float()
    by_token = (output - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-30)
    return by_token.mean() if pads is None else by_token[~pads.to(by_token.device)].mean()
