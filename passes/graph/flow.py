"""What lies between the linears of a graph: products of two values that come from inputs, as attention has
them, what is added to its scores, and choices of a few or weights of what other branches give, as routers
make them."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from act24.passes.graph.activation_kinds import activates
from act24.passes.graph.normal_form import asks_kind, is_call, is_cast, is_product

#: Matrix products, as functions and methods.
PRODUCTS: tuple[Any, ...] = (torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, operator.matmul)
PRODUCTS += ("matmul", "bmm", "baddbmm", "__matmul__")
#: Sums of two values, as functions and methods.
SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_SOFTMAX = (F.softmax, torch.softmax, "softmax")
_CHOICES: tuple[Any, ...] = (
    torch.topk,
    torch.argmax,
    torch.sort,
    torch.argsort,
    torch.multinomial,
    F.one_hot,
)
_CHOICES += (F.gumbel_softmax, torch.kthvalue, "topk", "argmax", "sort", "argsort", "multinomial", "kthvalue")
#: What takes one of several features, or puts an axis where one feature was.
_APART = (torch.unsqueeze, torch.unbind, torch.select, "unsqueeze", "unbind", "select")
#: What takes some entries of its first argument, or writes there, by the places that another one gives.
_BY_PLACE = (operator.getitem, torch.gather, torch.index_select, torch.take_along_dim, torch.scatter)
_BY_PLACE += ("gather", "index_select", "scatter", "index_add", "index_add_", "scatter_add", "scatter_add_")
#: What takes the shape and dtype of a value, and none of its numbers.
_LIKE = (torch.full_like, torch.zeros_like, torch.ones_like, torch.empty_like, torch.rand_like)
_LIKE += (torch.randn_like, "new_zeros", "new_ones", "new_full", "new_empty")
_ATTENTION = re.compile(r"attention|attn", re.I)

#: How much narrower than what it reads a linear is whose softmax tells a few alternatives apart.
_FEW = 2


class Flow:
    """What a graph shows of its linears.

    Attributes:
        linears: the linears, each with the parameters that its weight is made of.
        mixing: products of two values that both come from inputs, and attention as a whole.
        scores: those of them that are attention's.
        routers: the linears that choose, those of few features that only weigh what other branches give, and
            what feeds such alone.
        leading: linears that feed routers alone, whatever becomes of these.
        biases: linears whose numbers only bias attention's scores, and what feeds such alone.
    """

    def __init__(
        self,
        graph: fx.Graph,
        module: nn.Module,
        linears: Mapping[fx.Node, list[str]],
        joined: Collection[fx.Node] = (),
    ) -> None:
        """Look.

        Args:
            joined: sums that are what one linear gives, as that of a linear and its adapter.
        """
        self._graph, self.module, self.linears, self._joined = graph, module, linears, joined
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self._made, self.mixing = of_inputs(graph), mixing_products(graph)
        self.routers = {node for node in linears if self._chooses(node)}
        self.scores = self._core(self._behind(self.routers))
        self.routers |= {node for node in linears if node not in self.routers and self._tells_apart(node)}
        routed = self._behind(self.routers)
        self.scores |= {node for node in graph.nodes if node not in routed and self._is_by_softmax(node)}
        self._of_scores = self._behind(self.scores)
        self.routers |= {node for node in linears if node not in self.routers and self._only_weighs(node)}
        weighing = {node for node in self.routers if self._only_weighs(node)}
        self.routers |= self._before(weighing)
        self.leading = self._before(self.routers)
        self.biases = {node for node in linears if node not in self.routers and self._only_biases(node)}
        self.biases |= self._before(self.biases)

    def walk(
        self, linear: fx.Node, up: bool = False, stop: Collection[fx.Node] = ()
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        """What lies between a linear and the next ones, and those next ones. Behind sums other things begin,
        but for those that lead into an activation or a choice."""
        seen, ends, frontier = dict[fx.Node, None](), dict[fx.Node, None](), [linear]
        while frontier:
            current = frontier.pop()
            around: Iterable[fx.Node] = current.users
            if up:
                first = current.args[0] if current is linear else None
                around = [first] if isinstance(first, fx.Node) else current.all_input_nodes
            for other in around:
                if other in seen or other in ends or other.op in ("placeholder", "get_attr", "output"):
                    continue
                if is_call(other, F.linear):
                    ends[other] = None
                elif not self._is_sum(other) and other not in stop:
                    seen[other] = None
                    frontier.append(other)
        return list(seen), list(ends)

    def _is_sum(self, node: fx.Node) -> bool:
        """Whether a node adds two computed values, other than into an activation or a choice alone."""
        if node in self._joined or node.target not in SUMS or sum(arg in self._made for arg in node.args) < 2:
            return False
        return not self._decides(node, {})

    def _decides(self, value: fx.Node, known: dict[fx.Node, bool]) -> bool:
        """Whether whatever reads a value's numbers leads into an activation, a softmax or a choice before it
        leads to a linear, a product of two values or out, as logits that are made of several parts do."""
        if value not in known:
            known[value] = False
            reading = [user for user in value.users if not asks_size(user) and user.target not in _LIKE]
            known[value] = bool(reading) and all(self._is_decided(user, known) for user in reading)
        return known[value]

    def _is_decided(self, node: fx.Node, known: dict[fx.Node, bool]) -> bool:
        if activates(node, self.module) or self._is_softmax(node) or is_choice(node):
            return True
        if node.op == "output" or node in self.linears or node in self.mixing or node.op == "call_module":
            return False
        return self._decides(node, known)

    def _chooses(self, linear: fx.Node) -> bool:
        """Whether the largest of what a linear gives are chosen. Scores are products of what linears give."""
        seen, _ = self.walk(linear, stop=self.mixing)
        return any(map(is_choice, seen))

    def _tells_apart(self, linear: fx.Node) -> bool:
        """Whether a softmax of what a linear gives weighs a few alternatives."""
        shape = self._shape(linear)
        if shape is None or shape[0] * _FEW > shape[1]:
            return False
        seen, _ = self.walk(linear, stop=self.mixing)
        behind, _ = self.walk(linear)
        _, before = self.walk(linear, up=True)
        if any(map(self._is_of_scores, (linear, *before))):  # it mixes heads, and the softmax is attention's
            return False
        return any(map(self._is_softmax, seen)) and self.scores.isdisjoint(behind)

    def _only_biases(self, linear: fx.Node) -> bool:
        """Whether all that becomes of a linear is added to scores, or scales them in front of their
        softmax."""
        frontier, seen, biases = [linear], {linear}, False
        while frontier:
            current = frontier.pop()
            for user in current.users:
                if user in seen or asks_size(user):
                    continue
                seen.add(user)
                if user.op == "output" or user in self.linears:
                    return False
                if _is_biased(user, current) or self._joins_scores(user, current):
                    biases = True
                elif user in self.mixing:
                    return False
                else:
                    frontier.append(user)
        return biases

    def _is_of_scores(self, value: fx.Node) -> bool:
        """Whether a value, or what a linear reads, is made of products that nothing has weighed yet."""
        made = self._made_of(value)
        made |= {value} - self.linears.keys()
        products = made & self.mixing
        if any(self._is_softmax(n) or is_choice(n) or _is_whole(n) for n in made):
            return False
        return bool(products) and all(self.mixing.isdisjoint(self._made_of(n)) for n in products)

    def _joins_scores(self, node: fx.Node, given: fx.Node) -> bool:
        """Whether a node adds a value to scores, or multiplies them with it, before what they weigh."""
        adds = node.target in SUMS
        if not adds and not is_product(node):
            return False
        if not any(self._is_of_scores(n) for n in node.all_input_nodes if n is not given):
            return False
        return any(map(self._is_softmax, self._behind([node]))) or (adds and self._decides(node, {}))

    def _made_of(self, value: fx.Node) -> set[fx.Node]:
        """What a value is made of, up to the linears before it."""
        found, frontier = set[fx.Node](), [value]
        while frontier:
            for node in frontier.pop().all_input_nodes:
                if node not in found and node not in self.linears:
                    found.add(node)
                    frontier.append(node)
        return found

    def _only_weighs(self, linear: fx.Node) -> bool:
        """Whether what a linear of few features gives is multiplied with what other branches give, one
        feature with all of theirs, and goes nowhere else but out."""
        shape, chosen = self._shape(linear), linear in self.routers
        if shape is None or (shape[0] * _FEW > shape[1] and not chosen):
            return False
        made, weighs = {linear: shape[0] == 1}, False  # whether a value is one feature, or chosen
        for node in self._graph.nodes:
            given = [n for n in node.all_input_nodes if n in made]
            if node.op == "output" or not given or asks_size(node):
                continue
            if node in self.linears or node.target is F.linear or node in self.scores:
                return False
            if node.target in _BY_PLACE and node.args[0] not in made:
                weighs |= chosen
                continue
            others = [n for n in node.all_input_nodes if n not in made and n in self._made]
            if others and (node in self.mixing or is_product(node)):
                if chosen or any(made[n] for n in given) or _is_weight_of(node, given):
                    if node in self._of_scores or self.reaches(node, self.scores):
                        return False
                    weighs = True
                    continue
                if node in self.mixing:
                    return False
            elif others and node.target in SUMS:
                return False
            made[node] = any(made[n] for n in given) or _is_apart(node) or is_choice(node)
        return weighs

    def _before(self, routers: Collection[fx.Node]) -> set[fx.Node]:
        """The linears that feed some routers alone."""
        found = set[fx.Node]()
        for node in reversed([*self.linears]):
            near = self._behind([node])
            ends = {user for n in (node, *near) for user in n.users if user in self.linears}
            out = any(n.op == "output" for n in near)
            if ends and not out and node not in routers and all(n in routers or n in found for n in ends):
                found.add(node)
        return found

    def reaches(self, node: fx.Node, goals: Collection[fx.Node]) -> bool:
        """Whether what a node gives gets to one of some nodes without a linear in between."""
        return not self._behind([node]).isdisjoint(goals)

    def _shape(self, linear: fx.Node) -> tuple[int, int] | None:
        """`(out, in)` of a linear whose weight is a parameter."""
        names, weight = self.linears[linear], linear.args[1] if len(linear.args) > 1 else None
        turned = isinstance(weight, fx.Node) and weight.op == "call_method" and weight.target == "t"
        if len(names) != 1 or self._parameters[names[0]].ndim != 2:
            return None
        rows, columns = self._parameters[names[0]].shape
        return (columns, rows) if turned else (rows, columns)

    def _is_softmax(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.module.get_submodule(str(node.target)), nn.Softmax)
        return node.target in _SOFTMAX

    def _is_by_softmax(self, node: fx.Node) -> bool:
        """Whether a node is a softmax that is multiplied with something, or that product."""
        if self._is_softmax(node):
            return any(n.target in PRODUCTS for n in _beyond(node, up=False))
        return node.target in PRODUCTS and any(map(self._is_softmax, _beyond(node, up=True)))

    def _behind(self, linears: Collection[fx.Node]) -> set[fx.Node]:
        """What is made of what some linears give, up to the next linears."""
        found, frontier = set[fx.Node](), [*linears]
        while frontier:
            for user in frontier.pop().users:
                if user not in found and user not in self.linears:
                    found.add(user)
                    frontier.append(user)
        return found

    def _core(self, routed: Collection[fx.Node]) -> set[fx.Node]:
        """The products that follow one another without a linear in between, scores and what they weigh, and
        those that are attention's alone."""
        mixing = {node for node in self.mixing if node not in routed}
        whole = {node for node in mixing if _is_whole(node) or _is_outer(node)}
        after, before = set[fx.Node](), set[fx.Node]()
        for node in self._graph.nodes:
            if node not in self.linears and any(n in after or n in mixing for n in node.all_input_nodes):
                after.add(node)
        for node in reversed(self._graph.nodes):
            if any(n not in self.linears and (n in before or n in mixing) for n in node.users):
                before.add(node)
        return whole | {node for node in mixing if node in after or node in before}


def of_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on what the graph is given, and not on parameters and constants alone."""
    found = set[fx.Node]()
    for node in graph.nodes:
        given = node.all_input_nodes[:1] if is_cast(node) else node.all_input_nodes
        if node.op == "placeholder" or any(n in found for n in given if not asks_kind(node)):
            found.add(node)
    return found


def mixing_products(graph: fx.Graph) -> set[fx.Node]:
    """The products of two values that both come from inputs, outer ones among them, and attention as a
    whole."""
    made, found = of_inputs(graph), set[fx.Node]()
    for node in graph.nodes:
        factors = sum(isinstance(arg, fx.Node) and arg in made for arg in node.args)
        if (factors > 1 and (node.target in PRODUCTS or _is_outer(node))) or _is_whole(node):
            found.add(node)
    return found


def _is_whole(node: fx.Node) -> bool:
    """Whether a node is attention by itself: torch's function, or another library's."""
    name = str(getattr(node.target, "__name__", ""))
    return node.op == "call_function" and _ATTENTION.search(name) is not None


def _is_biased(node: fx.Node, value: fx.Node) -> bool:
    """Whether a value is what a node that makes scores adds to them."""
    if node.target in (torch.baddbmm, "baddbmm"):
        return bool(node.args) and value is node.args[0] and value not in node.args[1:]
    if not _is_whole(node):
        return False
    multiplied = (*node.args[:3], *(node.kwargs.get(name) for name in ("query", "key", "value")))
    return value not in multiplied


def _is_outer(node: fx.Node) -> bool:
    """Whether a node is a product of every feature of one value with every one of another."""
    if not is_product(node):
        return False
    places = [_new_axis(arg) for arg in node.args]
    return None not in places and places[0] != places[1]


def _new_axis(value: object) -> object:
    """Where a node puts a new axis, or None."""
    if not isinstance(value, fx.Node) or value.target not in (torch.unsqueeze, "unsqueeze", operator.getitem):
        return None
    index = value.kwargs.get("dim", value.args[-1])
    if value.target is operator.getitem:
        return index if isinstance(index, tuple) and None in index else None
    return index


def is_choice(node: fx.Node) -> bool:
    """Whether a node chooses the largest: by their places, or in the order that they come."""
    if node.target in (torch.max, "max"):
        return any(user.target is operator.getitem and user.args[1] == 1 for user in node.users)
    return node.target in _CHOICES


def asks_size(node: fx.Node) -> bool:
    """Whether a node asks a value for its shape, dtype or device, and for no numbers."""
    return (
        asks_kind(node)
        or node.target in ("size", "dim")
        or (node.target is getattr and node.args[1] == "shape")
    )


def _is_apart(node: fx.Node) -> bool:
    """Whether a node takes one feature, or gives every feature an axis of its own."""
    if node.target in ("view", "reshape", torch.reshape):
        last = node.args[-1]
        return [*last][-1:] == [1] if isinstance(last, tuple | list) else bool(last == 1)
    if node.target is not operator.getitem:
        return node.target in _APART
    index = node.args[1]
    if not isinstance(index, tuple):
        return False
    return None in index or any(isinstance(part, int) or _is_of_one(part) for part in index)


def _is_of_one(part: object) -> bool:
    ends = (part.start or 0, part.stop) if isinstance(part, slice) else (0, 0)
    return isinstance(ends[0], int) and isinstance(ends[1], int) and ends[1] - ends[0] == 1


def _is_weight_of(node: fx.Node, given: Collection[fx.Node]) -> bool:
    """Whether a `torch.einsum` multiplies one of some values with another that has all of its axes and
    more."""
    if node.target is not torch.einsum or not isinstance(node.args[0], str):
        return False
    terms = node.args[0].replace(" ", "").partition("->")[0].split(",")
    operands = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    axes = list(zip(map(set, terms), operands, strict=False))
    return any(a < b for a, mine in axes if mine in given for b, other in axes if other not in given)


def _beyond(node: fx.Node, up: bool) -> Iterable[fx.Node]:
    """What a node reads, or what reads it, and so on, a few steps on."""
    frontier = [node]
    for _ in range(4):
        frontier = [other for n in frontier for other in (n.all_input_nodes if up else n.users)]
        yield from frontier
