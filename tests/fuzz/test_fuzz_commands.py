"""Command lines, in this process: the status is 0, 1 or 2 and nothing is a traceback."""

import contextlib
import io
import sys
from pathlib import Path

import pytest
from conftest import fuzzing
from damage import TOML_VALUES, WORDS
from hypothesis import given
from hypothesis import strategies as st

from act24.errors import Act24Error
from act24.recipes.load import load_recipe
from act24.tools.commands.cli import main
from act24.tools.run.train import train

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe(str(tiny.write_recipe(folder)), ["train.steps=5", "model.num_hidden_layers=1"])
    with contextlib.redirect_stdout(io.StringIO()):
        train(recipe, folder / "run")
    return folder / "run"


def words_only(word: str) -> bool:
    """What the kernel can pass: no zero bytes; and no tour of this machine."""
    return "\0" not in word and not word.startswith(("/", "..", "*", "[")) and word != "."


PLAIN = WORDS.filter(words_only)


def line(*words):
    """A command line: words as they are, and strategies for the others."""
    return st.tuples(*(st.just(word) if isinstance(word, str) else word for word in words))


def setting(key):
    return TOML_VALUES.map(lambda value: f"{key}={value}")


SAMPLE = ("sample", "RUN", "--tokens", "2")
PREPARE = ("data", "prepare", "text.txt", "out")
LINES = st.one_of(
    line("recipe", st.sampled_from(["show", "validate", "cp"]), PLAIN, PLAIN),
    line("recipe", "show", "demo", "--set", PLAIN),
    line("plan", "demo", "--set", setting("train.steps")),
    line(st.sampled_from(["eval", "sample", "export", "train", "plan"]), PLAIN),
    line("export", PLAIN, PLAIN),
    line("eval", "RUN", "--set", PLAIN),
    line("eval", "RUN", "--set", setting("eval.tokens")),
    line(*SAMPLE, "--prompt", PLAIN),
    line(*SAMPLE, st.sampled_from(["--temperature", "--top-k", "--seed"]), PLAIN),
    line("data", "prepare", PLAIN, "out"),
    line(*PREPARE, "--vocab-size", PLAIN),
    line(*PREPARE, st.sampled_from(["--tokenizer", "--max-tokens", "--encoding"]), PLAIN),
    line("data", "prepare", "lines.jsonl", "out", st.sampled_from(["--text-field", "--encoding"]), PLAIN),
    st.lists(PLAIN, max_size=4).map(tuple),
)


@fuzzing
@given(LINES)
def test_command_lines(tried, run_dir, tmp_path_factory, monkeypatch, words):
    folder = tmp_path_factory.mktemp("here")
    (folder / "text.txt").write_text("low rank, two of four\n" * 40)
    (folder / "lines.jsonl").write_text('{"text": "low rank, two of four"}\n' * 40)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [str(run_dir) if word == "RUN" else word for word in words]
    monkeypatch.setattr(sys, "argv", ["act24", *arguments])

    def work():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as exit:
                status = exit.code
        assert status in (0, 1, 2), f"status {status}"
        if status:
            raise Act24Error(err.getvalue() or out.getvalue())

    tried(work)
