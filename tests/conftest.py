"""What all tests share."""

import os

# Commands speak the language of the locale, and tests read English.
os.environ["LC_ALL"] = "C.UTF-8"

import pytest
import torch
from hypothesis import settings

# No deadline: the first example compiles or imports, and the machine is shared. In CI the examples are fixed.
settings.register_profile("act24", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("act24")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test depends on which tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture
def capable_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules see a GPU with kernels and 2:4 products; the operators run their references all the same."""
    from act24.sparse24.format import device
    from act24.sparse24.kernels.shared import self_check

    monkeypatch.setattr(device, "obstacle", lambda _: "")
    monkeypatch.setattr(device, "fp8_obstacle", lambda _: "")
    monkeypatch.setattr(self_check, "kernel_obstacle", lambda *_: "")
