"""Which form a 2:4 feed-forward network runs in: the one place that decides, for the operation, the shell and
whoever asks why.

Every rule says in a few words why its form cannot be, and nothing where it can.
`act24.sparse24.feed_forward.operation`
asks for them in turn: narrow, packed, masked; else it is the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from act24.operation import constant_when_compiled
from act24.sparse24.format.device import fp8_obstacle, obstacle
from act24.sparse24.format.products import Kind, choose, feed_forward_products
from act24.sparse24.pattern.token_wise import Options24

#: T and F are multiples of a metadata tile along either side, and widths of what a 16-byte load holds.
_TILE, _LOAD, _FP8_LOAD = 64, 8, 16

#: The least compute capability with e4m3, for which `torch.compile` has no code below.
_FP8_CAPABILITY = (8, 9)

#: Of the kernels for narrow linears: the tile, the step of a reduction, and the greatest width measured.
_NARROW_TILE, _NARROW_STEP, _WIDEST = 128, 64, 256

#: x, weight_in, bias_in, weight_out, bias_out of `act24.sparse24.feed_forward.operation.activation24`.
Tensors = tuple[Tensor | None, ...]


class Network(NamedTuple):
    """What the decision depends on, besides the options.

    Attributes:
        tokens, features: T and F.
        width, width_out: what the first linear reads, and what the second writes; 0 where there is none.
        dtype, device: of the input.
        biased: the first linear has a bias.
    """

    tokens: int
    features: int
    width: int
    width_out: int
    dtype: torch.dtype
    device: torch.device
    biased: bool = False


def network_of(tensors: Tensors) -> Network:
    """The network of an operation's tensors."""
    x, weight_in, bias_in, weight_out, _ = tensors
    assert x is not None
    features, width = (x.shape[-1], 0) if weight_in is None else weight_in.shape
    width_out = 0 if weight_out is None else weight_out.shape[0]
    tokens = x.numel() // max(x.shape[-1], 1)
    return Network(tokens, features, width, width_out, x.dtype, x.device, bias_in is not None)


def why_not_packed(network: Network, options: Options24) -> str:
    """Packed operands and 2:4 products (`act24.sparse24.feed_forward.packed`)."""
    if reason := _why_no_products(network, options):
        return reason
    if options.estimator != "masked":
        return "the straight-through gradient is not 2:4"
    if options.precision == "fp8":
        if network.width_out % _FP8_LOAD:
            return f"in fp8 the width {network.width_out} of y has to be a multiple of {_FP8_LOAD}"
        if reason := fp8_obstacle_on(network.device):
            return reason
    if not product_algorithms(network, options):
        return (
            f"dense products are faster at T {network.tokens}, F {network.features}, "
            f"widths {network.width} and {network.width_out}"
        )
    return ""


def why_not_masked(network: Network, options: Options24) -> str:
    """Kernels around dense products, or around none (`act24.sparse24.feed_forward.masked`)."""
    if (options.method, options.backward, options.estimator) != ("naive", "dense", "masked"):
        return "around dense products the kernels know naive 2:4 with exact weight gradients only"
    if options.precision == "fp8" and network.width_out:
        return "around dense products the kernels know no fp8"
    return _why_no_kernels(network, options)


def why_not_narrow(network: Network, options: Options24) -> str:
    """2:4 inside the products of narrow linears (`act24.sparse24.feed_forward.narrow`)."""
    chosen = (options.function, options.method, options.backward, options.estimator)
    if chosen != ("relu2", "naive", "dense", "masked"):
        return "the kernels know naive relu² with exact weight gradients only"
    if options.precision == "fp8":
        return "inside products the kernels know no fp8"
    if reason := _why_no_products(network, options):
        return reason
    if network.biased:
        return "the kernels have no bias before the activation"
    if network.tokens % _NARROW_TILE or network.features % _NARROW_TILE:
        return f"T {network.tokens} and F {network.features} have to be multiples of {_NARROW_TILE}"
    widths = (network.width, network.width_out)
    if any(width % _NARROW_STEP for width in widths) or max(widths) > _WIDEST:
        return f"fused products take widths that are multiples of {_NARROW_STEP}, {_WIDEST} at most"
    return ""


def why_not_counted(hidden: Tensor) -> str:
    """The kernel that counts what 2:4 would drop of a dense activation, h `[T, F]`."""
    if hidden.dtype is not torch.bfloat16:
        return f"the kernels are for bfloat16, this is {hidden.dtype}"
    tokens, features = hidden.shape
    return why_never_packed(tokens, features, ()) or obstacle_on(hidden.device)


def product_algorithms(network: Network, options: Options24) -> dict[Kind, int]:
    """The algorithm of each 2:4 product; empty where the products are dense."""
    exact = options.backward == "dense"
    tokens, features, width, width_out, *_ = network
    fp8 = options.precision == "fp8"
    products = feed_forward_products(tokens, width, features, width_out, exact, fp8)
    # Naive and exact has another form than this and the reference: the masked one, in bfloat16.
    masked = exact and options.method == "naive" and not fp8
    return choose(products, options.algorithms, always=not masked)


def why_never_packed(tokens: int, features: int, widths: tuple[int, ...]) -> str:
    """What about a shape the kernels cannot take; empty if they can."""
    if tokens == 0 or tokens % _TILE or features % _TILE:
        return f"T {tokens} and F {features} have to be multiples of {_TILE}"
    if any(width % _LOAD for width in widths):
        return f"widths {', '.join(map(str, widths))} have to be multiples of {_LOAD}"
    return ""


@constant_when_compiled
def obstacle_on(device: torch.device) -> str:
    """`act24.sparse24.format.device.obstacle`, as a constant of a compiled graph."""
    return obstacle(device)


@constant_when_compiled
def fp8_obstacle_on(device: torch.device) -> str:
    """`act24.sparse24.format.device.fp8_obstacle`, likewise."""
    return fp8_obstacle(device)


@constant_when_compiled
def why_no_fp8(device: torch.device) -> str:
    """Why a device cannot run e4m3, not even plain PyTorch compiled, as an error says it; empty if it can."""
    if device.type != "cuda" or (capability := torch.cuda.get_device_capability(device)) >= _FP8_CAPABILITY:
        return ""
    return (
        f"this GPU has compute capability {capability[0]}.{capability[1]}, and e4m3 begins with 8.9: "
        'set precision = "bfloat16" for activation24'
    )


def _why_no_products(network: Network, options: Options24) -> str:
    """What holds for the two forms whose products know of 2:4."""
    if not (network.width and network.width_out):
        return "2:4 products need a linear on both sides of the activation"
    return _why_no_kernels(network, options)


def _why_no_kernels(network: Network, options: Options24) -> str:
    """What holds for all of them."""
    if not options.kernels:
        return "kernels are switched off"
    if network.dtype is not torch.bfloat16:
        return f"the kernels are for bfloat16, these are {network.dtype}"
    widths = (network.width, network.width_out)
    return why_never_packed(network.tokens, network.features, widths) or obstacle_on(network.device)
