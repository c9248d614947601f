"""Perplexity by the protocol of the pruning literature (`eval_ppl_wikitext` of arXiv 2306.11695's code): the
texts joined by blank lines and tokenised once, with what the tokenizer puts in front; windows of `seqlen`
tokens that do not overlap, the tail dropped; each window alone, in float32; exp of the mean over windows.

The window is a part of the figure: dense LLaMA-2-7B is 5.12 at 4096 tokens and 5.47 at 2048.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from act24.errors import Act24Error, reading
from act24.llama import LlamaForCausalLM
from act24.loss import cross_entropy_sum
from act24.recipes.load import read_utf8
from act24.tools.huggingface.any_model import AnyModel
from act24.words import counted

PROTOCOLS = ("wikitext",)


@dataclass(frozen=True)
class Perplexity:
    """A model's perplexity on a text, with all that it depends on.

    Attributes:
        loss: nats per predicted token.
        seqlen: tokens a window, of which all but the first are predicted.
        windows: so many.
        dropped: tokens of the tail.
        text: sha256 of the token ids of all windows.
    """

    model: str
    protocol: str
    seqlen: int
    windows: int
    dropped: int
    text: str
    loss: float
    perplexity: float
    dtype: str = "float32"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f} at {self.seqlen} tokens a window, "
            f"{counted(self.windows, 'window')}, {counted(self.dropped, 'token')} dropped, "
            f"token ids {self.text[:12]} ({self.protocol}, {self.dtype})"
        )


def joined_text(files: Sequence[str]) -> str:
    """The documents of text files, in order, joined by blank lines.

    Raises:
        Act24Error: a file is missing, or cannot be read.
    """
    parts = []
    for file in files:
        with reading(f"cannot read {file}"):
            parts.append(read_utf8(Path(file).expanduser()))
    return "\n\n".join(parts)


def window_ids(tokenizer_json: str, text: str, seqlen: int, windows: int | None = None) -> tuple[Tensor, int]:
    """int64 `[N, seqlen]`, and how many tokens of the tail are dropped.

    Args:
        windows: at most so many, the first ones.

    Raises:
        Act24Error: the text fills no window.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    backend.no_truncation()
    backend.no_padding()
    ids = torch.tensor(backend.encode(text).ids, dtype=torch.int64)
    count = ids.numel() // seqlen
    if not count:
        raise Act24Error(f"the text has {counted(ids.numel(), 'token')}, fewer than one window of {seqlen}")
    count = min(count, windows or count)
    return ids[: count * seqlen].view(count, seqlen), ids.numel() - count * seqlen


@torch.no_grad()
def perplexity(
    opened: AnyModel,
    files: Sequence[str],
    seqlen: int,
    windows: int | None = None,
    device: torch.device | str = "cpu",
) -> Perplexity:
    """Measure a model, which is float32 and on `device` afterwards.

    Raises:
        Act24Error: no tokenizer, files that cannot be read, a text too short, a window the model does not
            know.
    """
    if not 2 <= seqlen <= opened.positions:
        raise Act24Error(f"--seqlen {seqlen}: the model takes 2 to {opened.positions} tokens")
    if not files:
        raise Act24Error("--protocol wikitext needs --text FILE, once or more")
    if opened.tokenizer_json is None:
        raise Act24Error(f"{opened.source} has no tokenizer: put its tokenizer.json beside the weights")
    ids, dropped = window_ids(opened.tokenizer_json, joined_text(files), seqlen, windows)
    if int(ids.max()) >= opened.vocab_size:
        raise Act24Error(f"{opened.source}: its tokenizer has id {int(ids.max())}, beyond its vocabulary")
    model = opened.model.float().to(device).eval()
    losses = torch.stack([window_loss(model, row[None].to(device)).double().cpu() for row in ids])
    loss = float(losses.mean())
    return Perplexity(
        model=opened.source,
        protocol="wikitext",
        seqlen=seqlen,
        windows=len(ids),
        dropped=dropped,
        text=hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
    )


def window_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens behind the first, of one window `[1, S]`."""
    if isinstance(model, LlamaForCausalLM):
        total, count = cross_entropy_sum(model.model(ids[:, :-1]), model.head_weight, ids[:, 1:])
        return total / count
    logits = model(ids).logits[0, :-1]
    return F.cross_entropy(logits.float(), ids[0, 1:])


def compared(one: Perplexity, with_file: Path) -> str:
    """One line about two results.

    Raises:
        Act24Error: the file is none of a result, or they are of other windows, text, protocol or precision.
    """
    with reading(f"{with_file} holds no result of act24 eval --protocol", TypeError):
        other = Perplexity(**json.loads(with_file.read_text(encoding="utf-8")))
    for key in ("protocol", "seqlen", "windows", "text", "dtype"):
        was, now = getattr(other, key), getattr(one, key)
        if was != now:
            raise Act24Error(f"the two are not comparable: {key} is {now} here and {was} in {with_file}")
    ratio = one.perplexity / other.perplexity
    return f"{one.perplexity:.3f} against {other.perplexity:.3f} of {other.model}: × {ratio:.4f}"
