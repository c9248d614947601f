"""`act24 doctor`: what this machine can do, and which path each operation takes here, with the reason."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.cells import cell_len

from act24.compiler import triton
from act24.errors import Act24Error
from act24.fp8.casts import OPERATORS_E4M3
from act24.inference.layer import PACKED_KERNELS, SKIPPING_KERNELS, Choice, step_choices
from act24.llama import PRESETS
from act24.optim import OPTIMIZERS
from act24.optim.one_pass import why_not_one_pass
from act24.passes import REGISTRY
from act24.passes.fp8 import by_shape
from act24.passes.relu2_ffn import parity_width
from act24.passes.report import aligned
from act24.pruning.methods import METHODS as PRUNE_METHODS
from act24.recipes.plugins import load_plugins
from act24.schedules import SCHEDULES
from act24.sparse24.feed_forward.forms import Form, Network, network_of
from act24.sparse24.feed_forward.methods import BACKWARDS, ESTIMATORS, METHODS, Method
from act24.sparse24.feed_forward.narrow import NARROW
from act24.sparse24.feed_forward.operation import FORMS, form_of
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.feed_forward.packed import PACKED
from act24.sparse24.feed_forward.statistics import COUNTING
from act24.sparse24.format.cusparselt import multiplies
from act24.sparse24.format.device import fp8_obstacle, layout_error, obstacle
from act24.sparse24.format.products import Table, feed_forward_products
from act24.sparse24.kernels.shared.self_check import PROVEN, kernel_obstacle, kernel_obstacle_on
from act24.sparse24.weight.forms import (
    Linear,
    LinearOptions24,
    product_algorithms,
    prompt_linear,
    why_not_packed,
)
from act24.sparse24.weight.linear24 import FORMS as LINEAR_FORMS
from act24.sparse24.weight.methods import METHODS as WEIGHT_METHODS
from act24.tools.bench.launches import is_launch_bound, launch_seconds, product_rate
from act24.tools.run.auto_precision import known_layers, layers_key
from act24.tools.run.tuning import cache_path, machine, read_table

#: Tokens a micro-batch for which the paths are shown, and the presets and ranks.
_TOKENS = 32768
#: Rows of a micro-batch, and their length, for which it is said what waits for launches.
_ROWS, _LENGTH = (32, 64, 128, 256), 256
#: Rows of generation, and what is said where several ways are tried.
_BATCHES = (1, 4, 8, 16, 64)
_MEASURED = "with products of one input fused or not, each block its fastest, measured on the batch at hand"
#: Tokens of prompts that go through a model at once, and the presets.
_PROMPTS, _WIDE = (63, 2048, 16384), ("llama-1b", "llama-7b")
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
    paths = [*_paths(device), *_decoding(device), *_prefill(device)]
    return [*_versions(), *_machine(device), *_methods(device), *paths, *_records()]


def doctor(say: Callable[[str], str] = str) -> str:
    """The findings as text, one a line; `say` takes them to the language of the reader."""
    rows = [(say(finding.subject), say(finding.finding)) for finding in examine()]
    return "\n".join(aligned(rows, cell_len))


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
        return [
            Finding("GPU", "none: everything runs in plain PyTorch"),
            Finding("2:4 kernels", f"no: {kernel_obstacle(device, ())}"),
        ]
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    memory = properties.total_memory / 2**30
    findings = [Finding("GPU", f"{properties.name}, compute capability {capability}, {memory:.0f} GiB")]
    proven = any(name in properties.name for name in PROVEN)
    known = f"run on {' and '.join(PROVEN)}; elsewhere never run, self-checked"
    findings.append(Finding("2:4 kernels", "run and checked on such a GPU" if proven else known))
    served = {form.name: form.operators for form in FORMS} | {"counting": COUNTING}
    served |= {"linears in e4m3": OPERATORS_E4M3}
    served |= {"steps that skip zeros": SKIPPING_KERNELS, "steps with packed weights": PACKED_KERNELS}
    reasons = {name: kernel_obstacle(device, operators) for name, operators in served.items()}
    reasons["AdamW of 16 bits"] = why_not_one_pass(device)
    for name, reason in reasons.items():
        findings.append(
            Finding(f"kernels, {name}", f"no: {reason}" if reason else "agree with the reference")
        )
    if reason := obstacle(device):
        return [*findings, Finding("2:4 products", f"no: {reason}")]
    error = layout_error(device)
    return [
        *findings,
        Finding(
            "2:4 products",
            "plans are kept" if multiplies(device, torch.bfloat16) else "a plan anew at each call",
        ),
        Finding("fp8 products", f"no: {reason}" if (reason := fp8_obstacle(device)) else "yes"),
        Finding("self-check", f"our packing against cuSPARSELt's compressor: relative error {error:.1g}"),
        Finding("tuned products", f"{len(_table(device))} in {cache_path()}"),
        Finding("timed layers", f"{_timed_layers(device)} in {cache_path()}"),
    ]


def _timed_layers(device: torch.device) -> int:
    try:
        return len(known_layers(cache_path(), layers_key(device)))
    except Act24Error:  # training says so
        return 0


def _records() -> list[Finding]:
    try:
        plugins = ", ".join(load_plugins()) or "none"
    except Act24Error as error:
        plugins = str(error)
    tables = {"passes": REGISTRY, "optimizers": OPTIMIZERS, "schedules": SCHEDULES}
    named = [Finding(f"{name} of recipes", ", ".join(table)) for name, table in tables.items()]
    methods = {"weight24": WEIGHT_METHODS, "prune": PRUNE_METHODS}
    named += [Finding(f"methods of {name}", ", ".join(table)) for name, table in methods.items()]
    return [Finding("plugins", plugins), *named]


def _launches(device: torch.device) -> list[Finding]:
    """Which sizes wait for Python where micro-batches are not captured (`train.cuda_graphs`)."""
    if device.type != "cuda":
        return []
    launch, rate = launch_seconds(device), product_rate(device)
    findings = [
        Finding("launches", f"{1e3 * launch:.2f} ms of the CPU for a block and micro-batch, compiled")
    ]
    for rows in _ROWS:
        bound = [n for n in _SHOWN if is_launch_bound(PRESETS[n], rows * _LENGTH, launch, rate)]
        found = f"{', '.join(bound) or 'none'} of {', '.join(_SHOWN)}"
        findings.append(Finding(f"launch-bound without CUDA graphs, {rows} rows of {_LENGTH}", found))
    return findings


def _table(device: torch.device) -> Table:
    try:
        return read_table(cache_path(), machine(device)) if device.type == "cuda" else ()
    except Act24Error:  # training says so; here the rule for untuned shapes is what there is to show
        return ()


def _methods(device: torch.device) -> list[Finding]:
    """Every method, estimator and backward of `activation24`: what it does, and in which forms."""
    wide = PRESETS["llama-1b"]
    width, features = wide.hidden_size, parity_width(wide.intermediate_size)
    findings = []
    for method in METHODS.values():
        network = Network(_TOKENS, features, width, width, torch.bfloat16, device, scaled=method.scaled)
        paths: dict[str, list[str]] = {}
        for backward in BACKWARDS:
            options = Options24(method=method.name, backward=backward, algorithms=_table(device))
            form = form_of(network, options)
            path = form.says if form else _why_reference(network, options)
            paths.setdefault(path, []).append(backward)
        where = "; ".join(f"backward {', '.join(names)}: {path}" for path, names in paths.items())
        text = f"{method.summary} ({_state(method)}); {where}"
        findings.append(Finding(f"method {method.name}", text))
    for kind, table in (("estimator", ESTIMATORS), ("backward", BACKWARDS)):
        findings += [Finding(f"{kind} {record.name}", record.summary) for record in table.values()]
    return findings


def _state(method: Method) -> str:
    """What a method needs beside the activation."""
    needs = ["a seed for each micro-batch"] if method.draws else []
    needs += ["a scale"] if method.scaled else []
    return " and ".join(needs) or "no state"


def _why_reference(network: Network, options: Options24) -> str:
    """Why no form runs a network: each reason once, and without a GPU that alone."""
    if network.device.type != "cuda" and (here := kernel_obstacle_on(network.device, ())):
        return f"plain PyTorch ({here})"
    reasons = dict.fromkeys(form.why_not(network, options) for form in FORMS)
    return f"plain PyTorch ({'; '.join(reasons)})"


def _paths(device: torch.device) -> list[Finding]:
    options = Options24(algorithms=_table(device))
    findings = []
    for name in _SHOWN:
        width, features = PRESETS[name].hidden_size, parity_width(PRESETS[name].intermediate_size)
        attention, network = by_shape((width, width)), by_shape((features, width), (width, features))
        told = f"attention {attention}, network {network} by their shapes; a run on a GPU times both"
        findings.append(Finding(f'{name}, precision = "auto"', told))
        # LoST's activation has two branches on either side, and no linear that the operation takes.
        findings += _weights(name, device, options.algorithms)
        for form, inner in (("full rank", width), (f"rank {_RANKS[name]}", _RANKS[name]), ("LoST", 0)):
            subject = f"{name}, {form}, {f'{inner}×' if inner else 'F '}{features}"
            findings.append(Finding(subject, _path(inner, features, device, options)))
    return findings


def _decoding(device: torch.device) -> list[Finding]:
    """What steps of generation try, by rows of the batch, for a relu² model with 2:4 weights."""
    everything = Choice(skipping=True, packed=True)
    choices = {rows: step_choices(rows, everything, torch.bfloat16, device) for rows in _BATCHES}
    told = {rows: ", ".join(map(str, tried)) for rows, tried in choices.items()}
    if device.type == "cuda":
        told = {rows: f"{tried}; {_MEASURED}" for rows, tried in told.items()}
    subjects = {rows: f"decoding, {rows} rows" for rows in told} | {1: "decoding, 1 row"}
    return [Finding(subjects[rows], tried) for rows, tried in told.items()]


def _prefill(device: torch.device) -> list[Finding]:
    """How prompts go through networks with 2:4 activations and linears with 2:4 weights, by their tokens in
    all."""
    findings = []
    for name in _WIDE:
        width, features = PRESETS[name].hidden_size, parity_width(PRESETS[name].intermediate_size)
        tensors = [
            torch.empty(s, dtype=torch.bfloat16, device="meta")
            for s in ((features, width), (width, features))
        ]
        for tokens in _PROMPTS:
            x = torch.empty((tokens, width), dtype=torch.bfloat16, device="meta")
            network = network_of((x, tensors[0], None, tensors[1], None), inference=True)._replace(
                device=device
            )
            paths = {}
            for precision in ("bfloat16", "fp8"):
                options = Options24(precision=precision, algorithms=_table(device))
                form = form_of(network, options)
                paths[precision] = form.says if form else _why_reference(network, options)
            told = "; ".join(f"{precision}: {path}" for precision, path in paths.items())
            findings.append(Finding(f"prefill, {tokens} tokens, {name}, 2:4 activations", told))
        for tokens in _PROMPTS:
            shapes = (width, width), (features, width), (width, features)
            attention, up, down = (_prompt_product(tokens, shape, device) for shape in shapes)
            each = (f"attention: {attention}", f"up: {up}", f"down: {down}")
            told = attention if attention == up == down else "; ".join(each)
            findings.append(Finding(f"prefill, {tokens} tokens, {name}, 2:4 weights", told))
    return findings


def _prompt_product(tokens: int, shape: tuple[int, int], device: torch.device) -> str:
    linear = prompt_linear(tokens, *shape, torch.bfloat16, device)
    reason = why_not_packed(linear, LinearOptions24(algorithms=_table(device)))
    return f"dense product ({reason})" if reason else "2:4 product where a chunk is faster so"


def _weights(name: str, device: torch.device, table: Table) -> list[Finding]:
    """What becomes of a preset's linears under `weight24` with transposable masks."""
    preset = PRESETS[name]
    findings = []
    for kind, out in (("attention", preset.hidden_size), ("MLP", preset.intermediate_size)):
        linear = Linear(_TOKENS, out, preset.hidden_size, torch.bfloat16, device, draws=True)
        options = LinearOptions24(both_ways=True, algorithms=table)
        if reason := LINEAR_FORMS[0].why_not(linear, options):
            said = f"plain PyTorch: {reason}"
        else:
            said = f"2:4 products: {', '.join(product_algorithms(linear, options))}"
        findings.append(Finding(f"{name}, 2:4 weights, {kind}, {preset.hidden_size}→{out}", said))
    return findings


def _path(width: int, features: int, device: torch.device, options: Options24) -> str:
    network = Network(_TOKENS, features, width, width, torch.bfloat16, device)
    form = form_of(network, options)
    if form is None:
        return _why_reference(network, options)
    return form.says + _detail(form, network, options)


def _detail(form: Form, network: Network, options: Options24) -> str:
    """What there is to add about the products of a form."""
    if not (network.width and network.width_out):
        return ", here between whatever products there are"
    shape = (network.tokens, network.width, network.features, network.width_out)
    wanted = feed_forward_products(*shape, True).values()
    if form is PACKED:
        tuned = all(product in dict(options.algorithms) for product in wanted)
        return " (tuned)" if tuned else " (untuned: default algorithms)"
    return "" if form is NARROW else f" (exact backward only): {PACKED.why_not(network, options)}"
