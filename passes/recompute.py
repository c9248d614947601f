"""`recompute`: of a block only the low-rank bottlenecks and the residual stream are kept for backward.

    q_in, k_in, v_in  =  recomputed(x)            x: the block's input, normalised inside
    o_in              =  recomputed(q_in, k_in, v_in)
    y, gate_in, up_in =  recomputed(o_in, x)      y: the residual stream behind attention
    down_in           =  recomputed(gate_in, up_in)
    output            =  y + linear(down_in)

The graph is cut behind each bottleneck, and what lies between two cuts is computed again in backward, at the
cost of the second factors, attention and the norms. It is CoLA-M (arXiv 2502.10940) without its split of
factors over modules: no parameter changes its name. Of a LLaMA block T D + 7 T R values are kept; CoLA-M
keeps another T D, the stream behind attention, because its last addition is inside what is repeated.

The pass is applied to the graph that all others leave, wherever it stands in the list.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.graph_module import _format_import_block
from torch.package.importer import ObjMismatchError, ObjNotFoundError, sys_importer
from torch.utils.checkpoint import checkpoint

from act24.errors import Act24Error
from act24.operation import in_functorch, operation
from act24.passes.base import Match, OperationalPass, Plan
from act24.passes.graph.kept import kept_for_backward, widths
from act24.passes.graph.linear_sites import roles_in
from act24.passes.graph.normal_form import is_identity, is_linear, parameter_name, replace_node
from act24.passes.graph.region import Factor, Region
from act24.passes.graph.writes import also_writes, buffer_writes
from act24.sparse24.feed_forward.operation import activation24
from act24.words import counted

#: The parts of a weight that read a bottleneck: the second factor, and columns, whose input is narrow too.
_READERS = ("out", "columns")
#: Operators of torch that draw, or are called with what was drawn, beside those that say so.
_RANDOM = {"uniform", "exponential", "geometric", "cauchy", "log_normal", "random"}
_RANDOM |= {"fractional_max_pool2d", "fractional_max_pool3d"}
#: Packages of whose functions it is known which draw.
_KNOWN = ("torch", "act24", "operator", "_operator", "builtins", "math")
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p")
#: What to do where the pass does nothing.
_OTHERWISE = "leave it out with ignore, or checkpoint whole blocks (torch.utils.checkpoint)"
#: Modules without tensors and chance, whose forward is what their options say.
_FUNCTIONS = (nn.ReLU6, nn.GELU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.LeakyReLU, nn.Softplus, nn.Softsign)
_FUNCTIONS += (nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Threshold)
_FUNCTIONS += (nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.GLU, nn.Softmax, nn.LogSoftmax, nn.Softmin)
_FUNCTIONS += (nn.Flatten, nn.Unflatten)
#: What keeps nothing but its inputs for backward.
_PLAIN = (F.linear, operator.add, torch.add)


@dataclass(frozen=True, kw_only=True)
class Recompute(OperationalPass):
    """`recompute` has no options of its own; targets name whole regions, the decoder blocks."""

    name: ClassVar[str] = "recompute"
    last: ClassVar[bool] = True
    takes_named: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True

    @property
    def covers(self) -> tuple[str, ...]:
        return roles_in("all")

    def in_evaluation(self) -> None:
        """There is no backward in evaluation."""

    def plan(self, region: Region) -> Plan:
        if not self.selects(region, ""):
            return Plan(absent="not targeted: name whole regions in targets")
        region = region.copy()
        _open_products(region)
        kept = _bottlenecks(region)
        if not kept and any(spec.factor for spec in region.parameters.values()):
            return Plan(
                absent='another pass has fused its bottlenecks: set backward = "dense" of activation24'
            )
        if not kept:
            return Plan(absent="no bottleneck to keep: put low_rank, cola or lost in front")
        inside = {n.rpartition(".")[0] if spec.factor else n: None for n, spec in region.parameters.items()}
        if reason := self.split(region, tuple(inside)):
            return Plan(misses=(("", reason),))
        for node in region.graph.nodes:
            if node.op != "call_module":
                continue
            module = _module(region, node.target)
            if not (_is_norm(module) or is_identity(module) or type(module) in (*_FUNCTIONS, nn.Dropout)):
                kind = type(module).__name__
                why = f"a second call of {node.target} [{kind}] may differ: {_OTHERWISE}"
                return Plan(misses=(("", why),))
        if read := _read_buffers(region):
            return Plan(misses=(("", f"forward writes into {read}, which it also reads: {_OTHERWISE}"),))
        if name := _renewed(region):
            reason = f"a second call of {name} would write into its arguments again: leave it out with ignore"
            return Plan(misses=(("", reason),))
        opened = region.copy()
        _open_modules(opened)
        if not any(map(_is_repeated, _by_level(_levels(opened)))):
            reason = f"spares nothing, for nothing lies between its bottlenecks: {_OTHERWISE}"
            return Plan(misses=(("", reason),))  # of a single linear too, whose surroundings do not say it
        stream = "input" if is_linear(region.module) else "the residual stream"
        match = Match(
            path="",
            before="all activations kept",
            after=f"{counted(len(kept), 'bottleneck')} and {stream}",
            nodes=None,
            parameters_before=region.numel(),
            parameters_after=region.numel(),
            note=_spared(opened),
        )
        return Plan((match,))

    def _rewrite(self, region: Region, match: Match) -> None:
        _open_products(region)
        _open_modules(region)
        region.graph = _segmented(region.graph, _levels(region))


def _bottlenecks(region: Region) -> set[fx.Node]:
    """The nodes whose values are narrow and read by a second factor."""
    return {
        node.args[0]
        for node in region.graph.nodes
        if node.op == "call_function" and len(node.args) > 1 and isinstance(node.args[0], fx.Node)
        if _factor(region, node.args[1]) in _READERS
        or (node.target is activation24 and node.args[1] is None and _factor(region, node.args[3]) == "out")
    }


def _factor(region: Region, weight: object) -> Factor | None:
    name = parameter_name(weight)
    return region.parameters[name].factor if name in region.parameters else None


def _open_products(region: Region) -> None:
    """Where a 2:4 activation has taken both factors around a bottleneck, take the first out again: what lies
    between them is what is kept. Exact weight gradients are the same outside of the operation."""
    for node in region.graph.nodes:
        if node.target is not activation24 or _factor(region, node.args[1]) != "in":
            continue
        options = node.args[-1]
        if _factor(region, node.args[3]) == "out" and options.backward == "dense":
            with region.graph.inserting_before(node):
                hidden = region.graph.call_function(F.linear, node.args[:3])
            node.args = (hidden, None, None, *node.args[3:])


def _spared(region: Region) -> str:
    """What of a region, its norms opened, is kept for backward with the pass and without, a token."""
    width, levels, kept = widths(region), _levels(region), kept_for_backward(region, region.graph.nodes)
    left = set[fx.Node]()
    for nodes in _by_level(levels):
        read = {i for node in nodes for i in node.all_input_nodes if i not in nodes and i.op != "get_attr"}
        left |= read if _is_repeated(nodes) else kept_for_backward(region, nodes)
    shared = set[fx.Node]()  # what comes in without a width: masks and rotations, which all blocks share
    for node in region.graph.nodes:
        comes_in = node.op == "placeholder" and node not in width
        if comes_in or (node.all_input_nodes and shared.issuperset(node.all_input_nodes)):
            shared.add(node)
    if any(node not in width for node in left - shared):
        return ""
    before, after = (sum(width.get(node, 0) for node in nodes) for nodes in (kept, left))
    return f"a token keeps {after:,} values for backward, of {before:,} or more"


def _module(region: Region, name: str) -> nn.Module:
    """The module of a name, or what a pass has put there and is not made yet."""
    return region.modules[name]() if name in region.modules else region.module.get_submodule(name)


def _is_norm(module: nn.Module) -> bool:
    return type(module) in (nn.RMSNorm, nn.LayerNorm)


def _open_modules(region: Region) -> None:
    """Modules as functions of their parameters, and no identities: what is repeated may call no module."""
    graph = region.graph
    for node in list(graph.nodes):
        if node.op == "call_module":
            module: Any = _module(region, node.target)
            if is_identity(module):
                (opened,) = node.all_input_nodes
            elif _is_norm(module):
                opened = _open_norm(graph, node, module)
            elif isinstance(module, nn.Dropout):
                opened = _open_dropout(graph, node, module)
            else:
                opened = _open_function(graph, node, module)
            replace_node(graph, node, opened)


def _open_norm(graph: fx.Graph, node: fx.Node, norm: Any) -> fx.Node:
    with graph.inserting_before(node):
        given = [name for name in ("weight", "bias") if norm._parameters.get(name) is not None]
        parameters = {name: graph.get_attr(f"{node.target}.{name}") for name in given}
        function = F.rms_norm if isinstance(norm, nn.RMSNorm) else F.layer_norm
        arguments = (*node.args, *node.kwargs.values(), norm.normalized_shape)
        return graph.call_function(function, arguments, {**parameters, "eps": norm.eps})


def _open_dropout(graph: fx.Graph, node: fx.Node, dropout: nn.Dropout) -> fx.Node:
    """It draws in training alone, which the module is asked for in every forward."""
    with graph.inserting_before(node):
        training = graph.get_attr(f"{node.target}.training")
        return graph.call_function(F.dropout, (node.all_input_nodes[0], dropout.p, training))


def _open_function(graph: fx.Graph, node: fx.Node, module: nn.Module) -> fx.Node:
    plain = copy(module)
    if hasattr(plain, "inplace"):  # what is repeated may not write into what it reads
        vars(plain)["inplace"] = False
    body = fx.Tracer().trace(plain)
    (given,) = (one for one in body.nodes if one.op == "placeholder")
    with graph.inserting_before(node):
        opened = graph.graph_copy(body, {given: node.all_input_nodes[0]})
    assert isinstance(opened, fx.Node)
    return opened


def _renewed(region: Region) -> str:
    """A function that the graph calls and that writes into its arguments."""
    beside = buffer_writes(region.graph, region.module)
    return next((node.name for node in region.graph.nodes if node not in beside and also_writes(node)), "")


def _read_buffers(region: Region) -> str:
    """A buffer that the graph writes to and reads: a second time it would be another one."""
    beside = buffer_writes(region.graph, region.module)
    read = (node for node in region.graph.nodes if node not in beside)
    return next((str(i.target) for node in read for i in node.all_input_nodes if i in beside), "")


def _levels(region: Region) -> dict[fx.Node, int]:
    """How many kept values lie, at most, on the way to each node whose value is used."""
    kept, beside = _bottlenecks(region), buffer_writes(region.graph, region.module)
    levels: dict[fx.Node, int] = {}
    for node in region.graph.nodes:
        if node.op.startswith("call_") and node.users and node not in beside:
            levels[node] = max(
                (levels[i] + (i in kept) for i in node.all_input_nodes if i in levels), default=0
            )
    return levels


def _by_level(levels: dict[fx.Node, int]) -> list[list[fx.Node]]:
    """The nodes of each level, in graph order."""
    return [[node for node in levels if levels[node] == level] for level in sorted({*levels.values()})]


def _is_repeated(nodes: list[fx.Node]) -> bool:
    """Whether computing the nodes of a level again spares memory."""
    return any(node.target not in _PLAIN for node in nodes)


class _Copies(dict[fx.Node, fx.Node]):
    """Nodes of one graph by those of another that they are copies of; a missing one is copied into `graph`,
    and before it what it reads."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph

    def __missing__(self, node: fx.Node) -> fx.Node:
        self[node] = self.graph.node_copy(node, self.__getitem__)
        return self[node]


def _segmented(graph: fx.Graph, levels: dict[fx.Node, int]) -> fx.Graph:
    """The same graph level by level, each one call that is repeated in backward if repeating spares memory.

    Writes to buffers, which nothing else reads and which have no level, happen once, at the end.
    """
    result = fx.Graph(tracer_cls=graph._tracer_cls)
    copies = _Copies(result)
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node]
    for nodes in _by_level(levels):
        if _is_repeated(nodes):
            _repeat(nodes, copies)
        else:
            for node in nodes:
                copies[node]
    for node in graph.nodes:
        if node not in levels and node.op.startswith("call_"):
            copies[node]
    result.output(fx.map_arg(graph.output_node().args[0], copies.__getitem__))
    return result


def _repeat(nodes: list[fx.Node], copies: _Copies) -> None:
    """Put one call into the new graph in the place of some nodes: of a function that computes them again in
    backward."""
    segment, inputs, outputs = _extracted(nodes)
    values = tuple(copies[node] for node in inputs)
    call = copies.graph.call_function(_recomputed(segment), values)
    for index, node in enumerate(outputs):
        copies[node] = copies.graph.call_function(operator.getitem, (call, index))


def _extracted(nodes: list[fx.Node]) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """Nodes as a graph of their own, what it reads, and which of them are read elsewhere."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(i for node in nodes for i in node.all_input_nodes if i not in inside))
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    segment = fx.Graph()
    copies = {node: segment.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = segment.node_copy(node, lambda n: copies[n])
    segment.output(tuple(copies[node] for node in outputs))
    return segment, inputs, outputs


#: What the names in a source mean, for those that cannot be imported by it.
_NAMES: dict[str, dict[str, Any]] = {}


def _recomputed(segment: fx.Graph) -> Callable[..., Any]:
    """The function of a graph, as one that keeps only its arguments for backward."""
    code = segment.python_code("self")
    try:
        imports = _format_import_block(code.globals, sys_importer)
    except (ObjNotFoundError, ObjMismatchError):
        # A constant of the graph cannot be imported by name. The code then runs in this process only, and the
        # identities of its constants keep it apart from code that reads the same.
        imports = f"# {sorted((name, id(value)) for name, value in code.globals.items())}"
        importable = False
    else:
        importable = True
    source = f"{imports}\n{code.src}"
    _NAMES[source] = dict(code.globals)
    return make_recomputed(source, any(map(_draws, segment.nodes)), importable)


@cache
def make_recomputed(source: str, draws: bool, importable: bool) -> Callable[..., Any]:
    """A function that computes what `forward` in a source does, and again in backward. One object for equal
    code, so that layers share one class and are compiled once.

    Args:
        draws: it draws from the process's generators, which are set back; for that the host waits for a GPU.
        importable: the source imports all that it names: so the function gets a name in this module, by which
            what is pickled finds it.
    """
    namespace = dict(_NAMES.get(source, ()))
    exec(compile(source, "<recomputed>", "exec"), namespace)
    forward = namespace["forward"]

    def compute(*values: Any) -> Any:
        return forward(None, *values)

    def recomputed(*values: Any) -> Any:
        if in_functorch():
            raise Act24Error(
                "recompute keeps nothing for a backward of torch.func, which has no hooks of saved tensors: "
                "leave it out there, pipeline.lower_(step, without=['recompute'])"
            )
        return checkpoint(compute, *values, use_reentrant=False, preserve_rng_state=draws)

    name = f"recomputed_{sha256(source.encode()).hexdigest()[:12]}" + ("_drawing" if draws else "")
    recomputed.__name__ = recomputed.__qualname__ = name
    function = operation(recomputed)
    if importable:
        arguments = (source, draws, importable)
        function.made_by = (make_recomputed, arguments)  # pyright: ignore[reportFunctionMemberAccess]
        globals()[name] = function
    return function


def _draws(node: fx.Node) -> bool:
    """Whether a node may draw from the generators of the process, whose state then has to be kept: torch says
    it of its operators, and of anybody else's functions nobody knows."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "scaled_dot_product_attention":
        given = dict(zip(_ATTENTION, node.args, strict=False)) | node.kwargs
        return bool(given.get("dropout_p", 0.0) != 0.0)
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        return any(map(_is_seeded, _overloads(node.target)))
    package = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    if node.op == "call_function" and package not in _KNOWN:
        return True
    operator_ = getattr(torch.ops.aten, name, None)
    if operator_ is None:  # of torch's functions in Python nobody knows what they call
        return name.rstrip("_") in _RANDOM or (node.op == "call_function" and package == "torch")
    return name.rstrip("_") in _RANDOM or any(map(_is_seeded, _overloads(operator_)))


def _overloads(of: OpOverload | OpOverloadPacket) -> list[OpOverload]:
    return [of] if isinstance(of, OpOverload) else [getattr(of, name) for name in of.overloads()]


def _is_seeded(overload: OpOverload) -> bool:
    """Whether an operator draws; of one that is none of torch's own nobody knows."""
    return overload.namespace not in ("aten", "prims") or torch.Tag.nondeterministic_seeded in overload.tags
