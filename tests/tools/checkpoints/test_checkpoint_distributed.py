"""Two processes: replicated and sharded runs resume exactly, and an error on one reaches both."""

import errno
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from children import start_processes
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.checkpoints.manifest import CheckpointError
from act24.tools.run.processes import leave_process_group


def model_of(seed, device="cpu"):
    torch.manual_seed(seed)  # 7 rows over 2 processes: uneven shards
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Dropout(0.1), nn.Linear(7, 5, bias=False)).to(device)


def replicated(seed, device):
    return DistributedDataParallel(model_of(seed, device))


def sharded(seed, device):
    model, mesh = model_of(seed, device), init_device_mesh(device, (2,))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def bare(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 6, device=next(model.parameters()).device)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save(run, step, model, optimizer):
    rank_state = {"offset": 100 + dist.get_rank()}
    texts = {"state": {}, "plan": {}, "recipe_text": "", "tokenizer_json": "{}"}
    return checkpoint.save(
        run, step, model=bare(model), optimizer=optimizer, rank_state=rank_state, keep=2, **texts
    )


def resumes_exactly(run, build, device):
    model = build(0, device)
    optimizer = adamw(model)
    torch.manual_seed(dist.get_rank())  # other data and dropout on each
    train(model, optimizer, 2)
    with torch.no_grad():
        model(torch.randn(1, 6, device=device))  # an evaluation, which leaves FSDP2's root gathered
    folder = save(run, 2, model, optimizer)
    weights = {name: whole(value).cpu().clone() for name, value in bare(model).state_dict().items()}
    straight = train(model, optimizer, 3)

    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)

    other = build(7, device)
    other_optimizer = adamw(other)
    assert checkpoint_folder.latest(run) == folder
    loaded = checkpoint.load(folder)
    rank_state = checkpoint.restore_(loaded, bare(other), other_optimizer)
    assert rank_state == {"offset": 100 + dist.get_rank()}
    assert train(other, other_optimizer, 3) == straight
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(ours), whole(theirs))
        for key, value in optimizer.state[ours].items():
            assert torch.equal(whole(value), whole(other_optimizer.state[theirs][key]))
    return model, optimizer


def fails_on_both(run, model, optimizer, rank, owner, function):
    """The disk is full for one process; each of the two must hear of it, and the folder must be gone."""

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(owner, function, full)
        with pytest.raises(CheckpointError, match=r"No space left on device; the last good .*000002"):
            save(run, 5, model, optimizer)
    dist.barrier()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]


def damage_is_found_by_both(run):
    path = run / "checkpoints" / "step-000002" / "rank-00001.json"
    content = path.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        path.write_bytes(content[:-2] + b"]}")
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"rank-00001\.json is damaged"):
        checkpoint.load(path.parent)
    dist.barrier()
    if dist.get_rank() == 0:
        path.write_bytes(content)
    dist.barrier()


def process(rank, directory, device):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{directory}/store", 2)
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for build in (replicated, sharded):
        run = Path(directory) / build.__name__
        model, optimizer = resumes_exactly(run, build, device)
        for failing in (0, 1):
            fails_on_both(run, model, optimizer, failing, Path, "write_text")
            fails_on_both(run, model, optimizer, failing, FileSystem, "create_stream")
            fails_on_both(run, model, optimizer, failing, checkpoint, "sync")
        fails_on_both(run, model, optimizer, 0, checkpoint_folder, "sync")  # behind the manifest
        damage_is_found_by_both(run)
    leave_process_group()


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=two_gpus)])
def test_two_processes(tmp_path, device):
    start_processes(process, (str(tmp_path), device), nprocs=2, start_method="forkserver")
    for name in ("replicated", "sharded"):
        loaded = checkpoint.load(tmp_path / name / "checkpoints" / "step-000002")
        alone = model_of(3)
        checkpoint.load_weights_(loaded, alone)  # whoever only evaluates may be alone
        saved = load_file(loaded.folder / "model.safetensors")
        assert all(torch.equal(saved[key], value) for key, value in alone.state_dict().items())
        optimizer = adamw(alone)
        checkpoint.restore_(loaded, alone, optimizer)  # and so may be whoever goes on
        assert checkpoint.rank_states(loaded) == [{"offset": 100}, {"offset": 101}]
        assert len(optimizer.state) == len(list(alone.parameters()))
    alone = model_of(0)
    optimizer = adamw(alone)
    train(alone, optimizer, 1)
    texts = {"state": {}, "rank_state": {}, "plan": {}, "recipe_text": "", "tokenizer_json": "{}"}
    checkpoint.save(tmp_path / "alone", 1, model=alone, optimizer=optimizer, keep=1, **texts)
    written = {
        name: sum(path.stat().st_size for path in (tmp_path / name).rglob("*.distcp"))
        for name in ("alone", "replicated")
    }
    assert written["replicated"] < 1.1 * written["alone"]  # what every process has is written once
