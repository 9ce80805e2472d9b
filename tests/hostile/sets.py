"""Seeded data sets of the kinds that break linear fits."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Random = np.random.Generator


class Set(NamedTuple):
    """One data set, in the numbers a fit is given."""

    kind: str
    seed: int
    X: np.ndarray
    y: np.ndarray
    w: np.ndarray | None


Made = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _plain(random: Random, n: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    X = random.normal(size=(n, p))
    return X, X @ random.normal(size=p) + random.normal() + random.standard_t(3, n)


def plain(random: Random, n: int, p: int, wide: bool) -> Made:
    return *_plain(random, n, p), None


def integers(random: Random, n: int, p: int, wide: bool) -> Made:
    """Small integers: ties, rows that are met by chance, equations with several solutions."""
    size = random.choice([2, 4, 9])
    X = random.integers(-size, size + 1, (n, p)).astype(float)
    return X, random.integers(-size, size + 1, n).astype(float), None


def discretised(random: Random, n: int, p: int, wide: bool) -> Made:
    X, y = _plain(random, n, p)
    return np.round(2 * X) / 2, np.round(y), None


def constant_column(random: Random, n: int, p: int, wide: bool) -> Made:
    X, y = _plain(random, n, p)
    X[:, random.integers(p)] = random.choice([0.0, 1.0, -7.3, 1e6])
    return X, y, None


def duplicate_column(random: Random, n: int, p: int, wide: bool) -> Made:
    X, y = _plain(random, n, p)
    X[:, -1] = X[:, 0] * random.choice([1.0, -2.0, 0.3])
    return X, y, None


def near_collinear(random: Random, n: int, p: int, wide: bool) -> Made:
    X, y = _plain(random, n, p)
    apart = 10 ** random.uniform(-9 if wide else -4, 0)
    X[:, -1] = (X[:, 0] if p > 1 else 1.0) + apart * X[:, -1]
    return X, y, None


def far_from_0(random: Random, n: int, p: int, wide: bool) -> Made:
    """Columns and y that lie a million of their spreads away."""
    X, y = _plain(random, n, p)
    far = 10 ** random.uniform(1, 7 if wide else 3)
    return X + far * random.normal(size=p), y + far, None


def exact(random: Random, n: int, p: int, wide: bool) -> Made:
    X = random.integers(-5, 6, (n, p)).astype(float)
    return X, X @ random.integers(-3, 4, p) + random.integers(-3, 4), None


def mostly_exact(random: Random, n: int, p: int, wide: bool) -> Made:
    """60 to 95 % of the rows on one plane."""
    X, y, _ = exact(random, n, p, wide)
    off = random.uniform(size=n) > random.uniform(0.6, 0.95)
    return X, y + off * random.normal(0, 3, n), None


def mostly_one_number(random: Random, n: int, p: int, wide: bool) -> Made:
    X, y = _plain(random, n, p)
    return X, np.where(random.uniform(size=n) < random.uniform(0.3, 0.9), 0.0, y), None


def units(random: Random, n: int, p: int, wide: bool) -> Made:
    """Columns and y in units from 1e-30 to 1e30, each its own."""
    X, y = _plain(random, n, p)
    ends = 30 if wide else 15
    of_y, of_x = 10.0 ** random.uniform(-ends, ends), 10.0 ** random.uniform(-ends, ends, p)
    if not wide:  # or the coefficients cannot be told in float32
        of_x = of_y * 10.0 ** random.uniform(-15, 15, p)
        of_x = np.clip(of_x, 1e-30, 1e30)
    return X * of_x, y * of_y, None


def outliers(random: Random, n: int, p: int, wide: bool) -> Made:
    """Up to 49 % of y."""
    X, y = _plain(random, n, p)
    bad = random.permutation(n) < random.uniform(0.05, 0.49) * n
    far = 10 ** random.uniform(0.5, 6 if wide else 4)
    return X, np.where(bad, far * (1 + 0.1 * random.normal(size=n)), y), None


def leverage(random: Random, n: int, p: int, wide: bool) -> Made:
    """One row, or some, as far off in X as 1e7."""
    X, y = _plain(random, n, p)
    bad = random.permutation(n) < max(1, random.choice([0, 0.1, 0.3]) * n)
    X[bad] *= 10 ** random.uniform(1, 7 if wide else 4)
    return X, y, None


def wild(random: Random, n: int, p: int, wide: bool) -> Made:
    """One y, as far off as 1e16."""
    X, y = _plain(random, n, p)
    y[random.integers(n)] = random.choice([-1, 1]) * 10 ** random.uniform(6, 16 if wide else 12)
    return X, y, None


def weights(random: Random, n: int, p: int, wide: bool) -> Made:
    """Of 1e-30 to 1e30, of like size or not; some are 0."""
    X, y = _plain(random, n, p)
    w = 10 ** random.uniform(-1, 1, n) * 10 ** random.uniform(-29, 29)
    if random.uniform() < 0.3:
        w = 10 ** random.uniform(-30, 30, n)
    if random.uniform() < 0.3:
        w = w * (random.uniform(size=n) < 0.8)
    return X, y, w


def groups(random: Random, n: int, p: int, wide: bool) -> Made:
    """Columns of zeros and ones, some of few ones."""
    X = (random.uniform(size=(n, p)) < random.uniform(0.05, 0.5, p)).astype(float)
    return X, X @ random.normal(size=p) + random.standard_t(3, n), None


def few(random: Random, n: int, p: int, wide: bool) -> Made:
    """Hardly more rows than coefficients."""
    n = min(n, p + 1 + random.integers(3))
    return *_plain(random, n, p), None


def heavy(random: Random, n: int, p: int, wide: bool) -> Made:
    """Cauchy's errors and columns."""
    X = random.standard_t(1, (n, p))
    return X, X @ random.normal(size=p) + random.standard_t(1, n), None


def mixed(random: Random, n: int, p: int, wide: bool) -> Made:
    """Several of these at once."""
    X, y, _ = [integers, far_from_0, leverage, groups][random.integers(4)](random, n, p, wide)
    n = len(y)
    if random.uniform() < 0.5:
        y = np.where(random.permutation(n) < 0.2 * n, 100.0, y)
    if random.uniform() < 0.3:
        y[0] = 1e9
    unit = 10 ** random.uniform(-4, 4)
    return X * unit, y, random.integers(0, 4, n) + 0.0 if random.uniform() < 0.5 else None


KINDS: dict[str, Callable[..., Made]] = {
    f.__name__: f
    for f in (
        plain, integers, discretised, constant_column, duplicate_column, near_collinear,
        far_from_0, exact, mostly_exact, mostly_one_number, units, outliers, leverage, wild,
        weights, groups, few, heavy, mixed,
    )
}  # fmt: skip

# Which have an answer, and but one, that a peer finds too.
SOUND = ("plain", "units", "outliers", "far_from_0", "wild", "leverage", "heavy", "near_collinear")


def made(
    kind: str, seed: int, n: int, p: int, dtype: type = np.float64, *, full: bool = False
) -> Set:
    """The set of a kind and a seed, of at most n rows (`full`: of n), rounded to the dtype."""
    random = np.random.default_rng([seed, zlib.crc32(kind.encode()), n, p])
    rows = int(random.integers(min(p + 3, n), n + 1))
    X, y, w = KINDS[kind](random, n if full else rows, p, dtype == np.float64)
    if w is not None and not np.sum(w > 0) > p:
        w = np.ones(len(y))
    tiny = float(np.finfo(dtype).tiny)  # XLA takes what is smaller for 0

    def rounded(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < tiny, 0, x).astype(dtype)

    return Set(kind, seed, rounded(X), rounded(y), None if w is None else rounded(w))
