# pyright: reportInvalidTypeForm=false
"""The product of a packed 2:4 weight with one token or a few, where the weight's bytes are the time.

The layout is our own, 9/16 of the dense bytes, in plain row order. A group is four neighbours along the
inputs, of which two are kept:

    values  [N, K / 2]   the kept ones, group after group
    codes   [N, K / 32]  32 bits for eight groups, G/8 apart: bits 4p to 4p + 3 of word j are those of group
                         p G/8 + j; two say where the first kept one stands (0, 1, 2), two the second (1, 2,
                         3, less 1)

So a tile of codes belongs to eight tiles of values. All nine loads have the same number of words, and no lane
waits for another. The four inputs of a group are one word of 64 bits.

For one token, each kept value selects its input among the three places that it can have. For several tokens
these selections would be repeated for each. Instead the values are put at their places among zeros once, and
tensor cores multiply them: a tile of the weight becomes four matrices, one for each place in a group, and a
tile of the inputs likewise. The order of the terms of a sum does not matter, so the four need not be
interleaved, and no value moves between lanes. Tensor cores multiply eight or sixteen tokens at a time, so
fewer take as long.

A program has some rows of the weight and a split of its inputs. Each split's sum is written in float32, and
the caller adds the splits in a fixed order. So there are no atomics, and the result is the same bit for bit
every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.selection import top2_of_4

#: Inputs are a multiple of this many, so that each eighth of a row begins at 16 bytes.
INPUTS = 128

#: Most tokens.
TOKENS = 16


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


class Tiling(NamedTuple):
    """How a product is shared out among programs.

    Attributes:
        rows, groups: of a tile. A program reads nine at a time: the codes, and the values in each eighth of a
            row.
        splits: of the inputs, at most.
        warps, stages: of Triton's. With one stage a tile is read when it is needed; with two the next one is
            on its way by then, through shared memory.
    """

    rows: int
    groups: int
    splits: int
    warps: int
    stages: int

    def length(self, inputs: int) -> int:
        """Tiles of a split."""
        return _ceiling(self._tiles(inputs), self.splits)

    def split_number(self, inputs: int) -> int:
        """Splits that have a tile."""
        return _ceiling(self._tiles(inputs), self.length(inputs))

    def _tiles(self, inputs: int) -> int:
        return _ceiling(inputs // 32, self.groups)


#: Rows, groups, warps and stages that are offered, by tokens that the kernel is compiled for. A thread has
#: eight groups of a tile: with fewer it reads less at once. Where one token's tile has 128 of a row, Triton
#: moves the inputs through shared memory, with a barrier for each eighth. With 16 tokens and four warps it
#: takes the tensor cores' product that reads inputs from there, and waits for it four times an eighth.
OFFERED = {
    1: ((16, 64, 4, 1), (32, 32, 4, 1), (8, 64, 4, 1), (16, 64, 4, 2), (32, 32, 4, 2), (8, 128, 4, 1)),
    8: ((64, 16, 4, 2), (32, 16, 2, 2), (64, 16, 4, 1), (64, 16, 4, 3)),
    16: ((32, 16, 2, 2), (32, 16, 2, 1), (64, 16, 4, 2)),
}

#: Programs that an H200 has at once: five on each of its 132 multiprocessors, as registers and shared memory
#: allow.
PROGRAMS = 660


def tilings(tokens: int, outputs: int, inputs: int) -> tuple[Tiling, ...]:
    """What is worth trying for a product `[T, K]` with `[N, K]`; `packed_decode` takes the first."""

    def waste(shape: tuple[int, int, int, int]) -> int:
        """Of a row, in sixteenths: its last tile is multiplied whole."""
        return -words % shape[1] * 16 // words

    words = inputs // 32
    found = []
    for rows, groups, warps, stages in sorted(OFFERED[_padded(tokens)], key=waste):
        splits = max(1, PROGRAMS // _ceiling(outputs, rows))
        found.append(Tiling(rows, groups, splits, warps, stages))
    return tuple(found)


def _padded(tokens: int) -> int:
    return min(size for size in OFFERED if tokens <= size)


def _ceiling(number: int, divisor: int) -> int:
    return -(-number // divisor)


@jit
def _halves(word):
    """Two bfloat16 in 32 bits as float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@jit
def _low(word):
    """The bfloat16 in the lowest bits."""
    return word.to(tl.int16).to(tl.bfloat16, bitcast=True)


@jit
def _with_one_token(word, code, inputs, sums):
    """Sums [ROWS, GROUPS], with one input of each group selected for either value."""
    first, second = _halves(word)
    x0, x1 = _halves(inputs.to(tl.int32))
    x2, x3 = _halves((inputs >> 32).to(tl.int32))
    at_first = tl.where(code & 2 != 0, x2[None], tl.where(code & 1 != 0, x1[None], x0[None]))
    at_second = tl.where(code & 8 != 0, x3[None], tl.where(code & 4 != 0, x2[None], x1[None]))
    sums += first * at_first
    sums += second * at_second
    return sums


@jit
def _with_tokens(word, code, inputs, sums):
    """Sums [ROWS, TOKENS], with both values of each group at their places among zeros."""
    first, second = word, word >> 16
    entry = tl.where(code & 3 == 0, first, 0)
    sums = tl.dot(_low(entry), _low(inputs), sums)
    entry = tl.where(code & 1 != 0, first, tl.where(code & 12 == 0, second, 0))
    sums = tl.dot(_low(entry), _low(inputs >> 16), sums)
    entry = tl.where(code & 6 != 0, tl.where(code & 2 != 0, first, second), 0)
    sums = tl.dot(_low(entry), _low(inputs >> 32), sums)
    entry = tl.where(code & 8 != 0, second, 0)
    return tl.dot(_low(entry), _low(inputs >> 48), sums)


@jit
def _packed(
    x,
    values,
    codes,
    partial,
    outputs,
    quads,
    tokens,
    length,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    eighth = 4 * quads  # words of 16 bytes, as far as the compiler can see
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < outputs
    group = tl.arange(0, GROUPS)
    token = tl.arange(0, TOKENS)
    given = token < tokens
    first = split * length * GROUPS
    end = tl.minimum(first + length * GROUPS, eighth)
    code_at = codes + row.to(tl.int64)[:, None] * eighth + group[None, :]
    value_at = values + row.to(tl.int64)[:, None] * (8 * eighth) + group[None, :]
    if TOKENS == 1:
        input_at = x + group
        sums = tl.zeros([ROWS, GROUPS], dtype=tl.float32)
    else:
        input_at = x + token[None, :] * (8 * eighth) + group[:, None]
        sums = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for start in tl.range(first, end, GROUPS, num_stages=STAGES):
        real = start + group < end
        mask = inside[:, None] & real[None, :]
        needed = real if TOKENS == 1 else real[:, None] & given[None, :]
        code = tl.load(code_at + start, mask, other=0)
        for part in tl.static_range(8):
            word = tl.load(value_at + (start + part * eighth), mask, other=0)
            inputs = tl.load(input_at + (start + part * eighth), needed, other=0)
            if TOKENS == 1:
                sums = _with_one_token(word, code >> (4 * part), inputs, sums)
            else:
                sums = _with_tokens(word, code >> (4 * part), inputs, sums)
    if TOKENS == 1:
        tl.store(partial + split * outputs + row, tl.sum(sums, 1), inside)
    else:
        at = partial + (split * tokens + token)[None, :] * outputs + row[:, None]
        tl.store(at, sums, inside[:, None] & given[None, :])


def _reference(x: Tensor, values: Tensor, codes: Tensor) -> Tensor:
    inputs, tiling = x.shape[1], _tiling(x, values, codes)
    split = torch.arange(inputs // 32).div(tiling.groups * tiling.length(inputs), rounding_mode="floor")
    split = split.repeat(8).repeat_interleave(4).to(x.device)
    weight = unpacked(values, codes).float()
    parts = [x.float() @ (weight * (split == n)).T for n in range(tiling.split_number(inputs))]
    return torch.stack(parts)


def _fake(x: Tensor, values: Tensor, codes: Tensor) -> Tensor:
    splits = _tiling(x, values, codes).split_number(x.shape[1])
    return x.new_empty((splits, x.shape[0], values.shape[0]), dtype=torch.float32)


@operator(_reference, _fake, ours=("values", "codes"))
def packed_decode(x: Tensor, values: Tensor, codes: Tensor) -> Tensor:
    """x W₂₄ᵀ, split over the inputs.

    Args:
        x: bfloat16 `[T, K]`, T at most `TOKENS`.
        values: bfloat16 `[N, K / 2]`; codes: int32 `[N, K / 32]`, as `packed_for_decode` makes them.

    Returns:
        float32 `[S, T, N]`, whose sum over S is the product.

    Raises:
        ValueError: other dtypes or shapes.
    """
    return launch(x, values, codes, _tiling(x, values, codes))


def _tiling(x: Tensor, values: Tensor, codes: Tensor) -> Tiling:
    (tokens, inputs), outputs = x.shape, len(values)
    fits = values.shape[1] * 2 == codes.shape[1] * 32 == inputs and inputs % INPUTS == 0
    fits = fits and 1 <= tokens <= TOKENS
    if not fits or x.dtype is not torch.bfloat16 or values.dtype is not torch.bfloat16:
        raise ValueError(
            f"packed_decode: {tuple(x.shape)} {x.dtype} with values {tuple(values.shape)} {values.dtype}: "
            f"bfloat16, one to {TOKENS} tokens, and inputs a multiple of {INPUTS}"
        )
    return tilings(tokens, outputs, inputs)[0]


def launch(x: Tensor, values: Tensor, codes: Tensor, tiling: Tiling) -> Tensor:
    """Launch the kernel.

    Args:
        x, values, codes: as for `packed_decode`.
        tiling: one of `tilings`, or another.

    Returns:
        float32 `[S, T, N]`.
    """
    (tokens, inputs), outputs = x.shape, len(values)
    partial = x.new_empty((tiling.split_number(inputs), tokens, outputs), dtype=torch.float32)
    _packed[(triton.cdiv(outputs, tiling.rows), len(partial))](
        x.view(-1).view(torch.int64),  # of one row PyTorch takes any stride for contiguous
        values.view(torch.int32),
        codes,
        partial,
        outputs,
        inputs // 128,
        tokens,
        tiling.length(inputs),
        TOKENS=_padded(tokens),
        ROWS=tiling.rows,
        GROUPS=tiling.groups,
        STAGES=tiling.stages,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return partial
