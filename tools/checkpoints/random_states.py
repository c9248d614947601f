"""The random states of one process as JSON: Python's, numpy's, torch's on the CPU and on this process's GPU.

JSON, because reading a pickle runs code. The whole is about 20 kB.
"""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy
import torch


def random_states() -> dict[str, Any]:
    """The states of all global generators, in values that JSON gives back unchanged.

    The GPU's is None until this process has used the GPU: asking for it would start CUDA.
    """
    version, words, gauss = random.getstate()
    of_numpy: Any = numpy.random.get_state(legacy=False)
    of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()
    return {
        "python": [version, list(words), gauss],
        "numpy": of_numpy,
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
    }


def seed_random_states_(seed: int, rank: int) -> None:
    """Begin torch's global generators, from which dropout draws, anew. A process starts with a seed of its
    own, so that two runs of a recipe would differ. Ranks draw from different seeds."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {rank}".encode()).digest()[:7], "little"))


def set_random_states_(states: dict[str, Any]) -> None:
    """Sets all global generators to what `random_states` returned.

    The state of a GPU is dropped on a machine without one: its generator is another algorithm than the CPU's.
    """
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(_decode(states["torch"]))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(states["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
