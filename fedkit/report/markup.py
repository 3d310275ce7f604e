"""HTML and SVG from Python: text is escaped unless it is markup already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

_VOID: Final = ("input", "br")


class Markup(str):
    """Text that is HTML already; all other text is escaped when it becomes part of the page."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Return an element. ``class_`` is the attribute class, ``data_round`` data-round; None leaves one out.

    >>> tag("b", "<x>", title='"')
    '<b title="&quot;">&lt;x&gt;</b>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Markup:
    """Return elements and texts, one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(str(child)) for child in children))


def table(headings: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "") -> Markup:
    """Return a table that can be scrolled sideways; the first cell of a row names it, the others are numbers."""
    head = tag("thead", tag("tr", *(tag("th", heading, scope="col") for heading in headings)))
    body = tag(
        "tbody",
        *(tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows),
    )
    title = tag("caption", caption) if caption else Markup("")
    return tag(
        "div",
        tag("table", title, head, body),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption or "Table",
    )


def folded(summary: str, *children: object, open_: bool = False) -> Markup:
    """Return content that a reader can unfold."""
    return tag("details", tag("summary", summary), *children, open="" if open_ else None)


def figure(title: str, about: object, *children: object) -> Markup:
    """Return a plot with its heading."""
    return tag("figure", tag("figcaption", tag("h3", title), tag("p", about)), *children)
