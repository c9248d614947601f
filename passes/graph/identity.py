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


def _call(instructions: list[Instruction], start: int) -> list[Instruction]:
    """The instructions from one that loads a function to the call of it; none where it is not called."""
    depth, end = _effect(instructions[start]), start
    while depth > 1 and end + 1 < len(instructions):
        end += 1
        depth += _effect(instructions[end])
    return instructions[start:end]


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
