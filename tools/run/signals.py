"""Ask to stop: SIGTERM, SIGHUP and Ctrl-C end a run with a checkpoint, and with a status of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: What the command line exits with after a stop: EX_TEMPFAIL of sysexits.h. Whoever starts it again goes on;
#: no crash and no kill has this status. (`torchrun` makes 1 of every status but 0: `folder.note_stop`.)
STOPPED_STATUS = 75

_HANDLED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal came while there was nothing to save. Its text is the signal's name."""


class StopRequest:
    """Whether somebody asked to stop, and how.

    Attributes:
        signal: the name of the signal.
        at_once: a signal raises `Stopped` where it comes. Until the first step, which is how a run begins,
            that loses nothing; afterwards the loop has to look.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.at_once = True

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stopped_status(what: str = "stopped before the first step, nothing to save") -> Iterator[None]:
    """Around a command: `Stopped` is one line that says what became of the work, and a stop's status."""
    try:
        yield
    except Stopped as stop:
        print(f"act24: {stop}: {what}", file=sys.stderr)
        sys.exit(STOPPED_STATUS)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first of the signals into a request. What follows must not take the work from who saves it:
    one stop often arrives twice, from a scheduler and from `torchrun`, which passes on what it gets itself.

    So from then on SIGTERM and SIGHUP are ignored. A second Ctrl-C ends the process at once, also inside a
    library; below `torchrun` that is ignored too, and is the launcher's to heed. SIGKILL ends anything.

    A signal that is ignored stays so: `nohup` is how a user says that a hangup is to be ignored. Python heeds
    signals between its own instructions, so one that comes inside a library (a compilation) is heeded when
    that is done.
    """
    request = StopRequest()
    previous = {number: signal.getsignal(number) for number in _HANDLED}
    handled = [number for number, handler in previous.items() if handler is not signal.SIG_IGN]

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        for other in handled:
            insists = other == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ
            signal.signal(other, signal.SIG_DFL if insists else signal.SIG_IGN)
        if request.at_once:
            raise Stopped(request.signal)

    for number in handled:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number in handled:
            signal.signal(number, previous[number])
