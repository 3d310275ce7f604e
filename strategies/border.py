"""The server's border: ordinary arrays on Flower's side, float32 arrays and what travels beside them on ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flwr.app import ArrayRecord, RecordDict

from fedkit.arrays import NamedArrays
from fedkit.errors import ReplyError, WireFormatError
from fedkit.message import Report, read_report
from fedkit.ordinary import Beside, Ordinary, mean, split, unpack_values

from .contents import metrics_of


class Border:
    """What the app's arrays have that float32 arrays lack, in this round.

    Parameters
    ----------
    alike : bool
        Whether all nodes hold the same arrays; otherwise nothing travels beside.
    """

    def __init__(self, alike: bool) -> None:
        self._never: Sequence[str] | None = None if alike else ()
        self.ordinary = Ordinary()
        self.packed = b""  # for the clients, and for the checkpoint
        self._last: tuple[ArrayRecord | None, NamedArrays] = (None, {})  # handed out, and what was made of it

    def inward(self, record: ArrayRecord) -> NamedArrays:
        """Return the app's arrays in float32, and remember what that lacks.

        Of those that were handed out last, all of float32, also where the app's own type has fewer bits.
        """
        if record is self._last[0]:
            return self._last[1]
        arrays, self.ordinary = split(record, self._never)
        self.packed = self.ordinary.pack()
        return arrays

    def outward(self, params: NamedArrays) -> ArrayRecord:
        """Return the params as ordinary arrays; inverse of `inward`."""
        record = self.ordinary.record(params)
        self._last = (record, params)
        return record

    def check(self, node_id: int, report: Report) -> None:
        """Raise ReplyError for a report whose values beside the frame cannot be used."""
        self._read(report)

    def average(self, contents: Sequence[RecordDict], key: str) -> None:
        """Go on with the mean of what accepted replies hold beside their frames, weighted by the metric `key`."""
        like = self.ordinary.beside
        if like and contents:
            own = [(metrics_of(content)[key], self._read(read_report(content))) for content in contents]
            self.ordinary = replace(self.ordinary, beside=mean(own, like))
            self.packed = self.ordinary.pack()

    def recall(self, packed: bytes) -> None:
        """Go on from what was `packed` before a restart."""
        self.packed, self.ordinary = packed, Ordinary.unpack(packed)

    def _read(self, report: Report) -> Beside:
        try:
            return unpack_values(report.beside, self.ordinary.beside)
        except WireFormatError as error:
            raise ReplyError(str(error)) from None
