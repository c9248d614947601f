"""What the processes of a run do together: all succeed, or all hear why one did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from act24.errors import Act24Error
from act24.tools.checkpoints.manifest import CheckpointError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Does `work` on every process and returns the results of all, by rank.

    Also where all meet: an error on one is an Act24Error on all, so that none waits in vain.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    reports: list[Any] = [(result, error and reason(error))]
    if dist.is_initialized():
        mine, reports = reports[0], [None] * world_size()
        dist.all_gather_object(reports, mine)
    reasons = [reason for _, reason in reports if reason]
    if isinstance(error, Act24Error):
        raise error
    if reasons:
        raise CheckpointError("; ".join(dict.fromkeys(reasons))) from error
    return [result for result, _ in reports]


def on_the_first(work: Callable[[], T]) -> T:
    """Does `work` on the first process alone, and returns its result on all: processes that look at a disk
    by themselves may see different things."""
    return on_every_rank(lambda: work() if rank() == 0 else None)[0]  # type: ignore[return-value]


def reason(error: BaseException) -> str:
    """One line: of a chain the OSError in it, which PyTorch's writer buries under `unexpected pos 704`."""
    if isinstance(error, Act24Error):
        return str(error)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return str(link)
        link = link.__cause__ or link.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())
