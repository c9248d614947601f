"""`act24 data prepare`: from a file, a folder or a recipe to shards on which a run trains."""

import os
import re
import sys

import pytest
from tiny import text

from act24.errors import Act24Error
from act24.tools.commands import prepare
from act24.tools.commands.cli import main
from act24.tools.commands.prepare import prepare_source
from act24.tools.data.shards import TokenShards
from act24.tools.run.train import train


def test_a_recipes_data_train_from_shards(tiny_file, tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "shards"
    monkeypatch.setattr(sys, "argv", ["act24", "data", "prepare", str(tiny_file), str(out)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0
    said = capsys.readouterr().out
    for split, documents in (("train", "4 documents"), ("heldout", "1 document")):
        shards = TokenShards(out, split)
        assert shards.documents == int(documents.split()[0])
        assert f"{split}: {shards.tokens:,} tokens in {documents}\n" in said
    overrides = re.findall(r"--set (\S+)", said.splitlines()[-1])
    assert overrides == ["data.source=shards", f'data.shards="{out}"', "tokenizer.name=bpe"]
    from_shards = train(tiny("train.steps=5", *overrides), tmp_path / "shards-run")
    from_text = train(tiny("train.steps=5"), tmp_path / "text-run")
    assert from_shards.evaluation.data == from_text.evaluation.data  # the same rows are held out
    assert from_shards.loss == pytest.approx(from_text.loss, abs=0.1)  # others come first: all are shuffled


def test_a_folder_with_a_vocabulary_of_its_own(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(100):
        (folder / f"{index}.txt").write_text(text(50, index))
    prepare_source(str(folder), tmp_path / "out", "bpe", 280, max_tokens=500, max_heldout_tokens=None)
    shards = TokenShards(tmp_path / "out", "train")
    last = shards.document(shards.documents - 1)
    assert (
        shards.tokens - 1 >= 500 > shards.tokens - 1 - len(last)
    )  # it stops after the document that gets there
    assert shards.read(0, shards.tokens).max() < 280
    assert "heldout: " in capsys.readouterr().out  # 5 % of the files, by their hash


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "no data source 'nowhere'"),
        ("nowhere.txt", r"no data file matches 'nowhere\.txt'"),
        ("nowhere.toml", r"recipe file 'nowhere\.toml' does not exist"),
    ],
)
def test_nothing_is_written_for_a_wrong_source(tmp_path, source, message):
    with pytest.raises(Act24Error, match=message):
        prepare_source(source, tmp_path / "out", "bpe", 300, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(tiny_file, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(Act24Error, match=f"{tmp_path} exists already"):
        prepare_source(str(tiny_file), tmp_path, "bpe", 300, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("dangling", "is a link to nowhere: name the folder itself"),
        ("linked", "is a link to folder: name the folder itself"),
        ("file", "exists already"),
        ("fifo", "exists already"),
        ("", "'.' is no name for a new folder: say what it is to be called"),
        (".", "'.' is no name for a new folder"),
        ("new/..", "'new/..' is no name for a new folder"),
        ("/", "'/' is no name for a new folder"),
        ("/proc", "/proc is where a disk is mounted: name a folder on it"),
    ],
)
def test_what_cannot_become_a_folder_is_refused_before_anything_is_read(
    tmp_path, monkeypatch, act24, out, message
):
    """The last rename found it out, after all the tokenising; a folder without a name was a traceback."""
    (tmp_path / "a.txt").write_text("some words " * 500)
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("folder")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "open_tokenizer", lambda *_: pytest.fail("it reads the text"))
    status, _, error = act24("data", "prepare", "a.txt", out, "--vocab-size", 300)
    assert (status, len(error)) == (2, 1)
    assert message in error[0]
    assert sorted(os.listdir(tmp_path)) == before
