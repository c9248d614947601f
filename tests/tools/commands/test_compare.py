"""`act24 compare` shows what event files hold and in what recipes differ."""

import io
import itertools
import os
import random

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from act24.recipes.load import dump_recipe
from act24.tools.watch import charts
from act24.tools.watch.tensorboard import RunLog


def a_run(folder, recipe, losses, rates, zeros=None, dropped=()):
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_recipe(recipe))
    log = RunLog(folder)
    for step, (loss, rate) in enumerate(zip(losses, rates, strict=True), 1):
        log.scalars({"loss/train": loss, "perf/tokens_per_s": rate}, step)
    if zeros is not None:
        log.layers("sparsity_relu/*", {0: zeros, 1: zeros + 0.1}, 1)
    for step, share in enumerate(dropped, 1):
        log.layers("sparsity_dropped_energy/*", {0: share, 1: share}, step)
    log.close()


def test_figures_are_those_in_the_files_and_keys_those_that_differ(tiny, tmp_path, act24):
    wide = 'passes=[{use="relu2_ffn"}, {use="cola", attn_rank=4, mlp_rank=8}]'
    narrow = wide.replace("mlp_rank=8", "mlp_rank=16")
    a_run(tmp_path / "a", tiny(wide), [5.0, 4.25], [10.0, 3000.0], zeros=0.5)
    a_run(tmp_path / "b", tiny(narrow, "optimizer.lr=0.5"), [5.0, 4.5, 4.125], [1, 2000.0, 2500.0])
    status, out, _ = act24("compare", tmp_path / "a", tmp_path / "b", "--markdown")
    assert status == 0
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    keys = ["passes.cola.mlp_rank", "optimizer.lr"]
    assert head == ["run", "step", "loss", "zeros after relu²", "tokens/s", *keys]
    assert set(rule) == {"---"}
    assert rows == [
        [str(tmp_path / "a"), "2", "4.2500", "55.0%", "1,505", "8", "0.01"],
        [str(tmp_path / "b"), "3", "4.1250", "–", "2,000", "16", "0.5"],
    ]
    status, out, _ = act24("compare", tmp_path / "a", tmp_path / "b")
    assert status == 0
    assert all(cell in out for row in rows for cell in row[1:])


def test_a_pass_that_only_some_have_is_one_column(tiny, tmp_path, act24):
    both = 'passes=[{use="relu2_ffn"}, {use="activation24", from_step=3}]'
    for name, passes in (("a", 'passes=[{use="relu2_ffn"}]'), ("b", both), ("c", both.replace("3", "4"))):
        a_run(tmp_path / name, tiny(passes), [5.0], [10.0])
    for runs, keys, last in (
        ("ab", ["passes.activation24"], ["yes"]),
        ("abc", ["passes.activation24", "passes.activation24.from_step"], ["yes", "4"]),
    ):
        _, out, _ = act24("compare", *(tmp_path / name for name in runs), "--markdown")
        head, _, first, *_, end = [
            [cell.strip() for cell in x.strip("|").split("|")] for x in out.splitlines()
        ]
        assert head == ["run", "step", "loss", "tokens/s", *keys]
        assert (first[-len(keys) :], end[-len(keys) :]) == (["–"] * len(keys), last)


def test_what_2_4_would_drop_is_no_figure_of_a_run_without_it(tiny, tmp_path, act24):
    """It is logged of dense activations too, and of 2:4 ones before they begin."""
    relu2, sparse = (f'passes=[{{use="relu2_ffn"}}{more}]' for more in ("", ', {use="activation24", %s}'))
    for name, passes in (("a", relu2), ("b", sparse % "from_step=1"), ("c", sparse % "from_step=2")):
        a_run(tmp_path / name, tiny(passes), [5.0, 4.0], [10.0, 10.0], dropped=[0.25, 0.125])
    _, out, _ = act24("compare", *(tmp_path / name for name in "abc"), "--markdown")
    head, _, *rows = [[cell.strip() for cell in x.strip("|").split("|")] for x in out.splitlines()]
    assert [row[head.index("energy 2:4 drops")] for row in rows] == ["–", "12.500%", "–"]
    _, out, _ = act24("compare", tmp_path / "a", tmp_path / "c", "--markdown")
    assert "energy 2:4 drops" not in out


def test_the_plot_has_each_run_at_the_height_of_its_values(tiny, tmp_path, act24):
    """Read back from the picture: rates of 100, 200 and 400 lie at distances of 1 : 2, higher is up."""
    for name, rate, lr in (("a", 100.0, 0.1), ("b", 200.0, 0.2), ("c", 400.0, 0.3)):
        a_run(tmp_path / name, tiny(f"optimizer.lr={lr}"), [3.0 + lr] * 3, [rate] * 3, zeros=lr)
    runs = [tmp_path / name for name in "abc"]
    status, out, _ = act24("compare", *runs, "--plot", tmp_path / "curves.png")
    assert (status, len(out.splitlines())) == (0, 4)
    picture = numpy.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)

    def height(part, colour):  # the picture has few colours; 60 is far less than these are apart
        return numpy.nonzero((abs(part - colour).sum(-1) < 60).any(1))[0].mean()

    panels = range(0, picture.shape[1], charts.WIDTH)
    assert len(panels) == 3  # loss, zeros, tokens/s; nothing was dropped by 2:4
    axes = [picture[: charts.HEIGHT, left + charts.LEFT : left + charts.WIDTH] for left in panels]
    heights = [[height(part, colour) for colour in charts.COLOURS[:3]] for part in axes]
    assert all(low > middle > high for low, middle, high in heights)
    low, middle, high = heights[2]
    assert (middle - high) / (low - middle) == pytest.approx(2, rel=0.03)
    legend = [height(picture[charts.HEIGHT :], colour) for colour in charts.COLOURS[:3]]
    assert legend == sorted(legend)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("curves.jpg", None, "--plot writes a .png, not"),
        ("mine.png", b"my notes", "exists already and is no picture: give --plot another name"),
        ("nowhere/curves.png", None, "No such file or directory"),
    ],
)
def test_what_is_no_plot_s_file_is_left_alone(tiny, tmp_path, act24, name, content, message):
    a_run(tmp_path / "a", tiny(), [3.0], [1.0])
    if content:
        (tmp_path / name).write_bytes(content)
    status, _, lines = act24("compare", tmp_path / "a", "--plot", tmp_path / name)
    assert status == 2
    assert message in lines[-1]
    assert not content or (tmp_path / name).read_bytes() == content


def test_nothing_to_plot_and_too_many_runs_are_said(tiny, tmp_path, act24):
    a_run(tmp_path / "a", tiny(), [], [])
    status, _, lines = act24("compare", tmp_path / "a", "--plot", tmp_path / "p.png")
    assert (status, lines[-1].endswith("has logged anything yet: there is nothing to plot")) == (2, True)
    status, _, lines = act24("compare", *[tmp_path / "a"] * 11, "--plot", tmp_path / "p.png")
    assert (status, "a plot tells 10 runs apart, not 11: leave some out" in lines[-1]) == (2, True)


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low, width):
    found = charts.ticks(low, low + width)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)
    steps = {f"{b - a:.3e}" for a, b in itertools.pairwise(found)}
    assert len(steps) <= 1 or width < 1e-6 * abs(low)
    assert all(step[0] in "125" for step in steps)


def spoilt(path, how):
    content = path.read_bytes()
    if how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        middle = content.index(b"loss/train", len(content) // 2)
        changed = {
            "garbage": random.Random(0).randbytes(len(content)),
            "a changed byte": content[:middle] + b"L" + content[middle + 1 :],
            "cut off": content[:-3],
            "no event in a whole record": whole_record(b"\xff" * 20),
        }
        path.write_bytes(changed[how])


def whole_record(content):
    file = io.BytesIO()
    RecordWriter(file).write(content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("garbage", 0, "is damaged: what it logged from there on is left out"),
        ("a changed byte", 0, "is damaged: what it logged from there on is left out"),
        ("no event in a whole record", 2, "does not hold what act24 writes there"),
        ("a pipe", 2, "is no file, and is called as one of TensorBoard's"),
        ("a folder", 2, "is no file, and is called as one of TensorBoard's"),
        ("cut off", 0, ""),  # as a kill does, or what is still being written
    ],
)
def test_an_event_file_that_cannot_be_read_is_named(tiny, tmp_path, act24, caplog, how, status, said):
    a_run(tmp_path / "a", tiny(), [5.0, 4.0, 3.0, 2.0], [1.0] * 4)
    (events,) = (tmp_path / "a").glob("events*")
    spoilt(events, how)
    found, _, errors = act24("compare", tmp_path / "a")
    lines = [*errors, *(record.message for record in caplog.records)]
    assert found == status
    assert len(lines) == bool(said)
    name = f"{tmp_path}/a/events" if how == "no event in a whole record" else str(events)
    assert all(name in line and said in line for line in lines)


def test_a_folder_that_is_no_run_is_named(tmp_path, act24):
    status, _, (line,) = act24("compare", tmp_path)
    assert status == 2
    assert line.endswith(f"{tmp_path} is no run: there is no recipe.toml in it")
