"""What a pipeline did, or would do, as data that prints as a table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, get_args

from torch import nn

from act24.passes.base import Match, OperationalPass, Pass, Plan, StructuralPass
from act24.passes.graph.coverage import (
    Coverage,
    Matrix,
    by_name,
    coverage,
    left_alone,
    matrices_of,
    of_weights,
)
from act24.passes.graph.flops import region_flops, uncounted
from act24.passes.graph.normal_form import is_linear, place_of
from act24.passes.graph.places import Pattern, every, patterns, renamed, shared, text, texts
from act24.passes.graph.region import Factor, Region, joined
from act24.passes.graph.selectors import idle_targets, names, takes
from act24.words import counted

Key = TypeVar("Key")


@dataclass(frozen=True)
class Row:
    """One place that one pass rewrites."""

    pass_name: str
    fqn: str
    before: str
    after: str
    parameters_before: int
    parameters_after: int
    steps: str
    note: str
    reaches: tuple[str, ...] | None = field(default=None, compare=False)  # full names; None: all in the place
    spared: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # (full name of a module, reason)


@dataclass(frozen=True)
class Report:
    """Everything that a pipeline does to a model.

    Attributes:
        rows: by pass, in order.
        misses: (pass, fqn, reason) where a pass came close and left things as they are.
        parameters_before, parameters_after: of the whole model, tied parameters once.
        flops_before, flops_after: multiply-adds of the regions' linears times two, forward, per token;
            products with a 2:4 operand count half. What no pass can change is left out: attention scores, and
            a head that the model computes itself from tied embeddings.
        checked: what was checked on numbers, and what was not.
        uncounted: matrices that FLOPs leave out, as no linear that is traced reads them as they are, by name.
        coverage: of each pass with a scope, what it reaches of the matrices in it, and what it leaves.
        unwatched: what tracing has frozen and nobody would notice a change of, by name.
        untrained: which passes make fresh what another one freezes, and what to do; empty: none.
    """

    rows: tuple[Row, ...]
    misses: tuple[tuple[str, str, str], ...]
    parameters_before: int
    parameters_after: int
    flops_before: int
    flops_after: int
    uncounted: tuple[str, ...] = ()
    checked: str = ""
    coverage: tuple[Coverage, ...] = ()
    unwatched: tuple[str, ...] = ()
    untrained: str = ""

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, say: Callable[[str], str] = str, width: Callable[[str], int] = len) -> list[str]:
        """As text: a row a pass, and below the table what else there is to say.

        A row has a line for each kind of place: what is alike there, layers too, has one, `{0..11}`. Below
        stands what the pass makes of their parameters, from which step on, and its note.

        Args:
            say: what takes words to another language.
            width: of a text on the terminal; a Chinese character takes two places.
        """
        return [*self._table(say, width), *map(say, self._remarks())]

    def _table(self, say: Callable[[str], str], width: Callable[[str], int]) -> list[str]:
        if not self.rows:
            return [say("nothing to rewrite")]
        kinds: list[tuple[str, Pattern, str, str, str]] = []  # pass, places, before, after, what is below
        by_pass = _grouped(self.rows, lambda row: (row.pass_name, row.steps, row.note))
        for (name, steps, note), rows in by_pass:
            for (before, after), alike in _grouped(rows, lambda row: (row.before, row.after)):
                kinds += [(name, place, before, after, "") for place in patterns([row.fqn for row in alike])]
            kinds[-1] = (*kinds[-1][:-1], "; ".join(filter(None, (_parameters(rows), steps, note))))
        common = shared([place for _, place, *_ in kinds])
        cells = [tuple(map(say, ("pass", "module", "before", "after")))]
        for index, (name, place, before, after, _) in enumerate(kinds):
            again = index > 0 and kinds[index - 1][0] == name
            cells.append(("" if again else name, text(place[common:]), say(before), say(after)))
        head, *lines = aligned(cells, width)
        found = [say(f"in {text(kinds[0][1][:common])}:"), head] if common else [head]
        indent = " " * (2 + max(width(name) for name, *_ in cells))
        for line, (*_, below) in zip(lines, kinds, strict=True):
            found += [line, indent + say(below)] if below else [line]
        return found

    def _remarks(self) -> list[str]:
        left = [
            f"{name} leaves {place or 'the model'} as it is: {why}"
            for name, place, why in _alike(self.misses)
        ]
        figures = (
            f"parameters {self.parameters_before:,} → {self.parameters_after:,}, "
            f"FLOPs per token, forward {self.flops_before:,} → {self.flops_after:,}"
        )
        missing = ", ".join(self.uncounted)
        uncounted = [f"FLOPs leave out {missing}: no linear that is traced reads it as it is"]
        figures_and_rest = [figures, *(uncounted if self.uncounted else ())]
        unwatched = [f"frozen by tracing, and not watched: {what}" for what in self.unwatched]
        untrained = [self.untrained] if self.untrained else []
        rest = [*map(str, self.coverage), *untrained, *self.checked.splitlines(), *unwatched]
        return [*left, *figures_and_rest, *rest]

    @property
    def partial(self) -> tuple[Coverage, ...]:
        """Of passes that reach less than their scope and targets promise."""
        return tuple(one for one in self.coverage if one.partial)


def aligned(rows: Sequence[Sequence[str]], width: Callable[[str], int] = len) -> list[str]:
    """Rows of equally many cells as lines, each column as wide as its widest cell.

    Args:
        width: of a cell on the terminal; a Chinese character takes two places.
    """
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell + " " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _grouped(rows: Sequence[Row], key: Callable[[Row], Key]) -> Iterable[tuple[Key, list[Row]]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found.items()


def _alike(misses: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Misses of one reason as one, where it names the place too."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name, fqn, reason in misses:
        groups.setdefault((name, renamed(fqn, reason, "*")), {})[fqn] = reason
    found = []
    for (name, _), alike in groups.items():
        for places in patterns([*alike]):
            where, first = text(places), next(every(places))
            found.append((name, where, renamed(first, alike[first], where)))
    return found


def _parameters(rows: Sequence[Row]) -> str:
    """Of all the places, where a pass changes them."""
    before, after = sum(row.parameters_before for row in rows), sum(row.parameters_after for row in rows)
    return f"{before:,} → {after:,} parameters" if before != after else ""


def untrained(passes: Sequence[Pass], rows: Sequence[Row]) -> str:
    """Which passes make fresh what another one freezes, and what to do; the empty string where none do."""
    acting = {row.pass_name for row in rows}
    structural = [p for p in passes if isinstance(p, StructuralPass) and p.name in acting]
    made = ", ".join(dict.fromkeys(p.name for p in structural if p.starts_fresh))
    adapters = ", ".join(dict.fromkeys(p.name for p in structural if p.freezes))
    if not (made and adapters):
        return ""
    return (
        f"{adapters} freezes all but its adapters, and so what {made} makes fresh never trains: load trained "
        f"weights into it, or leave the adapters to a later run"
    )


def row(p: Pass, region: Region, match: Match) -> Row:
    """What one match of a pass is in the report."""
    steps = ""
    if isinstance(p, OperationalPass) and (p.from_step or p.until_step is not None):
        steps = f"from step {p.from_step}" + (f" until {p.until_step}" if p.until_step is not None else "")
    return Row(
        pass_name=p.name,
        fqn=region.name(match.path) or "the model",
        before=match.before,
        after=match.after,
        parameters_before=match.parameters_before,
        parameters_after=match.parameters_after,
        steps=steps,
        note=match.note,
        reaches=None if match.reaches is None else tuple(map(region.name, match.reaches)),
        spared=tuple((region.name(path), why) for path, why in match.spared),
    )


def figures(
    model: nn.Module, traced: Sequence[Region], base: Sequence[Region], lowered: Sequence[Region]
) -> dict[str, Any]:
    """The figures of a report by name.

    Args:
        traced, base, lowered: the regions as they were, behind the structural passes, and behind all.
    """
    tensors = {id(tensor): tensor.numel() for tensor in model.parameters()}
    before = sum(tensors.values())
    change = sum(new.numel() - old.numel() for old, new in zip(traced, base, strict=True))
    read = [(region, region.roles.keys() - uncounted(region)) for region in traced]
    counted = {joined(fqn, name) for region, names in read for fqn in region.fqns for name in names}
    others = (
        name
        for name, p in model.named_parameters()
        if p.ndim > 1 and min(p.shape) > 1 and name not in counted
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding | nn.EmbeddingBag)
    )
    return {
        "uncounted": tuple(texts(place_of(name) or name for name in others)),
        "parameters_before": before,
        "parameters_after": before + change,
        "flops_before": sum(region_flops(region) * len(region.fqns) for region in traced),
        "flops_after": sum(region_flops(region) * len(region.fqns) for region in lowered),
    }


def coverages(
    model: nn.Module,
    regions: Sequence[Region],
    passes: Sequence[Pass],
    rows: Sequence[Row],
    unclean: Mapping[str, str],
    misses: Sequence[tuple[str, str, str]],
    absent: Sequence[tuple[str, str, str]],
    gone: Collection[str],
    base: Sequence[Region],
) -> tuple[Coverage, ...]:
    """What passes reach of a model, each once.

    Args:
        regions: as they were.
        unclean: the modules that are no regions, and why.
        misses, absent: (pass, full name of a place or region, reason) of what is left there.
        gone: the full names of parameters that passes take away, with nothing in their place.
        base: the regions as passes have left them.
    """
    left = _by_name(unclean)
    matrices = matrices_of(model, regions, left)
    stock = {joined(fqn, name) for region in regions for fqn in region.fqns for name in region.parameters}
    untraced = _untraced(left)
    around = {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}
    found = []
    for p in passes:
        if p.covers:
            missed = {fqn: why for name, fqn, why in misses if name == p.name}
            own = [
                (row.fqn.removeprefix("the model"), row.reaches) for row in rows if row.pass_name == p.name
            ]
            reached = [name for place, reaches in own for name in ((place,) if reaches is None else reaches)]
            # What another pass has made stands for the matrix that was there.
            places = [name if name in stock else _stood(name) for name in reached]
            missed = {place: p.spares for place, reaches in own if reaches is not None and p.spares} | missed
            nothing = {fqn: why for name, fqn, why in absent if name == p.name}
            single = lone_linears(regions, regions if p.last else base)
            reasons = {
                **({} if p.last else untraced),  # it acts on what others have made alone
                **{fqn: why for fqn, why in nothing.items() if fqn not in single},
                **dict(one for row in rows if row.pass_name == p.name for one in row.spared),
                **of_weights(missed, matrices),
            }
            named = {*(place for place, _ in own), *places, *missed, *_named_alone(p, matrices, around)}
            about = (reasons, nothing, p.promises, gone, named, p.takes_named)
            reach = coverage(p.name, p.covers, matrices, partial(p.takes, classes=around), places, *about)
            unmet = _unmet(p, {*around, *named, *(m.place for m in matrices)}, around)
            given = [target for target in p.targets if target not in ("*", *unmet)]
            counted = {*map(place_of, {*named, *places}), *(m.place for m in matrices if m.role in p.covers)}
            idle = idle_targets(given, counted, model, p.takes_named)
            found.append(replace(reach, optional=p.optional, where=_where(p), unmet=unmet, idle=idle))
    return tuple(found)


def lone_linears(traced: Sequence[Region], base: Sequence[Region]) -> set[str]:
    """The regions that are single linears of which no pass has made something else: their surroundings say
    more than they about why a pass leaves them.

    Args:
        traced, base: as they were, and as passes have left them.
    """
    pairs = zip(traced, base, strict=True)
    return {
        old.fqn
        for old, new in pairs
        if is_linear(old.module) and old.parameters.keys() == new.parameters.keys()
    }


def _by_name(unclean: Mapping[str, str]) -> dict[str, str]:
    """By full name, of which the model itself has none."""
    return {place.rpartition(" [")[0].removeprefix("the model"): why for place, why in unclean.items()}


def _untraced(left: Mapping[str, str]) -> dict[str, str]:
    """The same as reasons why a matrix is left."""
    return {place: f"not traced: {why}" for place, why in left.items()}


def _stood(name: str) -> str:
    """The full name of the matrix that stood where a pass has made a factor."""
    return next((name.removesuffix(end) for f in get_args(Factor) if name.endswith(end := f"_{f}")), name)


def _named_alone(p: Pass, matrices: Sequence[Matrix], classes: Mapping[str, str]) -> set[str]:
    """The matrices that targets name, and not the modules that hold them beside others; of linears those that
    are taken by name alone."""
    given = [target for target in p.targets if target != "*"]
    return {
        m.name
        for m in matrices
        if p.takes_named
        and (not m.linear or m.role not in ("attn", "mlp"))
        and names(given, m.place, classes)
        if m.place == m.path or not takes(given, m.path, classes)
    }


def _unmet(p: Pass, places: Collection[str], classes: Mapping[str, str]) -> tuple[str, ...]:
    """Which selectors of a pass name none of some places."""
    given = dict.fromkeys((*p.targets, *p.ignore))
    return tuple(one for one in given if not any(names((one,), place, classes) for place in places))


def _where(p: Pass) -> str:
    """Where a pass may act, as text."""
    where = "" if p.targets == ("*",) else f" within targets {list(p.targets)}"
    return where + (f" without {list(p.ignore)}" if p.ignore else "")


#: What to do about one place among others.
_WITH_IGNORE = "leave it out with ignore"


def no_match(
    p: Pass,
    model: nn.Module,
    traced: Sequence[Region],
    regions: Sequence[Region],
    plans: Sequence[Plan],
    unclean: Mapping[str, str],
    gone: Collection[str],
) -> str:
    """Why a pass matches nothing: its selectors leave out what there is, or there is something else instead.
    Of a pass with a scope only what keeps it from a matrix in that scope is named.

    Args:
        traced, regions: as they were, and as the passes before have left them.
        plans: of the pass, without a match, one a region.
        unclean: the modules that are no regions, and why.
        gone: the full names of parameters that passes take away.
    """
    where = _where(p)
    everywhere = replace(p, targets=("*",), ignore=())
    left_out = [(region, match) for region in regions for match in everywhere.plan(region).matches]
    left = _by_name(unclean)
    classes = {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}
    matrices = matrices_of(model, traced, left) if p.covers else []
    taking = partial(p.takes, classes=classes)
    own_way = {region.name(name) for region, match in left_out for name in match.reaches or ()}
    kept = [m for m in matrices if m.name not in {*own_way, *map(_stood, own_way)}]
    named = _named_alone(p, matrices, classes)
    targeted = p.takes_named and left_alone(p.covers, kept, taking, {}, {}, gone, named)
    if left_out and not targeted and not any(planned.misses for planned in plans):
        others = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        region, path = left_out[0][0], left_out[0][1].path
        todo = [] if replace(p, ignore=()).selects(region, path) else ["name it in targets"]
        todo += [] if replace(p, targets=("*",)).selects(region, path) else ["take it out of ignore"]
        first = region.name(path) or "the model"
        empty = next((name for name in classes if p.covers and names(p.targets, name, classes)), "")
        if any(takes(p.targets, m.place, classes) for m in matrices):
            empty = ""
        taken = f"takes {_shown(model, empty, True)}, where no linear is, and " if empty else ""
        return (
            f"{p.name} matches nothing{where}, which {taken}leaves out {first}{others}: {' and '.join(todo)}"
        )
    missed = [
        (region.name(path), why)
        for region, planned in zip(regions, plans, strict=True)
        for path, why in planned.misses
    ]
    absent = {
        region.fqn: planned.absent
        for region, planned in zip(regions, plans, strict=True)
        if not planned.misses
    }
    around = _untraced(left)
    single = lone_linears(traced, traced if p.last else regions)
    own = {place: why for place, why in absent.items() if place not in single}
    reasons = {**own, **around, **of_weights(dict(missed), matrices)}
    found = []
    if p.covers:
        found = left_alone(p.covers, kept, taking, reasons, absent, gone, {*named, *dict(missed)})
    found = found or [*missed, *absent.items(), *around.items()]
    if p.last:  # it acts on what others have made: where they made nothing, nothing keeps it from that
        found = [one for one in missed if one[0] not in single] or missed
        meant = [r.fqn for r in regions if p.selects(r, "")] or [r.fqn for r in regions]
        found = found or [(place, absent[place]) for place in meant[:1]]
    here = [
        (_shown(model, place, place not in dict(missed)), why)
        for place, why in found
        if why != around.get(place)
    ]
    alone = {m.path.rpartition(".")[0] for m in matrices if m.alone and p.takes_named}
    told = left | {place: by_name(why) for place, why in left.items() if place in alone}
    there = [(_shown(model, place, True), told[place]) for place, why in found if why == around.get(place)]
    said = f"{p.name} matches nothing{where}. "
    said += _by_reason(here)
    said += "" if here or there else "The model has no linear: leave the pass out"
    said += (". " if here and there else "") + (f"Not traced: {_by_reason(there)}" if there else "")
    # Where a pass has nothing, there is nothing to leave out of it.
    return said.replace(_WITH_IGNORE, "leave the pass out")


def _shown(model: nn.Module, place: str, with_class: bool) -> str:
    """A place by its name and, if wanted, its class."""
    kind = f" [{type(model.get_submodule(place)).__name__}]" if with_class else ""
    return f"{place or 'the model'}{kind}"


def _by_reason(entries: list[tuple[str, str]]) -> str:
    """(place, reason) as text: the first few reasons, and of each the first place."""
    places: dict[str, list[str]] = {}
    for place, reason in entries:
        places.setdefault(reason, []).append(place)
    groups = [
        f"{first}{f' and {len(others)} more' if others else ''}: {reason}"
        for reason, (first, *others) in places.items()
    ]
    others = [f"and {counted(len(groups) - 4, 'more reason')}"] if len(groups) > 4 else []
    return "; ".join(groups[:4] + others)
