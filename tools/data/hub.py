"""Text data sets of the Hugging Face Hub, streamed: nothing is downloaded ahead of its use."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from act24.errors import Act24Error
from act24.recipes.schema import Data
from act24.tools.data.documents import Shard
from act24.tools.data.files import text_of

RETRIES = 6  # in a row, waiting 1, 2, 4, … seconds: about a minute without the network is survived


def hub_shards(data: Data, split: str) -> tuple[list[Shard], dict[str, Any]]:
    """The shards of one split of `data.dataset`, and what identifies them.

    Raises:
        Act24Error: the data set cannot be reached or lacks the split.
    """
    what = f"{data.dataset} {data.subset}".rstrip()
    try:
        stream = load_stream(data.dataset, data.subset or None, split)
    except (OSError, ValueError) as error:  # offline; an unknown set, subset or split
        raise Act24Error(
            f"cannot open split {split!r} of data set {what!r}: {_reason(error)}. "
            "Without a network use data.source = 'builtin', 'files' or 'shards'"
        ) from error
    count = stream.num_shards
    fingerprint = {
        "source": f"hf {what} {split}",
        "shards": count,
        "text_field": data.text_field,
    }
    name = f"{data.dataset}, split {split!r}"
    read = partial(_read, stream, data.text_field, name, count)
    return [retried(partial(read, index), name) for index in range(count)], fingerprint


def load_stream(dataset: str, subset: str | None, split: str) -> Any:
    """`datasets.load_dataset(…, streaming=True)`."""
    import datasets

    datasets.disable_progress_bars()  # it would draw one bar a rank for listing the shards
    return datasets.load_dataset(dataset, subset, split=split, streaming=True)


def retried(shard: Shard, name: str, sleep: Callable[[float], None] = time.sleep) -> Shard:
    """`shard`, read on from where it broke off when the network fails, after waits that double.

    Raises (while reading):
        Act24Error: it failed `RETRIES` + 1 times without one record in between.
    """

    def read(wanted: Callable[[int], bool]) -> Iterator[str | None]:
        done = failures = 0
        while True:
            try:
                for index, text in enumerate(shard(wanted)):
                    if index >= done:
                        done, failures = index + 1, 0
                        yield text
                return
            except Exception as error:
                if not _is_network_error(error):
                    raise
                failures += 1
                if failures > RETRIES:
                    raise Act24Error(
                        f"reading {name} failed {failures} times in a row: {_reason(error)}. "
                        "`act24 data prepare` makes a local copy that needs no network"
                    ) from error
                sleep(2 ** (failures - 1) * random.uniform(0.5, 1.5))  # ranks must not all come back at once

    return read


def _read(
    stream: Any, text_field: str, name: str, count: int, index: int, wanted: Callable[[int], bool]
) -> Iterator[str | None]:
    for record, example in enumerate(stream.shard(num_shards=count, index=index)):
        where = f"{name}, shard {index}, record {record}"
        yield text_of(example, text_field, where) if wanted(record) else None


def _is_network_error(error: Exception) -> bool:
    """By name, as the HTTP library beneath `datasets` differs by its version."""
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(
        packages & {"aiohttp", "httpcore", "httpx", "httpx2", "requests"}
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
