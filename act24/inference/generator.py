"""Text from a language model: prompts in, continuations out, as they come or at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.inference.decoder import Decoder
from act24.inference.layer import Choice
from act24.inference.sampling import Sampling
from act24.inference.text import RowText
from act24.llama import LlamaForCausalLM
from act24.options import Range, in_range
from act24.sparse24.format.products import Table
from act24.words import counted

#: Steps that a GPU may be ahead of the host. So many tokens are thrown away when the last row ends.
AHEAD = 8

#: The seeds that there are; rows count on from theirs.
SEEDS = Range(ge=0, lt=2**62)

Reason = Literal["end", "stop", "length"]


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; `act24.tools.data.tokenizer.Tokenizer` is one."""

    @property
    def eos_id(self) -> int: ...
    def encode(self, text: str) -> Any: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def known_ids(self, size: int) -> Any: ...


@dataclass(frozen=True)
class Piece:
    """Something new of one row.

    Attributes:
        row: of the prompts.
        text: may be empty.
        reason: why the row ends with this piece: its end-of-text token came, a stop string, or the last token
            that was asked for. None: it goes on.
    """

    row: int
    text: str
    reason: Reason | None = None


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
        text: without the prompt, an end-of-text token and the stop string.
        tokens: the ids that were generated, an end-of-text token included.
        reason: as for `Piece`.
    """

    text: str
    tokens: tuple[int, ...]
    reason: Reason


class Generator:
    """Generates with a model, on the model's device and in its dtype.

    generator = act24.Generator(model, tokenizer)
    print(generator(["def main("], tokens=64, sampling=Sampling(temperature=0))[0].text)

    Attributes:
        decoder: the model over its cache; its `plans` and `times` say how its blocks multiply.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: Tokenizer | None = None,
        *,
        compiled: bool | None = None,
        choice: Choice | None = None,
        memory: int | None = None,
        table: Table = (),
    ) -> None:
        """
        Args:
            model: act24's LLaMA, rewritten by passes or not; put into evaluation. One that is being trained
                generates as its pipeline evaluates it.
            tokenizer: None where prompts and continuations are ids (`generate_ids`).
            compiled, choice, memory, table: as for `act24.inference.decoder.Decoder`.

        Raises:
            Act24Error: another model.
        """
        if not isinstance(model, LlamaForCausalLM):
            raise Act24Error(
                f"Generator takes act24's LlamaForCausalLM, not {type(model).__name__}: "
                "act24.tools.huggingface.folder.load_pretrained opens LLaMA and Arcee folders as one"
            )
        self._config = model.eval().config
        self._tokenizer = tokenizer
        allowed = None
        if tokenizer is not None:
            allowed = torch.as_tensor(tokenizer.known_ids(self._config.vocab_size))
            if not allowed.any():
                raise Act24Error("the tokenizer has no token that the model knows")
        self._model = model
        with _as_served(model):
            self.decoder = Decoder(model, allowed, compiled, choice, memory, table)

    def __call__(
        self,
        prompts: Sequence[str],
        tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Completion]:
        """All continuations, when they are done. Arguments and errors as for `stream`."""
        done: dict[int, Completion] = {}
        for _ in self.stream(prompts, tokens, sampling, stop, seed, done):
            pass
        return [done[row] for row in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[str],
        tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        done: dict[int, Completion] | None = None,
    ) -> Iterator[Piece]:
        """Continue prompts, all in one batch; the pieces come as they are generated.

        Args:
            prompts: each of at least one token.
            tokens: to add at most.
            sampling: None for `Sampling()`.
            stop: strings that end a row where they begin.
            seed: of the draws, 0 or more, below 2^62. Row i draws from seed + i, whatever else is in the
                batch.
            done: gets the whole of each row that ends.

        Raises:
            Act24Error: names the prompt that is empty or too long for the model's positions, an empty stop
                string, or what does not fit memory.
        """
        assert self._tokenizer is not None, "text needs a tokenizer; generate_ids does not"
        done = {} if done is None else done
        ids = [self._encoded(prompt, row) for row, prompt in enumerate(prompts)]
        if "" in stop:
            raise Act24Error("a stop string is empty, which every text meets at once")
        texts = [RowText(self._tokenizer.decode, stop) for _ in prompts]
        kept: list[list[int]] = [[] for _ in prompts]
        ends = self._ends()
        for row, token in (steps := self._tokens(ids, tokens, sampling or Sampling(), seed)):
            kept[row].append(token)
            text = "" if token in ends else texts[row].add(token)
            reason: Reason | None = None
            if token in ends:
                reason = "end"
            elif texts[row].stopped:
                reason = "stop"
            elif len(kept[row]) == tokens:
                reason = "length"
            if reason is not None:
                text += texts[row].finish()
                done[row] = Completion(texts[row].text, tuple(kept[row]), reason)
                steps.send(row)
            if text or reason:
                yield Piece(row, text, reason)

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int = 128,
        sampling: Sampling | None = None,
        seed: int = 0,
        until_end: bool = True,
    ) -> list[list[int]]:
        """Continuations as ids, without the prompts. Arguments and errors as for `stream`.

        Args:
            until_end: a row ends with an end-of-text token; else all have `tokens` tokens.
        """
        kept: list[list[int]] = [[] for _ in prompts]
        ends = self._ends() if until_end else set()
        for row, token in (steps := self._tokens(prompts, tokens, sampling or Sampling(), seed)):
            kept[row].append(token)
            if token in ends or len(kept[row]) == tokens:
                steps.send(row)
        return kept

    def _encoded(self, prompt: str, row: int) -> list[int]:
        assert self._tokenizer is not None
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # a byte that is none comes as half a surrogate pair
            raise Act24Error(f"prompt {row} is no UTF-8: {error}") from error
        return [int(token) for token in self._tokenizer.encode(prompt)]

    def _ends(self) -> set[int]:
        """The ids that end a row."""
        named = self._config.eos_token_id
        ends = {named} if isinstance(named, int) else set(named or ())
        return ends if self._tokenizer is None else ends | {self._tokenizer.eos_id}

    def check(self, prompts: Sequence[str], tokens: int) -> None:
        """Refuse prompts that `stream` would refuse, before the first of several batches.

        Raises:
            Act24Error: as `stream`, but for what does not fit memory; prompts are numbered from 0.
        """
        self._check([self._encoded(prompt, row) for row, prompt in enumerate(prompts)], tokens)

    def _check(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        in_range("generation", "tokens", tokens, Range(ge=1))
        positions = self._config.max_position_embeddings
        for row, prompt in enumerate(prompts):
            told = f"prompt {row}" if len(prompts) > 1 else "the prompt"
            if not len(prompt):
                raise Act24Error(f"{told} is empty; give it at least one token")
            if len(prompt) >= positions:
                raise Act24Error(
                    f"{told} has {counted(len(prompt), 'token')}, and the model {positions} positions, with "
                    "none left for a new one; shorten the prompt"
                )
            if len(prompt) + tokens > positions:
                raise Act24Error(
                    f"{told} has {counted(len(prompt), 'token')}, and the model {positions} positions: "
                    f"{counted(positions - len(prompt), 'token')} can be added, not {tokens}"
                )
            if not 0 <= min(prompt) <= max(prompt) < self._config.vocab_size:
                raise Act24Error(
                    f"{told} holds id {max(prompt)}; the model's vocabulary has "
                    f"{self._config.vocab_size} entries"
                )

    def _tokens(self, prompts: Sequence[Sequence[int]], tokens: int, sampling: Sampling, seed: int) -> _Steps:
        self._check(prompts, tokens)
        in_range("generation", "seed", seed, SEEDS)
        seeds = [seed + row for row in range(len(prompts))]
        return _Steps(self._model, self.decoder, prompts, tokens, sampling, seeds)


def _as_served(model: LlamaForCausalLM) -> AbstractContextManager[None]:
    """A context in which the model's blocks are those that are served. The pipeline that rewrote the model
    provides it: its hook on the module that calls the blocks has a method `as_served`."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            context = hook.as_served() if hasattr(hook, "as_served") else None  # type: ignore[attr-defined]
            if context is not None:
                return context
    return nullcontext()


class _Steps:
    """Iterates over (row, token) of all rows that go on; `send` ends a row."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> None:
        self._going = set(range(len(prompts)))
        self._model, self._decoder, self._sampling = model, decoder, sampling
        self._prompts, self._tokens, self._seeds = prompts, tokens, seeds

    def send(self, row: int) -> None:
        """No more tokens of this row."""
        self._going.discard(row)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        with _as_served(self._model):
            yield from self._generated()

    def _generated(self) -> Iterator[tuple[int, int]]:
        if not self._going:
            return
        length = max(map(len, self._prompts)) + self._tokens
        ahead = AHEAD if self._decoder.device.type == "cuda" else 0
        waiting: deque[_Copied] = deque()
        first = self._decoder.begin(self._prompts, self._seeds, length, self._sampling)
        waiting.append(_Copied(first))
        launched = 1
        while self._going:
            while launched < self._tokens and len(waiting) <= ahead:
                waiting.append(_Copied(self._decoder.step(self._sampling)))
                launched += 1
            for row, token in enumerate(waiting.popleft().tolist()):
                if row in self._going:
                    yield row, token


class _Copied:
    """The tokens of a step on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self._event: Any = None
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tokens.device))
        else:
            self._tokens = tokens.clone()

    def tolist(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()
