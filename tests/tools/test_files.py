"""A file is the old one or the new one, whatever happens while it is written."""

import errno
from pathlib import Path

import pytest
import safetensors.torch
import torch

from act24.errors import Act24Error
from act24.tools.files import even_modes_, save_file, whole_file, whole_folder


def test_the_new_content_is_there_at_the_end_and_the_old_one_until_then(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_what_fails_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), whole_file(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise OSError("full")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_two_writers_do_not_write_into_one_file(tmp_path):
    path = tmp_path / "table.json"
    with whole_file(path) as one, whole_file(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"  # left last


def test_a_folder_that_is_not_there_is_the_callers_to_tell(tmp_path):
    with pytest.raises(OSError), whole_file(tmp_path / "none" / "table.json") as partial:  # noqa: PT011
        partial.write_text("new")


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "out"
    with whole_folder(out) as written:
        (written / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    full = OSError(errno.ENOSPC, "No space left on device")
    message = r"cannot write .*other: \[Errno 28\]"
    with pytest.raises(Act24Error, match=message), whole_folder(tmp_path / "other") as written:  # noqa: PT012
        (written / "a").write_text("1")
        raise full
    with pytest.raises(Act24Error, match="cannot write"), whole_folder(out) as written:  # taken since
        (written / "a").write_text("2")
    assert (out / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_have_the_mode_of_any_new_file(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    (tmp_path / "config.json").touch()
    save_file(tensors, tmp_path / "ours.safetensors", {"format": "pt"})
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    (tmp_path / "theirs.safetensors").chmod(0o600)  # as its versions of now leave it
    even_modes_(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    assert torch.equal(safetensors.torch.load_file(tmp_path / "ours.safetensors")["a"], tensors["a"])


def test_nothing_else_here_writes_weights_by_safetensors_itself():
    tools = Path(__file__).parents[2] / "tools"
    calls = ("safetensors.torch.save_file", "from safetensors.torch import save_file", ".save_pretrained(")
    by_call = {
        call: {path.name for path in tools.rglob("*.py") if call in path.read_text()} for call in calls
    }
    assert by_call == {
        calls[0]: {"files.py"},
        calls[1]: set(),
        # trainer.py is for transformers' own Trainer, whose checkpoints are its; by_transformers.py writes a
        # tokenizer into a temporary folder; folder.py says it in a refusal; prune_memory.py draws a model as
        # transformers would have written it.
        calls[2]: {
            *("any_model.py", "export.py", "model_type.py"),
            *("trainer.py", "by_transformers.py", "folder.py", "prune_memory.py"),
        },
    }
