"""What a round does about clients that did not answer: the choices, and what is remembered of each client.

==========  ==================================================================================================
choice      a missing client
==========  ==================================================================================================
"drop"      is left out: the mean is over those that answered
"reweight"  is left out, and weighs more when it answers: by the mean number of rounds between its answers
"mifa"      is represented by the update that it sent last
"safari"    is represented by the update that its most similar client sent in this round, or by its own last one;
            at a cosine of 0.5 with half of its weight
==========  ==================================================================================================

A client is missing if it was asked and sent nothing usable; in rounds that ask all available clients, also if it
could not be asked because it is offline, or still busy with the last round. Nothing is assumed about how often
that happens.

"reweight" is FedAU: S. Wang and M. Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in
Federated Averaging", ICLR 2024, https://arxiv.org/abs/2306.03401, algorithm 2, with the cutoff K = 50. "mifa" is
X. Gu, K. Huang, J. Zhang and L. Huang, "Fast Federated Learning in the Presence of Arbitrary Device
Unavailability", NeurIPS 2021, https://arxiv.org/abs/2106.04159, algorithm 1, of updates instead of gradients.
"safari": `fedkit.aggregation.compensate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self, TypeAlias, get_args

from fedkit.aggregation.similarity import Metric
from fedkit.errors import ConfigError

Choice: TypeAlias = Literal["drop", "reweight", "mifa", "safari"]
Surrogate: TypeAlias = Literal["model", "update"]

CUTOFF: Final = 50  # missed rounds that FedAU counts as one whole interval


@dataclass(frozen=True, slots=True)
class Missing:
    """How clients that did not answer count in the mean of a round.

    Parameters
    ----------
    by : {"safari", "mifa", "reweight", "drop"}
        See the module.
    similarity : {"cosine", "l2"}
        For "safari": how similarity is measured. With cosines, a surrogate is weighted by its similarity.
    surrogate : {"model", "update"}
        For "safari". "model": a missing client gets the model of the most similar client, which amounts to using
        that client's update twice, since both started from the same model. "update": the missing client's own last
        model, which the server must remember, moves by the most similar client's update.
    own : bool, optional
        For "safari": whether a client's own last update, which the server must remember, is a candidate, too. It
        stands in if the client was, from answer to answer, more similar to itself than it is to any client that
        answered. Unset: wherever possible, which is with cosines, surrogate models, and arrays that mean the same
        in every round.
    warmup_rounds : int
        For "safari": how many rounds with answers only observe similarities.
    patience : int, optional
        How many rounds in a row a client is stood in for; then it is taken to have left. None: forever.

    Raises
    ------
    ConfigError
        For impossible values.
    """

    by: Choice = "safari"
    similarity: Metric = "cosine"
    surrogate: Surrogate = "model"
    own: bool | None = None
    warmup_rounds: int = 2
    patience: int | None = None

    def __post_init__(self) -> None:
        choices = {"by": Choice, "similarity": Metric, "surrogate": Surrogate}
        for name, known in choices.items():
            if (given := getattr(self, name)) not in get_args(known):
                raise ConfigError(f"missing: {name}: expected one of {', '.join(get_args(known))}, got {given!r}.")
        if self.own and not self._comparable:
            raise ConfigError("missing: own: only with similarity 'cosine' and surrogate 'model'. Leave it unset.")
        if self.warmup_rounds < 0:
            raise ConfigError(f"missing: warmup_rounds must be at least 0, got {self.warmup_rounds}.")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"missing: patience must be at least 1, or None, got {self.patience}.")

    @classmethod
    def of(cls, choice: Choice | Missing) -> Missing:
        """Return `choice` as a `Missing`; it may be only a name."""
        return choice if isinstance(choice, Missing) else cls(choice)

    def settled(self, *, lasting: bool) -> Missing:
        """Return this with `own` set; `lasting`: whether what a client sent means the same in a later round."""
        return self if self.own is not None else replace(self, own=lasting and self._comparable)

    @property
    def remembers(self) -> bool:
        """Whether it needs an array of every client: what it sent last, or its last model."""
        return self.by == "mifa" or (self.by == "safari" and (bool(self.own) or self.surrogate == "update"))

    @property
    def _comparable(self) -> bool:
        return self.by == "safari" and self.similarity == "cosine" and self.surrogate == "model"


@dataclass(frozen=True, slots=True)
class Known:
    """What is remembered of a client, besides arrays."""

    weight: float = 1.0  # from its last reply
    submodel: str = ""  # the part of the model it holds
    masked: bool = False  # whether its last upload covered only some entries
    silent: int = 0  # how many rounds in a row it has been missing
    interval: float = 1.0  # ω of FedAU: the mean number of rounds from answer to answer
    intervals: int = 0  # how many that is the mean of

    def answered(self, weight: float, submodel: str, *, masked: bool) -> Self:
        """Return what is known after an answer."""
        known = self._ended(self.silent % CUTOFF + 1)
        return replace(known, weight=weight, submodel=submodel, masked=masked, silent=0)

    def missed(self) -> Self:
        """Return what is known after a round without one."""
        silent = self.silent + 1
        known = self if silent % CUTOFF else self._ended(CUTOFF)
        return replace(known, silent=silent)

    def _ended(self, rounds: int) -> Self:
        mean = (self.intervals * self.interval + rounds) / (self.intervals + 1)
        return replace(self, interval=mean, intervals=self.intervals + 1)

    def plain(self) -> list[Any]:
        """Return it as a list, for a checkpoint."""
        return [getattr(self, name) for name in self.__dataclass_fields__]

    @classmethod
    def from_plain(cls, values: Sequence[Any]) -> Self:
        """Return it from a list; inverse of `plain`."""
        return cls(*values)
