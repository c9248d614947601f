"""First values of the two factors of a linear.

Standard deviations are those of the entries. What they make of the product, for `[out, in]` of rank R, is
Var(W) = R · Var(W_in) · Var(W_out).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from act24.errors import nearest
from act24.low_rank.truncation import check_rank, trainable_factors, truncated_factors
from act24.options import OptionError, Range, in_range, shown

#: (shape `[out, in]`, rank, initializer_range) -> (standard deviation of weight_in, of weight_out).
Deviations = Callable[[tuple[int, int], int, float], tuple[float, float]]


def _xavier(shape: tuple[int, int], rank: int, _: float) -> tuple[float, float]:
    return math.sqrt(2 / (shape[1] + rank)), math.sqrt(2 / (shape[0] + rank))


def _auto(shape: tuple[int, int], rank: int, initializer_range: float) -> tuple[float, float]:
    return ((initializer_range**2 / rank) ** 0.25,) * 2


def _kaiming(shape: tuple[int, int], rank: int, _: float) -> tuple[float, float]:
    return math.sqrt(2 / shape[1]), math.sqrt(2 / rank)


def _cola(shape: tuple[int, int], rank: int, _: float) -> tuple[float, float]:
    return ((rank * sum(shape)) ** -0.25,) * 2


def _randn(deviation: float, *_: object) -> tuple[float, float]:
    return deviation, deviation


#: Normal entries: LORO's `xavier`, `auto` (the product has the dense initializer_range) and `kaiming` (with
#: the true fan-in; LORO's script takes R for both), and CoLA's (its product has variance 1 / (in + out)).
_NORMAL: dict[str, Deviations] = {"xavier": _xavier, "auto": _auto, "kaiming": _kaiming, "cola": _cola}
_NAMES = (*_NORMAL, "orth", "xavorth", "svd")
_PATTERNS = ("randn_<std>", "const_<value>")
_NUMBER = re.compile(r"(randn|const)_([-+0-9.eE]+)")


def initial_factors(
    init: str,
    dense: Tensor,
    rank: int,
    generator_in: torch.Generator,
    generator_out: torch.Generator,
    *,
    initializer_range: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """First values of (weight_in `[R, in]`, weight_out `[out, R]`), float32.

    Args:
        init: `xavier`, `auto`, `kaiming` or `cola`, normal entries; `orth`, orthonormal rows and columns;
            `xavorth`, the same scaled to xavier's variance of the entries; `svd`, the best approximation of
            `dense`, drawn on one side where that is zero; `randn_<std>`; `const_<value>`, of rank one and
            good for nothing but tests.
        dense: the weight they replace, `[out, in]`; only `svd` reads its values.
        generator_in, generator_out: CPU generators, one a factor.

    Raises:
        OptionError: unknown `init`, `rank` below 1 (for `svd` and the orthonormal ones also above a side of
            the weight), or `initializer_range` not above 0.

    Source: LORO's `lowrank_module.py`, where `orth` and `xavorth` fall back to plain normal entries by
    mistake, and CoLA's `cola_layer.py`.
    """
    check_init(init)
    in_range("initial_factors", "initializer_range", initializer_range, Range(gt=0))
    if init in ("svd", "orth", "xavorth"):
        check_rank("initial_factors", rank, dense)
    else:
        in_range("initial_factors", "rank", rank, Range(ge=1))
    out_features, in_features = dense.shape
    if init == "svd":
        weight_in, weight_out = truncated_factors(dense[None], rank)
        return trainable_factors(weight_in[0], weight_out[0], generator_in)
    if match := _NUMBER.fullmatch(init):
        number = float(match[2])
        if match[1] == "const":
            return torch.full((rank, in_features), number), torch.full((out_features, rank), number)
        deviations: Deviations = partial(_randn, number)
    else:
        deviations = _NORMAL["xavier" if init in ("orth", "xavorth") else init]
    std_in, std_out = deviations((out_features, in_features), rank, initializer_range)
    weight_in = torch.empty(rank, in_features).normal_(generator=generator_in)
    weight_out = torch.empty(out_features, rank).normal_(generator=generator_out)
    if init in ("orth", "xavorth"):
        weight_in, weight_out = _orthonormal(weight_in.T).T, _orthonormal(weight_out)
        if init == "orth":
            return weight_in, weight_out
        std_in, std_out = std_in * math.sqrt(in_features), std_out * math.sqrt(out_features)
    return weight_in * std_in, weight_out * std_out


def check_init(init: str, owner: str = "initial_factors") -> None:
    """Check that `init` names an initialisation.

    Args:
        owner: whose option it is, for the error.

    Raises:
        OptionError: it does not.
    """
    if not isinstance(init, str):
        raise OptionError(f"{owner}: init has to be a string, got {shown(init)}")
    match = _NUMBER.fullmatch(init)
    if match:
        try:
            number = float(match[2])
        except ValueError:
            number = 0.0
        if not 0 < number < math.inf:
            raise OptionError(
                f"{owner}: init {shown(init)} needs a finite number above 0 behind the underscore"
            )
    elif init not in _NAMES:
        raise OptionError(f"{owner}: init has no {shown(init)}: {nearest(init, (*_NAMES, *_PATTERNS))}")


def _orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns `[d, R]`; for a normal matrix distributed uniformly."""
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal().sign()
