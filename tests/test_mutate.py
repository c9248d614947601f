"""Every mutation of `mutate.py` still finds its line, once, and its tests."""

import pytest
from mutate import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.what for mutation in MUTATIONS])
def test_a_mutation_finds_its_line(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert all((ROOT / name).is_file() for name in mutation.tests.split() if name.endswith(".py"))
