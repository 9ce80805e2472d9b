"""Whether a fit is what it says, found out from the data and the coefficients alone.

Nothing here is the library's: influences are the textbook's, in NumPy's long double; residuals are
taken anew from the data and what was returned. A coefficient in the working precision is off by
half a unit in its last place even if it is right, so each residual is known to within
`FACTOR eps (|y| + |intercept| + sum |x| |coefficient| + size)` of its own row: `Evidence.noise`,
where `size` is the middle of how far y is from its median, of those not on it. A law is broken
where no residuals within their noise obey it, to `SLACK`, which is what the library promises
beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.special import erf

Long = np.longdouble
FACTOR = 64
SLACK = {np.dtype("f8"): 1e-9, np.dtype("f4"): 1e-4}
MAD = 1.4826022185056018
_LONG_RANGE = 1e8  # of weights, beyond which HiGHS's tolerances are not small


class Problem(NamedTuple):
    """Data, of the rows that count, in long double."""

    X: np.ndarray
    y: np.ndarray
    w: np.ndarray
    intercept: bool
    dtype: np.dtype

    @property
    def columns(self) -> np.ndarray:
        ones = np.ones((len(self.y), int(self.intercept)), Long)
        return np.concatenate([ones, self.X], axis=1)


class Evidence(NamedTuple):
    """What the coefficients make of the rows."""

    e: np.ndarray
    """y - intercept - X coefficients"""
    noise: np.ndarray
    """how far off each may be by rounding"""
    Q: np.ndarray
    """columns that span X's, of one size and close to orthogonal"""


def problem(X, y, w, intercept: bool) -> Problem:
    w = np.ones(len(y)) if w is None else np.asarray(w)
    counts = w > 0
    X, y, w = np.asarray(X), np.asarray(y), w.astype(Long)
    w = w[counts] / w[counts].max() if counts.any() else w[counts]
    return Problem(X[counts].astype(Long), y[counts].astype(Long), w, intercept, y.dtype)


def evidence(of: Problem, coefficients, intercept) -> Evidence:
    b, a = np.asarray(coefficients, Long), Long(intercept)
    e = of.y - a - of.X @ b
    size = np.abs(of.y) + abs(a) + np.abs(of.X) @ np.abs(b) + size_of(of.y, of.intercept)
    return Evidence(e, FACTOR * Long(np.finfo(of.dtype).eps) * size, basis(of))


def size_of(y: np.ndarray, centers: bool = True) -> np.ndarray:
    """Of what is not at the median, if anything is not: no wild entry moves it."""
    off = np.abs(y - np.median(y)) if centers else np.abs(y)
    return np.median(off[off > 0]) if np.any(off > 0) else np.max(np.abs(y), initial=0)


def basis(of: Problem) -> np.ndarray:
    """Of the space of the columns, but for what they span by rounding alone."""
    Z = of.X - np.median(of.X, axis=0) if of.intercept else of.X.copy()
    size = np.median(np.abs(Z), axis=0)
    size = np.where(size > 0, size, np.max(np.abs(Z), axis=0))
    Z = Z / np.where(size > 0, size, 1)
    if of.intercept:
        Z = np.concatenate([np.ones((len(Z), 1), Long), Z], axis=1)
    near = 1 / (1 + np.sum(Z * Z, axis=1) / Z.shape[1])
    # A column with next to nothing of its own says nothing that rounding does not.
    least = 1e-7 if of.dtype == np.dtype("f8") else 2e-3
    kept: list[np.ndarray] = []
    for column in Z.T:
        rest, length = column.copy(), np.sqrt(np.sum(near * column**2))
        for _ in range(2):
            for q in kept:
                rest = rest - q * np.sum(near * q * rest)
        left = np.sqrt(np.sum(near * rest**2))
        if left > least * length:
            kept.append(rest / left)
    return np.stack(kept, axis=1) if kept else np.zeros((len(Z), 0), Long)


# Influences of a residual e = y - fit, at the width d; textbook.


def _clip(e, d):
    return np.clip(e, -d, d)


PSI: dict[str, Callable[..., np.ndarray]] = {
    "squared_error": lambda e, d: e,
    "huber": _clip,
    "log_cosh": lambda e, d: d * np.tanh(e / d),
    "pseudo_huber": lambda e, d: e / np.hypot(1, e / d),
    "fair": lambda e, d: e / (1 + np.abs(e) / d),
    "cauchy": lambda e, d: e / (1 + (e / d) ** 2),
    "welsch": lambda e, d: e * np.exp(-((e / d) ** 2)),
    "tukey": lambda e, d: np.where(np.abs(e) <= d, e * (1 - (e / d) ** 2) ** 2, 0),
    "expectile": lambda e, d, q: np.where(e > 0, q, 1 - q) * e,
    "quantile_huber": lambda e, d, q: np.where(e > 0, q, 1 - q) * _clip(e, d),
}
RHO: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    # Bounded by 1, and the width at which an S-estimate has a breakdown point of 1/2.
    "tukey": (lambda u: 1 - (1 - np.minimum(u * u, 1)) ** 3, 1.547644980928226),
    "welsch": (lambda u: -np.expm1(-u * u), 0.8164965809277261),
}


def equations(of: Problem, at: Evidence, psi: Callable[[np.ndarray], np.ndarray]) -> float:
    """How much the worst equation is off, in what rounding and slack allow: at most 1.

    `|sum w psi q|` beside `SLACK sum w |psi| |q|` and what noise can change it by.
    """
    pull, bend = psi(at.e), np.zeros_like(at.e)
    for side in (-1, 1):
        bend = np.maximum(bend, np.abs(psi(at.e + side * at.noise) - pull))
    size = of.w[:, None] * np.abs(at.Q)
    off = np.abs((of.w * pull) @ at.Q)
    allowed = SLACK[of.dtype] * (np.abs(pull) @ size) + bend @ size
    # Nothing allowed, nothing off: all rows are fitted, or flat.
    ratio = np.where(off == 0, 0, off / np.where(allowed > 0, allowed, np.finfo(Long).tiny))
    return float(np.max(ratio, initial=0))


def _halves(x: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """The lowest and highest number with at most half of the weight on either side."""
    order = np.argsort(x)
    x, w = x[order], np.cumsum(w[order]) / np.sum(w)
    low = x[np.searchsorted(w, 0.5 - 1e-6)]
    high = x[min(np.searchsorted(w, 0.5 + 1e-6, side="right"), len(x) - 1)]
    return low, high


def mad(of: Problem, at: Evidence, scale: float) -> float:
    """How far the MAD about 0 is from the scale, in what noise and slack allow."""
    slack = SLACK[of.dtype]
    if np.all(of.w == of.w[0]):
        low = np.median(np.maximum(np.abs(at.e) - at.noise, 0))
        high = np.median(np.abs(at.e) + at.noise)
    else:  # a sum of weights that is next to a half may count as either
        low = _halves(np.maximum(np.abs(at.e) - at.noise, 0), of.w)[0]
        high = _halves(np.abs(at.e) + at.noise, of.w)[1]
    s = Long(scale) / MAD
    if low * (1 - slack) <= s <= high * (1 + slack):
        return 0.0
    return float(max(low - s, s - high) / (slack * max(high, s)))


def proposal2(of: Problem, at: Evidence, scale: float, rank: tuple[int, ...], k=1.345) -> float:
    """How far sum(clip(e/s)**2) is from (n - p) beta, in what noise and slack allow."""
    inner = erf(k / math.sqrt(2))
    beta = inner - k * math.exp(-0.5 * k * k) * math.sqrt(2 / math.pi) + k * k * (1 - inner)
    total = np.sum(of.w)
    unit = np.sum(of.w**2) / total
    size = np.abs(at.e)

    def square(r: np.ndarray) -> np.ndarray:
        return np.sum(of.w * np.minimum(r / Long(scale), k) ** 2)

    low, high, slack = square(np.maximum(size - at.noise, 0)), square(size + at.noise), 1e-7
    slack = max(slack, 10 * SLACK[of.dtype])
    worst = [
        max(low - beta * (total - p * unit), beta * (total - p * unit) - high) / (slack * total)
        for p in rank
    ]
    return float(max(0, min(worst)))


def fitted(of: Problem, at: Evidence) -> bool:
    """Whether half of the weight is met to rounding, so that a scale may be 0."""
    ones = at.noise + np.median(at.noise)
    return bool(np.sum(of.w[np.abs(at.e) <= 2 * ones]) >= (0.5 - 1e-6) * np.sum(of.w))


class Vertex(NamedTuple):
    """How far 0 is inside the set of slopes, as a share of the kinks' room: < 0, it is outside."""

    inside: float
    full: bool
    """whether the rows that are met determine the coefficients"""


def vertex(of: Problem, at: Evidence, q: float, claimed: np.ndarray) -> Vertex:
    """The dual of a quantile regression at the rows that are met, which knows no units of y.

    At an optimum each row that is met takes a slope between `q - 1` and `q` so that all slopes
    balance; it is the only one if that can be done with room to spare, and rows met suffice to
    determine it. `claimed` are rows that the fit says it meets, which another law looks at.
    """
    met = (np.abs(at.e) <= at.noise) | claimed
    Q = at.Q / np.max(np.abs(at.Q), axis=0)
    pull = ((of.w * np.where(at.e > 0, q, q - 1))[~met] @ Q[~met]).astype(float)
    A = (of.w[met, None] * Q[met]).T.astype(float)
    m, k = int(np.sum(met)), Q.shape[1]
    # d = center + room z, |z| <= 1 - t; most t such that A d = -pull.
    center, room = q - 0.5, 0.5
    right = -(pull + A @ np.full(m, center))
    unit = np.maximum(np.sum(np.abs(A), axis=1) * room, 1e-300)
    if not m:
        return Vertex(-np.inf if np.any(pull) else 0.0, k == 0)
    full = bool(np.linalg.matrix_rank(Q[met].astype(float), tol=1e-9) == k)
    if m == k and full:
        # Weights of a long range stay out of the matrix, where they would cost all digits.
        slopes = np.linalg.solve(Q[met].T.astype(float), -pull) / of.w[met].astype(float)
        return Vertex(1 - float(np.max(np.abs(slopes - center))) / room, full)
    A, right = A * room / unit[:, None], right / unit
    cost = np.r_[np.zeros(m), 1.0]  # minimise the largest |z|
    eye, ones = np.eye(m), np.ones((m, 1))
    done = linprog(
        cost,
        A_ub=np.block([[eye, -ones], [-eye, -ones]]), b_ub=np.zeros(2 * m),
        A_eq=np.c_[A, np.zeros(k)], b_eq=right,
        bounds=[(None, None)] * m + [(0, None)],
        method="highs", options={"primal_feasibility_tolerance": 1e-10},
    )  # fmt: skip
    return Vertex(1 - float(done.x[-1]) if done.status == 0 else -np.inf, full)


def objective(of: Problem, at: Evidence, q: float) -> tuple[float, float, float]:
    """The total loss of a quantile regression, HiGHS's optimum, and what noise can change."""
    size = size_of(of.y)
    size = size if size > 0 else 1
    Q = (at.Q / np.max(np.abs(at.Q), axis=0)).astype(float)
    w, y = of.w.astype(float), (of.y / size).astype(float)
    n, k = Q.shape
    least = linprog(
        np.r_[np.zeros(k), q * w, (1 - q) * w],
        A_eq=np.c_[Q, np.eye(n), -np.eye(n)], b_eq=y,
        bounds=[(None, None)] * k + [(0, None)] * 2 * n, method="highs",
    )  # fmt: skip
    here = float(np.sum(of.w * np.where(at.e > 0, q, q - 1) * at.e) / size)
    lowest = float(least.fun)
    if np.max(of.w) > _LONG_RANGE * np.min(of.w, where=of.w > 0, initial=np.inf):
        # HiGHS meets rows to 1e-7, which heavy weights turn into anything: what its coefficients
        # really give counts.
        e = of.y / size - at.Q / np.max(np.abs(at.Q), axis=0) @ least.x[:k].astype(at.Q.dtype)
        lowest = float(np.sum(of.w * np.where(e > 0, q, q - 1) * e))
    return here, lowest, float(np.sum(of.w * at.noise) / size)


def m_scale(e: np.ndarray, w: np.ndarray, loss: str, share: float) -> np.ndarray:
    """The s at which the mean of the bounded loss of e / s is `share`; for each row of e.

    0 where fewer than that are not 0. Where just as many are not, any small s would do: it is
    the one beyond which the first of them counts in full.
    """
    rho, width = RHO[loss]
    size, w = np.abs(e), w / np.sum(w)
    least = np.min(size, axis=-1, where=size > 0, initial=np.inf)
    exact = np.sum(w * (size > 0), axis=-1) <= share * (1 - 1e-6)
    # The mean is at least the share where all that is not 0 is flat, and at most where all is near.
    low = np.where(exact, 1.0, 0.99 * least / width)
    high = np.where(exact, 1.0, np.max(size, axis=-1) / (width * math.sqrt(share / 4)))
    for _ in range(80):
        middle = np.sqrt(low) * np.sqrt(high)
        above = np.mean(w * rho(size / (middle[..., None] * width)), axis=-1) * w.size > share
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(exact, 0.0, high)


def s_scale(of: Problem, at: Evidence, loss: str) -> float:
    """The least M-scale: from `at`, and every subset of as many rows as coefficients, refined.

    An upper bound: with a loss that is nowhere flat another minimum may be lower yet.
    """
    Q, (n, k) = at.Q.astype(float), at.Q.shape
    unit = float(size_of(of.y))
    unit = unit if unit > 0 else 1.0
    y, w = (of.y / unit).astype(float), of.w.astype(float)
    count = np.sum(w) ** 2 / np.sum(w * w)
    share = max(0.5 * (1 - k / count), 0.5 / count)
    rows = np.array(list(combinations(range(n), k)))
    rows = rows[np.abs(np.linalg.det(Q[rows])) > 1e-9]
    e = y - np.linalg.solve(Q[rows], y[rows][..., None])[..., 0] @ Q.T
    np.put_along_axis(e, rows, 0, axis=1)  # to the last digit
    e[np.abs(e) < 1e-12 * (1 + np.abs(y))] = 0
    e = np.concatenate([e, (at.e / unit).astype(float)[None]])
    s = m_scale(e, w, loss, share)
    first = np.r_[np.argsort(s)[:12], len(s) - 1]
    e, s = e[first], s[first]
    for _ in range(400):
        u = e / (np.where(s > 0, s, 1)[:, None] * RHO[loss][1])
        pull = w * (np.maximum(1 - u * u, 0) ** 2 if loss == "tukey" else np.exp(-u * u))
        normal = np.einsum("si,ij,ik->sjk", pull, Q, Q) + 1e-14 * np.eye(k)
        b = np.linalg.solve(normal, ((pull * y) @ Q)[..., None])[..., 0]
        new = y - b @ Q.T
        there = m_scale(new, w, loss, share)
        better = (there < s * (1 - 1e-7)) & (s > 0)
        e, s = np.where(better[:, None], new, e), np.where(better, there, s)
        if not np.any(better):
            break
    return float(np.min(s) * unit)
