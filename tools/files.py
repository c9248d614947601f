"""Files and folders that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from act24.errors import Act24Error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which is moved onto it at the end, and removed if writing fails.

    Whoever reads `path` sees the old content or the new. Several processes may write it: each has a name of
    its own, and the last one wins.

    Raises:
        OSError: it cannot be moved; or whatever the body raises.
    """
    partial = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` to write to, which becomes `out` at the end, and is deleted if writing
    fails.

    Raises:
        Act24Error: the body could not write, or `out` has come to be a folder with something in it; or
            whatever else the body raises.
    """
    written = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        written.mkdir(parents=True)
        yield written
        written.rename(out)
    except (OSError, SafetensorError) as error:
        raise Act24Error(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(written, ignore_errors=True)


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """safetensors' function of that name, which would leave a file that only its owner may read: this one has
    the mode of any new file.

    Raises:
        OSError, SafetensorError: writing fails.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777
    safetensors.torch.save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)


def is_plain(path: Path) -> bool:
    """Whether there is a file, and no link, device or pipe: reading those may wait for ever, and writing
    goes elsewhere."""
    return path.is_file() and not path.is_symlink()


def plain_text(path: Path) -> str:
    """The text of a file that a program wrote.

    Raises:
        OSError, ValueError: it cannot be read; or it is a pipe, which would be waited for.
    """
    if path.is_fifo():
        raise ValueError(f"{path.name} is a pipe")
    return path.read_text(encoding="utf-8")


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def check_hash(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path, key: str = "sha256"
) -> None:
    """A flipped bit of a weight, or of a mask, would be another one of its kind.

    Raises:
        Act24Error: the tensors are not those whose hash the file's `metadata` has; one without is not judged.
    """
    if metadata.get(key) not in (None, weights_hash(tensors)):
        raise Act24Error(f"{file} is damaged: its tensors are not those that were written")


def even_modes_(folder: Path) -> None:
    """Give the weights that transformers wrote into a folder the mode of the configuration beside them."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)
