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
host memory. Only `optimizer/` contains a pickle (torch.distributed.checkpoint's `.metadata`): resume from
checkpoints you trust.

Under several processes all call these functions together, on one file system, and an error on one is raised
on all.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.checkpoints import optimizer_state
from act24.tools.checkpoints.folder import CheckpointError
from act24.tools.checkpoints.random_states import random_states, set_random_states_

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been verified; nothing of it is in a model yet."""

    folder: Path
    step: int
    recipe_text: str
    plan: dict[str, Any]
    state: dict[str, Any]
    manifest: dict[str, Any]


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
) -> Path:
    """Writes the checkpoint after `step` optimizer steps, then deletes all but the `keep` written last.

    `model` is the bare module (under DistributedDataParallel its `.module`) and may be sharded by FSDP2; its
    buffers are taken to be equal on all ranks. `state`, `plan` and each process's own `rank_state` are JSON
    values. The process's random states are added. Returns the folder.

    Raises CheckpointError if it could not be written (disk full, no permission): the unfinished folder is
    gone and the older checkpoints are as they were.
    """
    tensors, table = optimizer_state.capture(_tensors(model), optimizer)
    documents = {  # made before anything is written: what does not fit into JSON is the caller's bug
        f"rank-{_rank():05d}.json": json.dumps({"random": random_states(), "state": rank_state})
    }
    if _rank() == 0:
        documents["state.json"] = json.dumps(state, indent=1)
        documents["plan.json"] = json.dumps(plan, indent=1)
        documents["optimizer.json"] = json.dumps(table)
        documents["recipe.toml"] = recipe_text
        documents[TOKENIZER] = tokenizer_json
    weights = _gather(model)

    folder = checkpoint_folder.folder_of(run_dir, step)
    written = _on_every_rank(lambda: checkpoint_folder.temporary(folder))[0]

    def write() -> None:
        written.mkdir(parents=True, exist_ok=True)
        for name, text in documents.items():
            (written / name).write_text(text, encoding="utf-8")
        if _rank() == 0:
            save_file(weights, written / WEIGHTS, metadata={"format": "pt"})

    def fingerprint() -> dict[str, Any]:
        names = checkpoint_folder.contents(written)[_rank() :: _world_size()]
        for name in names:
            checkpoint_folder.sync(written / name)
        return checkpoint_folder.fingerprints(written, names)

    def publish() -> None:
        if _rank() == 0:
            manifest = {**_origin(), "step": step, "files": files}
            checkpoint_folder.publish(written, folder, manifest)

    try:
        _on_every_rank(write)
        _on_every_rank(lambda: _dcp(state_dict_saver.save, tensors, written / "optimizer"))
        files = {name: file for part in _on_every_rank(fingerprint) for name, file in part.items()}
        _on_every_rank(publish)
    except BaseException as error:
        if _rank() == 0:
            shutil.rmtree(written, ignore_errors=True)
        if not isinstance(error, CheckpointError):
            raise
        last = checkpoint_folder.latest(run_dir)
        raise CheckpointError(
            f"step {step} could not be saved in {folder.parent}: {error}; "
            + (f"the last good checkpoint is {last}" if last else "there is no older checkpoint")
        ) from error
    if _rank() == 0:
        checkpoint_folder.prune(run_dir, keep)
    return folder


def load(folder: Path) -> Checkpoint:
    """Verifies every file of a checkpoint and reads what a run is rebuilt from.

    Raises CheckpointError naming the file that is damaged, missing or not of the checkpoint.
    """

    def verify() -> dict[str, Any]:
        manifest = checkpoint_folder.read_manifest(folder)
        checkpoint_folder.verify_files(folder, manifest, sorted(manifest["files"])[_rank() :: _world_size()])
        return manifest

    manifest = _on_every_rank(verify)[0]
    return Checkpoint(
        folder=folder,
        step=manifest["step"],
        recipe_text=(folder / "recipe.toml").read_text(encoding="utf-8"),
        plan=_read_json(folder / "plan.json"),
        state=_read_json(folder / "state.json"),
        manifest=manifest,
    )


def load_weights_(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copies the checkpoint's weights and buffers into `model`, whatever number of processes wrote them.

    Raises CheckpointError, having changed nothing, unless names, shapes and dtypes are exactly the same.
    """
    targets = _tensors(model)
    _copy_(targets, _saved_weights(checkpoint.folder, targets))


def restore_(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Puts weights, optimizer state and this process's random states back; returns its `rank_state`.

    Afterwards training goes on bit for bit, provided that nothing draws random numbers in between.
    Raises CheckpointError, having changed nothing, if model, optimizer or number of processes are others.
    """
    before, now = checkpoint.manifest["world_size"], _world_size()
    if before != now:
        raise CheckpointError(
            f"{checkpoint.folder} is of a run with world size {before} and this one has {now}; "
            "data position and random states are kept by process, so start as many"
        )
    targets = _tensors(model)
    weights = _saved_weights(checkpoint.folder, targets)
    table = _read_json(checkpoint.folder / "optimizer.json")
    optimizer_state.check(targets, optimizer, table)
    tensors = optimizer_state.allocate(targets, table)
    _dcp(state_dict_loader.load, tensors, checkpoint.folder / "optimizer")

    _copy_(targets, weights)
    optimizer_state.assign_(targets, optimizer, tensors, table)
    of_rank = _read_json(checkpoint.folder / f"rank-{_rank():05d}.json")
    set_random_states_(of_rank["random"])
    return of_rank["state"]


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
        if _rank() == 0:
            gathered[name] = whole.detach().cpu().contiguous()
    return gathered


def _saved_weights(folder: Path, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's weights, mapped rather than read: pages come in when they are copied.

    Raises CheckpointError, listing the first differences, unless names, shapes and dtypes are the targets'.
    """
    saved = load_file(folder / WEIGHTS)

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
            f"{folder} is a checkpoint of another recipe: {'; '.join(differences[:3])}{more}"
        )
    return saved


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
        "format": checkpoint_folder.FORMAT,
        "written": datetime.now(UTC).isoformat(),
        "world_size": _world_size(),
        "versions": {
            "act24": _act24_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
    }


def _act24_version() -> str:
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


def _on_every_rank(work: Callable[[], T]) -> list[T]:
    """Does `work` on every process and returns the results of all, by rank.

    Also where all meet: an error on one becomes a CheckpointError on all, so that none waits in vain.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    reports: list[Any] = [(result, error and _reason(error))]
    if dist.is_initialized():
        mine, reports = reports[0], [None] * _world_size()
        dist.all_gather_object(reports, mine)
    reasons = [reason for _, reason in reports if reason]
    if reasons:
        raise CheckpointError("; ".join(dict.fromkeys(reasons))) from error
    return [result for result, _ in reports]


def _dcp(action: Callable[..., Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Saves or loads by torch.distributed.checkpoint; its error, no Exception, becomes a CheckpointError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            action(tensors, checkpoint_id=folder)
        except CheckpointException as error:
            failures = [_reason(failure) for failure, _ in error.failures.values()]
            raise CheckpointError("; ".join(dict.fromkeys(failures))) from error


def _reason(error: BaseException) -> str:
    """One line: of a chain the OSError in it, which PyTorch's writer buries under `unexpected pos 704`."""
    if isinstance(error, CheckpointError):
        return str(error)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return str(link)
        link = link.__cause__ or link.__context__
    return f"{type(error).__name__}: {error}"


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
