"""Token shards: what is written is what packing gives, shuffled as a whole, and damage is found."""

import errno
import hashlib
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from act24.errors import Act24Error
from act24.recipes import schema
from act24.tools.data import (
    Tokenizer,
    data_from_argument,
    heldout_rows,
    open_documents,
    open_rows,
    open_tokenizer,
    prepare,
    prepare_shards,
)
from act24.tools.data.permutation import permuted
from act24.tools.data.rows import PackedRows, PaddedRows, ShardRows
from act24.tools.data.shard import Split
from act24.tools.data.shards import TokenShards, read_index
from act24.tools.pruning import kept


@pytest.fixture(params=[2**28, 150], ids=["one shard", "many shards"])
def prepared(request, corpora, tokenizer, tmp_path, monkeypatch):
    """(data, folder): a corpus and its token shards."""
    monkeypatch.setattr("act24.tools.data.prepare.SHARD_TOKENS", request.param)
    data = corpora["json"].data()
    folder = tmp_path / "shards"
    index = prepare_shards(data, tokenizer, folder)
    shards = index["splits"]["train"]["shards"]
    assert (len(shards) > 3) == (request.param == 150)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]  # nothing temporary stays
    return data, folder


@pytest.mark.parametrize("max_length", [1, 7, 32, 10_000])
def test_shards_hold_the_rows_that_packing_and_padding_give(prepared, tokenizer, max_length):
    data, folder = prepared
    splits: list[tuple[Split, int | None]] = [("train", data.shuffle_seed), ("heldout", None)]
    for split, seed in splits:
        shards = TokenShards(folder, split)
        for layout, kind in (("packed", PackedRows), ("padded", PaddedRows)):
            direct = kind(open_documents(data, split, shuffle_seed=seed), tokenizer, max_length)
            stored = ShardRows(shards, layout, max_length)
            assert [row.tolist() for row in stored] == [row.tolist() for row in direct]


def test_heldout_measures_are_equal(prepared, tokenizer):
    data, folder = prepared
    stored = schema.Data(source="shards", shards=str(folder), max_length=32)
    written = open_tokenizer(stored, schema.Tokenizer())
    assert written.fingerprint == tokenizer.fingerprint
    a = heldout_rows(data, tokenizer, 300, vocab_size=300)
    b = heldout_rows(stored, written, 300, vocab_size=300)
    assert (a.tokens, a.bytes, a.fingerprint) == (b.tokens, b.bytes, b.fingerprint)


def test_each_epoch_is_another_order_of_all_rows(prepared):
    shards = TokenShards(prepared[1], "train")
    rows = ShardRows(shards, "packed", 8, shuffle_seed=3, endless=True)
    count = -(-(shards.tokens - 1) // 8)
    epochs = [[tuple(row) for row in itertools.islice(rows, count)] for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@given(st.integers(1, 3000), st.integers(0, 2**32), st.integers(0, 100))
@settings(deadline=None)
def test_permuted_is_one_to_one(size, seed, epoch):
    images = permuted(np.arange(size), size, seed, epoch)
    assert sorted(images.tolist()) == list(range(size))
    alone = permuted(np.array([size // 2]), size, seed, epoch)
    assert alone[0] == images[size // 2]  # no matter what is asked with it


def test_permuted_looks_random():
    """Like uniform draws: no trend, places spread over the whole range, seeds and epochs unrelated."""
    size = 20_000
    places = np.arange(size)
    orders = [permuted(places, size, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order, other in itertools.combinations([places, *orders], 2):
        assert abs(np.corrcoef(order, other)[0, 1]) < 5 / np.sqrt(size)
    steps = np.abs(np.diff(orders[0])) / size
    assert abs(steps.mean() - 1 / 3) < 0.01  # mean distance of two uniform draws
    assert (orders[0] == places).sum() < 10  # 1 expected
    assert len(set(permuted(places, 2**45, 0, 0).tolist())) == size  # also where nothing could be stored


def test_many_ids_take_four_bytes(tmp_path):
    vocabulary = {f"w{i}": i for i in range(70_000)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    (tmp_path / "a.txt").write_text("w1 w69999 w65536")
    pattern = (str(tmp_path / "a.txt"),)
    data = schema.Data(source="files", train_files=pattern, heldout_files=pattern)
    data = data.model_copy(update={"train_files": (str(tmp_path / "b.txt"),)})
    (tmp_path / "b.txt").write_text("w65536 w2")
    index = prepare_shards(data, Tokenizer(backend, "many"), tmp_path / "out")
    assert index["dtype"] == "<u4"
    assert TokenShards(tmp_path / "out", "heldout").document(0).tolist() == [1, 69_999, 65_536, 70_000]


def test_limits_stop_after_the_document_that_reaches_them(corpora, tokenizer, tmp_path):
    seen = []
    index = prepare_shards(
        corpora["text"].data(),
        tokenizer,
        tmp_path / "out",
        max_tokens=100,
        max_heldout_tokens=1,
        progress=lambda *where: seen.append(where),
    )
    train, heldout = index["splits"]["train"], index["splits"]["heldout"]
    lengths = np.diff(np.fromfile(tmp_path / "out/train-documents.bin", "<u8").astype(int))
    assert lengths.sum() == train["tokens"] - 1 >= 100 > lengths[:-1].sum()
    assert heldout["documents"] == 1
    assert seen[0][:2] == ("heldout", 1)
    assert seen[-1] == ("train", train["documents"], train["tokens"])


@pytest.mark.parametrize("more", [0, 1])
def test_a_limit_that_a_document_reaches_exactly_is_reached(corpora, tokenizer, tmp_path, more):
    data = corpora["text"].data()
    documents = list(open_documents(data, "train", shuffle_seed=data.shuffle_seed))
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in documents[:3])
    index = prepare_shards(data, tokenizer, tmp_path / "out", max_tokens=tokens + more)
    assert index["splits"]["train"]["documents"] == 3 + more


def test_a_damaged_file_is_named(prepared, tokenizer):
    folder = prepared[1]
    for name in ("train-00000.bin", "train-documents.bin"):
        path = folder / name
        content = path.read_bytes()
        for damaged in (content[:-2], content[:-1] + bytes([content[-1] ^ 1]), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(Act24Error, match=f"{name} is missing or corrupt"):
                TokenShards(folder, "train")
        TokenShards(folder, "heldout")  # is whole
        path.write_bytes(content)
    TokenShards(folder, "train")
    (folder / "tokenizer.json").write_text(tokenizer.to_json().replace("the", "eht"))
    with pytest.raises(Act24Error, match=r"tokenizer\.json is missing or corrupt"):
        open_tokenizer(schema.Data(source="shards", shards=str(folder)), schema.Tokenizer())


def _swapped(boundaries):
    boundaries[1:-1] = boundaries[-2:0:-1]


def _repeated(boundaries):
    boundaries[2] = boundaries[1]


def _far(boundaries):
    boundaries[1:-1] = 2**63


def _zero(boundaries):
    boundaries[-2] = 0


@pytest.mark.parametrize("change", [_swapped, _repeated, _far, _zero])
@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_boundaries_that_do_not_ascend_are_refused_behind_valid_hashes(
    sources, tmp_path, monkeypatch, change, piece
):
    monkeypatch.setattr("act24.tools.data.shards.PIECE", piece)
    folder = tmp_path / "shards"
    shutil.copytree(str(sources["shards"].shards), folder)
    TokenShards(folder, "train")
    path = folder / "train-documents.bin"
    boundaries = np.fromfile(path, "<u8")
    change(boundaries)
    boundaries.tofile(path)
    index = json.loads((folder / "index.json").read_text())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    index["splits"]["train"]["boundaries"][path.name]["sha256"] = sha256
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(Act24Error, match=r"train-documents\.bin does not fit the tokens beside it"):
        TokenShards(folder, "train")


def test_a_folder_that_was_not_prepared_is_named(tmp_path):
    with pytest.raises(Act24Error, match="is not a folder written by `act24 data prepare`"):
        TokenShards(tmp_path, "train")
    (tmp_path / "index.json").write_text(json.dumps({"format": "act24 token shards 0"}))
    with pytest.raises(Act24Error, match="format 'act24 token shards 0', expected 'act24 token shards 1'"):
        TokenShards(tmp_path, "train")


def test_the_tokenizer_of_shards_is_the_one_they_were_written_with(
    prepared, tokenizer, tokenizer_file, tmp_path, t5_backend
):
    data = schema.Data(source="shards", shards=str(prepared[1]))
    for name in ("bpe", tokenizer.name, str(tokenizer_file)):
        assert open_tokenizer(data, schema.Tokenizer(name=name)).fingerprint == tokenizer.fingerprint
    (tmp_path / "t5.json").write_text(t5_backend.to_str())
    with pytest.raises(
        Act24Error, match=r"was written with tokenizer 'small', the recipe asks for .*t5\.json"
    ):
        open_tokenizer(data, schema.Tokenizer(name=str(tmp_path / "t5.json")))


def test_too_few_rows_are_refused(corpora, tokenizer, tmp_path):
    prepare_shards(corpora["text"].data(), tokenizer, tmp_path / "out", max_tokens=20)
    tokens = TokenShards(tmp_path / "out", "train").tokens
    data = schema.Data(source="shards", shards=str(tmp_path / "out"), max_length=tokens)
    with pytest.raises(Act24Error, match=f"has {tokens - 1} tokens, fewer than one row"):
        open_rows(data, tokenizer, batch_size=1, vocab_size=300)
    data = data.model_copy(update={"max_length": tokens - 1})
    open_rows(data, tokenizer, batch_size=1, vocab_size=300)
    with pytest.raises(Act24Error, match="has 1 row for 2 processes"):
        open_rows(data, tokenizer, batch_size=1, vocab_size=300, world_size=2)


def test_nothing_is_overwritten(corpora, tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    with pytest.raises(Act24Error, match="out exists already"):
        prepare_shards(corpora["text"].data(), tokenizer, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["precious"]


def test_a_failure_leaves_nothing_behind(corpora, tokenizer, tmp_path, monkeypatch):
    data = corpora["text"].data()
    (tmp_path / "bad.jsonl").write_text("not JSON\n")
    bad = data.model_copy(update={"heldout_files": (str(tmp_path / "bad.jsonl"),)})
    with pytest.raises(Act24Error, match="line 1"):
        prepare_shards(bad, tokenizer, tmp_path / "out")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Act24Error, match=r"cannot write .*out\.partial: .*No space left on device"):
        prepare_shards(data, tokenizer, tmp_path / "out")
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_preparing_shards_again_is_refused(prepared, tokenizer, tmp_path):
    data = schema.Data(source="shards", shards=str(prepared[1]))
    with pytest.raises(Act24Error, match="holds tokens, not text"):
        prepare_shards(data, tokenizer, tmp_path / "again")


def test_what_a_word_on_the_command_line_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts/deep").mkdir(parents=True)
    assert data_from_argument("builtin") == schema.Data(source="builtin")
    for word in ("texts", "texts/deep", "*.md", str(tmp_path), "missing.txt", "a/missing.json.gz"):
        assert data_from_argument(word) == schema.Data(source="files", train_files=(word,))
    c4 = data_from_argument("allenai/c4")
    assert (c4.source, c4.dataset, c4.subset) == ("hf", "allenai/c4", "en")
    assert data_from_argument("allenai/c4:realnewslike").subset == "realnewslike"
    assert data_from_argument("owner/name").subset == ""
    with pytest.raises(Act24Error, match="no data source 'bultin': expected 'builtin', a file"):
        data_from_argument("bultin")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("index.json", read_index),
        (prepare.JOURNAL, prepare._Journal),
        (kept._JOURNAL, lambda folder: kept.BlockFiles(folder, {})),
    ],
    ids=["an index", "a journal", "a journal of blocks"],
)
def test_a_pipe_is_not_waited_for(tmp_path, name, read):
    os.mkfifo(tmp_path / name)
    with pytest.raises(Act24Error, match=f"{name} is a pipe"):
        read(tmp_path)
