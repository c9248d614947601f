"""What a pipeline did, or would do, as data that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass


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
