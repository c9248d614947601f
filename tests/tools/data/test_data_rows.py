"""Both row protocols against brute force: concatenation, and the `tokenizers` library's own padding."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from act24.errors import Act24Error
from act24.tools.data import HeldoutRows, Tokenizer, heldout_rows, open_documents
from act24.tools.data.batches import IGNORED, collate
from act24.tools.data.documents import Documents
from act24.tools.data.rows import PackedRows, PaddedRows


def documents_of(texts, **options):
    return Documents([lambda wanted: (t if wanted(i) else None for i, t in enumerate(texts))], {}, **options)


texts = st.lists(st.text("ab ü", min_size=1, max_size=40), min_size=1, max_size=8)


@settings(deadline=None)
@given(texts, st.integers(1, 20))
def test_packing_predicts_every_token_once_from_the_one_before(tokenizer, texts, max_length):
    stream = [tokenizer.eos_id]
    for text in texts:
        stream += [*tokenizer.encode(text), tokenizer.eos_id]
    rows = list(PackedRows(documents_of(texts), tokenizer, max_length))
    batch = collate(rows, max_length, tokenizer.pad_id)
    predicted = batch.labels.flatten() != IGNORED
    assert batch.labels.flatten()[predicted].tolist() == stream[1:]
    assert batch.input_ids.flatten()[predicted].tolist() == stream[:-1]
    assert predicted[: len(stream) - 1].all()  # only the very end is filled up
    assert batch.input_ids.shape == (-(-(len(stream) - 1) // max_length), max_length)


@settings(deadline=None)
@given(st.data())
def test_padding_is_what_the_tokenizers_library_does(t5_backend, data):
    """GaLore's protocol: T5's tokenizer truncates to max_length with "</s>" at the end and pads; labels are
    the ids with pads ignored, shifted inside the model."""
    words = st.sampled_from(["low", "rank", "of", "two", "unknown"])
    sentences = data.draw(st.lists(st.lists(words, min_size=1, max_size=12), min_size=1, max_size=6))
    texts = [" ".join(sentence) for sentence in sentences]
    max_length = data.draw(st.integers(2, 10))
    rows = list(PaddedRows(documents_of(texts), Tokenizer(t5_backend, "t5"), max_length))
    batch = collate(rows, max_length, pad_id=0)

    reference = type(t5_backend).from_str(t5_backend.to_str())
    reference.enable_truncation(max_length)
    reference.enable_padding(length=max_length, pad_id=0, pad_token="<pad>")
    ids = np.array([encoding.ids for encoding in reference.encode_batch(texts)])
    unshifted = np.where(ids == 0, IGNORED, ids)
    assert batch.input_ids.tolist() == ids.tolist()
    assert batch.labels[:, :-1].tolist() == unshifted[:, 1:].tolist()
    assert (batch.labels[:, -1] == IGNORED).all()


@pytest.mark.parametrize("kind", [PackedRows, PaddedRows])
def test_documents_longer_and_more_than_one_group(tokenizer, kind, monkeypatch):
    texts = [f"{i} " + "four tokens " * (i % 7 * 10) for i in range(30)]
    whole = [row.tolist() for row in kind(documents_of(texts), tokenizer, 16)]
    monkeypatch.setattr("act24.tools.data.rows.GROUP_DOCUMENTS", 4)
    monkeypatch.setattr("act24.tools.data.rows.GROUP_CHARACTERS", 500)
    assert [row.tolist() for row in kind(documents_of(texts), tokenizer, 16)] == whole


@settings(deadline=None)
@given(texts, st.integers(1, 20), st.integers(0, 30), st.sampled_from([PackedRows, PaddedRows]))
def test_a_row_state_is_small_and_continues_exactly(tokenizer, texts, max_length, cut, kind):
    straight = kind(documents_of(texts), tokenizer, max_length)
    rows = [row.tolist() for row in straight]
    first = kind(documents_of(texts), tokenizer, max_length)
    for _, _ in zip(range(cut), first, strict=False):
        pass
    state = json.dumps(first.state_dict())
    assert len(state) < 250
    second = kind(documents_of(texts), tokenizer, max_length)
    second.load_state_dict(json.loads(state))
    assert [row.tolist() for row in second] == rows[cut:]


@pytest.mark.parametrize("tokens", [31, 32])
def test_a_corpus_of_less_than_one_row_is_refused(tokenizer, tokens):
    """Counted with its end-of-text token; one byte is one token here."""
    rows = PackedRows(documents_of(["z" * (tokens - 1)], endless=True), tokenizer, 32)
    if tokens < 32:
        with pytest.raises(Act24Error, match="has 31 tokens, fewer than one row"):
            next(rows)
    else:
        assert len({tuple(next(rows)) for _ in range(3)}) == 1


def test_heldout_bytes_are_those_of_the_text(corpora, tokenizer):
    data = corpora["json"].data()
    held: HeldoutRows = heldout_rows(data, tokenizer, 10**9, vocab_size=300)
    documents = list(open_documents(data, "heldout"))
    assert held.bytes == sum(len(text.encode()) for text in documents)
    assert held.tokens == sum(len(tokenizer.encode(text)) + 1 for text in documents)
