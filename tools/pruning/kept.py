"""Finished blocks in a folder, from which what was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from act24.errors import Act24Error, reading
from act24.tools.files import plain_text, save_file, weights_hash, whole_file
from act24.tools.run.lock import LOCK, run_lock

_JOURNAL = "interrupted.json"


class BlockFiles:
    """A file for each finished block, and what was asked for."""

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        """
        Raises:
            Act24Error: the folder is of something else.
        """
        self._folder, self._asked = folder, asked
        journal = folder / _JOURNAL
        if journal.exists():
            with reading(f"cannot read {journal}"):
                before = json.loads(plain_text(journal))
            different = [key for key in asked if before.get(key) != json.loads(json.dumps(asked[key]))]
            if different:
                raise Act24Error(
                    f"{folder} is of an interrupted call with another {', '.join(different)}: give the same "
                    "options, or remove it"
                )
        elif folder.exists() and any(file.name != LOCK for file in folder.iterdir()):
            raise Act24Error(f"{folder} exists, and is of no interrupted call: remove it")

    def _file(self, index: int) -> Path:
        return self._folder / f"block-{index:05d}.safetensors"

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors of a finished block, and what was said of it; None if it is not finished.

        Raises:
            Act24Error: the file is damaged.
        """
        file = self._file(index)
        if not file.is_file():
            return None
        damaged = f"cannot read {file} (remove it, and the block is made again)"
        kinds = (safetensors.SafetensorError, KeyError, TypeError)
        with reading(damaged, *kinds), safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if metadata.get("sha256") not in (None, weights_hash(tensors)):
                raise ValueError("its tensors are not those that were written")
            return tensors, json.loads(metadata["content"])

    def write(self, index: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """
        Raises:
            Act24Error: writing fails.
        """
        journal = self._folder / _JOURNAL
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            if not journal.exists():  # with the first block: what is refused before leaves nothing
                self._folder.mkdir(parents=True, exist_ok=True)
                with whole_file(journal) as file:
                    file.write_text(json.dumps(self._asked, indent=1), encoding="utf-8")
            with whole_file(self._file(index)) as file:
                save_file(whole, file, {"content": json.dumps(content), "sha256": weights_hash(whole)})
        except (OSError, safetensors.SafetensorError) as error:
            raise Act24Error(f"cannot write {self._file(index)}: {error}") from error


@contextmanager
def becoming(out: Path) -> Iterator[Path]:
    """OUT.partial, which no other process writes meanwhile, and which is OUT where nothing is raised.

    Raises:
        Act24Error: `out` exists, or another process is making it.
    """
    partial = out.with_name(f"{out.name}.partial")
    with run_lock(partial, "--out"):
        if out.exists():
            raise Act24Error(f"{out} exists already")
        yield partial
        partial.rename(out)
        for file in (*out.glob("block-*.safetensors"), out / _JOURNAL, out / LOCK):
            file.unlink(missing_ok=True)
