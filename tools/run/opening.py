"""A trained model from anywhere, runs and checkpoints included, in the form in which it would be served."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from act24.llama import LlamaForCausalLM
from act24.passes import Relu2FFN
from act24.tools.huggingface.any_model import FOREIGN, AnyModel, open_folder, stock_model
from act24.tools.huggingface.config import ACT24, ARCEE, CONFIG
from act24.tools.huggingface.export import computes_24, exported_form, foreign_model
from act24.tools.huggingface.folder import check_state, fill_buffers_, unset
from act24.tools.huggingface.old_folder import is_old
from act24.tools.run.build import generation_of, load

logger = logging.getLogger("act24")


def open_any(source: str | Path, as_trained: bool = False) -> AnyModel:
    """Open an act24 run or checkpoint, an old checkpoint, a Hugging Face folder or Hub name, a GGUF file.

    Args:
        as_trained: with the 2:4 activations of a run, for measuring; else they are computed dense, as in the
            stock forms, and a warning says so.

    Raises:
        Act24Error: there is none, or it is damaged.
    """
    path = Path(source).expanduser()
    if path.is_dir() and (is_old(path) or not (path / CONFIG).is_file()):
        return _of_run(path, as_trained)
    return open_folder(source)


def _of_run(path: Path, as_trained: bool) -> AnyModel:
    built = load(path)
    sparse = computes_24(built.pipeline)
    tokenizer_json = built.tokenizer.to_json() if built.tokenizer else None
    began = generation_of(built)
    if not isinstance(built.model, LlamaForCausalLM):
        model: Any = built.model if sparse and as_trained else foreign_model(built.pipeline)
        _warn(path, sparse and not as_trained)
        return AnyModel(str(path), None, FOREIGN, model.eval(), None, (), None, tokenizer_json, began)
    exported = exported_form(built, ACT24 if sparse and as_trained else "auto")
    _warn(path, sparse and exported.kind != ACT24)
    passes = (Relu2FFN(width="keep"),) if exported.kind == ARCEE else exported.passes
    model, pipeline = unset(exported.config, passes)
    check_state(exported.state, model, str(path))
    model.load_state_dict({n: v.detach().clone() for n, v in exported.state.items()}, assign=True)
    fill_buffers_(model)
    opened = stock_model(str(path), None, model, passes, pipeline, tokenizer_json)
    return dataclasses.replace(opened, generation=began)


def _warn(path: Path, dense: bool) -> None:
    if dense:
        logger.warning("warning: %s was trained with 2:4 activations, which are computed dense here", path)
