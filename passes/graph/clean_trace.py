"""Trace one module into normal form, or say why its graph would not be the whole truth.

Clean means that the graph says all that the module does: a closed signature without defaults, no control
flow on values, on what they are or have for a dtype, or on an argument being None, no hand-written backward
and no grad or autocast mode of its own (tracing would drop them), nothing drawn at random or written in
forward that outlives it but buffers (`act24.passes.graph.writes`), no tensor that is neither parameter nor
buffer, no behaviour of a module besides its forward, and every linear visible. Modules that read
`self.training` stay leaves, or tracing would freeze the mode; if such a leaf holds linears, what surrounds it
is not clean, layers of PEFT's excepted, in which the linears are regions of their own. Only a double of the
module is run (`act24.passes.graph.shadow`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from act24.passes.graph.beside import Beside
from act24.passes.graph.missing import check_none, said
from act24.passes.graph.normal_form import is_adapter, is_call, is_linear, linear_arguments, normalise
from act24.passes.graph.proxies import OWN, PLAIN, REGISTER, Unclean
from act24.passes.graph.shadow import Shadow, contents
from act24.passes.graph.tracer import RegionTracer, Tracer
from act24.passes.graph.watched import NOTHING, Frozen, Ran, frozen_values
from act24.passes.graph.writes import without_writes

#: What a module may do besides its forward, and a region does not.
_BESIDES = (
    "__call__",
    "get_extra_state",
    "set_extra_state",
    "state_dict",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "_apply",
    "train",
)


@dataclass(frozen=True)
class Trace:
    """What tracing finds.

    Attributes:
        graph: the normal form.
        frozen: what the graph has in it of plain values.
    """

    graph: fx.Graph
    frozen: Frozen = NOTHING


def clean_trace(module: nn.Module) -> Trace:
    """The normal form of a module.

    Raises:
        Unclean: it has none.
    """
    _check_besides(module)
    if is_linear(module):
        return Trace(_trace_linear(module))
    _check_signature(module)
    shadow = Shadow(module, stays=lambda m: not m._modules or _stays(m))
    if shadow.remade:
        raise Unclean(f"a weight in it is computed before every forward: call {shadow.remade} first")
    if shadow.uncopied:
        raise Unclean(
            f"holds {shadow.uncopied}, which cannot be copied, and tracing might write to it: keep it "
            "outside of the module"
        )
    before = contents(shadow.root)
    ran, beside = Ran(), Beside({type(double) for double in shadow.originals})

    def note(frame: FrameType) -> None:
        ran.note(frame)
        beside.note(frame)

    tracer = Tracer(shadow, _is_leaf, note)
    try:
        graph = tracer.record()
        if not beside.written and not _changed(before, contents(shadow.root)):  # or None is put back there
            _check_none(shadow, graph, tracer, beside)
        _check_casts(shadow, graph, tracer, beside)
    except Unclean:
        raise
    except Exception as error:  # whatever a forward may raise when it is given a proxy
        raise Unclean(tracer.refused or f"{type(error).__name__}: {error}: {PLAIN}") from error
    finally:
        tracer.undo_draws()
        written = _changed(before, contents(shadow.root)) or ", ".join(beside.written)
        beside.forget_proxies_()
    if written:
        raise Unclean(f"forward writes {written}: write it in a forward hook, or {OWN}")
    if tracer.refused:
        raise Unclean(tracer.refused)
    held = {*dict(module.named_parameters(remove_duplicate=False))}
    held |= {*dict(module.named_buffers(remove_duplicate=False))}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in held:
            raise Unclean(f"reads {node.target}, neither parameter nor buffer: {REGISTER}")
    without_writes(graph, module)
    normalise(graph, module)
    stays = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    adapters = any(is_adapter(module.get_submodule(path)) for path in stays)
    if not any(is_call(node, F.linear) for node in graph.nodes) and not adapters:
        raise Unclean("calls no linear: write its products as F.linear(x, weight), or leave it")
    read = [(shadow.originals[double], name) for double, name in shadow.settings]
    return Trace(graph, replace(frozen_values(module, ran, stays, read), sized=frozenset(tracer.sized)))


def _changed(before: dict[Any, Any], after: dict[Any, Any]) -> str:
    """The names of what is not as it was."""
    keys = [key for key in after if key not in before or before[key] != after[key]]
    keys += [key for key in before if key not in after]
    return ", ".join(sorted({f"{type(module).__name__}.{name}" for module, name in keys}))


def _check_besides(module: nn.Module) -> None:
    """Refuse classes that do something besides forward; leaves may, for they stay the modules that they
    are."""
    for path, child in module.named_modules():
        if type(child).__module__.startswith("torch.nn.") or isinstance(child, fx.GraphModule):
            continue
        for name in _BESIDES:
            if getattr(type(child), name, None) is not getattr(nn.Module, name, None):
                where = f"{path or 'it'} [{type(child).__name__}]"
                raise Unclean(f"{where} has a {name} of its own, which a graph has not: {OWN}")


def matrices(module: nn.Module) -> int:
    """How many matrices a module holds that a linear may read, its own or called by function; none of
    torch's own modules but Linear, and no embeddings."""
    return sum(
        parameter is not None and parameter.ndim == 2
        for child in module.modules()
        if not is_closed(child) and not isinstance(child, nn.Embedding)
        for parameter in child._parameters.values()
    )


def is_closed(module: nn.Module) -> bool:
    """Whether a module is torch's own and neither linear nor container: norms are best left whole, and
    attention reads its children's weights past their forward."""
    containers = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    return type(module).__module__.startswith("torch.nn.") and not (
        type(module) in containers or is_linear(module)
    )


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module stays one call: torch's own other than Linear, what reads `self.training`, and PEFT's
    layers, the only ones that may hold linears.

    Raises:
        Unclean: it would, and holds linears.
    """
    if not _stays(module):
        return False
    if is_adapter(module):
        return True
    if matrices(module) or any(is_linear(child) for child in module.modules()):
        kind = type(module).__name__
        raise Unclean(
            f"holds linears in a {kind}, which reads self.training or is torch's own: draw in an "
            "nn.Dropout, and write nn.Linear"
        )
    return True


def _stays(module: nn.Module) -> bool:
    return is_adapter(module) or _reads_training(type(module)) or is_closed(module)


def _trace_linear(module: nn.Module) -> fx.Graph:
    """A linear alone, which has no caller to be traced from."""
    graph = fx.Graph(tracer_cls=RegionTracer)
    x = graph.placeholder("input")
    weight = graph.get_attr("weight")
    if linear_arguments(module)[2]:
        weight = graph.call_method("t", (weight,))
    bias = graph.get_attr("bias") if module.bias is not None else None
    graph.output(graph.call_function(F.linear, (x, weight, bias)))
    return graph


def _check_signature(module: nn.Module) -> None:
    forward = type(module).forward
    if "forward" in vars(module):
        raise Unclean(
            "its forward was replaced or compiled: put back its own (del module.forward), apply the passes, "
            "and do that then"
        )
    if hasattr(forward, "__wrapped__"):
        raise Unclean(f"its forward is decorated: {OWN}")
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Unclean("its forward takes open arguments: name them, or " + OWN)
        if parameter.default is not parameter.empty:
            # A proxy is never None, so a branch on a missing argument would be frozen the wrong way.
            raise Unclean(
                f"argument '{parameter.name}' of its forward has a default: take the default away, or {OWN}"
            )


def _check_none(shadow: Shadow, graph: fx.Graph, tracer: Tracer, beside: Beside) -> None:
    """Refuse what hangs on an argument being None (`act24.passes.graph.missing`)."""
    check_none(graph, tracer.asks_none, lambda none: Tracer(shadow, _is_leaf, beside.note).record(none))


def _check_casts(shadow: Shadow, graph: fx.Graph, tracer: Tracer, beside: Beside) -> None:
    """Refuse a forward that asks for the dtype of a value and does more than cast it.

    The graph is of the dtypes that differ. Traced again with the answer that they do not, it has to be the
    same but for casts of that value to that dtype, which then change nothing.
    """
    for number, pair in enumerate(tracer.casts):
        other = Tracer(shadow, _is_leaf, beside.note).record(equal=number)
        needless = {node: node.args[0] for node in graph.nodes if _casts(node, *pair)}
        if said(other) != said(graph, needless=needless):
            one, two = (f"that of {of.name}" if isinstance(of, fx.Node) else str(of) for of in pair)
            raise Unclean(
                f"does something else where two dtypes are one, {one} and {two}, which a graph cannot ask: "
                f"do it for every dtype, or {OWN}"
            )


def _casts(node: fx.Node, a: fx.Node | torch.dtype, b: fx.Node | torch.dtype) -> bool:
    """Whether a node casts one of two values to the other's dtype."""
    if node.op != "call_method" or not node.args:
        return False
    value, *rest = (*node.args, *(v for name, v in node.kwargs.items() if name in ("dtype", "other")))
    if len(rest) != len(node.args) + len(node.kwargs) - 1 or value not in (a, b):
        return False
    dtype = b if value is a else a
    if not rest:
        return _NAMED.get(str(node.target)) is dtype
    (to,) = rest if len(rest) == 1 else (None,)
    of = to.args[0] if isinstance(to, fx.Node) and to.target is getattr and to.args[1] == "dtype" else to
    return node.target in ("to", "type", "type_as") and of is dtype


#: Casts that name their dtype.
_NAMED = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


def _reads_training(cls: type) -> bool:
    """Whether a method of the class, own or inherited up to nn.Module, mentions `.training`."""
    functions = (
        value.__code__
        for base in cls.__mro__
        if base not in (nn.Module, object)
        for value in [*vars(base).values()]
        if inspect.isfunction(value)
    )
    return any("training" in code.co_names for function in functions for code in _codes(function))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
