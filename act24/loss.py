"""Cross-entropy of a language model straight from its hidden states, without ever holding the [T, V] logits.

At 65,536 tokens and a vocabulary of 32,000 the logits are 4.2 GB in bfloat16, and 8.4 GB more in float32.
Here they exist for one chunk of tokens at a time, and the gradients are taken in the forward pass while they
do. (The idea: Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989; here in plain PyTorch.)

What that costs: the head's gradient [V, D] is held from the loss to its backward, and only first derivatives
exist. What it spares: recomputing the head's product in the backward pass, a third more of the head's work,
which is what checkpointing each chunk would cost.

On a GPU run it compiled: `torch.compile(cross_entropy_sum, dynamic=False)`. Forward and backward on an H200,
bfloat16, 65,536 tokens of width 768: 19.1 ms and 1.2 GB; not compiled 33.7 ms and 3.9 GB; all logits at once,
compiled, 19.2 ms and 3.9 GB.

The three products of a chunk may be in e4m3 (the option `head` of the pass `fp8`): the weight is cast once,
hidden states and the gradient of the logits chunk by chunk. The softmax stays as it is, from logits that were
rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from act24.fp8.casts import CastE4m3, Scaling, cast_both_ways
from act24.fp8.linear import cast_weight, ready_cast, refuse_e4m3, uses_kernels
from act24.operation import (
    cast_for_autocast,
    once_differentiable,
    operation,
    refuse_second_derivatives,
)
from act24.sparse24.kernels.shared.registry import form

IGNORE = -100  # the label of a position without a target, as in F.cross_entropy

#: Tokens of a chunk.
CHUNK_TOKENS = 8192


def _log_softmax(logits: Tensor) -> Tensor:
    """In at least float32."""
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _chunks(tokens: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors' rows, `tokens` of each at a time."""
    return zip(*(tensor.split(tokens) for tensor in tensors), strict=True)


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed loss and its gradients. hidden [T, D], weight [V, D], targets and valid [T, 1]."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        valid: Tensor,
        chunk_tokens: int,
        ready: tuple[Tensor, ...] | None,
        scaling: Scaling | None,
        kernels: bool,
        counts: bool,
    ):
        projection = weight.to(hidden.dtype)
        head = None if scaling is None else _cast_head(projection, ready, scaling, kernels, False)
        # Chunks add up in float32: summing them in bfloat16 would lose what one undivided product keeps.
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        loss = torch.zeros((), dtype=grad_weight.dtype, device=hidden.device)
        grad_hidden, lost = [], torch.zeros(2, device=hidden.device)
        for rows, target, keep in _chunks(chunk_tokens, hidden, targets, valid):
            cast_rows = None
            if head is None or scaling is None:
                logits = rows @ projection.T
            else:
                # Tokens without a target share scales with the others, and so are dropped before the cast.
                cast_rows = cast_both_ways(rows.where(keep, 0.0), scaling, scaling, kernels=kernels)
                logits = _product(cast_rows, head, kernels)
            log_probabilities = _log_softmax(logits)
            chosen = log_probabilities.gather(1, target)
            # Summed now: a sum over collected chunks is fused by the compiler, which then holds all logits.
            # Not `loss -=`: torch 2.11 takes an output that was written in place for a constant, and the
            # compiled gradient is then zero without a word (tools/bench/check_operations.py).
            loss = loss - chosen.where(keep, 0.0).sum()
            # softmax - onehot. The target's entry is written, not subtracted from: expm1 stays exact where p
            # is near 1, which p - 1 in bfloat16 does not.
            grad_logits = log_probabilities.exp_().to(rows.dtype)
            grad_logits.scatter_(1, target, chosen.expm1().where(keep, 0.0).to(rows.dtype))
            # Tokens without a target are dropped on the narrow side, [T, D], which spares a pass over [T, V].
            # In e4m3 too: beside the target's entry most words are too small for it, and what a row would
            # lose points the same way for every token. dW's operand has a scale for each word.
            grad_rows = grad_logits @ projection
            if head is None or cast_rows is None:
                grad_weight = grad_weight + grad_logits.T @ rows.where(keep, 0.0)
            else:
                counter = torch.zeros_like(lost) if counts else None
                grad = cast_both_ways(
                    grad_logits, "rowwise", "rowwise", narrow=False, kernels=kernels, counter=counter
                )
                lost = lost if counter is None else lost + counter
                grad_weight = grad_weight + form("product_e4m3", kernels)(
                    grad.turned, cast_rows.turned, grad.turned_scale, cast_rows.turned_scale
                )
            grad_hidden.append(grad_rows.where(keep, 0.0))
        return loss, torch.cat(grad_hidden), grad_weight.to(weight.dtype), lost

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, grad_hidden, grad_weight, lost = output
        ctx.mark_non_differentiable(grad_hidden, grad_weight, lost)
        ctx.save_for_backward(grad_hidden, grad_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, *(None,) * 7


def _cast_head(
    weight: Tensor, ready: tuple[Tensor, ...] | None, scaling: Scaling, kernels: bool, turned: bool = True
) -> CastE4m3:
    return CastE4m3(*ready) if ready else cast_weight(weight, scaling, turned, kernels)


def _product(rows: CastE4m3, head: CastE4m3, kernels: bool) -> Tensor:
    """The logits, bfloat16 `[T, V]`."""
    return form("product_e4m3", kernels)(rows.narrow, head.narrow, rows.scale, head.scale)


@operation
def cross_entropy_sum(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
    narrow: Tensor | None = None,
    scale: Tensor | None = None,
    turned: Tensor | None = None,
    turned_scale: Tensor | None = None,
    scaling: Scaling | None = None,
    kernels: bool = True,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(hidden @ head_weightᵀ)[label] over the labels that are not -100, and their number.

    hidden [B, S, D]; head_weight [V, D]; labels [B, S] int64, already shifted: `labels[b, s]` is the target
    of position s. The product runs in the dtype of `hidden`, under autocast in autocast's; the softmax in
    float32. Returns (loss, count): a float32 scalar (float64 for float64 inputs) and an int64 scalar. Divide
    by the count of the whole optimizer step, over all micro-batches and processes, to get the mean over its
    tokens. `chunk_tokens` bounds memory: below 8192 the products lose speed, at 16384 the compiler was seen
    to hold all chunks at once. Without grad mode only the loss is computed.

    `scaling`: the logits and the weight's gradient are products in e4m3, each rounded to bfloat16, over
    scales as in `act24.fp8.linear.linear_fp8` with `exact_grad_x`; None: in the dtype of `hidden`. V and D
    are multiples of 16 then.
    `narrow, scale, turned, turned_scale` are of this very weight (`cast_weight`), or None, and it is cast
    here, once a call. A hidden state with NaN or infinity makes the loss NaN, if its token has a target.
    `counter`: float32 `[2]`, to which is added what becomes zero of the gradient of the logits, as
    `act24.fp8.casts.cast_both_ways` counts it.

    Raises:
        ValueError: in e4m3, V or D is no multiple of 16.
        Act24Error: in e4m3, a GPU that has none.
    """
    refuse_second_derivatives(hidden, head_weight)
    if scaling is not None:
        refuse_e4m3(head_weight)
        kernels = uses_kernels(hidden.device, kernels)
    # The weight is cast inside, so that its gradient comes back as it was summed, in float32.
    (hidden,) = cast_for_autocast(hidden.flatten(0, -2))  # pyright: ignore[reportAssignmentType]
    labels = labels.flatten()[:, None]
    valid = labels != IGNORE
    targets = labels.where(valid, 0)
    ready = ready_cast(narrow, scale, turned, turned_scale)
    if torch.is_grad_enabled():
        given = (targets, valid, chunk_tokens, ready, scaling, kernels, counter is not None)
        loss, _, _, lost = _LinearCrossEntropy.apply(hidden, head_weight, *given)
        if counter is not None:
            counter.add_(lost)
    else:
        projection = head_weight.to(hidden.dtype)
        head = None if scaling is None else _cast_head(projection, ready, scaling, kernels, False)
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for rows, target, keep in _chunks(chunk_tokens, hidden, targets, valid):
            if head is None or scaling is None:
                logits = rows @ projection.T
            else:
                made = cast_both_ways(rows.where(keep, 0.0), scaling, scaling, turned=False, kernels=kernels)
                logits = _product(made, head, kernels)
            loss -= _log_softmax(logits).gather(1, target).where(keep, 0.0).sum()
    return loss, valid.sum()
