"""The page of what becomes of each option of run_c4.py, from the one table of them, `act24.recipes.flags`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from act24.recipes.flags import FLAGS, OLD_SPELLINGS, REQUIRED, Flag

_BEGINNING = (
    "Written by `act24 recipe from-flags --markdown`, and compared by a test. For a whole command, `act24 "
    "recipe from-flags -- ARGUMENTS…` says what becomes of each of its options and what changes results; "
    "`METHOD` is `low_rank`, `cola` or `lost`, by `--optimizer`."
)


def markdown(say: Callable[[str], str] = str) -> str:
    """The page, docs/old-flags.md.

    Args:
        say: takes each message to the language of the page.
    """
    head = ("option", "default", "key of a recipe", "remark")
    lines = [f"# {say('Options of run_c4.py, and the keys of recipes')}", "", say("[中文](old-flags.zh.md)")]
    lines += ["", say(_BEGINNING), "", _row(map(say, head)), "|---|---|---|---|"]
    lines += [_row(map(say, _cells(flag))) for flag in FLAGS]
    lines += ["", f"## {say('Older spellings')}", "", _row(map(say, ("written", "means"))), "|---|---|"]
    for (name, value), (now, means) in OLD_SPELLINGS.items():
        lines.append(_row((_spelled(name, value), _spelled(now, means))))
    return "\n".join(lines) + "\n"


def _cells(flag: Flag) -> tuple[str, str, str, str]:
    default = "required" if flag.default is REQUIRED else "" if flag.default is None else f"`{flag.default}`"
    remark = f"never had an effect: {flag.remark}" if flag.unused else flag.remark
    key = flag.key.replace("{method}", "METHOD")
    return f"`--{flag.name}`", default, key and f"`{key}`", remark


def _spelled(name: str, value: str | None) -> str:
    return f"`--{name}`" if value is None else f"`--{name} {value}`"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
