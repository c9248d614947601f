"""What the kernels of a training step are for, told from their names, and how long each kind took."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PRODUCTS = "dense products"
SPARSE = "2:4 products"
OWN = "kernels of 2:4 and e4m3"
ATTENTION = "attention"
ELEMENTWISE = "norms and elementwise"
LOSS = "softmax of the head"
EMBEDDING = "embedding"
CASTS = "casts, copies, gradients added up"
OPTIMIZER = "clipping and optimizer"
UNKNOWN = "unknown"

#: In the order in which tables have them.
GROUPS = (PRODUCTS, SPARSE, OWN, ATTENTION, ELEMENTWISE, LOSS, EMBEDDING, CASTS, OPTIMIZER, UNKNOWN)

#: What a name has in it, the first that fits. Libraries' kernels, then PyTorch's own.
_PATTERNS = (
    (SPARSE, r"sparse|spgemm|spmma|cslt"),
    (ATTENTION, r"flash|fmha|sdpa|attention|cudnn::fusion"),
    (PRODUCTS, r"nvjet|gemm|gemv|splitkreduce|cublas|cutlass|^triton_(tem|mm)_"),
    (OPTIMIZER, r"multi_tensor_apply|lpnorm"),
    (OWN, r"radixsortkvinplace"),  # of a few thousand features; the embedding's of all tokens is another
    (EMBEDDING, r"embedding|radix|^void at_cuda_detail::cub|cub::|krn_partial|sum_and_scatter|segment"),
    (EMBEDDING, r"compute_grad_weight|gather_kernel|indexselect|compute_num_of_partial|write_num_of"),
    (CASTS, r"memcpy|memset|copy_kernel|catarray|fillfunctor|cudafunctor_add|cudafunctoronself_add"),
    (ELEMENTWISE, r"elementwise_kernel|reduce_kernel|layer_norm|rms_?norm|gammabeta"),
)

#: Of the operations that Inductor writes into a kernel's name those that only move or round.
_MOVES = re.compile(
    r"_to_copy|_unsafe_view|transpose|permute|reshape|expand|clone|view|copy_?|zeros(_like)?|cat|t"
)


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, when it began and how long it ran, in µs."""

    name: str
    began: float
    took: float

    @property
    def ended(self) -> float:
        return self.began + self.took


@cache
def own_kernels() -> frozenset[str]:
    """Names of the Triton kernels of this package, the optimizer's apart."""
    package = Path(__file__).resolve().parents[2] / "act24"
    found = {
        path: re.findall(r"^@jit\ndef (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for folder in ("sparse24", "fp8", "inference")
        for path in (package / folder).rglob("*.py")
    }
    return frozenset(name for names in found.values() for name in names)


def group_of(name: str) -> str:
    """The group of a kernel; `UNKNOWN` if nothing tells."""
    if name == "_update":  # act24.optim.one_pass
        return OPTIMIZER
    if name in own_kernels():
        return OWN
    lower = name.lower()
    if match := re.match(r"triton_(?:poi|red|per)_fused_(.*?)_?\d*$", lower):
        return _of_inductor(match[1])
    return next((group for group, pattern in _PATTERNS if re.search(pattern, lower)), UNKNOWN)


def _of_inductor(operations: str) -> str:
    """The group of a kernel that Inductor wrote, from the operations in its name."""
    if re.search(r"softmax|scatter|gather", operations):
        return LOSS
    if "embedding" in operations:
        return EMBEDDING
    return ELEMENTWISE if _MOVES.sub("", operations).strip("_") else CASTS


def kernels_of(trace: Path) -> list[Kernel]:
    """The launches in a file of `torch.profiler.profile.export_chrome_trace`, in the order they began."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    on_gpu = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [Kernel(e["name"], float(e["ts"]), float(e["dur"])) for e in events if e.get("cat") in on_gpu]
    return sorted(found, key=lambda kernel: kernel.began)


def busy(kernels: Sequence[Kernel]) -> float:
    """µs in which at least one of them ran; in the order in which they began."""
    total, until = 0.0, float("-inf")
    for kernel in kernels:
        total += max(0.0, kernel.ended - max(kernel.began, until))
        until = max(until, kernel.ended)
    return total


@dataclass(frozen=True)
class Share:
    """The kernels of one name: how many, and ms, in whatever was divided by."""

    name: str
    count: float
    milliseconds: float

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "count": round(self.count, 2), "ms": round(self.milliseconds, 4)}


def by_group(kernels: Iterable[Kernel], parts: int) -> dict[str, list[Share]]:
    """The kernels of each group by name, longest first, as the mean over so many parts, micro-batches say."""
    taken: dict[str, list[float]] = {}
    for kernel in kernels:
        taken.setdefault(kernel.name, []).append(kernel.took)
    groups: dict[str, list[Share]] = {group: [] for group in GROUPS}
    for name, times in sorted(taken.items(), key=lambda item: -sum(item[1])):
        groups[group_of(name)].append(Share(name, len(times) / parts, sum(times) / 1e3 / parts))
    return groups
