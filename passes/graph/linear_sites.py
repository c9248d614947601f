"""The linears that a low-rank pass replaces: which, of what rank, and the options that all such passes share.

A linear belongs to attention or to an MLP by what surrounds it (`act24.passes.graph.roles`). Others (a head,
a router, a bias of attention's scores, LoRA's own factors) are left alone unless `targets` names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import Target

from act24.errors import PassError
from act24.options import Width
from act24.passes.base import Match, Pass, Plan, StructuralPass
from act24.passes.graph.normal_form import (
    asks_kind,
    cast_alike,
    casts_weight,
    is_cast,
    is_reserved,
    is_transposed,
    nodes_of,
    place_of,
    replace_node,
    source_name,
    weight_source,
)
from act24.passes.graph.region import Factor, ParameterSpec, Region
from act24.passes.graph.roles import Role

Scope = Literal["all", "attn", "mlp"]

#: What a pass leaves alone unless its targets name it.
_BY_NAME_ONLY = ("other", "router", "bias", "lora", "head")


@dataclass(frozen=True)
class LinearSite:
    """A linear.

    Attributes:
        path: its module, local to the region; of a weight that is not called `weight`, its own name.
        weight: local name of its weight.
        nodes: where it is called; more than once if the module is.
        shape: `(out, in)` of the weight, however it is stored.
        transposed: whether it is stored `[in, out]`.
        kind: what it is for (`act24.passes.graph.roles`).
        factor: which part of a dense weight its weight is; None: it is one.
        obstacle: why its weight cannot become anything else, or the empty string.
    """

    path: str
    weight: str
    nodes: tuple[fx.Node, ...]
    shape: tuple[int, int]
    transposed: bool
    kind: Role
    factor: Factor | None = None
    obstacle: str = ""

    def part(self, factor: Factor) -> str:
        """The local name of a part of the weight: `weight_in` for `"in"`."""
        return f"{self.weight}_{factor}"

    def beside(self, name: str) -> str:
        """The local name of something else that belongs to the weight, in the weight's module. Only a weight
        that is not called `weight` shows in it, since there may be another such weight beside it."""
        path, _, leaf = self.weight.rpartition(".")
        own = name if leaf == "weight" else f"{leaf}_{name}"
        return f"{path}.{own}" if path else own

    def dense(self, old: Mapping[str, Tensor]) -> Tensor:
        """The weight as `[out, in]`, a view, from the region's values by local name."""
        return old[self.weight].T if self.transposed else old[self.weight]

    def stored(self, dense: Tensor) -> Tensor:
        """A weight `[out, in]` as the module stores it: `[in, out]`, contiguous, if it is transposed."""
        return dense.T.contiguous() if self.transposed else dense


def linear_sites(region: Region, factors: bool = False) -> Iterator[LinearSite]:
    """The linears of a region that may be taken, in graph order.

    Args:
        factors: also those whose weights are factors that a low-rank pass made.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in nodes_of(region.graph, F.linear):
        name = weight_source(node)
        if name in region.parameters and not is_reserved(node):
            calls.setdefault(name, []).append(node)
    for name, nodes in calls.items():
        transposed = is_transposed(nodes[0])
        spec = region.parameters[name]
        if spec.factor is not None and not factors:
            continue
        path = place_of(name.removesuffix(f"_{spec.factor}"))
        rows, columns = spec.shape
        shape = (columns, rows) if transposed else (rows, columns)
        role, obstacle = region.roles.get(name, "other"), _obstacle(region, name, nodes)
        yield LinearSite(path, name, tuple(nodes), shape, transposed, role, spec.factor, obstacle)


#: Why a pass leaves a linear whose weight is cast where it is read.
CAST = (
    "its weight is cast in forward, which this pass does not keep: read it as it is, with the model in that "
    "dtype or under autocast, or leave it out with ignore"
)


def _obstacle(region: Region, name: str, nodes: list[fx.Node]) -> str:
    """Why a weight cannot become anything else in these linears, or the empty string."""
    if not (dtype := region.parameters[name].dtype).is_floating_point:
        kind = str(dtype).removeprefix("torch.")
        return f"its weight is {kind}, and passes take real floating point: {_REAL}"
    reader, _, replaced = region.parameters[name].read_by.partition(".")
    if replaced:  # it is bound to the modules as they are, and so runs past what takes their place
        return (
            f"the forward of a {reader} around it was replaced or compiled, and reads its weight past the "
            "linear: put back its own (del module.forward), apply the passes, and do that then"
        )
    if reader:
        return f"a {reader} around it reads its weight past the linear: {_OWN}"
    if len({is_transposed(node) for node in nodes}) > 1:
        return f"one product reads it as it is and another transposed, tied: {_OWN}"
    if _reads(region.graph, name) > len(nodes):
        return f"something else than linears reads it too: {_OWN}"
    return CAST if any(map(casts_weight, nodes)) else ""


#: What to do about a weight whose numbers no pass takes.
_REAL = "make real linears of its parts, or leave it out with ignore"

#: What to do about a weight with two purposes.
_OWN = "give each a weight of its own, or leave it out with ignore"


def _reads(graph: fx.Graph, name: str) -> int:
    """How many nodes read a parameter's values, as it is, transposed or cast; a cast to its dtype none."""
    frontier = [node for node in graph.nodes if node.op == "get_attr" and node.target == name]
    reads = 0
    while frontier:
        node = frontier.pop()
        of_it = [user for user in node.users if not asks_kind(user) and user.all_input_nodes[0] is node]
        passing = [user for user in of_it if is_cast(user) or user.target == "t"]
        reads += sum(not asks_kind(user) for user in node.users) - len(passing)
        frontier += passing
    return reads


def takes(p: Pass, scope: Scope, region: Region, site: LinearSite) -> bool:
    """Whether a pass takes a linear: its targets do, and it stands where `scope` says. A linear outside
    attention and MLPs is taken only by a target that is not everything."""
    inside = p.names(region, site.path) if site.kind in _BY_NAME_ONLY else scope in ("all", site.kind)
    return inside and p.selects(region, site.path)


def roles_in(scope: Scope) -> tuple[Role, ...]:
    """The roles that a scope means."""
    return ("attn", "mlp") if scope == "all" else (scope,)


def free_linears(
    p: Pass, scope: Scope, region: Region, misses: list[tuple[str, str]], factors: bool = False
) -> Iterator[LinearSite]:
    """The linears that a pass takes (`takes`) and nothing keeps as they are.

    Args:
        misses: gets those that something does, by path, and what.
        factors: as `linear_sites` has it.
    """
    for site in linear_sites(region, factors):
        if not takes(p, scope, region, site):
            continue
        if site.obstacle:
            misses.append((site.path, site.obstacle))
        else:
            yield site


#: What to do about a size that is no multiple of what is wanted.
RESIZE = "build the model with such a size, or leave it out with ignore"


def no_linear(p: Pass, region: Region, scope: Scope = "all", factors: bool = False) -> str:
    """Why a pass found no linear in a region, or not those that other passes have, and what to do.

    Args:
        factors: as `linear_sites` has it.
    """
    sites = list(linear_sites(region, factors=True))
    if not sites:
        return "no linear that other passes have left and nothing else reads: leave it to them"
    targeted = [site for site in sites if p.selects(region, site.path)]
    if not targeted:
        named = _named(region, sites[0])
        return f"no linear that is targeted and not ignored: name one in targets, as {named}"
    elsewhere = [site for site in targeted if site.kind not in _BY_NAME_ONLY]
    kinds = sorted({site.kind for site in elsewhere if factors or site.factor is None})
    if scope != "all" and kinds and scope not in kinds:
        kind = kinds[0]
        if scope in region.roles.values():
            return f'other passes have those in scope "{scope}": leave the pass out, or set scope = "{kind}"'
        return f'no linear in scope "{scope}": set scope = "{kind}", or "all"'
    if len(elsewhere) == len(targeted):
        if len(kinds) == 1 and scope == "all" and hasattr(p, "scope"):
            return f'another pass has it: leave it to that one, scope = "{kinds[0]}"'
        if kinds:
            return "another pass has it: leave it to that one, with ignore"
        return (
            "no linear but the factors that another pass has made: narrow that one's scope, or leave this out"
        )
    named = _named(region, next(site for site in targeted if site.kind in _BY_NAME_ONLY))
    return (
        "no linear that is known to be attention's or a feed-forward network's: name those that are meant in "
        f"targets, as {named}"
    )


def _named(region: Region, *sites: LinearSite, key: str = "targets") -> str:
    """Selectors that take linears, and those in their places in other layers."""
    found = dict[str, None]()
    for site in sites:
        alike = re.sub(r"(?<![^.])\d+(?![^.])", "*", region.name(site.path))
        selector = region.name(site.path) if alike == "*" else alike  # "*" is what is there without it
        found[f'"{selector or "re:.*"}"'] = None
    return f"{key} = [{', '.join(found)}]"


def tied(name: str) -> str:
    """Why a pass leaves a linear whose weight is another parameter too."""
    return f"tied to {name}: untie them, or leave it out with ignore"


#: Why a pass leaves a linear that does not train.
FROZEN = "frozen: name it in targets to change it all the same"


def frozen(p: Pass, region: Region, site: LinearSite) -> bool:
    """Whether a linear's weight does not train, and nobody has asked for it by name."""
    return not region.parameters[site.weight].requires_grad and not p.names(region, site.path)


@dataclass(frozen=True, kw_only=True)
class FactorisingPass(StructuralPass):
    """Options of the passes that factorise linears.

    Attributes:
        keeps_casts: factors are cast as their weight is, where a forward casts it.
        scope: linears of attention (`"attn"`), of the MLPs (`"mlp"`), or both.
        attn_rank: rank R of attention's linears, 1 or more. It must be given if they are in scope.
        mlp_rank: the same for the MLPs' linears, and for linears outside both that `targets` names.
    """

    keeps_casts: ClassVar[bool] = False

    scope: Scope = "all"
    attn_rank: Width | None = None
    mlp_rank: Width | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, kind in (("attn_rank", "attn"), ("mlp_rank", "mlp")):
            if getattr(self, key) is None and self.scope in ("all", kind):
                raise PassError(
                    f"{self.name}: {key} is missing, which scope '{self.scope}' needs: give a rank, {key}=…"
                )

    @property
    def covers(self) -> tuple[str, ...]:
        return roles_in(self.scope)

    def plan(self, region: Region) -> Plan:
        sites = [site for site in linear_sites(region) if takes(self, self.scope, region, site)]
        misses = []
        for site in sites:
            if site.obstacle and not (site.obstacle == CAST and self.keeps_casts):
                misses.append((site.path, site.obstacle))
            elif shared := region.parameters[site.weight].shared:
                if site.kind in _BY_NAME_ONLY:  # asked for by name
                    raise PassError(
                        f"{self.name}: {region.name(site.weight)} is tied to {shared[0]}, and factors "
                        "would part the two: untie them (tie_word_embeddings = False), or take it out of "
                        "targets"
                    )
                misses.append((site.path, tied(shared[0])))
            elif frozen(self, region, site):
                misses.append((site.path, FROZEN))
        left = {path for path, _ in misses}
        free = [site for site in sites if site.path not in left]
        matches = tuple(
            self._noted(region, self._match(region, site, self._rank(region, site))) for site in free
        )
        return Plan(matches, tuple(misses), absent=no_linear(self, region, self.scope))

    def _rank(self, region: Region, site: LinearSite) -> int:
        key = "attn_rank" if site.kind == "attn" else "mlp_rank"
        rank = getattr(self, key)
        if rank is None:
            raise PassError(
                f"{self.name}: {key} is missing, which {region.name(site.path)} needs: give a rank, {key}=…"
            )
        if rank > min(site.shape):
            raise PassError(
                f"{self.name}: {key} = {rank} is above {min(site.shape)}, the smaller side of "
                f"{region.name(site.path)} [{site.shape[0]}, {site.shape[1]}]: take a lower rank, or "
                f"{self._without(region, site.kind, rank)}"
            )
        return rank

    def _without(self, region: Region, kind: str, rank: int) -> str:
        """How linears are left out that are smaller than their rank: with their kind, if all of it in a block
        are. A region that is no block shows only some of them."""
        alike = [site for site in linear_sites(region) if site.kind == kind]
        smaller = [site for site in alike if min(site.shape) < rank]
        other = {"attn": "mlp", "mlp": "attn"}.get(kind)
        block = other in region.roles.values()
        if block and len(alike) > 1 and len(smaller) == len(alike):
            return f'set scope = "{other}"' if self.scope == "all" else "leave the pass out"
        taken = [site for site in smaller if self.selects(region, site.path)]
        return f"leave it out with {_named(region, *taken, key='ignore')}"

    @property
    def first_values(self) -> str:
        """What becomes of the values of a weight, for the report."""
        return "fresh: its factors" if self.starts_fresh else "starts from its weight, as another function"

    def _noted(self, region: Region, match: Match) -> Match:
        """A match with a word on what becomes of its weight, and of one that is frozen."""
        site, specs = match.nodes
        notes = [self.first_values]
        if not self.starts_fresh and _is_zero(region, site.weight):
            notes.append("its weight is zero: weight_in is drawn, weight_out is 0")
        if not region.parameters[site.weight].requires_grad:
            trains = any(spec.requires_grad for spec in specs.values())
            notes.append("its weight was frozen, its factors train" if trains else "its factors stay frozen")
        return replace(match, note="; ".join(notes))

    def _match(self, region: Region, site: LinearSite, rank: int) -> Match:
        """The match of a linear; its nodes are the site, and what takes the place of its weight."""
        raise NotImplementedError


def _is_zero(region: Region, name: str) -> bool:
    """Whether a weight that is there holds but zeros, as the last one of a branch often does."""
    weight = dict(region.module.named_parameters(remove_duplicate=False)).get(name)
    if weight is None or type(weight) is not torch.nn.Parameter or weight.is_meta:
        return False
    return not weight.detach().any()


def factor_specs(region: Region, site: LinearSite, rank: int) -> dict[str, ParameterSpec]:
    """`weight_in` `[R, in]` and `weight_out` `[out, R]`, otherwise like the weight."""
    out_features, in_features = site.shape
    return {
        site.part("in"): part_spec(region, site, "in", (rank, in_features)),
        site.part("out"): part_spec(region, site, "out", (out_features, rank)),
    }


def part_spec(region: Region, site: LinearSite, factor: Factor, shape: tuple[int, int]) -> ParameterSpec:
    """A part of the weight, of another shape and otherwise like it; it trains, also where the weight is one
    that is frozen and was named all the same."""
    return replace(region.parameters[site.weight], shape=torch.Size(shape), factor=factor, requires_grad=True)


def bottleneck(region: Region, site: LinearSite, call: fx.Node, activation: Target | None) -> fx.Node:
    """Insert activation(linear(x, weight_in)), `[..., R]`, at the graph's point of insertion.

    Args:
        call: of the linear; only its input x is read.
        activation: None for the linear alone.
    """
    graph = region.graph
    weight = cast_alike(graph, call, graph.get_attr(site.part("in")))
    hidden = graph.call_function(F.linear, (call.args[0], weight, None))
    return hidden if activation is None else graph.call_function(activation, (hidden,))  # type: ignore[arg-type]


def factorise(region: Region, site: LinearSite, activation: Target | None) -> None:
    """Every call of the linear becomes linear → activation → linear, the bias on the second."""
    for call in site.nodes:
        with region.graph.inserting_before(call):
            hidden = bottleneck(region, site, call, activation)
            weight = cast_alike(region.graph, call, region.graph.get_attr(site.part("out")))
            output = region.graph.call_function(F.linear, (hidden, weight, call.args[2]))
        replace_node(region.graph, call, output)


def parameters_before(region: Region, site: LinearSite) -> int:
    """Elements in the weight and the bias."""
    names = (site.weight, source_name(site.nodes[0].args[2]))
    return sum(region.parameters[name].numel() for name in names if name in region.parameters)
