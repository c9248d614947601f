"""The tiny recipe and its text, written once, with a cache of their own for the tokenizer; the command."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import tiny as tiny_recipe

from act24.tools.commands.cli import main
from act24.tools.data import documents
from act24.tools.watch.heatmap import History


@pytest.fixture(autouse=True)
def _pictures_are_not_painted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes some ten milliseconds, and a tiny run makes four at every step. What is on them is for
    `tests/tools/watch`."""
    if "watch" not in request.path.parts:
        blank = numpy.zeros((1, 1, 3), numpy.uint8)
        monkeypatch.setattr(History, "picture", lambda history: blank)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield tiny_recipe.write_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def smaller_modules() -> Iterator[None]:
    """`data.source = "builtin"` without the large modules, four fifths of what is hashed and encoded."""
    files = [path for path in documents.builtin_files() if path.stat().st_size < 16_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "builtin_files", lambda: files)
        yield


@pytest.fixture
def tiny(tiny_file: Path) -> tiny_recipe.Tiny:
    """`tiny("train.steps=3")` is the recipe with overrides."""
    return functools.partial(tiny_recipe.load_tiny, tiny_file)


@pytest.fixture
def act24(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, list[str]]]:
    """Run a command line in this process: its status, stdout, and the lines on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["act24", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run
