"""What a form of `activation24` is, and what decides whether it can run a network.

A form computes the same function as the reference, by kernels. Each says in one record what it serves; the
list of them, in the order in which they are asked, is `act24.sparse24.feed_forward.operation.FORMS`. What no
form serves runs the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from act24.sparse24.feed_forward.options import Options24, backward_of, method_of
from act24.sparse24.format.device import rule_holds_on
from act24.sparse24.format.products import Kind, Product, choose, feed_forward_products
from act24.sparse24.kernels.shared.self_check import kernel_obstacle_on

#: T and F are multiples of a metadata tile along either side, and widths of what a 16-byte load holds.
_TILE, _LOAD = 64, 8

#: Tokens of which inference takes a multiple, once it has more than one tile: every form's kernels do.
WHOLE_TOKENS = 128

#: x, weight_in, bias_in, weight_out, bias_out of `act24.sparse24.feed_forward.operation.activation24`.
Tensors = tuple[Tensor | None, ...]


class State(NamedTuple):
    """What the operation reads beside its tensors and options.

    Attributes:
        scale: β, a float32 scalar; None for 1.
        seed: int64 scalar; None for methods that do not draw.
        real: boolean `[T]`, the tokens that are no padding; None for all.
        casts: of both weights, as `packed_fp8.cast_weights` makes them; None: they are cast where they are
            read.
        counter: in e4m3, as in `act24.fp8.linear.linear_fp8`.
    """

    scale: Tensor | None = None
    seed: Tensor | None = None
    real: Tensor | None = None
    casts: tuple[Tensor, ...] | None = None
    counter: Tensor | None = None


class Network(NamedTuple):
    """What the decision depends on, besides the options.

    Attributes:
        tokens, features: T and F.
        width, width_out: what the first linear reads, and what the second writes; 0 where there is none.
        dtype, device: of the input.
        biased: the first linear has a bias.
        scaled: the result is multiplied by β.
        inference: y is all that is asked for, without a gradient or statistics. The tokens are then those
            that kernels run on: beyond one tile, rounded up to `WHOLE_TOKENS`.
    """

    tokens: int
    features: int
    width: int
    width_out: int
    dtype: torch.dtype
    device: torch.device
    biased: bool = False
    scaled: bool = False
    inference: bool = False


def network_of(tensors: Tensors, scaled: bool = False, inference: bool = False) -> Network:
    """The network of an operation's tensors."""
    x, weight_in, bias_in, weight_out, _ = tensors
    assert x is not None
    features, width = (x.shape[-1], 0) if weight_in is None else weight_in.shape
    width_out = 0 if weight_out is None else weight_out.shape[0]
    tokens = x.numel() // max(x.shape[-1], 1)
    if inference and tokens > _TILE:
        tokens += -tokens % WHOLE_TOKENS
    biased = bias_in is not None
    return Network(tokens, features, width, width_out, x.dtype, x.device, biased, scaled, inference)


def is_inference(tensors: Tensors, options: Options24) -> bool:
    """Whether y is all that is asked for."""
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return not training and not options.statistics


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to run the operation by kernels.

    Attributes:
        name: one word, for `act24 doctor`.
        says: what it does, as `act24 doctor` says it of a network that takes it.
        sparsifiers: the kernels' names of those that it knows (`methods.Method.kernel`).
        functions, estimators, backwards, precisions: those that it knows.
        linears: the network needs a linear on both sides.
        scales: it takes β.
        operators: whose kernels it launches; they check themselves on first use (`self_check`).
        condition: why it cannot be for this shape and device, in a few words; "" if it can.
        run: the operation on tensors that are cast already; y and the statistics.
    """

    name: str
    says: str
    sparsifiers: tuple[str, ...]
    functions: tuple[str, ...]
    estimators: tuple[str, ...]
    backwards: tuple[str, ...]
    precisions: tuple[str, ...]
    linears: bool
    scales: bool
    operators: tuple[str, ...]
    condition: Callable[[Network, Options24], str]
    run: Callable[[Tensors, State, Options24], tuple[Tensor, Tensor]]

    def why_not(self, network: Network, options: Options24) -> str:
        """Why the form cannot run a network, in a few words; empty if it can."""
        if not options.kernels:
            return "kernels are switched off"
        if reason := self.why_never(network, options):
            return reason
        if network.dtype is not torch.bfloat16:
            return f"the kernels are for bfloat16, these are {network.dtype}"
        if reason := self.condition(network, options):
            return reason
        return kernel_obstacle_on(network.device, self.operators)

    def knows(self, options: Options24) -> bool:
        """Whether a network of two linears could run in it, given the shape and the machine."""
        both = Network(0, 0, 1, 1, torch.bfloat16, torch.device("cpu"), scaled=method_of(options).scaled)
        return not self.why_never(both, options)

    def why_never(self, network: Network, options: Options24) -> str:
        """The part of `why_not` that no shape, dtype or machine can change."""
        method = method_of(options)
        if method.kernel is None:
            return f'no kernel knows the method "{options.method}"'
        if method.kernel not in self.sparsifiers:
            return f'its kernels do not know the method "{options.method}"'
        if options.function not in self.functions:
            return f"its kernels do not know {options.function}"
        if options.estimator not in self.estimators:
            return f'its kernels do not know the estimator "{options.estimator}"'
        if options.backward not in self.backwards:
            return f'its kernels do not know the "{options.backward}" backward'
        if network.width_out and options.precision not in self.precisions:
            return f"its kernels do not know {options.precision}"
        if self.linears and not (network.width and network.width_out):
            return "2:4 products need a linear on both sides of the activation"
        if network.scaled and not self.scales:
            return "its kernels have no scale"
        return ""


def product_algorithms(network: Network, options: Options24) -> dict[Kind, int]:
    """The algorithm of each 2:4 product; empty where the products are dense. For inference y alone counts,
    and a product that was tuned for fewer tokens answers too: more of them only help 2:4."""
    exact = not backward_of(options).along_tokens
    tokens, features, width, width_out, *_ = network
    fp8 = options.precision == "fp8"
    products = feed_forward_products(tokens, width, features, width_out, exact, fp8)
    if network.inference:
        only_y: dict[Kind, Product] = {"y": products["y"]}
        products = only_y
    # Naive and exact has another form than this and the reference: the masked one, in bfloat16.
    masked = exact and method_of(options).kernel == "naive" and not fp8
    untuned = rule_holds_on(network.device)
    return choose(products, options.algorithms, not masked, untuned, fewer_tokens=network.inference)


def why_never_packed(tokens: int, features: int, widths: tuple[int, ...]) -> str:
    """What about a shape the kernels cannot take; empty if they can."""
    if tokens == 0 or tokens % _TILE or features % _TILE:
        return f"T {tokens} and F {features} have to be multiples of {_TILE}"
    if any(width % _LOAD for width in widths):
        return f"widths {', '.join(map(str, widths))} have to be multiples of {_LOAD}"
    return ""
