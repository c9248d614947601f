"""`save_pretrained` of a rewritten `transformers` model: its folder would name no pass, and come back as
another function, with fresh weights where passes made parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn

from act24.errors import PassError
from act24.passes.base import Pass

_NAME, _RESIZE = "save_pretrained", "resize_token_embeddings"


def refuse_to_save_(model: nn.Module, passes: Sequence[Pass]) -> None:
    """Let the model's own `save_pretrained`, where it has one, refuse from now on.

    Args:
        passes: those that change the function or its parameters; without any nothing is refused.
    """
    model = getattr(model, "get_base_model", lambda: model)()  # PEFT's own writes adapters alone
    if passes and hasattr(model, _NAME):
        setattr(model, _NAME, _Refusal(tuple(p.name for p in passes)))


def refuse_to_resize_(model: nn.Module) -> None:
    """Let `resize_token_embeddings` refuse where the head that it would resize has become factors."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and hasattr(model, _RESIZE) and not hasattr(head, "weight"):
        setattr(model, _RESIZE, _NoResize())


def allow_to_save_(model: nn.Module) -> None:
    """Take that back: the model's configuration names its passes."""
    model.__dict__.pop(_NAME, None)


class _NoResize:
    """On the instance, in the method's place."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise PassError(
            "resize_token_embeddings would read the weight of a head that a pass has rewritten: resize the "
            "stock model, and apply the passes then"
        )


class _Refusal:
    """On the instance, in the method's place; copied and pickled with the model."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise PassError(
            f"save_pretrained would leave out {', '.join(self._names)}, and the folder would come back as "
            "another model: use act24.save_pretrained(pipeline, folder), with the pipeline of apply_; in the "
            "Trainer of transformers, callbacks=[act24.integrations.TrainerCallback(pipeline)]"
        )
