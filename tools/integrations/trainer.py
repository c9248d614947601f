"""The Trainer of `transformers` with a rewritten model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from act24.passes import Pipeline
from act24.passes.first_rows import measured_at
from act24.passes.recovery import check_zeros, keep_zeros_


class TrainerCallback(transformers.TrainerCallback):
    """Begins every update (`Pipeline.begin_update_`), keeps the zeros of what is pruned, and lets the Trainer
    save what it goes on from.

    A scale that is due is measured on the first rows of the update's first micro-batch: the Trainer shows no
    more of an update than that. The Trainer's checkpoints hold the weights as they are trained and no
    config.json; they are for `resume_from_checkpoint`, and `act24.save_pretrained` writes the folder for
    others.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        """
        Args:
            pipeline: of the model that the Trainer has, or of a module in it.
        """
        self._pipeline = pipeline
        self._refuses = vars(pipeline.model).get("save_pretrained")
        self._end_zeros: Callable[[], None] = lambda: None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._refuses is not None:
            self._pipeline.model.save_pretrained = self._save_checkpoint  # type: ignore[assignment]
        self._end_zeros = keep_zeros_(self._pipeline)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_zeros()
        if self._refuses is not None:
            self._pipeline.model.save_pretrained = self._refuses

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        if not measured_at(self._pipeline, step):
            self._pipeline.begin_update_(step, None, _sum, rank=_rank())
            return

        def begin(model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            handle.remove()
            names = tuple(named)

            def forward(*rows: Any) -> object:
                return model(*rows[: len(given)], **dict(zip(names, rows[len(given) :], strict=True)))

            self._pipeline.begin_update_(step, (*given, *named.values()), _sum, forward=forward, rank=_rank())

        handle = self._pipeline.model.register_forward_pre_hook(begin, with_kwargs=True)

    def _save_checkpoint(self, folder: str, **options: Any) -> None:
        model = self._pipeline.model
        check_zeros(self._pipeline)
        type(model).save_pretrained(model, folder, **options)  # type: ignore[operator]
        Path(folder, "config.json").unlink(missing_ok=True)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _sum(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
