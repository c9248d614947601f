"""Reading a checkpoint's files as what they are: data of unknown origin.

A valid manifest says that a file is as it was written, not who wrote it. So nothing that is read here can run
code, and what is not of the form that `checkpoint.save` writes is a CheckpointError that names the file.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from act24.errors import Act24Error
from act24.tools.checkpoints.manifest import CheckpointError

METADATA = ".metadata"

#: What the pickle of torch.distributed.checkpoint may name, besides dtypes: plain records, and what PyTorch
#: writes a layout and a path as. Nothing here does anything when it is called.
_RECORDS = {
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},  # where Python 3.13 keeps them
}


@contextmanager
def contents_of(path: Path) -> Iterator[None]:
    """Whatever goes wrong with the content of a file is a CheckpointError with its name.

    This wide, because a file of the wrong form can fail in the hands of whoever uses it, and in any way.
    """
    try:
        yield
    except Act24Error:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (Exception, MemoryError) as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} does not hold what act24 writes there: {type(error).__name__}: {text}"
        ) from error


def read_text(path: Path) -> str:
    with contents_of(path):
        return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    with contents_of(path):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, found a {type(value).__name__}")
        return value


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped rather than read: pages come in when they are copied."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


class TensorReader(FileSystemReader):
    """torch.distributed.checkpoint's reader of folders, for tensors alone.

    Its own takes `.metadata` for a pickle of any kind, and entries that are no tensors for more of them: both
    run whatever code the file names.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with contents_of(self._folder / METADATA), open(self._folder / METADATA, "rb") as file:
            metadata = _RecordUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"expected Metadata, found {type(metadata).__name__}")
            for name, entry in metadata.state_dict_metadata.items():
                if not isinstance(entry, TensorStorageMetadata):
                    raise TypeError(f"{name} is no tensor")
            for info in metadata.storage_data.values():
                if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
                    raise ValueError(f"{info.relative_path!r} is no file of this folder")
            if metadata.storage_meta is not None:
                metadata.storage_meta.load_id = self.load_id
            return metadata


class _RecordUnpickler(pickle._Unpickler):
    """Reads the few types of `_RECORDS` and no other, and fills only records that it made itself.

    Python's own implementation in Python, because C's has nothing to override for the opcode BUILD, which
    sets attributes on whatever was read before: on a class, or on a function, for the whole process. The
    price: about 0.1 s for a thousand tensors.
    """

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no business there")

    def load_build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if not dataclasses.is_dataclass(record) or isinstance(record, type):
            raise pickle.UnpicklingError(f"{record!r} is no record, and has no business with a state")
        if isinstance(record, TensorProperties):
            record.__setstate__(state)
            return
        unknown = state.keys() - {field.name for field in dataclasses.fields(record)}
        if unknown:
            raise pickle.UnpicklingError(f"{type(record).__name__} has no {unknown.pop()!r}")
        vars(record).update(state)  # some are frozen

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
