"""The cache of keys and values of a batch, and what it takes of a device's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.llama import LlamaConfig
from act24.words import counted


@dataclass
class Batch:
    """What a step reads and writes, at fixed addresses.

    Attributes:
        tokens: int64 `[B]`, the last token of each row.
        slot: int64 `[1]`, where its keys and values will go.
        first: int64 `[B]`, the slot of each row's first token.
        seeds: int64 `[B]`.
        keys, values: one `[B, H_kv, L, d]` a block. Zeros at first, never whatever lay there: attention
            multiplies masked slots by 0, and 0 · NaN is NaN.
    """

    tokens: Tensor
    slot: Tensor
    first: Tensor
    seeds: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Slots of the cache."""
        return self.keys[0].shape[2]


def cache_bytes(config: LlamaConfig, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values for so many rows of so many slots."""
    slot = 2 * config.num_hidden_layers * config.key_value_heads * config.head_width
    return slot * rows * length * dtype.itemsize


def new_batch(
    config: LlamaConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device, memory: int | None
) -> Batch:
    """A batch of so many rows of so many slots, empty.

    Args:
        memory: bytes of a CPU's machine. A CPU's allocator gives out more memory than there is, and the
            system kills the process when it writes there. None: not known.

    Raises:
        Act24Error: the device's memory does not hold it.
    """
    if device.type == "cpu" and memory and cache_bytes(config, rows, length, dtype) > memory:
        raise Act24Error(too_large(config, rows, length, dtype, device, memory))
    shape = (rows, config.key_value_heads, length, config.head_width)
    try:
        keys, values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
            for _ in range(2)
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what a CPU's allocator says
        raise Act24Error(too_large(config, rows, length, dtype, device, memory)) from error
    numbers = [torch.zeros(n, dtype=torch.int64, device=device) for n in (rows, 1, rows, rows)]
    tokens, slot, first, seeds = numbers
    return Batch(tokens, slot, first, seeds, keys, values)


def too_large(
    config: LlamaConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device, memory: int | None
) -> str:
    """The error for a batch that does not fit: what it needs, and how many rows would fit."""
    row = cache_bytes(config, 1, length, dtype)
    told = (
        f"{counted(rows, 'row')} of {counted(length, 'token')} need{'s' * (rows == 1)} "
        f"{rows * row / 2**30:.2f} GiB of keys and values, and room for their activations, which {device} "
        "does not have"
    )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory
    fits = rows if free is None else free * 9 // 10 // row
    if fits >= rows:  # it was the activations, or nobody knows
        return f"{told}: take fewer rows at once, or fewer tokens"
    fitting = counted(fits, "row fits", "rows fit") if fits else "not one row fits, take fewer tokens"
    return f"{told}: {fitting}"


@contextmanager
def kept(batch: Batch) -> Iterator[None]:
    """Steps within this context do not count: the batch stays at its slot, and the next step overwrites what
    they wrote into the cache."""
    tokens, slot = batch.tokens.clone(), batch.slot.clone()
    yield
    batch.tokens.copy_(tokens)
    batch.slot.copy_(slot)
