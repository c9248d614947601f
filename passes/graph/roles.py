"""What a linear is for: attention, a feed-forward network, a router, or something else.

Where a graph shows what surrounds a linear, the graph says it (`act24.passes.graph.flow`): what feeds or
follows attention's products is attention, what feeds or follows an activation is a feed-forward network, what
ends in a choice of the largest, in a softmax over a few, or as the weight of what other branches give, is a
router, and so is what feeds that alone; what is only added to attention's scores is a bias of them. A linear
that is a region of its own shows nothing, so there the names and classes around it are asked, from the inside
out; and of a network that is one and stands in attention, whether it reads and gives as many features.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import fx, nn

from act24.passes.graph.activation_kinds import activates
from act24.passes.graph.adapters import adapters_in
from act24.passes.graph.flow import PRODUCTS, Flow
from act24.passes.graph.normal_form import asks_kind, is_call, is_product, is_transposed, weight_source

Role = Literal["attn", "mlp", "router", "bias", "lora", "head", "other"]

_ATTENTION = re.compile(r"attn|attention|Attention")
_MLP = re.compile(
    r"mlp|MLP|ffn|FFN|feed_?forward|FeedForward|dense_?relu_?dense|DenseAct|DenseGated|^ff$", re.I
)
_ROUTER = re.compile(r"[Rr]out(er|e|ing)|TopK\w*Gate|MoEGate|MoeGate")
_NOISE = re.compile(r"(^|_)nois(e|y)", re.I)
_CHOOSES = re.compile(r"gat(e|ing)|rout", re.I)
#: What makes a bias of attention's scores, mostly of positions.
_BIAS = re.compile(
    r"pos(ition)?(al)?(_[xyz])?_?bias|rel(ative)?_?bias|bias_?(mlp|net)|rel(ative)?_?pos(ition)?(al)?_?(mlp|net)|"
    r"(^|_)(cpb|rpe|dpb)(_|$)",
    re.I,
)
_LORA = re.compile(r"(^|\.)lora_[A-Za-z_]+(\.|$)")
_ATTENTION_LEAVES = {
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "qkv",
    "query",
    "key",
    "value",
    "c_attn",
    "Wqkv",
}
_ATTENTION_LEAVES |= {"query_key_value", "q", "k", "v", "in_proj_qkv"}
_BESIDE_QUERIES = {"o_proj", "out_proj", "o", "dense"}
_MLP_LEAVES = {
    "fc1",
    "fc2",
    "w1",
    "w2",
    "w3",
    "wi",
    "wi_0",
    "wi_1",
    "c_fc",
    "lin1",
    "lin2",
    "linear1",
    "linear2",
}
_MLP_LEAVES |= {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h"}
_MLP_LEAVES |= {"linear2", "intermediate", "wo", "fc_in", "fc_out"}


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, by `transformers`' own name for it or as `lm_head`; None
    where there is none, as in the stock model with tied embeddings."""
    held: Any = model
    if callable(getattr(held, "get_output_embeddings", None)):
        return held.get_output_embeddings()
    return getattr(held, "lm_head", None)


def roles_of(
    graph: fx.Graph,
    module: nn.Module,
    fqn: str,
    around: Mapping[str, nn.Module],
    adapters: Collection[str] = (),
) -> dict[str, Role]:
    """The roles of the weights of the linears in a region, by the weight's local name.

    Args:
        module: what was traced.
        fqn: where it stands.
        around: the model's modules by name.
        adapters: weights that are factors of LoRA's by the graph (`act24.passes.graph.adapters`).
    """
    linears = linears_in(graph, module)
    paths = {
        name: ".".join(part for part in (fqn, name.rpartition(".")[0]) if part)
        for names in linears.values()
        for name in names
    }
    hints: dict[str, Role] = {name: role_by_name(path, around, name) for name, path in paths.items()}
    if len(linears) > 1 and _is_of_other_widths(linears, module, fqn, around):
        hints.update((name, "bias") for name, role in hints.items() if role in ("attn", "mlp", "other"))
    hints.update((name, "lora") for name in paths if is_adapters(name) or name in adapters)
    shown = roles_in_graph(graph, module, hints=hints)
    roles: dict[str, Role] = {}
    head = head_of(around[""])
    for name, path in paths.items():
        named = hints[name]
        roles[name] = named if named == "lora" else shown.get(name, named)
        if head is not None and around.get(path) is head:
            roles[name] = "head"
    return roles


def computed(graph: fx.Graph, module: nn.Module) -> set[str]:
    """The parameters that linears read by way of something else, which makes their weight in forward."""
    linears = linears_in(graph, module)
    read = {name for node in linears if node.op != "call_module" and (name := weight_source(node))}
    return {name for names in linears.values() for name in names} - read


def linears_in(graph: fx.Graph, module: nn.Module) -> dict[fx.Node, list[str]]:
    """The linears of a graph, each with the parameters that its weight is made of; those that are called as
    modules have a weight that is computed."""
    found = {node: _weights_of(node) for node in graph.nodes if is_call(node, F.linear)}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(called := module.get_submodule(node.target), nn.Linear):
            found[node] = [f"{node.target}.{name}" for name, p in called.named_parameters() if p.ndim > 1]
    return {node: names for node, names in found.items() if names}


def _weights_of(linear: fx.Node) -> list[str]:
    """The parameters that the weight of a linear is, or is made of."""
    if name := weight_source(linear):
        return [name]
    return _made_of(linear.args[1])


def _made_of(value: object) -> list[str]:
    """The parameters that a value is made of; none if inputs or what linears compute are in it."""
    frontier, seen = [value], list[fx.Node]()
    while frontier:
        node = frontier.pop()
        if isinstance(node, fx.Node) and node not in seen and not asks_kind(node):
            seen.append(node)
            frontier += node.all_input_nodes
    made = any(node.op == "placeholder" or is_call(node, F.linear) for node in seen)
    return [] if made else [str(node.target) for node in seen if node.op == "get_attr"]


def roles_beside(graph: fx.Graph, module: nn.Module) -> dict[str, Role]:
    """The roles that a graph shows of the parameters that other products read, as `torch.einsum`, by name."""
    found: dict[fx.Node, list[str]] = {}
    for node in graph.nodes:
        if node.target in PRODUCTS:
            names = [name for operand in node.all_input_nodes for name in _made_of(operand)]
            found |= {node: names} if names else {}
    beside = {name for names in found.values() for name in names}
    shown = roles_in_graph(graph, module, found) if found else {}
    return {name: role for name, role in shown.items() if name in beside}


def roles_in_graph(
    graph: fx.Graph,
    module: nn.Module,
    beside: Mapping[fx.Node, list[str]] | None = None,
    hints: Mapping[str, Role] | None = None,
) -> dict[str, Role]:
    """The roles that a graph shows, by the weight's name. Around a linear alone there is little to see: no
    network, which has two.

    Args:
        beside: what else counts as linears, each with its parameters.
        hints: what names say: of two matrices of a router alone the graph shows that the first feeds it.
    """
    found: dict[str, Role] = {}
    calls = linears_in(graph, module) | dict(beside or {})
    flow = Flow(graph, module, calls, adapters_in(graph, module).sums)
    for node, names in calls.items():
        seen, ends = flow.walk(node)
        before, sources = flow.walk(node, up=True)
        first = node in flow.leading and all((hints or {}).get(name) == "router" for name in names)
        if node in flow.routers or first:
            found |= dict.fromkeys(names, "router")
        elif node in flow.biases:
            found |= dict.fromkeys(names, "bias")
        elif any(n in flow.scores for n in (*seen, *before)):
            found |= dict.fromkeys(names, "attn")
        elif len(calls) > 1 and (
            any(activates(n, module, gates=bool(ends)) for n in seen)
            or any(activates(n, module, gates=bool(sources)) for n in before)
            or (ends and any(map(is_product, seen)))
        ):
            # Attention around a network alone is not seen, and whose bias it makes its name says.
            alone = not flow.mixing and all((hints or {}).get(name) == "bias" for name in names)
            role: Role = "bias" if alone else "mlp"
            found |= dict.fromkeys((name for name in names if name not in found), role)
    for node, names in calls.items():  # a gate of what attention gives belongs to attention
        if any(found.get(name) == "mlp" for name in names) and "attn" in _behind(node, flow, found):
            found |= dict.fromkeys((name for name in names if found.get(name) == "mlp"), "attn")
    return found


def _behind(node: fx.Node, flow: Flow, roles: Mapping[str, Role]) -> list[Role | None]:
    """The roles of the linears that read what becomes of a linear by way of an activation or a product."""
    seen, ends = flow.walk(node)
    if not any(activates(n, flow.module) or is_product(n) for n in seen):
        return []
    return [roles.get(name) for end in ends for name in flow.linears.get(end, ())]


def is_adapters(name: str) -> bool:
    """Whether a parameter is a factor of LoRA's by its name, as a module's weight or as it is."""
    return _LORA.search(name.removesuffix(".weight")) is not None


def _is_of_other_widths(
    linears: Mapping[fx.Node, list[str]], module: nn.Module, fqn: str, around: Mapping[str, nn.Module]
) -> bool:
    """Whether a region stands in a module that holds linears of queries or keys, and neither reads nor gives
    as many features as those do: a network of the block's would do both."""
    parts = fqn.split(".")
    for end in range(len(parts) - 1, -1, -1) if fqn else ():
        held = around[".".join(parts[:end])]._modules
        beside = [held[name] for name in held if name in _ATTENTION_LEAVES]
        widths = {
            size
            for one in beside
            if one is not None
            for p in one.parameters()
            if p.ndim == 2
            for size in p.shape
        }
        if not widths:
            continue
        parameters = dict(module.named_parameters(remove_duplicate=False))
        first, *_, last = linears
        (reads, _), (_, gives) = (
            [*parameters[linears[node][0]].shape][
                :: 1 if is_call(node, F.linear) and is_transposed(node) else -1
            ]
            for node in (first, last)
        )
        return not {reads, gives} <= widths
    return False


def role_by_name(fqn: str, around: Mapping[str, nn.Module], parameter: str = "") -> Role:
    """What the names and classes around a module say that it is for, from the inside out.

    Args:
        fqn: of the module.
        around: the model's modules by name.
        parameter: the name of its parameter, which says something if it is not `weight`.
    """
    if _LORA.search(fqn):
        return "lora"
    parts = fqn.split(".")
    beside = _beside(parts, around)
    leaf = parts[-1]
    if (
        _ROUTER.search(leaf)
        or _ROUTER.search(_class(fqn, around))
        or (_CHOOSES.search(leaf) and "experts" in beside)
        or _is_noisy(parts, parameter, around)
    ):
        return "router"
    for end in range(len(parts), 0, -1):
        path = ".".join(parts[:end])
        for text in (parts[end - 1], _class(path, around)):
            if _ROUTER.search(text):
                return "router"
            if _BIAS.search(text):
                return "bias"
            if _MLP.search(text) and not _ATTENTION.search(text):
                return "mlp"
            if _ATTENTION.search(text):
                return "attn"
        if end == len(parts):
            continue
        inner = parts[end - 1]
        if inner == "intermediate" or (inner == "output" and "intermediate" in _beside(parts[:end], around)):
            return "mlp"
    if leaf in _ATTENTION_LEAVES or (leaf in _BESIDE_QUERIES and beside & _ATTENTION_LEAVES):
        return "attn"
    return "mlp" if leaf in _MLP_LEAVES else "other"


def mixes_tokens(module: nn.Module) -> bool:
    """Whether a module has what mixes tokens, as Mamba's: a convolution along them, or a state's decay."""
    along = (part for part in module.children() if isinstance(part, nn.Conv1d))
    return any(max(part.kernel_size) > 1 for part in along) or "A_log" in module._parameters


def _is_noisy(parts: Sequence[str], parameter: str, around: Mapping[str, nn.Module]) -> bool:
    """Whether a matrix is one of the two of noisy top-k gating (arXiv 1701.06538), by their names."""
    place = [*parts, own] if (own := parameter.rpartition(".")[2]) not in ("", "weight") else [*parts]
    owner = around.get(".".join(place[:-1]))
    beside = {*owner._modules, *owner._parameters} - {place[-1]} if owner is not None else set[str]()
    told = (_NOISE, _CHOOSES) if _NOISE.search(place[-1]) else (_CHOOSES, _NOISE)
    return told[0].search(place[-1]) is not None and any(map(told[1].search, beside))


def _class(fqn: str, around: Mapping[str, nn.Module]) -> str:
    return type(around[fqn]).__name__ if fqn in around else ""


def _beside(parts: Sequence[str], around: Mapping[str, nn.Module]) -> set[str]:
    parent = around.get(".".join(parts[:-1]))
    return set(parent._modules) if parent is not None else set()
