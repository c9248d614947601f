"""What lies beside a model's weights for `transformers`: the tokenizer with its special tokens, and the ids
with which generation begins and ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from act24.tools.data import Tokenizer

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"


def write_tokenizer(folder: Path, tokenizer: Tokenizer, positions: int) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json in an existing folder.

    Args:
        positions: the longest sequence.

    Raises:
        OSError: writing fails.
    """
    ids = {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    config: dict[str, Any] = {
        # Not the name that transformers 5 writes, which 4 does not know.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.token(id) for name, id in ids.items()},
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    generation = {f"{name}_id": id for name, id in ids.items()}
    (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / GENERATION, generation)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
