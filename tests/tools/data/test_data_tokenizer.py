"""The tokenizer object, the trained one and its cache, and the vocabulary check."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from act24.errors import Act24Error
from act24.recipes import schema
from act24.tools.data import Tokenizer, check_vocabulary, open_rows, open_tokenizer, prepare_shards
from act24.tools.data import tokenizer as module
from act24.tools.data.tokenizer import check_ids

text = st.text(st.characters(exclude_categories=["Cs"]))  # no halves of surrogate pairs


@given(text)
def test_bytes_per_token_add_up_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_of_a_sentencepiece_vocabulary():
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram(
            [("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("<0x0A>", -3.0), ("ü", -3.0)], 0
        )
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.add_tokens([" ▁added"])
    assert Tokenizer(backend, "t").token_bytes.tolist() == [0, 4, 1, 1, 2, 0, len(" ▁added".encode())]


def test_special_tokens_in_text_are_text(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a<|endoftext|>b"
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0


def test_nothing_is_added_truncated_or_padded(t5_backend):
    backend = tokenizers.Tokenizer.from_str(t5_backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    wrapped = Tokenizer(backend, "t5")
    assert wrapped.encode("the rank of two the").tolist() == [
        t5_backend.token_to_id(word) for word in ("the", "rank", "of", "two", "the")
    ]
    assert (wrapped.pad_id, wrapped.eos_id) == (0, 1)


def test_the_vocabulary_check_names_both_numbers(tokenizer, t5_backend):
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    with pytest.raises(
        Act24Error, match=r"ids up to 299, but the model's vocabulary has 299 entries.* 300 or"
    ):
        check_vocabulary(tokenizer, 299)
    t5 = Tokenizer(t5_backend, "t5")
    words = t5.vocab_size - 10  # the sentinels are past the end, as T5's 32,000 to 32,099 are
    check_vocabulary(t5, words)
    with pytest.raises(Act24Error, match=f"ids up to {words - 1}"):
        check_vocabulary(t5, words - 1)
    check_ids([np.array([words - 1])], t5, words)
    with pytest.raises(Act24Error, match=f"the text holds id {words} of tokenizer 't5'.* {words} entries"):
        check_ids([np.array([0, 1]), np.array([words])], t5, words)


def test_a_vocabulary_without_end_of_text_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(
        Act24Error, match=r"has no end-of-text token \(looked for <\|endoftext\|>.* names it$"
    ):
        Tokenizer(backend, "words")
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    with pytest.raises(Act24Error, match=r"names it, among the special ones .*: \[CLS\], \[SEP\]$"):
        Tokenizer(backend, "words")
    with pytest.raises(Act24Error, match=r"looked for \[EOS\]\)"):
        Tokenizer(backend, "words", "[EOS]")
    assert Tokenizer(backend, "words", "[SEP]").eos_id == 2


def test_from_a_file_or_its_folder(corpora, tokenizer, tokenizer_file):
    data = corpora["text"].data()
    for name in (str(tokenizer_file), str(tokenizer_file.parent)):
        opened = open_tokenizer(data, schema.Tokenizer(name=name))
        assert opened.fingerprint == tokenizer.fingerprint
        assert opened.encode("two of four").tolist() == tokenizer.encode("two of four").tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing/tokenizer.json", "no tokenizer file missing/tokenizer.json"), ("./x", "no tokenizer file x")],
)
def test_a_missing_file_is_named(corpora, name, message):
    with pytest.raises(Act24Error, match=message):
        open_tokenizer(corpora["text"].data(), schema.Tokenizer(name=name))


def test_a_file_that_is_no_tokenizer_is_named(corpora, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(Act24Error, match=r"tokenizer\.json is not a tokenizer\.json: "):
        open_tokenizer(corpora["text"].data(), schema.Tokenizer(name=str(path)))


def test_training_is_cached_by_text_and_size(corpora, tmp_path, monkeypatch):
    data, section = corpora["text"].data(), schema.Tokenizer(vocab_size=280)
    trained = open_tokenizer(data, section, cache=tmp_path)
    assert trained.vocab_size == 280
    assert trained.name == "bpe"
    (path,) = tmp_path.iterdir()

    other_size = open_tokenizer(data, schema.Tokenizer(vocab_size=270), cache=tmp_path)
    other_text = open_tokenizer(corpora["json"].data(), section, cache=tmp_path)
    assert len({trained.fingerprint, other_size.fingerprint, other_text.fingerprint}) == 3
    assert len(list(tmp_path.iterdir())) == 3

    def fail(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "_train", fail)
    reseeded = data.model_copy(update={"shuffle_seed": 5, "rows": "padded"})
    assert open_tokenizer(reseeded, section, cache=tmp_path).fingerprint == trained.fingerprint
    path.write_text("cut sho")
    with pytest.raises(Act24Error, match=path.name):
        open_tokenizer(data, section, cache=tmp_path)


def test_the_cache_has_its_place_in_xdg(corpora, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    open_tokenizer(corpora["text"].data(), schema.Tokenizer(vocab_size=260))
    assert len(list((tmp_path / "act24/tokenizers").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(next((tmp_path / "act24/tokenizers").iterdir())))
    with pytest.raises(Act24Error, match="cannot keep the trained tokenizer"):
        open_tokenizer(corpora["text"].data(), schema.Tokenizer(vocab_size=261))


def test_a_trained_vocabulary_needs_all_bytes(corpora):
    with pytest.raises(Act24Error, match="vocab_size = 256: a byte-level BPE has at least 257 tokens"):
        open_tokenizer(corpora["text"].data(), schema.Tokenizer(vocab_size=256))


def test_training_is_the_same_in_every_process(corpora, tokenizer, tmp_path):
    """Other hash seeds, other numbers of threads: hash tables must not decide between equal counts."""
    program = (
        "import sys, json; from act24.recipes import schema; from act24.tools.data import open_tokenizer; "
        "from pathlib import Path; data = schema.Data.model_validate_json(sys.argv[1]); "
        "print(open_tokenizer(data, schema.Tokenizer(vocab_size=400), cache=Path(sys.argv[2])).fingerprint)"
    )
    data = corpora["json"].data()
    prints = {open_tokenizer(data, schema.Tokenizer(vocab_size=400), cache=tmp_path / "here").fingerprint}
    for seed in ("2",):  # here it is another one in every session
        run = subprocess.run(
            [sys.executable, "-c", program, data.model_dump_json(), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        prints.add(run.stdout.strip())
    assert len(prints) == 1


def test_the_json_round_trips(tokenizer):
    again = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.to_json()), "again")
    assert again.fingerprint == tokenizer.fingerprint
    assert json.loads(tokenizer.to_json())["truncation"] is None


def test_a_tokenizer_file_at_which_rust_panics_is_one_line(tmp_path, monkeypatch):
    class PanicException(BaseException):
        """As pyo3's is: no Exception."""

    def panic(path):
        raise PanicException("range end index 300 out of range for slice of length 256")

    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    monkeypatch.setattr(tokenizers.Tokenizer, "from_file", panic)
    with pytest.raises(Act24Error, match=r"tokenizer\.json is not a tokenizer\.json: range end index 300"):
        open_tokenizer(schema.Data(source="builtin"), schema.Tokenizer(name=str(path)))


def test_an_end_of_text_of_another_name(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"low": 0, "rank": 1, "[UNK]": 2}, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<fin>"])
    path = tmp_path / "tokenizer.json"
    path.write_text(backend.to_str())
    data = schema.Data(source="builtin")
    with pytest.raises(Act24Error, match=r"no end-of-text .*; tokenizer\.end_of_text names it"):
        open_tokenizer(data, schema.Tokenizer(name=str(path)))
    with pytest.raises(Act24Error, match=r"\(looked for <end>\)"):
        open_tokenizer(data, schema.Tokenizer(name=str(path), end_of_text="<end>"))
    assert open_tokenizer(data, schema.Tokenizer(name=str(path), end_of_text="<fin>")).eos_id == 3
    (tmp_path / "a.txt").write_text("low rank " * 50)
    files = schema.Data(source="files", train_files=(str(tmp_path / "a.txt"),))
    written = open_tokenizer(files, schema.Tokenizer(name=str(path), end_of_text="<fin>"))
    prepare_shards(files, written, tmp_path / "out")
    shards = schema.Data(source="shards", shards=str(tmp_path / "out"))
    assert open_tokenizer(shards, schema.Tokenizer()).eos_id == 3
    assert open_tokenizer(shards, schema.Tokenizer(end_of_text="<fin>")).eos_id == 3
    # A run goes on with it, though its recipe does not name it.
    assert open_tokenizer(shards, schema.Tokenizer(), saved=written.to_json()).eos_id == 3
    for saved in (None, written.to_json()):
        with pytest.raises(Act24Error, match=r"is '\[UNK\]', and .*out was written with '<fin>': leave"):
            open_tokenizer(shards, schema.Tokenizer(end_of_text="[UNK]"), saved=saved)


def test_an_end_of_text_that_has_no_say_is_refused(tmp_path, act24):
    """The trained BPE has its own, and this one was ignored without a word."""
    (tmp_path / "a.txt").write_text("low rank " * 50)
    out = tmp_path / "out"
    prepare = ("data", "prepare", tmp_path / "a.txt", out, "--vocab-size", "300", "--end-of-text")
    status, _, (line,) = act24(*prepare, "XYZ")
    assert status == 2
    assert "is 'XYZ', and the BPE that is trained here has '<|endoftext|>': leave it out, or name" in line
    assert not out.exists()
    assert act24(*prepare, "<|endoftext|>")[0] == 0


@pytest.mark.parametrize(("size", "said"), [(300, False), (330, False), (331, True), (32_000, True)])
def test_a_vocabulary_that_the_tokenizer_does_not_use_is_said(corpora, tokenizer, size, said):
    assert tokenizer.vocab_size == 300
    with open_rows(corpora["text"].data(), tokenizer, batch_size=1, vocab_size=size) as rows:
        lines = [line for line in rows.remarks() if "are never trained" in line]
    assert bool(lines) == said


def test_a_signal_is_heeded_while_a_tokenizer_is_trained(monkeypatch):
    """Rust's merges take minutes for a large vocabulary, and Python hears of no signal in the meantime."""
    finished = []

    class Slow:
        def __init__(self, model):
            pass

        def train_from_iterator(self, sample, trainer):
            hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # seconds, of which none can be interrupted
            finished.append(True)

    class Heeded(Exception):
        pass

    def heed(*_):
        raise Heeded

    monkeypatch.setattr(module.tokenizers, "Tokenizer", Slow)
    before = signal.signal(signal.SIGALRM, heed)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Heeded):
            module._train(["text"], 300)
        assert not finished
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_goes_wrong_while_a_tokenizer_is_trained_is_raised(monkeypatch):
    class Failing:
        def __init__(self, model):
            pass

        def train_from_iterator(self, sample, trainer):
            raise MemoryError("no memory for merges")

    monkeypatch.setattr(module.tokenizers, "Tokenizer", Failing)
    with pytest.raises(MemoryError, match="no memory for merges"):
        module._train(["text"], 300)
