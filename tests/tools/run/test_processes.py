"""What a process takes of its machine, and that it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from act24.tools.run.processes import open_processes


@pytest.mark.parametrize(("given", "expected"), [(None, 1), ("3", 4)])
def test_a_gpu_run_takes_one_thread_unless_told(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: int
) -> None:
    """Told by the environment, which PyTorch has read at its start: nothing is changed then."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with open_processes() as processes:
            assert processes.device.type == "cuda"
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_process_that_has_left_its_group_ends(tmp_path: Path) -> None:
    """Where leaving only destroys the group, some 7 of the 120 abort or never end."""
    program = Path(__file__).with_name("leave_often.py")
    run = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0"] * 120, run.stderr
