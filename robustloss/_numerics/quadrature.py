"""Integrals over the residual, to rounding, of functions with kinks and jumps anywhere.

In NumPy, in float64: the integrand is called with many points at a time, so it may be compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Integrand = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`f(r, i)`: the values at r, a row for each function, of the i-th of n integrands."""

_SPLIT = 16
_TOLERANCE = 1e-15


def _weights(nodes: np.ndarray) -> np.ndarray:
    """Of the rule on these nodes in [-1, 1] that is exact for polynomials of a degree < n."""
    n = nodes.size
    return np.linalg.solve(np.polynomial.legendre.legvander(nodes, n - 1).T, 2 * np.eye(n)[0])


# Clenshaw and Curtis's nodes: with both ends among them, no kink hides in a corner.
_NODES = np.sin(np.pi / 16 * np.arange(-8, 9))
_WEIGHTS = _weights(_NODES)
_COARSE = np.insert(_weights(np.delete(_NODES, 8)), 8, 0.0)  # does without the middle


def integrals(f: Integrand, n: int, at_least: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The integrals over r of `f(r, i)`, some functions for each i < n, and those of |f|.

    Intervals where two rules differ are split until what they differ by is rounding in the
    integral of |f|, or in `at_least`: so those with a kink or a jump shrink onto it.
    """
    edges = np.append(0.0, 2.0 ** np.arange(-24, 6.5, 0.5))
    edges = np.append(-edges[:0:-1], edges)
    i = np.arange(n).repeat(edges.size - 1)
    low, high = np.tile(edges[:-1], n), np.tile(edges[1:], n)
    parts, errors, sizes = _rule(f, low, high, i)
    for _ in range(32):
        size = np.maximum(_sums(sizes, i, n), at_least)
        off = _relative(errors, size, i)
        split = np.flatnonzero(off > _TOLERANCE)
        if not split.size:
            break
        split = split[np.argsort(-off[split])[: 64 * n]]
        cuts = np.linspace(low[split], high[split], _SPLIT + 1)
        new = cuts[:-1].ravel(), cuts[1:].ravel(), np.tile(i[split], _SPLIT)
        found = _rule(f, *new)
        # A kink is in one part of an interval; where most parts are off, if little, it is by
        # noise, such as that of a loss in float32, and splitting does not help.
        rough = _relative(found[1], size, new[2]).reshape(_SPLIT, -1) > _TOLERANCE
        noisy = (np.sum(rough, axis=0) > _SPLIT / 2) & (off[split] < 1e-6)
        found[1][:, np.tile(noisy, _SPLIT)] = 0.0
        old = parts, errors, sizes, low, high, i
        parts, errors, sizes, low, high, i = (
            np.concatenate([np.delete(o, split, axis=-1), x], axis=-1)
            for o, x in zip(old, (*found, *new), strict=True)
        )
    return _sums(parts, i, n), _sums(sizes, i, n)


def _relative(errors: np.ndarray, size: np.ndarray, i: np.ndarray) -> np.ndarray:
    return np.max(errors / size[:, i], axis=0)


def _rule(
    f: Integrand,
    low: np.ndarray,
    high: np.ndarray,
    i: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The integral over each interval, how far two rules differ on it, and that of |f|."""
    half = (high - low) / 2
    r = ((low + high) / 2)[:, None] + half[:, None] * _NODES
    r = np.where(r == 0, np.sign(low + high)[:, None] * 1e-20, r)  # 0 from its own side
    y = f(r.ravel(), i.repeat(_NODES.size))
    y = y.reshape(-1, *r.shape) * half[:, None]
    return y @ _WEIGHTS, np.abs(y @ (_WEIGHTS - _COARSE)), np.abs(y) @ _WEIGHTS


def _sums(parts: np.ndarray, i: np.ndarray, n: int) -> np.ndarray:
    return np.stack([np.bincount(i, weights=part, minlength=n) for part in parts])
