"""The Hub source, through real `datasets` streams of local files, with the network's failures injected."""

import errno
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from collections import Counter

import huggingface_hub
import pytest
from slow import slow_but

from act24.errors import Act24Error
from act24.recipes.schema import Data
from act24.tools.data import heldout_rows, hub, open_documents, open_rows, pinned_for, prepare_shards
from act24.tools.data.files import Reading
from act24.tools.data.shard import is_heldout


@pytest.fixture
def local(corpora, monkeypatch) -> Data:
    """An `hf` section whose data set is the corpus in C4's layout: 4 training shards, the last validates."""
    import datasets

    files = sorted(str(path) for path in corpora["json"].folder.iterdir())

    def load_stream(dataset, subset, split, revision):
        return datasets.load_dataset(
            "json", data_files={"train": files, "validation": files[-1:]}, split=split, streaming=True
        )

    monkeypatch.setattr(hub, "load_stream", load_stream)
    return Data(source="hf", max_length=32)


def test_documents_and_splits(local, corpora):
    assert list(open_documents(local, "train")) == corpora["json"].documents
    heldout = list(open_documents(local, "heldout"))
    assert heldout == corpora["json"].documents[-len(heldout) :]
    assert 1 < len(heldout) < 10


def test_characters_that_were_replaced_before_are_counted(tmp_path, monkeypatch):
    """Not refused, as in a file of one's own: nobody who reads it can mend a data set of the Hub."""
    import datasets

    def load_stream(*address):
        texts = [{"text": text} for text in ("two of four", "\ufffd\ufffd of four")]
        return datasets.Dataset.from_list(texts).to_iterable_dataset()

    monkeypatch.setattr(hub, "load_stream", load_stream)
    documents = open_documents(Data(source="hf", max_length=32), "train")
    assert len(list(documents)) == 2
    assert documents.tally.counts() == {"replaced_characters": 2}


@pytest.mark.parametrize("world_size", [2, 3, 4])  # 2 and 4 divide the shards, 3 strides the documents
def test_ranks_are_disjoint_and_together_complete(local, corpora, world_size):
    ranks = [
        list(open_documents(local, "train", shuffle_seed=1, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert all(ranks)
    assert Counter(itertools.chain(*ranks)) == Counter(corpora["json"].documents)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("world_size", slow_but((2,), [1, 2, 3]))
def test_resuming_twice_continues_with_exactly_the_next_row(local, tokenizer, layout, world_size):
    data = local.model_copy(update={"rows": layout})

    def opened():
        return open_rows(
            data, tokenizer, batch_size=2, vocab_size=300, rank=1 % world_size, world_size=world_size
        )

    with opened() as rows:
        straight = [next(rows).labels.tolist() for _ in range(40)]
    got, state = [], None
    for batches in (7, 9, 24):
        with opened() as rows:
            if state:
                rows.load_state_dict(json.loads(state))
            got += [next(rows).labels.tolist() for _ in range(batches)]
            state = json.dumps(rows.state_dict())
    assert got == straight


def test_one_split_for_both_is_divided_by_hash(local, corpora, tokenizer):
    data = local.model_copy(update={"heldout_split": "train"})
    documents = corpora["json"].documents
    assert list(open_documents(data, "train")) == [text for text in documents if not is_heldout(text)]
    assert heldout_rows(local, tokenizer, 10, vocab_size=300).tokens >= 10


def test_a_wrong_field_lists_those_present(local):
    with pytest.raises(Act24Error, match=r"shard 0, record 0: no field 'body'; set .* one of: text, url"):
        next(open_documents(local.model_copy(update={"text_field": "body"}), "train"))


def test_an_unknown_split_is_named(local):
    with pytest.raises(Act24Error, match=r"cannot open split 'test' of data set 'allenai/c4 en': .*test"):
        open_documents(local.model_copy(update={"heldout_split": "test"}), "heldout")


class NetworkOfItsOwn(Exception):
    """No OSError, known by the package that defines it, as the HTTP libraries' errors are."""

    __module__ = "httpx"


class Outage:
    """A clock that only waiting moves."""

    def __init__(self):
        self.waits = []

    def sleep(self, seconds):
        self.waits.append(seconds)

    def clock(self):
        return sum(self.waits)


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, NetworkOfItsOwn, EOFError, zlib.error])
def test_a_failing_network_is_waited_for_and_no_record_lost_or_repeated(error):
    fail_before = [0, 0, 3, 7, 7, 7, 9]  # records; the same one may fail repeatedly
    outage, how = Outage(), Reading()

    def shard(wanted):
        for index in range(10):
            if fail_before and fail_before[0] == index:
                fail_before.pop(0)
                raise error("gone")
            yield str(index) if wanted(index) else None

    read = hub.retried(shard, "c4", 120, how, outage.sleep, outage.clock)
    assert list(read(lambda index: index != 5)) == ["0", "1", "2", "3", "4", None, "6", "7", "8", "9"]
    assert not fail_before
    rounds = [1, 2, 1, 1, 2, 4, 1]  # doubling, and from the start again once a record came
    assert all(0.5 * r <= wait <= 1.5 * r for r, wait in zip(rounds, outage.waits, strict=True))
    assert how.tally.counts() == {"retries": 7}


def test_closing_ends_the_wait_for_a_network(local, tokenizer, monkeypatch, caplog):
    """The thread slept to the end of its wait, and the interpreter for it."""
    monkeypatch.setattr(hub, "load_stream", lambda *_: AwayStream())
    data = local.model_copy(update={"retry_seconds": 1e9})
    rows = open_rows(data, tokenizer, batch_size=2, vocab_size=300)
    asked = []
    assert rows.failure(1, lambda: asked.append(0) or len(caplog.records) == 2) is None
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "act24-data")
    rows.close()
    assert not thread.is_alive()
    assert len(asked) > 1
    assert "reading allenai/c4, split 'train' failed: no route; waited for 0 s so far" in caplog.text
    with pytest.raises(RuntimeError, match="the thread is closed"):  # and no wait for ever
        next(rows)


class AwayStream:
    num_shards = 1

    def shard(self, num_shards, index):
        raise ConnectionError("no route")


@pytest.mark.parametrize("seconds", [0, 100, 10_000])
def test_a_network_that_stays_away_ends_in_one_line(seconds):
    outage = Outage()

    def shard(wanted):
        yield "first"
        raise ConnectionError("no route\nto host")

    read = hub.retried(shard, "allenai/c4, split 'train'", seconds, Reading(), outage.sleep, outage.clock)
    records = read(lambda index: True)
    assert next(records) == "first"
    message = r"^reading allenai/c4, split 'train' failed \d+ times?: no route to host\. data\.retry_s"
    with pytest.raises(Act24Error, match=message):
        next(records)
    assert seconds <= outage.clock() <= seconds + 1.5 * hub.LONGEST_WAIT
    assert max(outage.waits, default=0) <= 1.5 * hub.LONGEST_WAIT


def test_an_outage_may_last(caplog):
    """A day of it used to pass without a word."""
    outage, failures = Outage(), iter(range(5000))

    def shard(wanted):
        if next(failures, None) is not None:
            raise ConnectionError("gone")
        yield "there again"

    read = hub.retried(shard, "c4", 1e9, Reading(), outage.sleep, outage.clock)
    assert list(read(lambda index: True)) == ["there again"]
    assert outage.clock() > 24 * 3600
    lines = [record.message for record in caplog.records if record.name == "act24"]
    assert lines[0] == "reading c4 failed: gone; waited for 0 s so far"
    assert len(lines) == 13  # at failures 1, 2, 4, …, 4096
    assert float(re.search(r"waited for (\d+) s", lines[-1])[1]) > 24 * 3600


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_of_this_machine_is_no_outage(number):
    """The cache's: it used to be waited for, as long as a network may be away."""

    def shard(wanted):
        raise OSError(number, os.strerror(number))
        yield

    read = hub.retried(shard, "c4", 1e9, Reading(), sleep=lambda seconds: pytest.fail("waited"))
    with pytest.raises(OSError, match=os.strerror(number)):
        next(read(lambda index: True))


def test_other_errors_are_not_retried():
    def shard(wanted):
        raise Act24Error("no field")
        yield

    with pytest.raises(Act24Error, match="no field"):
        next(
            hub.retried(shard, "c4", 120, Reading(), sleep=lambda seconds: pytest.fail("waited"))(
                lambda index: True
            )
        )


def test_offline_is_said_at_once_and_with_a_way_out(tmp_path):
    """In a process of its own: the libraries read HF_HUB_OFFLINE when they are imported."""
    program = """
from act24.errors import Act24Error
from act24.recipes import schema
from act24.tools.data import open_documents, open_tokenizer
for attempt in (
    lambda: open_documents(schema.Data(), "train"),
    lambda: open_tokenizer(schema.Data(source="builtin"), schema.Tokenizer(name="t5-base")),
):
    try:
        attempt()
    except Act24Error as error:
        print(str(error).replace("\\n", "NEWLINE"))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    data, tokenizer = run.stdout.splitlines()
    assert data.startswith("cannot open split 'train' of data set 'allenai/c4 en': ")
    assert data.endswith("without a network use data.source = 'builtin', 'files' or 'shards'")
    assert "HF_ENDPOINT names a mirror" in data
    assert "HF_ENDPOINT names a mirror" in tokenizer
    assert tokenizer.startswith("cannot load tokenizer 't5-base' from the Hub, and there is no such file: ")
    assert "NEWLINE" not in run.stdout
    assert all(". HF_ENDPOINT" in line and ".. " not in line for line in (data, tokenizer))


# ------------------------------------------------------------------------------------------ the commit


@pytest.fixture
def commits(local, monkeypatch):
    """The commits of the Hub's data set, the newest last; and those at which streams were opened."""
    newest, opened = ["a" * 40], []
    load_stream = hub.load_stream

    def load(dataset, subset, split, revision):
        opened.append(revision)
        return load_stream(dataset, subset, split, revision)

    monkeypatch.setattr(hub, "load_stream", load)
    monkeypatch.setattr(hub, "find_commit", lambda dataset: newest[-1])
    return newest, opened


def test_a_commit_is_pinned_once(local, commits):
    newest, opened = commits
    data = hub.pinned(local)
    assert data.revision == "a" * 40
    newest.append("b" * 40)
    assert hub.pinned(data) == data
    assert list(open_documents(data, "train"))
    assert opened == ["a" * 40]
    builtin = Data(source="builtin")
    assert hub.pinned(builtin) == builtin


def test_a_position_at_another_commit_is_refused(local, commits, tokenizer):
    newest, _ = commits
    with open_rows(hub.pinned(local), tokenizer, batch_size=1, vocab_size=300) as rows:
        state = next(rows).state
    newest.append("b" * 40)
    with (
        open_rows(hub.pinned(local), tokenizer, batch_size=1, vocab_size=300) as rows,
        pytest.raises(Act24Error, match=r"revision was 'a+' and is 'b+'"),
    ):
        rows.load_state_dict(state)


def test_prepared_data_go_on_at_the_commit_that_they_began_with(
    local, commits, tokenizer, tmp_path, monkeypatch
):
    newest, opened = commits
    monkeypatch.setattr("act24.tools.data.prepare.JOURNAL_TOKENS", 1)

    def stop(split, documents, tokens):
        if split == "train" and documents == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_shards(pinned_for(local, tmp_path / "out"), tokenizer, tmp_path / "out", progress=stop)
    newest.append("b" * 40)
    prepare_shards(pinned_for(local, tmp_path / "out"), tokenizer, tmp_path / "out")
    assert set(opened) == {"a" * 40}
    assert pinned_for(local, tmp_path / "another").revision == "b" * 40


def test_a_hub_that_cannot_be_asked_for_its_commit_is_one_line(local, monkeypatch):
    def fail(dataset):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "find_commit", fail)
    with pytest.raises(
        Act24Error, match=r"cannot open data set 'allenai/c4': no route to host\. HF_ENDPOINT names"
    ):
        hub.pinned(local)


def test_a_model_that_the_hub_does_not_give_is_one_line_that_names_mirrors(monkeypatch):
    from act24.tools.huggingface.any_model import open_folder

    def unreachable(name, **_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    line = r"^a/b is no folder here, .*HF_ENDPOINT names a mirror.*: no route to host$"
    with pytest.raises(Act24Error, match=line):
        open_folder("a/b")
