"""What `act24 doctor` says on a machine without a GPU, and of one whose library is played."""

from __future__ import annotations

import pytest
import torch

from act24.sparse24.feed_forward import forms
from act24.tools.commands import doctor


def test_on_a_cpu_every_path_is_plain_pytorch_and_says_why() -> None:
    findings = {f.subject: f.finding for f in doctor.examine(torch.device("cpu"))}
    assert findings["PyTorch"] == torch.__version__
    assert findings["GPU"].startswith("none")
    paths = [finding for subject, finding in findings.items() if subject.startswith("llama-")]
    assert len(paths) == 15
    assert all("plain PyTorch" in path and "CUDA" in path for path in paths)


def test_text_has_a_line_for_every_finding() -> None:
    assert len(doctor.doctor().splitlines()) == len(doctor.examine())


def test_paths_of_a_capable_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide networks are packed, narrow ones have 2:4 inside their products, lone activations around none."""
    monkeypatch.setattr(forms, "obstacle", lambda _: "")
    findings = {f.subject: f.finding for f in doctor.examine(torch.device("cpu"))}
    assert findings["llama-1b, full rank, 2048×8192"].startswith("packed 2:4 products")
    assert findings["llama-7b, rank 1024, 1024×16512"].startswith("packed 2:4 products")
    assert findings["llama-350m, rank 256, 256×4096"].startswith("2:4 inside dense products")
    assert findings["llama-130m, LoST, F 3072"].startswith("2:4 by a kernel")
