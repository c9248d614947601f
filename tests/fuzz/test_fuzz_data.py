"""Data files, tokenizers and token shards."""

import gzip
import io
import itertools
import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from conftest import fuzzing
from damage import WORDS, altered, damaged
from hypothesis import given
from hypothesis import strategies as st

from act24.recipes import schema
from act24.tools.data import data_from_argument, open_documents, open_rows, open_tokenizer, prepare_shards
from act24.tools.data.files import Reading, read_documents

TEXTS = ["low rank", "über zwei von vier", "机器学习", "", "x" * 300] * 4
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
ARRAY = json.dumps([{"text": text} for text in TEXTS]).encode()


def table(kind: str) -> bytes:
    rows = pyarrow.table({"text": TEXTS, "n": list(range(len(TEXTS)))})
    sink = io.BytesIO()
    if kind in ("snappy", "none", "zstd"):
        pyarrow.parquet.write_table(rows, sink, row_group_size=8, compression=kind)
    else:
        make = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with make(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=8)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.txt": "\n".join(TEXTS).encode(),
    "b.txt": "\n".join(TEXTS).encode("gb18030", "replace"),
    "c.txt": "\n".join(TEXTS).encode("utf-16"),
    "d.txt.gz": gzip.compress("\n".join(TEXTS).encode()),
    "e.jsonl": LINES,
    "f.json": ARRAY,
    "g.jsonl.gz": gzip.compress(LINES),
    "h.jsonl.zst": zstd(LINES),
    "i.parquet": table("snappy"),
    "j.parquet": table("none"),
    "k.parquet": table("zstd"),
    "l.arrow": table("file"),
    "m.arrow": table("stream"),
    "n.jsonl": "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode("utf-16"),
}

ENCODINGS = [None, None, "utf-8", "gb18030", "utf-16"]


def read_all(path, how):
    """Two records of three; each text must be one that a tokenizer takes."""
    return [text.encode() for text in read_documents(path, how, lambda index: index % 3 != 1) if text]


@fuzzing
@given(st.data())
def test_data_files(tried, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(FILES)))
    path = tmp_path_factory.mktemp("data") / name
    path.write_bytes(data.draw(damaged(FILES[name])))
    how = Reading("text", data.draw(st.sampled_from(ENCODINGS)), data.draw(st.booleans()))
    tried(lambda: read_all(path, how))


RECORDS = [{"text": "a", "n": 1}, {"text": "b"}]


@fuzzing
@given(altered(RECORDS), st.booleans())
def test_json_records(tried, tmp_path_factory, records, skip):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    lines = records if isinstance(records, list) else [records]
    path.write_text("\n".join(json.dumps(record) for record in lines))
    tried(lambda: read_all(path, Reading(skip_bad=skip)))


@fuzzing
@given(WORDS, WORDS | st.sampled_from(ENCODINGS))
def test_sources(tried, monkeypatch, tmp_path_factory, word, encoding):
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    if not word.startswith(("/", "..")) and "*" not in word:  # no tour of this machine
        tried(lambda: open_documents(data_from_argument(word), "train"))
    known = schema.Data(source="files", train_files=(__file__,), encoding=encoding)
    tried(lambda: next(open_documents(known, "train")))


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    from act24.tools.data.tokenizer import _train

    return _train(TEXTS, 300)


def use(tokenizer) -> None:
    tokenizer.encode("low rank 机器\n")
    tokenizer.decode([0, 1, 2])
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert tokenizer.highest_text_id < tokenizer.vocab_size


@fuzzing
@given(st.data())
def test_tokenizers(tried, tmp_path_factory, backend, data):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    content = backend.to_str()
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(content.encode())))
    else:
        path.write_text(json.dumps(data.draw(altered(json.loads(content)))))
    builtin = schema.Data(source="builtin")
    tried(lambda: use(open_tokenizer(builtin, schema.Tokenizer(name=str(path)))))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, backend):
    from act24.tools.data import Tokenizer

    folder = tmp_path_factory.mktemp("shards")
    (folder / "text.jsonl").write_bytes(LINES)
    prepare_shards(
        data_from_argument(str(folder / "text.jsonl")), Tokenizer(backend, "small"), folder / "out"
    )
    return folder / "out"


@fuzzing
@given(st.data())
def test_token_shards(tried, tmp_path_factory, shards, data):
    folder = tmp_path_factory.mktemp("fuzzed") / "out"
    shutil.copytree(shards, folder)
    content = (shards / "index.json").read_text()
    if data.draw(st.booleans()):
        (folder / "index.json").write_text(json.dumps(data.draw(altered(json.loads(content)))))
    else:
        name = data.draw(st.sampled_from(sorted(path.name for path in shards.iterdir())))
        (folder / name).write_bytes(data.draw(damaged((shards / name).read_bytes())))

    def work():
        section = schema.Data(source="shards", shards=str(folder), max_length=8)
        tokenizer = open_tokenizer(section, schema.Tokenizer())
        with open_rows(section, tokenizer, batch_size=1, vocab_size=300) as rows:
            list(itertools.islice(rows, 20))

    tried(work)
