"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from act24.errors import Act24Error

RecipeArgument = Annotated[str, typer.Argument(help="A recipe's name (act24 recipe ls) or a .toml file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key: train.steps=100. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ScaleOption = Annotated[
    bool,
    typer.Option(
        "--scale-steps", help="With --set train.steps=N: warm-up, restarts and from_step scale with it."
    ),
]


def refuse_ignored(options: Mapping[str, object], why: str) -> None:
    """Raises Act24Error, saying why, where one of these options was given."""
    if given := [name for name, value in options.items() if value not in (None, False, [])]:
        raise Act24Error(f"{', '.join(given)} would be ignored: {why}")


def refuse_ignored_keys(overrides: Sequence[str], keys: Sequence[str], why: str) -> None:
    """The same for `--set` of one of these keys."""
    given = {override.partition("=")[0].strip() for override in overrides}
    refuse_ignored({f"--set {key}": key in given for key in keys}, why)
