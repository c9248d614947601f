"""`act24 export`: a run for other programs, as a stock Hugging Face checkpoint where there is one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from act24.errors import Act24Error
from act24.llama import LlamaForCausalLM
from act24.passes import PassError
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.huggingface.folder import save_pretrained
from act24.tools.run.build import Built, from_checkpoint, open_checkpoint


def export_run(path: Path, out: Path) -> str:
    """Write the model of a run's last checkpoint, or of a checkpoint, into the new folder `out`.

    A model whose passes have a stock form (LORO's factors multiply out) becomes a Hugging Face checkpoint,
    which `transformers` opens. Any other is written in its own form, without what only training needs, and
    `act24.load(out)` opens it anywhere.

    Returns:
        what was written, and if it is not the stock form, why.

    Raises:
        Act24Error: no checkpoint, a damaged one, or `out` exists or cannot be written.
    """
    if out.exists():
        raise Act24Error(f"{out} exists already")
    opened = open_checkpoint(path)
    built = from_checkpoint(opened)
    try:
        state = built.pipeline.state_to_stock(built.model.state_dict())
    except PassError as error:
        _copy_model(opened, out)
        return f"{out}: the model in its own form, for act24.load, because {error}"
    save_pretrained(_stock(built, state), out)
    (out / checkpoint.TOKENIZER).write_text(opened.tokenizer_json, encoding="utf-8")
    return f"{out}: a Hugging Face checkpoint"


def _stock(built: Built, state: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    tokenizer = built.open_tokenizer()
    config = dataclasses.replace(built.model.config, eos_token_id=tokenizer.eos_id)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    return model


def _copy_model(opened: checkpoint.Checkpoint, out: Path) -> None:
    written = checkpoint_folder.temporary(out)
    try:
        written.mkdir(parents=True)
        for name, text in opened.documents().items():
            (written / name).write_text(text, encoding="utf-8")
        save_file(opened.weights, written / checkpoint.WEIGHTS, metadata={"format": "pt"})
        files = checkpoint_folder.fingerprints(written, checkpoint.MODEL_FILES)
        checkpoint_folder.publish(written, out, {**opened.manifest, "files": files})
    except OSError as error:
        raise Act24Error(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
