"""LoRA that somebody has written by hand, known by the graph: beside a linear whose weight is frozen, on the
same input and added to what it gives, products with two parameters or more in a row, through fewer features
than go in and come out, of which something trains. A branch beside a linear that trains is none, as those of
LoST and CoLA.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from act24.passes.graph.flow import PRODUCTS, SUMS, of_inputs
from act24.passes.graph.normal_form import asks_kind, is_call, is_linear, place_of

#: What changes no feature into another: scales, casts, and what drops some.
_SCALES: tuple[Any, ...] = (operator.mul, operator.truediv, operator.neg, operator.imul, operator.itruediv)
_SCALES += (torch.mul, torch.multiply, torch.div, torch.neg, F.dropout, torch.dropout)
_SCALES += ("mul", "multiply", "div", "neg", "mul_", "div_", "to", "type", "type_as", "float", "half")
_SCALES += ("bfloat16", "double", "contiguous", "clone")
_TURNS = ("t", "transpose", "permute", torch.t, torch.transpose, torch.permute)
_LESS = (operator.sub, operator.isub, torch.sub, "sub", "sub_")


@dataclass
class Adapters:
    """What is found in a graph.

    Attributes:
        of: by the name of a factor, that of the frozen weight beside it.
        sums: the nodes that add what they give to what the frozen linears give, and nothing else.
    """

    of: dict[str, str] = field(default_factory=dict)
    sums: set[fx.Node] = field(default_factory=set)


def adapters_in(graph: fx.Graph, module: nn.Module) -> Adapters:
    """The adapters of a region.

    Args:
        graph: in normal form.
        module: what was traced.
    """
    return _Search(graph, module).found


def adapters_beside(fqn: str, around: Mapping[str, nn.Module]) -> dict[str, str]:
    """The same of a linear that is a region by itself, as where the layer around draws by a function: what
    the sizes show of a layer that holds but frozen linears and two that train.

    Args:
        fqn: of the linear.
        around: the model's modules by name.
    """
    path, _, own = fqn.rpartition(".")
    if not own or not is_linear(around[fqn]):
        return {}
    held: dict[str, Any] = {name: m.weight for name, m in around[path].named_children() if is_linear(m)}
    frozen = {name: weight for name, weight in held.items() if not weight.requires_grad}
    pair = {name: tuple(weight.shape) for name, weight in held.items() if name not in frozen}
    orders = [[*pair.values()], [*pair.values()][::-1]]
    for name, weight in frozen.items() if own in pair and len(pair) == 2 else ():
        if any(_narrows(order, sorted(weight.shape)) for order in orders):
            return {"weight": adapted(fqn, f"{path}.{name}" if path else name)}
    return {}


def adapted(factor: str, weight: str) -> str:
    """What a factor is an adapter of, in a word, by the names of both: a layer that is there to hold them, as
    LoRA's own, or the linear."""
    *above, own = place_of(weight).split(".")
    beside = above == place_of(factor).split(".")[:-1]
    return above[-1] if beside and above and not above[-1].isdigit() and own in _INNER else own


#: Names of the linear in a layer that holds it and its adapter.
_INNER = ("base", "base_layer", "linear", "inner", "wrapped", "orig", "original", "layer", "module", "frozen")


class _Search:
    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._module, self._made = module, of_inputs(graph)
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self.found = Adapters()
        if all(p.requires_grad for p in self._parameters.values()):
            return
        for node in graph.nodes:
            if node.target in (*SUMS, *_LESS) and node in self._made:
                self._look_at([*self._terms(node, lambda n: n in self._made)], self._of_values, node)
            elif is_call(node, F.linear) and isinstance(node.args[1], fx.Node):
                self._look_at([*self._terms(self._turned(node.args[1]))], self._of_weights)

    def _look_at(
        self, terms: list[fx.Node], chain: Callable[[fx.Node], _Chain | None], into: fx.Node | None = None
    ) -> None:
        """Of the terms of a sum, find frozen matrices and what is an adapter of one."""
        chains = [one for term in terms if (one := chain(term)) is not None]
        bases = [one for one in chains if len(one.names) == 1 and not one.trains]
        others = 0
        for one in chains:
            of = next((base for base in bases if one.adapts(base, self._parameters)), None)
            self.found.of |= dict.fromkeys(one.names, of.names[0]) if of is not None else {}
            others += of is None
        if into is not None and others == 1 and 1 < len(chains) == len(terms) and bases:
            self.found.sums.add(into)

    def _terms(self, node: Any, through: Callable[[fx.Node], bool] = lambda _: True) -> Iterator[fx.Node]:
        """The values that a sum adds, and those that sums among them do."""
        node = self._bare(node)
        if not isinstance(node, fx.Node):
            return
        if node.target not in (*SUMS, *_LESS) or not all(
            isinstance(arg, fx.Node) and through(arg) for arg in node.args[:2]
        ):
            yield node
            return
        for arg in node.args[:2]:
            yield from self._terms(arg, through)

    def _bare(self, node: Any, scales: list[str] | None = None) -> Any:
        """What a value is before it is scaled, cast or dropped.

        Args:
            scales: gets the parameters that it is scaled with.
        """
        while isinstance(node, fx.Node) and self._only_scales(node):
            known = node in self._made
            values = [n for n in node.all_input_nodes if not asks_kind(n) and (n in self._made) == known]
            values = values if known else [n for n in values if self._numel(n) != 1]
            if len(values) != 1:
                return node
            if scales is not None:
                scales += [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
            node = values[0]
        return node

    def _only_scales(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._module.get_submodule(str(node.target)), nn.Dropout | nn.Identity)
        return node.target in _SCALES

    def _numel(self, node: fx.Node) -> int:
        name = str(node.target)
        return self._parameters[name].numel() if node.op == "get_attr" and name in self._parameters else 0

    def _turned(self, node: Any) -> Any:
        """A weight, whichever way it lies."""
        turned = isinstance(node, fx.Node) and (
            node.target in _TURNS or (node.target is getattr and node.args[1] in ("T", "mT"))
        )
        return self._turned(node.args[0]) if turned else node

    def _matrix(self, node: Any) -> str | None:
        """The name of the matrix that a value is, scaled, cast or turned."""
        node = self._bare(self._turned(self._bare(node)))
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        parameter = self._parameters.get(name := str(node.target))
        return name if parameter is not None and parameter.ndim == 2 else None

    def _weights(self, node: Any, scales: list[str]) -> list[str]:
        """The matrices whose product a weight is."""
        node = self._bare(self._turned(self._bare(node, scales)), scales)
        if (name := self._matrix(node)) is not None:
            return [name]
        if not isinstance(node, fx.Node) or node.target not in PRODUCTS or node in self._made:
            return []
        operands = [n for n in node.args if isinstance(n, fx.Node)]
        parts = [self._weights(operand, scales) for operand in operands]
        return [name for part in parts for name in part] if all(parts) else []

    def _of_weights(self, node: fx.Node) -> _Chain | None:
        """The matrices of one term of a weight."""
        scales = list[str]()
        names = self._weights(node, scales)
        return self._chain(None, names, scales) if names else None

    def _of_values(self, node: fx.Node) -> _Chain | None:
        """The products that a value is, in a row."""
        scales, names, current = list[str](), list[str](), self._bare(node)
        self._bare(node, scales)
        while isinstance(current, fx.Node):
            x = [n for n in current.all_input_nodes if n in self._made]
            if not (is_call(current, F.linear) or current.target in PRODUCTS) or len(x) != 1:
                break
            weights = [n for n in current.all_input_nodes if n not in self._made]
            bias = current.args[2] if is_call(current, F.linear) else None
            own = self._weights(weights[0], scales) if [n for n in weights if n is not bias][:1] else []
            if not own:
                break
            names = [*own, *names]
            self._bare(x[0], scales)
            current = self._bare(x[0])
        return self._chain(current, names, scales) if names else None

    def _chain(self, x: Any, names: list[str], scales: list[str]) -> _Chain:
        trains = any(self._parameters[name].requires_grad for name in names)
        scaled = any(self._parameters[n].requires_grad for n in scales if n in self._parameters)
        return _Chain(x, names, trains, scaled)


@dataclass
class _Chain:
    """Products with parameters in a row.

    Attributes:
        x: what goes in; None: of weights alone.
        names: of the parameters.
        trains, scaled: one of them trains, or what they are scaled with.
    """

    x: Any
    names: list[str]
    trains: bool
    scaled: bool

    def adapts(self, base: _Chain, parameters: dict[str, nn.Parameter]) -> bool:
        """Whether these are an adapter of a frozen linear."""
        if len(self.names) < 2 or self.x is not base.x or not (self.trains or self.scaled):
            return False
        ends = sorted(parameters[base.names[0]].shape)
        shapes = [tuple(parameters[name].shape) for name in self.names]
        return any(_narrows(order, ends) for order in (shapes, shapes[::-1]))


def _narrows(shapes: list[tuple[int, ...]], ends: list[int]) -> bool:
    """Whether matrices lead from one side of another to its other side through fewer features."""
    for side, goal in (ends, ends[::-1]):
        inner, here = list[int](), side
        for shape in shapes:
            if here not in shape:
                break
            here = shape[0] if shape[1] == here else shape[1]
            inner.append(here)
        if len(inner) == len(shapes) and here == goal and min(inner[:-1]) < ends[0]:
            return True
    return False
