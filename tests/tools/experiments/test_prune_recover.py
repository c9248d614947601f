"""The rows of `make recover-demo`: which are made again, and what the page says."""

import json

import pytest

from act24.errors import Act24Error
from act24.tools.experiments import prune_recover
from act24.tools.experiments.prune_recover import STEPS, Budget, _statements, code_of, run
from act24.tools.run.protocol import Perplexity

BUDGET = Budget(samples=16, windows=16, steps=24, rows=4, length=512, fitted=40, epochs=1)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Names of rows that were made; nothing is pruned or trained."""
    names = []

    def make(name, *_):
        names.append(name)
        return name, 3.0

    def measure(model, files, seqlen, windows):
        return Perplexity(model, "wikitext", seqlen, windows, 0, text[0], 1.0, 10.0 + STEPS.index(model))

    text = ["t"]
    for name, value in {
        "CHARACTERS": 10,
        "documents": lambda root: ["two of four " * 4],
        "model_file": lambda: "model",
        "open_any": lambda source: source,
        "_made": make,
        "perplexity": measure,
    }.items():
        monkeypatch.setattr(prune_recover, name, value)

    def call(budget=BUDGET, evaluated="t"):
        names.clear()
        text[0] = evaluated
        run(tmp_path, tmp_path / "work", tmp_path / "page.md", budget)
        return [*names]

    return call


def test_rows_are_made_once(made, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "page.json"
    assert made() == [*STEPS]
    assert made() == []
    content = json.loads(rows.read_text())
    (cpu,) = content
    del content[cpu]["masked_lora"]
    rows.write_text(json.dumps(content))
    assert made() == ["masked_lora"]
    monkeypatch.setattr(prune_recover, "code_of", lambda name: "new" if name == "lora" else code_of(name))
    capsys.readouterr()
    assert made() == ["lora"]
    assert f"{cpu}, lora: the code of its method changed, made again" in capsys.readouterr().out
    assert "| `masked_lora`, merged | 20.00 | 3 |  |" in (tmp_path / "page.md").read_text()
    assert made(Budget(8, 16, 24, 4, 512, 40, 1)) == [*STEPS]


def test_rows_of_other_texts_do_not_stand_in_one_table(made, tmp_path):
    made()
    rows = tmp_path / "page.json"
    content = json.loads(rows.read_text())
    (column,) = content.values()
    del column["lora"]
    rows.write_text(json.dumps(content))
    page = (tmp_path / "page.md").read_text()
    with pytest.raises(Act24Error, match=r"page\.json has rows of another evaluation text"):
        made(evaluated="another")
    assert (json.loads(rows.read_text()), (tmp_path / "page.md").read_text()) == (content, page)


def test_each_kind_of_cpu_has_a_column(made, tmp_path, monkeypatch, capsys):
    """Instructions round otherwise. Rows of others stay, and go when they are old."""
    monkeypatch.setattr(prune_recover, "instructions", lambda: "AVX512")
    made()
    monkeypatch.setattr(prune_recover, "instructions", lambda: "AVX2")
    assert made() == [*STEPS]
    page = (tmp_path / "page.md").read_text()
    assert "| perplexity of | AVX512 | seconds | AVX2 | seconds | elsewhere |" in page
    assert "| wanda 2:4 | 11.00 | 3 | 11.00 | 3 | 179.5 |" in page
    assert "Not run yet" not in page
    monkeypatch.setattr(prune_recover, "code_of", lambda name: "new" if name == "lora" else code_of(name))
    capsys.readouterr()
    assert made() == ["lora"]
    said = capsys.readouterr().out
    assert "AVX512, lora: the code of its method changed, and AVX2 makes none: left out" in said
    page = (tmp_path / "page.md").read_text()
    assert "| `lora`, unmerged |  | | 14.00 | 3 | 82.1 |" in page
    assert "Not run yet with AVX512: `lora`, unmerged." in page


def test_code_is_what_is_done():
    """Comments and docstrings are none, and of a module only the functions that are named."""
    one = 'def f(x):\n    "Says."\n    return x + 1  # one\n\ndef g():\n    return 2\n'
    other = 'def f(x):\n    "Says more."\n    return x + 1\n\ndef g():\n    return 3\n'
    assert _statements(one, "f") == _statements(other, "f")
    assert _statements(one, "") != _statements(other, "")
    assert _statements(one, "f") != _statements(one.replace("+ 1", "+ 2"), "f")
    with pytest.raises(KeyError):
        _statements(one, "h")
    assert len({code_of(name) for name in STEPS}) == 7  # magnitude and Wanda are of one
