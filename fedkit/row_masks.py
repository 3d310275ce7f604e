"""Row masks: the few rank-one components of LoRA factors that a client trains and sends in one round.

A component is a row of ``lora_A`` with the column of ``lora_B`` of the same layer. The active ones follow from a
seed and the arrays' names alone, which both sides know, so that server and client draw the same without sending
them. Only the active rows, ``active_rank / r`` of the factors, are in the frame. All other arrays are sent whole.

Law: the same seed, names and shapes give the same rows on every machine and with every version of numpy, since the
active rows are those with the smallest hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import NamedArrays
from fedkit.errors import ConfigError
from fedkit.submodels import SubModel, is_factor, whole

Pairing: TypeAlias = Literal["paired", "independent"]
"""Whether B has the same active components as A, or its own draw: "v1" and "v2" of RM-LoRA's released code."""

MOST_COMPONENTS: Final = 2**16  # of an array: each takes a hash
_RANK, _PAIRING = "rows-active-rank", "rows-pairing"
ROWS_SEED: Final = "rows-seed"  # an option of messages, and of the reports that answer them


@dataclass(frozen=True, slots=True)
class RowMask:
    """Makes clients train and send only a few components of each LoRA layer, others in each round.

    Parameters
    ----------
    active_rank : int
        The number of active components; all, for an adapter of lower rank.
    per : {"round", "client"}
        "round": all clients of a round have the same components, so these get the mean over all clients, and the
        next downlink is as sparse. "client": each client has its own, so means are over fewer clients, but no part
        of the model rests; where clients differ, those means scatter (4 unlike quadratics, k/r = 1/2: 2.3 times as
        far off after 12 rounds).
    pairing : {"paired", "independent"}
        Whether B has the same components as A.

    Raises
    ------
    ConfigError
        If a value can never work.
    """

    active_rank: int
    per: Literal["round", "client"] = "round"
    pairing: Pairing = "paired"

    def __post_init__(self) -> None:
        if self.active_rank < 1:
            raise ConfigError(f"row_mask: active_rank must be at least 1, got {self.active_rank}.")
        if self.per not in ("round", "client"):
            raise ConfigError(f"row_mask: per: expected 'round' or 'client', got {self.per!r}.")
        if self.pairing not in get_args(Pairing):
            raise ConfigError(f"row_mask: pairing: expected one of {get_args(Pairing)}, got {self.pairing!r}.")

    def draw(self, *of: object) -> RowDraw:
        """Return the draw for some values: the seed of the run, the round, the client."""
        digest = hashlib.blake2b("/".join(map(str, of)).encode(), digest_size=8).digest()
        return RowDraw(self.active_rank, int.from_bytes(digest, "big") >> 1, self.pairing)


@dataclass(frozen=True, slots=True)
class RowDraw:
    """A draw of the active components: the server writes it into a message, and both sides derive the rows."""

    active_rank: int
    seed: int  # below 2**63
    pairing: Pairing = "paired"

    def rows(self, name: str, r: int) -> NDArray[np.intp]:
        """Return the active components of an array of rank `r`, ascending; all if there are not more."""
        if r > MOST_COMPONENTS:
            raise ConfigError(f"row_mask: array {name!r} has rank {r}, more than {MOST_COMPONENTS}.")
        if self.pairing == "paired":
            name = ".".join("lora_A" if part == "lora_B" else part for part in name.split("."))
        hashes = [hashlib.blake2b(f"{self.seed}/{name}/{i}".encode(), digest_size=16).digest() for i in range(r)]
        return np.array(sorted(sorted(range(r), key=hashes.__getitem__)[: self.active_rank]), np.intp)

    def submodel(self, like: NamedArrays) -> SubModel:
        """Return the active part of arrays: some rows of each lora_A, columns of each lora_B, all of the rest."""
        sets = dict(whole(like).index_sets)
        for name, array in like.items():
            if is_factor(name, "lora_A"):
                sets[name] = (self.rows(name, array.shape[0]), *sets[name][1:])
            elif is_factor(name, "lora_B"):
                sets[name] = (sets[name][0], self.rows(name, array.shape[1]), *sets[name][2:])
        return SubModel(sets)

    def __str__(self) -> str:
        return f"{self.pairing}/{self.active_rank}/{self.seed}"

    @classmethod
    def from_str(cls, text: str) -> Self:
        """Return the draw written as text; inverse of `str`."""
        pairing, active_rank, seed = text.split("/")
        return cls(int(active_rank), int(seed), "paired" if pairing == "paired" else "independent")

    def to_options(self) -> dict[str, int | str]:
        """Return the draw as options of a message."""
        return {_RANK: self.active_rank, ROWS_SEED: self.seed, _PAIRING: self.pairing}

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> Self | None:
        """Return the draw in the options, None if there is none; inverse of `to_options`.

        Raises
        ------
        ConfigError
            If it is incomplete.
        """
        if not options.keys() & {_RANK, ROWS_SEED, _PAIRING}:
            return None
        rank, seed, pairing = (options.get(key) for key in (_RANK, ROWS_SEED, _PAIRING))
        if type(rank) is not int or type(seed) is not int or pairing not in ("paired", "independent"):
            raise ConfigError(f"the draw of rows is incomplete: rank {rank!r}, seed {seed!r}, {pairing!r}.")
        return cls(rank, seed, "paired" if pairing == "paired" else "independent")
