"""act24 in other people's training loops.

    Trainer(…, callbacks=[act24.integrations.TrainerCallback(pipeline)])      # transformers

What other frameworks need is a line in their own loop (docs/own-training-loop.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from act24.tools.integrations.trainer import TrainerCallback

__all__ = ["TrainerCallback"]


def __getattr__(name: str) -> Any:
    if name != "TrainerCallback":
        raise AttributeError(f"module 'act24.integrations' has no attribute '{name}'")
    from act24.tools.integrations.trainer import TrainerCallback  # which imports transformers

    return TrainerCallback
