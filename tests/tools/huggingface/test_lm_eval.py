"""lm-eval on a folder of type "act24", on tasks defined in local files: the figures of our own model."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import act24
from act24.passes import Activation24, Cola, Relu2FFN
from act24.tools.huggingface.export import export_run
from act24.tools.run.train import train

pytest.importorskip("lm_eval")

PASSES = (Relu2FFN(), Cola(attn_rank=8, mlp_rank=8, bottleneck="relu2"), Activation24(method="soft_dynamic"))
PAGE = Path(__file__).parents[3] / "docs" / "export.md"
TEXTS = ("two of four are kept", "low rank and sparse tokens", "a graph of passes")
QUESTIONS = [("two of", [" four", " zebras"]), ("low", [" rank", " xylophones"]), ("a", [" graph", " of"])]
ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def figures(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder, and what lm_eval says of it, as the page has the command."""
    import tiny as tiny_recipe

    folder = tmp_path_factory.mktemp("lm_eval")
    recipe = tiny_recipe.load_tiny(tiny_file, "train.steps=30", "eval.every=0", "optimizer.lr=1e-2")
    assert train(recipe.model_copy(update={"passes": PASSES}), folder / "run").finished
    export_run(folder / "run", folder / "model", "act24")
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = {
        "text": [{"text": text} for text in TEXTS],
        "choice": [{"question": q, "choices": c, "answer": 0} for q, c in QUESTIONS],
    }
    for (name, content), yaml in zip(rows.items(), (ROLLING, CHOICE), strict=True):
        lines = tasks / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in content))
        (tasks / f"local_{name}.yaml").write_text(yaml % lines)
    lines = re.findall(r"^    lm_eval (.*=exported-act24,.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    words = lines[0].replace("=exported-act24,", f"={folder / 'model'},dtype=float32,").split()
    words[words.index("--tasks") + 1] = "local_text,local_choice"
    command = [sys.executable, "-m", "lm_eval", *words, "--include_path", str(tasks), "--device", "cpu"]
    command += ["--batch_size", "2", "--output_path", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (folder / "out").rglob("results_*.json")
    return folder, json.loads(written.read_text())["results"]


def log_likelihoods(folder: Path, text: str, prefix: str = "") -> Tensor:
    """Of the tokens of a text behind a prefix, by our own model; what begins with nothing stands behind the
    end-of-text token."""
    built = act24.load(folder / "run")
    assert built.tokenizer is not None
    ids = built.tokenizer.encode(prefix + text).tolist()
    before = len(built.tokenizer.encode(prefix)) if prefix else 0
    if not before:
        ids, before = [built.tokenizer.eos_id, *ids], 1
    with torch.no_grad():
        logits = built.model(torch.tensor([ids])).log_softmax(-1)[0]
    return torch.stack([logits[i - 1, ids[i]] for i in range(before, len(ids))])


def test_bits_per_byte(figures: tuple[Path, dict[str, Any]]) -> None:
    folder, results = figures
    total = -sum(float(log_likelihoods(folder, text).sum()) for text in TEXTS)
    expected = total / sum(len(text.encode()) for text in TEXTS) / math.log(2)
    assert results["local_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_accuracy(figures: tuple[Path, dict[str, Any]]) -> None:
    folder, results = figures
    right = 0
    for question, choices in QUESTIONS:
        first, second = (float(log_likelihoods(folder, choice, question).sum()) for choice in choices)
        right += first > second
    assert results["local_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert right
