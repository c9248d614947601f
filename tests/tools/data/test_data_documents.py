"""Order, ranks, epochs and the held-out rule of documents, against plain lists."""

import contextlib
import itertools
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from act24.errors import Act24Error
from act24.recipes.schema import Data
from act24.tools.data.documents import Documents, builtin_files, open_documents
from act24.tools.data.shard import is_heldout


def shards_of(texts_by_shard):
    """The texts as shards that keep to the contract: None where a record is not wanted."""
    return [
        lambda wanted, texts=texts: (text if wanted(i) else None for i, text in enumerate(texts))
        for texts in texts_by_shard
    ]


texts_by_shard = st.lists(
    st.lists(st.sampled_from(["", *"abcdefghij"]), min_size=0, max_size=6), min_size=1, max_size=6
)


@given(texts_by_shard, st.integers(1, 4), st.sampled_from([None, 0, 7]))
def test_ranks_are_disjoint_and_together_complete(texts, world_size, seed):
    everything = Counter(text for shard in texts for text in shard if text)
    seen = Counter()
    for rank in range(world_size):
        documents = Documents(shards_of(texts), {}, shuffle_seed=seed, rank=rank, world_size=world_size)
        with contextlib.suppress(Act24Error):  # a rank without any document: fine, as long as none is missing
            seen.update(documents)
    assert seen == everything


@given(texts_by_shard)
def test_one_pass_without_a_seed_keeps_the_order(texts):
    flat = [text for shard in texts for text in shard if text]
    documents = Documents(shards_of(texts), {})
    if flat:
        assert list(documents) == flat
        assert next(documents, None) is None
    else:
        with pytest.raises(Act24Error):
            next(documents)


@settings(deadline=None)
@given(texts_by_shard.filter(lambda t: any(map(any, t))), st.data())
def test_a_state_continues_with_the_next_document_twice(texts, data):
    world_size = data.draw(st.integers(1, 3))
    rank = data.draw(st.integers(0, world_size - 1))
    first, second = data.draw(st.integers(0, 15)), data.draw(st.integers(0, 15))

    def fresh():
        return Documents(shards_of(texts), {}, shuffle_seed=1, endless=True, rank=rank, world_size=world_size)

    try:
        straight = list(itertools.islice(fresh(), first + second + 15))
    except Act24Error:
        return  # no document for this rank
    got, state = [], fresh().state_dict()
    for count in (first, second, 15):
        documents = fresh()
        documents.load_state_dict(json.loads(json.dumps(state)))
        got += itertools.islice(documents, count)
        state = documents.state_dict()
    assert got == straight


def test_each_epoch_has_every_document_in_an_order_of_its_own():
    texts = [[f"{shard}"] for shard in range(20)]
    documents = Documents(shards_of(texts), {}, shuffle_seed=3, endless=True)
    epochs = [tuple(itertools.islice(documents, 20)) for _ in range(4)]
    assert len(set(epochs)) == 4
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(sorted(str(i) for i in range(20)))}
    other_seed = Documents(shards_of(texts), {}, shuffle_seed=4)
    assert tuple(other_seed) not in epochs


@pytest.mark.parametrize("kind", ["text", "json", "parquet"])
def test_files_of_every_kind(corpora, kind):
    corpus = corpora[kind]
    assert list(open_documents(corpus.data(), "train")) == corpus.documents
    by_rank = [list(open_documents(corpus.data(), "train", rank=r, world_size=2)) for r in (0, 1)]
    assert Counter(by_rank[0] + by_rank[1]) == Counter(corpus.documents)
    assert all(by_rank)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_that_ranks_cannot_share_evenly_are_shared_by_document(shards):
    texts = [[f"{shard}:{i}" for i in range(30)] for shard in range(shards)]
    for rank in range(3):
        assert len(list(Documents(shards_of(texts), {}, rank=rank, world_size=3))) == 10 * shards


def test_what_is_held_out_depends_on_the_document_alone(tmp_path):
    texts = [f"document {i}" for i in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in reversed(texts[:500])))
    one = Data(source="files", train_files=(str(tmp_path / "a.jsonl"),))
    train, heldout = (list(open_documents(one, split)) for split in ("train", "heldout"))
    assert sorted(train + heldout) == sorted(texts)
    assert 60 < len(heldout) < 140  # 100 expected; 4 standard deviations are 39
    other = Data(source="files", train_files=(str(tmp_path / "b.jsonl"),))
    assert set(open_documents(other, "heldout")) == set(texts[:500]) & set(heldout)


def test_heldout_files_are_not_trained_on(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    data = Data(
        source="files", train_files=(str(tmp_path / "*.txt"),), heldout_files=(str(tmp_path / "b.txt"),)
    )
    assert list(open_documents(data, "train")) == ["a", "c"]
    assert list(open_documents(data, "heldout")) == ["b"]
    everything = data.model_copy(update={"heldout_files": data.train_files})
    with pytest.raises(Act24Error, match=r"also in data\.heldout_files"):
        open_documents(everything, "train")


def test_builtin_is_the_standard_library():
    data = Data(source="builtin")
    train, heldout = (list(open_documents(data, split)) for split in ("train", "heldout"))
    assert sum(map(len, train)) > 5_000_000
    assert 0.01 < len(heldout) / len(train + heldout) < 0.1
    assert not set(train) & set(heldout)
    assert not any(map(is_heldout, train))
    source = json.loads.__globals__["__file__"]  # a module whose text we know where to find
    with open(source, encoding="utf-8") as file:
        assert file.read() in train + heldout


def test_an_empty_corpus_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n')
    (tmp_path / "b.txt").write_text("one document")
    empty = Data(source="files", train_files=(str(tmp_path / "a.jsonl"),))
    with pytest.raises(Act24Error, match=r"no document to train on in 1 file \(.*a\.jsonl\)"):
        next(open_documents(empty, "train", endless=True))
    one = Data(source="files", train_files=(str(tmp_path / "b.txt"),))
    assert not is_heldout("one document")
    with pytest.raises(Act24Error, match=r"no document to evaluate on .* name data\.heldout_files"):
        next(open_documents(one, "heldout"))
    with pytest.raises(Act24Error, match=r"no document to train on .* for rank 1 of 2"):
        next(open_documents(one, "train", rank=1, world_size=2, endless=True))


def test_a_moved_folder_is_the_same_data_and_a_changed_file_is_not(tmp_path):
    for folder in ("here", "there/below"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("a")
        (tmp_path / folder / "b.txt").write_text("b")

    def fingerprint(folder):
        data = Data(source="files", train_files=(str(tmp_path / folder / "*.txt"),))
        return open_documents(data, "train").fingerprint

    same = fingerprint("here")
    assert fingerprint("there/below") == same
    (tmp_path / "here/b.txt").write_text("bb")
    assert fingerprint("here") != same


def test_the_builtin_text_has_no_empty_files() -> None:
    """So that nobody's first run warns of text that is not theirs."""
    files = builtin_files()
    assert len(files) > 100
    assert all(file.stat().st_size for file in files)
