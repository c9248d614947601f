"""What lies beside a model's weights for `transformers`: the tokenizer with its special tokens, and the ids
with which generation begins and ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from act24.tools.data import Tokenizer
from act24.tools.huggingface.by_transformers import generation_fields, tokenizer_fields

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"

logger = logging.getLogger("act24")


def write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    config: Any,
    positions: int,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """tokenizer.json and tokenizer_config.json in an existing folder, and generation_config.json where there
    is none yet or settings for it are given.

    Args:
        config: of the model, stock or `transformers`' own: may name a token that begins a text, and several
            that end it.
        positions: the longest sequence.
        generation: the settings of the model that a run began with. They are left out, and a warning says so,
            where another tokenizer's tokens have other ids.

    Raises:
        OSError: writing fails.
    """
    ids = {"eos_token": tokenizer.eos_id, "pad_token": padding(config, tokenizer)}
    begin = getattr(config, "bos_token_id", None)
    if isinstance(begin, int) and begin >= 0 and tokenizer.known_ids(begin + 1)[begin]:
        ids["bos_token"] = begin
    fields: dict[str, Any] = {
        # Not the name that transformers 5 writes, which 4 does not know.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.token(id) for name, id in ids.items()},
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        # Whoever generates goes on at the end of a row: `transformers`' own default, right, is for encoders.
        "padding_side": "left",
    }
    content = tokenizer.to_json()
    (folder / TOKENIZER).write_text(content, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", tokenizer_fields(fields, content))
    own = {f"{name}_id": id for name, id in ids.items()} | {"eos_token_id": ends(config, tokenizer)}
    if generation and tokenizer.eos_id not in _listed(generation.get("eos_token_id", own["eos_token_id"])):
        logger.warning(
            "warning: none of the generation settings that the model began with are written: they end a text "
            "at %s, its tokenizer at %d",
            generation["eos_token_id"],
            tokenizer.eos_id,
        )
        generation = None
    if generation or not (folder / GENERATION).exists():
        _write_json(folder / GENERATION, generation_fields(own | dict(generation or {})))


def ends(config: Any, tokenizer: Tokenizer) -> int | tuple[int, ...]:
    """The tokens that end a text: several, as of chat models, of which the tokenizer names one."""
    known = getattr(config, "eos_token_id", None)
    several = isinstance(known, tuple | list) and tokenizer.eos_id in known
    return _listed(known) if several else tokenizer.eos_id


def padding(config: Any, tokenizer: Tokenizer) -> int:
    """The token that fills rows: the model's own, if it knows the tokenizer's end of a text."""
    known = getattr(config, "pad_token_id", None)
    same = tokenizer.eos_id in _listed(getattr(config, "eos_token_id", None))
    own = isinstance(known, int) and known >= 0 and same and bool(tokenizer.known_ids(known + 1)[known])
    return known if own else tokenizer.pad_id  # type: ignore[return-value]


def _listed(ids: Any) -> tuple[Any, ...]:
    return tuple(ids) if isinstance(ids, tuple | list) else (ids,)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
