"""A trained model from anywhere, runs and checkpoints included, in the form in which it would be served."""

from __future__ import annotations

from pathlib import Path

from act24.llama import LlamaForCausalLM
from act24.passes import Relu2FFN
from act24.tools.huggingface.any_model import FOREIGN, AnyModel, open_folder, stock_model
from act24.tools.huggingface.config import ARCEE, CONFIG
from act24.tools.huggingface.export import exported_form, foreign_model
from act24.tools.huggingface.folder import check_state, fill_buffers_, unset
from act24.tools.huggingface.old_folder import is_old
from act24.tools.run.build import load


def open_any(source: str | Path) -> AnyModel:
    """Open an act24 run or checkpoint, an old checkpoint, a Hugging Face folder or Hub name, a GGUF file.

    Raises:
        Act24Error: there is none, or it is damaged.
    """
    path = Path(source).expanduser()
    if path.is_dir() and (is_old(path) or not (path / CONFIG).is_file()):
        return _of_run(path)
    return open_folder(source)


def _of_run(path: Path) -> AnyModel:
    built = load(path)
    if not isinstance(built.model, LlamaForCausalLM):
        text = built.tokenizer.to_json() if built.tokenizer else None
        return AnyModel(str(path), None, FOREIGN, foreign_model(built).eval(), None, (), None, text)
    exported = exported_form(built)
    tokenizer_json = built.tokenizer.to_json() if built.tokenizer else None
    passes = (Relu2FFN(width="keep"),) if exported.kind == ARCEE else exported.passes
    model, pipeline = unset(exported.config, passes)
    check_state(exported.state, model, str(path))
    model.load_state_dict({n: v.detach().clone() for n, v in exported.state.items()}, assign=True)
    fill_buffers_(model)
    return stock_model(str(path), None, model, passes, pipeline, tokenizer_json)
