"""`act24 doctor`: what this machine can do, and which path each operation takes here, with the reason."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from act24.compiler import triton
from act24.errors import Act24Error
from act24.llama import PRESETS
from act24.passes.relu2_ffn import parity_width
from act24.sparse24.feed_forward.forms import (
    Network,
    obstacle_on,
    why_not_masked,
    why_not_narrow,
    why_not_packed,
)
from act24.sparse24.format.cusparselt import multiplies
from act24.sparse24.format.device import fp8_obstacle, layout_error, obstacle
from act24.sparse24.format.products import Table, feed_forward_products
from act24.sparse24.pattern.token_wise import Options24
from act24.tools.run.tuning import cache_path, machine, read_table

#: Tokens a micro-batch for which the paths are shown, and the presets and ranks.
_TOKENS = 32768
_SHOWN = ("llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b")
_RANKS = {"llama-60m": 128, "llama-130m": 256, "llama-350m": 256, "llama-1b": 512, "llama-7b": 1024}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, and what was found."""

    subject: str
    finding: str


def examine(device: torch.device | None = None) -> list[Finding]:
    """Look at the machine: versions, GPUs, the self-check of the packed layout, and paths.

    Args:
        device: to look at; None for the current GPU, or the CPU where there is none.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    device = device or torch.device("cpu")
    return [*_versions(), *_machine(device), *_paths(device)]


def doctor() -> str:
    """The findings as text, one a line."""
    findings = examine()
    width = max(len(finding.subject) for finding in findings)
    return "\n".join(f"{finding.subject:<{width}}  {finding.finding}" for finding in findings)


def _versions() -> list[Finding]:
    cusparselt = torch.backends.cusparselt
    found = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda or "none: a CPU build of PyTorch",
        "Triton": triton.__version__ if triton is not None else "none: kernels cannot run",
        "cuSPARSELt": str(cusparselt.version())
        if cusparselt.is_available()
        else "none: 2:4 products are dense",
    }
    return [Finding(name, version) for name, version in found.items()]


def _machine(device: torch.device) -> list[Finding]:
    if device.type != "cuda":
        reason = obstacle(device)
        return [
            Finding("GPU", "none: everything runs in plain PyTorch"),
            Finding("2:4 kernels", f"no: {reason}"),
        ]
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    memory = properties.total_memory / 2**30
    findings = [Finding("GPU", f"{properties.name}, compute capability {capability}, {memory:.0f} GiB")]
    if reason := obstacle(device):
        return [*findings, Finding("2:4 kernels", f"no: {reason}")]
    error = layout_error(device)
    return [
        *findings,
        Finding("2:4 kernels", "yes"),
        Finding(
            "2:4 products",
            "plans are kept" if multiplies(device, torch.bfloat16) else "a plan anew at each call",
        ),
        Finding("fp8 products", f"no: {reason}" if (reason := fp8_obstacle(device)) else "yes"),
        Finding("self-check", f"our packing against cuSPARSELt's compressor: relative error {error:.1g}"),
        Finding("tuned products", f"{len(_table(device))} in {cache_path()}"),
    ]


def _table(device: torch.device) -> Table:
    try:
        return read_table(cache_path(), machine(device)) if device.type == "cuda" else ()
    except Act24Error:  # training says so; here the rule for untuned shapes is what there is to show
        return ()


def _paths(device: torch.device) -> list[Finding]:
    options = Options24(algorithms=_table(device))
    findings = []
    for name in _SHOWN:
        width, features = PRESETS[name].hidden_size, parity_width(PRESETS[name].intermediate_size)
        # LoST's activation has two branches on either side, and no linear that the operation takes.
        for form, inner in (("full rank", width), (f"rank {_RANKS[name]}", _RANKS[name]), ("LoST", 0)):
            subject = f"{name}, {form}, {f'{inner}×' if inner else 'F '}{features}"
            findings.append(Finding(subject, _path(inner, features, device, options)))
    return findings


def _path(width: int, features: int, device: torch.device, options: Options24) -> str:
    if reason := obstacle_on(device):
        return f"plain PyTorch: {reason}"
    network = Network(_TOKENS, features, width, width, torch.bfloat16, device)
    if not (narrow := why_not_narrow(network, options)):
        return "2:4 inside dense products"
    if packed := why_not_packed(network, options):
        if masked := why_not_masked(network, options):
            return f"plain PyTorch: {packed}; {narrow}; {masked}"
        if not width:
            return "2:4 by a kernel between whatever products there are"
        return f"2:4 by kernels around dense products (exact backward only): {packed}"
    tuned = all(
        product in dict(options.algorithms)
        for product in feed_forward_products(_TOKENS, width, features, width, True).values()
    )
    return f"packed 2:4 products ({'tuned' if tuned else 'untuned: default algorithms'})"
