"""`python -m act24.tools.bench.fp8_scales`: what the choice of scales and of the gradient's format costs.

A small relu² LLaMA is trained on the built-in text, on any machine. From its last step come the operands of
every linear's three products, and from each product, with them rounded in one way or another, its error
beside the product of the bfloat16 operands. Formats are emulated, as cuBLAS adds up in more than they have.

    tensorwise    one scale an operand, of the values of now
    rowwise       one for each row of an operand: what the product does not sum over
    delayed, n    one an operand, of the largest value of the n steps before; the weight's is of now

A delayed scale may be too small: what is above the largest number is clamped, and its share is told. Then the
same model is trained from the same start on the same rows with the pass `fp8`, and losses are compared.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from act24.passes import Fp8, Relu2FFN
from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe
from act24.sparse24.format.fp8 import LEAST
from act24.sparse24.format.multiply import relative_error
from act24.tools.bench.rows import Row, table
from act24.tools.commands.edge import ends_in_one_line
from act24.tools.data import open_rows, open_tokenizer
from act24.tools.run.build import build, model_config

#: Steps whose largest values a delayed scale looks back on: the last, and as many as TransformerEngine does.
HISTORIES = (1, 16)

#: The largest number and the smallest above zero of the formats.
RANGE = {torch.float8_e4m3fn: (448.0, 2.0**-9), torch.float8_e5m2: (57344.0, 2.0**-16)}
NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@dataclass
class Operands:
    """Of one linear.

    Attributes:
        x, weight, grad: `[T, in]`, `[out, in]`, `[T, out]`; of the last step, in bfloat16.
        largest: the largest magnitudes of x and of grad, step by step, the last one included.
    """

    x: Tensor = field(default_factory=lambda: torch.empty(0))
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    grad: Tensor = field(default_factory=lambda: torch.empty(0))
    largest: dict[str, deque[float]] = field(
        default_factory=lambda: {key: deque(maxlen=max(HISTORIES) + 1) for key in ("x", "grad")}
    )


class _Watch(TorchFunctionMode):
    """Notes the operands of every linear, also of those in traced regions."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.found: defaultdict[str, Operands] = defaultdict(Operands)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and (name := self.names.get(id(args[1]))) and result.requires_grad:
            self._note(name, "x", args[0])
            self.found[name].weight = args[1].detach().bfloat16()
            result.register_hook(lambda grad: self._note(name, "grad", grad))
        return result

    def _note(self, name: str, key: str, tensor: Tensor) -> None:
        rows = tensor.detach().flatten(0, -2).bfloat16()
        setattr(self.found[name], key, rows)
        self.found[name].largest[key].append(float(rows.abs().max()))


def train(recipe: Recipe, steps: int, device: torch.device) -> tuple[list[float], dict[str, Operands]]:
    """A plain loop: losses step by step, and the operands of its linears that are not in e4m3."""
    built = build(recipe, device)
    model, pipeline = built.model, built.pipeline
    names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}
    watch, losses = _Watch(names), []
    optimizer = torch.optim.AdamW(model.parameters(), recipe.optimizer.lr, weight_decay=0.1)
    tokenizer = open_tokenizer(recipe.data, recipe.tokenizer)
    sizes = {"batch_size": recipe.train.batch_size, "vocab_size": model_config(recipe).vocab_size}
    with open_rows(recipe.data, tokenizer, **sizes) as rows:
        for step in range(steps):
            batch = next(rows)
            ids, labels = batch.input_ids.to(device), batch.labels.to(device)
            pipeline.begin_update_(step)
            with watch:
                loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
                loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = recipe.optimizer.lr * min(1, (step + 1) / 10)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses, dict(watch.found)


class Rounded(NamedTuple):
    """A matrix in a format, with its scales put back; and what became of it, as shares of what is not
    zero."""

    values: Tensor
    lost: float
    clamped: float


def rounded(matrix: Tensor, largest: Tensor | float, kind: torch.dtype) -> Rounded:
    """To a format, over scales that bring `largest`, of a shape that is broadcast, to its largest number."""
    top, least = RANGE[kind]
    scale = torch.as_tensor(largest, dtype=torch.float32, device=matrix.device).clamp(min=LEAST) / top
    scaled = matrix.float() / scale
    nonzero = max(int((matrix != 0).sum()), 1)
    lost = int(((matrix != 0) & (scaled.abs() <= least / 2)).sum()) / nonzero
    clamped = int((scaled.abs() > top * (1 + 1e-6)).sum()) / nonzero  # and not by the rounding of a scale
    return Rounded(scaled.clamp(-top, top).to(kind).float() * scale, lost, clamped)


class Found(NamedTuple):
    """Of one product of one linear."""

    error: float
    lost: float
    clamped: float


def errors(operands: Operands) -> Iterator[tuple[str, str, torch.dtype, Found]]:
    """Product, scales, the format of the gradient, and what comes of them."""
    x, weight, grad = (t.float() for t in (operands.x, operands.weight, operands.grad))
    last = {key: list(values)[:-1] for key, values in operands.largest.items()}
    products = {
        "y": ((x, "x"), (weight, "")),
        "dX": ((grad, "grad"), (weight.T, "")),
        "dW": ((grad.T, "grad"), (x.T, "x")),
    }
    schemes = ["tensorwise", "rowwise", *(f"delayed, {n}" for n in HISTORIES if len(last["x"]) >= n)]
    for product, sides in products.items():
        exact = sides[0][0] @ sides[1][0].T
        for scheme in schemes:
            for kind in RANGE if product != "y" else (torch.float8_e4m3fn,):
                made = []
                for side, key in sides:
                    largest: Tensor | float = side.abs().max()
                    if scheme == "rowwise":
                        largest = side.abs().amax(1, keepdim=True)
                    elif scheme.startswith("delayed") and key:
                        largest = max(last[key][-int(scheme.split()[-1]) :])
                    made.append(rounded(side, largest, kind if key == "grad" else torch.float8_e4m3fn))
                error = relative_error(made[0].values @ made[1].values.T, exact)
                yield product, scheme, kind, Found(error, made[0].lost, made[0].clamped)


def role(name: str) -> str:
    """Where a linear stands."""
    return "head" if name == "lm_head" else "attention" if "attn" in name else "mlp"


def bench_scales(steps: int = 50, device: torch.device | None = None, preset: str = "llama-20m") -> list[Row]:
    """Errors of each product, the median over the linears of a role, beside tensorwise scales in e4m3 alone;
    and losses of the last ten steps beside those without fp8."""
    device = device or torch.device("cpu")
    overrides = (f"model.preset={preset}", "log.activation_statistics=false")
    recipe = load_recipe("demo", overrides).model_copy(update={"passes": (Relu2FFN(),)})
    losses, found = train(recipe, steps, device)
    by_kind: defaultdict[tuple[str, str, str, torch.dtype], list[Found]] = defaultdict(list)
    for name, operands in found.items():
        for product, scheme, kind, result in errors(operands):
            by_kind[role(name), product, scheme, kind].append(result)
    title, rows = f"{preset} after {steps} steps", []
    for (where, product, scheme, kind), results in by_kind.items():
        middle = statistics.median(r.error for r in results)
        beside = by_kind[where, product, "tensorwise", torch.float8_e4m3fn]
        lost, clamped = max(r.lost for r in results), max(r.clamped for r in results)
        note = f"tensorwise; zero {lost:.2%}, clamped {clamped:.2%}"
        of = "" if product == "y" else f", gradient {NAMES[kind]}"
        label = f"fp8 error of {product}, {where}, {scheme}{of}, {title}"
        other = statistics.median(r.error for r in beside)
        rows.append(Row(label, middle, other, "relative error", note=note))
    last = statistics.mean(losses[-10:])
    for label, p in {
        "tensorwise": Fp8(scaling="tensorwise"),
        "rowwise": Fp8(),
        "tensorwise, with head": Fp8(scaling="tensorwise", head=True),
        "rowwise, with head": Fp8(head=True),
    }.items():
        print(f"loss with fp8, {label}", file=sys.stderr, flush=True)
        narrow, _ = train(recipe.model_copy(update={"passes": (Relu2FFN(), p)}), steps, device)
        rows.append(
            Row(f"fp8 loss, {label}, {title}", statistics.mean(narrow[-10:]), last, "nats", note="float32")
        )
    return rows


if __name__ == "__main__":
    with ends_in_one_line():
        found = bench_scales(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
        print(table(found))
        print("\n".join(f"{row.name}: {row.note}" for row in found))
