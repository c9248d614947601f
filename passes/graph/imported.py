"""Modules that code imports as it runs, by `import` or by their names, and those that it asks sys.modules
for."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from act24.passes.graph.named import global_names
from act24.passes.graph.surroundings import MODULES


class _Import(NamedTuple):
    """An `import`: how many packages up it begins, the module, and what is taken from that."""

    level: int
    module: str
    taken: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _imports(code: CodeType) -> tuple[_Import, ...]:
    instructions = [one for one in dis.get_instructions(code) if one.opname != "EXTENDED_ARG"]
    return tuple(
        _Import(instructions[place - 2].argval, one.argval or "", instructions[place - 1].argval or ())
        for place, one in enumerate(instructions)
        if one.opname == "IMPORT_NAME"
    )


def held_by(module: str) -> dict[str, Any]:
    """What a module that is there holds. Not by getattr, for a lazy one would load what was not reached."""
    return getattr(MODULES[module], "__dict__", {})


def imported(code: CodeType, scope: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of what code imports as it runs: the name of the module, and what it takes from it, an empty string for
    the module itself. A module that is not there was not reached, or the error is caught.

    Args:
        scope: its globals.
    """
    for level, name, taken in _imports(code):
        full = name
        if level:
            package = scope.get("__package__") or scope.get("__name__", "").rpartition(".")[0]
            full = ".".join(part for part in (package.rsplit(".", level - 1)[0], name) if part)
        modules = (full,) if taken else tuple(dict.fromkeys((full, full.partition(".")[0])))
        for module in modules:
            if module in MODULES:
                yield from ((module, one) for one in taken or ("",))
    if _calls(code, scope, "__import__", "import_module"):
        yield from ((text, "") for text in _texts(code) if text in MODULES)


def asked_for(code: CodeType, scope: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The texts by which code may ask sys.modules for a module; None: it does not ask."""
    names = global_names(code)
    asks = any(scope.get(name) is MODULES for name in names)
    if "modules" in code.co_names:
        asks = asks or any(scope.get(name) is MODULES["sys"] for name in names)
        asks = asks or any(one.module == "sys" for one in _imports(code))
    return _texts(code) if asks else None


def makes_up(code: CodeType, scope: Mapping[str, Any]) -> bool:
    """Whether code imports or asks for modules by names of which it has none itself."""
    asks = asked_for(code, scope) is not None or _calls(code, scope, "__import__", "import_module")
    return asks and not _texts(code)


def _calls(code: CodeType, scope: Mapping[str, Any], *names: str) -> bool:
    held = [scope.get(name) for name in global_names(code)]
    own = [value for value in held if isinstance(value, FunctionType) and value.__module__ == "importlib"]
    renamed = any(value.__name__ == "import_module" for value in own)  # as a global of another name
    return renamed or not {*names}.isdisjoint(code.co_names)


def _texts(code: CodeType) -> tuple[str, ...]:
    flat = [one for held in code.co_consts for one in (held if isinstance(held, tuple) else (held,))]
    texts = [one for one in flat if isinstance(one, str)]
    return tuple(one for one in texts if all(part.isidentifier() for part in one.split(".")))
