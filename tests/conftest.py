"""What all tests share."""

import os

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
