"""The picture shows the values: by layer, over the whole run, in colours that can be told apart."""

import json
from dataclasses import asdict

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from act24.tools.watch import heatmap
from act24.tools.watch.heatmap import History, colours


@given(points=st.integers(1, 700), layers=st.integers(1, 3))
def test_columns_are_means_of_equal_runs_of_points_from_the_beginning(points, layers):
    values = numpy.random.default_rng(points).random((points, layers))
    history = History()
    completed = [step for step in range(points) if history.add(values[step], 10 * step)]
    whole = len(history.columns)
    assert whole <= heatmap.MAX_COLUMNS
    assert points - whole * history.stride < history.stride + (whole == heatmap.MAX_COLUMNS) * history.stride
    expected = values[: whole * history.stride].reshape(whole, history.stride, layers).mean(axis=1)
    numpy.testing.assert_allclose(history.columns, expected, rtol=1e-12)
    assert (history.first_step, history.last_step) == (0, 10 * completed[-1])


def test_a_long_run_is_drawn_a_logarithmic_number_of_times():
    history = History()
    drawn = sum(history.add([0.5], step) for step in range(100_000))
    assert drawn < heatmap.MAX_COLUMNS * (2 + numpy.log2(100_000 / heatmap.MAX_COLUMNS) / 2)


@given(cut=st.integers(0, 400))
def test_a_history_goes_on_after_json(cut):
    values = numpy.random.default_rng(0).random((400, 2)).tolist()
    straight, resumed = History(), History()
    for step, value in enumerate(values):
        straight.add(value, step)
        if step == cut:
            resumed = History(**json.loads(json.dumps(asdict(resumed))))
        resumed.add(value, step)
    assert resumed == straight


def test_each_cell_has_its_value_s_colour():
    values = numpy.random.default_rng(0).random((5, 7))  # 5 layers, 7 points
    history = History()
    for step, point in enumerate(values.T):
        history.add(point, step)
    picture = history.picture()
    assert picture.dtype == numpy.uint8
    assert picture.shape == (5 * heatmap.ROW + 2 * heatmap.LINE, heatmap.LEFT + heatmap.WIDTH, 3)
    wanted = colours((values - values.min()) / (values.max() - values.min()))
    for layer in range(5):
        for column in range(7):
            y = int((layer + 0.5) * heatmap.ROW)
            x = heatmap.LEFT + int((column + 0.5) * heatmap.WIDTH / 7)
            assert picture[y, x].tolist() == wanted[layer, column].tolist()
    first_row = picture[: heatmap.ROW, heatmap.LEFT :]
    assert (first_row == first_row[:1]).all()  # text does not reach into the cells


@pytest.mark.parametrize("value", [0.0, 0.7, 1.0])
def test_equal_values_make_a_picture_too(value):
    history = History()
    history.add([value] * 3, 0)
    cells = history.picture()[: 3 * heatmap.ROW, heatmap.LEFT :]
    assert (cells == cells[0, 0]).all()


def test_every_layer_has_a_number_beside_it():
    history = History()
    history.add(list(range(12)), 0)
    strip = history.picture()[:, : heatmap.LEFT]
    rows = [strip[layer * heatmap.ROW : (layer + 1) * heatmap.ROW] for layer in range(12)]
    assert all((row < 128).any() for row in rows)
    assert all((rows[i] != rows[j]).any() for i in range(12) for j in range(i))


@pytest.mark.parametrize("layers", [1, 16, 17, 32, 48, 80])
def test_many_layers_share_the_height_and_numbers_do_not_touch(layers):
    history = History()
    history.add([0.0] * layers, 0)
    picture = history.picture()
    row = heatmap.row_height(layers)
    assert picture.shape[0] == layers * row + 2 * heatmap.LINE
    assert picture.shape[0] <= max(heatmap.HEIGHT, layers * heatmap.LEAST_ROW) + 2 * heatmap.LINE
    inked = (picture[: layers * row, : heatmap.LEFT].min(axis=(1, 2)) < 128).astype(int)
    numbers = (numpy.diff(inked, prepend=0) == 1).sum()  # bands of ink with white between
    assert numbers == -(-layers // -(-heatmap.FONT // row))


def test_colours_get_brighter_all_along_the_scale():
    scale = colours(numpy.linspace(0, 1, 64)).astype(float)
    brightness = scale @ [0.2126, 0.7152, 0.0722]
    assert (numpy.diff(brightness) > 0).all()
    assert brightness[0] < 10
    assert brightness[-1] > 230
