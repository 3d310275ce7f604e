"""Curves, drawn as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .axes import Axis
from .markup import Markup, tag

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 10, 44
COLOURS: Final = 8  # as many as page.css has, and as many dashes
DASHES: Final = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 4", "6 2 1 2 1 2")


@dataclass(frozen=True)
class Curve:
    """Values along x; each entry of `band` is x, then the low and the high value."""

    number: int  # of the series: its colour and dash
    label: str
    points: Sequence[tuple[float, float]]
    titles: Sequence[str]  # of the points
    band: Sequence[tuple[float, float, float]] = ()
    faint: bool = False  # for values that are not measured


def plot(label: str, x: Axis, y: Axis, curves: Sequence[Curve]) -> Markup:
    """Return a plot of some curves; `label` describes it in words."""
    return tag(
        "svg",
        *_grid(x, y),
        *(_band(x, y, curve) for curve in curves if any(low < high for _, low, high in curve.band)),
        *(_line(x, y, curve) for curve in curves),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
        class_="plot",
    )


def swatch(number: int) -> Markup:
    """Return a sample of a series' line."""
    line = tag("path", d="M1 6H31", class_=f"line {colour(number)}", stroke_dasharray=dash(number))
    return tag("svg", line, viewBox="0 0 32 12", class_="swatch", aria_hidden="true")


def colour(number: int) -> str:
    """Return the CSS class of a series' or cluster's colour."""
    return f"c{number % COLOURS}"


def dash(number: int) -> str | None:
    """Return the dash pattern of a series' line, which identifies it without colours."""
    return DASHES[number % COLOURS] or None


def _across(x: Axis, value: float) -> float:
    return round(LEFT + x.place(value) * (WIDTH - LEFT - RIGHT), 2)


def _up(y: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - y.place(value) * (HEIGHT - TOP - BOTTOM), 2)


def _grid(x: Axis, y: Axis) -> list[Markup]:
    """Return the lines, ticks and names of the axes."""
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in y.ticks():
        at = _up(y, value)
        parts += [tag("path", d=f"M{LEFT} {at}H{right}", class_="grid")]
        parts += [tag("text", y.written(value), x=LEFT - 7, y=at + 4, text_anchor="end")]
    for value in x.ticks():
        at = _across(x, value)
        parts += [tag("path", d=f"M{at} {floor}v5", class_="axis")]
        parts += [tag("text", x.written(value), x=at, y=floor + 19, text_anchor="middle")]
    parts += [tag("path", d=f"M{LEFT} {floor}H{right}", class_="axis")]
    parts += [tag("text", x.label, x=(LEFT + right) / 2, y=HEIGHT - 6, text_anchor="middle", class_="label")]
    return parts


def _band(x: Axis, y: Axis, curve: Curve) -> Markup:
    there = [f"{_across(x, at)} {_up(y, high)}" for at, _, high in curve.band]
    back = [f"{_across(x, at)} {_up(y, low)}" for at, low, _ in reversed(curve.band)]
    kind = f"band {colour(curve.number)}"
    return tag("path", d=f"M{'L'.join([*there, *back])}Z", class_=kind, data_series=curve.number)


def _line(x: Axis, y: Axis, curve: Curve) -> Markup:
    """Return a curve, with a title at each point."""
    kind = colour(curve.number) + (" faint" if curve.faint else "")
    places = [(_across(x, at), _up(y, value)) for at, value in curve.points]
    path = "L".join(f"{across} {up}" for across, up in places)
    radius = 3 if len(places) <= 40 else 2
    dots = [
        tag("circle", tag("title", title), cx=across, cy=up, r=radius, class_="dot")
        for (across, up), title in zip(places, curve.titles, strict=True)
    ]
    line = tag("path", d=f"M{path}", class_="line", stroke_dasharray=dash(curve.number))
    return tag("g", *([line] if places else []), *dots, class_=kind, data_series=curve.number)
