"""Reports on runs: tables on a terminal, and a page in a single file.

reading.py ── figures.py ─┬─ tables.py                    what `fedkit run` prints
a run's files   numbers   └─ page.py ── plots.py, …       what `fedkit report` writes
"""

from .figures import Row, read_rounds

__all__ = ["Row", "read_rounds"]
