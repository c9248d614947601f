"""A whole model over a static cache: prompts in chunks, then a step a token.

On a CUDA device the blocks are compiled and a step is one CUDA graph, which reads and writes fixed addresses:
the last tokens, the slot, the cache. Nothing in it waits for the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.errors import Act24Error
from act24.inference.attention import Place, place_of
from act24.inference.layer import LayerForm, cached_layers
from act24.inference.sampling import Sampling, next_token
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.rotary import rotary_embedding

#: Tokens of a prompt that go through the model at once; attention scores grow with them.
CHUNK = 2048

#: Caches have a multiple of so many slots, so that the next batch often fits the one that is there.
SLOTS = 128


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


class Decoder:
    """A model, and the batch that it is generating.

    One batch at a time: a new one reuses the cache, and the CUDA graph, where it has as many rows, no more
    slots and the same sampling.
    """

    def __init__(
        self, model: LlamaForCausalLM, allowed: Tensor | None = None, compiled: bool | None = None
    ) -> None:
        """
        Args:
            model: on its device, in its dtype.
            allowed: boolean `[V]`, which tokens may be taken; None: all.
            compiled: compile the blocks, and replay steps from CUDA graphs on a CUDA device. None: on a CUDA
                device.

        Raises:
            Act24Error: a block is not of `act24.llama`.
        """
        self._model = model
        self._config = model.config
        self._device, self._dtype = model.head_weight.device, model.model.embed_tokens.weight.dtype
        self._allowed = None if allowed is None else allowed.to(self._device)
        self._forms = cached_layers(model.model.layers)
        self._compiled = self._device.type == "cuda" if compiled is None else compiled
        self._step_forms = [_compiled(form) for form in self._forms] if self._compiled else self._forms
        self._tables: tuple[Tensor, Tensor] | None = None
        self._batch: Batch | None = None
        self._graph: tuple[Sampling, torch.cuda.CUDAGraph] | None = None

    @property
    def device(self) -> torch.device:
        return self._device

    @torch.inference_mode()
    def begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], length: int, sampling: Sampling
    ) -> Tensor:
        """Read prompts, and choose the token after each.

        Args:
            prompts: token ids, at least one in each.
            seeds: one a row.
            length: tokens that will be in a row at most, padding, prompt and new ones.

        Returns:
            int64 `[B]`, to be copied before the next step.

        Raises:
            Act24Error: the cache does not fit the device's memory.
        """
        try:
            return self._begin(prompts, seeds, length, sampling)
        except torch.OutOfMemoryError as error:
            self._batch = self._graph = None
            raise Act24Error(self._too_large(len(prompts), length)) from error

    def _begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], length: int, sampling: Sampling
    ) -> Tensor:
        batch = self._renewed(len(prompts), length)
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        batch.first.copy_(torch.tensor([longest - len(p) for p in prompts]))
        batch.seeds.copy_(torch.tensor(seeds, dtype=torch.int64))
        hidden = self._prefill(batch, padded.to(self._device))
        batch.slot.fill_(longest)
        batch.tokens.copy_(self._choose(hidden, batch, sampling))
        return batch.tokens

    @torch.inference_mode()
    def step(self, sampling: Sampling) -> Tensor:
        """The next token of every row.

        Returns:
            int64 `[B]`, to be copied before the next step.
        """
        batch = self._batch
        assert batch is not None
        if not (self._compiled and self._device.type == "cuda"):
            self._advance(batch, sampling)
        elif self._graph is not None and self._graph[0] == sampling:
            self._graph[1].replay()
        else:
            self._graph = None
            self._advance(batch, sampling)  # compiles, and is a step like any other
            self._capture(batch, sampling)
        return batch.tokens

    def _capture(self, batch: Batch, sampling: Sampling) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph):
            self._advance(batch, sampling)
        self._graph = sampling, graph

    def _advance(self, batch: Batch, sampling: Sampling) -> None:
        place = place_of(batch.slot, batch.first, batch.length)
        hidden = self._layers(self._step_forms, batch, batch.tokens[:, None], place, batch.keys, batch.values)
        batch.slot.add_(1)
        batch.tokens.copy_(self._choose(hidden, batch, sampling))

    def _prefill(self, batch: Batch, padded: Tensor) -> Tensor:
        """Prompts through the model, a chunk at a time. Returns the last hidden states, `[B, 1, D]`."""
        for start in range(0, padded.shape[1], CHUNK):
            chunk = padded[:, start : start + CHUNK]
            end = start + chunk.shape[1]
            place = place_of(torch.arange(start, end, device=self._device), batch.first, end)
            keys, values = ([each[:, :, :end] for each in cache] for cache in (batch.keys, batch.values))
            hidden = self._layers(self._forms, batch, chunk, place, keys, values)
        return hidden[:, -1:]

    def _layers(
        self,
        forms: Sequence[LayerForm],
        batch: Batch,
        ids: Tensor,
        place: Place,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        position = (place.slots - batch.first[:, None]).clamp(min=0)
        cos, sin = (table[position][:, None] for table in self._rotary(batch.length))
        model = self._model.model
        hidden = model.embed_tokens(ids)
        for layer, form, key, value in zip(model.layers, forms, keys, values, strict=True):
            hidden = form(layer, hidden, cos, sin, key, value, place)
        return hidden

    def _choose(self, hidden: Tensor, batch: Batch, sampling: Sampling) -> Tensor:
        """The token that goes into the slot of the batch."""
        logits = F.linear(self._model.model.norm(hidden[:, -1]), self._model.head_weight)
        return next_token(logits, sampling, batch.seeds, batch.slot - batch.first, self._allowed)

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) for every slot. Kept, because a captured step reads them where they lie."""
        if self._tables is None or len(self._tables[0]) < length:
            config = self._config
            scaling = config.rope_scaling
            self._tables = rotary_embedding(
                length, config.head_width, config.rope_theta, self._device, scaling
            )
        return self._tables

    def _renewed(self, rows: int, length: int) -> Batch:
        """The batch that is there if its cache is large enough, else a new one."""
        batch = self._batch
        if batch is None or batch.rows != rows or batch.length < length:
            self._batch = self._graph = None
            self._batch = batch = self._allocated(rows, -(-length // SLOTS) * SLOTS)
        for cache in (*batch.keys, *batch.values):
            cache.zero_()
        return batch

    def _allocated(self, rows: int, length: int) -> Batch:
        config = self._config
        shape = (rows, config.key_value_heads, length, config.head_width)
        like = {"dtype": self._dtype, "device": self._device}
        try:
            keys, values = (
                [torch.zeros(shape, **like) for _ in range(config.num_hidden_layers)] for _ in range(2)
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what a CPU's allocator says
            raise Act24Error(self._too_large(rows, length)) from error
        numbers = [torch.zeros(n, dtype=torch.int64, device=self._device) for n in (rows, 1, rows, rows)]
        tokens, slot, first, seeds = numbers
        return Batch(tokens, slot, first, seeds, keys, values)

    def _too_large(self, rows: int, length: int) -> str:
        row = cache_bytes(self._config, 1, length, self._dtype)
        told = (
            f"{rows} rows of {length} tokens need {rows * row / 2**30:.2f} GiB of keys and values, and room "
            f"for their activations, which {self._device} does not have"
        )
        if self._device.type != "cuda":
            return f"{told}: take fewer rows at once, or fewer tokens"
        fits = torch.cuda.mem_get_info(self._device)[0] * 9 // 10 // row
        return f"{told}: {fits} rows fit" if fits else f"{told}: not one row fits, take fewer tokens"


@functools.cache
def _compiled(form: LayerForm) -> Callable[..., Tensor]:
    return torch.compile(form, fullgraph=True, dynamic=False)
