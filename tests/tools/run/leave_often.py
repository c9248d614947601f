"""Sixty times, two processes join a group, train two steps under DistributedDataParallel, leave it and end.

Run as a program with an empty folder: prints how each process ended, one number a line. They are forked from
one that has loaded PyTorch, which takes a second a pair instead of five. One that has not ended after 20
seconds counts as 1.
"""

import faulthandler
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # as every run does; without it the race is hardly ever lost
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from act24.tools.run.processes import leave_process_group


def process(rank: int, store: str) -> None:
    faulthandler.dump_traceback_later(20, exit=True)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5)))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    reports = [None, None]
    dist.all_gather_object(reports, rank)
    dist.barrier()
    leave_process_group()


def main() -> None:
    torch.set_num_threads(1)
    for pair in range(60):
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                sys.exit(process(rank, f"{sys.argv[1]}/{pair}"))
            children.append(child)
        for child in children:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
