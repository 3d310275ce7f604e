"""Which part of the server's arrays each node holds, is sent, and sends back.

Each part has a name. A node finds the name of its part in its node config, under the key ``submodel``, and states
it in every report; only the server knows what the name stands for (`Terms`). A node whose config names no part
takes the part named like its device profile, if there is one; otherwise it holds the whole model.

The LoRA mode narrows the parts further (`LoraMode`): with "ffa" no upload holds a lora_A, with "fedsa" no message
holds a lora_B (an empty array is sent, which conveys its number of rows). In each round a node may be asked for
only a few rows of the LoRA factors (`Rows`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.arrays import NamedArrays, flatten_mask, num_values, schema_digest
from fedkit.errors import ConfigError, ReplyError
from fedkit.message import PROFILE, SUBMODEL, Report
from fedkit.row_masks import RowMask
from fedkit.submodels import Cut, SubModel, check, embed, is_factor, owned, shapes, take, whole, within, without

from .looked_up import Embedded, Owned
from .rows import Rows
from .terms import Terms

logger = logging.getLogger(__name__)

LoraMode: TypeAlias = Literal["factors", "ffa", "fedsa", "product", "product-update"]
"""How LoRA factors are averaged.

"factors"
    Each factor on its own. The product of the means is not the mean of the products: `fedkit.aggregation.lora`.
"ffa"
    lora_A keeps its initial values, so the mean of lora_B gives the mean of the products exactly. The app must not
    train lora_A (`fedkit.clients.adapters.freeze_lora_a`). Y. Sun, Z. Li, Y. Li and B. Ding, "Improving LoRA in
    Privacy-preserving Federated Learning", ICLR 2024, https://arxiv.org/abs/2403.12313.
"fedsa"
    lora_A is averaged, and each client keeps a lora_B of its own. P. Guo, S. Zeng, Y. Wang, H. Fan, F. Wang and
    L. Qu, "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
    https://arxiv.org/abs/2410.01463. The server's lora_B stays zero, so only clients can evaluate.
"product"
    The products BA are averaged, and factored again (`fedkit.aggregation.product`).
"product-update"
    The changes of the products are averaged: a client does not affect components that it does not hold.
"""

PRODUCTS: Final = ("product", "product-update")
WHOLE: Final = ""  # the name of the whole model, as a part


class Parts:
    """The parts by name, and which of them each node was sent.

    Parameters
    ----------
    submodels : mapping of str to Cut, optional
        The cut or the terms of each named part. None: every node holds the whole, whatever it reports.
    lora : LoraMode
        How LoRA factors are averaged.
    row_mask : RowMask, optional
        Which rows of its part a node sends; None: all.

    Raises
    ------
    ConfigError
        For an unknown `lora`, or a sub-model without a name.
    """

    def __init__(
        self, submodels: Mapping[str, Cut] | None, lora: LoraMode, row_mask: RowMask | None = None
    ) -> None:
        if lora not in get_args(LoraMode):
            raise ConfigError(f"lora: expected one of {', '.join(get_args(LoraMode))}, got {lora!r}.")
        if submodels is not None and WHOLE in submodels:
            raise ConfigError("submodels: a sub-model needs a name; nodes that name none hold the whole.")
        cuts: Mapping[str, Cut] = {WHOLE: whole, **(submodels or {})}
        self.terms = {name: cut if isinstance(cut, Terms) else Terms(cut=cut) for name, cut in cuts.items()}
        self.named = bool(submodels)  # whether the name that a node has matters
        self.differ = any(terms.cut is not whole for terms in self.terms.values())  # whether parts differ
        self.lora = lora
        self.rows = Rows(row_mask)
        self.sent: dict[int, str] = {}  # the part that each node was sent last
        self._schema = b""
        self._like: NamedArrays = {}
        self._down: dict[str, SubModel] = {}  # what is sent to nodes; `_up`: what they send back
        self._up: dict[str, SubModel] = {}
        self._owned: dict[str, NDArray[np.bool_]] = {}

    @property
    def trivial(self) -> bool:
        """Whether every node is sent everything, and sends everything back."""
        return not self.named and self.lora not in ("ffa", "fedsa") and self.rows.mask is None

    @property
    def by_client(self) -> bool:
        """Whether the server must know which client a node is before it asks that node."""
        return self.named or self.rows.by_client

    def name_of(self, report: Report) -> str:
        """Return the name of a node's part, by its report: from its config, else its profile if that has terms."""
        profile = str(report.options.get(PROFILE, WHOLE))
        return str(report.options.get(SUBMODEL, profile if profile in self.terms else WHOLE))

    def told(self, node_id: int) -> Terms:
        """Return the terms of the part that a node was sent last."""
        return self.terms[self.sent.get(node_id, WHOLE)]

    def prepare(self, params: NamedArrays) -> None:
        """Compute the parts for arrays of these names and shapes; raises ConfigError if one cannot be cut."""
        if self.trivial or schema_digest(params) == self._schema:
            return
        self._like = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in params.items()}
        fixed = self._check_factors(params)
        for name, terms in self.terms.items():
            down = terms.cut(self._like)
            check(down, like=self._like)
            self._up[name] = without(down, fixed)
            self._down[name] = _emptied(down, fixed) if self.lora == "fedsa" else down
            self._owned[name] = flatten_mask(owned(self._up[name], like=self._like))
        self._schema = schema_digest(params)

    def unknown(self, node_id: int, said: Mapping[int, str]) -> bool:
        """Return whether a node must be asked which part it holds."""
        return self.named and said.get(node_id) not in self.terms

    def names(self, node_ids: Iterable[int], said: Mapping[int, str]) -> list[int]:
        """Return the nodes that reported, in `said`, the name of a known part; log the others."""
        if not self.named:
            return list(node_ids)
        known, names = [], ", ".join(map(repr, self.terms))
        for node_id in node_ids:
            if said.get(node_id) in self.terms:
                known.append(node_id)
            elif node_id in said:
                logger.warning(
                    "node %d holds sub-model %r: expected one of %s. It is not asked. Set its node config, or "
                    "the strategy's submodels.",
                    node_id,
                    said[node_id],
                    names,
                )
            else:
                logger.warning("node %d has not said which sub-model it holds: it is not asked.", node_id)
        return known

    def distribute(
        self, params: NamedArrays, node_ids: Sequence[int], said: Mapping[int, str]
    ) -> Mapping[int, NamedArrays]:
        """Return what each node is sent; nodes with the same part share one object."""
        if self.trivial:
            return dict.fromkeys(node_ids, params)
        self.prepare(params)
        named = {node_id: said[node_id] if self.named else WHOLE for node_id in node_ids}
        self.sent |= named
        if self.lora != "fedsa" and not self.differ:
            return dict.fromkeys(node_ids, params)
        slices = {name: take(params, self._down[name]) for name in set(named.values())}
        return {node_id: slices[name] for node_id, name in named.items()}

    def uploaded(self, params: NamedArrays, node_id: int) -> NamedArrays:
        """Return the entries that a node sends updates of, in the node's own units."""
        return params if self.trivial else take(params, self._up[self.sent[node_id]])

    def cohort(self, cohort: Cohort) -> Cohort:
        """Return the cohort with the names and entries of its nodes' parts."""
        if self.trivial:
            return cohort
        return replace(
            cohort, submodels={node_id: self.sent[node_id] for node_id in cohort.sent}, owned=self._owned
        )

    def check(self, node_id: int, report: Report) -> None:
        """Raise ReplyError for a reply about another part, or other rows, than the node was sent."""
        sent, said = self.sent.get(node_id, WHOLE), str(report.options.get(SUBMODEL, WHOLE))
        if self.named and sent != said:
            raise ReplyError(f"it was sent sub-model {sent!r} and says that it holds {said!r}.")
        self.rows.check(node_id, report)

    def expected(self, sent: NamedArrays, report: Report) -> NamedArrays:
        """Return arrays with the names and shapes of an upload, given its report, which was checked."""
        if self.trivial:
            return sent
        name = str(report.options.get(SUBMODEL, WHOLE)) if self.named else WHOLE
        part, draw = shapes(self._up[name], like=self._like), self.rows.said(report)
        return part if draw is None else shapes(draw.submodel(part), like=part)

    def num_values(self, params: NamedArrays) -> int:
        """Return how many values the largest upload holds."""
        part = params if self.trivial else shapes(self._up[WHOLE], like=self._like)
        return num_values(part if self.rows.mask is None else take(part, self.rows.mask.draw().submodel(part)))

    def embedded(self, uploads: Iterable[Upload]) -> Iterator[Upload]:
        """Yield uploads with the server's shapes and units, zero where their clients hold nothing."""
        for upload in uploads:
            if upload.arrays is not None and not self.trivial:
                name, like = self.rows.key(upload.submodel, upload.node_id), self._like
                part, mask = self._of(name), upload.mask and self._of(name).embed_mask(upload.mask, like=like)
                arrays = embed(upload.arrays, part, like=like)
                yield replace(upload, arrays=arrays, mask=mask, submodel=name, again=None)
            else:
                yield upload

    def whole(self, cohort: Cohort) -> Cohort:
        """Return the cohort with what was sent in the server's shapes and units, embedded on access.

        With a row mask, the entries that a node owns are those that it sends.
        """
        if not self.trivial:
            cohort = replace(cohort, sent=Embedded(cohort, self._down, self._like))
        if self.rows.mask is None:
            return cohort
        keys = {self.rows.key(name, node_id) for node_id, name in cohort.submodels.items()}
        return replace(cohort, owned=Owned(keys, lambda key: owned(self._of(key), like=self._like)))

    def _of(self, key: str) -> SubModel:
        """Return the entries that an upload holds, given its key: the part's name and the draw of rows."""
        name, draw = self.rows.parse(key)
        up = self._up[name]
        return up if draw is None else within(up, draw.submodel(shapes(up, like=self._like)))

    def _check_factors(self, params: NamedArrays) -> list[str]:
        """Return the LoRA factors that no client sends; raises ConfigError if the arrays do not fit the option."""
        what = "row_mask" if self.rows.mask else f"lora: {self.lora!r}" if self.lora in ("ffa", "fedsa") else ""
        factor = "lora_B" if self.lora == "fedsa" else "lora_A"
        names = [name for name in params if is_factor(name, factor)]
        if what and not names:
            raise ConfigError(f"{what} needs LoRA factors, got {list(params)[:3]}.")
        if self.lora not in ("ffa", "fedsa"):
            return []
        if self.lora == "fedsa" and any(params[name].any() for name in names):
            raise ConfigError(
                "lora: with 'fedsa' every client's lora_B begins at zero, that of the arrays does not."
            )
        return names


def _emptied(submodel: SubModel, names: Iterable[str]) -> SubModel:
    """Return the sub-model with no columns of some arrays."""
    sets = dict(submodel.index_sets)
    for name in names:
        if name in sets:
            sets[name] = (sets[name][0], np.arange(0), *sets[name][2:])
    return SubModel(sets, submodel.scales)
