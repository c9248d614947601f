"""What `act24 bench train` finds of one training loop."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class LoopTiming:
    """One side at one batch.

    Attributes:
        name, rows, micro_batches, tokens: which; rows a micro-batch, micro-batches and tokens a step.
        tokens_per_second: of each turn.
        begin_seconds: the first window, with compilation and capture, beyond what its steps take later on.
        allocated_gib, reserved_gib: most memory of the GPU, what graphs hold included in the latter.
        captured: micro-batches were replayed from CUDA graphs.
        statistics: activations were counted.
    """

    name: str
    rows: int
    micro_batches: int
    tokens: int
    tokens_per_second: tuple[float, ...]
    begin_seconds: float
    allocated_gib: float
    reserved_gib: float
    captured: bool
    statistics: bool

    @property
    def rate(self) -> float:
        """Tokens a second, the median over the turns."""
        return statistics.median(self.tokens_per_second)
