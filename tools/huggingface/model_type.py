"""The model type "act24" of `transformers`: a LLaMA whose passes are applied again when it is opened.

    from act24.tools.huggingface import model_type     # registers it with AutoConfig and AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(folder)

It is `transformers`' own LLaMA, rewritten by the passes in its config.json, so caches, padding, `generate`
and every attention implementation are theirs. Passes are stored as they act in evaluation: nothing is drawn.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from act24.passes import Pass, Pipeline, apply_
from act24.passes.not_saved import allow_to_save_
from act24.passes.pipeline import pipeline_of
from act24.recipes.load import passes_of_tables
from act24.tools.files import even_modes_
from act24.tools.huggingface.config import ACT24, AUTO_MAP, MODULE, MODULE_TEXT


class Act24Config(LlamaConfig):
    """LlamaConfig and `act24_passes`, tables as recipes have them: `{"use": "cola", "mlp_rank": 256, …}`."""

    model_type = ACT24
    act24_passes: list | None = None

    @classmethod
    def register_for_auto_class(cls, *_: Any) -> None:
        """Nothing: `transformers` would copy this file into every folder, and name it there."""

    def validate_architecture(self) -> None:
        """Nothing: `transformers` refuses its own LLaMA where heads do not divide the width, which it
        computes all the same, as `head_dim` is given."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes. Raises Act24Error for tables that are none."""
        return passes_of_tables(self.act24_passes or [], "config.json: act24_passes")


class Act24ForCausalLM(LlamaForCausalLM):
    """`transformers`' LLaMA after the passes of its configuration."""

    config_class = Act24Config

    def __init__(self, config: Act24Config) -> None:
        super().__init__(config)
        if config.passes:
            apply_(self, config.passes)
            allow_to_save_(self)

    @classmethod
    def register_for_auto_class(cls, *_: Any) -> None:
        """As for the configuration."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any
    ) -> None:
        """As `transformers` does it, with the module that `trust_remote_code=True` runs."""
        self.config.auto_map = AUTO_MAP
        super().save_pretrained(save_directory, *arguments, **options)
        if (arguments[:1] or (options.get("is_main_process", True),))[0]:
            (Path(save_directory) / MODULE).write_text(MODULE_TEXT, encoding="utf-8")
            even_modes_(Path(save_directory))

    @property
    def pipeline(self) -> Pipeline | None:
        """For training, if the passes have state to renew: `begin_update_` once an update; else None."""
        return pipeline_of(self)


AutoConfig.register(ACT24, Act24Config)
AutoModelForCausalLM.register(Act24Config, Act24ForCausalLM)
