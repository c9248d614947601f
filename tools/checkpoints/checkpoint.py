"""Checkpoints: everything a run needs to go on bit for bit, in folders that are whole or not there.

    step-000500/
        model.safetensors   weights and persistent buffers, whole tensors under the model's own names
        optimizer/          tensors of the optimizer's state, by torch.distributed.checkpoint, still sharded
        optimizer.json      the rest of it: class, groups, options, and a table of those tensors
        rank-00000.json     one a process: its random states and what the caller keeps by rank (data position)
        state.json          what the caller keeps once (tokens, schedule, …)
        recipe.toml         the resolved recipe
        plan.json           what the passes did to the stock model
        tokenizer.json      the one that the text was read with
        manifest.json       written last: step, versions, and size and SHA-256 of every file above

The weights are stored once, as safetensors, so that any program can open them and that evaluating a
checkpoint reads no pickle. The price: under FSDP2 the first process gathers them, which takes their size in
host memory. Only `optimizer/` contains a pickle (torch.distributed.checkpoint's `.metadata`), which is read
as records and never runs code (`reading.py`).

Under several processes all call these functions together, on one file system, and an error on one is raised
on all.
"""

from __future__ import annotations

import json
import platform
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from act24.optim.adamw import local
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.checkpoints import optimizer_state
from act24.tools.checkpoints.manifest import (
    FORMAT,
    CheckpointError,
    contents,
    fingerprints,
    read_manifest,
    sync,
    verify_files,
)
from act24.tools.checkpoints.random_states import random_states, set_random_states_
from act24.tools.checkpoints.reading import TensorReader, contents_of, read_json, read_text, read_weights
from act24.tools.checkpoints.together import on_every_rank, on_the_first, rank, reason, world_size
from act24.tools.files import save_file

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
#: What a checkpoint needs to be opened, as opposed to going on from.
MODEL_FILES = (WEIGHTS, TOKENIZER, "recipe.toml", "plan.json", "state.json")
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been verified; nothing of it is in a model yet.

    Evaluating and sampling need no more of its folder: `weights` are mapped, and stay although a run that
    goes on deletes the file (on a network disk for as long as its server allows).
    """

    folder: Path
    step: int
    recipe_text: str
    plan: dict[str, Any]
    state: dict[str, Any]
    manifest: dict[str, Any]
    tokenizer_json: str
    weights: dict[str, Tensor] = field(repr=False)


def save(
    run_dir: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    rank_state: dict[str, Any],
    recipe_text: str,
    plan: dict[str, Any],
    tokenizer_json: str,
    keep: int,
    keep_every: int = 0,
    keep_best: int = 0,
    heldout: dict[str, Any] | None = None,
    check_folder: Callable[[], None] = lambda: None,
) -> Path:
    """Writes the checkpoint after `step` optimizer steps, then deletes older ones (`folder.prune`).

    `model` is the bare module (under DistributedDataParallel its `.module`) and may be sharded by FSDP2; its
    buffers are taken to be equal on all ranks. `state`, `plan` and each process's own `rank_state` are JSON
    values. The process's random states are added. `heldout` is the loss of these weights, `{"loss": …,
    "data": …}`, where it was measured. `check_folder` raises an Act24Error where `run_dir` may not be written
    any more; the first process asks before the first byte and before the folder gets its name. Returns the
    folder.

    Raises CheckpointError if it could not be written (disk full, no permission): the unfinished folder is
    gone and the older checkpoints are as they were. The same where a weight or a moment is not finite,
    because nothing could go on from there; that is found on the device, in one pass over both. Whether their
    loss is finite is not asked here.
    """
    tensors, table = optimizer_state.capture(_tensors(model), optimizer)
    # Made before anything is written: what does not fit into JSON is the caller's bug.
    documents = {rank_file(rank()): json.dumps({"random": random_states(), "state": rank_state})}
    if rank() == 0:
        documents |= {
            "state.json": json.dumps(state, indent=1),
            "plan.json": json.dumps(plan, indent=1),
            "optimizer.json": json.dumps(table),
            "recipe.toml": recipe_text,
            TOKENIZER: tokenizer_json,
        }
    folder = checkpoint_folder.folder_of(run_dir, step)
    written = on_every_rank(lambda: checkpoint_folder.temporary(folder))[0]

    def write() -> None:
        if rank() == 0:
            check_folder()
        written.mkdir(parents=True, exist_ok=True)
        for name, text in documents.items():
            (written / name).write_text(text, encoding="utf-8")
        if rank() == 0:
            save_file(weights, written / WEIGHTS, metadata={"format": "pt"})

    def publish() -> None:
        if rank() == 0:
            sequence = checkpoint_folder.next_sequence(run_dir)
            check_folder()
            manifest = {**_origin(), "step": step, "sequence": sequence, "heldout": heldout, "files": files}
            checkpoint_folder.publish(written, folder, manifest)

    try:
        on_every_rank(lambda: _check_finite({**_tensors(model), **tensors}))
        weights = _gather(model)
        on_every_rank(write)
        on_every_rank(lambda: _dcp(state_dict_saver.save, tensors, written / "optimizer"))
        files = {
            name: file
            for part in on_every_rank(lambda: _own_fingerprints(written))
            for name, file in part.items()
        }
        on_every_rank(publish)
    except BaseException as error:
        if rank() == 0:
            checkpoint_folder.abandon(written)
        if not isinstance(error, CheckpointError):
            raise
        if rank() == 0:
            check_folder()  # a folder that is another one now has no file of this save
        last = _last_good(run_dir, written)
        older = f"the last good checkpoint is {last}" if last else "there is no older checkpoint"
        raise CheckpointError(
            f"step {step} could not be saved in {folder.parent}: {error}; {older}"
        ) from error
    if rank() == 0:
        checkpoint_folder.prune(run_dir, keep, written=folder, keep_every=keep_every, keep_best=keep_best)
    return folder


def _own_fingerprints(written: Path) -> dict[str, Any]:
    """Those of every n-th file, of which this process takes care; the files are on the disk then."""
    names = contents(written)[rank() :: world_size()]
    for name in names:
        sync(written / name)
    return fingerprints(written, names)


def load(folder: Path) -> Checkpoint:
    """Verifies every file of a checkpoint and reads what a run is rebuilt from.

    Raises CheckpointError naming the file that is damaged, missing or not of the checkpoint.
    """

    def verify() -> Checkpoint:
        manifest = read_manifest(folder)
        missing = [name for name in MODEL_FILES if name not in manifest["files"]]
        if missing:
            raise CheckpointError(f"{folder} is no checkpoint of a run: it has no {missing[0]}")
        verify_files(folder, manifest, sorted(manifest["files"])[rank() :: world_size()])
        return Checkpoint(
            folder=folder,
            step=manifest["step"],
            recipe_text=read_text(folder / "recipe.toml"),
            plan=read_json(folder / "plan.json"),
            state=read_json(folder / "state.json"),
            manifest=manifest,
            tokenizer_json=read_text(folder / TOKENIZER),
            weights=read_weights(folder / WEIGHTS),
        )

    return _mine(verify)


def load_weights_(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copies the checkpoint's weights and buffers into `model`, whatever number of processes wrote them.

    Raises CheckpointError, having changed nothing, unless names, shapes and dtypes are exactly the same.
    """
    targets = _tensors(model)
    _check_kinds(checkpoint, targets)
    _copy_(targets, checkpoint.weights)


def restore_(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Puts weights, optimizer state and this process's random states back; returns its `rank_state`.

    Afterwards training goes on bit for bit, provided that nothing draws random numbers in between and there
    are as many processes as there were. Where there are others, process r takes what process r modulo their
    number had. Raises CheckpointError, having changed nothing, if model or optimizer are others.
    """
    targets = _tensors(model)
    _check_kinds(checkpoint, targets)
    table_file = checkpoint.folder / "optimizer.json"
    table = read_json(table_file)
    with contents_of(table_file):
        optimizer_state.check(targets, optimizer, table)
        tensors = optimizer_state.allocate(targets, table)
    of_rank_file = checkpoint.folder / rank_file(rank() % _writers(checkpoint))
    of_rank = read_json(of_rank_file)
    folder = checkpoint.folder / "optimizer"
    _dcp(state_dict_loader.load, tensors, folder, storage_reader=TensorReader(folder))

    _copy_(targets, checkpoint.weights)
    with contents_of(table_file):
        optimizer_state.assign_(targets, optimizer, tensors, table)
    with contents_of(of_rank_file):
        set_random_states_(of_rank["random"])
        return of_rank["state"]


def rank_states(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The `rank_state` of every process that wrote the checkpoint, by rank, on every process of this run.

    Raises CheckpointError if they cannot be read.
    """

    def read() -> list[dict[str, Any]]:
        states = []
        for writer in range(_writers(checkpoint)):
            path = checkpoint.folder / rank_file(writer)
            of_rank = read_json(path)
            with contents_of(path):
                states.append(of_rank["state"])
        return states

    return on_the_first(read)


def _writers(checkpoint: Checkpoint) -> int:
    """How many processes wrote it; at least one, or the first file is named as missing."""
    return max(checkpoint.manifest["world_size"], 1)


def rank_file(writer: int) -> str:
    """The name of the file of one process."""
    return f"rank-{writer:05d}.json"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, the model's own; a tied tensor once, under its first name."""
    first_names: dict[int, str] = {}
    everything = model.state_dict(keep_vars=True)
    for name, tensor in everything.items():
        first_names.setdefault(id(tensor), name)
    return {name: everything[name] for name in first_names.values()}


def _gather(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors on the CPU on rank 0, one at a time through the GPU; nothing on the others."""
    gathered = {}
    for name, tensor in _tensors(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            gathered[name] = whole.detach().cpu().contiguous()
    return gathered


def _check_kinds(checkpoint: Checkpoint, targets: dict[str, Tensor]) -> None:
    """Raises CheckpointError, listing the first differences, unless names, shapes and dtypes are the
    targets'."""
    saved = checkpoint.weights

    def kind(tensors: dict[str, Tensor], name: str) -> str:
        if name not in tensors:
            return "absent"
        return f"{str(tensors[name].dtype).removeprefix('torch.')} {list(tensors[name].shape)}"

    differences = [
        f"{name} is {kind(saved, name)} in the checkpoint and {kind(targets, name)} in the model"
        for name in (*targets, *(name for name in saved if name not in targets))
        if kind(saved, name) != kind(targets, name)
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.folder} is a checkpoint of another recipe: {'; '.join(differences[:3])}{more}"
        )


def _check_finite(tensors: dict[str, Tensor]) -> None:
    """Raises CheckpointError naming the first tensor that holds an infinity or a NaN; one transfer."""
    mine = {name: local(tensor.detach()) for name, tensor in tensors.items()}
    checked = [name for name, tensor in mine.items() if tensor.is_floating_point() and tensor.numel()]
    if not checked:
        return
    # Both ends take in a NaN, and so does their sum; of the device it is one read of everything.
    ends = [torch.aminmax(mine[name]) for name in checked]
    device = torch.device("cuda") if any(mine[name].is_cuda for name in checked) else torch.device("cpu")
    table = torch.stack([torch.stack((low, high)).double().to(device) for low, high in ends])
    bad = [name for name, finite in zip(checked, table.isfinite().all(1).tolist(), strict=True) if not finite]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckpointError(f"{bad[0]}{more} is not finite")


def _mine(work: Callable[[], T]) -> T:
    """The result of this process, after all have one: tensors and texts need not travel."""
    results: list[T] = []
    on_every_rank(lambda: results.append(work()))
    return results[0]


def _last_good(run_dir: Path, abandoned: Path) -> Path | None:
    """For a message: what cannot be used is none, nor is what the first process is about to delete."""
    try:
        usable = [path for path in checkpoint_folder.complete(run_dir) if path != abandoned]
    except CheckpointError:
        return None
    return usable[-1] if usable else None


def _copy_(targets: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, target in targets.items():
            value = weights[name]
            if isinstance(target, DTensor):  # every process has mapped the file, so none has to send anything
                value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
            target.copy_(value)


def _origin() -> dict[str, Any]:
    """What wrote the checkpoint, and when: the manifest's head."""
    return {
        "format": FORMAT,
        "written": datetime.now(UTC).isoformat(),
        "world_size": world_size(),
        "versions": {
            "act24": version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
    }


def version() -> str:
    """Of act24."""
    try:
        return metadata.version("act24")
    except metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout


@cache
def _commit() -> str | None:
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():  # installed, perhaps somewhere inside a repository that is not ours
        return None
    try:
        git = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return git.stdout.strip() or None


def _dcp(action: Callable[..., Any], tensors: dict[str, Tensor], folder: Path, **options: Any) -> None:
    """Saves or loads by torch.distributed.checkpoint; its error, no Exception, becomes a CheckpointError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            action(tensors, checkpoint_id=folder, **options)
        except CheckpointException as error:
            failures = [reason(failure) for failure, _ in error.failures.values()]
            raise CheckpointError("; ".join(dict.fromkeys(failures))) from error
