"""Two processes that are timed by turns, with parts that sleep."""

import os
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from act24.tools.bench import turns
from act24.tools.bench.beside_checkout import HERE, TURNS, Side, _commit, compare, measured

#: A side whose part prepares and times as often as its second argument says, and writes down when.
_TOY = """
import sys, time
sys.path.insert(0, sys.argv[1])
import turns
talk, number, log = turns.Talk(), int(sys.argv[2]), open(sys.argv[3], "w")

def busy(what, seconds):
    begun = time.monotonic()
    time.sleep(seconds)
    log.write(f"{what} {begun} {time.monotonic()}\\n")
    log.flush()
    return seconds

def part():
    print("what a benchmark prints is in nobody's way")
    rates = {}
    for index in range(number):
        busy("prepares", 0.01 * (index + number))
        rates[f"row {index}"] = 1 / talk.by_turns(lambda: busy("times", 0.01))
    return rates

turns.serve(talk, {"toy": part, "broken": lambda: 1 / 0})
"""


def _side(tmp_path, number):
    return Side(tmp_path, "-c", _TOY, str(HERE / "tools" / "bench"), str(number), str(tmp_path / f"{number}"))


def test_nothing_runs_while_one_side_is_timed(tmp_path):
    sides = [_side(tmp_path, number) for number in (2, 3)]
    here, there = measured(sides, "toy")
    for side in sides:
        side.close()
    assert list(here) == ["row 0", "row 1"]
    assert list(there) == ["row 0", "row 1", "row 2"]
    assert [len(rates) for rates in (*here.values(), *there.values())] == [TURNS] * 5
    spans = [
        (float(begun), float(ended), number, what)
        for number in (2, 3)
        for what, begun, ended in map(str.split, (tmp_path / f"{number}").read_text().splitlines())
    ]
    timed = [span for span in spans if span[3] == "times"]
    assert len(timed) == 5 * TURNS
    for begun, ended, number, _ in timed:
        assert not [s for s in spans if s[2] != number and s[0] < ended and s[1] > begun]
    first = [number for *_, number, _ in sorted(timed)[: 2 * TURNS]]
    assert first == [2, 3] * TURNS


def test_a_side_that_fails_says_how(tmp_path):
    side = _side(tmp_path, 1)
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        measured([side], "broken")
    side.close()


def test_benchmarks_compute_with_a_figure_of_each_turn():
    """As `bench pack` and `bench ffn` do: divided into bytes, printed, and handed on."""
    lent = iter((2.0, 4.0))
    talk: Any = SimpleNamespace(by_turns=lambda time: turns.Turns((time(), time())))
    module = SimpleNamespace(
        milliseconds=lambda call, budget: next(lent) if budget == turns.BUDGET else call()
    )

    def bench(shape):
        taken = module.milliseconds(lambda: 1.0, 300)
        assert f"{taken:.2f}" == "3.00"
        yield SimpleNamespace(name=f"bandwidth {shape}", unit="GB/s", ours=8e6 / taken / 1e6)
        yield SimpleNamespace(name="time", unit="ms", ours=taken)
        yield SimpleNamespace(name="memory", unit="bytes", ours=5)

    rates = turns._rows(module, talk, bench, "4×4")
    assert rates == {"bandwidth 4×4": (4.0, 2.0), "time": (500.0, 250.0)}
    (row,) = compare({"time": (500.0, 250.0), "more": (1.0,)}, {"time": (375.0, 300.0)})
    assert row == {"name": "time", "here": 375.0, "there": 337.5, "ratio": 375 / 337.5, "spread": 1.0}


def test_a_folder_inside_of_a_repository_is_not_of_its_commit(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True, env=environment)
    (tmp_path / "before").mkdir()
    assert _commit(tmp_path / "before") == "unknown"
    assert len(_commit(tmp_path)) >= 7
