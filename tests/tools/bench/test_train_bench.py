"""What `bench train` times is the training loop, with the batch that it says."""

import pytest

from act24.errors import Act24Error
from act24.passes import Activation24
from act24.tools.bench import train as bench
from act24.tools.data import documents
from act24.tools.data.shards import read_index
from act24.tools.run.processes import Processes


@pytest.fixture(scope="module")
def shards(tmp_path_factory, smaller_modules):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return bench._shards(tmp_path_factory.mktemp("bench"), 300, 3000)


def test_a_recipe_keeps_its_batch_and_is_sparse_from_the_start(tiny, shards):
    recipe = bench.prepared(tiny("train.total_batch_size=64", "log.every=10"), 8, 6, shards)
    assert (recipe.train.batch_size, recipe.train.total_batch_size) == (8, 64)
    assert recipe.log.every == 3
    assert [p.from_step for p in recipe.passes if isinstance(p, Activation24)] == [0]
    assert bench.prepared(tiny("train.total_batch_size=64"), 24, 6, shards).train.total_batch_size == 72
    assert bench.prepared(tiny("train.total_batch_size=64"), 200, 6, shards).train.total_batch_size == 200


def test_the_loop_is_timed(tiny, shards, cpu):
    recipe = tiny("train.total_batch_size=8", "model.vocab_size=300")
    index = read_index(shards)
    assert index.splits["train"].tokens >= 3000 > bench._tokens(recipe, 4, 4)
    timing = bench._time_recipe("tiny", recipe, 4, 4, shards, cpu)
    assert (timing.name, timing.rows, timing.micro_batches, timing.tokens) == ("tiny", 4, 2, 8 * 16)
    assert timing.rate > 0
    assert timing.statistics
    assert not timing.captured
    others = bench._together([timing, bench.replace(timing, tokens_per_second=(timing.rate + 2,))])
    assert others.rate == pytest.approx(timing.rate + 1)


@pytest.fixture
def cpu():
    import torch

    return Processes(0, 1, torch.device("cpu"))


def test_the_same_without_24_stands_before_each(tiny):
    recipes = {"sparse": tiny(), "dense": tiny("passes=[]")}
    sides = bench.with_dense_sides(recipes)
    assert list(sides) == ["sparse without 2:4", "sparse", "dense"]
    assert [[p.name for p in side.passes] for side in sides.values()] == [
        ["relu2_ffn"],
        ["relu2_ffn", "activation24"],
        [],
    ]


def test_without_a_gpu_it_says_so(tiny):
    with pytest.raises(Act24Error, match="there is none here"):
        bench.bench_train({"tiny": tiny()}, [4])


@pytest.mark.parametrize("rows", ["64,x", "", "0"])
def test_rows_that_are_none(act24, rows):
    status, _, errors = act24("bench", "train", "c4/130m-dense", "--rows", rows)
    assert status == 2
    assert "--rows" in errors[0]


def test_text_lasts_a_turn_however_long_it_is(tiny, tmp_path, monkeypatch):
    """Of two short documents, copied as often as it takes: no epoch ends within."""
    for number in range(8):
        (tmp_path / f"{number}.py").write_text(f"a document, {number}\n" * 40)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(documents, "builtin_files", lambda: sorted(tmp_path.glob("*.py")))
    wanted = bench._tokens(tiny("train.total_batch_size=32", "log.every=10"), 8, 25)
    assert wanted == (10 + 30 + 1) * 32 * 17
    (tmp_path / "out").mkdir()
    index = read_index(bench._shards(tmp_path / "out", 300, wanted))
    assert index.splits["train"].tokens >= wanted
