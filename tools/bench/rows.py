"""What every benchmark hands out: rows of ours beside another, and how they are timed."""

from __future__ import annotations

import contextlib
import platform
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from act24.errors import Act24Error


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what, with its shape.
        ours, other: both sides, in `unit`.
        unit: `"ms"` or `"bytes"`, of which less is better, or `"GB/s"` and such, of which more is.
        bar: what `ratio` has to reach, or for bytes must not pass; None where nothing was promised.
        note: what the other side is, and what binds.
    """

    name: str
    ours: float
    other: float
    unit: str
    bar: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours against the other: how many times as fast, or the share of the bytes."""
        return self.other / self.ours if self.unit == "ms" else self.ours / self.other

    @property
    def met(self) -> bool | None:
        """Whether the bar holds; None without one."""
        if self.bar is None:
            return None
        return self.ratio <= self.bar if self.unit == "bytes" else self.ratio >= self.bar

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the batch and the machine they were measured on."""
        return asdict(self) | {
            "ratio": self.ratio,
            "batch": tokens_of(self.name),
            "gpu": torch.cuda.get_device_name(),
            "versions": versions(),
            "commit": commit(),
        }


#: Seconds within which a second SIGTERM is the first one again.
_TWICE = 2.0

#: Rows whose shape is that of a weight.
_OF_WEIGHTS = ("pack a weight", "best transposable mask")


def tokens_of(name: str) -> int | None:
    """The tokens of a batch as a row's name has them: `16384×4096×16384`, or `8 rows of 2048`; None where its
    shape is that of a weight, or there is none."""
    if of_rows := re.search(r"(\d+) rows of (\d+)", name):
        return int(of_rows[1]) * int(of_rows[2])
    shape = re.search(r"(\d+)×\d", name)
    return int(shape[1]) if shape and not name.startswith(_OF_WEIGHTS) else None


def commit() -> str | None:
    """The commit that this code is of, where it lies in a repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """What the figures depend on."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
    if torch.backends.cusparselt.is_available():
        found["cusparselt"] = str(torch.backends.cusparselt.version())
    return found


def milliseconds(call: Callable[[], Any], budget: int = 100) -> float:
    """Median time of a call on the GPU, after warm-up, with a cold cache; `budget` ms of calls are timed."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=25, rep=budget, return_mode="median"))  # type: ignore[arg-type]


def graph_milliseconds(call: Callable[[], Any], budget: int = 20) -> float:
    """Median time of a call on the GPU alone, replayed from a CUDA graph: a call that takes the CPU longer to
    launch than the GPU to run, as those of cuSPARSELt may, is timed by its launch otherwise. The cache is as
    the call before left it."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=budget, return_mode="median"))  # type: ignore[arg-type]


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, by which `timeout` ends a command, is as Ctrl-C: what was measured so far can be printed.

    `timeout` sends it twice, to the process and to its group. What follows the first within `_TWICE` seconds
    says nothing new, and must not end what the first one lets be done.
    """
    stopped: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not stopped or time.monotonic() - stopped[-1] > _TWICE:
            stopped.append(time.monotonic())
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def needed_gpu() -> torch.device:
    """The GPU to measure on.

    Raises:
        Act24Error: there is none.
    """
    if not torch.cuda.is_available():
        raise Act24Error("this benchmark times a GPU, and there is none here")
    return torch.device("cuda", torch.cuda.current_device())


def table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| what | ours | other | unit | ratio | bar | met |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        bar = "" if row.bar is None else f"{'≤' if row.unit == 'bytes' else '≥'} {row.bar:.2f}"
        met = {None: "", True: "yes", False: "no"}[row.met]
        sides = f"{row.ours:.4g} | {row.other:.4g} | {row.unit}"
        lines.append(f"| {row.name} | {sides} | {row.ratio:.3f} | {bar} | {met} |")
    return "\n".join(lines)
