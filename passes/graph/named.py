"""What the code of functions names: globals, attributes, and strings by which it may ask for attributes."""

from __future__ import annotations

import dis
import functools
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

#: Functions that ask for an attribute by its name, by the position of that among their arguments.
_ASK = {"getattr": 1, "hasattr": 1, "attrgetter": 0, "methodcaller": 0, "getattr_static": 1}
#: What reads an attribute past the object that has it.
PAST = {"__getattribute__", "getattr_static"}
#: What reads all that an object holds.
_ALL = {"__dict__", "vars", "dir", "asdict", "_asdict", "astuple", "fields", "getmembers", "__getattribute__"}
#: Instructions that read a global.
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
#: Those that read, write or delete an attribute, or import one.
_ATTRIBUTE = re.compile(r"_ATTR$|^LOAD_METHOD$|^IMPORT_FROM$")
_WORD = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Named:
    """What the code of functions names.

    Attributes:
        names: of attributes, and strings that may be such; globals are `global_names`.
        asked: those that getattr or hasattr may ask for.
        constants: integers and strings in it.
        dynamic: it makes up names, or reads all that an object holds.
    """

    names: frozenset[str] = frozenset()
    asked: frozenset[str] = frozenset()
    constants: frozenset[Any] = frozenset()
    dynamic: bool = False

    def __or__(self, other: Named) -> Named:
        return Named(
            self.names | other.names,
            self.asked | other.asked,
            self.constants | other.constants,
            self.dynamic or other.dynamic,
        )


def named(codes: Mapping[CodeType, Mapping[str, Any]]) -> Named:
    """What some functions name.

    Args:
        codes: their code, with their globals.
    """
    found = functools.reduce(Named.__or__, map(_named, codes), Named())
    renamed = any(
        _is_renamed(name, scope.get(name)) for code, scope in codes.items() for name in global_names(code)
    )
    return found | Named(dynamic=renamed)


@functools.lru_cache(maxsize=4096)
def global_names(code: CodeType) -> frozenset[str]:
    """The globals that code reads, by its instructions: its `co_names` are also those of attributes. What a
    function inside of it reads is that one's own code."""
    names = {one.argval for one in dis.get_instructions(code) if one.opname in _GLOBAL}
    if "globals" in names:
        names |= {text for text in code.co_consts if isinstance(text, str) and text.isidentifier()}
    return frozenset(names)


def _is_renamed(name: str, value: Any) -> bool:
    """Whether a global is one of the functions above under another name."""
    own = getattr(value, "__name__", name) if callable(value) else name
    known = getattr(value, "__module__", "") in ("builtins", "operator", "dataclasses", "inspect")
    return own != name and known and (own in _ASK or own in _ALL)


@functools.lru_cache(maxsize=4096)
def _named(code: CodeType) -> Named:
    flat = [c for held in code.co_consts for c in (held if isinstance(held, tuple) else (held,))]
    constants = frozenset(c for c in flat if isinstance(c, int | str))
    texts = [c for c in constants if isinstance(c, str)]
    names = {*code.co_names}
    words = {c for c in texts if c.isidentifier()}
    dynamic = not _ALL.isdisjoint(names)
    if names & _ASK.keys():
        words |= {part for c in texts if all(p.isidentifier() for p in c.split(".")) for part in c.split(".")}
        dynamic = dynamic or _makes_up(code) or not words
    if "format" in names:
        fields = {part for text in texts for part in _fields(text)}
        words |= fields
        dynamic = dynamic or not any("{" in text for text in texts)
    asks = bool({"getattr", "hasattr"} & names)
    attributes = {one.argval for one in dis.get_instructions(code) if _ATTRIBUTE.search(one.opname)}
    return Named(frozenset(words | attributes), frozenset(words if asks else ()), constants, dynamic)


def _fields(text: str) -> Iterable[str]:
    """The attributes that `str.format` reads by a text, as `{0.scale}` has them."""
    try:
        fields = [field or "" for _, field, *_ in string.Formatter().parse(text)]
    except ValueError:
        return ()
    return [word for field in fields for word in _WORD.findall(field)]


def _makes_up(code: CodeType) -> bool:
    """Whether an attribute is asked for by a name that is none of the code's constants."""
    instructions = list(dis.get_instructions(code))
    return any(
        not _is_constant(_argument(instructions[index + 1 :], _ASK[one.argval]), instructions, code)
        for index, one in enumerate(instructions)
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD") and one.argval in _ASK
    )


def _argument(instructions: Iterable[dis.Instruction], position: int) -> tuple[str, Any]:
    """What leaves an argument of the call that follows on the stack: the name of the instruction, and what it
    loads."""
    stack = list[tuple[str, Any]]()
    for one in instructions:
        effect = dis.stack_effect(one.opcode, one.arg, jump=False)
        kept = len(stack) + min(effect, 1) - 1
        if kept < 0 or "JUMP" in one.opname:
            break
        pushed = max(effect, 1)
        loaded = (
            one.argval
            if isinstance(one.argval, tuple) and len(one.argval) == pushed
            else [one.argval] * pushed
        )
        stack = [*stack[:kept], *((one.opname, value) for value in loaded)]
    return stack[position] if position < len(stack) else ("", None)


def _is_constant(loaded: tuple[str, Any], instructions: Sequence[dis.Instruction], code: CodeType) -> bool:
    """Whether what is loaded is a constant, or a variable that is but such, or one of such in a loop."""
    opname, value = loaded
    if not opname.startswith("LOAD_FAST"):
        return opname == "LOAD_CONST"
    given = code.co_argcount + code.co_kwonlyargcount
    sources = [
        i - 1 for i, one in enumerate(instructions) if one.opname == "STORE_FAST" and one.argval == value
    ]
    while any(instructions[i].opname in ("FOR_ITER", "GET_ITER") for i in sources):
        sources = [i - (instructions[i].opname in ("FOR_ITER", "GET_ITER")) for i in sources]
    constant = all(instructions[i].opname == "LOAD_CONST" for i in sources)
    return constant and value not in code.co_varnames[:given]
