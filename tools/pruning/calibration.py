"""Calibration rows by the data options of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from act24.errors import Act24Error
from act24.recipes.schema import Data
from act24.tools.data import Tokenizer, open_rows

logger = logging.getLogger("act24")

#: Tokens of a forward.
_TOKENS = 4096

#: Longer windows are cut to this where nothing is said: models of today know 131,072 positions.
LONGEST = 2048


def calibration_rows(
    data: Data, tokenizer: Tokenizer, count: int, vocab_size: int, rows: int | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The first `count` rows of the training text, in batches, and their padding.

    Args:
        data: `max_length` tokens a row.
        rows: of a batch; None: those of some 4096 tokens.

    Returns:
        int64 `[B, S]` each, and boolean `[B, S]` or None.

    Raises:
        Act24Error: the text cannot be read, fills no row, or fewer than `count`; attention is to stay within
            documents, which the blocks of any model that is pruned do not know.
    """
    if data.attention == "document":
        raise Act24Error(
            'data.attention = "document": models are pruned and fitted on rows with causal attention; '
            "--set data.attention=causal, and data.rows=padded for one document a row"
        )
    size = max(1, min(count, rows or _TOKENS // data.max_length))
    batches: list[Tensor] = []
    pads: list[Tensor | None] = []
    left = count
    with open_rows(data, tokenizer, batch_size=size, vocab_size=vocab_size) as read:
        while left:
            batch = next(read)
            if read.epoch:
                raise Act24Error(
                    f"the calibration text has {count - left} to {count - left + size} rows of "
                    f"{data.max_length} tokens, and {count} were asked for: give more text, fewer --samples "
                    "or a shorter --seqlen"
                )
            ids, own = batch.input_ids[:left], batch.pads
            batches.append(ids)
            pads.append(None if own is None else own[:left])
            left -= len(ids)
        for line in read.remarks():
            logger.warning("%s", line)
    return batches, pads


def window(asked: int | None, positions: int) -> int:
    """Tokens a calibration row: as asked, or what the model knows, 2048 at most.

    Raises:
        Act24Error: more than the model knows.
    """
    if asked is None:
        return min(positions, LONGEST)
    if asked > positions:
        raise Act24Error(f"--seqlen {asked}: the model knows {positions} positions")
    return asked


def tokens_of(batches: Sequence[Tensor], pads: Sequence[Tensor | None]) -> int:
    """Without padding."""
    return sum(
        ids.numel() - (0 if own is None else int(own.sum())) for ids, own in zip(batches, pads, strict=True)
    )
