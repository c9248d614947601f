"""The small files of a model's folder as `transformers` writes them, where it is installed, with act24's own
fields on top.

What both know is act24's: transformers 5 leaves out spellings that transformers 4, vLLM and SGLang read
(`rope_theta`, `torch_dtype`, the class of the tokenizer). Theirs alone are the version, by which later ones
tell what a file means, and their defaults. A folder that `transformers` would refuse to open is not written.
Weights need no such thing: the format and the shards (`huggingface_hub`) are the same.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from act24.errors import reading
from act24.tools.huggingface.config import ACT24


def config_fields(ours: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, from act24's own.

    Raises:
        Act24Error: `transformers` would not open it.
    """
    if (transformers := _installed()) is None:
        return ours
    if ours["model_type"] == ACT24:
        from act24.tools.huggingface.model_type import Act24Config as kind
    elif ours["model_type"] in transformers.CONFIG_MAPPING:
        kind = transformers.CONFIG_MAPPING[ours["model_type"]]
    else:  # a version from before Arcee
        return ours
    with reading(f"transformers {transformers.__version__} would not open this model", Exception):
        theirs = kind(**json.loads(json.dumps(ours)))  # as a reader of the file has it
    return json.loads(theirs.to_json_string()) | ours


def generation_fields(ours: dict[str, Any]) -> dict[str, Any]:
    """The content of generation_config.json."""
    if (transformers := _installed()) is None:
        return ours
    return json.loads(transformers.GenerationConfig(**ours).to_json_string()) | ours


def tokenizer_fields(ours: dict[str, Any], tokenizer_json: str) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    if (transformers := _installed()) is None:
        return ours
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    named = {name: value for name, value in ours.items() if name != "tokenizer_class"}
    with tempfile.TemporaryDirectory() as folder:
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)
        theirs = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    return theirs | ours


def _installed() -> Any:
    """The package; None without it."""
    try:
        import transformers
    except ImportError:
        return None
    return transformers
