"""Which path a run takes on this machine, and why: lines at its start, so that nobody learns from a slow run
that kernels did not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from act24.fp8.linear import why_in_plain_pytorch
from act24.optim import AdamW
from act24.passes import Activation24, Fp8, OperationalPass, Pipeline, Weight24
from act24.passes.document_attention import DocumentAttention
from act24.passes.graph.activation_sites import ActivationSite
from act24.passes.graph.linear_sites import LinearSite
from act24.recipes.schema import Recipe
from act24.sparse24.feed_forward.forms import Network
from act24.sparse24.feed_forward.operation import FORMS as NETWORK_FORMS
from act24.sparse24.feed_forward.operation import form_of
from act24.sparse24.weight.forms import Linear, LinearOptions24, product_algorithms
from act24.sparse24.weight.linear24 import FORMS as LINEAR_FORMS
from act24.tools.run.auto_precision import decided_text
from act24.tools.run.build import Built
from act24.tools.run.processes import Processes
from act24.tools.run.step import TrainingStep, uses_compile


def path_lines(
    built: Built, recipe: Recipe, processes: Processes, optimizer: Optimizer, step: TrainingStep
) -> tuple[str, ...]:
    """What a run says of its path at its start: a line for the passes, and one for everything else that is
    slower here than it could be."""
    device = processes.device
    lines = (path_text(built.pipeline, recipe, device), update_text(optimizer, device), step.capture_text)
    return tuple(line for line in lines if line)


def update_text(optimizer: Optimizer, device: torch.device) -> str:
    """A line that says why updates on a GPU are not made in one pass over memory; empty where they are, and
    without a GPU, which has a kernel for that."""
    if device.type != "cuda" or not isinstance(optimizer, AdamW):
        return ""
    reasons = optimizer.why_several_passes()
    if not reasons:
        return ""
    told = "; ".join(f"{number} parameters: {reason}" for reason, number in reasons.items())
    return f"AdamW takes several passes over memory, some 100 bytes a parameter where one pass is 22: {told}"


def path_text(pipeline: Pipeline, recipe: Recipe, device: torch.device) -> str:
    """Device, precision, compiled or not, and of each pass with kernels how many places run how.

    As the tuner left the passes, and for the recipe's micro-batches: what `act24 doctor` says of presets.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    compiled = "compiled" if uses_compile(recipe.train, device) else "not compiled"
    parts = [f"path: {name}, {recipe.train.dtype}, {compiled}"]
    operational = [p for p in pipeline.passes if isinstance(p, OperationalPass)]
    if any(isinstance(p, DocumentAttention) for p in operational):
        parts.append("attention within documents: PyTorch's, with a mask of all pairs of a row")
    with pipeline.lowered(operational):
        for p in operational:
            if isinstance(p, Activation24 | Weight24 | Fp8):
                counted = Counter(_paths(p, pipeline, recipe, device))
                parts += [f"{p.name} at {count}: {path}" for path, count in counted.items()]
                parts += [f'{p.name}, precision = "auto": {told}' for told in _decided(p)]
    return "; ".join(parts)


def _paths(
    p: Activation24 | Weight24 | Fp8, pipeline: Pipeline, recipe: Recipe, device: torch.device
) -> Iterator[str]:
    tokens = recipe.train.batch_size * recipe.data.max_length
    dtype = torch.float32 if recipe.train.dtype == "float32" else torch.bfloat16
    for _, match in pipeline.matches(p):
        if isinstance(p, Activation24):
            yield _network(p, match.nodes, tokens, dtype, device)
        elif isinstance(p, Fp8) or p.in_fp8(match.nodes.shape):
            yield _in_fp8(p.kernels, device)
        else:
            yield _linear(p, match.nodes, tokens, dtype, device)


def _decided(p: Activation24 | Weight24 | Fp8) -> Iterator[str]:
    """What became of the layers whose precision the recipe leaves open."""
    if p.precision == "auto":
        yield ", ".join(decided_text(p)) or "by the shapes of weights, for nothing was timed"


def _network(
    p: Activation24, site: ActivationSite, tokens: int, dtype: torch.dtype, device: torch.device
) -> str:
    sizes = (tokens, site.width or 0, site.width_in or 0, site.width_out or 0)
    network, options = Network(*sizes, dtype, device, scaled=p.record.scaled), p.options(site)
    if form := form_of(network, options):
        return form.says
    # The forms often have one reason, each in its own words; the first is of the one that gains most.
    return _plain(NETWORK_FORMS[0].why_not(network, options), device)


def _linear(p: Weight24, site: LinearSite, tokens: int, dtype: torch.dtype, device: torch.device) -> str:
    linear = Linear(tokens, *site.shape, dtype, device, draws=p.draws)
    options = LinearOptions24(p.record.both_ways, p.kernels, p.algorithms)
    if reason := LINEAR_FORMS[0].why_not(linear, options):
        return _plain(reason, device)
    return f"2:4 products: {', '.join(product_algorithms(linear, options))}"


def _in_fp8(kernels: bool, device: torch.device) -> str:
    reason = why_in_plain_pytorch(device) if kernels else "kernels are switched off"
    return f"e4m3 in {_plain(reason, device)}" if reason else "products in e4m3"


def _plain(reason: str, device: torch.device) -> str:
    """On a CPU all other reasons are beside the point."""
    return f"plain PyTorch ({reason if device.type == 'cuda' else 'kernels and 2:4 products need a GPU'})"
