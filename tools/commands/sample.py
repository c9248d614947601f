"""`act24 sample`: text from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from act24.errors import Act24Error, reading
from act24.generate import generate
from act24.tools.run.build import load


def sample_text(path: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The prompt and its continuation by the checkpoint at `path`, in the form that would be served.

    Raises:
        Act24Error: no checkpoint, or a prompt without a token.
    """
    built = load(path)
    if (tokenizer := built.tokenizer) is None:
        raise Act24Error(f"{path} has no tokenizer.json, without which there is no text")
    with reading("the prompt is no UTF-8"):  # a byte that is none comes as half a surrogate pair
        prompt.encode()
    ids = torch.from_numpy(tokenizer.encode(prompt)).long()[None]
    if not ids.numel():
        raise Act24Error("the prompt is empty; give it at least one token")
    generator = torch.Generator().manual_seed(seed)
    known = torch.from_numpy(tokenizer.known_ids(built.model.config.vocab_size))
    autocast = built.recipe is not None and built.recipe.train.dtype == "bfloat16_autocast"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        text = generate(built.model, ids, tokens, temperature, top_k, generator, known)
    return tokenizer.decode(text[0].tolist())
