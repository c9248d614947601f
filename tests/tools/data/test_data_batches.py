"""Batches of every source that works without a network: exact resume, ranks, held-out rows, refusals."""

import itertools
import json
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import slow_but

from act24.errors import Act24Error
from act24.recipes import schema
from act24.tools.data import Tokenizer, heldout_rows, open_rows
from act24.tools.data.batches import IGNORED, TokenRows
from act24.tools.data.documents import Documents
from act24.tools.data.rows import PackedRows

pytestmark = pytest.mark.usefixtures("smaller_modules")
SOURCES = ["text", "json", "parquet", "builtin", "shards"]


def rows_of(batches, count):
    """The first `count` rows, as (inputs, labels), however they are batched."""
    pairs = ((i.tolist(), t.tolist()) for b in batches for i, t in zip(b.input_ids, b.labels, strict=True))
    return list(itertools.islice(pairs, count))


@pytest.mark.parametrize(
    ("source", "layout"),
    slow_but(
        [("text", "padded"), *((source, "packed") for source in SOURCES if source != "builtin")],
        itertools.product(SOURCES, ["packed", "padded"]),
    ),
)
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_resuming_twice_continues_with_exactly_the_next_row(sources, tokenizer, source, layout, data):
    """Other batch sizes after each resume, states through JSON, prefetching on."""
    world_size = data.draw(st.integers(1, 2), "world size")
    place = {"rank": data.draw(st.integers(0, world_size - 1), "rank"), "world_size": world_size}
    parts = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=3, max_size=3))

    def opened(batch_size):
        section = sources[source].model_copy(update={"rows": layout})
        return open_rows(section, tokenizer, batch_size=batch_size, vocab_size=300, **place)

    got, state = [], None
    for batch_size, batches in parts:
        with opened(batch_size) as rows:
            if state is not None:
                rows.load_state_dict(json.loads(state))
            got += rows_of(itertools.islice(rows, batches), None)
            state = json.dumps(rows.state_dict())
    with opened(7) as straight:
        assert got == rows_of(straight, len(got))


def first_epoch(data, tokenizer, **place):
    """The rows before the position says epoch 1."""
    with open_rows(data, tokenizer, batch_size=1, vocab_size=300, **place) as rows:
        return rows_of(itertools.takewhile(lambda batch: batch.state["epoch"] == 0, rows), None)


@pytest.mark.parametrize(
    ("source", "layout"),
    [
        ("text", "padded"),
        ("json", "padded"),
        ("parquet", "padded"),
        ("shards", "padded"),
        ("shards", "packed"),
    ],
)
def test_ranks_see_every_row_once_an_epoch(sources, tokenizer, source, layout):
    data = sources[source].model_copy(update={"rows": layout})
    ranks = [first_epoch(data, tokenizer, rank=rank, world_size=3) for rank in range(3)]
    assert all(ranks)
    everything = first_epoch(data, tokenizer)
    assert Counter(map(str, ranks[0] + ranks[1] + ranks[2])) == Counter(map(str, everything))
    if layout == "padded":  # one row a document, and the held-out files are the same documents
        assert len(everything) == heldout_rows(data, tokenizer, 10**9, vocab_size=300).total_rows


@pytest.mark.parametrize(
    ("source", "layout"),
    slow_but(
        [("text", "padded"), *((source, "packed") for source in SOURCES)],
        itertools.product(SOURCES, ["packed", "padded"]),
    ),
)
def test_heldout_rows_do_not_depend_on_batches_or_ranks(sources, tokenizer, source, layout):
    data = sources[source].model_copy(update={"rows": layout})
    reference = heldout_rows(data, tokenizer, 500, vocab_size=300)
    assert 500 <= reference.tokens < 500 + 32
    assert heldout_rows(data, tokenizer, 400, vocab_size=300).fingerprint != reference.fingerprint
    expected = rows_of(reference.batches(1), None)
    for world_size, batch_size in itertools.product((1, 2, 3), (1, 4, 64)):
        ranks = [
            heldout_rows(data, tokenizer, 500, vocab_size=300, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for field in ("total_rows", "tokens", "bytes", "fingerprint"):
            assert {getattr(held, field) for held in ranks} == {getattr(reference, field)}
        batches = [list(held.batches(batch_size)) for held in ranks]
        assert len({len(b) for b in batches}) == 1  # or collectives would wait for ever
        assert {tuple(b.labels.shape) for rank in batches for b in rank} == {(batch_size, 32)}
        rows = [rows_of(rank, None) for rank in batches]
        interleaved = [row for place in zip(*rows, strict=True) for row in place]
        predicting = [row for row in interleaved if any(label != IGNORED for label in row[1])]
        assert predicting == expected
        assert sum(int((b.labels != IGNORED).sum()) for rank in batches for b in rank) == reference.tokens


def test_heldout_rows_are_of_the_heldout_files(tokenizer, tmp_path):
    (tmp_path / "train.txt").write_text("trained on " * 40)
    (tmp_path / "heldout.txt").write_text("held out " * 40)
    files = {"train_files": (f"{tmp_path}/train.txt",), "heldout_files": (f"{tmp_path}/heldout.txt",)}
    data = schema.Data(source="files", max_length=32, **files)
    held = heldout_rows(data, tokenizer, 10**6, vocab_size=300)
    ids = [id for batch in held.batches(4) for id in batch.labels.flatten().tolist() if id != IGNORED]
    assert tokenizer.decode(ids).startswith("held out " * 40)
    assert "trained" not in tokenizer.decode(ids)


def test_batches_are_int64_and_shifted(sources, tokenizer):
    with open_rows(sources["text"], tokenizer, batch_size=3, vocab_size=300) as rows:
        batch = next(rows)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.shape == batch.labels.shape == (3, 32)
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])


def test_the_state_is_of_the_batch_handed_out_not_of_what_was_prefetched(sources, tokenizer):
    with open_rows(sources["json"], tokenizer, batch_size=2, vocab_size=300) as rows:
        start = rows.state_dict()
        batches = [next(rows) for _ in range(3)]
        assert rows.state_dict() == batches[-1].state
        following = next(rows)
        rows.load_state_dict(batches[1].state)  # back, while the thread is ahead
        assert torch.equal(next(rows).labels, batches[2].labels)
        assert torch.equal(next(rows).labels, following.labels)
        rows.load_state_dict(start)
        assert torch.equal(next(rows).labels, batches[0].labels)


CHANGES = {
    "max_length was 32 and is 16": {"max_length": 16},
    "rows was 'packed' and is 'padded'": {"rows": "padded"},
    "shuffle_seed was 42 and is 1": {"shuffle_seed": 1},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("message", CHANGES)
def test_a_position_in_other_rows_is_refused(sources, tokenizer, source, message):
    data = sources[source]
    with open_rows(data, tokenizer, batch_size=2, vocab_size=300) as rows:
        state = next(rows).state
    changed = data.model_copy(update=CHANGES[message])
    with (
        open_rows(changed, tokenizer, batch_size=2, vocab_size=300) as rows,
        pytest.raises(Act24Error, match=message),
    ):
        rows.load_state_dict(state)


def test_a_position_of_other_streams_files_or_tokenizer_is_refused(
    sources, tokenizer, tokenizer_file, tmp_path, t5_backend
):
    data = sources["text"]
    with open_rows(data, tokenizer, batch_size=2, vocab_size=300) as rows:
        state = next(rows).state

    def refusal(data, tokenizer, **place):
        with (
            open_rows(data, tokenizer, batch_size=2, vocab_size=300, **place) as rows,
            pytest.raises(Act24Error, match="the data are not those of the saved position") as caught,
        ):
            rows.load_state_dict(state)
        return str(caught.value)

    assert refusal(data, tokenizer, streams=2).endswith(": streams was 1 and is 2")
    assert "tokenizer was " in refusal(data, Tokenizer(t5_backend, "t5"))
    (tmp_path / "a.txt").write_text("other text " * 50)
    other = data.model_copy(update={"train_files": (str(tmp_path / "a.txt"),)})
    assert "27 of 27 files are gone or their content has changed" in refusal(other, tokenizer)
    assert "source was 'files' and is 'shards'" in refusal(sources["shards"], tokenizer)


def test_an_error_in_the_thread_arrives_and_stays(tokenizer):
    def broken(wanted):
        yield from ["two of four " * 40] * 3
        raise Act24Error("the third document is the last")

    documents = Documents([broken], {}, endless=True)
    with TokenRows(PackedRows(documents, tokenizer, 8), tokenizer, 8, 2, 300) as rows:
        for _ in range(2):  # also when asked again
            with pytest.raises(Act24Error, match="the third document"):
                list(rows)


def test_close_stops_the_thread(sources, tokenizer):
    before = set(threading.enumerate())
    rows = open_rows(sources["text"], tokenizer, batch_size=2, vocab_size=300)
    next(rows)
    started = set(threading.enumerate()) - before
    assert len(started) == 1
    rows.close()
    assert not started & set(threading.enumerate())


def test_ids_past_the_models_vocabulary_are_refused(sources, tokenizer, t5_backend, tmp_path):
    with pytest.raises(Act24Error, match="vocabulary has 299 entries"):
        open_rows(sources["text"], tokenizer, batch_size=1, vocab_size=299)
    with pytest.raises(Act24Error, match="vocabulary has 299 entries"):
        heldout_rows(sources["text"], tokenizer, 1, vocab_size=299)
    # Should an id escape the check before the start, its batch is refused by name.
    documents = Documents([lambda wanted: iter(["low rank"])], {}, endless=True)
    with (
        TokenRows(PackedRows(documents, tokenizer, 2), tokenizer, 2, 1, 40) as rows,
        pytest.raises(Act24Error, match="the text holds id"),
    ):
        next(rows)
