"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

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
