"""Prune a model block by block: the statistics of each block are of inputs that passed the pruned blocks
before it, and of the block itself while it is still dense (arXiv 2306.11695, 2301.00774)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from act24.errors import Act24Error
from act24.passes.graph.normal_form import place_of
from act24.passes.graph.selectors import check_selectors, takes
from act24.pruning.methods import METHODS, PruneMethod, prune_weight
from act24.pruning.pattern import Pattern, parse_pattern
from act24.pruning.statistics import STATISTICS, kept_tokens
from act24.pruning.stored import fault
from act24.tools.pruning.blocks import Chain, Linear

#: In place of a pattern: the module stays as it is.
DENSE = "dense"

#: Tokens on which the change of a linear's outputs is measured.
_SAMPLE = 512


@dataclass(frozen=True)
class LayerReport:
    """What pruning did to one linear.

    Attributes:
        name: of its weight.
        shape: `(out, in)`.
        sparsity: share of its weights that is pruned.
        score_kept: share of the sum of scores that stays.
        error: ‖X(W - Ŵ)ᵀ‖ / ‖XWᵀ‖ on the first calibration tokens.
        seconds: that it took, without the forwards.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    score_kept: float
    error: float
    seconds: float


@dataclass
class Pruning:
    """A pruned model's masks, and how they came to be.

    Attributes:
        masks: by the weight's name, boolean, in the shape in which the weight is stored; True stays.
        patterns: by the same names.
        transposed: the names of weights that are stored `[in, out]`.
        left: matrices in blocks that stay dense, each with the reason.
        layers: in the order in which they were pruned.
        block_errors: by block: the change of its outputs, ‖f(x) - f̂(x)‖ / ‖f(x)‖, on the first batch.
        elements: of all matrices and larger tensors in blocks, those that stay dense included.
    """

    method: str
    pattern: str
    masks: dict[str, Tensor] = field(default_factory=dict)
    patterns: dict[str, Pattern] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    block_errors: dict[str, float] = field(default_factory=dict)
    elements: int = 0

    @property
    def sparsity(self) -> float:
        """Of all pruned weights together."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return 1 - kept / max(sum(mask.numel() for mask in self.masks.values()), 1)

    @property
    def sparsity_of_blocks(self) -> float:
        """Of all that blocks have, what stays dense included."""
        gone = sum(mask.numel() - int(mask.sum()) for mask in self.masks.values())
        return gone / max(self.elements, 1)

    def as_dict(self) -> dict[str, Any]:
        """JSON values, without the masks."""
        return {
            "method": self.method,
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "sparsity_of_blocks": self.sparsity_of_blocks,
            "left": self.left,
            "layers": [asdict(layer) for layer in self.layers],
            "block_errors": self.block_errors,
        }


class Kept(Protocol):
    """Where finished blocks are kept, so that an interrupted pruning goes on."""

    def load(self, index: int) -> tuple[dict[str, Tensor], Pruning] | None:
        """The weights of a finished block by full name, and what was done to it; None if it is not
        finished."""
        ...

    def save(self, index: int, weights: Mapping[str, Tensor], done: Pruning) -> None: ...


@torch.no_grad()
def prune_(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    method: str = "wanda",
    pattern: str = "2:4",
    by_layer: Mapping[str, str] | None = None,
    pads: Sequence[Tensor | None] | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    kept: Kept | None = None,
) -> Pruning:
    """Prune the linears in a model's blocks, in place. Embeddings, norms and the head stay.

    Args:
        model: in host memory; the blocks go through `device` one at a time.
        batches: of calibration rows, int64 `[B, S]` each.
        method: a name in `act24.pruning.methods.METHODS`.
        pattern: `"0.5"`: half of the weights go. `"2:4"`: two of every four inputs stay.
        by_layer: other patterns, or `"dense"`, by selector (`act24.passes.graph.selectors`); the first that
            takes a linear, or a module around it, counts.
        pads: of the batches, boolean `[B, S]`, True for what fills up short rows on the right.
        say: told one line a block.
        kept: where finished blocks are kept and found.

    Returns:
        masks and report. Afterwards the masks say what is pruned: weights that stay may be zero too.

    Raises:
        Act24Error: no such method or pattern, no linears, a selector that takes none or only what others
            before it take, a pattern that does not divide, inputs or weights that are not finite, a linear
            that no calibration token reached. A block is changed as a whole or not at all.
    """
    record, usual = METHODS[method], parse_pattern(pattern)
    table = {s: None if p == DENSE else parse_pattern(p) for s, p in (by_layer or {}).items()}
    check_selectors([*table], "by_layer")
    classes = {name: type(m).__name__ for name, m in model.named_modules(remove_duplicate=False)}
    patterns = _Patterns(usual, table, classes)
    if not batches:
        raise Act24Error("pruning needs calibration rows")
    if pads is not None and len(pads) != len(batches):
        raise Act24Error(f"{len(pads)} pads for {len(batches)} batches")
    result = Pruning(method, str(usual))
    was_training = model.training
    model.eval()
    try:
        chain = Chain(model, batches, pads or [None] * len(batches), torch.device(device))
        _refuse_shared(chain, model)
        _check(chain, patterns, record)
        result.elements = sum(p.numel() for b in chain.blocks.values() for p in b.parameters() if p.ndim > 1)
        for index, name in enumerate(chain.blocks):
            began = time.perf_counter()
            with chain.on_device(index):
                found = kept.load(index) if kept else None
                if found:
                    weights, done = found
                    _restore_(chain.blocks[name], name, weights)
                else:
                    done = _prune_block_(chain, index, name, record, patterns)
                    if kept and done.masks:
                        parameters = dict(chain.blocks[name].named_parameters(prefix=name))
                        kept.save(index, {n: parameters[n].detach() for n in done.masks}, done)
                        # What was read back is of the file's pages: a byte a weight less of host memory.
                        _, done = kept.load(index) or ({}, done)
                chain.advance(index)
            _add(result, done)
            say(_line(name, done, time.perf_counter() - began, bool(found)))
    finally:
        model.train(was_training)
    if not result.masks:
        raise Act24Error(
            "no linear was pruned" + "".join(f"; {name}: {why}" for name, why in [*result.left.items()][:3])
        )
    return result


@dataclass(frozen=True)
class _Patterns:
    """What is asked for, by linear.

    Attributes:
        usual: where no selector takes it.
        table: by selector; None: it stays dense.
        classes: of the model's modules, by full name.
    """

    usual: Pattern
    table: Mapping[str, Pattern | None]
    classes: Mapping[str, str]

    def selectors(self, linear: str) -> list[str]:
        """Those that take a linear, by its full name, in order."""
        return [one for one in self.table if takes([one], linear, self.classes)]

    def of(self, linear: str) -> Pattern | None:
        """The pattern of a linear, by its full name; None: it stays dense."""
        return next((self.table[one] for one in self.selectors(linear)), self.usual)


class _Inputs:
    """What is summed up of one linear's inputs."""

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed
        self.statistic: Tensor | None = None
        self.sample: Tensor | None = None
        self.tokens = 0


def _observe(chain: Chain, index: int, statistic: str) -> tuple[dict[str, _Inputs], Tensor]:
    """The inputs of a block's linears by local name, and its outputs for the first batch."""
    seen: dict[str, _Inputs] = {}
    last: list[Any] = [None, None]  # q, k and v read one tensor: its sums are made once

    def see(pads: Tensor | None, name: str, transposed: bool, x: Tensor) -> None:
        own = seen.setdefault(name, _Inputs(transposed))
        if pads is not None and x.shape[:-1].numel() != pads.numel():
            raise Act24Error(
                f"{name} sees {x.shape[:-1].numel()} of {pads.numel()} tokens, so that padding cannot be "
                'told: calibrate on packed rows (--set data.rows="packed")'
            )
        tokens = kept_tokens(x, None if pads is None else pads.to(x.device))
        own.tokens += len(tokens)
        if own.sample is None or len(own.sample) < _SAMPLE:
            parts = [tokens[:_SAMPLE]] if own.sample is None else [own.sample, tokens]
            own.sample = torch.cat(parts)[:_SAMPLE].clone()
        if statistic == "none":
            return
        if last[0] is not x:
            last[:] = x, STATISTICS[statistic](tokens)
        own.statistic = last[1].clone() if own.statistic is None else own.statistic + last[1]

    first: Tensor | None = None
    for output in chain.forward(index, see):
        first = output if first is None else first
        last[:] = None, None
    assert first is not None
    return seen, first


def _prune_block_(chain: Chain, index: int, name: str, method: PruneMethod, patterns: _Patterns) -> Pruning:
    block = chain.blocks[name]
    result = Pruning(method.name, str(patterns.usual))
    seen, dense = _observe(chain, index, method.statistic)
    parameters = dict(block.named_parameters())
    new: dict[str, Tensor] = {}
    for local, parameter in parameters.items():
        if parameter.ndim < 2:
            continue
        full = f"{name}.{local}"
        if parameter.ndim > 2:
            result.left[full] = f"a tensor of {parameter.ndim} dimensions, as of experts, is no linear"
            continue
        if _chooses_experts(local, parameters):
            result.left[full] = "it chooses among experts"
            continue
        if local not in seen:
            result.left[full] = "no linear that pruning knows reads it"
            continue
        linear = Linear(local, parameter, seen[local].transposed)
        pattern = patterns.of(place_of(full))
        if pattern is None:
            result.left[full] = "kept dense, as asked"
            continue
        pruned, report = _prune_linear(linear, full, seen[local], method, pattern)
        new[local] = linear.stored(pruned[0])
        result.masks[full] = linear.stored(pruned[1]).cpu()
        result.patterns[full] = pattern
        result.layers.append(report)
        if linear.transposed:
            result.transposed.add(full)
    for local, value in new.items():
        parameters[local].copy_(value)
    changed = chain.run(index, chain.inputs(0), 0).double()
    difference = (changed - dense.double()).norm() / dense.double().norm().clamp(min=1e-300)
    result.block_errors[name] = float(difference)
    return result


def _chooses_experts(local: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a matrix has a row for each expert: beside it lies one tensor of as many matrices."""
    beside = local.split(".")[:-2]
    return any(
        p.ndim == 3 and len(p) == len(parameters[local]) and name.split(".")[: len(beside)] == beside
        for name, p in parameters.items()
    )


def _prune_linear(
    linear: Linear, name: str, inputs: _Inputs, method: PruneMethod, pattern: Pattern
) -> tuple[tuple[Tensor, Tensor], LayerReport]:
    weight, began = linear.weight, time.perf_counter()
    pattern.check((weight.shape[0], weight.shape[1]), name)
    if not torch.isfinite(weight).all():
        raise Act24Error(f"{name} is not finite")
    if not inputs.tokens or inputs.sample is None:
        raise Act24Error(f"{name}: no calibration token reached it; calibrate on more rows")
    if inputs.statistic is not None and not torch.isfinite(inputs.statistic).all():
        raise Act24Error(f"{name}: its inputs are not finite; load the model in bfloat16 or float32")
    try:
        pruned = prune_weight(weight, inputs.statistic, method, pattern)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise Act24Error(
            f"{name}: the inputs of {inputs.tokens} tokens do not tell its columns apart; calibrate on more"
        ) from error
    if why := fault(pruned.weight, pruned.mask, pattern):
        raise Act24Error(f"{name}: {why}")
    outputs = inputs.sample @ weight.float().T
    change = inputs.sample @ (weight.float() - pruned.weight.float()).T
    report = LayerReport(
        name,
        (weight.shape[0], weight.shape[1]),
        str(pattern),
        1 - float(pruned.mask.double().mean()),
        pruned.score_kept,
        float(change.norm() / outputs.norm().clamp(min=1e-30)),
        time.perf_counter() - began,
    )
    return (pruned.weight, pruned.mask), report


def _refuse_shared(chain: Chain, model: nn.Module) -> None:
    """A matrix in two blocks, or in one and outside, cannot be pruned for one of them."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim == 2:
            places.setdefault(id(parameter), []).append(name)
    inside = tuple(f"{block}." for block in chain.blocks)
    for names in places.values():
        if len(names) > 1 and any(name.startswith(inside) for name in names):
            raise Act24Error(
                f"{names[0]} is also {names[1]}: a shared matrix cannot be pruned for one of them"
            )


def _check(chain: Chain, patterns: _Patterns, method: PruneMethod) -> None:
    """What can be known before the first block is changed, so that no other is either."""
    taken, used, full = set[str](), set[str | None](), ""
    for name, block in chain.blocks.items():
        for path, module in block.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
                continue
            full = f"{name}.{path}" if path else name
            selectors = patterns.selectors(full)
            taken |= {*selectors}
            used |= {*selectors[:1]}
            pattern = patterns.of(full)
            if pattern is None:
                continue
            rows, columns = weight.shape
            stored = (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)
            pattern.check(stored, f"{full}.weight")
            method.mask(torch.ones(1, pattern.of or 1), pattern)  # a method may refuse a pattern
            if not torch.isfinite(weight).all():
                raise Act24Error(f"{full}.weight is not finite")
    if unused := patterns.table.keys() - taken:
        raise Act24Error(f"by_layer: {min(unused)!r} takes none of the model's linears; one is {full}")
    if hidden := patterns.table.keys() - used:
        raise Act24Error(
            f"by_layer: {min(hidden)!r} takes only linears that a selector before it takes: put it in front, "
            "or leave it out"
        )


def _restore_(block: nn.Module, name: str, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(block.named_parameters(prefix=name))
    for full, value in weights.items():
        if full not in parameters or parameters[full].shape != value.shape:
            raise Act24Error(f"what was kept of an interrupted pruning is of another model: {full}")
        parameters[full].copy_(value)


def _add(result: Pruning, done: Pruning) -> None:
    result.masks |= done.masks
    result.patterns |= done.patterns
    result.transposed |= done.transposed
    result.left |= done.left
    result.layers += done.layers
    result.block_errors |= done.block_errors


def _line(name: str, done: Pruning, seconds: float, found: bool) -> str:
    if not done.layers:
        return f"{name}: dense"
    errors: Iterable[float] = [layer.error for layer in done.layers]
    return (
        f"{name}: sparsity {done.sparsity:.4f}, score kept "
        f"{sum(layer.score_kept for layer in done.layers) / len(done.layers):.3f}, linears change by "
        f"{max(errors):.3f} at most, the block by {done.block_errors[name]:.3f}, "
        + ("found finished" if found else f"{seconds:.1f} s")
    )
