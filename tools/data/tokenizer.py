"""One kind of tokenizer, from three places: a `tokenizer.json`, the Hub, or trained here on the source's own
text."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from threading import Thread

import numpy as np
import tokenizers

from act24.errors import Act24Error, reading, reason
from act24.recipes import schema
from act24.tools.data.documents import open_documents
from act24.tools.data.shards import read_index, verified
from act24.tools.files import whole_file

TRAINED = "bpe"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # the first that is in the vocabulary
PADDING = ("<pad>", "[PAD]", "<|padding|>")
SAMPLE_CHARACTERS = 16_000_000  # of text for training one; more hardly changes the merges
LARGEST = 2**20  # of trained vocabularies; four times the largest in use
CACHE_VERSION = 1  # of the way `_train` trains


class Tokenizer:
    """Text to token ids and back.

    Only `eos_id` marks a document's end: special tokens are never added by `encode`, and never found in text
    either, so that a document that quotes "<|endoftext|>" does not end there.

    Attributes:
        name: as the recipe gave it.
        eos_id: the end-of-text token.
        pad_id: fills the inputs of short rows; `eos_id` where the vocabulary has no padding token. It is
            never predicted, and causal attention keeps it from everything that is.
        vocab_size: highest id + 1, special tokens included.
        fingerprint: sha256 of the tokenizer's JSON.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str, end_of_text: str | None = None) -> None:
        """
        Args:
            end_of_text: the token; None for the first of `END_OF_TEXT` that there is.

        Raises:
            Act24Error: the vocabulary has no end-of-text token.
        """
        backend.no_truncation()
        backend.no_padding()
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()
        backend.encode_special_tokens = True  # as plain text, that is; the property is named for the text
        self._backend = backend
        self._vocabulary = backend.get_vocab(with_added_tokens=True)
        self.name = name
        self.vocab_size = max(self._vocabulary.values()) + 1
        looked_for = END_OF_TEXT if end_of_text is None else (end_of_text,)
        eos_id = self._first_of(looked_for)
        if eos_id is None:
            special = sorted(self._special_ids)
            names = ", ".join(str(backend.id_to_token(id)) for id in special[:6])
            some = f", among the special ones of its vocabulary: {names}" if special else ""
            raise Act24Error(
                f"tokenizer {name!r} has no end-of-text token (looked for {', '.join(looked_for)}); "
                f"tokenizer.end_of_text names it{some}{', …' if len(special) > 6 else ''}"
            )
        pad_id = self._first_of(PADDING)
        self.eos_id, self.pad_id = eos_id, eos_id if pad_id is None else pad_id

    def encode(self, text: str) -> np.ndarray:
        """int32 `[n]`, no special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that `ids` stand for; special tokens stand for none."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def token(self, id: int) -> str:
        """The piece that an id stands for, as the vocabulary has it."""
        token = self._backend.id_to_token(id)
        if token is None:
            raise Act24Error(f"tokenizer {self.name!r} has no id {id}")
        return token

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._backend.to_str()

    @cached_property
    def highest_text_id(self) -> int:
        """The highest id that rows can hold: of ordinary tokens, `eos_id` and `pad_id`."""
        special = self._special_ids - {self.eos_id, self.pad_id}
        return max(id for id in self._vocabulary.values() if id not in special)

    def known_ids(self, size: int) -> np.ndarray:
        """Boolean `[size]`: which of the first `size` ids have a token."""
        known = np.zeros(size, dtype=bool)
        known[[id for id in self._vocabulary.values() if id < size]] = True
        return known

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 `[vocab_size]`: how many bytes of UTF-8 text each token stands for; special tokens none.

        Bits per byte are the nats of all predicted tokens / ln 2 / the sum of this over them. It is exact for
        byte-level vocabularies without a normaliser, whose pieces spell one byte a character. For others
        ("▁" is a space, "<0x0A>" a byte) it counts the normalised text, with the spaces the tokenizer adds.
        """
        byte_level = "ByteLevel" in json.dumps(json.loads(self._backend.to_str())["decoder"])
        added = self._backend.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for piece, id in self._vocabulary.items():
            if id in self._special_ids:
                continue
            if id in added:  # kept apart from the model's pieces, spelled as in the text
                sizes[id] = len(piece.encode())
            elif byte_level:
                sizes[id] = len(piece)
            elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
                sizes[id] = 1
            else:
                sizes[id] = len(piece.replace("▁", " ").encode())
        return sizes

    @cached_property
    def _special_ids(self) -> set[int]:
        return {id for id, token in self._backend.get_added_tokens_decoder().items() if token.special}

    def _first_of(self, names: Sequence[str]) -> int | None:
        return next((self._vocabulary[name] for name in names if name in self._vocabulary), None)


def open_tokenizer(
    data: schema.Data, section: schema.Tokenizer, cache: Path | None = None, saved: str | None = None
) -> Tokenizer:
    """The tokenizer of a recipe.

    `section.name` is a path (a `tokenizer.json` or a folder with one), "bpe" (byte-level BPE of
    `section.vocab_size` tokens, trained on a sample of the source's training text and kept in `cache`), or
    else a name on the Hub. Token shards bring the tokenizer they were written with, and any other is refused.

    Args:
        cache: default `$XDG_CACHE_HOME/act24/tokenizers`, or `~/.cache/act24/tokenizers`.
        saved: the `tokenizer.json` that a checkpoint holds. It is taken, and `section.name` only names it.

    Raises:
        Act24Error: no such file, the Hub is out of reach, no end-of-text token, one that has no say, not the
            shards' tokenizer, or (training) whatever is wrong with the source.
    """
    if data.source == "shards":
        folder = Path(str(data.shards))
        tokenizer = (
            _of_shards(folder, section.name) if saved is None else _saved_of_shards(folder, section, saved)
        )
        _check_end_of_text(section, tokenizer.token(tokenizer.eos_id), f"{folder} was written with")
        return tokenizer
    if saved is not None:
        return _from_json(saved, section.name, section.end_of_text)
    if section.name == TRAINED:
        _check_end_of_text(section, END_OF_TEXT[0], "the BPE that is trained here has")
        return _trained(data, section.vocab_size, cache or _default_cache())
    return _named(section.name, section.end_of_text)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """That a model with `vocab_size` embeddings can take every id that text gives.

    Special tokens other than end-of-text and padding do not count: T5's vocabulary of 32,100 fits the 32,000
    of the GaLore models, as its 100 sentinels are no text. (Should one occur after all, `check_ids` catches
    it.)

    Raises:
        Act24Error: it cannot.
    """
    highest = tokenizer.highest_text_id
    if highest >= vocab_size:
        raise Act24Error(
            f"tokenizer {tokenizer.name!r} gives ids up to {highest}, but the model's vocabulary has "
            f"{vocab_size} entries; set model.vocab_size to {highest + 1} or more"
        )


def unused_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Iterator[str]:
    """A warning where a model has more than a tenth of its embeddings for ids that the tokenizer never gives.
    Vocabularies are rounded up by less."""
    if vocab_size > 1.1 * tokenizer.vocab_size:
        yield (
            f"the model's vocabulary has {vocab_size:,} entries and tokenizer {tokenizer.name!r} gives "
            f"{tokenizer.vocab_size:,} ids: the other rows are never trained (model.vocab_size)"
        )


def check_ids(rows: Sequence[np.ndarray], tokenizer: Tokenizer, vocab_size: int) -> None:
    """That a model with `vocab_size` embeddings can take these rows.

    Raises:
        Act24Error: it cannot. On a GPU the lookup would end in a device-side assertion, without a name.
    """
    highest = max(int(row.max()) for row in rows)
    if highest >= vocab_size:
        raise Act24Error(
            f"the text holds id {highest} of tokenizer {tokenizer.name!r}, but the model's vocabulary has "
            f"{vocab_size} entries (model.vocab_size)"
        )


def _of_shards(folder: Path, name: str) -> Tokenizer:
    index = read_index(folder)
    path = verified(folder, "tokenizer.json", index.tokenizer.file)
    tokenizer = _from_file(path, index.tokenizer.name, index.tokenizer.end_of_text)
    if (tokenizer.vocab_size, tokenizer.eos_id) != (index.tokenizer.vocab_size, index.tokenizer.eos_id):
        raise Act24Error(f"{folder / 'index.json'} was altered: its tokenizer is not the one beside it")
    if name not in (TRAINED, tokenizer.name) and _named(name).fingerprint != tokenizer.fingerprint:
        raise Act24Error(
            f"{folder} was written with tokenizer {tokenizer.name!r}, the recipe asks for {name!r}; "
            f"leave tokenizer.name at {TRAINED!r} to use the one of the shards"
        )
    return tokenizer


def _saved_of_shards(folder: Path, section: schema.Tokenizer, saved: str) -> Tokenizer:
    wrote = read_index(folder).tokenizer
    tokenizer = _from_json(saved, section.name, wrote.end_of_text or section.end_of_text)
    if wrote.fingerprint != tokenizer.fingerprint:
        raise Act24Error(
            f"{folder} was written with tokenizer {wrote.name!r}, which is not the one of the checkpoint "
            f"({tokenizer.name})"
        )
    return tokenizer


def _check_end_of_text(section: schema.Tokenizer, token: str, whose: str) -> None:
    """Raises Act24Error where a recipe names another one than there is: it would be ignored."""
    if section.end_of_text not in (None, token):
        raise Act24Error(
            f"tokenizer.end_of_text (--end-of-text) is {section.end_of_text!r}, and {whose} {token!r}: leave "
            "it out, or name a tokenizer that has it (tokenizer.name, --tokenizer) for text"
        )


def _named(name: str, end_of_text: str | None = None) -> Tokenizer:
    with reading(f"cannot look for tokenizer {name!r}", RuntimeError):  # "~" and no such user
        path = Path(name).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
        if path.is_file():
            return _from_file(path, name, end_of_text)
    if path.suffix == ".json" or path.is_absolute() or name.startswith((".", "~")):
        raise Act24Error(f"no tokenizer file {path}")
    try:
        backend = tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # `tokenizers` raises nothing narrower
        said = reason(error).rstrip(".")
        raise Act24Error(
            f"cannot load tokenizer {name!r} from the Hub, and there is no such file: {said}. "
            "HF_ENDPOINT names a mirror of the Hub; "
            f"without a network give the path of a tokenizer.json, or tokenizer.name = {TRAINED!r}"
        ) from error
    return Tokenizer(backend, name, end_of_text)


def _from_file(path: Path, name: str, end_of_text: str | None = None) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # `tokenizers` raises nothing narrower, and Rust's panic is no Exception
        raise Act24Error(f"{path} is not a tokenizer.json: {error}") from error
    return Tokenizer(backend, name, end_of_text)


def _from_json(text: str, name: str, end_of_text: str | None = None) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as in `_from_file`
        raise Act24Error(f"{name} is not a tokenizer.json: {error}") from error
    return Tokenizer(backend, name, end_of_text)


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "act24" / "tokenizers"


def _trained(data: schema.Data, vocab_size: int, cache: Path) -> Tokenizer:
    smallest = len(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < smallest:
        raise Act24Error(
            f"tokenizer.vocab_size = {vocab_size}: a byte-level BPE has at least {smallest} tokens"
        )
    if vocab_size > LARGEST:
        raise Act24Error(f"tokenizer.vocab_size = {vocab_size}: at most {LARGEST} can be trained here")
    sample = _sample(data)
    key = hashlib.sha256(f"{CACHE_VERSION} {tokenizers.__version__} {vocab_size}".encode())
    for text in sample:
        key.update(hashlib.sha256(text.encode()).digest())
    path = cache / f"bpe-{vocab_size}-{key.hexdigest()[:24]}.json"
    if not path.exists():
        _write_atomically(path, _train(sample, vocab_size).to_str())
    return _from_file(path, TRAINED)


def _sample(data: schema.Data) -> list[str]:
    """Training text, the same whatever the run's seed and rank: shards in the order of seed 0, until
    enough."""
    sample, characters = [], 0
    for text in open_documents(data, "train", shuffle_seed=0):
        sample.append(text[: SAMPLE_CHARACTERS - characters])
        characters += len(sample[-1])
        if characters == SAMPLE_CHARACTERS:
            break
    return sample


def _train(sample: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """GPT-2's scheme: bytes, its regular expression for words, merges by count; ties by id, so
    deterministic."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = byte_level(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    _aside(lambda: backend.train_from_iterator(sample, trainer))
    return backend


def _aside(work: Callable[[], None]) -> None:
    """Do `work` in a thread: Python heeds signals between instructions of the main one, and a vocabulary
    is one instruction of up to minutes. After a signal the thread ends with the process."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # a panic of Rust's is no Exception
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    done.result()


def _write_atomically(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Act24Error(f"cannot keep the trained tokenizer: {error} (XDG_CACHE_HOME says where)") from error
