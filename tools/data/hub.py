"""Text data sets of the Hugging Face Hub, streamed: nothing is downloaded ahead of its use."""

from __future__ import annotations

import errno
import logging
import random
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from act24.errors import Act24Error, reason
from act24.recipes.schema import Data
from act24.tools.data.background import pause
from act24.tools.data.files import Reading, Wanted, text_of
from act24.tools.data.shard import Shard
from act24.tools.data.tally import Records
from act24.words import counted

LONGEST_WAIT = 60.0  # seconds; waits double from one second up to this
_OWN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

logger = logging.getLogger("act24")


def pinned(data: Data) -> Data:
    """The data with the commit that the Hub's data set is at now, so that a run reads the same text to its
    end, and so does whoever evaluates it. Other sources, folders and what is pinned already stay as they are.

    Raises:
        Act24Error: the data set cannot be reached.
    """
    if data.source != "hf" or data.revision is not None or Path(data.dataset).exists():
        return data
    try:
        return data.model_copy(update={"revision": find_commit(data.dataset)})
    except Exception as error:
        raise _unreachable(data, f"data set {data.dataset!r}", error) from error


def find_commit(dataset: str) -> str | None:
    """The newest commit of a data set, by the Hub."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(dataset).sha


def hub_shards(data: Data, split: str, how: Reading) -> tuple[list[Shard], dict[str, Any]]:
    """The shards of one split of `data.dataset`, and what identifies them.

    Raises:
        Act24Error: the data set cannot be reached or lacks the split.
    """
    what = f"{data.dataset} {data.subset}".rstrip()
    try:
        stream = load_stream(data.dataset, data.subset or None, split, data.revision)
        count = stream.num_shards
    except Exception as error:  # offline; an unknown set, subset, split or revision; whatever a library says
        raise _unreachable(data, f"split {split!r} of data set {what!r}", error) from error
    fingerprint = {
        "source": f"hf {what} {split}",
        "revision": data.revision,
        "shards": count,
        "text_field": data.text_field,
    }
    name = f"{data.dataset}, split {split!r}"
    read = partial(_read, stream, how, name, count)
    patience = partial(retried, name=name, seconds=data.retry_seconds, how=how)
    return [patience(partial(read, index)) for index in range(count)], fingerprint


def load_stream(dataset: str, subset: str | None, split: str, revision: str | None) -> Any:
    """`datasets.load_dataset(…, streaming=True)`."""
    import datasets

    datasets.disable_progress_bars()  # it would draw one bar a rank for listing the shards
    return datasets.load_dataset(dataset, subset, split=split, revision=revision, streaming=True)


def retried(
    shard: Shard,
    name: str,
    seconds: float,
    how: Reading,
    sleep: Callable[[float], None] = pause,
    clock: Callable[[], float] = time.monotonic,
) -> Shard:
    """`shard`, read on from where it broke off when the network fails, after waits that double.

    Args:
        seconds: without one record after which the network is given up. An outage is said as it begins, and
            at failures that are ever farther apart.

    Raises (while reading):
        Act24Error: it was given up.
    """

    def read(wanted: Wanted) -> Iterator[str | None]:
        done = failures = 0
        since = 0.0
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
                how.tally.retries += 1
                since = clock() if failures == 1 else since
                if failures.bit_count() == 1 and seconds:  # the first, second, fourth, …
                    why, waited = reason(error), clock() - since
                    logger.warning("reading %s failed: %s; waited for %.0f s so far", name, why, waited)
                if clock() - since >= seconds:
                    raise Act24Error(
                        f"reading {name} failed {counted(failures, 'time')}: "
                        f"{reason(error)}. data.retry_seconds = 1e9 waits as long as an outage lasts; "
                        "`act24 data prepare` makes a local copy that needs no network"
                    ) from error
                # Ranks must not all come back at once.
                sleep(min(2.0 ** min(failures - 1, 10), LONGEST_WAIT) * random.uniform(0.5, 1.5))

    return read


def _read(
    stream: Any, how: Reading, name: str, count: int, index: int, wanted: Wanted
) -> Iterator[str | None]:
    records = Records(f"{name}, shard {index}", how.skip_bad, how.tally)
    for record, example in enumerate(stream.shard(num_shards=count, index=index)):
        if not wanted(record):
            yield None
            continue
        try:
            text = text_of(example, how, f"{name}, shard {index}, record {record}")
        except Act24Error as error:
            records.bad(error)
            yield None
            continue
        records.good(text)
        yield text


def _is_network_error(error: Exception) -> bool:
    """By name, as the HTTP library beneath `datasets` differs by its version. A stream that breaks off within
    a compressed file is an error of decompression. A full disk of this machine's is none."""
    if isinstance(error, OSError) and error.errno in _OWN_DISK:
        return False
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    network = {
        "aiohttp",
        "fsspec",
        "http",
        "httpcore",
        "httpx",
        "httpx2",
        "huggingface_hub",
        "requests",
        "urllib3",
    }
    return isinstance(error, OSError | EOFError | zlib.error) or bool(packages & network)


def _unreachable(data: Data, what: str, error: Exception) -> Act24Error:
    return Act24Error(
        f"cannot open {what}: {reason(error).rstrip('.')}. HF_ENDPOINT names a mirror of the Hub; "
        "without a network use data.source = 'builtin', 'files' or 'shards'"
    )
