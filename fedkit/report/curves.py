"""The curves of a page: accuracy or another metric against rounds and bytes, traffic, and other measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .axes import Axis
from .figures import Row, format_bytes
from .markup import Markup, figure, folded, table
from .plots import Curve, plot
from .series import Point, Series, measured
from .tables import thin_out

BOTH = ("uplink-bytes", "downlink-bytes")
NAMES = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "train/train-loss": "Loss in training",
    "train/loss": "Loss in training",
    "ari": "Adjusted Rand index",
    "purity": "Purity of the clusters",
}
ABOUT = {
    "loss": "Of the test set",
    "perplexity": "Of the test set",
    "ari": "Clusters and tasks: 1 if they are the same",
}
MANY_TIMES, FAR_APART = 6, 30  # bytes so far, or per round, that differ by more get a logarithmic axis


def quality_plots(series: Sequence[Series], metric: str) -> list[Markup]:
    """Return a metric against rounds, uplink bytes, and all bytes; empty without any evaluation."""
    curves = {one.number: one.curve(metric) for one in series}
    if not any(curves.values()):
        return []
    written = _share if metric == "accuracy" else _plain
    plots = [_against_rounds(series, curves, metric.capitalize(), "After each round", written)]
    for title, keys in (("uplink bytes", BOTH[:1]), ("all bytes", BOTH)):
        plots.append(_against_bytes(series, curves, metric, title, keys, written))
    return plots


def traffic_plots(series: Sequence[Series]) -> list[Markup]:
    """Return the bytes of each round, up and down, beside the predicted ones."""
    plots = []
    for title, key in (("Uplink", "uplink-bytes"), ("Downlink", "downlink-bytes")):
        curves = {one.number: _after_0(one.curve(key)) for one in series}
        forecasts = [(one, _forecast(one, key)) for one in series]
        faint = [
            Curve(
                one.number,
                "",
                points,
                [f"{one.label}, round {k}: {format_bytes(v)} predicted" for k, v in points],
                (),
                True,
            )
            for one, points in forecasts
            if points
        ]
        about = "All of Flower's objects of all clients" + (", and, faint, as predicted" if faint else "")
        plots.append(
            _against_rounds(series, curves, f"{title} per round", about, format_bytes, zero=True, more=faint)
        )
    return plots


def measured_plots(series: Sequence[Series]) -> list[Markup]:
    """Return other measurements against rounds, such as losses and the effective rank of the adapters."""
    plots = []
    for key in measured(series):
        curves = {one.number: one.curve(key) for one in series}
        title = NAMES.get(key, "Effective rank of the adapters" if "effective-rank" in key else key)
        about = "Mean over the clients that trained" if key.startswith("train/") else ABOUT.get(key, "")
        plots.append(_against_rounds(series, curves, title, about, _plain))
    return plots


def _against_rounds(
    series: Sequence[Series],
    curves: Mapping[int, Sequence[Point]],
    title: str,
    about: str,
    written: Callable[[float], str],
    *,
    zero: bool = False,
    more: Sequence[Curve] = (),
) -> Markup:
    """Return a plot over rounds, with its table."""
    drawn = [
        Curve(
            one.number,
            one.label,
            [(p.server_round, p.mean) for p in curves[one.number]],
            [f"{one.label}, round {p.server_round}: {_with_range(p, written)}" for p in curves[one.number]],
            [(p.server_round, p.low, p.high) for p in curves[one.number]],
        )
        for one in series
    ]
    every = [point for points in curves.values() for point in points]
    values = [v for p in every for v in (p.low, p.high)] + [v for curve in more for _, v in curve.points]
    rounds = [p.server_round for p in every] + [int(k) for curve in more for k, _ in curve.points]
    x, log = Axis.whole("round", rounds), zero and bool(values) and 0 < FAR_APART * min(values) < max(values)
    y = Axis.logarithmic(title, values, written) if log else Axis.over(title, values, written, zero=zero)
    about += ", on a logarithmic scale" if log else ""
    label = f"{title} against rounds: {', '.join(one.label for one in series)}"
    cells = {
        number: {p.server_round: _with_range(p, written) for p in points} for number, points in curves.items()
    }
    return figure(title, about, plot(label, x, y, [*more, *drawn]), _numbers(series, cells, label))


def _against_bytes(
    series: Sequence[Series],
    curves: Mapping[int, Sequence[Point]],
    metric: str,
    title: str,
    keys: Sequence[str],
    written: Callable[[float], str],
) -> Markup:
    """Return a metric against the bytes so far, on a logarithmic axis if these differ widely."""
    drawn, spent, cells = [], [], {}
    for one in series:
        so_far = one.so_far(*keys)
        found = [(so_far[p.server_round], p) for p in curves[one.number] if so_far[p.server_round] > 0]
        said = {p.server_round: f"{_with_range(p, written)} at {format_bytes(b)}" for b, p in found}
        titles = [f"{one.label}, round {k}: {words}" for k, words in said.items()]
        band = [(b, p.low, p.high) for b, p in found]
        drawn.append(Curve(one.number, one.label, [(b, p.mean) for b, p in found], titles, band))
        cells[one.number] = said
        spent += [b for b, _ in found[-1:]]
    every = [b for curve in drawn for b, _ in curve.points]
    values = [v for curve in drawn for _, low, high in curve.band for v in (low, high)]
    log = bool(spent) and max(spent) > MANY_TIMES * min(spent)
    name = f"{title} so far, all clients"
    x = Axis.logarithmic(name, every, format_bytes) if log else Axis.over(name, every, format_bytes, zero=True)
    label = f"{metric.capitalize()} against {title}: {', '.join(one.label for one in series)}"
    about = f"{'Up' if metric == 'accuracy' else 'Down'} and to the left is better" + (
        ", on a logarithmic scale" if log else ""
    )
    svg = plot(label, x, Axis.over(metric, values, written), drawn)
    return figure(f"{metric.capitalize()} against {title}", about, svg, _numbers(series, cells, label))


def _numbers(series: Sequence[Series], cells: Mapping[int, Mapping[int, str]], caption: str) -> Markup:
    """Return a folded table of each series' values in each round."""
    rounds = sorted({k for said in cells.values() for k in said})
    rows = [
        [k, *(cells[one.number].get(k, "–") for one in series)]
        for k in (row["round"] for row in thin_out([{"round": k} for k in rounds]))
    ]
    return folded("Numbers", table(["round", *(one.label for one in series)], rows, caption))


def _forecast(one: Series, key: str) -> list[tuple[float, float]]:
    """Return what was predicted for each round, from the first arm that has a prediction."""
    rows: Sequence[Row] = next((arm.forecast["rounds"] for arm in one.arms if arm.forecast.get("rounds")), ())
    return [(row["round"], float(row.get(key, 0))) for row in rows if row["round"]]


def _after_0(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.server_round]


def _with_range(point: Point, written: Callable[[float], str]) -> str:
    said = written(point.mean)
    return said if point.low == point.high else f"{said} ({written(point.low)} to {written(point.high)})"


def _share(value: float) -> str:
    """Return an accuracy in per cent."""
    return f"{100 * value:.1f} %".replace(".0 %", " %")


def _plain(value: float) -> str:
    return f"{value:.3g}"
