"""The options of the operation `activation24`."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from act24.options import OneOf, OptionError, Range, check_options, checked, remembered
from act24.sparse24.feed_forward.methods import BACKWARDS, ESTIMATORS, METHODS, Backward, Estimator, Method
from act24.sparse24.format.products import Table
from act24.sparse24.pattern.feature_wise import TokenPermutation
from act24.sparse24.pattern.token_wise import Function

Precision = Literal["bfloat16", "fp8"]


@checked
class Options24(NamedTuple):
    """How `activation24` makes an activation 2:4, and how gradients come back.

    A named tuple, because it is a constant of an fx graph and of a compiled one; it checks itself where it is
    made (`OptionError`).

    Attributes:
        function: the activation, relu(h)² or relu(h).
        method: how the activation becomes 2:4, a name in `act24.sparse24.feed_forward.methods.METHODS`.
        backward: weight gradients. `"dense"`: exact. `"split_gemm"`: 2:4 along the tokens, but for the
            densest features. `"sparse"`: the same without that exception.
        estimator: `"masked"`, the gradient of the function that ran: dropped positions get none, and the
            gradient of h is 2:4 where the activation is. `"ste"`, straight through: as if nothing had been
            dropped; it is not 2:4, so it goes with the dense backward only.
        precision: of the products. `"fp8"`: all six in e4m3, forward and backward, and what is saved for
            backward too (`act24.sparse24.feed_forward.packed_fp8`). Where the activation has no linear in
            front of it, or the estimator is not `"masked"`, y = a W_outᵀ alone, in plain PyTorch. Networks of
            narrow linears run on packed operands too.
        dense_ratio: share of the features that split_gemm leaves dense, those with the most non-zeros.
        token_permutation: see `act24.sparse24.pattern.feature_wise`; of no meaning for the dense backward.
        statistics: count what 2:4 does; else the statistics are zeros and cost nothing.
        kernels: run in the first form that serves the network (`act24.sparse24.feed_forward.forms`); False
            for the plain-PyTorch reference.
        recompute: for narrow linears keep nothing F-wide for backward, and make it again inside the products
            there (`act24.sparse24.feed_forward.narrow`); the others do not look at it. This is not the pass
            `recompute`, which repeats whole parts of a block, attention and norms among them, with
            `torch.utils.checkpoint`. This option repeats one narrow product, inside the kernel that reads its
            result.
        algorithms: what a tuner found for the products on this GPU; empty for the rule of
            `act24.sparse24.format.products.choose`.
    """

    function: Function = "relu2"
    method: Annotated[str, OneOf(METHODS)] = "naive"
    backward: Annotated[str, OneOf(BACKWARDS)] = "dense"
    estimator: Annotated[str, OneOf(ESTIMATORS)] = "masked"
    precision: Precision = "bfloat16"
    dense_ratio: Annotated[float, Range(ge=0, le=1)] = 0.05
    token_permutation: TokenPermutation = "batch"
    statistics: bool = False
    kernels: bool = True
    recompute: bool = False
    algorithms: Table = ()

    def __post_init__(self) -> None:
        _check(self)


@remembered
def _check(options: Options24) -> None:
    check_options(options)
    check_pair(options.estimator, options.backward)


def check_pair(estimator: str, backward: str, owner: str = "Options24") -> None:
    """Check that an estimator goes with a backward.

    Raises:
        OptionError: it does not.
    """
    if backward not in ESTIMATORS[estimator].backwards:
        choices = ", ".join(f'"{name}"' for name in ESTIMATORS[estimator].backwards)
        raise OptionError(
            f'{owner}: estimator = "{estimator}" ({ESTIMATORS[estimator].summary}) does not go with backward '
            f'= "{backward}": set backward = {choices}, or estimator = "masked"'
        )


def method_of(options: Options24) -> Method:
    """The record of the options' method."""
    return METHODS[options.method]


def estimator_of(options: Options24) -> Estimator:
    """The record of the options' estimator."""
    return ESTIMATORS[options.estimator]


def backward_of(options: Options24) -> Backward:
    """The record of the options' backward."""
    return BACKWARDS[options.backward]


#: relu², hard selection, exact gradients.
PLAIN = Options24()
