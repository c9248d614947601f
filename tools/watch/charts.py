"""Line charts beside each other in one picture, drawn with Pillow: what runs are compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

# Pixels of the finished picture: a panel with its axes, the room around the axes, a line of text.
WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 28, 36
LINE, FONT = 18, 13
#: Everything is drawn so many times larger, and made smaller in the end: Pillow's lines have hard edges.
SCALE = 3

#: matplotlib's `tab10` (CC0): ten colours that can be told apart.
COLOURS = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (127, 127, 127),
    (188, 189, 34),
    (23, 190, 207),
)
_GRID, _FRAME = (225, 225, 225), (120, 120, 120)


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in the order of x, of the run with that index; `dots` marks each of them."""

    run: int
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        top: where the y axis ends; what is above runs out of the picture. None: at the largest value.
    """

    title: str
    curves: Sequence[Curve]
    top: float | None = None

    def limits(self) -> tuple[float, float, float, float]:
        """Smallest and largest x, smallest and largest y that are shown; never equal."""
        points = [point for curve in self.curves for point in curve.points]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        high = max(ys) if self.top is None else min(max(ys), self.top)
        return (*_apart(min(xs), max(xs)), *_apart(min(ys), max(high, min(ys))))


def chart(panels: Sequence[Panel], legend: Sequence[str]) -> Image.Image:
    """Panels side by side, and under them a line (or more) for each run, in its colour.

    Curves have at least one point, and all values are finite.
    """
    width = WIDTH * len(panels)
    small = ImageFont.load_default(FONT)
    lines = [
        (run, n == 0, line)
        for run, text in enumerate(legend)
        for n, line in enumerate(_wrapped(text, width - LEFT - RIGHT, small))
    ]
    size = (width, HEIGHT + LINE * len(lines) + LINE // 2)
    canvas = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    for index, panel in enumerate(panels):
        canvas.paste(_drawn(panel), (index * WIDTH * SCALE, 0))
    draw = ImageDraw.Draw(canvas)
    draw.font = ImageFont.load_default(FONT * SCALE)
    for row, (run, first, line) in enumerate(lines):
        y = (HEIGHT + row * LINE) * SCALE
        if first:
            middle = y + LINE * SCALE // 2
            draw.line(((LEFT - 24) * SCALE, middle, (LEFT - 6) * SCALE, middle), COLOURS[run], 2 * SCALE)
        draw.text((LEFT * SCALE, y), line, fill="black")
    return canvas.resize(size, Image.Resampling.LANCZOS)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, at most so many: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for m in (1, 2, 5, 10) if (step := m * power) >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _drawn(panel: Panel) -> Image.Image:
    x_low, x_high, y_low, y_high = panel.limits()
    inner = ((WIDTH - LEFT - RIGHT) * SCALE, (HEIGHT - TOP - BOTTOM) * SCALE)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return across * inner[0], (1 - up) * inner[1]

    axes = Image.new("RGB", inner, "white")
    draw = ImageDraw.Draw(axes)
    x_ticks, y_ticks = ticks(x_low, x_high), ticks(y_low, y_high)
    for x in x_ticks:
        draw.line((place(x, y_low), place(x, y_high)), _GRID, SCALE)
    for y in y_ticks:
        draw.line((place(x_low, y), place(x_high, y)), _GRID, SCALE)
    for curve in panel.curves:
        places = [place(x, y) for x, y in curve.points]
        draw.line(places, COLOURS[curve.run], SCALE if curve.dots else 2 * SCALE, joint="curve")
        for x, y in places if curve.dots or len(places) == 1 else ():
            radius = 3 * SCALE
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), COLOURS[curve.run])
    draw.rectangle((0, 0, inner[0] - 1, inner[1] - 1), outline=_FRAME, width=SCALE)

    whole = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    whole.paste(axes, (LEFT * SCALE, TOP * SCALE))
    draw = ImageDraw.Draw(whole)
    draw.font = ImageFont.load_default(FONT * SCALE)
    draw.text((LEFT * SCALE, 6 * SCALE), panel.title, fill="black")
    for x in x_ticks:
        at = LEFT * SCALE + place(x, y_low)[0]
        draw.text((at, (HEIGHT - BOTTOM + 4) * SCALE), f"{x:,.10g}", fill="black", anchor="ma")
    for y in y_ticks:
        at = TOP * SCALE + place(x_low, y)[1]
        draw.text(((LEFT - 6) * SCALE, at), f"{y:,.10g}", fill="black", anchor="rm")
    return whole


def _apart(low: float, high: float) -> tuple[float, float]:
    """The two with a twentieth of their distance on either side; around one value, a tenth of it, or 1."""
    margin = (high - low) / 20 or abs(low) / 10 or 1.0
    return low - margin, high + margin


def _wrapped(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
