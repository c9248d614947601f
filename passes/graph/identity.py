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
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

_FUNCTIONS = ("type", "id", "callable", "vars", "dir")
#: Of torch, and no functions but classes, which take a proxy's dtype for another one.
_CLASSES = ("finfo", "iinfo")
#: What a tensor has one of, and by which it is told.
_KINDS = (torch.dtype, torch.device, torch.layout)
_FACTS = {"dtype", "device", "layout", "requires_grad", "grad", "grad_fn", "is_leaf"}
#: They ask for whoever is given them, from C.
_BY_NAME = {"is_", "is_not"}
#: What an operand may be: found with a call alone, a local that is not there, or of a tensor.
_UNKNOWN, _UNBOUND, _OF_A_TENSOR = object(), object(), object()
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


def asks_any(code: CodeType) -> bool:
    """Whether code may ask what `asks_which` finds."""
    return bool(_BY_NAME & {*code.co_names} or _compared(code))


@cache
def asks_none(code: CodeType) -> bool:
    """Whether code compares with None what is no attribute of `self`."""
    instructions = list(dis.get_instructions(code))
    for place, instruction in enumerate(instructions):
        if instruction.opname == "IS_OP":
            operands = _before(instructions, place, 2)
            asks = any(_is_none(operands[end]) for end in (0, -1) if operands)
            operands = [one for one in operands if not _is_none(one)]
        elif asks := instruction.opname.endswith(("IF_NONE", "IF_NOT_NONE")):
            operands = _before(instructions, place, 1)
        else:
            continue
        of_self = [one.opname.startswith("LOAD_ATTR") for one in operands[1:]]
        if asks and not (of_self and all(of_self) and operands[0].argval == "self"):
            return True
    return False


def asks_which(frame: FrameType) -> str | None:
    """The question of a function that begins or ends which object something is that a tensor has, and that no
    local is. Where it cannot be followed without a call, it is told by what it is compared with, or by its
    name."""
    if by_name := _BY_NAME & {*frame.f_code.co_names}:
        return f"operator.{min(by_name)}()"
    for operands in _compared(frame.f_code):
        values = [_followed(operand, frame) for operand in operands]
        if any(value is _UNBOUND for value in values):
            continue
        for value, other, operand in zip(values, reversed(values), operands, strict=True):
            fact = isinstance(other, _KINDS) or any(one.argval in _FACTS for one in operand)
            if value is _OF_A_TENSOR or (value is _UNKNOWN and fact):
                text = ".".join(str(one.argval) for one in operand if one.opname.startswith("LOAD"))
                return f"'is' of '{text}'"
    return None


@cache
def _compared(code: CodeType) -> tuple[tuple[list[Instruction], list[Instruction]], ...]:
    """The instructions of both operands of each `is`, but of those with None."""
    instructions, found = list(dis.get_instructions(code)), []
    for place, instruction in enumerate(instructions):
        if instruction.opname == "IS_OP":
            second = _before(instructions, place, 1)
            first = _before(instructions, place - len(second), 1)
            if first and second and not _is_none(first[-1]) and not _is_none(second[-1]):
                found.append((first, second))
    return tuple(found)


def _followed(operand: list[Instruction], frame: FrameType) -> Any:
    """What an operand is, as far as it is a name and attributes that are found without a call."""
    value: Any = _UNKNOWN
    for number, one in enumerate(operand):
        name = one.argval
        if number == 0 and one.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_NAME")):
            value = frame.f_locals.get(name, _UNBOUND)
        elif number == 0 and one.opname == "LOAD_GLOBAL":
            value = frame.f_globals.get(name, frame.f_builtins.get(name, _UNBOUND))
        elif number == 0 and one.opname == "LOAD_CONST":
            value = name
        elif one.opname == "LOAD_ATTR":
            value = _attribute(value, name)
        else:
            return _UNKNOWN
        if value is _UNKNOWN or value is _UNBOUND:
            return value
        if issubclass(type(value), Tensor | fx.Proxy | Attribute):
            return _OF_A_TENSOR
    return value


def _attribute(of: Any, name: str) -> Any:
    """An attribute, looked up where it is kept."""
    held = getattr(of, "__dict__", {}) if isinstance(of, ModuleType) else _kept(of)
    for place in (held, *(held.get(key, {}) for key in ("_modules", "_parameters", "_buffers"))):
        if name in place:
            return dict.get(place, name) if isinstance(place, dict) else place[name]
    found = next((vars(base)[name] for base in type(of).__mro__ if name in vars(base)), _UNKNOWN)
    return _UNKNOWN if hasattr(type(found), "__get__") else found


def _kept(of: Any) -> Any:
    try:
        return object.__getattribute__(of, "__dict__")
    except (AttributeError, TypeError):
        return {}


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
