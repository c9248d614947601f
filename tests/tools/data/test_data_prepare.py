"""`prepare_shards` interrupted: it goes on where it was, keeps little open, and leaves nothing."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from children import exit_code

from act24.errors import Act24Error
from act24.recipes.schema import Data
from act24.tools.data import Tokenizer, data_from_argument, open_documents, prepare_shards
from act24.tools.data import prepare as module
from act24.tools.data.shards import TokenShards
from act24.tools.data.tokenizer import _named


class Killed(BaseException):
    """Ends a call at a chosen document."""


@pytest.fixture
def often(monkeypatch):
    """A journal entry after each document, a new shard after few."""
    monkeypatch.setattr(module, "JOURNAL_TOKENS", 1)
    monkeypatch.setattr(module, "SHARD_TOKENS", 150)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def straight(corpora, tokenizer, tmp_path, often):
    prepare_shards(corpora["json"].data(), tokenizer, tmp_path / "straight")
    return content(tmp_path / "straight")


def test_an_interrupted_call_goes_on_where_it_was(corpora, tokenizer, tmp_path, straight):
    """Ended after each of the documents in turn, twice in a row, it writes the same bytes."""
    out, data = tmp_path / "out", corpora["json"].data()
    total = sum(json.loads(straight["index.json"])["splits"][s]["documents"] for s in ("train", "heldout"))
    for moment in range(1, total, 5):
        done = []

        def end(split, documents, tokens, done=done, moment=moment):
            done.append((split, documents))
            if len(done) == moment:
                raise Killed

        calls = 0
        while not out.exists():
            calls += 1
            done.clear()
            try:
                prepare_shards(data, tokenizer, out, progress=end)
            except Killed:
                assert (tmp_path / "out.partial").exists() == (moment > 1 or calls > 1)
                if moment == 1:
                    break
        if out.exists():
            assert content(out) == straight
            assert calls >= total // moment
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_killed_process_goes_on(corpora, tokenizer_file, tmp_path):
    """SIGKILL at moments that nobody chose, until it is through."""
    data = corpora["json"].data()
    program = f"""
import os, signal, sys, time
import datasets
from pathlib import Path
from act24.recipes.schema import Data
from act24.tools.data import prepare as module, prepare_shards
from act24.tools.data.tokenizer import _named
module.JOURNAL_TOKENS, module.SHARD_TOKENS = 1, 150

def prepare(out):
    data = Data(**{data.model_dump(exclude_none=True)!r})
    prepare_shards(data, _named({str(tokenizer_file)!r}), out, progress=lambda *_: time.sleep(0.004))

out, kills = Path(sys.argv[1]), 0
while not out.exists():
    if (child := os.fork()) == 0:  # what is imported is imported once
        prepare(out)
        os._exit(0)
    # Longer each time: a machine that does much else gets through too.
    time.sleep(0.05 + 0.013 * (kills % 7) + 0.005 * kills)
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert kills < 100, "it never gets on"
prepare(Path(sys.argv[2]))  # last: it may start threads, which no fork takes along
print(kills)
"""
    command = [sys.executable, "-c", program, tmp_path / "out", tmp_path / "straight"]
    kills = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert kills > 0
    # The last kill may have come behind the last rename.
    with pytest.raises(Act24Error, match="exists already"):
        prepare_shards(data, _named(str(tokenizer_file)), tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["out", "straight"]


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_while_notes_are_removed_leaves_none(tmp_path, monkeypatch, moment):
    """The journal went first, and without it nobody knew what its leftovers and the lock were."""
    for name in ("index.json", module.JOURNAL, f"{module.JOURNAL}.tmp-0123456789ab", module.LOCK):
        (tmp_path / name).write_text("{}")
    unlink, calls = Path.unlink, [0]

    def killed(path, **options):
        calls[0] += 1
        if calls[0] == moment:
            raise Killed
        unlink(path, **options)

    with monkeypatch.context() as patch, contextlib.suppress(Killed, Act24Error):
        patch.setattr(Path, "unlink", killed)
        module.refuse_taken(tmp_path)
    with pytest.raises(Act24Error, match="exists already"):
        module.refuse_taken(tmp_path)
    assert os.listdir(tmp_path) == ["index.json"]


def prepares(data, tokenizer_file, out, documents):
    """Dies at a document of the training split, with many shards written; `heldout` has its entry by then."""
    module.SHARD_TOKENS = 150

    def dies(split, count, tokens):
        if split == "train" and count == documents:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare_shards(Data(**data), _named(str(tokenizer_file)), out, progress=dies)


def test_a_kill_before_the_first_entry_is_said_and_leaves_nothing(
    corpora, tokenizer, tokenizer_file, tmp_path, caplog
):
    """Its shards used to stay among those of a call that needs fewer, and it began anew without a word."""
    data, out = corpora["json"].data(), tmp_path / "out"
    arguments = (data.model_dump(exclude_none=True), tokenizer_file, out, 20)
    assert exit_code(prepares, *arguments) == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "out.partial").iterdir()}
    assert {"train-00000.bin", "train-00001.bin", "train-00002.bin"} < left
    assert "train" not in json.loads((tmp_path / "out.partial/journal.json").read_text())
    with caplog.at_level(logging.WARNING, logger="act24"):
        prepare_shards(data, tokenizer, out)
    assert [record.message for record in caplog.records] == [
        f"{out}.partial: the train split was cut off before its first {2**24} tokens were noted; "
        "it begins anew"
    ]
    prepare_shards(data, tokenizer, tmp_path / "straight")
    ours, theirs = (
        {name: file for name, file in content(folder).items() if name.startswith("train-")}
        for folder in (out, tmp_path / "straight")
    )
    assert ours == theirs
    assert sorted(os.listdir(tmp_path)) == ["out", "straight"]


def dies_at_the_last_rename(data, tokenizer_file, out, moment):
    replace = os.replace

    def killed(source, target):
        if target != out:  # a journal
            return replace(source, target)
        if moment == "behind":
            replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killed
    prepare_shards(Data(**data), _named(str(tokenizer_file)), out)


@pytest.mark.parametrize("moment", ["before", "behind"])
def test_a_kill_at_the_last_rename_loses_nothing(corpora, tokenizer_file, tmp_path, moment):
    """Before it, journal and lock were gone already: the same command found a folder of strangers."""
    data, out, written = corpora["json"].data(), tmp_path / "out", []
    tokenizer = _named(str(tokenizer_file))
    arguments = (data.model_dump(exclude_none=True), tokenizer_file, out, moment)
    assert exit_code(dies_at_the_last_rename, *arguments) == -signal.SIGKILL
    if moment == "before":
        prepare_shards(data, tokenizer, out, progress=lambda *where: written.append(where))
    else:
        with pytest.raises(Act24Error, match=f"^{out} exists already$"):
            prepare_shards(data, tokenizer, out)
    assert written == [], "nothing is tokenised twice"
    prepare_shards(data, tokenizer, tmp_path / "straight")
    assert content(out) == content(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["out", "straight"]


def test_a_name_that_is_taken_meanwhile_costs_nothing_that_was_written(corpora, tokenizer, tmp_path):
    data, out, written = corpora["json"].data(), tmp_path / "out", []

    def taken(split, documents, tokens):
        (out / "mine").mkdir(parents=True, exist_ok=True)

    with pytest.raises(Act24Error) as caught:
        prepare_shards(data, tokenizer, out, progress=taken)
    assert str(caught.value) == (
        f"{out}.partial is whole, but cannot become {out}: Directory not empty. "
        f"What is written stays in {out}.partial: the same command goes on from there"
    )
    assert os.listdir(out) == ["mine"]
    out.rename(tmp_path / "elsewhere")
    prepare_shards(data, tokenizer, out, progress=lambda *where: written.append(where))
    assert written == []
    prepare_shards(data, tokenizer, tmp_path / "straight")
    assert content(out) == content(tmp_path / "straight")


def test_little_is_open_at_any_time(corpora, tokenizer, tmp_path, often):
    counts = []
    prepare_shards(
        corpora["json"].data(),
        tokenizer,
        tmp_path / "out",
        progress=lambda *_: counts.append(len(os.listdir("/proc/self/fd"))),
    )
    assert len(list((tmp_path / "out").glob("train-0*"))) > 3
    assert max(counts) - counts[0] <= 2


def test_a_bad_record_costs_nothing_that_was_written(tokenizer, tmp_path, often):
    lines = [json.dumps({"text": f"low rank {index}"}) for index in range(300)]
    lines[250] = "not JSON"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "held.txt").write_text("sparse graph")
    data = Data(
        source="files",
        train_files=(str(tmp_path / "a.jsonl"),),
        heldout_files=(str(tmp_path / "held.txt"),),
    )
    out = tmp_path / "out"
    with pytest.raises(Act24Error) as caught:
        prepare_shards(data, tokenizer, out)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl, line 251: expected one JSON object a line")
    assert 'data.on_bad_record = "skip", or --skip-bad-records of `data prepare`, leaves' in str(caught.value)
    assert str(caught.value).endswith(
        f"What is written stays in {out}.partial: the same command goes on from there"
    )
    written = []
    skipping = data.model_copy(update={"on_bad_record": "skip"})
    index = prepare_shards(skipping, tokenizer, out, progress=lambda *where: written.append(where))
    assert index["splits"]["train"]["documents"] == 299
    assert next(documents for split, documents, _ in written if split == "train") > 150, "it went on"
    assert index["splits"]["train"]["remarks"] == ["of 299 documents read so far: 1 dropped record"]
    (said,) = (line for line in TokenShards(out, "train").remarks)
    assert said.endswith("1 dropped record")


@pytest.mark.parametrize("failure", ["a bad line", "the user"])
def test_a_small_corpus_is_kept_as_well(tokenizer, tmp_path, failure):
    """Far below the tokens behind which an entry is due."""
    lines = [json.dumps({"text": f"low rank {index}"}) for index in range(300)]
    lines += ["{bad"] if failure == "a bad line" else []
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = data_from_argument(str(tmp_path / "a.jsonl"))

    def end(split, documents, tokens):
        if failure == "the user" and (split, documents) == ("train", 200):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises((Act24Error, KeyboardInterrupt)) as caught:
        prepare_shards(data, tokenizer, out, progress=end)
    if failure == "a bad line":
        assert str(caught.value).endswith("out.partial: the same command goes on from there")
    written = []
    skipping = data.model_copy(update={"on_bad_record": "skip"})
    index = prepare_shards(skipping, tokenizer, out, progress=lambda *where: written.append(where))
    first = {split: next((n for s, n, _ in written if s == split), None) for split in ("heldout", "train")}
    if failure == "a bad line":  # met while the held-out split is written; that goes on
        assert first["heldout"] is None, "all of it was before that line"
    else:
        assert first == {"heldout": None, "train": 201}
    prepare_shards(skipping, tokenizer, tmp_path / "straight")
    assert content(out) == content(tmp_path / "straight")
    assert index["splits"]["train"]["documents"] + index["splits"]["heldout"]["documents"] == 300


@pytest.mark.parametrize(("bad", "enough"), [(10, True), (11, False)])
def test_too_many_bad_records_are_refused(tokenizer, tmp_path, bad, enough):
    lines = [json.dumps({"text": f"low rank {index}"}) for index in range(300)]
    lines[100 : 100 + bad] = ['{"txt": "low rank"}'] * bad
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = data_from_argument(str(tmp_path / "a.jsonl")).model_copy(update={"on_bad_record": "skip"})
    documents = open_documents(data, "train")
    if enough:
        assert len(list(documents)) + len(list(open_documents(data, "heldout"))) == 290
        assert documents.tally.dropped == 10
        return
    message = (
        r"11 of the first 111 records of .*a\.jsonl cannot be used: .* set data\.text_field to one of: txt"
    )
    with pytest.raises(Act24Error, match=message):
        list(documents)


def test_what_was_begun_with_other_data_is_refused(corpora, tokenizer, t5_backend, tmp_path, often):
    def end(split, documents, tokens):
        if documents == 3:
            raise Killed

    out, data = tmp_path / "out", corpora["json"].data()
    with pytest.raises(Killed):
        prepare_shards(data, tokenizer, out, progress=end)
    kept = content(tmp_path / "out.partial")
    for other, other_tokenizer, what in (
        (corpora["text"].data(), tokenizer, "files"),
        (data, Tokenizer(t5_backend, "t5"), "tokenizer"),
    ):
        with pytest.raises(Act24Error, match=rf"out\.partial was begun with other data \({what}\)"):
            prepare_shards(other, other_tokenizer, out)
        assert content(tmp_path / "out.partial") == kept
    with pytest.raises(Act24Error, match=r"begun with other data \(limit\)"):
        prepare_shards(data, tokenizer, out, max_heldout_tokens=5)
    (tmp_path / "out.partial/journal.json").write_text("[" * 10_000)
    with pytest.raises(Act24Error, match=r"cannot go on from .*journal\.json; remove .*: nested too deep"):
        prepare_shards(data, tokenizer, out)


ODD = {
    "a list": "[]",
    "a number": "5",
    "a split that is a number": '{"train": 5}',
    "a split that is none": '{"precious": {}}',
    "no place": '{"train": {"request": {}}}',
    "a count that is a text": ("tokens", "7"),
    "a count below zero": ("shard_bytes", -1),
    "a position that is none": ("position", {}),
    "shards that are none": ("shards", {"train-00000.bin": 5}),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_an_odd_journal_is_refused(corpora, tokenizer, tmp_path, often, odd):
    """A traceback, all of them."""

    def end(split, documents, tokens):
        if documents == 3:
            raise Killed

    out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal.json"
    with pytest.raises(Killed):
        prepare_shards(corpora["json"].data(), tokenizer, out, progress=end)
    if isinstance(odd, str):
        journal.write_text(odd)
    else:
        content = json.loads(journal.read_text())
        content["heldout"]["place"][odd[0]] = odd[1]
        journal.write_text(json.dumps(content))
    before = journal.read_text()
    with pytest.raises(
        Act24Error, match=r"^cannot go on from .*journal\.json; remove .*out\.partial to begin anew: "
    ):
        prepare_shards(corpora["json"].data(), tokenizer, out)
    assert journal.read_text() == before


def test_a_folder_of_somebody_else_stays(corpora, tokenizer, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/precious").touch()
    with pytest.raises(Act24Error, match=r"out\.partial is in the way"):
        prepare_shards(corpora["json"].data(), tokenizer, tmp_path / "out")
    assert os.listdir(tmp_path / "out.partial") == ["precious"]


@pytest.mark.parametrize("name", ["thesis.txt", "photos/cat.jpg", "train-00007.bin"])
def test_a_file_of_somebody_else_beside_what_was_begun_stays(corpora, tokenizer, tmp_path, name):
    """A folder with a file called `lock` in it used to be enough, and all was deleted or moved along."""
    path = tmp_path / "out.partial" / name
    path.parent.mkdir(parents=True)
    (tmp_path / "out.partial" / "lock").touch()
    if name.endswith(".bin"):
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("mine")
    with pytest.raises(
        Act24Error, match=rf"partial is in the way: .* did not write {name.partition('/')[0]}"
    ):
        prepare_shards(corpora["json"].data(), tokenizer, tmp_path / "out")
    assert os.path.lexists(path)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_what_somebody_puts_beside_while_it_is_written_is_not_deleted(corpora, tokenizer, tmp_path):
    def end(split, documents, tokens):
        (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
        raise Killed

    with pytest.raises(Killed):
        prepare_shards(corpora["json"].data(), tokenizer, tmp_path / "out", progress=end)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_two_at_once(corpora, tokenizer, tmp_path, often):
    data, out = corpora["json"].data(), tmp_path / "out"
    met = []

    def another(split, documents, tokens):
        if not met:
            with pytest.raises(Act24Error, match=r"another process is writing .*out\.partial") as caught:
                prepare_shards(data, tokenizer, out)
            met.append(caught)

    prepare_shards(data, tokenizer, out, progress=another)
    assert met
    assert os.listdir(tmp_path) == ["out"]
