"""What `act24 plan`, `doctor`, `recipe from-flags` and `act24.run_c4` say, in Chinese where that is wanted.

A message has one home, in English, where it comes about. `zh.toml` beside this file holds its Chinese by its
English template. A line is looked up as it stands, then held against the templates, those with most words of
their own first; what stands in a template's places is translated in turn. What is in no table, such as a name
or the text of an error, stays.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Annotated, Literal

import typer

Language = Literal["en", "zh"]
LangOption = Annotated[
    Language | None,
    typer.Option(
        "--lang", help="Of remarks and headings; default by the locale. Errors and JSON are English."
    ),
]

#: The environment's variables for the language of messages, the first that is set counts (POSIX).
_LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")

_PLACE = re.compile(r"\{(\w+)\}")
#: What a place of a template holds, by its name: a number; names, which stay as they are; several messages,
#: or one with a semicolon in it. All others hold one message or value.
_NUMBERS, _NAMES = ("count",), ("name", "names")
_SEVERAL = ("change", "oddity", "options", "paths", "places", "reasons", "remark", "summary", "why")


def language(chosen: Language | None, environment: Mapping[str, str] = os.environ) -> Language:
    """The language to speak: the one that was chosen, else Chinese in a Chinese locale, else English."""
    locale = next((environment[name] for name in _LOCALE if environment.get(name)), "")
    return chosen or ("zh" if locale.startswith("zh") else "en")


def speaker(chosen: Language | None) -> Callable[[str], str]:
    """What takes each message to the language to speak."""
    return chinese if language(chosen) == "zh" else str


def comments(text: str, say: Callable[[str], str]) -> str:
    """A file that begins with comments, those in another language."""
    lines = text.splitlines(keepends=True)
    above = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    said = [f"# {say(line[2:].rstrip())}".rstrip() + "\n" for line in above]
    return "".join((*said, *lines[len(above) :]))


@functools.cache
def messages() -> dict[str, dict[str, str]]:
    """`zh.toml`: the Chinese of each English template, by section."""
    return tomllib.loads(
        resources.files("act24.tools.commands").joinpath("zh.toml").read_text(encoding="utf-8")
    )


def chinese(text: str) -> str:
    """A message in Chinese, with the space that it is indented by; what is not known stays as it is."""
    body = text.lstrip(" ")
    return " " * (len(text) - len(body)) + _translated(body)


@functools.cache
def _translated(text: str) -> str:
    exact, patterns = _tables()
    if text in exact:
        return exact[text]
    for pattern, chinese in patterns:
        match = pattern.fullmatch(text)
        if match and all(_fits(name, value) for name, value in match.groupdict().items()):
            values = match.groupdict().items()
            return chinese.format(**{k: value if k in _NAMES else _translated(value) for k, value in values})
    for between, chinese in (("; ", "；"), (", ", ", ")):
        parts = _split(text, between)
        if len(parts) > 1:
            return chinese.join(map(_translated, parts))
    return text


def _fits(name: str, value: str) -> bool:
    """Whether a place may hold a value: no half of a pair of parentheses, no more messages than it is for."""
    depths = list(itertools.accumulate((c == "(") - (c == ")") for c in value))
    return min(depths) == 0 == depths[-1] and (name in _SEVERAL or len(_split(value, "; ")) == 1)


@functools.cache
def _tables() -> tuple[dict[str, str], list[tuple[re.Pattern[str], str]]]:
    """Messages without places; the others as patterns, those with the most words of their own first."""
    every = {english: chinese for section in messages().values() for english, chinese in section.items()}
    exact = {english: chinese for english, chinese in every.items() if not _PLACE.search(english)}
    templates = sorted(every.keys() - exact.keys(), key=lambda english: -len(_PLACE.sub("", english)))
    return exact, [(_pattern(english), every[english]) for english in templates]


def _pattern(template: str) -> re.Pattern[str]:
    parts = _PLACE.split(template)  # text, name, text, name, … text
    for index, part in enumerate(parts):
        holds = r"[\d,.]+" if part in _NUMBERS else ".+?"
        parts[index] = f"(?P<{part}>{holds})" if index % 2 else re.escape(part)
    return re.compile("".join(parts))


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that are in no parentheses."""
    parts, depth, begin = [], 0, 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth and text.startswith(separator, index):
            parts.append(text[begin:index])
            begin = index + len(separator)
    return [*parts, text[begin:]]
