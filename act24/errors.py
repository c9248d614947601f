"""The one error family for mistakes that a user can mend, and the hint that goes with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Act24Error(Exception):
    """Bad input or a state of the outside world that the user can mend.

    The command line prints it as one line and exits with status 2; anything else that escapes is a bug.
    """


class PassError(Act24Error):
    """A pass that cannot be applied to this model, and why."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for an unknown `name`: the closest valid choice, or the whole list when none is close.

    >>> nearest("activaton24", ["activation24", "relu2_ffn"])
    "did you mean 'activation24'?"
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"choose from {', '.join(choices)}" if choices else "there is none to choose from"
