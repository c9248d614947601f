"""The linears of generation.

A decoding step takes as long as reading the weights takes. So rows of weights that would be multiplied by
zero are not read, 2:4 weights are read packed, weights of the same input are read as one, and for a single
token there is a kernel of our own. For prompts the products themselves take the time, and 2:4 weights are
multiplied by cuSPARSELt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from act24.sparse24.format.packed import TILE_ROWS
from act24.sparse24.format.products import Table
from act24.sparse24.kernels.dense_decode import dense_decode
from act24.sparse24.kernels.packed_decode import INPUTS, TOKENS, packed_decode
from act24.sparse24.kernels.product24 import product24
from act24.sparse24.kernels.skipping_product import skipping_product
from act24.sparse24.weight.forms import LinearOptions24, product_algorithms, prompt_linear, why_not_packed

#: Most tokens of a step for which reading 2:4 weights packed is tried.
PACKED_TOKENS = TOKENS

#: Most tokens of a step for which skipping is tried. Each has active features of its own, and all are read.
SKIPPING_TOKENS = 8


def skipping_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, function: str) -> Tensor:
    """linear(f(h)), reading only what active features multiply.

    Args:
        hidden: `[..., F]`, in all at most `SKIPPING_TOKENS` tokens; 16-bit.
        weight: `[D, F]` as a linear has it, stored `[F, D]` (`store_by_feature_`).
        function: f, "relu2", "relu" or "none".

    Returns:
        `[..., D]`.
    """
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    y = skipping_product(rows, weight.T, function).sum(0)
    y = y if bias is None else y + bias
    return y.to(hidden.dtype).view(*hidden.shape[:-1], len(weight))


def packed_linear(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """A linear whose weight is 2:4, packed by `act24.sparse24.kernels.packed_decode.packed_for_decode`.

    Args:
        x: bfloat16 `[..., K]`, in all at most `PACKED_TOKENS` tokens.
    """
    y = packed_decode(x.reshape(-1, x.shape[-1]), values, codes).sum(0)
    y = y if bias is None else y + bias
    return y.to(x.dtype).view(*x.shape[:-1], len(values))


def streamed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear of one token, by a kernel of its own; of more of them cuBLAS's.

    Args:
        x: 16-bit `[..., K]`.
        weight: `[N, K]`, contiguous.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) != 1:
        return F.linear(x, weight, bias)
    y = dense_decode(rows, weight)
    y = y if bias is None else y + bias
    return y.to(x.dtype).view(*x.shape[:-1], len(weight))


def prompt_algorithm(
    tokens: int, shape: tuple[int, int], table: Table, dtype: torch.dtype, device: torch.device
) -> int | None:
    """cuSPARSELt's algorithm for the product of so many tokens with a 2:4 weight; None where the dense
    product is faster, as far as is known (`act24.sparse24.weight.forms`, which decides), or has to be.

    Args:
        shape: `[N, K]` of the weight.
        table: what a tuner found on this device.
    """
    linear, options = prompt_linear(tokens, *shape, dtype, device), LinearOptions24(algorithms=table)
    return None if why_not_packed(linear, options) else product_algorithms(linear, options)["y"]


def product_linear(x: Tensor, packed: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    """A linear whose weight is 2:4, by cuSPARSELt.

    Args:
        x: bfloat16 `[..., K]`.
        packed: the buffer of the weight, `[N, K]`, packed along its rows (`pack_weight_rows`).
        algorithm: of the library's (`prompt_algorithm`).
    """
    rows = x.reshape(-1, x.shape[-1])
    missing = -len(rows) % TILE_ROWS
    padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows  # which copies, even by nothing
    y = product24(packed, padded.T, algorithm, True, None, None)[: len(rows)]
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], packed.shape[0])


@torch.no_grad()
def store_by_feature_(weight: Tensor, by_feature: bool = True) -> None:
    """Store a weight `[D, F]` as `[F, D]` in memory, or as `[D, F]` again. Its values and shape stay."""
    stored = weight.data.T if by_feature else weight.data
    if not stored.is_contiguous():
        weight.data = stored.contiguous().T if by_feature else stored.contiguous()


@torch.no_grad()
def fuse_(module: nn.Module, name: str, parameters: Sequence[Tensor]) -> None:
    """Put parameters of a module one after another into one tensor, which becomes its buffer `name`. The
    parameters become views of it; their values and shapes stay. Does nothing where they are such views
    already.

    Args:
        parameters: `[N_i, …]`, of one dtype.
    """
    sizes = [len(parameter) for parameter in parameters]
    whole = getattr(module, name, None)
    if whole is None or any(
        part.data_ptr() != parameter.data_ptr()
        for part, parameter in zip(whole.split(sizes), parameters, strict=True)
    ):
        whole = torch.cat([parameter.data for parameter in parameters])
        for part, parameter in zip(whole.split(sizes), parameters, strict=True):
            parameter.data = part
        module.register_buffer(name, whole, persistent=False)


def why_not_read_packed(weight: Tensor) -> str:
    """Why a step does not read this weight, `[N, K]`, packed; empty if it may. Looks at its values."""
    if weight.dtype is not torch.bfloat16:
        return f"the weight is {weight.dtype}, and the kernel is for bfloat16"
    if weight.shape[-1] % INPUTS:
        return f"it has {weight.shape[-1]} inputs, no multiple of {INPUTS}"
    if not is_2_4(weight):
        return "it is not 2:4"
    return ""


def is_2_4(weight: Tensor) -> bool:
    """Whether at most two of every four inputs of a weight, `[N, K]`, are not zero."""
    if weight.shape[-1] % 4:
        return False
    return int((weight != 0).unflatten(-1, (-1, 4)).sum(-1).amax()) <= 2
