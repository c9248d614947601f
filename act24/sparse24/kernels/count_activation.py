"""What 2:4 would drop of a dense activation: the kernel of `pack_activation`, which here writes nothing as
wide as F."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.kernels.pack_activation import SUMS, activation_counts, launch
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.token_wise import naive, sparsify_token_wise


def _reference(hidden: Tensor, real: Tensor | None, function: str) -> tuple[Tensor, Tensor]:
    positive = torch.relu(hidden)
    sparse = sparsify_token_wise(positive, None, function, naive)  # type: ignore[arg-type]
    return activation_counts(positive, sparse, real)


def _fake(hidden: Tensor, real: Tensor | None, function: str) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape[1], dtype=torch.int32), hidden.new_empty(SUMS, dtype=torch.float32)


@operator(_reference, _fake)
def count_activation(hidden: Tensor, real: Tensor | None, function: str) -> tuple[Tensor, Tensor]:
    """The last two results of `pack_activation` alone, under naive 2:4.

    Args:
        hidden: bfloat16 `[T, F]`, T and F multiples of 64.
        real: boolean `[T]`, the tokens that count; None for all.
        function: "relu2" or "relu".

    Returns:
        non-zeros before 2:4 by feature, int32 `[F]`; and float32 `[4]`: groups with more than two non-zeros,
        non-zeros that 2:4 drops, energy, energy that it drops.
    """
    counts = hidden.new_zeros(hidden.shape[1], dtype=torch.int32)
    return counts, launch(hidden, None, None, counts, True, None, real, function, "naive")
