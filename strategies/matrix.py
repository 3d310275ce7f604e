"""Prints the tables of which options go together: ``python -m fedkit.strategies.matrix``.

Only the combinations are listed here. Each answer is found by constructing the strategy, and each reason is the
message of the error. `tests/strategies/test_matrix.py` checks that `strategies/README.md` has the same tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.sparsify import TopK
from fedkit.codec.wire import Codec
from fedkit.errors import ConfigError
from fedkit.row_masks import RowMask
from fedkit.submodels import lora_rank

from .aquila import Aquila
from .asking import Asking
from .budget import Budget
from .error_feedback import ErrorFeedback
from .marina import Marina
from .plain import Plain
from .privacy import FRAMES, LONGER, SECURE, bounded
from .safari import Safari
from .tac import Tac
from .terms import Terms

SCHEMES: Final[Mapping[str, Callable[..., Asking]]] = {
    "`Plain`": Plain,
    "`ErrorFeedback`": ErrorFeedback,
    "`Aquila` (lazy)": Aquila,
    "`Safari` (masks)": Safari,
    "`Tac` (clusters)": lambda **options: Tac(num_clusters=2, **options),
    "`Marina`": Marina,
}
OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "any `quantizer`": {"quantizer": EntropyConstrained(2.0)},
    "a `sparsifier`": {"sparsifier": TopK(0.1)},
    "a coded `downlink`": {"downlink": Codec(EntropyConstrained(2.0))},
    "`missing`": {"missing": "safari"},
    "`submodels`": {"submodels": {"r4": lora_rank(4)}},
    "`Terms`, same arrays": {"submodels": {"slow": Terms(quantizer=EntropyConstrained(0.5))}},
    "`row_mask`": {"row_mask": RowMask(active_rank=2)},
    '`lora="ffa"`': {"lora": "ffa"},
    '`lora="fedsa"`': {"lora": "fedsa"},
    '`lora="product"`': {"lora": "product"},
    "`budget`": {"budget": Budget(client_bytes=10**9)},
}
RESTING: Final = "the noise also moves inactive rows, and such an update is refused."


class Table:
    """A Markdown table of answers, with the reasons as numbered notes below."""

    def __init__(self, *heads: str) -> None:
        self.lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        self.notes: list[str] = []

    def row(self, title: str, reasons: list[str | None]) -> None:
        """Add a row, given the reason against each cell; None: it works; empty: there is no such option."""
        self.lines.append(f"| {title} | " + " | ".join(map(self._cell, reasons)) + " |")

    def _cell(self, reason: str | None) -> str:
        if not reason:
            return "yes" if reason is None else "–"
        if reason not in self.notes:
            self.notes.append(reason)
        return f"no ({self.notes.index(reason) + 1})"

    def __str__(self) -> str:
        notes = [f"{number}. {reason}" for number, reason in enumerate(self.notes, 1)]
        return "\n".join([*self.lines, "", *notes])


def refusal(make: Callable[..., Asking], options: Mapping[str, Any]) -> str | None:
    """Return why a strategy refuses options; None if it takes them, empty if it has no such option."""
    dense = {} if "downlink" in options else {"downlink": None}  # asked about in a row of its own
    try:
        make(**options, **dense)
    except ConfigError as error:
        return re.sub(r"^[\w-]+: not with \w+: ", "", str(error))
    except TypeError:
        return ""
    return None


def by_scheme() -> Table:
    """Return the table of options by strategies."""
    table = Table(*SCHEMES)
    for title, options in OPTIONS.items():
        table.row(title, [refusal(make, options) for make in SCHEMES.values()])
    made = {name: make() for name, make in SCHEMES.items()}
    table.row("`LocalDpMod`, inside fedkit's mod", [None for _ in made])
    plain = "`Plain(weighted=False)`"
    clipped = [None if bounded(Plain(weighted=False)) and name == "`Plain`" else LONGER for name in made]
    table.row(f"Flower's DP wrappers, clipped by clients; {plain}", clipped)
    table.row("Flower's DP wrappers, clipped by the server", [FRAMES for _ in made])
    table.row("secure aggregation", [SECURE for _ in made])
    return table


def by_option() -> Table:
    """Return the table of pairs of options, for `Plain`, or for `ErrorFeedback` where one is a sparsifier."""
    pairs = {title: options for title, options in OPTIONS.items() if "quantizer" not in options}
    table = Table(*list(pairs)[1:], "`LocalDpMod`")
    for row, options in list(pairs.items()):
        answers: list[str | None] = []
        for column, others in list(pairs.items())[1:]:
            make = ErrorFeedback if "sparsifier" in {**options, **others} else Plain
            same = options.keys() == others.keys() or list(pairs).index(column) < list(pairs).index(row)
            answers.append("" if same else refusal(make, {**options, **others}))
        table.row(row, [*answers, RESTING if "row_mask" in options else None])
    return table


def page() -> str:
    """Return both tables in Markdown."""
    pairs = "Two options at once, with `Plain` (a sparsifier: with `ErrorFeedback`):"
    return f"{by_scheme()}\n\n{pairs}\n\n{by_option()}"


if __name__ == "__main__":
    print(page())
