"""The cases of `check_graphs` and `graph_memory` need a GPU to run, but that they load and run through is
checked here."""

import json

import pytest
import torch

from act24.recipes.load import load_recipe
from act24.tools.bench import graph_memory
from act24.tools.bench.check_graphs import CASES
from act24.tools.run.build import build


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_of_a_case_loads(name):
    recipe, overrides, _ = CASES[name]
    assert load_recipe(recipe, overrides).passes or name.startswith("dense")


def test_memory_is_measured_behind_every_update(tiny, monkeypatch, capsys):
    """On a machine that is played: the script runs through, and every update says what it was."""
    sizes = ("memory_allocated", "memory_reserved", "max_memory_reserved")
    calls = {name: lambda *_: 2**30 for name in sizes}
    calls |= {name: lambda *_: None for name in ("synchronize", "reset_peak_memory_stats", "empty_cache")}
    segments = [
        {"address": at, "total_size": 2**29, "segment_pool_id": pool}
        for at, pool in enumerate([(0, 0), (0, 1), (0, 1)])
    ]
    calls |= {"memory_snapshot": lambda: segments, "get_device_name": lambda: "a GPU"}
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda, name, call)
    monkeypatch.setattr(graph_memory, "needed_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(graph_memory, "without_start", build)
    monkeypatch.setattr(graph_memory, "load_recipe", lambda _: tiny("passes=[]"))
    monkeypatch.setattr(graph_memory, "_ROWS", 2)
    monkeypatch.setattr(graph_memory, "PADDED", (False, True))
    graph_memory.main("one")
    updates = json.loads(capsys.readouterr().out)["recipes"]["one"]
    assert tuple(update["padded"] for update in updates) == graph_memory.PADDED
    assert {update["in_pools_of_graphs_gib"] for update in updates} == {1.0}
    assert {update["graphs"] for update in updates} == {0}
