"""Reading the arguments of `run_c4.py`: old spellings, abbreviations, values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from act24.errors import nearest
from act24.recipes.flags import BY_NAME, FALSE, OLD_SPELLINGS, TRUE, Flag
from act24.recipes.load import RecipeError


def parse_flags(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of the options given, and remarks on their spelling.

    Args:
        arguments: as for `act24.recipes.from_flags.recipe_from_flags`.

    Raises:
        RecipeError: an option that is unknown or ambiguous, lacks its value or has one it cannot have.
    """
    words = [word for word in arguments if word.strip() not in ("", "\\")]
    before = next((i for i, word in enumerate(words) if _is_option(word)), len(words))
    script = next((i for i in range(before) if words[i].endswith((".py", "act24.run_c4"))), -1)
    remarks = []
    if any(word.startswith(("--nproc_per_node", "--nproc-per-node")) for word in words[: script + 1]):
        remarks.append("processes are not of the recipe: torchrun --nproc-per-node N -m act24 train …")
    given: dict[str, Any] = {}
    rest = list(reversed(words[script + 1 :]))
    while rest:
        word = rest.pop()
        if not word.startswith("--"):
            raise RecipeError(f"'{word}' belongs to no option")
        written, equals, value = word[2:].partition("=")
        name = _full_name(written.replace("-", "_"))
        if name in BY_NAME and BY_NAME[name].kind == "flag":
            if equals:
                raise RecipeError(f"--{written} takes no value, not '{value}': leave it out for False")
            given[name] = True
            continue
        if not equals:
            if not rest or rest[-1].startswith("--"):
                raise RecipeError(f"--{written} needs a value")
            value = rest.pop()
        old = OLD_SPELLINGS.get((name, value.lower())) or OLD_SPELLINGS.get((name, None))
        if old:
            name, spelled = old[0], old[1] or value
            remarks.append(f"--{written} {value} is an old spelling of --{name} {spelled}")
            value = spelled
        elif name not in BY_NAME:
            raise RecipeError(f"--{written} takes {_article('bool')}, not '{value}'")
        given[name] = _value(BY_NAME[name], value)
    return given, remarks


def _is_option(word: str) -> bool:
    """Whether a word is an option of the script, and not one of what starts it."""
    name = word[2:].partition("=")[0].replace("-", "_")
    return word.startswith("--") and bool(name) and any(known.startswith(name) for known in _names())


def _names() -> set[str]:
    return {*BY_NAME, *(old for old, _ in OLD_SPELLINGS)}


def _full_name(written: str) -> str:
    """The option that was meant: itself, an old name, or as argparse does the one that begins so."""
    names = _names()
    if written in names:
        return written
    beginnings = [name for name in BY_NAME if name.startswith(written)]
    if len(beginnings) == 1:
        return beginnings[0]
    if beginnings:
        raise RecipeError(f"--{written} may be {' or '.join(f'--{name}' for name in beginnings)}")
    raise RecipeError(f"run_c4.py has no option --{written}: {nearest(written, names)}")


def _value(flag: Flag, text: str) -> Any:
    try:
        if flag.kind == "bool":
            if text.lower() not in TRUE + FALSE:
                raise ValueError
            return text.lower() in TRUE
        if flag.choices and text not in flag.choices:
            raise RecipeError(f"--{flag.name} {text}: {nearest(text, flag.choices)}")
        if flag.kind == "tokens":
            number, unit = re.fullmatch(r"([\d.]+)([KMBkmb]?)", text).groups()  # type: ignore[union-attr]
            return int(float(number) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[unit.lower()])
        if flag.name == "optimizer":
            return text.lower()
        return {"int": int, "float": float, "str": str}[flag.kind](text)
    except (ValueError, OverflowError, AttributeError):
        raise RecipeError(f"--{flag.name} takes {_article(flag.kind)}, not '{text}'") from None


def _article(kind: str) -> str:
    return {
        "bool": "True or False",
        "int": "a whole number",
        "float": "a number",
        "tokens": "a number with K, M or B behind it",
    }[kind]
