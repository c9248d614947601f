"""The tiny recipe and its text, written once, with a cache of their own for the tokenizer; the command."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny as tiny_recipe
from torch import fx, nn

from act24.passes.graph import check, clean_trace
from act24.passes.graph.shadow import Shadow
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


@pytest.fixture(scope="module", autouse=True)
def _equal_regions_are_checked_once() -> Iterator[None]:
    """To trace a block again for arguments that are None, and to run it beside its graph, is half of what a
    tiny run takes to begin. A class whose graph was found right is not asked again here, as it is in
    `tests/passes`."""
    region, none = check.Check.region, clean_trace._check_none

    def checked(self: check.Check, module: nn.Module, graph: fx.Graph) -> None:
        key = (type(module), module in self._given, str(graph), *_shapes(module))
        if key in _RIGHT:
            self.agreeing += 1
            return
        agreeing = self.agreeing
        region(self, module, graph)
        if self.agreeing > agreeing:
            _RIGHT.add(key)

    def checked_none(shadow: Shadow, graph: fx.Graph, beside: Any) -> None:
        key = (type(shadow.originals[shadow.root]), str(graph))
        if key not in _RIGHT:
            none(shadow, graph, beside)
            _RIGHT.add(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check.Check, "region", checked)
        patch.setattr(clean_trace, "_check_none", checked_none)
        yield


_RIGHT: set[tuple[Any, ...]] = set()


def _shapes(module: nn.Module) -> list[tuple[Any, ...]]:
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    return [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in named]


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
