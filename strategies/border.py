"""Conversion between the app's ordinary arrays and float32 arrays, with the values that are sent beside these."""

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
    """What the app's arrays have in this round that float32 arrays lack: `fedkit.ordinary`.

    Parameters
    ----------
    alike : bool
        Whether all nodes hold the same arrays; otherwise nothing is sent beside the frames.
    """

    def __init__(self, alike: bool) -> None:
        self._never: Sequence[str] | None = None if alike else ()
        self.ordinary = Ordinary()
        self.packed = b""  # for the clients, and for the checkpoint
        self._last: tuple[ArrayRecord | None, NamedArrays] = (None, {})  # the last one handed out, and its arrays

    def inward(self, record: ArrayRecord) -> NamedArrays:
        """Return the app's arrays in float32, and remember what the conversion loses.

        For the record that `outward` returned last, these are the float32 arrays that it was made from, with all
        their bits, also where the app's own type has fewer.
        """
        if record is self._last[0]:
            return self._last[1]
        arrays, self.ordinary = split(record, self._never)
        self.packed = self.ordinary.pack()
        return arrays

    def outward(self, params: NamedArrays) -> ArrayRecord:
        """Return the parameters as ordinary arrays; inverse of `inward`."""
        record = self.ordinary.record(params)
        self._last = (record, params)
        return record

    def check(self, node_id: int, report: Report) -> None:
        """Raise ReplyError for a report whose values sent beside the frame cannot be used."""
        self._read(report)

    def average(self, contents: Sequence[RecordDict], key: str) -> None:
        """Take the mean of the values that accepted replies sent beside frames, weighted by the metric `key`."""
        like = self.ordinary.beside
        if like and contents:
            own = [(metrics_of(content)[key], self._read(read_report(content))) for content in contents]
            self.ordinary = replace(self.ordinary, beside=mean(own, like))
            self.packed = self.ordinary.pack()

    def recall(self, packed: bytes) -> None:
        """Restore the value that `packed` had before a restart."""
        self.packed, self.ordinary = packed, Ordinary.unpack(packed)

    def _read(self, report: Report) -> Beside:
        try:
            return unpack_values(report.beside, self.ordinary.beside)
        except WireFormatError as error:
            raise ReplyError(str(error)) from None
