"""A whole model over a static cache: prompts in chunks, then a step a token.

On a CUDA device the blocks are compiled and a step is one CUDA graph, which reads and writes fixed addresses:
the last tokens, the slot, the cache. Nothing in it waits for the host. How each block multiplies is measured
when the step is captured, on the very batch that it is for, so with as many zeros as its activations really
have. That differs from layer to layer: skipping makes a layer slower in which half of the features are
active, and one with a tenth of them faster.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.errors import Act24Error
from act24.inference.attention import ChunkPlace, Place, chunk_place, place_of
from act24.inference.cache import Batch, kept, new_batch, too_large
from act24.inference.layer import (
    DENSE,
    Choice,
    LayerForm,
    cached_layers,
    can_use,
    lay_out_,
    step_choices,
    weights_of,
    why_not_streamed,
)
from act24.inference.linears import streamed_linear
from act24.inference.prompts import PromptForms, chunks, compiles_for
from act24.inference.sampling import Sampling, next_token
from act24.llama import LlamaForCausalLM
from act24.rotary import rotary_embedding
from act24.sparse24.format.products import Table

#: Replays of a captured step that are timed, twice; the faster turn counts.
REPLAYS = 8

#: Times that each block is timed by itself; the fastest counts.
TURNS = 6

#: How each block of a step multiplies.
Plan = tuple[Choice, ...]

#: Caches have a multiple of so many slots, so that the next batch often fits the one that is there.
SLOTS = 128


def plan_text(plan: Plan) -> str:
    """A plan in words: `2 blocks fused products, 1 block dense`."""
    return ", ".join(
        f"{blocks} block{'s' * (blocks > 1)} {choice}" for choice, blocks in Counter(plan).most_common()
    )


class Decoder:
    """A model, and the batch that it is generating.

    One batch at a time: a new one reuses the cache, and the CUDA graph, where it has as many rows, no more
    slots and the same sampling.

    Attributes:
        plans: by rows, how each block of a step multiplies.
        times: by rows and plan, seconds of a step, where several were tried.
        prompts: how chunks of prompts go through the blocks.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        allowed: Tensor | None = None,
        compiled: bool | None = None,
        choice: Choice | None = None,
        memory: int | None = None,
        table: Table = (),
    ) -> None:
        """
        Args:
            model: on its device, in its dtype.
            allowed: boolean `[V]`, which tokens may be taken; None: all.
            compiled: compile the blocks, and replay steps from CUDA graphs on a CUDA device. None: on a CUDA
                device.
            choice: how every block of a step multiplies. None: on a CUDA device, for each number of rows and
                each block, what is fastest; elsewhere `DENSE`. Measuring costs a compilation of each kind of
                block for each choice that is tried, six at most, and three more captures of a step.
            memory: bytes of a CPU's machine, beyond which a batch is refused; None: not looked at.
            table: what a tuner found of the products of prompts with 2:4 weights on this device. A product is
                2:4 where the table says that it is faster, and a packed copy of its weight is kept; none is
                if `choice` leaves weights dense. Without a `choice`, whole chunks are timed too.

        Raises:
            Act24Error: a block is not of `act24.llama`.
        """
        self._model = model
        self._config = model.config
        self._device, self._dtype = model.head_weight.device, model.model.embed_tokens.weight.dtype
        self._allowed = None if allowed is None else allowed.to(self._device)
        self._compiled = self._device.type == "cuda" if compiled is None else compiled
        self._captures = self._compiled and self._device.type == "cuda"
        self._memory = memory
        self._choice = choice if choice is not None or self._captures else DENSE
        self._blocks = [*model.model.layers]
        self._weights = [] if self._choice == DENSE else weights_of(self._blocks)
        self._there = can_use(self._weights)
        self._laid_out: Plan | None = None
        self._addresses, self._versions = self._addresses_and_versions()
        self._step_forms: dict[Choice, list[LayerForm]] = {}
        dense_prompts = self._choice is not None and not self._choice.packed
        sparse = frozenset[tuple[int, int]]().union(*(each.sparse for each in self._weights))
        self.prompts = PromptForms(
            self._blocks,
            frozenset() if dense_prompts else sparse,
            table,
            self._dtype,
            self._device,
            measures=self._choice is None,
        )
        self._compiled_forms: dict[tuple[LayerForm, int, int, int], LayerForm] = {}
        self._tables: tuple[Tensor, Tensor] | None = None
        self._batch: Batch | None = None
        self._graph: tuple[Sampling, torch.cuda.CUDAGraph] | None = None
        self.plans: dict[int, Plan] = {}
        self.times: dict[int, dict[Plan, float]] = {}

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
        with self._fits(len(prompts), length):
            return self._begin(prompts, seeds, length, sampling)

    def _begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], length: int, sampling: Sampling
    ) -> Tensor:
        self._look_at_weights()
        longest = max(map(len, prompts))
        batch = self._renewed(len(prompts), length)
        padded = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        batch.first.copy_(torch.tensor([longest - len(p) for p in prompts]))
        batch.seeds.copy_(torch.tensor(seeds, dtype=torch.int64))
        if self._choice is not None:  # as steps will have them: code is compiled for how weights lie
            self._lay_out_((self._choice,) * len(self._blocks))
        unequal = any(len(prompt) < longest for prompt in prompts)
        hidden = self._prefill(batch, padded.to(self._device), unequal)
        batch.slot.fill_(longest)
        batch.tokens.copy_(self._choose(hidden, batch, sampling))
        return batch.tokens

    @torch.inference_mode()
    def step(self, sampling: Sampling) -> Tensor:
        """The next token of every row.

        Returns:
            int64 `[B]`, to be copied before the next step.

        Raises:
            Act24Error: the first step of a batch does not fit the device's memory.
        """
        batch = self._batch
        assert batch is not None
        with self._fits(batch.rows, batch.length):
            return self._step(batch, sampling)

    def _step(self, batch: Batch, sampling: Sampling) -> Tensor:
        if self._graph is not None and self._graph[0] == sampling:
            self._graph[1].replay()
            return batch.tokens
        self._graph = None
        plan = self._plan(batch, sampling)
        if self._captures:
            self._graph = sampling, self._captured(batch, sampling, plan)
            self._graph[1].replay()
        else:
            self._advance(batch, sampling, plan)
        return batch.tokens

    def take(self, rows: int, choice: Choice | None) -> None:
        """Fix the choice for all blocks in steps of so many rows. None: forget it, and measure again at the
        next step."""
        self._graph = None
        self.plans.pop(rows, None)
        if choice is not None:
            self.plans[rows] = (choice,) * len(self._blocks)

    def _plan(self, batch: Batch, sampling: Sampling) -> Plan:
        """For so many rows; measured on the first such batch, as it stands."""
        if batch.rows not in self.plans:
            choice = self._choice
            self.plans[batch.rows] = (
                self._fastest(batch, sampling) if choice is None else (choice,) * len(self._blocks)
            )
        return self.plans[batch.rows]

    def _fastest(self, batch: Batch, sampling: Sampling) -> Plan:
        """The plan of the faster step of two: each block with the choice that is fastest for it alone, or all
        blocks dense."""
        dense = (DENSE,) * len(self._blocks)
        tried = {DENSE: self._block_seconds(batch, DENSE)}
        fused = False
        if self._there.fused:
            # Blocks read the same weights either way, so one answer does for all, and for the other choices.
            tried[Choice(fused=True)] = seconds = self._block_seconds(batch, Choice(fused=True))
            fused = sum(seconds) < sum(tried[DENSE])
        streamed = False
        if not why_not_streamed(batch.rows, self._dtype, self._device):
            own = Choice(fused=fused, streamed=True)
            tried[own] = seconds = self._block_seconds(batch, own)
            streamed = sum(seconds) < sum(tried[Choice(fused=fused)])
        for choice in step_choices(batch.rows, self._there, self._dtype, self._device):
            choice = choice._replace(fused=fused, streamed=streamed)
            if choice not in tried:
                tried[choice] = self._block_seconds(batch, choice)
        mixed = tuple(min(tried, key=lambda c: tried[c][block]) for block in range(len(dense)))
        if mixed == dense:
            return dense
        plain = (Choice(fused=fused, streamed=streamed),) * len(dense)
        self.times[batch.rows] = times = {
            plan: self._seconds(batch, self._captured(batch, sampling, plan))
            for plan in dict.fromkeys((mixed, plain, dense))
        }
        return min(times, key=lambda plan: times[plan])

    def _captured(self, batch: Batch, sampling: Sampling, plan: Plan) -> torch.cuda.CUDAGraph:
        """A graph of a step, good until the weights are laid out for another plan."""
        with kept(batch):
            self._advance(batch, sampling, plan)  # compiles, and loads kernels
        return self._graph_of(lambda: self._advance(batch, sampling, plan))

    def _graph_of(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph):
            run()
        return graph

    def _seconds(self, batch: Batch, graph: torch.cuda.CUDAGraph) -> float:
        turns = []
        for _ in range(2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with kept(batch):
                graph.replay()
                start.record()
                for _ in range(REPLAYS):
                    batch.slot.sub_(1)
                    graph.replay()
                end.record()
            end.synchronize()
            turns.append(start.elapsed_time(end) / REPLAYS / 1e3)
        return min(turns)

    def _block_seconds(self, batch: Batch, choice: Choice) -> list[float]:
        """Seconds of each block with a choice, on the batch as it stands. The blocks take turns, so that none
        finds its weights in the device's cache."""
        calls: list[Callable[[], Tensor]] = []
        for _ in range(2):  # the first compiles, and loads kernels
            calls.clear()
            self._through_blocks(batch, (choice,) * len(self._blocks), calls)
        graphs = [self._graph_of(call) for call in calls]
        turns = [[torch.cuda.Event(enable_timing=True) for _ in (*graphs, None)] for _ in range(TURNS)]
        for marks in turns:
            for graph, mark in zip(graphs, marks, strict=False):
                mark.record()
                graph.replay()
            marks[-1].record()
        torch.cuda.synchronize(self._device)
        return [
            min(marks[block].elapsed_time(marks[block + 1]) for marks in turns) / 1e3
            for block in range(len(graphs))
        ]

    def _look_at_weights(self) -> None:
        """Forget a graph whose weights lie elsewhere now: moved, or laid out by another decoder.

        Raises:
            Act24Error: packed weights are not the model's any more.
        """
        addresses, versions = self._addresses_and_versions()
        if addresses != self._addresses:
            self._graph = self._laid_out = None
            self._addresses = addresses
        packed = self.prompts.packed or any(choice.packed for choice in self._step_forms)
        if versions != self._versions and packed:
            raise Act24Error("weights changed after they were packed: make a new Generator of this model")
        self._versions = versions

    def _addresses_and_versions(self) -> tuple[list[int], list[int]]:
        parameters = [*self._model.parameters()]
        counted = [parameter for parameter in parameters if not parameter.is_inference()]
        return [p.data_ptr() for p in parameters], [p._version for p in counted]

    def _lay_out_(self, plan: Plan) -> None:
        if plan == self._laid_out or not self._weights:
            return
        with torch.inference_mode(False):  # parameters stay ordinary tensors
            for block, weights, choice in zip(self._blocks, self._weights, plan, strict=True):
                lay_out_(block, weights, choice)
        self._laid_out = plan
        self._addresses, self._versions = self._addresses_and_versions()

    def _forms_for(self, plan: Plan, batch: Batch) -> Sequence[LayerForm]:
        for choice in {*plan} - {*self._step_forms}:
            self._lay_out_((choice,) * len(plan))
            with torch.inference_mode(False):  # packed weights are ordinary tensors
                self._step_forms[choice] = cached_layers(self._blocks, choice)
        self._lay_out_(plan)
        forms = [self._step_forms[choice][block] for block, choice in enumerate(plan)]
        return self._compiled_for(forms, batch, 1)

    def _compiled_for(self, forms: Sequence[LayerForm], batch: Batch, tokens: int) -> Sequence[LayerForm]:
        """The functions for so many tokens a row of a batch, where they are compiled."""
        if not self._compiled:
            return forms
        keys = [(form, batch.rows, tokens, batch.length) for form in forms]
        for key in keys:
            if key not in self._compiled_forms:
                self._compiled_forms[key] = _compiled(key[0])
        return [self._compiled_forms[key] for key in keys]

    def _advance(self, batch: Batch, sampling: Sampling, plan: Plan) -> None:
        hidden = self._through_blocks(batch, plan)
        batch.slot.add_(1)
        streamed = any(choice.streamed for choice in plan)
        batch.tokens.copy_(self._choose(hidden, batch, sampling, streamed))

    def _through_blocks(
        self, batch: Batch, plan: Plan, calls: list[Callable[[], Tensor]] | None = None
    ) -> Tensor:
        place = place_of(batch.slot, batch.first, batch.length)
        forms = self._forms_for(plan, batch)
        return self._layers(forms, batch, batch.tokens[:, None], place, calls)

    def _prefill(self, batch: Batch, padded: Tensor, unequal: bool) -> Tensor:
        """Prompts through the model, a chunk at a time. Returns the last hidden states, `[B, 1, D]`.

        Args:
            padded: ids `[B, S]`.
            unequal: some rows begin with padding.
        """
        kernel = self._device.type == "cuda" and self._dtype.itemsize == 2
        for start, size in chunks(padded.shape[1], self._compiled):
            place = chunk_place(start, size, batch.first, unequal, batch.length, kernel)
            run = partial(self._through_chunk, batch, padded[:, start : start + size], place)
            hidden = run(self.prompts.of(batch.rows, size, run))
        return hidden[:, -1:]

    def _through_chunk(
        self, batch: Batch, ids: Tensor, place: ChunkPlace, forms: Sequence[LayerForm]
    ) -> Tensor:
        if compiles_for(ids.shape[1]):
            forms = self._compiled_for(forms, batch, ids.shape[1])
        return self._layers(forms, batch, ids, place)

    def _layers(
        self,
        forms: Sequence[LayerForm],
        batch: Batch,
        ids: Tensor,
        place: Place | ChunkPlace,
        calls: list[Callable[[], Tensor]] | None = None,
    ) -> Tensor:
        """Hidden states behind the blocks. `calls` gets each block's, with its arguments."""
        position = (place.slots - batch.first[:, None]).clamp(min=0)
        cos, sin = (table[position] for table in self._rotary(batch.length))
        model = self._model.model
        hidden = model.embed_tokens(ids)
        for layer, form, key, value in zip(model.layers, forms, batch.keys, batch.values, strict=True):
            call = partial(form, layer, hidden, cos, sin, key, value, place)
            if calls is not None:
                calls.append(call)
            hidden = call()
        return hidden

    def _choose(self, hidden: Tensor, batch: Batch, sampling: Sampling, streamed: bool = False) -> Tensor:
        """The token that goes into the slot of the batch."""
        hidden, weight = self._model.model.norm(hidden[:, -1]), self._model.head_weight
        logits = streamed_linear(hidden, weight, None) if streamed else F.linear(hidden, weight)
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
            slots = -(-length // SLOTS) * SLOTS
            self._batch = batch = new_batch(
                self._config, rows, slots, self._dtype, self._device, self._memory
            )
        for cache in (*batch.keys, *batch.values):
            cache.zero_()
        return batch

    @contextmanager
    def _fits(self, rows: int, length: int) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._batch = self._graph = None
            told = too_large(self._config, rows, length, self._dtype, self._device, self._memory)
            raise Act24Error(told) from error


def _compiled(form: LayerForm) -> LayerForm:
    """Compile a function for one shape. It gets a code object of its own, because torch counts how often each
    code object is compiled and gives up at the ninth shape."""
    return torch.compile(
        types.FunctionType(form.__code__.replace(), form.__globals__, form.__name__),
        fullgraph=True,
        dynamic=False,
    )
