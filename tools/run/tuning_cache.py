"""The file of what was measured on this machine: products (`act24.tools.run.tuning`), and layers in either
precision (`act24.tools.run.auto_precision`). One JSON file for all machines, keyed by what figures hold for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from act24.errors import Act24Error
from act24.tools.files import whole_file


class TuningError(Act24Error):
    """A cache of what was measured that cannot be read or written."""


def cache_path() -> Path:
    """Where the cache is: `$XDG_CACHE_HOME/act24/products.json`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "act24" / "products.json"


def machine(device: torch.device) -> str:
    """What figures of products hold for: the GPU and the library that runs them."""
    return f"{torch.cuda.get_device_name(device)}, cuSPARSELt {torch.backends.cusparselt.version()}"


def read_cache(path: Path) -> dict[str, Any]:
    """All that it holds; empty where there is none.

    Raises:
        TuningError: the file is no such cache.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TuningError(f"{path} cannot be read ({error}): delete it, and it is measured anew") from None
    if not isinstance(content, dict):
        raise TuningError(f"{path} holds no tuned products: delete it, and it is measured anew")
    return content


def write_cache(path: Path, content: dict[str, Any]) -> None:
    """Replace the file as a whole, or not at all.

    Raises:
        TuningError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        raise TuningError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time, where there is a place for a lock: two that measure at a time on one GPU measure
    each other."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
