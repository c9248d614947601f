"""README and the pages of docs/: their commands and code blocks run as they stand there.

A page is one session in an empty folder: its `sh` blocks are run by bash, its `python` blocks in one
namespace, in the order of the page. A line that ends in `# fails: TEXT` has to end with status 2 and that
text. Indented blocks are for what cannot run here (installation, several machines, other people's programs);
their `act24` commands are parsed all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import act24
from act24.recipes.load import parse_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("own-text", "trainer", "prune-recover", "export", "many-gpus", "write-a-pass", "trouble")
#: Those that take a while: each of their commands is a process of its own.
RUN = ("own-text", "prune-recover", "export", "many-gpus", "trouble")
TEXTS = (
    "README.md",
    "README.zh.md",
    *(f"docs/{page}.md" for page in (*PAGES, "own-training-loop", "serving")),
)
CHINESE = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.zh.md")))
#: What a page's first commands need of a machine, and what they say where it is missing.
NEEDS = {
    r"act24 bench ": "GPU",
    r"act24 train c4/": "HF_ENDPOINT|network|offline",
}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """Every act24 command of a page, fenced or indented, as arguments."""
    fenced = [line for language, block in blocks(text) if language == "sh" for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    lines = fenced + [line[4:] for line in prose.splitlines() if line.startswith("    ")]
    found = []
    for line in lines:
        if match := re.match(r"(?:torchrun .*?-m )?act24 (?!run_c4)(.*)", line):
            found.append(shlex.split(match[1], comments=True))
    return found


@pytest.fixture
def session(tmp_path, monkeypatch):
    """An empty folder, `act24` and `torchrun` of this checkout, no network; runs one block of bash."""
    shims = tmp_path / "bin"
    shims.mkdir()
    for name, module in (("act24", "act24"), ("torchrun", "torch.distributed.run"), ("python", None)):
        program = shlex.quote(sys.executable) + (f" -m {module}" if module else "")
        (shims / name).write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        (shims / name).chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    environment = os.environ | {
        "PATH": f"{shims}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    monkeypatch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])

    def run(block: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-euo", "pipefail", "-c", block]
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=3600)

    return run


def expected_failure(line: str) -> str | None:
    """What a line has to say when it fails, as a regular expression; None for one that works."""
    if match := re.search(r"# fails: (.*)", line):
        return re.escape(match[1])
    return next((text for command, text in NEEDS.items() if re.match(command, line)), None)


def run_block(session, block: str) -> None:
    lines = block.splitlines()
    if not any(map(expected_failure, lines)):
        done = session(block)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return
    for line in lines:
        done, wanted = session(line), expected_failure(line)
        assert done.returncode == (2 if wanted else 0), f"{line}\n{done.stdout}\n{done.stderr}"
        assert re.search(wanted or "", done.stdout + done.stderr), f"{line}\n{done.stderr}"


def run_page(session, path: str) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for language, block in blocks(read(path)):
        if language == "sh":
            run_block(session, block)
        elif language == "python":
            exec(compile(block, path, "exec", dont_inherit=True), names)


@pytest.fixture
def tables_restored(monkeypatch):
    """Records that a page adds are gone afterwards."""
    from act24.optim import OPTIMIZERS
    from act24.passes import REGISTRY
    from act24.schedules import SCHEDULES

    for table in (OPTIMIZERS, REGISTRY, SCHEDULES):
        monkeypatch.setattr(table, "_records", dict(table))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the pages' failures are those of a CPU")
@pytest.mark.parametrize("path", ["README.md", *(f"docs/{page}.md" for page in RUN)])
def test_a_page_runs_from_top_to_bottom(path, session):
    run_page(session, path)


def test_the_page_on_passes_runs(session, tables_restored):
    run_page(session, "docs/write-a-pass.md")


def test_the_page_on_the_trainer_runs(session):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    run_page(session, "docs/trainer.md")
    opened = act24.load("trained")
    assert [p.name for p in opened.pipeline.passes][:2] == ["relu2_ffn", "activation24"]


def test_the_code_of_the_readme_runs(session):
    pytest.importorskip("transformers")
    code = [block for language, block in blocks(read("README.md")) if language == "python"]
    assert code
    for block in code:
        exec(block, {"__name__": "page"})


@pytest.mark.parametrize("path", TEXTS)
def test_every_command_of_a_page_is_one(path):
    """Each parses: the command is there, and so is every option. Nothing runs."""
    from act24.tools.commands.cli import app

    root = typer.main.get_command(app)
    for arguments in commands(read(path)):
        command, rest = root, list(arguments)
        while hasattr(command, "commands") and not rest[0].startswith("-"):
            command = command.commands[rest.pop(0)]
        with contextlib.suppress(typer.Exit):
            command.make_context("act24", rest)


@pytest.mark.parametrize("path", TEXTS)
def test_every_recipe_of_a_page_is_one(path):
    for language, block in blocks(read(path)):
        if language == "toml":
            assert parse_recipe(block, path).passes


@pytest.mark.parametrize("path", [*TEXTS, *CHINESE, "CONTRIBUTING.md", "ARCHITECTURE.md"])
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", read(path)):
        assert ((ROOT / path).parent / target).exists(), target


def test_figures_of_the_first_table_are_those_that_were_measured():
    runs = json.loads(read("docs/results/training-speed.json"))["runs"]
    small, large = (
        next(run for run in reversed(runs) if text in run["command"])
        for text in ("130m-relu2-act24 --rows 64", "c4/1b-dense c4/1b-relu2-act24 --rows 32")
    )
    rates = {side["name"]: side["rate"] for run in (small, large) for side in run["sides"]}
    expected = [f"{rate:,.0f}" for rate in rates.values()]
    for one, other in (
        ("c4/130m-relu2-act24", "transformers"),
        ("c4/130m-relu2-act24", "c4/130m-dense"),
        ("c4/1b-relu2-act24", "c4/1b-dense"),
    ):
        expected.append(f"{rates[one] / rates[other]:.2f} ×")
    rows = json.loads(read("docs/results/kernels.json"))
    for name in (
        "step, 7b width relu2, 2:4 / 7b width dense",
        "step, 1b cola-relu2, 2:4 / 1b dense",
    ):
        time, memory = (row for row in rows if row["name"] == name and not row["superseded"])
        assert (time["unit"], memory["unit"]) == ("ms", "bytes")
        expected += [f"{row[side]:.1f} ms" for row in (time,) for side in ("ours", "other")]
        expected += [f"{memory[side] / 1e9:.1f} GB" for side in ("ours", "other")]
        expected.append(f"{time['ratio']:.2f} ×")
    name = "step, 7b, bfloat16, 8 rows, act24 relu², 2:4, fp8 with head"
    beside = "transformers, torchao tensorwise"
    *_, peer = (row for row in rows if (row["name"], row["note"]) == (name, beside))
    expected += [f"{peer['ours']:.1f} ms", f"{peer['other']:.1f} ms", f"{peer['ratio']:.2f} ×"]
    runs = json.loads(read("docs/results/activation24.json"))
    losses = {(run["name"], run["seed"], run["steps"]): run["heldout_loss"] for run in runs}
    expected += [f"{losses[name, 0, 3051]:.4f}" for name in ("dense relu2", "dense SwiGLU", "full recipe")]
    table = read("README.md").partition("**What one gains**")[2].partition("**On which hardware**")[0]
    assert [figure for figure in expected if figure not in table] == []


def test_the_folders_that_load_takes_are_those_of_the_readme():
    from act24.tools.huggingface.config import _ARCHITECTURES

    (taken,) = re.findall(r"act24\.load\(path\).*a folder of (.*), or of run_c4", read("README.md"))
    assert {kind.lower() for kind in re.split(", | or ", taken)} == {*_ARCHITECTURES}


def test_the_changelog_has_the_version():
    import tomllib

    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert read("CHANGELOG.md").partition("## ")[2].split()[0] == version
