"""Neighbours of the errors that somebody expected, each once a traceback, and where a command ends."""

import os
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from children import Command

from act24.errors import Act24Error
from act24.recipes.load import RecipeError, load_recipe, parse_recipe
from act24.recipes.schema import Data, Tokenizer
from act24.tools.commands.edge import ends_in_one_line
from act24.tools.commands.generate import read_prompts
from act24.tools.commands.recovery import _table
from act24.tools.data import open_tokenizer
from act24.tools.data.files import Reading, read_documents
from act24.tools.run.evaluate import check_overrides
from act24.tools.run.protocol import joined_text

DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"train.steps={DEEP}", "tables are too deep"),
        (f"train.steps={'1' * 5000}", "a number has too many digits"),
        (f"train.steps={'0x' + 'f' * 5000}", "an integer of more than 30 digits"),
        ("passes=[1, 2]", "passes.0: expected a table"),
        ("passes.0=1", "name a key of the pass"),
        ("optimizer.lr=1\nlog.every = 3", r"optimizer.lr: .*, got '1\\nlog.every = 3'"),
        (
            'data={source="builtin", rows="padded", max_length=1}',
            'rows = "padded" needs max_length of 2 or more',
        ),
    ],
)
def test_hostile_overrides(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("demo", [override])


def test_hostile_recipes(tmp_path):
    with pytest.raises(RecipeError, match="x: not valid TOML: tables are too deep"):
        parse_recipe(f"a = {DEEP}", "x")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.toml' cannot be read: Is a directory"):
        load_recipe(str(tmp_path / "folder.toml"))
    (tmp_path / "latin.toml").write_bytes(b'description = "\xe9"')
    with pytest.raises(RecipeError, match=r"latin\.toml' cannot be read: 'utf-8' codec"):
        load_recipe(str(tmp_path / "latin.toml"))
    (tmp_path / "utf16.toml").write_text("description = 'x'", encoding="utf-16")
    with pytest.raises(
        RecipeError, match=r"utf16\.toml' cannot be read: it is UTF-16 text: save it as UTF-8"
    ):
        load_recipe(str(tmp_path / "utf16.toml"))
    with pytest.raises(RecipeError, match="cannot be read: File name too long"):
        load_recipe("x" * 5000 + ".toml")
    with pytest.raises(RecipeError, match="cannot be read: embedded null byte"):
        load_recipe("\0.toml")


def test_a_byte_order_mark_is_no_part_of_what_a_person_wrote(tmp_path):
    """Some editors put one in front of every file that they save as UTF-8."""
    files = {
        name: tmp_path / name for name in ("base.toml", "own.toml", "patterns.toml", "p.jsonl", "text.txt")
    }
    files["base.toml"].write_text('extends = "demo"\ntrain.seed = 7\n', encoding="utf-8-sig")
    files["own.toml"].write_text('extends = "base.toml"\n', encoding="utf-8-sig")
    assert load_recipe(str(files["own.toml"])).train.seed == 7
    files["patterns.toml"].write_text('"model.layers.0.*" = "dense"\n', encoding="utf-8-sig")
    assert _table(files["patterns.toml"]) == {"model.layers.0.*": "dense"}
    files["p.jsonl"].write_text('{"prompt": "a"}\n', encoding="utf-8-sig")
    assert read_prompts(files["p.jsonl"]) == ["a"]
    files["text.txt"].write_text("a", encoding="utf-8-sig")
    assert joined_text([str(files["text.txt"])]) == "a"


@pytest.mark.parametrize(
    "words",
    [
        ("prune", "x", "--out", "y"),
        ("recover", "x", "--out", "y", "--blockwise"),
        ("eval", "x", "--protocol", "wikitext", "--seqlen", "8", "--text", "z"),
        ("generate", "x", "--prompt", "a"),
    ],
    ids=lambda words: words[0],
)
def test_a_device_that_is_none(act24, words):
    status, _, (line,) = act24(*words, "--device", "gpu")
    assert status == 2
    assert line.startswith("act24: device 'gpu': Expected one of cpu, cuda")


def test_a_seed_of_more_than_63_bits(act24, tmp_path):
    status, _, errors = act24("sample", tmp_path, "--seed", "99999999999999999999")
    assert status == 2
    assert "Invalid value for '--seed'" in "".join(errors)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/t.json", "~nobody-of-this-name"])
def test_a_home_of_nobody(name):
    with pytest.raises(Act24Error, match=r"cannot look for tokenizer .*home directory"):
        open_tokenizer(Data(source="builtin"), Tokenizer(name=name))


def test_a_vocabulary_beyond_memory(tmp_path, act24):
    command = ("data", "prepare", "builtin", tmp_path / "out", "--vocab-size", "99999999999999")
    status, _, errors = act24(*command)
    assert status == 2
    assert "--vocab-size" in " ".join(errors)
    (tmp_path / "a.txt").write_text("text " * 100)
    data = Data(source="files", train_files=(str(tmp_path / "a.txt"),))
    with pytest.raises(Act24Error, match=r"tokenizer\.vocab_size = 1048577: at most 1048576"):
        open_tokenizer(data, Tokenizer(vocab_size=2**20 + 1))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_parquet_page_with_a_flipped_byte(tmp_path, compression):
    path = tmp_path / "a.parquet"
    texts = [f"low rank {i}" for i in range(200)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression=compression)
    whole, refused = path.read_bytes(), 0
    for at in range(4, 400):
        content = bytearray(whole)
        content[at] ^= 0xFF
        path.write_bytes(content)
        try:
            read = list(read_documents(path, Reading(), lambda index: True))
        except Act24Error as error:
            refused += str(path) in str(error)
        else:
            assert len(read) == 200, "what it cannot notice is text, and as much of it"
    assert refused > 100


def test_eval_refuses_overrides_that_it_would_ignore():
    check_overrides(["eval.tokens=3", "data.heldout_files=[]", "train.batch_size=2", "train.dtype=float32"])
    with pytest.raises(Act24Error, match=r"eval ignores model\.vocab_size, optimizer\.lr: the check"):
        check_overrides(["model.vocab_size=3", "eval.tokens=3", "optimizer.lr=1"])


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


DENIED = PermissionError(13, "Permission denied", "/x/y")
NO_ASCII = UnicodeEncodeError("ascii", "ä", 0, 1, "not in range")
HINT = r" \(ACT24_TRACEBACK=1 shows where\)"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Act24Error("one\ntwo"), "act24: one\nact24: two\n"),
        (DENIED, rf"act24: failed: Permission denied: /x/y{HINT}\n"),
        (MemoryError(), rf"act24: out of memory: out of memory{HINT}\n"),
        (OutOfMemoryError("3 GiB"), rf"act24: out of memory: 3 GiB{HINT}; a smaller train\.batch_size .*\n"),
        (NO_ASCII, r"act24: failed: 'ascii' codec can't encode .*\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as exit, ends_in_one_line():
        raise error
    assert exit.value.code == 2
    assert re.fullmatch(line, capsys.readouterr().err)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("bug"), RecursionError(), OverflowError()])
def test_a_bug_is_a_traceback(error):
    with pytest.raises(type(error)), ends_in_one_line():
        raise error


def test_the_traceback_is_there_for_who_asks(capsys, monkeypatch):
    monkeypatch.setenv("ACT24_TRACEBACK", "1")
    with pytest.raises(SystemExit), ends_in_one_line():
        raise PermissionError(13, "Permission denied", "/x/y")
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def in_ascii():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def test_a_terminal_that_cannot_print_a_character():
    words = ("recipe", "show", "demo", "-s", "description=relu² → 2:4")
    with Command(*words, before=in_ascii) as command:
        status, out, errors = command.end()
    assert (status, errors) == (0, "")
    assert 'description = "relu? ? 2:4"' in out


def test_a_reader_that_went_away():
    command = [sys.executable, "-m", "act24", "recipe", "show", "demo"]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as stdout:
        run = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE)
    assert run.returncode == 1
    assert run.stderr == b""


def on_a_full_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def test_an_output_on_a_full_disk_is_one_line():
    with Command("recipe", "ls", before=on_a_full_disk) as command:
        status, _, errors = command.end()
    assert status == 2
    (line,) = errors.splitlines()
    assert line.startswith("act24: failed: No space left on device")
