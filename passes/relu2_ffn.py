"""`relu2_ffn`: a gated feed-forward network becomes a plain one with squared ReLU.

    down(silu(gate(x)) * up(x))   ==>   down(relu(up(x))²)

also where one linear computes gate and up, and with GELU in the place of SiLU where that is asked for. Two
matrices instead of three, so F grows to 1.5 F at equal parameters, rounded to the nearest multiple of 128,
which the 2:4 kernels' tiles need (arXiv 2503.16672, section 1). The function changes and no weight of the
wider network comes from the old one: training starts anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from act24.options import Range
from act24.passes.base import Match, Plan, StateMap, StructuralPass
from act24.passes.graph.activation_kinds import activates, activation_kind, activations
from act24.passes.graph.gated import Gated, end_of, gated_networks
from act24.passes.graph.linear_sites import tied
from act24.passes.graph.normal_form import (
    common_path,
    is_adapter,
    is_call,
    is_product,
    is_transposed,
    nodes_of,
    readers,
    replace_node,
    source_name,
    weight_source,
)
from act24.passes.graph.region import ParameterSpec, Region
from act24.passes.graph.remade import remade
from act24.relu2 import relu2

_MULTIPLE = 128
_LEAVE = "leave it out with ignore"
_NOT_GATED = 'give it relu² (transformers: its activation "relu2"), and use activation24 alone'
#: The activations of the gates that the pass takes.
_TAKEN = ("silu", "gelu")
_FUNCTIONS = {"relu2": relu2, "relu": F.relu}


@dataclass(frozen=True, kw_only=True)
class Relu2FFN(StructuralPass):
    """Options of `relu2_ffn`.

    Attributes:
        activation: `"relu"` gives down(relu(up(x))) instead, which is less sparse.
        width: `"parity"` takes F to 1.5 F, rounded to a multiple of 128, which keeps the parameter count;
            `"exact"` rounds down to a whole number, as the public scripts do, and takes only multiples of 4
            (kernels want more); `"keep"` leaves F, and then `up` and `down` keep their weights too.
        gate: the activation of the networks that are taken: `"silu"`, `"gelu"` in any of its forms, or both.
            Another one changes less of the network than the pass does anyway, but nobody has published it.
        initializer_range: standard deviation of fresh weights (LLaMA's 0.02).
    """

    name: ClassVar[str] = "relu2_ffn"
    takes_named: ClassVar[bool] = False
    spares: ClassVar[str] = f"no part of a down(silu(gate(x)) * up(x)): {_NOT_GATED}"

    activation: Literal["relu2", "relu"] = "relu2"
    width: Literal["parity", "exact", "keep"] = "parity"
    gate: Literal["silu", "gelu", "any"] = "silu"
    initializer_range: Annotated[float, Range(gt=0)] = 0.02

    @property
    def covers(self) -> tuple[str, ...]:
        return ("mlp",)

    @property
    def starts_fresh(self) -> bool:
        return self.width != "keep"

    def plan(self, region: Region) -> Plan:
        matches, misses = [], []
        for found in gated_networks(region):
            if found.kind not in _TAKEN:
                continue
            linears = (found.gate, found.up, found.down)
            names = [name for linear in linears if (name := weight_source(linear))]
            path = common_path(*names)
            if not self.selects(region, path, names):
                continue
            reason = (
                self.split(region, names)
                or self._other_gate(found)
                or _obstacle(region, found)
                or self._unfit(region, found)
            )
            if not reason and not self.names(region, path):
                reason = _partly_frozen(region, found)
            if reason:
                misses.append((path, reason))
            else:
                matches.append(self._match(region, path, found))
        absent = self.spares if matches or misses else _describe(region)
        return Plan(tuple(matches), tuple(misses), absent)

    def _other_gate(self, found: Gated) -> str:
        """Why a network of this gate is none of those that are taken, or the empty string."""
        taken = self.gate in ("any", found.kind)
        return "" if taken else f'gated by {found.kind}: set gate = "{found.kind}" to take it'

    def _unfit(self, region: Region, found: Gated) -> str:
        """Why F cannot become what `width` says, or the empty string."""
        new = self._width(found.width(region))
        unfit = self.width == "exact" and new % 4
        return (
            f'F would be {new}, not a multiple of 4: set width = "parity", which rounds it' if unfit else ""
        )

    def _width(self, width: int) -> int:
        return {"keep": width, "exact": 3 * width // 2, "parity": parity_width(width)}[self.width]

    def _match(self, region: Region, path: str, found: Gated) -> Match:
        width = found.width(region)
        new = self._width(width)
        removed = _parameters(found.gate, found.up, found.down)
        kept = _parameters(found.up, found.down)
        before = sum(region.parameters[name].numel() for name in removed)
        specs = _resized(region, found, new)
        # Half of what a fused linear held was the gate, also where the new shape happens to be the old one.
        fused = _parameters(found.up) if found.fused else ()
        changed = tuple(n for n in kept if n in fused or specs[n].shape != region.parameters[n].shape)
        fresh = () if self.width == "keep" else changed
        specs = {
            n: replace(spec, requires_grad=n in fresh or spec.requires_grad) for n, spec in specs.items()
        }
        after = sum(spec.numel() for spec in specs.values())
        carried = tuple(name for name in kept if name not in fresh)
        halved = {name: width * (not found.up_first) for name in changed if name not in fresh}
        return Match(
            path=path,
            before=f"{found.kind}(gate)·up, F {width}",
            after=f"{self.activation}(up), F {new}",
            nodes=(found, specs),
            parameters_before=before,
            parameters_after=after,
            state=StateMap(
                removes=tuple(name for name in removed if name in changed or name not in kept),
                creates=changed,
                from_stock=None if fresh else lambda removed: _halves(removed, halved, width),
                why=f"{'SwiGLU' if found.kind == 'silu' else 'GEGLU'} and relu² are different functions",
            ),
            reaches=tuple(n for linear in (found.gate, found.up, found.down) if (n := weight_source(linear))),
            note=_note(region, path, carried, fresh, [*halved]),
        )

    def _rewrite(self, region: Region, match: Match) -> None:
        found, resized = match.nodes
        assert match.state is not None
        specs, fill = {name: resized[name] for name in match.state.creates}, match.state.from_stock
        initialise = self._initialise(specs) if fill is None else lambda old, generator: fill(old)
        region.create(specs, initialise, replaces=match.state.removes)
        with region.graph.inserting_before(found.product):
            activation = region.graph.call_function(_FUNCTIONS[self.activation], (found.up,))
        replace_node(region.graph, found.product, activation)

    def _initialise(self, specs: Mapping[str, ParameterSpec]) -> Any:
        def initialise(old: Mapping[str, Tensor], generator: Any) -> dict[str, Tensor]:
            return {
                name: torch.zeros(spec.shape, device="cpu")
                if len(spec.shape) == 1
                else torch.empty(spec.shape, dtype=torch.float32, device="cpu").normal_(
                    0, self.initializer_range, generator=generator(name)
                )
                for name, spec in specs.items()
            }

        return initialise


def _halves(old: Mapping[str, Tensor], halved: Mapping[str, int], width: int) -> dict[str, Tensor]:
    """What up has of the linears that computed gate too, by the row where its half begins."""
    return {name: old[name].narrow(0, start, width).clone() for name, start in halved.items()}


def _note(
    region: Region, path: str, carried: Sequence[str], fresh: Sequence[str], halved: Sequence[str]
) -> str:
    """What becomes of the weights of a network, and of those among them that are frozen."""

    def listed(names: Sequence[str]) -> str:
        return ", ".join(name.removeprefix(f"{path}.") for name in names)

    def frozen(names: Sequence[str]) -> list[str]:
        return [name for name in names if not region.parameters[name].requires_grad]

    kept = f"weights kept, up's half of {listed(halved)}" if halved else "weights kept"
    notes = [f"fresh: {listed(fresh)}" if fresh else kept]
    notes += [f"frozen before, and train: {listed(frozen(fresh))}"] if frozen(fresh) else []
    notes += [f"stay frozen: {listed(frozen(carried))}"] if frozen(carried) else []
    return "; ".join(notes)


def parity_width(width: int) -> int:
    """1.5 F, rounded to the nearest multiple of 128, and at least 128."""
    return max(1, (3 * width + _MULTIPLE) // (2 * _MULTIPLE)) * _MULTIPLE


def gate_in(region: Region) -> str:
    """The activation of the first gated network in a region, or the empty string."""
    return next((found.kind for found in gated_networks(region) if found.kind in _TAKEN), "")


def _obstacle(region: Region, found: Gated) -> str:
    """Why a gated network that was found cannot be rewritten, or the empty string."""
    linears = (found.gate, found.up, found.down)
    if found.gate.args[0] is not found.up.args[0]:
        return f"gate and up read different inputs: {_LEAVE}"
    for linear in (found.gate, found.up):
        inside = {node for node in found.between if node is not found.product} | {linear}
        if any(user not in found.between for node in inside for user in node.users):
            return f"the output of {weight_source(linear)} is used elsewhere too: {_LEAVE}"
    for linear in linears:
        name = weight_source(linear)
        if name is None or name not in region.parameters or is_transposed(linear):
            return f"a weight is not a plain parameter stored [out, in]: make it one, or {_LEAVE}"
    names = _parameters(*linears)
    own = {*linears, *(node for node in found.between if is_call(node, F.linear))}
    if not any(region.parameters[name].requires_grad for name in names):
        return "frozen, and what takes its place would never train: unfreeze it, or leave it out with ignore"
    for name in names:
        if shared := region.parameters[name].shared:
            return f"{region.name(name)} is {tied(shared[0])}"
        if readers(region.graph, name) > sum(name in _parameters(linear) for linear in own):
            return f"{region.name(name)} is used more than once: {_LEAVE}"
    return ""


def _partly_frozen(region: Region, found: Gated) -> str:
    """Why a network that nobody has named stays as it is: the first of its parameters that is frozen."""
    frozen = (
        name
        for name in _parameters(found.gate, found.up, found.down)
        if not region.parameters[name].requires_grad
    )
    name = next(frozen, None)
    return (
        "" if name is None else f"{region.name(name)} is frozen: unfreeze it, or name the network in targets"
    )


def _parameters(*linears: fx.Node) -> tuple[str, ...]:
    names = [name for linear in linears for name in (weight_source(linear), source_name(linear.args[2]))]
    return tuple(dict.fromkeys(name for name in names if name))


def _resized(region: Region, found: Gated, width: int) -> dict[str, ParameterSpec]:
    """The parameters of up and down for another F: rows of up, columns of down."""
    specs = {}
    for linear, dimension in ((found.up, 0), (found.down, 1)):
        for name in _parameters(linear):
            spec = region.parameters[name]
            shape = list(spec.shape)
            if dimension < len(shape):  # the bias of down has no F
                shape[dimension] = width
            specs[name] = replace(spec, shape=torch.Size(shape), shared=())
    return specs


def _foreign_gate(region: Region, product: fx.Node) -> str:
    """The activation, none of silu and gelu, that gates a network with this product; or the empty string."""
    if not is_call(next(iter(end_of(region, product).users), None), F.linear):
        return ""
    for gate in product.all_input_nodes:
        if activates(gate, region.module) and is_call(gate.all_input_nodes[0], F.linear):
            called = region.module.get_submodule(str(gate.target)) if gate.op == "call_module" else None
            kind = str(getattr(gate.target, "__name__", gate.target))
            return "" if activation_kind(gate, region.module) else type(called).__name__ if called else kind
    return ""


def _between(region: Region, product: fx.Node, *factors: Any) -> str:
    """What keeps a gated product from the linears that its network would have, by name."""
    behind = next(iter(end_of(region, product).users), None)
    for node in (*factors, behind):
        if isinstance(node, fx.Node) and not is_call(node, F.linear):
            return str(getattr(node.target, "__name__", node.target))
    return "another use of one of them"


def _describe(region: Region) -> str:
    """What the region has instead of a gated network."""
    called = [n.target for n in region.graph.nodes if n.op == "call_module"]
    for name in called:
        if call := remade(region.module.get_submodule(name)):
            return f"the weight of {name} is computed in forward: call {call} first, or {_LEAVE}"
    products = [n for n in region.graph.nodes if is_product(n) and len(n.all_input_nodes) == 2]
    foreign = (found.kind for found in gated_networks(region) if found.kind not in _TAKEN)
    if kind := next(filter(None, (*foreign, *(_foreign_gate(region, node) for node in products))), ""):
        return f"gated by {kind}: give the gate silu or gelu, which this pass takes, or {_LEAVE}"
    if any(True for _ in nodes_of(region.graph, relu2)):
        return "already relu²: use activation24 alone"
    for product in products:
        for gated, other in (product.args, product.args[::-1]):
            if activation := activation_kind(gated, region.module):
                between = _between(region, product, activation.source, other)
                return (
                    f"gated by {activation.kind}, but {between} lies between its product and the linears "
                    f"around it: take that out, or {_LEAVE}"
                )
    plain = (one.kind for one in activations(region.graph, region.module) if is_call(one.source, F.linear))
    if kind := next(plain, ""):
        return f"its activation is {kind}, and nothing gates it: {_NOT_GATED}"
    linears = len(list(nodes_of(region.graph, F.linear)))
    if linears == 1:
        return "a single linear: leave it to other passes"
    adapted = any(map(is_adapter, region.module.modules()))
    todo = "merge its adapters first (merge_and_unload)" if adapted else _NOT_GATED
    return f"{linears} linears, but no down(silu(gate(x)) * up(x)): {todo}"
