"""What a pipeline did, or would do, as data that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from act24.passes.base import Match, OperationalPass, Pass
from act24.passes.graph.region import Region


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
    """

    rows: tuple[Row, ...]
    misses: tuple[tuple[str, str, str], ...]
    parameters_before: int
    parameters_after: int
    flops_before: int
    flops_after: int

    def __str__(self) -> str:
        if not self.rows:
            table = ["nothing to rewrite"]
        else:
            head = ("pass", "module", "before", "after", "parameters", "steps", "note")
            body = [
                (
                    row.pass_name,
                    row.fqn,
                    row.before,
                    row.after,
                    f"{row.parameters_before:,} → {row.parameters_after:,}",
                    row.steps,
                    row.note,
                )
                for row in self.rows
            ]
            used = [i for i in range(len(head)) if any(line[i] for line in body)]
            lines = [tuple(line[i] for i in used) for line in (head, *body)]
            widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
            table = [
                "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in lines
            ]
        table += [f"{name} leaves {fqn} as it is: {reason}" for name, fqn, reason in self.misses]
        table.append(
            f"parameters {self.parameters_before:,} → {self.parameters_after:,}, "
            f"FLOPs per token, forward {self.flops_before:,} → {self.flops_after:,}"
        )
        return "\n".join(table)


def row(p: Pass, region: Region, match: Match) -> Row:
    """What one match of a pass is in the report."""
    steps = ""
    if isinstance(p, OperationalPass) and (p.from_step or p.until_step is not None):
        steps = f"from {p.from_step}" + (f" until {p.until_step}" if p.until_step is not None else "")
    return Row(
        pass_name=p.name,
        fqn=region.name(match.path),
        before=match.before,
        after=match.after,
        parameters_before=match.parameters_before,
        parameters_after=match.parameters_after,
        steps=steps,
        note=match.note,
    )


def no_match(p: Pass, left_out: list[str], absent: list[tuple[str, str]], unclean: dict[str, str]) -> str:
    """Why nothing matched: what is left out, or what the regions have instead and what is none."""
    where = "" if p.targets == ("*",) else f" within targets {list(p.targets)}"
    where += f" without {list(p.ignore)}" if p.ignore else ""
    if left_out:
        others = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        return f"{p.name} matches nothing{where}, which leaves out {left_out[0]}{others}"
    text = f"{p.name} matches nothing{where}. " + (_by_reason(absent) or "The model has no region")
    return text + (f". Not traced: {_by_reason(list(unclean.items()))}" if unclean else "")


def _by_reason(entries: list[tuple[str, str]]) -> str:
    """(place, reason) as text: the first few reasons, and of each the first place."""
    places: dict[str, list[str]] = {}
    for place, reason in entries:
        places.setdefault(reason, []).append(place)
    groups = [
        f"{first}{f' and {len(others)} more' if others else ''}: {reason}"
        for reason, (first, *others) in places.items()
    ]
    return "; ".join(groups[:3] + ([f"and {len(groups) - 3} more reasons"] if len(groups) > 3 else []))
