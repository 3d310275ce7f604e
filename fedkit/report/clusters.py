"""The cluster of each adapter: a map with a slider over the rounds, and a strip of all rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from .heat import CELL, GAP, LEFT, natural, short
from .markup import Markup, tag
from .plots import colour
from .reading import ArmRecord

SIZE, EDGE = 360, 26
MOST_FRAMES: Final = 60
SHAPES: Final = (  # by slot, around 0, 0
    "M-6 0A6 6 0 1 0 6 0A6 6 0 1 0-6 0Z",
    "M-5.5-5.5H5.5V5.5H-5.5Z",
    "M0-7.5L6.5 5H-6.5Z",
    "M0-7.5L7.5 0L0 7.5L-7.5 0Z",
)


def cluster_map(arm: ArmRecord, name: str) -> Markup | None:
    """Return the map of an arm, with the id `name` in the page, and the strip; None if nothing was clustered."""
    frames = [line for line in arm.clusters if line["adapters"]]
    if not frames:
        return None
    step = -(-len(frames) // MOST_FRAMES)
    shown = [*frames[:-1:step], frames[-1]]
    strip = _strip(frames, arm.title)
    if any("x" in adapter and "y" in adapter for frame in shown for adapter in frame["adapters"]):
        return tag("div", _moving(shown, name, arm.title), strip, class_="sides")
    return strip


def key_of(adapter: Mapping[str, Any]) -> tuple[str, int]:
    """Return the client and the slot of an adapter."""
    return str(adapter.get("client", "")), int(adapter.get("slot", 0))


def _moving(frames: Sequence[Mapping[str, Any]], name: str, title: str) -> Markup:
    """Return the map, which shows one round: the last, until the slider is moved."""
    places = [
        (float(a["x"]), float(a["y"])) for frame in frames for a in frame["adapters"] if "x" in a and "y" in a
    ]
    low = [min(values) for values in zip(*places, strict=True)]
    span = max(max(values) - least for values, least in zip(zip(*places, strict=True), low, strict=True)) or 1.0
    drawn = [_frame(frame, low, span, shown=frame is frames[-1]) for frame in frames]
    box = {"viewBox": f"0 0 {SIZE} {SIZE}", "role": "img", "class_": "map", "id": name}
    svg = tag("svg", *drawn, aria_label=f"Adapters by cluster, {title}", **box)
    last = len(frames) - 1
    slider = tag(
        "input", type="range", min=0, max=last, value=last, data_frames=name, aria_label="Round", list_=None
    )
    return tag(
        "div", svg, tag("p", tag("label", "Round ", slider), tag("output", _caption(frames[-1])), class_="slider")
    )


def _frame(frame: Mapping[str, Any], low: Sequence[float], span: float, *, shown: bool) -> Markup:
    scale = (SIZE - 2 * EDGE) / span
    marks = []
    for adapter in frame["adapters"]:
        if "x" not in adapter or "y" not in adapter:
            continue
        (client, slot), cluster = key_of(adapter), int(adapter.get("cluster", -1))
        x, y = EDGE + (adapter["x"] - low[0]) * scale, SIZE - EDGE - (adapter["y"] - low[1]) * scale
        kind = "aside" if adapter.get("aside") else "dot"
        shape = tag("path", d=SHAPES[slot % len(SHAPES)], class_=f"{kind} {colour(cluster)}")
        text = tag("text", short(client), x=9, y=4)
        words = tag("title", f"client {client}, slot {slot}: cluster {cluster}{', set aside' * (kind == 'aside')}")
        marks.append(tag("g", words, shape, text, transform=f"translate({x:.1f} {y:.1f})"))
    hidden = None if shown else "none"
    return tag("g", *marks, display=hidden, data_caption=_caption(frame))


def _caption(frame: Mapping[str, Any]) -> str:
    """Return the caption of a round."""
    scores = {"ARI": frame.get("ari"), "purity": frame.get("purity")}
    said = [f"{name} {value:.2f}" for name, value in scores.items() if isinstance(value, int | float)]
    return "  ".join([f"round {frame['round']}", *said])


def _strip(frames: Sequence[Mapping[str, Any]], title: str) -> Markup:
    """Return the strip with each adapter's cluster in each round."""
    keys = sorted({key_of(a) for frame in frames for a in frame["adapters"]}, key=lambda k: (natural(k[0]), k[1]))
    several = len({slot for _, slot in keys}) > 1
    row_of = {key: row for row, key in enumerate(keys)}
    parts = [
        tag(
            "text",
            f"{short(client)}.{slot}" if several else short(client),
            x=LEFT - 8,
            y=CELL * row + 13,
            text_anchor="end",
        )
        for (client, slot), row in row_of.items()
    ]
    for column, frame in enumerate(frames):
        for adapter in frame["adapters"]:
            (client, slot), cluster = key_of(adapter), int(adapter.get("cluster", -1))
            words = tag("title", f"round {frame['round']}, client {client}, slot {slot}: cluster {cluster}")
            x, y = LEFT + CELL * column, CELL * row_of[client, slot]
            box = tag(
                "rect", x=x, y=y, width=CELL - GAP, height=CELL - GAP, rx=2, class_=f"fill {colour(cluster)}"
            )
            number = tag("text", cluster, x=x + 8, y=y + 12, text_anchor="middle", class_="inside")
            parts.append(tag("g", words, box, number))
        if column % -(-len(frames) // 20) == 0:
            at = {"x": LEFT + CELL * column + 8, "y": CELL * len(keys) + 15}
            parts.append(tag("text", frame["round"], text_anchor="middle", **at))
    width, height = LEFT + CELL * len(frames), CELL * len(keys) + 30
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    label = f"Cluster of each adapter in each round, {title}"
    svg = tag("svg", *parts, role="img", aria_label=label, class_="heat", **size)
    return tag("div", svg, class_="scroll", tabindex=0, role="region", aria_label=label)
