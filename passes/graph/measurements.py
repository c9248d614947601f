"""What a pass asks of the training loop before its parameters get their first values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from act24.errors import PassError


@dataclass(frozen=True)
class Measurement:
    """What the first values of some parameters need to know, and only a training loop can measure.

    Attributes:
        what: which measurement. The pass that asks documents it; the loop has a function for it.
        parameter: of which parameter, as it is before that pass.
        shape: of the result.
    """

    what: str
    parameter: str
    shape: tuple[int, ...]


def check_measured(wanted: Mapping[str, Measurement], measured: Mapping[str, Tensor]) -> None:
    """Check results against what was asked for, both by name.

    Raises:
        PassError: one is missing, or of another shape.
    """
    if missing := [name for name in wanted if name not in measured]:
        first = wanted[missing[0]]
        raise PassError(
            f"{len(missing)} measurements are missing, {first.what} of {first.parameter} the first: "
            "measure what Pipeline.measurements names, and give it to Pipeline.commit_(measured=...)"
        )
    for name, one in wanted.items():
        if measured[name].shape != one.shape:
            raise PassError(
                f"{one.what} of {one.parameter} has to have shape {list(one.shape)}, got "
                f"{list(measured[name].shape)}: measure what Pipeline.measurements names"
            )
