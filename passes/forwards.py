"""Forwards of a watched model that have begun and not ended: within each other, and in several threads.

PyTorch calls no hook behind a forward that Ctrl-C ended. Such a one is found by the frame that called it,
which is on the stack of its thread no more.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from torch import nn

from act24.errors import Act24Error

#: What a forward computes: what is served, a micro-batch of an update, or whatever the model is lowered to.
Kind = Literal["served", "trains", "runs"]

#: Whose frames are those of a hook, and not of what calls it.
_OF_HOOKS = ("act24.passes.", "torch._dynamo.")


@dataclass(eq=False)
class Forward:
    """One of them.

    Attributes:
        module: whose it is.
        kind: what it computes, where it is not a part of another.
        thread: where it runs, by its `ident`.
        frame: what called the hook. It is kept, so that no other one can lie where it lay.
    """

    module: nn.Module
    thread: int
    frame: FrameType
    kind: Kind | None = None


class Forwards:
    """Those of one pipeline's model.

    Attributes:
        lock: to be held from one question to the act that follows from its answer.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._running: list[Forward] = []
        self._served: ExitStack | None = None  # what those that are served have entered, together

    def begin(self, module: nn.Module) -> tuple[Forward, Forward | None]:
        """A forward begins: it, and the innermost of this thread that it is a part of."""
        self._drop_ended()
        this = Forward(module, threading.get_ident(), _caller())
        outer = next((one for one in reversed(self._running) if one.thread == this.thread), None)
        self._running.append(this)
        return this, outer

    def elsewhere(self) -> set[Kind]:
        """What forwards of other threads compute."""
        here = threading.get_ident()
        return {one.kind for one in self._running if one.thread != here and one.kind is not None}

    def serve(self, context: AbstractContextManager[None]) -> None:
        """Enter what forwards that are served need, until the last of them has ended; once."""
        if self._served is None:
            entered = ExitStack()
            entered.enter_context(context)
            self._served = entered

    def end(self, module: nn.Module) -> Forward | None:
        """A forward has ended: it; None: none was begun."""
        here = threading.get_ident()
        for one in reversed(self._running):
            if one.thread == here and one.module is module:
                self._running.remove(one)
                self._drop_ended()
                return one
        return None

    def settle(self) -> None:
        """State is read or written: it has to be what it is between forwards.

        Raises:
            Act24Error: a forward that is served has not ended.
        """
        self._drop_ended()
        if self._served is not None:
            raise Act24Error(
                "a forward of this model in evaluation mode has not ended, here or in another thread, and "
                "until then its state is that of evaluation: save, copy, lower or train the model afterwards"
            )

    def _drop_ended(self) -> None:
        if self._running:
            tops = sys._current_frames()
            stacks = {one.thread: {*_stack(tops.get(one.thread))} for one in self._running}
            self._running = [one for one in self._running if one.frame in stacks[one.thread]]
            # This frame is among them. What holds itself is left to the garbage collector, and with it all
            # that the frames around it hold: activations, on a GPU.
            del tops, stacks
        if self._served is not None and not any(one.kind == "served" for one in self._running):
            served, self._served = self._served, None
            served.close()


class OneCall:
    """Of each thread, the outermost call of a model."""

    def __init__(self) -> None:
        self._here = threading.local()

    def begin(self) -> None:
        """It begins: asked by a hook before it."""
        self._here.frame = _caller()

    def goes_on(self) -> bool:
        """Whether it has begun and not ended."""
        call: FrameType | None = getattr(self._here, "frame", None)
        return call is not None and any(frame is call for frame in _stack(sys._getframe()))

    def end(self) -> None:
        """A call has ended, this one or another within it: asked by a hook behind it."""
        if self._here.__dict__.get("frame") is _caller() or not self.goes_on():
            self._here.frame = None  # or it would keep what it computed


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _caller() -> FrameType:
    """The frame that called a hook, which is there until the module's call has ended."""
    stack = _stack(sys._getframe())
    return next(f for f in stack if not f.f_globals.get("__name__", "").startswith(_OF_HOOKS))
