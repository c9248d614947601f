"""Which form a 2:4 linear runs in, and which of its products are 2:4 there: the one place that decides.

A form computes the same function as the reference, by kernels; `act24.sparse24.weight.linear24.FORMS` lists
them. What no form serves runs the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from act24.options import check_options, checked, remembered
from act24.sparse24.format.device import obstacle_on, rule_holds_on
from act24.sparse24.format.products import Kind, Product, Table, choose, linear_products
from act24.sparse24.kernels.shared.self_check import kernel_obstacle_on
from act24.sparse24.weight.methods import LinearProduct

#: T, and both sizes of the weight, are multiples of a metadata tile along either side.
_TILE = 64

#: Whose kernels the form launches.
_OPERATORS = ("pack_weight", "pack_weight_rows", "pack_drawn")

_KINDS: dict[LinearProduct, Kind] = {
    "y": "linear_y",
    "grad_x": "linear_grad_x",
    "grad_weight": "linear_grad_weight",
}


@checked
class LinearOptions24(NamedTuple):
    """How `linear24` is computed. Apart from the precision, none of these changes the function.

    A named tuple, because it is a constant of an fx graph and of a compiled one; it checks itself where it is
    made (`OptionError`).

    Attributes:
        both_ways: the mask is 2:4 along `out` too (`act24.sparse24.weight.methods.WeightMethod.both_ways`).
        kernels: run in the first form that serves the linear; False for the plain-PyTorch reference.
        algorithms: what a tuner found for the products on this GPU; empty for the rule of
            `act24.sparse24.format.products.choose`.
        precision: of the products. `"fp8"`: those whose gradient is not drawn in e4m3, as dense products
            (`act24.sparse24.weight.fp8`).
    """

    both_ways: bool = False
    kernels: bool = True
    algorithms: Table = ()
    precision: Literal["bfloat16", "fp8"] = "bfloat16"

    def __post_init__(self) -> None:
        _check(self)


_check = remembered(check_options)


#: A mask that is 2:4 along `in` alone.
PLAIN = LinearOptions24()


class LinearState(NamedTuple):
    """What the operation reads beside x, weight and bias; as there."""

    mask: Tensor | None
    scale: Tensor | None
    seed: Tensor | None
    packed: Tensor | None = None
    transposed: Tensor | None = None
    counter: Tensor | None = None


class Linear(NamedTuple):
    """What the decision depends on, besides the options.

    Attributes:
        tokens, out_features, in_features: T, and the sizes of the weight.
        dtype, device: of the input.
        draws: the output gradient is drawn 2:4 for dW.
        inference: y is all that is asked for. The tokens are then those that kernels run on, a multiple of a
            tile (`prompt_linear`).
    """

    tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device
    draws: bool
    inference: bool = False


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to run the operation by kernels.

    Attributes:
        name: one word.
        condition: why it cannot be for a linear, in a few words; empty if it can.
        run: the operation on x `[..., in]`, weight and bias, which are cast already.
    """

    name: str
    condition: Callable[[Linear, LinearOptions24], str]
    run: Callable[[Tensor, Tensor, Tensor | None, LinearState, LinearOptions24], Tensor]

    def why_not(self, linear: Linear, options: LinearOptions24) -> str:
        """Why the form cannot run a linear, in a few words; empty if it can."""
        return self.condition(linear, options) if options.kernels else "kernels are switched off"


def why_not_packed(linear: Linear, options: LinearOptions24) -> str:
    """Packed operands and 2:4 products (`act24.sparse24.weight.packed`)."""
    if linear.dtype is not torch.bfloat16:
        return f"the kernels are for bfloat16, these are {linear.dtype}"
    if reason := obstacle_on(linear.device):
        return reason
    if reason := why_never_packed(linear.tokens, linear.out_features, linear.in_features):
        return reason
    if not product_algorithms(linear, options):
        shape = f"T {linear.tokens}, {linear.in_features}→{linear.out_features}"
        return f"dense products are faster at {shape}"
    return kernel_obstacle_on(linear.device, _OPERATORS)


def why_never_packed(tokens: int, out_features: int, in_features: int) -> str:
    """What about a shape the kernels cannot take; empty if they can."""
    sizes = (tokens, out_features, in_features)
    if not all(sizes) or any(size % _TILE for size in sizes):
        return f"T {tokens} and the linear {in_features}→{out_features} have to be multiples of {_TILE}"
    return ""


def product_algorithms(linear: Linear, options: LinearOptions24) -> dict[LinearProduct, int]:
    """The algorithms of the products that are 2:4; the others are dense. Each stands for itself: with the
    weight packed, or masked, once for all of them, none costs the others anything.

    A drawn gradient is always packed, because the kernel that draws would have to write twice as many bytes
    with the zeros filled in. For inference, a measurement for fewer tokens is used where there is none for so
    many: 2:4 products gain with the number of tokens.
    """
    products = linear_products(linear.tokens, linear.out_features, linear.in_features)
    chosen: dict[LinearProduct, int] = {}
    untuned = rule_holds_on(linear.device)
    for name in possible_products(options.both_ways, linear.draws):
        kind = _KINDS[name]
        always = name == "grad_weight"
        found = choose(
            {kind: products[kind]}, options.algorithms, always, untuned, fewer_tokens=linear.inference
        )
        if kind in found:
            chosen[name] = found[kind]
    return chosen


def prompt_linear(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> Linear:
    """A linear whose weight is 2:4 as it stands, on so many tokens of prompts: `why_not_packed` says whether
    their product is dense, else `product_algorithms` has y."""
    padded = tokens + -tokens % _TILE
    return Linear(padded, out_features, in_features, dtype, device, draws=False, inference=True)


def possible_products(both_ways: bool, draws: bool) -> tuple[LinearProduct, ...]:
    """The products that can have a 2:4 operand: y along the rows of the weight; dX if its columns are 2:4
    too; dW if the gradient is drawn."""
    return ("y", *(("grad_x",) if both_ways else ()), *(("grad_weight",) if draws else ()))


def tunable_products(
    tokens: int, out_features: int, in_features: int, names: tuple[LinearProduct, ...]
) -> tuple[Product, ...]:
    """What a tuner has to measure of a linear; nothing where the kernels cannot take its shape."""
    if why_never_packed(tokens, out_features, in_features):
        return ()
    products = linear_products(tokens, out_features, in_features)
    return tuple(products[_KINDS[name]] for name in names)
