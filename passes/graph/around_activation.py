"""Which linears around a 2:4 activation keep dense products, and why."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from act24.passes.graph.activation_sites import ActivationSite, drops_nothing, read_weights
from act24.passes.graph.linear_sites import CAST
from act24.passes.graph.normal_form import casts_weight, common_path, is_product, place_of
from act24.passes.graph.region import Region
from act24.sparse24.weight.linear24 import linear24

_GATED = (
    "the activation gates it, and only plain networks are 2:4 on both sides: give the gate silu "
    '(transformers: hidden_act = "silu"), and put relu2_ffn in front'
)
_WEIGHT24 = 'weight24 has it: put activation24 in front of weight24, or set scope = "attn" there'
_PARTS = (
    "other passes have made parts of it, and none has the activation alone: to change that, set scope = "
    '"attn" there'
)
_READ_TOO = "others read its output beside the activation: leave it out with ignore"
_READS_TOO = "others read the activation beside it: leave it out with ignore"


def spared(region: Region, site: ActivationSite, taken: Collection[fx.Node]) -> tuple[tuple[str, str], ...]:
    """(local path, reason) of the nearest linears around an activation whose products stay dense.

    Args:
        taken: the linears that belong to activations.
    """
    found: dict[str, str] = {}
    for up, own in ((True, site.before), (False, site.after)):
        frontier: list[tuple[fx.Node, fx.Node | None]] = [] if own else [(site.node, None)]
        seen = {site.node}
        while frontier:
            node, between = frontier.pop()
            near = [*(node.all_input_nodes if up else node.users)]
            if not up and between is not None and is_product(between):  # the other factor of a gate
                near += between.all_input_nodes
            for other in near:
                if other in seen or other.op in ("placeholder", "get_attr", "output"):
                    continue
                seen.add(other)
                if not (weights := read_weights(other)):
                    frontier.append((other, between or (None if drops_nothing(region, other) else other)))
                elif other not in taken:
                    weight = weights[-1 if up else 0]
                    made = weight in region.parameters and region.parameters[weight].factor
                    place = common_path(weight) if made else place_of(weight)
                    found.setdefault(place, _reason(region, site, other, weight, between, up))
    return tuple(found.items())


def _reason(
    region: Region, site: ActivationSite, linear: fx.Node, weight: str, between: fx.Node | None, up: bool
) -> str:
    if casts_weight(linear):
        return CAST
    if linear.target is linear24:
        return _WEIGHT24
    if weight in region.parameters and region.parameters[weight].factor:
        return _PARTS
    if between is None:
        return _READ_TOO if up else _READS_TOO
    if is_product(between) and not up and _gates(site.node, between):
        return _GATED
    if between.op != "call_module":
        kind = getattr(between.target, "__name__", between.target)
        return f"{kind} stands between it and the activation: take that out, or leave it out with ignore"
    kind = type(region.module.get_submodule(str(between.target))).__name__
    return f"{between.target} [{kind}] stands between it and the activation: put nn.Identity() there"


def _gates(activation: fx.Node, product: fx.Node) -> bool:
    """Whether a product has a factor that neither the activation nor what it is of makes: a number does not,
    nor does `h` in `h * relu(h)`."""
    known = _made_of(activation)
    return any(one not in known and activation not in _made_of(one) for one in product.all_input_nodes)


def _made_of(value: fx.Node) -> set[fx.Node]:
    """A value and what it is made of, up to the linears before it."""
    found, frontier = {value}, [value]
    while frontier:
        node = frontier.pop()
        if not read_weights(node):
            new = {*node.all_input_nodes} - found
            found |= new
            frontier += new
    return found
