"""Integrals over the residual, to rounding, of functions with kinks and jumps anywhere.

In NumPy, in float64. The integrand is called with many points at a time, so it may be compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Integrand = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`f(r, i)`: some functions of the i-th of n integrands at r, one function in each row."""

_PARTS = 16  # that an interval is split into
_TOLERANCE = 1e-15  # of the error of an interval, relative to the integral of |f|: rounding
_MAX_PASSES = 32
# Intervals split in one pass, for each integrand, those with the largest errors first: a bound of
# the work and the memory of a pass.
_SPLITS_PER_PASS = 64
_NOISE = 1e-6  # the relative error up to which an interval may be rough by noise alone


def _rule_weights(nodes: np.ndarray) -> np.ndarray:
    """The weights of the rule on n nodes in [-1, 1] that is exact for polynomials of degree < n."""
    n = nodes.size
    return np.linalg.solve(np.polynomial.legendre.legvander(nodes, n - 1).T, 2 * np.eye(n)[0])


# Clenshaw and Curtis's nodes. Both ends are among them, so that a kink near an end is noticed.
_NODES = np.sin(np.pi / 16 * np.arange(-8, 9))
_WEIGHTS = _rule_weights(_NODES)
# The rule without the middle node, to estimate the error with.
_COARSE_WEIGHTS = np.insert(_rule_weights(np.delete(_NODES, 8)), 8, 0.0)


def integrals(f: Integrand, n: int, at_least: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The integrals over r of `f(r, i)` and of its absolute value, for each i < n.

    An interval on which two rules differ is split, until the difference is rounding in the integral
    of |f|, or in `at_least` if that is larger. So the intervals with a kink or a jump shrink onto
    it.

    Returns:
        Two arrays of shape (functions, n).
    """
    edges = np.append(0.0, 2.0 ** np.arange(-24, 6.5, 0.5))
    edges = np.append(-edges[:0:-1], edges)
    i = np.arange(n).repeat(edges.size - 1)
    low, high = np.tile(edges[:-1], n), np.tile(edges[1:], n)
    parts, errors, sizes = _apply_rules(f, low, high, i)
    for _ in range(_MAX_PASSES):
        size = np.maximum(_sums(sizes, i, n), at_least)
        relative = _relative_errors(errors, size, i)
        split = np.flatnonzero(relative > _TOLERANCE)
        if not split.size:
            break
        split = split[np.argsort(-relative[split])[: _SPLITS_PER_PASS * n]]
        cuts = np.linspace(low[split], high[split], _PARTS + 1)
        intervals = cuts[:-1].ravel(), cuts[1:].ravel(), np.tile(i[split], _PARTS)
        results = _apply_rules(f, *intervals)
        # A kink lies in one part of an interval. If most parts have a small error, the error is
        # noise, such as that of a loss in float32, and splitting does not help.
        rough = _relative_errors(results[1], size, intervals[2]).reshape(_PARTS, -1) > _TOLERANCE
        noisy = (np.sum(rough, axis=0) > _PARTS / 2) & (relative[split] < _NOISE)
        results[1][:, np.tile(noisy, _PARTS)] = 0.0
        before = parts, errors, sizes, low, high, i
        parts, errors, sizes, low, high, i = (
            np.concatenate([np.delete(old, split, axis=-1), new], axis=-1)
            for old, new in zip(before, (*results, *intervals), strict=True)
        )
    return _sums(parts, i, n), _sums(sizes, i, n)


def _relative_errors(errors: np.ndarray, size: np.ndarray, i: np.ndarray) -> np.ndarray:
    """The error of each interval relative to its integrand's size, the largest over functions."""
    return np.max(errors / size[:, i], axis=0)


def _apply_rules(
    f: Integrand,
    low: np.ndarray,
    high: np.ndarray,
    i: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The integral of f over each interval, the difference of two rules, the integral of |f|."""
    half = (high - low) / 2
    r = ((low + high) / 2)[:, None] + half[:, None] * _NODES
    # A node at 0 moves into its interval, so that a jump at 0 has the value of the interval's side.
    r = np.where(r == 0, np.sign(low + high)[:, None] * 1e-20, r)
    y = f(r.ravel(), i.repeat(_NODES.size))
    y = y.reshape(-1, *r.shape) * half[:, None]
    return y @ _WEIGHTS, np.abs(y @ (_WEIGHTS - _COARSE_WEIGHTS)), np.abs(y) @ _WEIGHTS


def _sums(parts: np.ndarray, i: np.ndarray, n: int) -> np.ndarray:
    """The sums over the intervals of each integrand, (functions, n)."""
    return np.stack([np.bincount(i, weights=part, minlength=n) for part in parts])
