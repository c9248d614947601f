"""A decoder block over a cache, made from the block's own graph.

    attention(q, k, v, causal)        ==>   attend(q, k, v, keys, values, place)
    linear(relu2(h), W)               ==>   skipping_linear(h, W, "relu2")             if skipping
    activation24(x, W_in, W_out, …)   ==>   skipping_linear(activation24(…), W_out)    if skipping
    linear(x, W), linear(x, V)        ==>   split(linear(x, rows of W and V))          if fused
    linear(x, W), W 2:4               ==>   packed_linear(x, values, codes)            if packed
    linear(x, W), x one token         ==>   streamed_linear(x, W)                      if streamed
    linear(x, W), W 2:4, of a prompt  ==>   product_linear(x, packed)                  where that is faster

All else stays as it is, whatever passes made of the block. Blocks with equal code share one function, so that
torch.compile compiles it once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from act24.errors import Act24Error
from act24.inference.attention import attend
from act24.inference.linears import (
    PACKED_TOKENS,
    SKIPPING_TOKENS,
    fuse_,
    is_2_4,
    packed_linear,
    product_linear,
    skipping_linear,
    store_by_feature_,
    streamed_linear,
    why_not_read_packed,
)
from act24.relu2 import relu2
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.kernels.pack_weight import pack_weight_rows
from act24.sparse24.kernels.packed_decode import packed_for_decode
from act24.sparse24.kernels.shared.self_check import kernel_obstacle, kernel_obstacle_on

#: (block, hidden [B, S, D], cos, sin [B, S, d / 2], keys, values [B, H_kv, L, d], place) -> [B, S, D]
LayerForm = Callable[..., Tensor]

_INPUTS = ("hidden_states", "cos", "sin")
_CACHE = ("act24_keys", "act24_values", "act24_place")
_FUNCTIONS = {relu2: "relu2", F.relu: "relu", torch.relu: "relu"}

#: Endings of the buffers of a packed weight, beside it in the block: for steps, and for prompts.
VALUES, CODES, PACKED = "_packed_values", "_packed_codes", "_packed24"

#: Beginning of the name of a buffer of several weights, and the ending of one of their biases.
FUSED, BIAS = "act24_fused_", "_bias"

#: Elements of what kernels load at once.
_LOAD = 8

#: The kernels of `Choice.skipping` and `Choice.packed`, which check themselves on first use.
SKIPPING_KERNELS, PACKED_KERNELS = ("skipping_product",), ("packed_decode",)


class Choice(NamedTuple):
    """How a block multiplies in a step.

    Attributes:
        skipping: leave out rows of weights behind relu² that zeros would multiply.
        packed: read 2:4 weights packed.
        fused: multiply one input with several weights, as those of q, k and v, in one product.
        streamed: multiply one token with a weight that is read whole by a kernel of ours, not by cuBLAS.
    """

    skipping: bool = False
    packed: bool = False
    fused: bool = False
    streamed: bool = False

    def __str__(self) -> str:
        told = {
            "skipping": self.skipping,
            "2:4 weights": self.packed,
            "fused products": self.fused,
            "streamed weights": self.streamed,
        }
        return " and ".join(part for part, used in told.items() if used) or "dense"


DENSE = Choice()


def cached_layers(
    layers: Sequence[nn.Module], choice: Choice = DENSE, products: Mapping[tuple[int, int], int] | None = None
) -> list[LayerForm]:
    """For each block the function that computes it over a cache.

    Args:
        choice: for which the blocks are laid out (`lay_out_`); with `packed`, a packed copy of each 2:4
            weight comes into the block.
        products: for prompts, by the shape `[N, K]` of a weight the algorithm by which cuSPARSELt multiplies
            it if it is 2:4; a packed copy of it comes into the block.

    Raises:
        Act24Error: a block is none of act24's, or its attention is not the causal one of `act24.llama`.
    """
    forms: dict[tuple[Any, ...], LayerForm] = {}
    found = []
    for index, layer in enumerate(layers):
        graph = _traced(layer, f"block {index}")
        if choice.fused:
            _fuse(graph, layer)
        if choice.skipping:
            _skip(graph)
        graph.eliminate_dead_code()
        if choice.packed:
            _pack(graph, layer)
        if products:
            _multiply(graph, layer, products)
        if choice.streamed:
            _stream(graph)
        graph.eliminate_dead_code()
        graph.lint()
        code = graph.python_code("self")
        key = (code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
        if key not in forms:
            forms[key] = type(fx.GraphModule(layer, graph)).forward
        found.append(forms[key])
    return found


class Weights(NamedTuple):
    """Of a block, the parameters that a choice lays out anew, or reads in another form.

    Attributes:
        behind: weights behind an activation, of which zeros need no rows.
        together: by the name of a buffer, parameters that can be one tensor, behind each other: weights that
            multiply the same input, and their biases.
        sparse: shapes `[N, K]` of the linears whose weights are 2:4.
        packable: the kernel of steps can read one of them packed.
    """

    behind: tuple[Tensor, ...]
    together: dict[str, tuple[Tensor, ...]]
    sparse: frozenset[tuple[int, int]]
    packable: bool


def weights_of(layers: Sequence[nn.Module]) -> list[Weights]:
    """What there is in each block. Looks at the values of its weights."""
    found = []
    for index, layer in enumerate(layers):
        graph = _traced(layer, f"block {index}")
        behind = tuple(_tensor(layer, each.weight) for each in _activations(graph))
        together = {}
        for group in _groups(graph, layer):
            weights, biases = group.parameters(layer)
            together[group.name] = weights
            if biases:
                together[group.name + BIAS] = biases
        weights = [_weight(layer, linear) for linear in _linears(graph)]
        sparse = frozenset((len(weight), weight.shape[1]) for weight in weights if is_2_4(weight))
        packable = any(not why_not_read_packed(weight) for weight in weights)
        found.append(Weights(behind, together, sparse, packable))
    return found


def can_use(weights: Sequence[Weights]) -> Choice:
    """What of `Choice` there is in a model."""
    return Choice(
        any(each.behind for each in weights),
        any(each.packable for each in weights),
        any(each.together for each in weights),
    )


def lay_out_(layer: nn.Module, weights: Weights, choice: Choice) -> None:
    """Rearrange a block's parameters in memory as a choice reads them. Their values and shapes stay, and
    there is no second copy: weights that are fused become views of one tensor, a buffer of the block."""
    for weight in weights.behind:
        store_by_feature_(weight, choice.skipping)
    if choice.fused:
        for name, parameters in weights.together.items():
            fuse_(layer, name, parameters)


def step_choices(rows: int, there: Choice, dtype: torch.dtype, device: torch.device) -> tuple[Choice, ...]:
    """The choices that a step with so many rows may try: those whose kernels are right on the device. Which
    of them is fastest is measured, block by block, when the step is captured.

    Args:
        there: what of it the model has (`can_use`).
    """
    kernels = device.type == "cuda" and dtype is torch.bfloat16
    skips = kernels and there.skipping and rows <= SKIPPING_TOKENS
    packs = kernels and there.packed and rows <= PACKED_TOKENS
    skipping = (False, True) if skips and not kernel_obstacle_on(device, SKIPPING_KERNELS) else (False,)
    packed = (False, True) if packs and not kernel_obstacle_on(device, PACKED_KERNELS) else (False,)
    return tuple(Choice(s, p) for s in skipping for p in packed)


def why_not_streamed(rows: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why a step does not try the kernel for one token; empty if it does."""
    if rows != 1:
        return f"the kernel is for one row, these are {rows}"
    if dtype.itemsize != 2:
        return f"the kernel is for 16 bits, the model is {dtype}"
    return kernel_obstacle(device, ("dense_decode",))


def _traced(layer: nn.Module, name: str) -> fx.Graph:
    graph = _Tracer().trace(layer)
    graph.owning_module = layer  # type: ignore[assignment]  # in which it looks for modules
    inputs = tuple(node.target for node in graph.nodes if node.op == "placeholder")
    cores = [node for node in graph.nodes if node.target is F.scaled_dot_product_attention]
    causal = [node for node in cores if len(node.args) == 3 and node.kwargs.get("is_causal") is True]
    if inputs != _INPUTS or len(cores) != 1 or not causal:
        raise Act24Error(
            f"{name} is no decoder block of act24.llama: it takes {', '.join(map(str, inputs))} and has "
            f"{len(causal)} causal attentions of {len(cores)}; generation needs one"
        )
    (core,) = causal
    last = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    with graph.inserting_after(last):
        cache = [graph.placeholder(name) for name in reversed(_CACHE)][::-1]
    with graph.inserting_before(core):
        core.replace_all_uses_with(graph.call_function(attend, (*core.args, *cache)))
    graph.erase_node(core)
    return graph


class _Tracer(fx.Tracer):
    """Through linears, which a stock block still has as modules; norms stay."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Linear) and super().is_leaf_module(m, module_qualified_name)


def _linears(graph: fx.Graph) -> list[fx.Node]:
    """Linears whose weight is a parameter."""
    return [n for n in graph.nodes if n.target is F.linear and _argument(n, 1, "weight").op == "get_attr"]


def _argument(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _tensor(layer: nn.Module, node: fx.Node) -> Tensor:
    """The parameter or buffer that a node reads."""
    path, _, name = str(node.target).rpartition(".")
    return getattr(layer.get_submodule(path), name)


def _weight(layer: nn.Module, linear: fx.Node) -> Tensor:
    return _tensor(layer, _argument(linear, 1, "weight"))


class _Group(NamedTuple):
    """Linears of the same input, whose weights can be one.

    Attributes:
        name: of the buffer that holds the weights; with `BIAS` behind it, the biases.
        linears: in the order of the graph.
        biased: they have biases, all of them.
    """

    name: str
    linears: list[fx.Node]
    biased: bool

    def parameters(self, layer: nn.Module) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Weights, and biases where there are some."""
        weights = tuple(_weight(layer, linear) for linear in self.linears)
        if not self.biased:
            return weights, ()
        return weights, tuple(_tensor(layer, _argument(linear, 2, "bias")) for linear in self.linears)


def _groups(graph: fx.Graph, layer: nn.Module) -> list[_Group]:
    """Groups of linears whose weights can be one tensor. Each weight is in one group at most. A group has
    either only weights that can be packed or none, because it is packed as a whole. Each weight begins at a
    multiple of 16 bytes, which kernels load at once."""
    found: dict[tuple[Any, ...], list[fx.Node]] = {}
    for linear in _linears(graph):
        weight, bias = _weight(layer, linear), _argument(linear, 2, "bias")
        if len(weight) % _LOAD == 0 and (bias is None or bias.op == "get_attr"):
            kind = (bias is not None, weight.dtype, bool(why_not_read_packed(weight)))
            found.setdefault((linear.args[0], *kind), []).append(linear)
    groups = [(linears, biased) for (_, biased, *_), linears in found.items() if len(linears) > 1]
    return [_Group(f"{FUSED}{n}", linears, biased) for n, (linears, biased) in enumerate(groups)]


class _Activation(NamedTuple):
    """An activation and the one linear behind it.

    Attributes:
        node: what `skipping_linear` takes the place of.
        weight, bias: of the linear.
        before: what makes the argument and the function of `skipping_linear`, put before `node`.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    before: Callable[[fx.Graph], tuple[Any, str]]


def _activations(graph: fx.Graph) -> list[_Activation]:
    found = []
    for linear in _linears(graph):
        activation: Any = linear.args[0]
        if activation.target in _FUNCTIONS and len(activation.users) == 1:
            weight, bias = _argument(linear, 1, "weight"), _argument(linear, 2, "bias")
            found.append(_Activation(linear, weight, bias, _before_relu(activation)))
    for node in graph.nodes:
        weight = node.args[3] if node.target is activation24 else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and not _is_fp8(node):
            taken = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
            if len(taken) == len(node.users) == 1:
                found.append(_Activation(taken[0], weight, node.args[4], _before_24(node)))
    return found


def _is_fp8(node: fx.Node) -> bool:
    options: Any = node.args[-1]  # a named tuple, which is a node of its own once it is traced again
    if isinstance(options, fx.Node):
        kind: Any = options.target
        options = kind(*options.args)
    return options.precision == "fp8"


def _before_relu(node: fx.Node) -> Callable[[fx.Graph], tuple[Any, str]]:
    return lambda graph: (node.args[0], _FUNCTIONS[node.target])  # type: ignore[index]


def _before_24(node: fx.Node) -> Callable[[fx.Graph], tuple[fx.Node, str]]:
    """The 2:4 activation alone, of a network that `activation24` computes whole."""

    def before(graph: fx.Graph) -> tuple[fx.Node, str]:
        arguments: tuple[Any, ...] = node.args
        x, weight_in, bias_in, _, _, *rest = arguments
        hidden = x if weight_in is None else graph.call_function(F.linear, (x, weight_in, bias_in))
        sparse = graph.call_function(activation24, (hidden, None, None, None, None, *rest))
        return graph.call_function(operator.getitem, (sparse, 0)), "none"

    return before


def _skip(graph: fx.Graph) -> None:
    for found in _activations(graph):
        with graph.inserting_before(found.node):
            hidden, function = found.before(graph)
            arguments = (hidden, found.weight, found.bias, function)
            found.node.replace_all_uses_with(graph.call_function(skipping_linear, arguments))


def _fuse(graph: fx.Graph, layer: nn.Module) -> None:
    for group in _groups(graph, layer):
        first = group.linears[0]
        with graph.inserting_before(first):
            weight = graph.get_attr(group.name)
            bias = graph.get_attr(group.name + BIAS) if group.biased else None
            whole = graph.call_function(F.linear, (first.args[0], weight, bias))
            sizes = [len(_weight(layer, linear)) for linear in group.linears]
            parts = graph.call_function(torch.split, (whole, sizes, -1))
            for n, linear in enumerate(group.linears):
                linear.replace_all_uses_with(graph.call_function(operator.getitem, (parts, n)))
        for linear in group.linears:
            graph.erase_node(linear)


def _pack(graph: fx.Graph, layer: nn.Module) -> None:
    for linear in _linears(graph):
        name = str(_argument(linear, 1, "weight").target)
        weight = _weight(layer, linear)
        if why_not_read_packed(weight):
            continue
        _keep(layer, name, dict(zip((VALUES, CODES), packed_for_decode(weight), strict=True)))
        with graph.inserting_before(linear):
            parts = [graph.get_attr(name + ending) for ending in (VALUES, CODES)]
            arguments = (linear.args[0], *parts, _argument(linear, 2, "bias"))
            linear.replace_all_uses_with(graph.call_function(packed_linear, arguments))


def _stream(graph: fx.Graph) -> None:
    for linear in _linears(graph):
        with graph.inserting_before(linear):
            arguments = (linear.args[0], _argument(linear, 1, "weight"), _argument(linear, 2, "bias"))
            linear.replace_all_uses_with(graph.call_function(streamed_linear, arguments))


def _multiply(graph: fx.Graph, layer: nn.Module, products: Mapping[tuple[int, int], int]) -> None:
    for linear in _linears(graph):
        name, weight = str(_argument(linear, 1, "weight").target), _weight(layer, linear)
        algorithm = products.get((len(weight), weight.shape[1]))
        if algorithm is None or not is_2_4(weight):
            continue
        _keep(layer, name, {PACKED: pack_weight_rows(weight.detach().contiguous(), weight != 0)})
        with graph.inserting_before(linear):
            packed, bias = graph.get_attr(name + PACKED), _argument(linear, 2, "bias")
            arguments = (linear.args[0], packed, bias, algorithm)
            linear.replace_all_uses_with(graph.call_function(product_linear, arguments))


def _keep(layer: nn.Module, name: str, parts: Mapping[str, Tensor]) -> None:
    """Register what a weight was packed into beside it, by the ending of its name."""
    path, _, leaf = name.rpartition(".")
    owner = layer.get_submodule(path)
    for ending, part in parts.items():
        if hasattr(owner, leaf + ending):  # of an earlier generator, with weights that may have changed
            getattr(owner, leaf + ending).copy_(part)
        else:  # past what refuses new tensors in a rewritten model: the graph that is made here reads them
            nn.Module.register_buffer(owner, leaf + ending, part, persistent=False)
