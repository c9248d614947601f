"""The three commands of the notes on recovery after pruning, translated and run one after the other at toy
size: what each leaves is what the next one reads."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
import transformers

from act24.recipes.wanda_flags import translated
from act24.tools.run.build import load
from act24.tools.run.opening import open_any
from tests.recipes.test_wanda_flags import EVALUATE, PRUNE, TUNE
from tests.tools.tiny import TINY_SIZES

SIZES = {**TINY_SIZES, "num_key_value_heads": 4, "max_position_embeddings": 64}
#: What the translation of finetune_lm.py is cut down by.
TOY = ("train.steps=6", "train.total_batch_size=4", "data.max_length=16", "eval.tokens=200")


def commands(text: str, *replaced: tuple[str, str]) -> list[list[str]]:
    """The words behind `act24` of each line of a translation."""
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    lines = [line for line in translated(shlex.split(text)).splitlines() if line.startswith("act24 ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.slow
def test_what_each_command_leaves_the_next_one_reads(tiny_file, tmp_path, monkeypatch, act24) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        status, out, err = act24(*words)
        assert status == 0, err
        return out

    text = f"{tiny_file.parent}/train-*.txt"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, eos_token_id=0))
    model.save_pretrained("M")
    run("train", str(tiny_file), "--run-dir", "warm", "--set", "train.steps=5", "--set", "eval.every=0")
    tokenizer = load("warm").tokenizer
    assert tokenizer is not None
    Path("M/tokenizer.json").write_text(tokenizer.to_json())

    (prune,) = commands(f"{PRUNE} --save_model out/pruned_model")
    prune[prune.index("--data") + 1] = text
    prune[prune.index("--samples") + 1] = "4"
    run(*prune)
    pruned = transformers.AutoModelForCausalLM.from_pretrained("out/pruned_model")
    linears = [p for n, p in pruned.named_parameters() if p.ndim == 2 and ".layers." in n]
    assert sum(int((p == 0).sum()) for p in linears) / sum(p.numel() for p in linears) == pytest.approx(0.5)

    tune = TUNE.replace("out/llama2_7b/unstructured/wanda/pruned_model", "out/pruned_model")
    Path("THIS.toml").write_text(translated(shlex.split(tune)))
    files = (f"data.train_files=['{text}']", f"data.heldout_files=['{tiny_file.parent}/heldout.txt']")
    given = [word for line in ("data.source=files", *files, *TOY) for word in ("--set", line)]
    run("train", "THIS.toml", "--run-dir", "out/lora_weights", *given)
    run("export", "out/lora_weights", "out/adapter", "--as", "peft")

    merge, evaluate = commands(EVALUATE, ("out/lora_weights", "out/adapter"))
    run(*merge)
    ids = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        expected = load("out/lora_weights").model(ids)
        torch.testing.assert_close(open_any("merged").model(ids), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(pruned(ids).logits, expected, atol=1e-5)
    evaluate[evaluate.index("--seqlen") + 1] = "32"
    evaluate[evaluate.index("FILE")] = f"{tiny_file.parent}/heldout.txt"
    assert "perplexity" in run(*evaluate)
