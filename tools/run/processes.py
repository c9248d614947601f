"""The processes of a run, as torchrun starts them, and the device of each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.distributed.tensor import DTensor

from act24.errors import Act24Error

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run.

    Attributes:
        rank, world_size: over all machines; 0 and 1 without torchrun.
        device: the one that this process computes on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and logs."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes, in place, without waiting for it on the host."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_all_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add up each of many tensors over all processes, in place; on GPUs as one operation."""
        if self.world_size == 1:
            return
        if self.device.type == "cuda":
            with _coalescing_manager(device=self.device):
                for tensor in tensors:
                    dist.all_reduce(tensor)
            return
        for tensor in tensors:
            dist.all_reduce(tensor)

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the tensors of the main one, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process. Goes over the CPU, so it never waits for the GPU."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes)
        return bool(votes)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is without sharding. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def chosen_device(named: torch.device | str | None) -> torch.device:
    """The device of that name, or a GPU if there is one.

    Raises:
        Act24Error: there is none of that name, or nothing can be computed on it.
    """
    name = named or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has tensors, but no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        told = str(error).partition("\n")[0].partition(". ")[0]
        raise Act24Error(f"device {str(name)!r}: {told}") from error
    return device


def own_rank() -> int:
    """The rank of this process, before and after the processes have joined too."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def open_processes() -> Iterator[Processes]:
    """Join the process group that torchrun announces in the environment, if any, and leave it in the end."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        if "OMP_NUM_THREADS" not in os.environ:
            # The CPU only copies token ids. To copy 65,536 would take a thread of every core, and they spin:
            # seven runs on one machine made a third of the tokens a second that they make with one each.
            torch.set_num_threads(1)
    if world_size > 1:
        # gloo beside NCCL: flags travel by CPU and cost no synchronisation.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(own_rank(), world_size, device)
    finally:
        if dist.is_initialized():
            leave_process_group()


def leave_process_group() -> None:
    """Destroy the process group such that the process can end at once.

    A collective of gloo has returned before its thread has let go of the tensors, for which that thread needs
    the interpreter. One that comes too late finds the interpreter closing: the process aborts ("terminate
    called without an active exception") or waits for ever, its work done (PyTorch issue 190489). Gloo tells
    nobody when its threads are idle, so they are given the interpreter for a tenth of a second.
    """
    time.sleep(0.1)
    dist.destroy_process_group()
