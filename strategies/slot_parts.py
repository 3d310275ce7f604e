"""Parts for nodes with several adapters: every slot has the same part, cut out as if it were the only slot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.aggregation.slots import count_slots, join_slots, split_clusters, split_slots
from fedkit.arrays import Mask, NamedArrays, num_values
from fedkit.errors import ReplyError
from fedkit.message import Report
from fedkit.row_masks import RowMask
from fedkit.submodels import Cut, SubModel, embed

from .parts import LoraMode, Parts


class SlotParts(Parts):
    """The parts of one adapter, by name, and the whole adapters from which each node's parts were cut.

    For the server, an adapter of a lower rank counts as the whole adapter that its client was sent, in which the
    client changed only its part. So adapters differ by what clients did, not by what they hold.
    """

    def __init__(
        self, submodels: Mapping[str, Cut] | None, lora: LoraMode, row_mask: RowMask | None = None
    ) -> None:
        super().__init__(submodels, lora, row_mask)
        self._whole: dict[int, Sequence[NamedArrays]] = {}  # the adapters nodes were sent last, before the cut

    def prepare(self, params: NamedArrays) -> None:
        """Compute the parts of one adapter; `params` hold one adapter per cluster, or are a single one."""
        super().prepare(split_clusters(params)[0])

    def distribute_slots(
        self, slots: Mapping[int, Sequence[NamedArrays]], said: Mapping[int, str]
    ) -> Mapping[int, NamedArrays]:
        """Return what each node is sent, given the adapters of its slots; equal results are one shared object."""
        holders: dict[int, tuple[NamedArrays, list[int]]] = {}
        for node_id, own in slots.items():
            for adapter in own:
                holders.setdefault(id(adapter), (adapter, []))[1].append(node_id)
        parts = {key: self.distribute(adapter, nodes, said) for key, (adapter, nodes) in holders.items()}
        if not self.trivial:
            self._whole |= slots
        joined: dict[tuple[int, ...], NamedArrays] = {}
        sent = {}
        for node_id, own in slots.items():
            adapters = [parts[id(each)][node_id] for each in own]
            sent[node_id] = joined.setdefault(tuple(map(id, adapters)), join_slots(adapters))
        return sent

    def num_values(self, params: NamedArrays) -> int:
        """Return how many values the largest upload holds, that of a node with a slot in every cluster."""
        return num_values(params)

    def embedded(self, uploads: Iterable[Upload]) -> Iterator[Upload]:
        """Yield uploads with the server's shapes and units, zero where their clients hold nothing."""
        for upload in uploads:
            if self.trivial or upload.arrays is None:
                yield upload
                continue
            part = self._up[upload.submodel]
            arrays, mask = self._embedded(part, upload.arrays, upload.mask)
            again = upload.again and partial(self._again, part, upload.again)
            yield replace(upload, arrays=arrays, mask=mask, again=again)

    def whole(self, cohort: Cohort) -> Cohort:
        """Return the cohort with the whole adapters from which the nodes' parts were cut.

        A node that owes a reply is sent nothing new, so its reply is about the adapters it was sent last.
        """
        if self.trivial:
            return cohort
        self._whole = {node_id: self._whole[node_id] for node_id in cohort.sent}  # other nodes owe no reply
        return replace(cohort, sent={node_id: join_slots(own) for node_id, own in self._whole.items()})

    def _embedded(self, part: SubModel, arrays: NamedArrays, mask: Mask | None) -> tuple[NamedArrays, Mask | None]:
        slots, like = count_slots(arrays), self._like
        joined = join_slots([embed(slot, part, like=like) for slot in split_slots(arrays, slots)])
        if mask is None:
            return joined, None
        return joined, join_slots([part.embed_mask(slot, like=like) for slot in split_slots(mask, slots)])

    def _again(
        self, part: SubModel, decode: Callable[[], tuple[NamedArrays, Mask | None]]
    ) -> tuple[NamedArrays, Mask | None]:
        return self._embedded(part, *decode())


def num_slots_of(report: Report, most: int) -> int:
    """Return how many slots a client reports; raises ReplyError unless that is 1 to `most`."""
    num_slots = report.options.get("num-slots")
    if type(num_slots) is not int or not 1 <= num_slots <= most:
        raise ReplyError(
            f"num-slots: expected 1 to {most}, got {num_slots!r}. Give Tac more num_clusters, in the run config "
            'strategy-options="num-clusters=3", or max_slots.'
        )
    return num_slots
