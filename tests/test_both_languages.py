"""Every page that is there in Chinese says what the English one says: same code, same figures, same names."""

from __future__ import annotations

import calendar
import re
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHINESE = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT, ROOT / "docs") for path in path.glob("*.zh.md")
)
#: Fenced blocks, and runs of indented lines.
_BLOCKS = re.compile(r"^```\w*\n.*?^```$|(?:^    [^\n]*\n|^\n(?=    ))+", re.S | re.M)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)]+)\)")
#: A number of its own: no part of 2:4, 130m, float16 or GPT-2.
_FIGURE = re.compile(r"(?<![A-Za-z\d.])(?<!\d:)(?<![A-Za-z]-)\d[\d,.]*+(?![A-Za-z]|:\d)")


_MONTHS = {f"{name} ": f"{number} " for number, name in enumerate(calendar.month_name) if name}


def english(page: str) -> str:
    return page.replace(".zh.md", ".md")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def code(text: str) -> list[str]:
    return [block.strip("\n") for block in _BLOCKS.findall(text) if block.strip()]


def sections(text: str) -> list[str]:
    """The prose and tables under each heading, without code."""
    return re.split(r"^#+ ", _BLOCKS.sub("", text), flags=re.M)


def spans(text: str) -> set[str]:
    """What stands in backticks: keys, options, commands, names of tests."""
    return {" ".join(span.split()) for span in _SPAN.findall(text)}


def figures(text: str) -> set[str]:
    """Numbers, apart from those in names and addresses."""
    text = _LINK.sub("]", _SPAN.sub("", text))
    for name, number in _MONTHS.items():
        text = re.sub(rf"\b{name}(?=\d{{4}})", number, text)
    return {number.rstrip(".,") for number in _FIGURE.findall(text)}


def figures_of_tables(text: str) -> list[str]:
    rows = [_SPAN.sub("", line) for line in text.splitlines() if line.startswith("|")]
    return [number.rstrip(".,") for row in rows for number in _FIGURE.findall(row)]


def test_the_pages_that_one_needs_first_are_there_in_chinese() -> None:
    tasks = re.findall(
        r"\((docs/[\w-]+\.md)\)", read("README.md").partition("a page a task")[2].partition("## ")[0]
    )
    generated = {"docs/recipe-keys.md"}
    assert {page.replace(".md", ".zh.md") for page in {*tasks, "README.md"} - generated} <= set(CHINESE)


@pytest.mark.parametrize("page", CHINESE)
def test_code_is_the_same_word_for_word(page: str) -> None:
    for here, there in zip_longest(code(read(page)), code(read(english(page)))):
        assert here == there


@pytest.mark.parametrize("page", CHINESE)
def test_figures_and_names_are_the_same_section_by_section(page: str) -> None:
    chinese, original = sections(read(page)), sections(read(english(page)))
    assert len(chinese) == len(original)
    for here, there in zip(chinese, original, strict=True):
        place = f"{page}: # {here.splitlines()[0] if here else ''}"
        assert figures(here) ^ figures(there) == set(), place
        assert figures_of_tables(here) == figures_of_tables(there), place
        assert spans(here) ^ spans(there) == set(), place


@pytest.mark.parametrize("page", CHINESE)
def test_each_page_leads_to_the_other_language_and_stays_in_its_own(page: str) -> None:
    name = Path(page).name
    assert read(page).splitlines()[2] == f"[English]({english(name)})"
    assert read(english(page)).splitlines()[2] == f"[中文]({name})"
    folder = (ROOT / page).parent
    others = [
        target for target in _LINK.findall(read(page)) if target.endswith(".md") and target != english(name)
    ]
    for target in others:
        chinese = target if target.endswith(".zh.md") else target.replace(".md", ".zh.md")
        assert target == chinese or not (folder / chinese).exists(), f"{target}: there is {chinese}"
