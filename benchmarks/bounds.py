"""The least bits that an error takes: rate-distortion bounds of recorded values.

Both bounds take the entries of an array as independent draws from that array's distribution, and may spend bits
where they help most: all arrays share one slope. Errors are squared and normalised by the squared norm; rates are
bits per entry.

`gaussian` is the distortion-rate function of Gaussians with the arrays' variances (reverse water-filling; T.
Cover, J. Thomas, "Elements of Information Theory", 2nd ed., theorem 10.3.3). Of all sources with those
variances, the Gaussian is the hardest to code: if entries have another distribution, a codec can be below this
curve.

`empirical` is the rate-distortion function of the arrays' own histograms, by the iteration of R. Blahut
("Computation of channel capacity and rate-distortion functions", IEEE Trans. Inf. Theory 18(4), 1972), which gives
a lower bound wherever it is stopped. No codec for entries drawn in this way is below it, however long its blocks
are; a codec that finds structure inside an array may be. In both, side information (names, scales, tables) costs
nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import NamedArrays, num_values, squared_norm

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # rates, normalised squared errors
BINS = 128
SLOPES = np.geomspace(0.5, 3000, 36)  # nats per entry that an error as large as the values costs


def gaussian(update: NamedArrays) -> Curve:
    """Return the bound for Gaussians of the arrays' variances about zero."""
    sizes = np.array([array.size for array in update.values()], np.float64)
    variances = np.array([np.mean(np.square(array, dtype=np.float64)) for array in update.values()])
    water = np.geomspace(variances.max(), variances[variances > 0].min() / 2**20, 400)[:, None]
    errors = (sizes * np.minimum(water, variances)).sum(axis=1)
    bits = (sizes * np.log2(np.maximum(variances / water, 1)) / 2).sum(axis=1)
    return bits / sizes.sum(), errors / (sizes * variances).sum()


def empirical(update: NamedArrays, iterations: int = 60) -> Curve:
    """Return the bound for the arrays' histograms of 128 bins, as the upper envelope of its tangents."""
    share, points, peaks = _histograms(update)
    weights = np.array([array.size for array in update.values() if array.any()], np.float64) / num_values(update)
    energy = squared_norm(update) / num_values(update)
    squares = np.square(points[:, :, None] - points[:, None, :])
    output, heights = np.full(share.shape, 1 / BINS), []
    for slope in SLOPES / energy:
        kernel = np.exp(-slope * np.square(peaks)[:, None, None] * squares)
        output, nats = _blahut(share, kernel, output, iterations)
        heights.append(weights @ nats)
    errors = np.geomspace(1, 1e-4, 200)
    tangents = np.array(heights)[:, None] - SLOPES[:, None] * errors
    return np.maximum(tangents.max(axis=0), 0) / np.log(2), errors


def _histograms(update: NamedArrays) -> tuple[NDArray[np.float64], ...]:
    """Return the share and the mean of each bin, shape (arrays, bins), in units of the array's peak; the peaks."""
    shares, points, peaks = [], [], []
    for array in update.values():
        if not array.any():
            continue
        values = array.ravel().astype(np.float64)
        peak = float(np.abs(values).max())
        counts, edges = np.histogram(values / peak, BINS, (-1, 1))
        sums, _ = np.histogram(values / peak, BINS, (-1, 1), weights=values / peak)
        middle = (edges[1:] + edges[:-1]) / 2
        shares.append(counts / values.size)
        points.append(np.where(counts > 0, sums / np.maximum(counts, 1), middle))
        peaks.append(peak)
    return np.array(shares), np.array(points), np.array(peaks)


def _blahut(
    share: NDArray[np.float64], kernel: NDArray[np.float64], output: NDArray[np.float64], iterations: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return output distributions, and where the tangents meet error 0, in nats; `output` is where to start."""
    output = 0.9 * output + 0.1 / BINS  # what is near zero would stay there for long
    for _ in range(iterations):
        inside = np.maximum((kernel @ output[:, :, None])[:, :, 0], 1e-300)
        gain = ((share / inside)[:, None, :] @ kernel)[:, 0]
        output = output * gain
    return output, -(share * np.log(inside)).sum(axis=1) - np.log(gain.max(axis=1))


def at(rate: float, curve: Curve) -> float:
    """Return the error of a curve at a rate, its logarithm interpolated."""
    rates, errors = curve
    order = np.argsort(rates)
    return float(np.exp(np.interp(rate, rates[order], np.log(np.maximum(errors[order], 1e-12)))))
