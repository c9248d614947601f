"""The tiny recipe and its text, written once, with a cache of their own for the tokenizer."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny as tiny_recipe


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield tiny_recipe.write_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_file: Path) -> tiny_recipe.Tiny:
    """`tiny("train.steps=3")` is the recipe with overrides."""
    return functools.partial(tiny_recipe.load_tiny, tiny_file)
