"""From timings to the constants of `cost`: fits that single slow samples do not pull."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from statistics import median

import numpy as np

from .cost import FS, PS, ExpertCost, LinkCost


def fit_link(samples: Iterable[tuple[int, int]]) -> LinkCost:
    """The link that explains samples of (bytes, ns) best.

    The median of each size counts, by its relative error, so that small sizes give alpha and large ones beta.

    Raises:
        ValueError: with fewer than two different sizes, or times that are not above 0.
    """
    points = _medians(samples)
    if len(points) < 2:
        raise ValueError(f"samples has {len(points)} different sizes; at least 2 are needed to tell alpha from beta")
    alpha, beta, _ = _fit_line(np.array([size for (size,), _ in points]), np.array([ns for _, ns in points]))
    return LinkCost(round(alpha), round(FS * beta))


def fit_experts(samples: Iterable[tuple[int, int, int]]) -> ExpertCost:
    """The expert cost that explains samples of (experts touched, rows, ns) best.

    Given the rows per expert at which streaming ends, the model is a line in `max(crossover * experts, rows)`; the
    crossover is searched between the samples' smallest and largest. A regime that no sample is in gets the largest
    cost that the samples allow.

    Raises:
        ValueError: with fewer than three different (experts, rows), no rows in any, or times that are not above 0.
    """
    points = _medians(samples)
    if len(points) < 3:
        raise ValueError(f"samples has {len(points)} different (experts, rows); at least 3 are needed")
    experts, rows = np.array([x for x, _ in points], dtype=float).T
    times = np.array([ns for _, ns in points])
    busy = (experts > 0) & (rows > 0)
    if not busy.any():
        raise ValueError("samples has no rows in any; give some experts work")
    ratios = rows[busy] / experts[busy]
    low, high = float(ratios.min()), float(ratios.max())
    fits: dict[float, tuple[float, float, float]] = {}
    for _ in range(3):  # each round looks closer around the best so far
        for crossover in np.geomspace(low, high, 41).tolist():
            fits[crossover] = _fit_line(np.maximum(crossover * experts, rows), times)
        best = min(fits, key=lambda q: (fits[q][2], q))
        tried = sorted(fits)
        at = tried.index(best)
        low, high = tried[max(at - 1, 0)], tried[min(at + 1, len(tried) - 1)]
    base, per_row, _ = fits[best]
    return ExpertCost(round(base), round(best * per_row), round(PS * per_row))


def _medians(samples: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], float]]:
    """The median time of each input; a sample is its input's numbers, then its time. In order of the inputs."""
    times: dict[tuple[int, ...], list[int]] = {}
    for sample in samples:
        *inputs, ns = map(index, sample)
        if ns <= 0 or min(inputs) < 0:
            raise ValueError(f"samples has {tuple(sample)}; sizes cannot be below 0 and times must be above 0 ns")
        times.setdefault(tuple(inputs), []).append(ns)
    return sorted((inputs, float(median(ns))) for inputs, ns in times.items())


def _fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Intercept and slope, neither below 0, with the smallest sum of relative absolute errors, and that sum.

    Such a line goes through two of the points, or through one with the slope or the intercept at 0: all are tried.
    Absolute errors, not their squares, so that a point that is far off does not pull the line.
    """
    i, j = np.triu_indices(len(x), 1)
    i, j = i[x[i] != x[j]], j[x[i] != x[j]]
    slope = (y[j] - y[i]) / (x[j] - x[i])
    level, through_zero = np.zeros(len(y)), y[x > 0] / x[x > 0]
    intercepts = np.concatenate([y, y[i] - slope * x[i], np.zeros(len(through_zero))])
    slopes = np.concatenate([level, slope, through_zero])
    possible = (intercepts >= 0) & (slopes >= 0)
    intercepts, slopes = intercepts[possible], slopes[possible]
    errors = (np.abs(intercepts[:, None] + slopes[:, None] * x - y) / y).sum(1)
    best = int(errors.argmin())
    return float(intercepts[best]), float(slopes[best]), float(errors[best])
