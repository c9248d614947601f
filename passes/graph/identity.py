"""Where code asks which object something is, or what the object itself is: `a is b`, `type(x)`, `id(x)`.

No class can answer for its objects there, so a proxy is told apart from the tensor that it stands for, and
two proxies from one tensor that is given twice. The questions stand in the bytecode, and what they are about
too, as far as it has a name. `is None` is none of them: what a missing argument changes is traced.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable
from dis import Instruction
from functools import cache
from types import CodeType, FrameType

_FUNCTIONS = ("type", "id", "callable", "vars", "dir")
#: Of torch, and no functions but classes, which take a proxy's dtype for another one.
_CLASSES = ("finfo", "iinfo")
_UNPACKS = ("UNPACK_SEQUENCE", "UNPACK_EX")
_PATTERNS = ("MATCH_SEQUENCE", "MATCH_MAPPING")


@cache
def identity_questions(code: CodeType) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The questions of one function, each with the local names in it."""
    instructions = list(dis.get_instructions(code))
    found = []
    for place, instruction in enumerate(instructions):
        if instruction.opname == "IS_OP":
            operands = _before(instructions, place, 2)
            if not any(_is_none(operands[end]) for end in (0, -1) if operands):
                found.append(("'is not'" if instruction.arg else "'is'", _names(operands)))
        elif instruction.argval in _FUNCTIONS and instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.append((f"{instruction.argval}()", _names(_call(instructions, place))))
        elif instruction.argval in _CLASSES and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found.append((f"{instruction.argval}()", _names(_call(instructions, place, depth=2))))
        elif instruction.opname in _PATTERNS:  # whose subject may have been put there long before
            found.append(("for a pattern of its parts", code.co_varnames))
        elif instruction.opname in ("UNPACK_SEQUENCE", "UNPACK_EX") and _is_caught(
            instruction, instructions, code
        ):
            found.append(("for the number of parts", _names(_before(instructions, place, 1))))
    return tuple((question, names) for question, names in found if names)


def reads_class(frame: FrameType) -> bool:
    """Whether what runs at this moment asks for an attribute or matches a class, and calls nothing."""
    return frame.f_code.co_code[frame.f_lasti] in (dis.opmap["LOAD_ATTR"], dis.opmap["MATCH_CLASS"])


def _before(instructions: list[Instruction], end: int, values: int) -> list[Instruction]:
    """The instructions that put so many values on the stack, the last of them before `end`."""
    start = end
    while values > 0 and start > 0:
        start -= 1
        values -= _effect(instructions[start])
    return instructions[start:end]


def _call(instructions: list[Instruction], start: int, depth: int | None = None) -> list[Instruction]:
    """The instructions from one that loads a function to the call of it; none where it is not called.

    Args:
        depth: what is on the stack then; None: what that instruction puts there.
    """
    depth, end = _effect(instructions[start]) if depth is None else depth, start
    while depth > 1 and end + 1 < len(instructions):
        end += 1
        depth += _effect(instructions[end])
    return instructions[start:end]


def _is_caught(instruction: Instruction, instructions: list[Instruction], code: CodeType) -> bool:
    """Whether what an instruction raises is looked at by an `except`, which is none of a `with`."""
    place = {one.offset: index for index, one in enumerate(instructions)}
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        if entry.start <= instruction.offset < entry.end:
            handler = [one.opname for one in instructions[place[entry.target] :][:4]]
            return handler[0] == "PUSH_EXC_INFO" and "WITH_EXCEPT_START" not in handler
    return False


def _effect(instruction: Instruction) -> int:
    arg = instruction.arg if instruction.opcode >= dis.HAVE_ARGUMENT else None
    return dis.stack_effect(instruction.opcode, arg, jump=False)


def _is_none(instruction: Instruction) -> bool:
    return instruction.opname == "LOAD_CONST" and instruction.argval is None


def _names(instructions: Iterable[Instruction]) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for instruction in instructions:
        if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_NAME")):
            given = instruction.argval
            names |= dict.fromkeys(given if isinstance(given, tuple) else (given,))
    return tuple(names)
