"""Which rows of the LoRA factors each node was asked for: `fedkit.row_masks`.

A node that still owes a reply is not asked again. So its reply, however late, is about the rows that it was asked
for last; the reply states them, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedkit.aggregation.protocol import Cohort
from fedkit.config import Scalar
from fedkit.errors import ConfigError, ReplyError
from fedkit.message import Report
from fedkit.row_masks import ROWS_SEED, RowDraw, RowMask


class Rows:
    """The draws of rows for all nodes.

    Parameters
    ----------
    mask : RowMask, optional
        Unset: all rows, in every round.
    """

    def __init__(self, mask: RowMask | None) -> None:
        if mask is not None and not isinstance(mask, RowMask):
            raise ConfigError(f"row_mask: expected a RowMask, got {mask!r}.")
        self.mask = mask
        self._told: dict[int, RowDraw] = {}  # what each node was asked for last

    @property
    def by_client(self) -> bool:
        """Whether each client has its own rows."""
        return self.mask is not None and self.mask.per == "client"

    def draw(self, seed: int, cohort: Cohort) -> None:
        """Draw the rows of a round; the draw depends only on the seed, the round and the clients."""
        if self.mask is not None:
            for node_id in cohort.sent:
                own = [cohort.client_ids.get(node_id, node_id)] if self.by_client else []
                self._told[node_id] = self.mask.draw(seed, cohort.server_round, *own)

    def options(self, node_id: int) -> Mapping[str, Scalar]:
        """Return the message options that tell a node its rows."""
        return {} if self.mask is None else self._told[node_id].to_options()

    def said(self, report: Report) -> RowDraw | None:
        """Return the rows of an upload, given its report, which was checked."""
        seed = report.options.get(ROWS_SEED)
        return None if self.mask is None else RowDraw(self.mask.active_rank, int(seed or 0), self.mask.pairing)

    def check(self, node_id: int, report: Report) -> None:
        """Raise ReplyError for a reply about other rows than the node was asked for."""
        told, said = self._told.get(node_id), report.options.get(ROWS_SEED)
        if said != (told and told.seed):
            raise ReplyError("its upload is of other rows than it was asked for. Is its fedkit older?")

    def key(self, name: str, node_id: int) -> str:
        """Return a key for what a node sends: the name of its part, and the draw of its rows."""
        return name if self.mask is None else f"{name}#{self._told[node_id]}"

    def parse(self, key: str) -> tuple[str, RowDraw | None]:
        """Return the name of the part and the draw of rows; inverse of `key`."""
        if self.mask is None:
            return key, None
        name, _, draw = key.rpartition("#")
        return name, RowDraw.from_str(draw)
