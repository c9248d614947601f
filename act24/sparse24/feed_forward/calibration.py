"""What the scale β of soft thresholding should be, measured on sampled token rows."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from act24.operation import operation
from act24.options import Range, in_range, one_of
from act24.sparse24.pattern.random_bits import random_bits
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.pattern.soft_threshold import scale_sums, soft_threshold24
from act24.sparse24.pattern.token_wise import Function, dense_activation

ScaleFrom = Literal["activation", "weight", "output"]

#: Names of the sums, which add up over rows and processes. `product`, `square`: ⟨H, S⟩ and ⟨S, S⟩ of the
#: activation and its soft-thresholded form; `energy`: ⟨H, H⟩, of which naive 2:4 drops `naive_error`;
#: `scale_product`, `scale_square`: what the scale in force is the quotient of.
CALIBRATION = ("energy", "naive_error", "product", "square", "scale_product", "scale_square")

_SEED = 24


def sample_rows(pads: Tensor | None, count: int, samples: int, device: torch.device) -> Tensor:
    """Which token rows to measure: int64 `[samples]`, of `count` (all of them if they are fewer), at fixed
    random places, padding last. `pads` is boolean with `count` elements; None or a scalar: no padding."""
    keys = random_bits(torch.arange(count, device=device), _SEED)
    if pads is not None and pads.ndim:
        keys = torch.where(pads.flatten(), -1, keys)
    return torch.topk(keys, min(samples, count)).indices


@operation
@torch.no_grad()
def calibration_sums(
    hidden: Tensor,
    pads: Tensor | None,
    scale_from: ScaleFrom,
    samples: int,
    function: Function,
    *weights: Tensor,
) -> Tensor:
    """The sums that a scale is made of (`act24.sparse24.pattern.soft_threshold.scale_from_sums`).

    Args:
        hidden: pre-activation `[..., F]`, F a multiple of 4.
        pads: boolean, the shape of hidden without F: rows that count for nothing. None or a scalar: none.
        scale_from: `"activation"`, the least squared error of the activation H itself; `"weight"`, that of
            the weights before and after soft thresholding along F; `"output"`, that of H Wᵀ. The latter two
            fall back to the first where there are no weights.
        samples: rows to take.
        function: the activation.
        weights: what multiplies the activation, `[out, F]` each.

    Returns:
        float64 `[len(CALIBRATION)]`.

    Raises:
        OptionError: there is no such function or source of scales, or no row to take.
        ValueError: F is not a multiple of 4.

    Source: the scale of S-STE (arXiv 2409.09099), of weights there.
    """
    one_of("calibration_sums", "function", function, get_args(Function))
    one_of("calibration_sums", "scale_from", scale_from, get_args(ScaleFrom))
    in_range("calibration_sums", "samples", samples, Range(ge=1))
    rows = hidden.reshape(-1, hidden.shape[-1])
    chosen = sample_rows(pads, len(rows), samples, rows.device)
    positive = torch.relu(rows[chosen].double())
    if pads is not None and pads.ndim:
        positive = positive * ~pads.flatten()[chosen][:, None]
    dense = dense_activation(positive, function).value
    soft = soft_threshold24(dense)
    measured = scale_sums(dense, soft)
    scale = measured
    if weights and scale_from == "weight":
        scale = sum(scale_sums(w.double(), soft_threshold24(w.double())) for w in weights)
    elif weights and scale_from == "output":
        scale = sum(scale_sums(dense @ w.double().T, soft @ w.double().T) for w in weights)
    energy = dense.square()
    naive_error = torch.where(top2_of_4(dense), 0, energy).sum()
    return torch.cat((torch.stack((energy.sum(), naive_error)), measured, scale))  # type: ignore[arg-type]
