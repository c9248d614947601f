"""The cache of tuned products: what goes in comes out, for this machine only, and damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from act24.passes import Activation24
from act24.sparse24.format.products import Measured, Product, Table
from act24.tools.run import tuning
from act24.tools.run.build import build
from act24.tools.run.processes import Processes
from act24.tools.run.tuning import TuningError, cache_path, read_table, tuned_table, write_table

TABLE: Table = (
    (Product("grad_x", 4096, 2048, 512), Measured(3, 0.25, 0.5)),
    (Product("y", 4096, 2048, 512), Measured(1, 0.125, 0.5)),
)


def test_comes_back_for_the_same_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "below" / "products.json"
    write_table(path, "H200, 800", TABLE)
    write_table(path, "H100, 800", TABLE[:1])
    assert read_table(path, "H200, 800") == TABLE
    assert read_table(path, "H100, 800") == TABLE[:1]
    assert read_table(path, "H200, 900") == ()
    assert [p.name for p in path.parent.iterdir()] == ["products.json"]


def test_new_figures_take_the_place_of_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "products.json"
    write_table(path, "gpu", TABLE)
    write_table(path, "gpu", ((TABLE[0][0], Measured(7, 0.1, 0.2)),))
    assert read_table(path, "gpu") == ((TABLE[0][0], Measured(7, 0.1, 0.2)), TABLE[1])


def test_only_what_is_missing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(product: Product, time: Callable, device: torch.device) -> tuple[Measured, dict[int, float]]:
        measured.append(product)
        return Measured(5, 1.0, 2.0), {}

    monkeypatch.setattr(tuning, "tuned", measure)
    monkeypatch.setattr(tuning, "machine", lambda _: "gpu")
    path, device = tmp_path / "products.json", torch.device("cpu")
    write_table(path, "gpu", TABLE)
    new = Product("y", 64, 64, 64)

    def time(call: Callable[[], Tensor]) -> float:
        return 1.0

    wanted = [new, TABLE[0][0], new]
    expected = ((new, Measured(5, 1.0, 2.0)), TABLE[0])
    assert tuned_table(wanted, device, time, path) == expected
    assert tuned_table(wanted, device, time, path) == expected
    assert measured == [new]


@pytest.mark.parametrize("content", ["{", "[]", '{"gpu": [{"kind": "y"}]}', '{"gpu": 3}'])
def test_damage_is_named_with_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "products.json"
    path.write_text(content)
    with pytest.raises(TuningError, match=r"products\.json.*delete it"):
        read_table(path, "gpu")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match="file"):
        write_table(tmp_path / "file" / "products.json", "gpu", TABLE)


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path() == tmp_path / "act24" / "products.json"


USED = [
    {"kind": kind, "tokens": 64, "features": 128, "width": 32, "algorithm": 5, "sparse": 0.25, "dense": 0.5}
    for kind in ("grad_x", "y")
]


def test_a_cache_that_cannot_be_kept_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "tuned", lambda *_: (Measured(5, 1.0, 2.0), {}))
    monkeypatch.setattr(tuning, "machine", lambda _: "gpu")

    def refuse(*_: object) -> None:
        raise TuningError("cannot write")

    monkeypatch.setattr(tuning, "write_table", refuse)
    wanted = [Product("y", 64, 64, 64)]
    table = tuned_table(wanted, torch.device("cpu"), lambda call: 1.0, tmp_path / "products.json")
    assert table == ((wanted[0], Measured(5, 1.0, 2.0)),)


def test_a_run_hands_its_products_to_the_pass(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tokens of its micro-batches and the model's own shapes; the recipe stays as it is."""
    measured = []

    def measure(product: Product, time: Callable, device: torch.device) -> tuple[Measured, dict[int, float]]:
        measured.append(product)
        return Measured(5, 0.25, 0.5), {}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "obstacle", lambda device: "")
    monkeypatch.setattr(tuning, "machine", lambda device: "played")
    monkeypatch.setattr(tuning, "tuned", measure)
    alone = Processes(0, 1, torch.device("cpu"))
    for dtype, expected in (("float32", 0), ("bfloat16_autocast", 2), ("bfloat16_autocast", 0)):
        measured.clear()
        recipe = tiny(f"train.dtype={dtype}", "passes.activation24.from_step=0")
        built = build(recipe, alone.device)
        tuning.tune_(built.pipeline, recipe, alone)
        assert [p.kind for p in measured] == ["grad_x", "y"][:expected]  # the second time from the cache
        assert all((p.tokens, p.features, p.width) == (64, 128, 32) for p in measured)
    code = next(m.code for m in built.pipeline.modules if "activation24(" in m.code)
    (tmp_path / "act24" / "products.json").unlink()
    began = {"machine": "played", "products": [p | {"algorithm": 1} for p in USED]}
    for saved, algorithm in ((began, 1), (began | {"machine": "other"}, 5)):
        again = build(recipe, alone.device)
        used = json.loads(json.dumps(tuning.tune_(again.pipeline, recipe, alone, saved)))
        assert used == {"machine": "played", "products": [p | {"algorithm": algorithm} for p in USED]}
    assert "(('grad_x', 64, 128, 32), (5, 0.25, 0.5)), (('y', 64, 128, 32), (5, 0.25, 0.5))" in code
    assert next(p for p in recipe.passes if isinstance(p, Activation24)).algorithms == ()
    built.model(torch.zeros(4, 16, dtype=torch.long))  # the code runs
