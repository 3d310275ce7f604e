"""What each client sent in each round: a heat map, one cell per client and round."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedkit.ledger import MISSING_CLIENTS, STAND_INS

from .figures import format_bytes
from .markup import Markup, joined, tag
from .reading import ArmRecord

MOST_ROWS, MOST_COLUMNS = 60, 100  # beyond, a cell represents several clients or rounds
CELL, GAP, LEFT, BOTTOM = 18, 2, 90, 30
MARKS: Final = {  # the marks of replies, drawn in a cell of 16 by 16
    "skip": ("M3 8H13", "chose to send nothing"),
    "missing": ("M4 4L12 12M12 4L4 12", "no answer"),
    "lost": ("M4 4L12 12M12 4L4 12", "its answer was lost by the fault schedule"),
    "late": ("M4 4L12 12M12 4L4 12", "its answer came too late"),
    "rejected": ("M8 2L14 8L8 14L2 8Z", "its answer was refused"),
    "error": ("M8 2L14 8L8 14L2 8Z", "it answered with an error"),
}


@dataclass
class Cell:
    """What one client did in one round; a drawn cell may show the mean of several."""

    sent: float = 0.0  # bytes up
    fate: str = ""  # a key of `MARKS`, or "" for an answer that counts
    stand_in: str | None = None


def cells_of(arm: ArmRecord) -> dict[tuple[str, int], Cell]:
    """Return what each client that was asked did, by client and round; empty without a ledger."""
    cells: dict[tuple[str, int], Cell] = {}
    for entry in arm.entries:
        if entry["kind"].split(".")[0] != "train":
            continue
        key = entry["client"], entry["server-round"]
        if entry["direction"] == "downlink":
            cells.setdefault(key, Cell(fate="missing"))
        else:
            cell = cells.setdefault(key, Cell())
            cell.sent, cell.fate = cell.sent + entry["object-bytes"], entry.get("fate", "")
    for row in arm.rows if arm.entries else ():
        for client in row.get(MISSING_CLIENTS, ()):
            cell = cells.setdefault((client, row["round"]), Cell(fate="missing"))
            cell.fate = cell.fate or "missing"
            cell.stand_in = row.get(STAND_INS, {}).get(client)
    return cells


def heat_map(arm: ArmRecord) -> Markup | None:
    """Return the heat map of an arm's uploads; None if nothing is known of them."""
    cells = cells_of(arm)
    if not cells:
        return None
    clients = sorted({client for client, _ in cells}, key=natural)
    rounds = sorted({server_round for _, server_round in cells})
    rows, columns = _binned(clients, MOST_ROWS), _binned(rounds, MOST_COLUMNS)
    most = max(cell.sent for cell in cells.values()) or 1
    drawn = [
        _cell(column, row, [(c, k, cells[c, k]) for c in names for k in numbers if (c, k) in cells], most)
        for row, names in enumerate(rows)
        for column, numbers in enumerate(columns)
    ]
    width, height = LEFT + CELL * len(columns), CELL * len(rows) + BOTTOM
    label = f"Bytes sent by {len(clients)} clients in {len(rounds)} rounds, {arm.title}"
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    svg = tag("svg", *_names(rows, columns), *drawn, role="img", aria_label=label, class_="heat", **size)
    scroll = tag("div", svg, class_="scroll", tabindex=0, role="region", aria_label=label)
    binned = len(rows) < len(clients) or len(columns) < len(rounds)
    note = f"One cell stands for up to {len(rows[0])} clients and {len(columns[0])} rounds: mean bytes."
    return joined([scroll, tag("p", note, class_="note") if binned else ""])


def heat_legend() -> Markup:
    """Return the legend of the map's colours and marks."""
    scale = [
        tag("rect", x=16 * k, y=0, width=16, height=16, class_="sent", fill_opacity=_opacity(k / 4))
        for k in range(5)
    ]
    items = [
        tag(
            "li",
            tag("svg", *scale, viewBox="0 0 80 16", width=80, height=16, aria_hidden="true"),
            "none to most bytes",
        )
    ]
    for fates, words in (("skip", "skip"), ("missing", "missing or lost"), ("rejected", "refused or an error")):
        mark = tag("path", d=MARKS[fates][0], class_=f"mark {fates}")
        items.append(
            tag("li", tag("svg", mark, viewBox="0 0 16 16", width=16, height=16, aria_hidden="true"), words)
        )
    return tag("ul", *items, class_="legend")


def natural(name: object) -> list[tuple[bool, int, str]]:
    """Return a sort key with which client 10 comes after client 9."""
    return [
        (not part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.split(r"(\d+)", str(name))
        if part
    ]


def short(name: str) -> str:
    """Return a client's name, shortened to fit beside a row."""
    return name if len(name) <= 10 else f"…{name[-8:]}"


def _binned(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    size = -(-len(items) // most)
    return [items[at : at + size] for at in range(0, len(items), size)]


def _opacity(share: float) -> float:
    return round(0.06 + 0.94 * share, 3)


def _names(rows: Sequence[Sequence[str]], columns: Sequence[Sequence[int]]) -> list[Markup]:
    """Return the names of the clients and the numbers of the rounds."""
    parts = []
    for at, names in enumerate(rows):
        text = short(names[0]) if len(names) == 1 else f"{short(names[0])} …"
        title = tag("title", ", ".join(names[:50]))
        parts.append(tag("text", title, text, x=LEFT - 8, y=CELL * at + 13, text_anchor="end"))
    step = -(-len(columns) // 20)
    y = CELL * len(rows) + 15
    return parts + [
        tag("text", columns[at][0], x=LEFT + CELL * at + 8, y=y, text_anchor="middle")
        for at in range(0, len(columns), step)
    ]


def _cell(column: int, row: int, members: Sequence[tuple[str, int, Cell]], most: float) -> Markup:
    """Return one cell with its mark and title; empty if nobody was asked."""
    if not members:
        return Markup("")
    sent = sum(cell.sent for _, _, cell in members) / len(members)
    fates = {cell.fate for _, _, cell in members}
    (fate,) = fates if len(fates) == 1 else ("",)
    size = {"width": CELL - GAP, "height": CELL - GAP, "rx": 2}
    kind, share = ("sent pale", 0.25 * sent / most) if fate else ("sent", sent / most)
    parts = [tag("title", _said(members)), tag("rect", class_=kind, fill_opacity=_opacity(share), **size)]
    if fate in MARKS:
        parts.append(tag("path", d=MARKS[fate][0], class_=f"mark {fate}"))
    return tag("g", *parts, transform=f"translate({LEFT + CELL * column} {CELL * row})")


def _said(members: Sequence[tuple[str, int, Cell]]) -> str:
    """Return the title of a cell."""
    if len(members) > 1:
        mean = sum(cell.sent for _, _, cell in members) / len(members)
        return f"{len(members)} replies asked for, {format_bytes(mean)} each on average"
    ((client, server_round, cell),) = members
    words = [f"client {client}, round {server_round}: {format_bytes(cell.sent)}"]
    if cell.fate:
        words.append(MARKS.get(cell.fate, ("", cell.fate))[1])
    if cell.stand_in is not None:
        words.append(
            "its last update stands in" if cell.stand_in == client else f"client {cell.stand_in} stands in"
        )
    return "; ".join(words)
