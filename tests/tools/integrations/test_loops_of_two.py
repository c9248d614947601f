"""Own loops on two processes, replicated and sharded, train as one process does on all rows; what the
processes have to do together is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from children import run_ranks
from rewritten_llama import llama
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from act24 import Act24Error, Pipeline, apply_
from act24.passes import Activation24, Pass, Relu2FFN, Weight24
from act24.tools.run.processes import open_processes, whole

pytestmark = pytest.mark.slow  # two processes each, for ten seconds

SOFT = Activation24(method="soft_dynamic", backward="split_gemm", calibration_samples=4, dynamic_steps=1)
PASSES: dict[str, list[Pass]] = {
    "sr_ste": [Weight24(method="sr_ste", decay=0.5)],
    "transposable": [Weight24(decay=0.5, mask_every=2, weight_gradient="dense")],
    "soft_dynamic": [Relu2FFN(), SOFT],
}
ROWS = torch.randint(97, (3, 4, 12), generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, pipeline: Pipeline, run: nn.Module, mine: slice, **together: Any) -> None:
    """Three updates of two micro-batches; clipping is at work."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step, update in enumerate(ROWS):
        pipeline.begin_update_(step, update[mine], forward=run, **together)
        for ids in update[mine].chunk(2):
            (F.cross_entropy(run(ids).flatten(0, 1), ids.flatten()) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def summed(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def trained(name: str, wrapper: str) -> dict[str, Tensor]:
    """Returns before the processes part: the destructor of data parallelism may hang behind that."""
    rank, model = dist.get_rank(), llama()
    pipeline = apply_(model, PASSES[name])
    run: Any = fully_shard(model) if wrapper == "fsdp" else DistributedDataParallel(model)
    train(model, pipeline, run, slice(rank, None, 2), reduce=summed, rank=rank)
    return {n: whole(t.detach()) for n, t in model.state_dict().items()}


def on_two(name: str, wrapper: str, expected: dict[str, Tensor]) -> None:
    with open_processes():
        for n, tensor in trained(name, wrapper).items():
            ranks = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(ranks, tensor.contiguous())
            assert torch.equal(*ranks), n
            if name != "soft_dynamic":  # whose sample of tokens is another one
                torch.testing.assert_close(tensor, expected[n], rtol=1e-4, atol=1e-6, msg=n)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", PASSES)
def test_two_processes_train_as_one(name: str, wrapper: str) -> None:
    model = llama()
    pipeline = apply_(model, PASSES[name])
    train(model, pipeline, model, slice(None))
    run_ranks(2, on_two, name, wrapper, dict(model.state_dict()))


def alone_among_two() -> None:
    with open_processes():
        pipeline = apply_(llama(), PASSES["soft_dynamic"])
        with pytest.raises(Act24Error, match=r"2 processes; hand in reduce=.*same weights$"):
            pipeline.begin_update_(0, ROWS[0])
        pipeline = apply_(llama(), [Relu2FFN(), Activation24(method="mvue", from_step=9)])
        with pytest.raises(Act24Error, match=r"2 processes; hand in rank="):
            pipeline.begin_update_(0, ROWS[0], summed)
        pipeline.begin_update_(0, rank=1)
        # Replicas have masks in common by themselves.
        apply_(llama(), PASSES["sr_ste"]).begin_update_(0)


def draws() -> list[int]:
    rank, model = dist.get_rank(), llama()
    pipeline = apply_(model, [Relu2FFN(), Activation24(method="mvue")])
    run = DistributedDataParallel(model)
    pipeline.begin_update_(0, rank=rank)
    run(ROWS[0])
    return [int(b) for n, b in model.named_buffers() if n.endswith("24_seed")]


def apart() -> None:
    with open_processes() as processes:
        mine, other = processes.gather(draws())
        assert len(mine) == 2
        assert not {*mine} & {*other}


def test_replicas_draw_apart_though_their_wrapper_sends_buffers_around() -> None:
    run_ranks(2, apart)


def test_several_processes_are_asked_for_what_they_do_together() -> None:
    run_ranks(2, alone_among_two)
