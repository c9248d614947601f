"""A trained model of other programs, to start from: a Hugging Face folder or Hub name, a GGUF file; and
written again as a folder.

LLaMA, Arcee and act24's own type are the stock model and its passes. Everything else that `transformers`
opens stays its own class.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from act24.errors import Act24Error, not_imported, reading
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.passes import Pass, Pipeline, Relu2FFN
from act24.tools.data.tokenizer import Tokenizer as OpenTokenizer
from act24.tools.files import even_modes_, weights_hash
from act24.tools.huggingface.config import (
    ACT24,
    ARCEE,
    CONFIG,
    LLAMA,
    config_of,
    read_json,
    uneven_heads,
)
from act24.tools.huggingface.folder import (
    check_seal,
    check_state,
    open_pretrained,
    refuse_packed,
    unset,
    write_pretrained,
)
from act24.tools.huggingface.tokenizer_files import GENERATION, TOKENIZER, write_tokenizer

#: The kind of a model that is `transformers`' own class.
FOREIGN = "transformers"

#: What `transformers` reads beside the weights.
_TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    GENERATION,
)


@dataclass(frozen=True)
class AnyModel:
    """A model, in evaluation mode on the CPU, in the dtype in which it is stored.

    Attributes:
        source: as it was asked for.
        folder: where its files are; None where it came of something else than a Hugging Face folder.
        kind: `"llama"`, `"arcee"`, `"act24"`, or `"transformers"` for its own class.
        model: the stock model, rewritten by `passes`; or that class.
        config: of the stock model; None for others.
        passes: that rewrote the stock model.
        pipeline: the same, applied; None for others.
        tokenizer_json: the content of its tokenizer.json; None if there is none.
        generation: settings for its generation_config.json, of a run that began with them.
    """

    source: str
    folder: Path | None
    kind: str
    model: nn.Module
    config: LlamaConfig | None
    passes: tuple[Pass, ...]
    pipeline: Pipeline | None
    tokenizer_json: str | None
    generation: Mapping[str, Any] | None = None

    @property
    def vocab_size(self) -> int:
        return int((self.config or self.model.config).vocab_size)  # type: ignore[union-attr]

    @property
    def positions(self) -> int:
        """The longest sequence that it knows."""
        config: Any = self.config or self.model.config
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 2048))

    def state(self) -> dict[str, Tensor]:
        """Its state dict, a tied tensor once, under its first name."""
        first: dict[int, str] = {}
        state = self.model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            first.setdefault(id(tensor), name)
        return {name: state[name].detach() for name in first.values()}

    def open_tokenizer(self) -> OpenTokenizer:
        """
        Raises:
            Act24Error: there is none.
        """
        if self.tokenizer_json is None:
            raise Act24Error(f"{self.source} has no tokenizer.json, without which there is no text")
        import tokenizers

        with reading(f"{self.source}: its tokenizer.json cannot be read", Exception):
            backend = tokenizers.Tokenizer.from_str(self.tokenizer_json)
        config: Any = self.config or self.model.config
        end = getattr(config, "eos_token_id", None)
        end = end[0] if isinstance(end, tuple | list) and end else end
        name = backend.id_to_token(end) if isinstance(end, int) and end >= 0 else None
        return OpenTokenizer(backend, self.source, name)

    def sha256(self) -> str:
        """Of the names and bytes of all its tensors."""
        return weights_hash(self.state())


def open_folder(source: str | Path) -> AnyModel:
    """Open a Hugging Face folder, a Hub name or a GGUF file.

    Raises:
        Act24Error: there is none, it is damaged, or `transformers` cannot open it or is not installed.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return _of_gguf(path)
    if not path.exists():
        path = _from_hub(str(source))
    if not (path / CONFIG).is_file():
        raise Act24Error(f"{path} is no model: it has no {CONFIG}, and is no run, checkpoint or .gguf file")
    if read_json(path / CONFIG).get("model_type") in (LLAMA, ARCEE, ACT24):
        model, pipeline = open_pretrained(path)
        return stock_model(str(source), path, model, pipeline.passes, pipeline, _read_tokenizer(path))
    return _foreign(str(source), path)


def write_any(
    opened: AnyModel, folder: Path, pattern: str = "", metadata: Mapping[str, str] | None = None
) -> None:
    """Write a model, its weights as they are now, as a folder that `transformers` opens.

    Args:
        folder: created where it is missing.
        pattern: of its zeros, for config.json.

    Raises:
        Act24Error, OSError: writing fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if opened.config is not None:
        state = opened.state()
        write_pretrained(folder, opened.config, opened.kind, state, metadata, opened.passes, pattern)
    else:
        model: Any = opened.model
        vars(model.config).pop("act24_weight_pattern", None)  # of the folder that it was opened from
        if pattern:
            model.config.act24_weight_pattern = pattern
        model.save_pretrained(folder)
        even_modes_(folder)
    copied = False
    for name in _TOKENIZER_FILES:
        if opened.folder is not None and (opened.folder / name).is_file():
            shutil.copyfile(opened.folder / name, folder / name)
            copied |= name == TOKENIZER
    if not copied and opened.tokenizer_json is not None:
        config = opened.config or opened.model.config
        write_tokenizer(folder, opened.open_tokenizer(), config, opened.positions, opened.generation)


def stock_kind(passes: tuple[Pass, ...], config: LlamaConfig) -> str:
    """What a stock model with these passes is as a folder."""
    if uneven_heads(config):
        return ACT24
    if not passes:
        return LLAMA
    return ARCEE if passes == (Relu2FFN(width="keep"),) else ACT24


def stock_model(
    source: str,
    folder: Path | None,
    model: LlamaForCausalLM,
    passes: tuple[Pass, ...],
    pipeline: Pipeline,
    tokenizer_json: str | None,
) -> AnyModel:
    """A stock model and the passes that rewrote it."""
    kind = stock_kind(passes, model.config)
    return AnyModel(source, folder, kind, model.eval(), model.config, passes, pipeline, tokenizer_json)


def _foreign(source: str, folder: Path) -> AnyModel:
    transformers = _transformers(source)
    refuse_packed(folder)
    check_seal(folder)
    if read_json(folder / CONFIG).get("is_encoder_decoder"):
        raise Act24Error(f"{source} has an encoder beside its decoder, which is not supported")
    with reading(f"transformers cannot open {source}", Exception):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return AnyModel(source, folder, FOREIGN, model.eval(), None, (), None, _read_tokenizer(folder))


def _of_gguf(path: Path) -> AnyModel:
    """A LLaMA in a GGUF file, dequantised to float32 by `transformers`."""
    if not path.is_file():
        raise Act24Error(f"there is no file {path}")
    transformers = _transformers(str(path))
    with reading(f"transformers cannot open {path}", Exception):
        options = {"gguf_file": path.name, "dtype": torch.float32}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        content = theirs.config.to_dict()
    # It is no longer quantised, though transformers says so; its own class could not be saved.
    content.pop("quantization_config", None)
    if content.get("model_type") != LLAMA:
        raise Act24Error(
            f"{path} holds a {content.get('model_type')}: of GGUF files, those of LLaMA can be read"
        )
    config, _ = config_of(content, str(path))
    model, pipeline = unset(config, ())
    state = dict(theirs.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    state = {name: value for name, value in state.items() if not name.endswith("rotary_emb.inv_freq")}
    check_state(state, model, str(path))
    model.load_state_dict(state, assign=True)
    return stock_model(str(path), None, model, (), pipeline, tokenizer.backend_tokenizer.to_str())


def _from_hub(name: str) -> Path:
    """The folder of a model of the Hub, downloaded or as it is at hand."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise Act24Error(
            f"there is no {name}: expected a run, a checkpoint, a folder, a .gguf file or a Hub name"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    failure = f"{name} is no folder here, and the Hub (HF_ENDPOINT names a mirror) does not give it"
    with reading(failure, Exception):
        return Path(snapshot_download(name, allow_patterns=patterns))


def _transformers(source: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        why = not_imported(error, "transformers")
        raise Act24Error(f"{source} needs transformers, which {why}: pip install 'act24[hf]'") from error
    return transformers


def _read_tokenizer(folder: Path) -> str | None:
    file = folder / TOKENIZER
    if not file.is_file():
        return None
    with reading(f"cannot read {file}"):
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    return text
