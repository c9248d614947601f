"""What a run goes on from, besides weights and optimizer: `state.json` and the position of its text.

A valid manifest says that these files are as they were written, not that a run wrote them. So every number is
checked here, in one place and before anything is built: a step must not meet a count that is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from act24.precision import Kind
from act24.sparse24.feed_forward.options import Precision
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints.checkpoint import Checkpoint
from act24.tools.checkpoints.manifest import CheckpointError
from act24.tools.checkpoints.reading import contents_of, read_json
from act24.tools.data import merged_state
from act24.tools.data.position import Count, PositionError, Saved, check_position, check_saved
from act24.tools.watch.tensorboard import histories


class _Log(Saved):
    """Of `Monitor`."""

    alarmed: bool = False
    skipped: Count = 0
    histories: dict[str, dict[str, Any]] = Field(default={})


class _Product(Saved):
    kind: str
    tokens: Count
    features: Count
    width: Count
    algorithm: Count
    sparse: float
    dense: float


class _Layer(Saved):
    kind: Kind
    sizes: list[Count]
    options: str
    precision: Precision
    bfloat16: float
    fp8: float


class _Products(Saved):
    """Of `tune_`, where it measured."""

    machine: str = ""
    products: list[_Product] = Field(default=[])
    layers: list[_Layer] = Field(default=[])

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        if not (self.machine or self.layers):
            raise ValueError("neither a machine's products nor layers")
        return self


class _State(Saved):
    tokens: Count
    schedule_steps: Count | None = Field(default=None, gt=0)
    evaluation_due: bool = False
    skips: Count = 0
    log: _Log
    products: _Products | None = None
    wandb: str | None = None

    @field_validator("products", mode="before")
    @classmethod
    def _measured(cls, products: Any) -> Any:
        return None if products == {} else products


def saved_state(start: Checkpoint) -> dict[str, Any]:
    """The content of `state.json`, what an older act24 did not write filled in.

    Raises:
        CheckpointError: a field is missing or out of range; it is named.
    """
    with contents_of(start.folder / "state.json"):
        check_saved(_State, start.state)
        histories(start.state["log"].get("histories", {}))
    return {"skips": 0, "evaluation_due": False, "products": None, "wandb": None, **start.state}


def saved_position(start: Checkpoint) -> dict[str, Any]:
    """The position of the run in its text, from the files of all processes that wrote the checkpoint.

    Raises:
        CheckpointError: a field is missing or out of range, or the files do not fit together; names the file.
    """
    states = checkpoint.rank_states(start)
    for rank, state in enumerate(states):
        with contents_of(start.folder / checkpoint.rank_file(rank)):
            check_position(state["data"])
    with contents_of(start.folder / checkpoint.rank_file(0)):
        return merged_state([state["data"] for state in states])


def saved_text(folder: Path) -> dict[str, Any]:
    """What identifies the text of the run that wrote a checkpoint: the fingerprint, with its "files".

    Raises:
        CheckpointError: it cannot be read, or says no such thing.
    """
    file = folder / checkpoint.rank_file(0)
    of_rank = read_json(file)
    with contents_of(file):
        data = of_rank["state"]["data"]
        check_position(data)
        stream = next(iter(data["position"]["streams"].values()))
        return {**data["fingerprint"], "files": stream["files"]}


@contextmanager
def position_of(start: Checkpoint | None) -> Iterator[None]:
    """Around the first reading of the text: a place that it does not have is the checkpoint's fault.

    Raises:
        CheckpointError: names the file and the number.
    """
    try:
        yield
    except PositionError as error:
        if start is None:
            raise
        raise CheckpointError(f"{start.folder / checkpoint.rank_file(0)}: {error}") from error
