"""Find the regions of a model and trace them.

A model is not traced as a whole. Its regions are the largest modules that trace cleanly
(`act24.passes.graph.clean_trace`) and repeat: the decoder blocks of the stock LLaMA; in a host framework's
model, whose blocks take open keyword arguments and are hooked and recorded by class, the MLPs and single
linears inside them. A module that does not repeat is a region too when nothing below it repeats; that may be
the model itself, which then stays an instance of its class all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from act24.errors import PassError
from act24.passes.graph.adapters import adapted, adapters_beside, adapters_in
from act24.passes.graph.check import Check
from act24.passes.graph.clean_trace import Trace, clean_trace, is_closed, matrices
from act24.passes.graph.coverage import HIDES, STACKED
from act24.passes.graph.normal_form import is_adapter, is_linear
from act24.passes.graph.region import ParameterSpec, Region, RegionModule, joined
from act24.passes.graph.roles import roles_of
from act24.passes.graph.tracer import Unclean


def trace(model: nn.Module, check: Check | None = None) -> tuple[list[Region], dict[str, str]]:
    """Find the regions of a model. The model is not touched.

    Args:
        check: compares each region with its module; None: they are not compared.

    Returns:
        the regions in the order in which the model lists its modules; and by "fqn [class]" the modules that
        were tried and could not be traced, with the reason.

    Raises:
        PassError: the model was already rewritten, or is compiled or wrapped.
    """
    places: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RegionModule):
            raise PassError(
                f"{fqn or 'this model'} was already rewritten: give all passes in one call of apply_, which "
                "plans them together"
            )
        places.setdefault(module, []).append(fqn)
    owners, around = _owners(model), dict(model.named_modules(remove_duplicate=False))
    unclean: dict[nn.Module, str] = {}
    found = list(_search(model, unclean, check))
    # A module that is shared may be a region in one place and a part of a larger one in another, where
    # nothing must take its place.
    taken = tuple(f"{fqn}." for module, _ in found for fqn in places[module] if fqn)
    stays = tuple(f"{fqn}." for fqn, module in around.items() if is_adapter(module))
    free = {
        module: [fqn for fqn in places[module] if not fqn.startswith(taken) or fqn.startswith(stays)]
        for module, _ in found
    }
    classes = {fqn: type(module).__name__ for fqn, module in around.items()}
    regions = [_region(m, traced, free[m], owners, around, classes, check) for m, traced in found]
    named = {f"{places[m][0] or 'the model'} [{type(m).__name__}]": why for m, why in unclean.items()}
    return regions, named


#: Why modules of torch that hold linears, as its attention does, stay as they are.
_CLOSED = "torch's own class reads weights past the forward of its linears: write it with nn.Linear instead"


def _search(
    model: nn.Module, unclean: dict[nn.Module, str], check: Check | None
) -> Iterator[tuple[nn.Module, Trace]]:
    counts = Counter(type(module) for module in model.modules())
    listed = {
        child
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for child in module
    }
    repeating = {module for module in model.modules() if counts[type(module)] > 1 or module in listed}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> Iterator[tuple[nn.Module, Trace]]:
        if module in seen:
            return
        seen.add(module)
        if is_closed(module):
            if any(map(is_linear, module.modules())):
                unclean[module] = _CLOSED
            return
        below = [child for child in module.modules() if child is not module]
        composite = [child for child in below if child in repeating and matrices(child) > 1]
        if module is model:  # a region only if there are but linears and what has none
            composite = [c for c in below if c in repeating and matrices(c) and not is_linear(c)]
        composite = [c for c in composite if not _holds(c)]
        if not matrices(module):
            closed = (child for child in below if is_closed(child))
            unclean.update({c: _CLOSED for c in closed if any(map(is_linear, c.modules()))})
            unclean.update({m: STACKED for m in module.modules() if not is_closed(m) and _stacks(m)})
            return
        contains = _holds(module) or is_adapter(module)
        if not contains and ((module is not model and module in repeating) or not composite):
            try:
                traced = clean_trace(module)
                if check is not None:
                    check.region(module, traced.graph)
                yield module, traced
                for (
                    node
                ) in traced.graph.nodes:  # a layer of PEFT's stays, and the linears in it are regions too
                    if node.op == "call_module" and is_adapter(stays := module.get_submodule(node.target)):
                        yield from visit(stays)
                return
            except Unclean as reason:
                unclean[module] = f"{_unseen(module)}{reason}"
        for child in module.children():
            yield from visit(child)

    yield from visit(model)


def _stacks(module: nn.Module) -> bool:
    return any(p is not None and p.ndim == 3 and min(p.shape) > 1 for p in module._parameters.values())


def _unseen(module: nn.Module) -> str:
    """What a module that is not traced has and activation24 would take, as the beginning of a reason."""
    held = {**vars(module), **module._modules}
    names = [name for name, value in held.items() if _is_relu(value)]
    code = getattr(type(module).forward, "__code__", None)
    if not names and (code is None or "relu" not in code.co_names):
        return ""
    return f"{HIDES}{f' ({names[0]})' if names else ''} is not seen: "


def _is_relu(value: object) -> bool:
    squared = type(value).__name__ == "ReLUSquaredActivation"  # transformers' own
    return squared or isinstance(value, nn.ReLU) or value is F.relu or value is torch.relu


def _holds(module: nn.Module) -> bool:
    """Whether a module only holds others, which are called past it."""
    return type(module).forward is nn.Module.forward


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter, by the identity of the tensor; of those that lie on the same memory,
    too, as one that is a view of another does."""
    owners: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    last, end = 0, (0, 0)
    for where, stop, one in sorted((*_memory(p), key) for key, p in tensors.items()):
        if where < end:
            owners[last] += [name for name in owners[one] if name not in owners[last]]
            owners[one] = owners[last]
        if stop > end:
            last, end = one, stop
    return owners


def _memory(tensor: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a tensor begins and ends, each as a storage and a byte of it; nowhere if it has no memory."""
    if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.is_meta or not tensor.numel():
        return (id(tensor), 0), (id(tensor), 0)
    storage, size = tensor.untyped_storage().data_ptr(), tensor.element_size()
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((count - 1) * stride for count, stride in strides)
    begin = tensor.storage_offset() * size
    return (storage, begin), (storage, begin + elements * size)


def _region(
    module: nn.Module,
    traced: Trace,
    fqns: list[str],
    owners: dict[int, list[str]],
    around: dict[str, nn.Module],
    classes: dict[str, str],
    check: Check | None,
) -> Region:
    parameters = {}
    inside = tuple(f"{path}." for path, child in module.named_modules() if is_adapter(child))
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if name.startswith(inside):
            continue  # of the regions there
        own = {joined(fqn, name) for fqn in fqns}
        shared = tuple(other for other in owners[id(tensor)] if other not in own)
        read_by = check.read_past(module, tensor) if check is not None and not shared else ""
        parameters[name] = ParameterSpec(
            tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, shared, read_by=read_by
        )
    graph, frozen = traced.graph, traced.frozen
    shown = adapters_in(graph, module).of.items()
    adapters = {name: adapted(joined(fqns[0], name), joined(fqns[0], weight)) for name, weight in shown}
    adapters |= adapters_beside(fqns[0], around)
    roles = roles_of(graph, module, fqns[0], around, adapters)
    region = Region(tuple(fqns), module, graph, parameters, classes=classes, frozen=frozen, roles=roles)
    return replace(region, adapters=adapters)
