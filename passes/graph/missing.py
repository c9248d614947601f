"""Arguments that are None, which a proxy never is: tracing would freeze every branch on that the wrong way.

The forward is traced again with None in their place. It either does the same, or fails as the module itself
fails on None; else it is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from opcode import opname
from typing import Any

import torch.nn.functional as F
from torch import fx
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import map_arg

from act24.passes.graph.proxies import OWN, Unclean, is_internal

#: An argument, and the keys of an item in it.
Path = tuple[Any, ...]

#: They take no None.
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.matmul, operator.truediv, operator.pow)
#: Of more arguments and items, pairs are tried and all together.
_MOST = 4


def path_of(node: fx.Node) -> Path | None:
    """Which argument, or item of an argument by constant keys, a node is; None: something else."""
    if node.op == "placeholder":
        return (node.target,)
    if node.target is not operator.getitem or not isinstance(node.args[1], int | str):
        return None
    of = path_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    return None if of is None else (*of, node.args[1])


def check_none(graph: fx.Graph, asks: bool, retrace: Callable[[frozenset[Path]], fx.Graph]) -> None:
    """Refuse a forward that does something else where an argument is None, or an item of one.

    Args:
        asks: whether its code compares anything with None; else only later arguments are looked at.
        retrace: gives its graph with None for some.

    Raises:
        Unclean: it does, or what it does cannot be traced.
    """
    paths = [*dict.fromkeys(path for node in graph.nodes if (path := path_of(node)))]
    first = next((path for path in paths if len(path) == 1), None)  # what the module works on, mostly
    if not asks:
        paths = [path for path in paths if path != first and len(path) == 1]
    taken = {path: _check({path}, graph, asks, retrace) for path in paths}
    if asks:
        for some in _together([path for path in paths if path != first or taken[path]]):
            _check({*some}, graph, asks, retrace)


def _together(paths: list[Path]) -> Iterator[tuple[Path, ...]]:
    """What may be None at the same time; an item of None is none."""
    sizes = range(2, len(paths) + 1) if len(paths) <= _MOST else sorted({2, len(paths)})
    return (
        some
        for size in sizes
        for some in combinations(paths, size)
        if not any(a != b and b[: len(a)] == a for a in some for b in some)
    )


def _check(
    paths: set[Path], graph: fx.Graph, asks: bool, retrace: Callable[[frozenset[Path]], fx.Graph]
) -> bool:
    """Whether a forward takes None there, as far as tracing tells.

    Raises:
        Unclean: it does something else then.
    """
    absent = frozenset(paths)
    named = " and ".join(f"'{_text(path)}'" for path in sorted(paths, key=str))
    named = f"argument {named} is None" if len(paths) == 1 else f"arguments {named} are None"
    try:
        other = retrace(absent)
    except Unclean:
        raise
    except Exception as error:
        if not asks or _refuses_none(error):
            return False
        raise Unclean(
            f"asks whether its {named}, and what it does then cannot be traced "
            f"({type(error).__name__}): make two modules of it, or {OWN}"
        ) from error
    if any(_fails(node) for node in other.nodes):
        return False
    if said(other) != said(graph, absent):
        raise Unclean(f"does something else where its {named}: make two modules of it, or {OWN}")
    return True


def _text(path: Path) -> str:
    return f"{path[0]}{''.join(f'[{key!r}]' for key in path[1:])}".replace("'", '"')


def _fails(node: fx.Node) -> bool:
    """Whether a node is given None where nothing takes it."""
    if node.target in _ARITHMETIC:
        return None in node.args
    return (node.op == "call_module" or node.target is F.linear) and node.args[:1] == (None,)


def _refuses_none(error: BaseException) -> bool:
    """Whether a module would fail on None as its tracing did: by a `raise` of its own, or since None has not
    what it is asked for. What a proxy cannot do, a tensor may."""
    if any(kind in str(error) for kind in ("Proxy", "ValueAttribute")):
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is not None and not is_internal(last.tb_frame):
        code = last.tb_frame.f_code.co_code
        return opname[code[last.tb_lasti]] == "RAISE_VARARGS" or "NoneType" in str(error)
    return "NoneType" in str(error)


def said(
    graph: fx.Graph, absent: frozenset[Path] = frozenset(), needless: Mapping[fx.Node, Any] | None = None
) -> list[Any]:
    """A graph as data that compares, whatever its nodes are called.

    Args:
        absent: the arguments, and items of arguments, that are None.
        needless: nodes that are what the value beside them is.
    """
    needless = needless or {}
    unsaid = {node for node in graph.nodes if node.target is _assert_is_none} | {*needless}
    none = {node for node in graph.nodes if path_of(node) in absent}
    unsaid |= {node for node in none if node.op != "placeholder"}
    unsaid |= {node for node in graph.nodes if node.target is getattr and node.users.keys() <= unsaid}
    nodes = [node for node in graph.nodes if node not in unsaid and node.op != "get_attr"]
    places: dict[fx.Node, Any] = {node: place for place, node in enumerate(nodes)}
    places |= {node: node.target for node in graph.nodes if node.op == "get_attr"}

    def place(node: fx.Node) -> Any:
        while node in needless:
            node = needless[node]
        return None if node in none else places[node]

    return [
        (
            node.op,
            node.op == "placeholder" or node.target,
            map_arg(node.args, place),
            map_arg(node.kwargs, place),
        )
        for node in nodes
    ]
