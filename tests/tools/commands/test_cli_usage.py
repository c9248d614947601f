"""How commands are typed: their help, their options, and what a wrong one is told."""

import re
import subprocess
import sys

import pytest

from act24.tools.commands.cli import app


def commands(group, path=()):
    """Every command and group of commands, as it is typed."""
    yield path
    for command in group.registered_commands:
        yield (*path, command.name or command.callback.__name__)
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*path, inner.name))


@pytest.mark.parametrize("command", list(commands(app)), ids=" ".join)
def test_every_command_explains_itself(act24, command):
    status, out, errors = act24(*command, "--help")
    assert (status, errors) == (0, [])
    assert f"Usage: act24 {' '.join(command)}" in out
    assert act24(*command, "-h") == (status, out, errors)


def test_help_answers_before_torch_is_there():
    program = (
        "import sys; sys.argv = ['act24', '--help']\n"
        "from act24.tools.commands.cli import main\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'numpy', 'datasets', 'pydantic') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_no_option_is_taken_for_one_of_torchrun():
    """torchrun's parser reads all options, and refuses ours if they begin like several of its own."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    ours = re.findall(r"--[a-z][a-z-]+", subprocess.getoutput(f"{sys.executable} -m act24 train --help"))
    assert {"--set", "--run-dir", "--resume", "--dry-run"} <= set(ours)
    for option in set(ours) - {"--help"}:
        arguments = ["--nproc-per-node", "2", "-m", "act24", "train", "demo", option]
        assert parser.parse_args(arguments).training_script_args == ["train", "demo", option]


USAGE = {
    ("trian",): "No such command 'trian'. Did you mean 'train'?",
    ("train",): "Missing argument 'recipe'.",
    ("train", "demo", "--stps", "4"): "No such option: --stps",
    ("plan", "demo", "--set"): "Option '--set' requires an argument.",
    ("sample", "runs", "--tokens", "many"): "'--tokens'",
    ("sample", "runs", "--tokens", "0"): "'--tokens'",
    ("probe-decay", "demo", "--decay", "strong"): "'--decay'",
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.items(), ids=map(" ".join, USAGE))
def test_a_command_that_is_typed_wrongly(act24, arguments, message):
    status, out, errors = act24(*arguments)
    assert (status, out) == (2, "")
    assert message in "\n".join(errors)
