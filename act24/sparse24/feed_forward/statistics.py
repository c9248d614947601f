"""What 2:4 does to an activation, as one vector of counts and sums.

Float32 and additive: vectors of micro-batches and processes are summed, and ratios are taken last. Energy is
the sum of squared activations. Tokens of padding are left out.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.operation import is_mapped, operation
from act24.options import one_of
from act24.sparse24.feed_forward.forms import why_never_packed
from act24.sparse24.feed_forward.options import Options24, backward_of, method_of
from act24.sparse24.format.packed import Packed24
from act24.sparse24.kernels.count_activation import count_activation
from act24.sparse24.kernels.shared.registry import form
from act24.sparse24.kernels.shared.self_check import kernel_obstacle_on
from act24.sparse24.pattern.feature_wise import sparsify_feature_wise
from act24.sparse24.pattern.selection import are_densest, top2_of_4
from act24.sparse24.pattern.token_wise import Function, dense_activation, sparsify_token_wise

#: Names of the entries. The last five: 2:4 along the tokens, for the weight gradients, of what 2:4 along the
#: features has left; zero where the backward has none.
STATISTICS = (
    "elements",
    "zeros",
    "groups",
    "crowded_groups",
    "dropped_nonzeros",
    "energy",
    "dropped_energy",
    "feature_nonzeros",
    "feature_dropped_nonzeros",
    "feature_energy",
    "feature_dropped_energy",
    "dense_feature_energy",
)
_FEATURE_WISE = 5

#: Samples for statistics. Where no tensor has the pre-activation, every 16th token is computed again. Of
#: packed activations, the statistics along the tokens are counted on every 64th feature and an eighth of the
#: tokens, but at least `_SAMPLED_TOKENS`: counting all tokens took 1.2 ms of the 74 ms of a 350m micro-batch
#: of 64 rows of 256.
_TOKEN_SAMPLE, _FEATURE_SAMPLE, _SAMPLED_TOKENS = 16, 64, 2048

#: The operator that counts beside a dense activation.
COUNTING = ("count_activation",)


def no_statistics(like: Tensor) -> Tensor:
    """Zeros, float32 `[len(STATISTICS)]`, where nobody counts."""
    return like.new_zeros(len(STATISTICS), dtype=torch.float32)


@operation
def dense_statistics(hidden: Tensor, pads: Tensor | None = None, function: Function = "relu2") -> Tensor:
    """The statistics of a dense activation: what naive 2:4 would drop, were it on.

    Args:
        hidden: pre-activation `[..., F]`. Where F is no multiple of 4 there are no groups, and nothing is
            counted as dropped.
        pads: as for `act24.sparse24.feed_forward.operation.activation24`.
        function: the activation, "relu2" or "relu".

    Returns:
        float32 `[len(STATISTICS)]`.

    Raises:
        OptionError: there is no such function.
    """
    one_of("dense_statistics", "function", function, get_args(Function))
    rows, real = hidden.detach().reshape(-1, hidden.shape[-1]), real_tokens(pads)
    if not is_mapped() and not why_not_counted(rows):
        counts, sums = count_activation(rows.contiguous(), real, function)
        return token_wise_from_counts(len(rows), counts, sums, real)
    dense = dense_activation(torch.relu(rows), function)
    groups = dense.positive.shape[1] % 4 == 0
    mask = top2_of_4(dense.positive) if groups else torch.ones_like(dense.value, dtype=torch.bool)
    return token_wise_statistics(dense.value, mask, real)


def why_not_counted(hidden: Tensor) -> str:
    """Why the kernel that counts what 2:4 would drop of a dense activation, h `[T, F]`, cannot; or ""."""
    if hidden.dtype is not torch.bfloat16:
        return f"the kernels are for bfloat16, this is {hidden.dtype}"
    tokens, features = hidden.shape
    return why_never_packed(tokens, features, ()) or kernel_obstacle_on(hidden.device, COUNTING)


def real_tokens(pads: Tensor | None) -> Tensor | None:
    """boolean `[T]`, the tokens that are no padding; None for all of them."""
    return None if pads is None or not pads.ndim else ~pads.flatten()


@torch.no_grad()
def token_wise_statistics(activation: Tensor, mask: Tensor, real: Tensor | None) -> Tensor:
    """Counts of an activation under a 2:4 mask along the features.

    Args:
        activation: non-negative `[T, F]`, before 2:4.
        mask: boolean `[T, F]`, what 2:4 keeps.
        real: boolean `[T]`, the tokens that are no padding; None for all.

    Returns:
        float32 `[len(STATISTICS)]`: elements, zeros, groups of four, those with more than 2 non-zeros,
        non-zeros dropped, energy, energy dropped; the feature-wise entries are 0.
    """
    if real is not None:
        activation = activation * real[:, None]
    nonzero = activation > 0
    energy = activation.float().square()
    # Filled on the device: a tensor made of a Python number would be copied there, and waited for.
    tokens = energy.new_full((), len(activation)) if real is None else real.float().sum()
    groups = tokens * (activation.shape[1] // 4)
    if activation.shape[1] % 4:
        crowded = torch.zeros_like(tokens)
    else:
        crowded = (nonzero.unflatten(1, (-1, 4)).sum(-1, dtype=torch.int32) > 2).sum(dtype=torch.float32)
    counts = (
        tokens * activation.shape[1],
        tokens * activation.shape[1] - nonzero.sum(dtype=torch.float32),
        groups,
        crowded,
        (nonzero & ~mask).sum(dtype=torch.float32),
        energy.sum(),
        torch.where(mask, 0, energy).sum(),
    )
    return torch.cat((torch.stack(counts), energy.new_zeros(_FEATURE_WISE)))


@torch.no_grad()
def token_wise_from_counts(tokens: int, counts: Tensor, sums: Tensor, real: Tensor | None) -> Tensor:
    """`token_wise_statistics` from what the kernel `pack_activation` counted on its way.

    Args:
        tokens: T.
        counts: int32 `[F]`, non-zeros before 2:4.
        sums: float32 `[4]`: groups with more than two, non-zeros dropped, energy, energy dropped.
        real: boolean `[T]`, the tokens that were counted; None for all.
    """
    number = sums.new_full((), tokens) if real is None else real.sum(dtype=torch.float32)
    crowded, dropped, energy, lost = sums
    elements = number * len(counts)
    token_wise = (elements, elements - counts.sum(), elements / 4, crowded, dropped, energy, lost)
    return torch.cat((torch.stack(token_wise), sums.new_zeros(_FEATURE_WISE)))


@torch.no_grad()
def token_wise_from_some_tokens(
    x: Tensor, weight_in: Tensor, real: Tensor | None, options: Options24
) -> Tensor:
    """An estimate of `token_wise_statistics` from every 16th token, where h is nowhere in memory.

    Args:
        x: `[..., D]`.
        weight_in: `[F, D]`, of a linear without a bias.
        real: boolean `[T]`, the tokens that count; None for all.
    """
    rows = x.reshape(-1, x.shape[-1])[::_TOKEN_SAMPLE]
    positive = torch.relu(F.linear(rows, weight_in))
    sparse = sparsify_token_wise(positive, None, options.function, method_of(options).sparsifier)
    sampled = None if real is None else real[::_TOKEN_SAMPLE]
    return _TOKEN_SAMPLE * token_wise_statistics(sparse.dense, sparse.mask, sampled)


@torch.no_grad()
def feature_wise_statistics(value: Tensor, kept: Tensor, dense: Tensor | None) -> Tensor:
    """Counts of what 2:4 along the tokens does to a 2:4 activation.

    Args:
        value: `[T, F]`, 2:4 along the features, padding zeroed.
        kept: `[T, F]`, what 2:4 along the tokens leaves of it.
        dense: boolean `[F]`, the features that it leaves alone; None for none.

    Returns:
        float32 `[len(STATISTICS)]`: non-zeros, those dropped, energy, energy dropped, energy in the dense
        features; the token-wise entries are 0.
    """
    energy, left = value.float().square(), kept.float().square()
    nonzeros = (value != 0).sum(dtype=torch.float32)
    counts = (
        nonzeros,
        nonzeros - (kept != 0).sum(dtype=torch.float32),
        energy.sum(),
        (energy - left).sum(),
        energy.new_zeros(()) if dense is None else torch.where(dense, energy, 0).sum(),
    )
    return torch.cat((energy.new_zeros(len(STATISTICS) - _FEATURE_WISE), torch.stack(counts)))


@torch.no_grad()
def feature_wise_from_some_features(
    packed: Tensor,
    counts: Tensor,
    real: Tensor | None,
    options: Options24,
    scale: Tensor | None = None,
    kernels: bool = True,
) -> Tensor:
    """An estimate of `feature_wise_statistics` from some tokens of every 64th feature: the kernel that
    selects along the tokens runs in backward, too late.

    Args:
        packed: buffer of the activation `[T, F]`, 2:4 along the features, tokens in the order in which they
            are grouped.
        counts: `[F]`, non-zeros before 2:4 by feature.
        real: boolean `[T]`, the tokens that count; None for all.
        scale: float32 `[T]`, which an activation in e4m3 is over; None for one in bfloat16.
        kernels: by a kernel, where the device has it.
    """
    # The first ones: in the order in which tokens are grouped, which is a random one where they are permuted.
    tokens, features = Packed24(packed).shape
    sampled = min(tokens, max(_SAMPLED_TOKENS, tokens // 8 // 4 * 4))
    index = torch.arange(0, features, _FEATURE_SAMPLE, device=counts.device)
    value = form("gather_features", kernels)(packed, index, real, sampled, scale).T
    dense = None
    if backward_of(options).dense_features:
        dense = are_densest(counts, index, options.dense_ratio)
    kept = sparsify_feature_wise(value, dense)
    share = sampled / tokens
    if real is not None:
        share = real[:sampled].sum().clamp(min=1) / real.sum().clamp(min=1)
    return feature_wise_statistics(value, kept, dense) * (features / len(index)) / share
