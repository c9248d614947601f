"""What a run shows while it goes on: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# A line into a pipe or a file stays whole; rich would break it, and squeeze tables, at 80 columns.
console = Console(width=None if sys.stdout and sys.stdout.isatty() else 10_000)
_PLAIN_SECONDS = 10.0  # between plain lines: a log file has no use for ten a second


class RunProgress:
    """Says where the run is. Only the main process has one that speaks.

    Attributes:
        silenced: why what is said reaches nobody, or "": a closed pipe, a terminal that hung up, a full disk.
    """

    def __init__(self, bar: Progress | None, first: int, steps: int, speaks: bool) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=steps, completed=first) if bar else None
        self._steps = steps
        self._speaks = speaks
        self._spoken = 0.0
        self.silenced = ""

    def update(self, step: int, figures: dict[str, str]) -> None:
        """Show the figures of a logged step."""
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        if self._bar is not None and self._task is not None:
            with self.watching():
                self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._spoken >= _PLAIN_SECONDS or step == self._steps:
            self._spoken = time.monotonic()
            self.say(f"step {step}/{self._steps}  {text}")

    def say(self, line: str) -> None:
        """Print one line that stays."""
        if self._speaks and not self.silenced:
            # Rich would colour numbers and break long lines, which a log file should not have.
            with self.watching():
                console.print(line, highlight=False, soft_wrap=True, markup=False)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notice that the reader is gone, which for rich is a reason to exit, or the output's disk full."""
        gone = "nobody reads the output any more"
        try:
            yield
        except OSError as error:
            known = error.errno in (errno.EPIPE, errno.EIO)
            self._fall_silent(gone if known else f"the output cannot be written: {error.strerror}")
        except SystemExit:
            self._fall_silent(gone)

    def _fall_silent(self, why: str) -> None:
        self.silenced = why
        with contextlib.suppress(OSError, ValueError):  # or the interpreter would try once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def run_progress(first: int, steps: int, speaks: bool) -> Iterator[RunProgress]:
    """The progress of a run from step `first` to `steps`."""
    if not (speaks and console.is_terminal):
        yield RunProgress(None, first, steps, speaks)
        return
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    bar = Progress(*columns, console=console, transient=True)
    progress = RunProgress(bar, first, steps, speaks)
    with progress.watching():
        bar.start()
    try:
        yield progress
    finally:
        with progress.watching():
            bar.stop()
