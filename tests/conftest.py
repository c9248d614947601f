"""What all tests share."""

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Commands speak the language of the locale, and tests read English.
os.environ["LC_ALL"] = "C.UTF-8"

import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

# No deadline: the first example compiles or imports, and the machine is shared. In CI the examples are fixed.
settings.register_profile("act24", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("act24")


_CASES = pytest.StashKey[Counter[tuple[str, str]]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Counted before `-m` leaves any out."""
    config.stash[_CASES] = Counter((item.path.name, item.name.partition("[")[0]) for item in items)


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Counter[tuple[str, str]]:
    """How many cases each test has of the files that this session was given, by file and test."""
    return request.config.stash[_CASES]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test depends on which tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_not_searched_for_garbage() -> None:
    """`build` collects garbage, which takes as long as there are objects: half a million of them are pytest's
    items and what was imported, a third of a second each time. What lives between two files lives on."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _equal_regions_are_checked_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """To trace a block again for arguments that are None, and to run it beside its graph, is half of what a
    tiny run takes to begin. Whether that finds what is wrong is for `tests/passes/graph`."""
    if "graph" in request.path.parts or "act24.passes" not in sys.modules:
        yield
        return
    from checked_once import checked_once

    with checked_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def _disks_are_not_waited_for() -> Iterator[None]:
    """No test cuts the power, and a small run waits a hundred times for the disk to have what it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _signals_arrive() -> None:
    """Below `nohup`, or in the background of a script, hangups and interrupts are ignored from the start.
    Runs heed that; the tests of what a run does with a signal send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def capable_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules see a GPU with kernels and 2:4 products; the operators run their references all the same."""
    from act24.sparse24.format import device
    from act24.sparse24.kernels.shared import self_check

    monkeypatch.setattr(device, "obstacle", lambda _: "")
    monkeypatch.setattr(device, "fp8_obstacle", lambda _: "")
    monkeypatch.setattr(self_check, "kernel_obstacle", lambda *_: "")


class Reads(TorchDispatchMode):
    """Counts values that the host reads."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """A mode that counts reads, those that never reach the dispatcher included."""
    mode = Reads()
    for name in ("tolist", "numpy", "cpu"):
        method = getattr(torch.Tensor, name)

        def counted(self: Any, *args: Any, _method: Any = method, **options: Any) -> Any:
            mode.count += 1
            return _method(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return mode
