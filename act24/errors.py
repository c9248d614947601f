"""The one error family for mistakes that a user can mend, and the hint that goes with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Act24Error(Exception):
    """Bad input or a state of the outside world that the user can mend.

    The command line prints it as one line and exits with status 2; anything else that escapes is a bug.
    """


class PassError(Act24Error):
    """A pass that cannot be applied to this model, and why."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU had no memory left, in PyTorch's words, CUDA's or cuBLAS's. It may have some later on."""
    return "out of memory" in str(error).lower() or "ALLOC_FAILED" in str(error)


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


#: What reading a file or text of somebody else's making raises: no such file, not permitted, cut short
#: (EOFError), not the encoding or syntax (ValueError), nested too deep (RecursionError), too large.
_UNREADABLE = (OSError, EOFError, ValueError, RecursionError, MemoryError, OverflowError)


@contextmanager
def reading(failure: str, *also: type[Exception], error: type[Act24Error] = Act24Error) -> Iterator[None]:
    """One line for whatever reading something raises: `failure`, and the reason.

    Args:
        failure: names the file, or says what it is not: "cannot read a.txt".
        also: exceptions of the library that reads.
        error: the kind to raise.

    >>> with reading("cannot read x.json"):
    ...     raise EOFError("cut short")
    Traceback (most recent call last):
        ...
    act24.errors.Act24Error: cannot read x.json: cut short
    """
    try:
        yield
    except Act24Error:
        raise
    except (*_UNREADABLE, *also) as caught:
        raise error(f"{failure}: {reason(caught)}") from caught


def not_imported(error: ImportError, package: str) -> str:
    """Of a package that a user may lack: that it is not installed, or that it is and what its import lacks.

    >>> not_imported(ModuleNotFoundError("No module named 'gguf'", name="gguf"), "gguf")
    'is not installed'
    >>> not_imported(ModuleNotFoundError("No module named 'yaml'", name="yaml"), "gguf")
    "is installed and cannot be imported (No module named 'yaml')"
    """
    if error.name == package and error.path is None:  # a path: a file of it lacks a name that it wants
        return "is not installed"
    return f"is installed and cannot be imported ({reason(error)})"


def reason(error: BaseException) -> str:
    """An exception as one line that says something, its type where it has no text of its own."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:400] or type(error).__name__
