"""What of a model's matrices a pass reaches, and what it leaves, grouped, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from act24.passes.graph.linear_sites import tied
from act24.passes.graph.normal_form import is_linear, place_of
from act24.passes.graph.places import texts
from act24.passes.graph.proxies import OWN
from act24.passes.graph.region import Region, joined
from act24.passes.graph.remade import remade
from act24.passes.graph.roles import (
    Role,
    computed,
    head_of,
    is_adapters,
    mixes_tokens,
    role_by_name,
    roles_beside,
)

_SCOPES = ("attn", "mlp")
_NAMES: dict[str, str] = {"attn": "attention", "mlp": "feed-forward", "head": "head", "other": "other"}

#: The beginning of the reason why a module that has an activation is not traced.
HIDES = "its relu"

#: Why a pass leaves experts whose matrices lie in one tensor.
STACKED = "stacked parameters, which no pass takes apart: make linears of them, or leave it out with ignore"

#: Why a pass leaves a matrix that no linear reads as it is.
_COMPUTED = "its weight is computed in forward, not read"
_POINTWISE = "a convolution, which no pass takes: make a linear of it, or leave it out with ignore"
_UNREAD = "no linear that is traced reads it: multiply with it in F.linear, or leave it out with ignore"
_OTHER_ROLES = {
    "router": "a router",
    "bias": "a bias of attention's scores",
    "head": "the head",
    "lora": "LoRA's",
}
_NO_ROLE = "neither attention nor feed-forward"
_TO_NAME = "name it in targets to take it"
_BESIDE = "neither attention nor feed-forward: name it in targets to take it"

#: Names of modules that are neither attention nor feed-forward networks.
_NEITHER = re.compile(r"(^|[._])(lm_head|head|classifier|score|pooler|embed\w*)([._]|$)")

#: Names of what is added: biases of stacked experts, and of relative positions, have rows too.
_BIAS = re.compile(r"(^|[._])bias(es)?$")

#: Modules whose weights are no operands of matrix products.
_OTHERWISE = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Matrix:
    """A parameter of two or more dimensions.

    Attributes:
        name: fully qualified; the first one.
        path: of its module.
        numel: elements.
        role: what it is for.
        stacked: several matrices in one tensor, as experts are.
        region: it lies in one, by the fully qualified name of that.
        unknown: of a linear in a module that is not traced, and whose names do not say what it is for: it may
            be what any pass means.
        mixes: it stands in a module that mixes tokens, so that it is no part of a feed-forward network.
        computed: why no linear reads it as it is, or that an embedding has it too, and what to do; or the
            empty string.
        linear: its module is a linear.
        read: a linear that is traced reads it.
        adapts: of a factor of LoRA's that the graph shows, what it is an adapter of.
    """

    name: str
    path: str
    numel: int
    role: Role
    stacked: bool
    region: str | None
    unknown: bool = False
    mixes: bool = False
    computed: str = ""
    linear: bool = False
    read: bool = False
    adapts: str = ""

    @property
    def place(self) -> str:
        """What selectors, rows and reasons call it."""
        return place_of(self.name)

    @property
    def alone(self) -> bool:
        """Whether a pass that takes linears by name could have it, though not what is around it."""
        return self.unknown and self.linear and self.read


@dataclass(frozen=True)
class Coverage:
    """What one pass reaches.

    Attributes:
        pass_name: of the pass.
        scope: what its name promises, and what else it means, in words; "other" are linears that `targets`
            names, and those of which nobody knows what they are for.
        reached, total: elements of matrices in that scope, as far as targets and ignore leave it.
        left: (names, share, reason) of what it leaves there, the largest group first; behind them what is no
            part of the scope: routers, and linears that are neither attention nor feed-forward.
        promised: the pass means to reach all of it; else the share is for information.
        optional: the pass does not insist: less is no error, and no warning.
        where: the targets and what is ignored, in words, where the pass has any.
        unmet: selectors among these that name no module.
        idle: targets, or what they name, of which the pass takes nothing and that hold no matrix of its kind.
    """

    pass_name: str
    scope: str
    reached: int
    total: int
    left: tuple[tuple[str, float, str], ...]
    promised: bool = True
    optional: bool = False
    where: str = ""
    unmet: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether it is less than what was promised."""
        return self.promised and bool(self.reached < self.total or self.unmet or self.idle)

    def __str__(self) -> str:
        text = f"{self.pass_name} finds no {self.scope} matrices{self.where}"
        if self.total:
            # What is left does not round to nothing.
            share = f"{min(round(100 * self.reached / self.total), 100 - (self.reached < self.total))}%"
            text = f"{self.pass_name} reaches {share} of the {self.scope} matrices{self.where}"
        if self.unmet:
            text += f"; no module is named {', '.join(self.unmet)}: correct that, or leave it out"
        if self.idle:
            text += f"; nothing is taken of {', '.join(self.idle)}: take it out of targets"
        if self.left:
            text += "; left: " + "; ".join(
                f"{names} {f'{share:.0%} ' if share else ''}({reason})" for names, share, reason in self.left
            )
        return text


def matrices_of(model: nn.Module, regions: Sequence[Region], untraced: Mapping[str, str]) -> list[Matrix]:
    """The matrices of a model, tied ones once; what is a linear's and an embedding's as the linear's.

    Args:
        untraced: by full name, why a module is no region.
    """
    around = dict(model.named_modules(remove_duplicate=False))
    roles: dict[str, Role] = {
        joined(fqn, name): role for r in regions for fqn in r.fqns for name, role in r.roles.items()
    }
    others = {
        joined(fqn, name): role
        for r in regions
        for name, role in roles_beside(r.graph, r.module).items()
        for fqn in r.fqns
    }
    made = {joined(r.fqn, name) for r in regions for name in computed(r.graph, r.module)}
    inside = {joined(fqn, name): fqn for r in regions for fqn in r.fqns for name in r.parameters}
    adapters = {joined(fqn, name): of for r in regions for fqn in r.fqns for name, of in r.adapters.items()}
    found, shared, head = [], _of_embeddings(model), head_of(model)
    for first, parameter in model.named_parameters():
        name = shared.get(first, first)
        path = name.rpartition(".")[0]
        if parameter.ndim < 2 or (min(parameter.shape[:2]) < 2 and not is_linear(around[path])):
            continue
        pointwise = _is_pointwise(around[path])
        if not pointwise and isinstance(around[path], _OTHERWISE):
            continue
        if not is_linear(around[path]) and min(parameter.shape) < 2 and not pointwise:
            continue
        if _BIAS.search(name):
            continue
        role: Role = roles.get(name) or others.get(name) or role_by_name(path, around, name)
        if around[path] is head:
            role = "head"
        if is_adapters(name) or name in adapters:
            role = "lora"
        if role == "other":
            role = _role_beside(path, around, regions, untraced)
        if "expert" in path and role == "other":
            role = "mlp"
        linear = path.partition(".parametrizations.")[0]
        owner, parts = around[linear], linear.split(".")
        outside = {".".join(parts[:end]) for end in range(len(parts) + (not is_linear(owner)))}
        # A linear that computes its weight makes no region by itself, and has no reason why.
        stored = owner._parameters.get("weight") is not None
        hidden = isinstance(owner, nn.Linear) and not stored and name not in inside
        unknown = role == "other" and _calls_linear(owner) and (hidden or not outside.isdisjoint(untraced))
        unknown = unknown and _NEITHER.search(path) is None
        mixer = around[linear.rpartition(".")[0]] if is_linear(owner) else owner
        made_of = _POINTWISE if pointwise else _computed(owner) if hidden or name in made else ""
        stacked, region = parameter.ndim > 2 and not pointwise, inside.get(name)
        found.append(
            Matrix(
                name,
                path,
                parameter.numel(),
                role,
                stacked,
                region,
                unknown,
                mixes_tokens(mixer),
                computed=made_of if name == first else tied(first),
                linear=is_linear(owner),
                read=name in roles,
                adapts="" if is_adapters(name) else adapters.get(name, ""),
            )
        )
    return found


def _of_embeddings(model: nn.Module) -> dict[str, str]:
    """By the full name of an embedding's weight, that of the linear that has it too."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return {
        name: next(other for other in names if is_linear(modules[other.rpartition(".")[0]]))
        for name, *names in found.values()
        if isinstance(modules[name.rpartition(".")[0]], _OTHERWISE)
        and any(is_linear(modules[other.rpartition(".")[0]]) for other in names)
    }


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution multiplies with one matrix, as a linear does."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.transposed:
        return False
    return module.groups == 1 and set(module.kernel_size) == {1}


def _stacked(places: Iterable[str]) -> str:
    """`STACKED`, with what to ignore."""
    named = '", "'.join(texts(places))
    return (
        "stacked parameters, which no pass takes apart: make linears of them, or leave it out with "
        f'ignore = ["{named}"]'
    )


def by_name(why: str) -> str:
    """Why a linear that is a module already is left: where nothing else is to be done, naming it will do."""
    return why.replace(f"decorated: {OWN}", f"decorated: {_TO_NAME}")


def _holder(matrix: Matrix, matrices: Sequence[Matrix]) -> str:
    """What to ignore for a stacked matrix to be left out: the module that holds such alone, or itself."""
    inside = f"{matrix.path}."
    others = any(not m.stacked and f"{m.path}.".startswith(inside) for m in matrices)
    layer = matrix.path.rpartition(".")[2].isdigit()
    return matrix.place if others or layer or not matrix.path else matrix.path


def _computed(owner: nn.Module) -> str:
    """Why a matrix is left of which linears read what is computed of it."""
    first = f"call {call} first" if (call := remade(owner)) else "make it a weight first"
    return f"{_COMPUTED}: {first}, or leave it out with ignore"


def _calls_linear(module: nn.Module) -> bool:
    """Whether a module's own matrices are operands of linears."""
    code = getattr(type(module).forward, "__code__", None)
    return is_linear(module) or (code is not None and "linear" in code.co_names)


def _role_beside(
    path: str, around: Mapping[str, nn.Module], regions: Sequence[Region], untraced: Mapping[str, str]
) -> Role:
    """What a matrix is for whose names do not say it: what its like is for in a region of the same class, or
    a part of what has an activation."""
    parts = path.split(".")
    for end in range(len(parts)):
        owner, local = ".".join(parts[:end]), ".".join(parts[end:])
        cls = type(around[owner])
        ours = not cls.__module__.startswith("torch.")
        alike = (region for region in regions if ours and region.class_name("") == cls.__name__)
        for region in alike:
            for name, role in region.roles.items():
                if f"{local}.".startswith(f"{name.rpartition('.')[0]}."):
                    return role
    return "mlp" if untraced.get(".".join(parts[:-1]), "").startswith(HIDES) else "other"


def coverage(
    pass_name: str,
    scope: Iterable[str],
    matrices: Sequence[Matrix],
    selects: Callable[[str], bool],
    reached: Iterable[str],
    reasons: Mapping[str, str],
    otherwise: Mapping[str, str],
    promised: bool = True,
    gone: Collection[str] = (),
    named: Collection[str] = (),
    takes_named: bool = True,
) -> Coverage:
    """What a pass reaches.

    Args:
        scope: the roles that its name promises.
        selects: whether its targets and what it ignores let it act on a module or parameter, by full name.
        reached: the full names of the parameters that it rewrites, or of places that it rewrites whole.
        reasons: by full name of a place or module, why it is left.
        otherwise: the same, of linears around which nothing has a reason.
        promised: as in `Coverage`.
        gone: the names of matrices that passes take away, with nothing in their place; those that this one
            does not reach are no concern of its.
        named: the full names of places and parameters that it means, whatever they are for.
        takes_named: whether it takes linears of any purpose that its targets name.
    """
    roles = tuple(scope)
    hit = tuple(reached)
    done, left, seen = 0, dict[tuple[str, str], dict[str, int]](), set[Role]()
    stacked: dict[str, dict[str, None]] = {}
    for matrix in matrices:
        if not _meant(matrix, roles, selects, named):
            continue
        seen.add(matrix.role if matrix.role in _NAMES else "other")
        if any(_within(matrix, place) for place in hit):
            done += matrix.numel
            continue
        if matrix.name in gone:
            continue
        why = _reason(matrix, reasons, otherwise)[1]
        why = by_name(why) if takes_named and matrix.alone else why
        if matrix.stacked:
            place = _holder(matrix, matrices)
            stacked.setdefault(why := pattern(place), {})[place] = None
        left.setdefault((pattern(matrix.name), why), {})[matrix.place or matrix.name] = matrix.numel
    total = done + sum(sum(alike.values()) for alike in left.values())
    groups: dict[str, dict[str, int]] = {}
    for (_, why), alike in sorted(left.items(), key=lambda item: -sum(item[1].values())):
        groups.setdefault(why, {}).update(alike)
    named = {why: _stacked(stacked[why]) if why in stacked else why for why in groups}
    shown = tuple(
        (", ".join(texts(group)), sum(group.values()) / total, named[why]) for why, group in groups.items()
    )
    inside = {m.name for m in matrices if any(_within(m, place) for place in hit)}
    regions = {m.region for m in matrices if m.name in inside}
    beside: dict[str, dict[str, None]] = {}
    for m in matrices:
        if m.role in _SCOPES or m.name in gone or m.name in inside or not selects(m.place):
            continue
        alone = m.linear or m.role in ("router", "bias", "lora") or m.region in regions
        if alone and not _meant(m, roles, selects, named):
            why = _beside(m, takes_named) or _reason(m, reasons, otherwise)[1]
            beside.setdefault(why, {})[m.place or m.name] = None
    shown += tuple((", ".join(texts(names)), 0.0, reason) for reason, names in beside.items())
    *first, last = (text for role, text in _NAMES.items() if role in roles or role in seen)
    words = f"{', '.join(first)} and {last}" if first else last
    return Coverage(pass_name, words, done, total, shown, promised)


def left_alone(
    scope: Iterable[str],
    matrices: Sequence[Matrix],
    selects: Callable[[str], bool],
    reasons: Mapping[str, str],
    otherwise: Mapping[str, str],
    gone: Collection[str] = (),
    named: Collection[str] = (),
) -> list[tuple[str, str]]:
    """(place, reason) for the matrices in the scope of a pass that reaches nothing, each pair once: where the
    reason lies. Arguments as for `coverage`."""
    roles = tuple(scope)
    meant = [m for m in matrices if m.name not in gone and _meant(m, roles, selects, named)]
    return list(dict.fromkeys(_reason(matrix, reasons, otherwise) for matrix in meant))


def of_weights(reasons: Mapping[str, str], matrices: Iterable[Matrix]) -> dict[str, str]:
    """Reasons by the full names of places, those about a module's weight by the weight's: they say nothing of
    what else the module holds."""
    weights = {m.name for m in matrices}
    return {
        weight if (weight := f"{place}.weight") in weights else place: why for place, why in reasons.items()
    }


def _beside(matrix: Matrix, takes_named: bool) -> str:
    """What a matrix is that is no part of a scope, or the empty string: it has a reason.

    Args:
        takes_named: the pass would take it by its name.
    """
    if matrix.adapts:
        return f"adapter of {matrix.adapts}"
    if matrix.role in _OTHER_ROLES:
        return _OTHER_ROLES[matrix.role]
    if matrix.computed or not (matrix.linear or matrix.read):
        return ""
    return _BESIDE if takes_named else _NO_ROLE


def _meant(
    matrix: Matrix, roles: Collection[str], selects: Callable[[str], bool], named: Collection[str]
) -> bool:
    """Whether a pass means a matrix, reached or not."""
    unknown = matrix.unknown and not (matrix.mixes and tuple(roles) == ("mlp",))
    meant = matrix.role in roles or unknown or matrix.place in named or matrix.name in named
    return meant and selects(matrix.place)


def _within(matrix: Matrix, place: str) -> bool:
    """Whether a matrix lies in a place; a place that is a whole region has only those of the region."""
    if place in (matrix.name, matrix.path, "") or matrix.path.startswith(f"{place}."):
        return matrix.region is not None
    return False


def _reason(matrix: Matrix, reasons: Mapping[str, str], otherwise: Mapping[str, str]) -> tuple[str, str]:
    """The place that has the reason why a matrix is left, and the reason."""
    if matrix.stacked:
        return matrix.path, STACKED
    if matrix.computed:
        return matrix.path.partition(".parametrizations.")[0], matrix.computed
    if matrix.region is not None and not matrix.read:
        return matrix.path, _UNREAD
    if reason := reasons.get(matrix.name):
        return matrix.place, reason
    parts = matrix.place.split(".")
    for end in range(len(parts), -1, -1):
        if reason := reasons.get(place := ".".join(parts[:end])):
            return place, reason
    return matrix.path, otherwise.get(matrix.path) or _UNREAD


def pattern(name: str) -> str:
    """A name with its numbers as stars: the same matrix of all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name).removesuffix(".weight")
