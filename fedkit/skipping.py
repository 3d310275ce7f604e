"""When a client of a lazy scheme skips: AQUILA's rule, LAQ's, and what they have in common.

A client skips, unless the server has nothing from it or it has skipped for C rounds, if

    ‖Δq‖² + e ‖ε‖² + e' ‖ε'‖²  ≤  Σ_d ξ_d ‖θ^{k+1−d} − θ^{k−d}‖² / α²

==============  ==================================================  =============================================
paper           meaning                                             here
==============  ==================================================  =============================================
Δq              quantized innovation                                `coded`
ε, ε'           quantization error now, and of the last upload      `error`, `last_error`: their squared norms
θ^k             model of round k                                    `steps`: squared norms, the latest first
α               step size that made the step                        `Aquila`'s `step_size`
β; ξ_d          how much skipping a step of the model allows        `weights`
C               rounds skipped in a row, at most                    `patience`
==============  ==================================================  =============================================

AQUILA (see `fedkit.codec.quantize`): ``e = 1``, ``e' = 0``, one weight β, no C. LAQ (J. Sun, T. Chen,
G. Giannakis and Z. Yang, "Communication-Efficient Distributed Learning via Lazily Aggregated Quantized Gradients",
NeurIPS 2019, and its authors' code): ``e = e' = −3``.

Deviations from the papers
--------------------------
LAQ steps along the sum over M devices and divides its threshold by M²; here the model steps along the mean, so a
step size is M times as large and M drops out. The server computes the right-hand side, so a device needs no former
models, and the value is right for a device that missed rounds, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from fedkit.config import Scalar
from fedkit.errors import ConfigError

THRESHOLD: Final = "skip-threshold"
_ERROR, _LAST, _PATIENCE = "skip-error", "skip-last-error", "skip-patience"


@dataclass(frozen=True, slots=True)
class SkipRule:
    """When an innovation is not worth sending.

    Parameters
    ----------
    weights : tuple of float
        Weights of the squared norms of the model's last steps, the latest first; none: nobody skips.
    error : float
        Weight of the squared error of coding the innovation.
    last_error : float
        Weight of the squared error of the client's last upload.
    patience : int
        Rounds skipped in a row, at most; 0: no limit.

    Raises
    ------
    ConfigError
        For a negative weight or patience.
    """

    weights: tuple[float, ...]
    error: float = 1.0
    last_error: float = 0.0
    patience: int = 0

    def __post_init__(self) -> None:
        if not all(weight >= 0 for weight in self.weights):
            raise ConfigError(f"weights of a skip rule must be at least 0, got {self.weights}.")
        if self.patience < 0:
            raise ConfigError(f"patience must be at least 0 rounds, got {self.patience}.")

    @classmethod
    def aquila(cls, beta: float) -> Self:
        """Return AQUILA's rule; at `beta` 0 nobody skips."""
        if not beta >= 0:
            raise ConfigError(f"beta must be at least 0, got {beta}.")
        return cls((beta,))

    @classmethod
    def laq(cls, history: int = 10, weight: float = 0.08, patience: int = 100) -> Self:
        """Return LAQ's rule over `history` steps of one `weight`; the defaults are its authors'."""
        return cls((weight,) * history, -3.0, -3.0, patience)

    def threshold(self, steps: Sequence[float]) -> float:
        """Return the right-hand side, for squared norms of the model's steps, the latest first.

        >>> SkipRule((0.5, 0.25)).threshold([4.0])
        2.0
        """
        return sum(weight * step for weight, step in zip(self.weights, steps, strict=False))

    def skips(self, coded: float, error: float, last_error: float, silent: int, threshold: float) -> bool:
        """Return whether a client skips, given squared norms, and for how many rounds in a row it has skipped."""
        patient = not self.patience or silent < self.patience
        return patient and coded + self.error * error + self.last_error * last_error <= threshold

    def to_options(self, steps: Sequence[float]) -> dict[str, Scalar]:
        """Return what a client must be told."""
        options: dict[str, Scalar] = {THRESHOLD: self.threshold(steps)}
        if (self.error, self.last_error, self.patience) != (1.0, 0.0, 0):
            options |= {_ERROR: self.error, _LAST: self.last_error, _PATIENCE: self.patience}
        return options

    @classmethod
    def from_options(cls, options: Mapping[str, Scalar]) -> Self:
        """Return the rule without its weights, which the threshold replaces."""
        error, last = float(options.get(_ERROR, 1.0)), float(options.get(_LAST, 0.0))
        return cls((), error, last, int(options.get(_PATIENCE, 0)))

    @property
    def remembers(self) -> bool:
        """Whether the client must remember its last error and how often it skipped."""
        return bool(self.last_error or self.patience)
