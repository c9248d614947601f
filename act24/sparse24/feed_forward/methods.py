"""The methods, estimators and backwards of `activation24`: one record each, in one table each.

Everything that has to know them reads the tables: the reference and the choice of a form, the pass with its
state and the schema of recipes, `act24 doctor`, and the checks of operations and kernels. A method from
outside is one record more (`METHODS.add`): it runs as the reference, compiled, until it names the sparsifier
of `pack_activation` that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from act24.options import OneOf, OptionError, check_options
from act24.records import Table
from act24.sparse24.pattern.token_wise import SPARSIFIERS, Sparse24, Sparsifier, mvue, naive, soft_threshold


@dataclass(frozen=True, kw_only=True)
class Method:
    """How an activation becomes 2:4 along the features.

    Attributes:
        name: as recipes have it.
        summary: what it does, in a line, for `act24 doctor`.
        sparsifier: which two of four stay, with which value and slope.
        kernel: the name under which `pack_activation` has this very sparsifier; None: no kernel serves it.
        draws: it draws at random, from a seed that is new for every micro-batch.
        scaled: the result is multiplied by a measured scale β.
        remeasured: β is measured on the activation, again after every `dynamic_steps` updates. Else it is
            measured once, at the first sparse update, from what `scale_from` says.
        in_evaluation: the name of the method that stands in for it in evaluation; "" for itself.
        options: the options of the pass `activation24` that mean something for this method and not for all.
    """

    name: str
    summary: str
    sparsifier: Sparsifier
    kernel: Annotated[str, OneOf(SPARSIFIERS)] | None = None
    draws: bool = False
    scaled: bool = False
    remeasured: bool = False
    in_evaluation: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_options(self, f"method {self.name}")
        if self.kernel is not None and SPARSIFIERS.get(self.kernel) is not self.sparsifier:
            raise OptionError(
                f"method {self.name}: the kernel {self.kernel!r} computes another sparsifier than its own: "
                "set kernel = None, and it runs the reference"
            )
        if self.remeasured and not self.scaled:
            raise OptionError(f"method {self.name}: remeasured says when the scale is measured: set scaled")


METHODS: Table[Method] = Table(
    "method of activation24",
    Method(
        name="naive",
        summary="the two largest of four stay as they are",
        sparsifier=naive,
        kernel="naive",
    ),
    Method(
        name="mvue",
        summary="two of four are drawn at random, without bias; naive in evaluation",
        sparsifier=mvue,
        kernel="mvue",
        draws=True,
        in_evaluation="naive",
    ),
    Method(
        name="soft_dynamic",
        summary="the two largest less the third, times a scale measured on activations again and again",
        sparsifier=soft_threshold,
        kernel="soft_threshold",
        scaled=True,
        remeasured=True,
        options=("dynamic_steps", "calibration_samples"),
    ),
    Method(
        name="soft_threshold_weights",
        summary="the two largest less the third, times a scale fixed at the first sparse update",
        sparsifier=soft_threshold,
        kernel="soft_threshold",
        scaled=True,
        options=("scale_from", "calibration_samples"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """How the gradient comes back through 2:4.

    Attributes:
        name: as recipes have it.
        summary: what it does, in a line.
        slope: what stands for the derivative of the 2:4 activation with respect to h, `[..., F]`.
        backwards: the backwards that it goes with.
    """

    name: str
    summary: str
    slope: Callable[[Sparse24], Tensor]
    backwards: tuple[str, ...]

    def __post_init__(self) -> None:
        check_options(self, f"estimator {self.name}")


ESTIMATORS: Table[Estimator] = Table(
    "estimator of activation24",
    Estimator(
        name="masked",
        summary="the gradient of the function that ran: 2:4 where the activation is",
        slope=lambda sparse: sparse.slope,
        backwards=("dense", "split_gemm", "sparse"),
    ),
    # Its gradient is not 2:4, so there is nothing that 2:4 weight gradients could reuse.
    Estimator(
        name="ste",
        summary="straight through: as if nothing had been dropped, so not 2:4",
        slope=lambda sparse: sparse.derivative,
        backwards=("dense",),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Backward:
    """How weight gradients are made.

    Attributes:
        name: as recipes have it.
        summary: what it does, in a line.
        along_tokens: their 2:4 operand is made 2:4 along the tokens; else they are exact.
        dense_features: the features with the most non-zeros stay dense in them (`dense_ratio`).
    """

    name: str
    summary: str
    along_tokens: bool
    dense_features: bool = False

    def __post_init__(self) -> None:
        check_options(self, f"backward {self.name}")


BACKWARDS: Table[Backward] = Table(
    "backward of activation24",
    Backward(name="dense", summary="exact", along_tokens=False),
    Backward(
        name="split_gemm",
        summary="2:4 along the tokens, but for the densest features",
        along_tokens=True,
        dense_features=True,
    ),
    Backward(name="sparse", summary="2:4 along the tokens", along_tokens=True),
)
