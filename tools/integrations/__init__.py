"""act24 in other people's training loops.

    Trainer(…, callbacks=[act24.integrations.TrainerCallback(pipeline)])      # transformers
    peft.get_peft_model(model, act24.integrations.lora_config(config))        # LoRA on rewritten linears

What other frameworks need is a line in their own loop (docs/own-training-loop.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from act24.tools.integrations.lora import lora_config
    from act24.tools.integrations.trainer import TrainerCallback

#: By name the file, which imports somebody else's library.
_FILES = {"TrainerCallback": "trainer", "lora_config": "lora"}

__all__ = ["TrainerCallback", "lora_config"]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'act24.integrations' has no attribute '{name}'")
    return getattr(import_module(f"act24.tools.integrations.{_FILES[name]}"), name)
