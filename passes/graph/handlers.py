"""Where code catches what a value may raise: `try: … except`, `contextlib.suppress`, and managers of a user's
own. On a proxy nothing is raised, so that a graph has the way of one shape and never takes the other."""

from __future__ import annotations

import dis
from contextlib import suppress
from dis import Instruction
from functools import cache
from types import CodeType, FrameType
from typing import Any

from act24.passes.graph.surroundings import FOREIGN, package

#: What no shape or dtype of a value makes a tensor raise.
_HARMLESS = (AttributeError, KeyError, ImportError, StopIteration, NameError)
#: Between the beginning of a handler and its comparison with what was raised.
_NAMES = ("LOAD_", "BUILD_TUPLE")


class Tries:
    """Watches a forward.

    Attributes:
        found: something was computed where what it raises is caught.
    """

    def __init__(self) -> None:
        self.found = False
        self._open = list[Any]()

    def begins(self, frame: FrameType) -> None:
        """A function does: that of a context manager, maybe."""
        code = frame.f_code
        if code.co_name not in ("__enter__", "__exit__") or not code.co_varnames:
            return
        manager = frame.f_locals.get(code.co_varnames[0])
        if code.co_name == "__exit__":
            self._open = [one for one in self._open if one is not manager]
        elif _swallows(manager):
            self._open.append(manager)

    def computes(self, frame: FrameType, kind: str) -> None:
        """A node of some kind is made, in this frame or below."""
        if kind.startswith("call_") and not self.found:
            self.found = bool(self._open) or _is_tried(frame)


def _is_tried(frame: FrameType) -> bool:
    """Whether what runs in a frame at this moment may raise and be caught there."""
    code = frame.f_code
    if not code.co_exceptiontable or package(frame) in (*FOREIGN, "act24"):
        return False
    handlers = (handler for start, end, handler in _handlers(code) if start <= frame.f_lasti < end)
    return any(_catches(handler, frame.f_globals) for handler in handlers)


def _swallows(manager: Any) -> bool:
    """Whether a context manager may keep from its caller what is raised in it."""
    if isinstance(manager, suppress):
        return not all(issubclass(kind, _HARMLESS) for kind in vars(manager)["_exceptions"])
    generator = getattr(manager, "gen", None)
    frame = getattr(generator, "gi_frame", None)
    if frame is not None:  # of contextlib.contextmanager
        own = package(frame) not in FOREIGN
        return own and any(_catches(h, frame.f_globals) for _, _, h in _handlers(frame.f_code))
    leaves: Any = getattr(type(manager), "__exit__", None)
    code = getattr(leaves, "__code__", None)
    if code is None or leaves.__globals__.get("__name__", "").partition(".")[0] in (*FOREIGN, "act24"):
        return False
    return not _returns_nothing(code)


@cache
def _handlers(code: CodeType) -> tuple[tuple[int, int, tuple[tuple[Instruction, ...], ...]], ...]:
    """From where to where code is under an `except`, with what each clause compares with: names; none for
    one that takes all. Those of `with` and `finally` raise again and are not listed."""
    instructions = list(dis.get_instructions(code))
    place = {one.offset: index for index, one in enumerate(instructions)}
    found = []
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        at = place[entry.target]
        if instructions[at].opname == "PUSH_EXC_INFO" and (clauses := _clauses(instructions, place, at + 1)):
            found.append((entry.start, entry.end, clauses))
    return tuple(found)


def _clauses(
    instructions: list[Instruction], place: dict[int, int], at: int
) -> tuple[tuple[Instruction, ...], ...]:
    found: list[tuple[Instruction, ...]] = []
    while True:
        if instructions[at].opname == "POP_TOP":
            return (*found, ())
        start = at
        while instructions[at].opname.startswith(_NAMES):
            at += 1
        if instructions[at].opname != "CHECK_EXC_MATCH":
            return tuple(found)
        found.append(tuple(instructions[start:at]))
        at = place[instructions[at + 1].argval]  # where the jump goes if it is another one


def _catches(clauses: tuple[tuple[Instruction, ...], ...], names: dict[str, Any]) -> bool:
    builtins = names.get("__builtins__", {})
    builtins = builtins if isinstance(builtins, dict) else vars(builtins)
    for clause in clauses:
        loads = [one for one in clause if one.opname != "BUILD_TUPLE"]
        kinds = [names.get(one.argval, builtins.get(one.argval)) for one in loads]
        if not kinds or not all(isinstance(k, type) and issubclass(k, _HARMLESS) for k in kinds):
            return True
    return False


@cache
def _returns_nothing(code: CodeType) -> bool:
    instructions = list(dis.get_instructions(code))
    for before, one in zip([None, *instructions], instructions, strict=False):
        given = one if one.opname == "RETURN_CONST" else before if one.opname == "RETURN_VALUE" else None
        if given is not None and (given.opname not in ("LOAD_CONST", "RETURN_CONST") or given.argval):
            return False
    return True
