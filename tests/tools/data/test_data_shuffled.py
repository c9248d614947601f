"""The shuffle buffer: all documents of each epoch, in another order, gone on from exactly."""

import itertools
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act24.tools.data import open_rows
from act24.tools.data.documents import Documents
from act24.tools.data.shuffled import ShuffledDocuments

TEXTS = [f"document {index}" for index in range(100)]


def fresh(size, seed=0, endless=True, rank=0, world_size=1):
    shards = [
        lambda wanted, k=k: (t if wanted(i) else None for i, t in enumerate(TEXTS[k::2])) for k in (0, 1)
    ]
    documents = Documents(shards, {}, shuffle_seed=seed, endless=endless, rank=rank, world_size=world_size)
    return ShuffledDocuments(documents, size, seed)


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_a_pass_has_every_document_once(size):
    got = list(fresh(size, endless=False))
    assert Counter(got) == Counter(TEXTS)
    in_order = list(fresh(1, endless=False))
    assert (got == in_order) == (size == 1)
    for start in range(0, 100, size):  # what is mixed is one buffer
        assert Counter(got[start : start + size]) == Counter(in_order[start : start + size])


def test_the_order_is_of_seed_and_epoch():
    epochs = [tuple(itertools.islice(documents, 100)) for documents in [fresh(100)] for _ in range(3)]
    assert len(set(epochs)) == 3
    assert tuple(itertools.islice(fresh(100), 100)) == epochs[0]
    assert tuple(itertools.islice(fresh(100, seed=1), 100)) != epochs[0]
    moved = sum(a != b for a, b in zip(epochs[0], fresh(1), strict=False))
    assert moved > 90


@given(st.integers(1, 40), st.lists(st.integers(0, 60), min_size=2, max_size=2), st.integers(1, 3))
def test_a_state_continues_with_the_next_document_twice(size, parts, world_size):
    place = {"rank": world_size - 1, "world_size": world_size}
    straight = list(itertools.islice(fresh(size, **place), sum(parts) + 30))
    got, state = [], fresh(size, **place).state_dict()
    for count in (*parts, 30):
        documents = fresh(size, **place)
        documents.load_state_dict(json.loads(json.dumps(state)))
        got += itertools.islice(documents, count)
        state = documents.state_dict()
    assert got == straight


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rows_of_a_buffer_go_on_exactly(corpora, tokenizer, layout):
    data = corpora["json"].data().model_copy(update={"rows": layout, "shuffle_buffer": 10})

    def rows(count, state=None):
        with open_rows(data, tokenizer, batch_size=2, vocab_size=300) as batches:
            if state:
                batches.load_state_dict(json.loads(json.dumps(state)))
            got = [next(batches).labels.tolist() for _ in range(count)]
            return got, batches.state_dict()

    straight, _ = rows(60)
    first, state = rows(17)
    second, state = rows(20, state)
    third, _ = rows(23, state)
    assert first + second + third == straight
    plain = data.model_copy(update={"shuffle_buffer": 0})
    with open_rows(plain, tokenizer, batch_size=2, vocab_size=300) as batches:
        assert [next(batches).labels.tolist() for _ in range(60)] != straight
