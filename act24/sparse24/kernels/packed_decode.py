# pyright: reportInvalidTypeForm=false
"""The product of a packed 2:4 weight with one token, where the weight's bytes are the time.

The layout is our own, 9/16 of the dense bytes, in plain row order. A group is four neighbours along the
inputs, of which two are kept:

    values  [N, K / 2]   the kept ones, group after group
    codes   [N, K / 32]  32 bits for eight groups, G/8 apart: bits 4p to 4p + 3 of word j are those of group
                         p G/8 + j; two say where the first kept one stands (0, 1, 2), two the second (1, 2,
                         3, less 1)

So every load is of as many words and no lane waits for another's: a tile of codes serves eight tiles of
values. The four inputs of a group are one word of 64 bits, and each kept value selects its own among the
three that it can stand at.

For more tokens the selections would repeat. Spreading the values over their places, and multiplying all four,
costs as much from two tokens on as it saves: at four it took twice cuBLAS's time (H200), so there is no such
kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.selection import top2_of_4

#: Inputs are a multiple of this many, so that each eighth of a row begins at 16 bytes.
INPUTS = 128


def packed_for_decode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A 2:4 weight in the layout of `packed_decode`.

    Args:
        weight: 16-bit `[N, K]`, K a multiple of `INPUTS`, at most two non-zeros of four along K.

    Returns:
        values `[N, K / 2]` of its dtype, codes int32 `[N, K / 32]`.
    """
    groups = weight.unflatten(-1, (-1, 4))
    kept = top2_of_4(weight.abs()).unflatten(-1, (-1, 4))
    places = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :2]
    values = groups.gather(-1, places).flatten(1)
    code = (places[..., 0] | ((places[..., 1] - 1) << 2)).unflatten(-1, (8, -1))
    shifts = 4 * torch.arange(8, device=weight.device)
    # A sum of bits that do not meet; the highest may make it negative as 32 bits.
    return values.contiguous(), (code << shifts[:, None]).sum(1).to(torch.int32).contiguous()


def unpacked(values: Tensor, codes: Tensor) -> Tensor:
    """The dense weight `[N, K]`, of the dtype of `values`, from what `packed_for_decode` returns."""
    shifts = 4 * torch.arange(8, device=codes.device)
    code = ((codes.long()[:, None] >> shifts[:, None]) & 15).flatten(1)
    places = torch.stack((code & 3, (code >> 2) + 1), dim=-1)
    groups = values.new_zeros((*code.shape, 4))
    return groups.scatter_(-1, places, values.unflatten(-1, (-1, 2))).flatten(1)


#: Rows and groups of a tile, warps of Triton's; the best of some twenty on an H200 at 7b width.
ROWS, GROUPS, WARPS = 8, 128, 4


@jit
def _halves(word):
    """Two bfloat16 in 32 bits as float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@jit
def _packed(
    x,
    values,
    codes,
    y,
    outputs,
    quads,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    eighth = 4 * quads  # words of 16 bytes, as far as the compiler can see
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < outputs
    group = tl.arange(0, GROUPS)
    sums = tl.zeros([ROWS, GROUPS], dtype=tl.float32)
    for start in range(0, eighth, GROUPS):
        low = start + group
        real = low < eighth
        mask = inside[:, None] & real[None, :]
        code = tl.load(codes + row.to(tl.int64)[:, None] * eighth + low[None, :], mask, other=0)
        at = values + row.to(tl.int64)[:, None] * (8 * eighth) + low[None, :]
        for part in tl.static_range(8):
            first, second = _halves(tl.load(at + part * eighth, mask, other=0))
            four_inputs = tl.load(x + low + part * eighth, real, other=0)
            x0, x1 = _halves(four_inputs.to(tl.int32))
            x2, x3 = _halves((four_inputs >> 32).to(tl.int32))
            one, two = ((code >> (4 * part)) & 1) != 0, ((code >> (4 * part)) & 2) != 0
            three, four = ((code >> (4 * part)) & 4) != 0, ((code >> (4 * part)) & 8) != 0
            at_first = tl.where(two, x2[None], tl.where(one, x1[None], x0[None]))
            at_second = tl.where(four, x3[None], tl.where(three, x2[None], x1[None]))
            sums += first * at_first + second * at_second
    tl.store(y + row, tl.sum(sums, 1).to(y.dtype.element_ty), inside)


def _reference(x: Tensor, values: Tensor, codes: Tensor) -> Tensor:
    return (x.float() @ unpacked(values, codes).float().T).to(x.dtype)


def _fake(x: Tensor, values: Tensor, codes: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


@operator(_reference, _fake, ours=("values", "codes"))
def packed_decode(x: Tensor, values: Tensor, codes: Tensor) -> Tensor:
    """x W₂₄ᵀ.

    Args:
        x: bfloat16 `[1, K]`.
        values: bfloat16 `[N, K / 2]`; codes: int32 `[N, K / 32]`, as `packed_for_decode` makes them.

    Returns:
        bfloat16 `[1, N]`.

    Raises:
        ValueError: other dtypes or shapes.
    """
    (tokens, inputs), outputs = x.shape, len(values)
    fits = values.shape[1] * 2 == codes.shape[1] * 32 == inputs and inputs % INPUTS == 0
    if not fits or tokens != 1 or x.dtype is not torch.bfloat16 or values.dtype is not torch.bfloat16:
        raise ValueError(
            f"packed_decode: {tuple(x.shape)} {x.dtype} with values {tuple(values.shape)} {values.dtype}: "
            f"bfloat16, one token, and inputs a multiple of {INPUTS}"
        )
    y = x.new_empty((1, outputs))
    _packed[(triton.cdiv(outputs, ROWS),)](
        x.view(-1).view(torch.int64),  # of one row PyTorch takes any stride for contiguous
        values.view(torch.int32),
        codes,
        y,
        outputs,
        inputs // 128,
        ROWS=ROWS,
        GROUPS=GROUPS,
        num_warps=WARPS,
    )
    return y
