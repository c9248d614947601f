"""A thread that no end of a process waits for in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

PATIENCE = 10.0  # seconds, of those that a scheduler leaves behind a stop: half a minute as a rule

P = ParamSpec("P")
T = TypeVar("T")

_own = threading.local()  # to a background thread: the event that it is to end


class Closed(BaseException):
    """Ends what a background thread waits in (`pause`); nobody is there to be told."""


class Background:
    """One thread that makes the calls it is given, in their order.

    The interpreter joins the threads of `concurrent.futures` before it ends, also one that waits for a
    network or for a disk that is away.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
        """What the call returns or raises, once it is made. Raises RuntimeError after `close`."""
        if self._closing.is_set():
            raise RuntimeError("the thread is closed")
        future: Future[T] = Future()
        self._calls.put((future, lambda: call(*arguments, **options)))
        return future

    def close(self) -> None:
        """End the thread, once the call at hand is done; calls that are not begun are cancelled.

        A `pause` ends at once. A call that takes longer than `PATIENCE` is left behind, and ends with the
        process."""
        self._closing.set()
        self._calls.put(None)
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        _own.closing = self._closing
        while self._next():
            pass

    def _next(self) -> bool:  # of its own: a thread that waits holds nothing of the last call
        if (given := self._calls.get()) is None:
            return False
        future, call = given
        if self._closing.is_set():
            future.cancel()
        elif future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        return True


def pause(seconds: float) -> None:
    """`time.sleep`, which in a background thread ends as soon as that is closed.

    Raises:
        Closed: it is closed.
    """
    closing: threading.Event | None = getattr(_own, "closing", None)
    if closing is None:
        time.sleep(seconds)
    elif closing.wait(min(seconds, threading.TIMEOUT_MAX)):
        raise Closed
