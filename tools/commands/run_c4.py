"""Training by a command of run_c4.py: translated, told what changes, and run.

    torchrun --nproc_per_node 1 -m act24.run_c4 --model_config … --optimizer cola_adamw …
    ACT24_SET="data.source=builtin train.steps=100" torchrun … -m act24.run_c4 …
    torchrun … -m act24.run_c4 … -- --set data.source=builtin --lang zh

The same command goes on where its run was interrupted. `--save_dir` is the run's folder, and
`--continue_from` a folder that the old code left, with whose weights the run begins, as it did there: the
optimizer and the schedule begin anew.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from act24.errors import Act24Error, nearest
from act24.tools.commands.chinese import Language, chinese, comments, speaker
from act24.tools.commands.edge import ends_in_one_line

if TYPE_CHECKING:
    from act24.recipes.schema import Recipe
    from act24.tools.run.train import Outcome

#: More overrides, separated as a shell separates words.
SET = "ACT24_SET"

#: The options that are act24's own.
_BEHIND = ("--set", "-s", "--lang")

#: In the run's folder beside recipe.toml: what became of each option.
TRANSLATED = "from-flags.toml"


def main() -> None:
    """Run the command line: user errors are one line and status 2, anything else is a bug."""
    from act24.tools.run.signals import STOPPED_STATUS, stopped_status

    with ends_in_one_line(), stopped_status():
        if {"--help", "-h"} & {*sys.argv[1:]}:
            print(
                f"{__doc__}\nThe options are those of run_c4.py: docs/old-flags.md says what becomes of each."
            )
        elif run(sys.argv[1:]).stopped:
            sys.exit(STOPPED_STATUS)  # start it again, and it goes on


def run(arguments: Sequence[str]) -> Outcome:
    """Train by the arguments of a run_c4.py command.

    Args:
        arguments: its options; behind `--`, overrides of the recipe as `--set KEY=VALUE`, and `--lang`.

    Raises:
        Act24Error: whatever is wrong with the command, the overrides or the run.
    """
    from act24.recipes.from_flags import recipe_from_flags
    from act24.recipes.load import parse_recipe
    from act24.tools.commands.show import show_outcome
    from act24.tools.files import whole_file
    from act24.tools.run.processes import own_rank
    from act24.tools.run.train import train

    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    for name in (word.partition("=")[0] for word in arguments[:split]):
        if name in _BEHIND:
            raise Act24Error(f"{name} is no option of run_c4.py: those of act24, as {name}, stand behind --")
    given, chosen = _options(arguments[split + 1 :])
    overrides, say = [*_words(os.environ.get(SET, "")), *given], speaker(chosen)
    translation = recipe_from_flags(arguments[:split])
    recipe = parse_recipe(translation.text, "the recipe of this command", overrides)
    folder = Path(translation.save_dir) if translation.save_dir else _default_folder(recipe)
    if own_rank() == 0:
        for line in translation.changes:
            print(say(f"changes results: {line}"), file=sys.stderr)
        for line in overrides:
            print(say(f"set: {line}"), file=sys.stderr)
    weights = Path(translation.continue_from) if translation.continue_from else None
    with _in_words_of_this_command(folder):
        _refuse_others_file(folder / TRANSLATED, comments(translation.text, str).partition("\n")[0])
    with _in_words_of_this_command(folder):
        outcome = train(recipe, folder, resume="auto", weights=weights)
    if outcome.is_main:
        with whole_file(folder / TRANSLATED) as partial:
            partial.write_text(comments(translation.text, say), encoding="utf-8")
    show_outcome(recipe, outcome, folder)
    return outcome


@contextmanager
def _in_words_of_this_command(folder: Path) -> Iterator[None]:
    """What is to be done about a run is said in options of `act24 train`: here its folder is that of
    `--save_dir`, and `--resume` is the other command's alone."""
    try:
        yield
    except Act24Error as error:
        own = shlex.quote(str(folder))
        text = (
            str(error)
            .replace("with --run-dir", "with --save_dir")
            .replace("another --run-dir", "another --save_dir")
        )
        text = text.replace("with --resume", f"with act24 train {own}/recipe.toml --run-dir {own} --resume")
        raise type(error)(text) from error


def _refuse_others_file(path: Path, head: str) -> None:
    """Raises Act24Error for a file that no run wrote where this one will write."""
    from act24.tools.checkpoints.reading import contents_of
    from act24.tools.files import is_plain
    from act24.tools.run.history import in_the_way

    if os.path.lexists(path):
        with contents_of(path):
            mine = is_plain(path) and path.read_text(encoding="utf-8").startswith(
                (head, comments(head, chinese))
            )
        if not mine:
            raise Act24Error(in_the_way(path))


def _default_folder(recipe: Recipe) -> Path:
    """A folder for this recipe and no other, so that the same command goes on where it was."""
    from act24.recipes.load import dump_recipe

    digest = hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:8]
    return Path("runs") / f"run_c4-{recipe.optimizer.name}-{digest}"


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise Act24Error(f"{SET}: {error}: {text}") from None


def _options(words: Sequence[str]) -> tuple[list[str], Language | None]:
    """What stands behind `--`: the overrides, and the language of remarks."""
    overrides, chosen, rest = [], None, list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name not in _BEHIND or not (equals or rest):
            raise Act24Error(
                f"behind -- stand overrides of the recipe, --set KEY=VALUE, or --lang zh, and not '{word}'"
            )
        value = value if equals else rest.pop(0)
        if name != "--lang":
            overrides.append(value)
        elif value in get_args(Language):
            chosen = cast(Language, value)
        else:
            raise Act24Error(f"--lang {value}: {nearest(value, get_args(Language))}")
    return overrides, chosen
