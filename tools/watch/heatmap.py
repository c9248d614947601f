"""A layer × step picture of a whole run: which layers became sparse, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
from PIL import Image, ImageDraw, ImageFont

# Pixels: the picture, layer numbers, a line of text and its letters. TensorBoard's cards show a picture about
# 360 wide, and drop whole rows and columns of pixels to get there: letters are large enough to bear it.
WIDTH, LEFT, LINE, FONT = 660, 60, 30, 22
ROW, LEAST_ROW, HEIGHT = 28, 8, 448  # of one layer, and of all, which many layers share
MAX_COLUMNS = 128

# Anchors of matplotlib's inferno (CC0), of high contrast because TensorBoard's page dulls colours.
ANCHORS = [
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
]


@dataclass
class History:
    """One value a layer and point of time, over a whole run, in at most `MAX_COLUMNS` columns.

    When the columns are full, neighbours are averaged: the picture always reaches back to the beginning, and
    the number of times it has to be drawn grows with the logarithm of the run's length. All fields are JSON.
    """

    columns: list[list[float]] = field(default_factory=list)  # one value a layer, the mean of `stride` points
    stride: int = 1
    pending: list[list[float]] = field(default_factory=list)  # points of the column that is not full yet
    first_step: int = 0
    last_step: int = 0  # of the last full column
    layers: list[int] = field(default_factory=list)  # of the model, by row; empty: 0, 1, 2, …

    def __post_init__(self) -> None:
        counts = (self.stride, self.first_step, self.last_step)
        points = [*self.columns, *self.pending]
        if not all(type(count) is int for count in counts) or self.stride < 1:
            raise ValueError(f"stride and steps of a heatmap are integers, not {counts}")
        if len({len(point) for point in points}) > 1 or len(self.columns) > MAX_COLUMNS:
            raise ValueError("the points of a heatmap are of different lengths, or too many")
        if self.layers and points and len(self.layers) != len(points[0]):
            raise ValueError("a heatmap has as many layers as values in a point")
        if not all(isinstance(value, float | int) for point in points for value in point):
            raise TypeError("the points of a heatmap are lists of numbers")

    def add(self, values: Sequence[float], step: int) -> bool:
        """Adds a point; True if that completed a column, so that the picture has changed."""
        if not self.columns and not self.pending:
            self.first_step = step
        self.pending.append(list(values))
        if len(self.pending) < self.stride:
            return False
        if len(self.columns) == MAX_COLUMNS:
            self.columns = [_mean(self.columns[i : i + 2]) for i in range(0, MAX_COLUMNS, 2)]
            self.stride *= 2  # so the pending column is now half full
            return False
        self.columns.append(_mean(self.pending))
        self.pending = []
        self.last_step = step
        return True

    @property
    def varies(self) -> bool:
        """Whether there is anything to see: not one value everywhere."""
        return len({value for column in self.columns for value in column}) > 1

    def picture(self) -> numpy.ndarray:
        """The history as uint8 [height, width, 3]: a row a layer, layer 0 at the top, time to the right.

        Colours span the smallest to the largest value shown; the scale is printed under the picture. Where
        rows are lower than a line of text, not each has its number.
        """
        values = numpy.array(self.columns).T
        low, high = values.min(), values.max()
        layers = len(values)
        row = row_height(layers)
        cells = Image.fromarray(colours((values - low) / (high - low) if high > low else values * 0))
        canvas = Image.new("RGB", (LEFT + WIDTH, layers * row + 2 * LINE), "white")
        canvas.paste(cells.resize((WIDTH, layers * row), Image.Resampling.NEAREST), (LEFT, 0))
        scale = Image.fromarray(colours(numpy.linspace(0, 1, WIDTH // 4)[None, :]))
        draw = ImageDraw.Draw(canvas)
        draw.font = ImageFont.load_default(FONT)
        for layer in range(0, layers, -(-FONT // row)):
            name = str(self.layers[layer] if self.layers else layer)
            draw.text((LEFT - 8, layer * row), name, fill="black", anchor="ra")
        below = layers * row
        draw.text((LEFT, below), f"step {self.first_step}", fill="black")
        draw.text((LEFT + WIDTH, below), f"step {self.last_step}", fill="black", anchor="ra")
        middle = LEFT + (WIDTH - scale.width) // 2
        canvas.paste(scale.resize((scale.width, LINE - 8)), (middle, below + LINE + 4))
        draw.text((middle - 8, below + LINE), f"{low:.4g}", fill="black", anchor="ra")
        draw.text((middle + scale.width + 8, below + LINE), f"{high:.4g}", fill="black")
        return numpy.asarray(canvas)


def row_height(layers: int) -> int:
    """Pixels of each of so many layers."""
    return max(LEAST_ROW, min(ROW, HEIGHT // layers))


def colours(fractions: numpy.ndarray) -> numpy.ndarray:
    """Colours, uint8 [..., 3], of fractions [...] from 0 (dark) to 1 (bright)."""
    anchors = numpy.array(ANCHORS)
    positions = numpy.linspace(0, 1, len(anchors))
    channels = [numpy.interp(fractions, positions, channel) for channel in anchors.T]
    return numpy.stack(channels, axis=-1).round().astype(numpy.uint8)


def _mean(points: list[list[float]]) -> list[float]:
    return numpy.mean(points, axis=0).tolist()
