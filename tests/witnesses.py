"""An independent truth for every loss: textbook formulas, in mpmath and in NumPy's float64.

`TRUTH[name](r, delta)` is the value, `TRUTH[name](r, delta, m, n)` its derivative, m times in r
and n times in delta (m + n <= 3), for numbers that are not at a kink (there: what the design
says is taken). A loss without `delta` ignores it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpmath import mp, mpf

mp.dps = 50

DELTAS = (1.0, 1.345, 1.9999, 0.1, 3.3, 1e-3, 12345.678, 1e-30, 1e30)
Ulps = tuple[float, float, float]


@dataclass(frozen=True)
class Witness:
    value: Callable[[mpf, mpf], mpf]
    """The textbook formula, of r and delta."""
    profile: Callable[[mpf], tuple[mpf, mpf, mpf]]
    """f', f'', f''' at u, where the loss is delta**2 f(r / delta)."""
    bulk: Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray, np.ndarray]]
    """Value, slope and curvature in float64, for float32 magnitudes."""
    ulps: Ulps
    """The accepted error of value, slope and curvature in float32, at any delta."""
    deltas: tuple[float, ...] = DELTAS
    kinks: tuple[float, ...] = ()
    """r / delta >= 0 where a derivative jumps."""

    def __call__(self, r: float, delta: float = 1.0, m: int = 0, n: int = 0) -> mpf:
        r, d = mpf(float(r)), mpf(float(delta))
        if m == n == 0:
            return self.value(r, d)
        u = r / d
        f1, f2, f3 = self.profile(u)
        if m + n == 3:
            return (-u) ** n * f3 / d
        f = self.value(r, d) / d**2
        return {
            (1, 0): d * f1,
            (2, 0): f2,
            (0, 1): d * (2 * f - u * f1),
            (1, 1): f1 - u * f2,
            (0, 2): 2 * f - 2 * u * f1 + u * u * f2,
        }[m, n]


def _huber(r: mpf, d: mpf) -> mpf:
    return r**2 / 2 if abs(r) <= d else d * (abs(r) - d / 2)


def _huber_profile(u: mpf) -> tuple[mpf, mpf, mpf]:
    return (u, mpf(1), mpf(0)) if abs(u) <= 1 else (mp.sign(u), mpf(0), mpf(0))


def _huber_bulk(r: np.ndarray, d: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a = np.abs(r)
    value = np.where(a <= d, r * r / 2, d * (a - d / 2))
    return value, np.clip(r, -d, d), np.where(a <= d, 1.0, 0.0)


def _log_cosh(r: mpf, d: mpf) -> mpf:
    u = abs(r / d)
    if u < 1:
        # log(1 + x) with x = cosh u - 1, without the cancellation that outruns 50 digits.
        return d**2 * mp.log1p(2 * mp.sinh(u / 2) ** 2)
    return d**2 * (u - mp.log(2) + mp.log1p(mp.exp(-2 * u)))


def _log_cosh_profile(u: mpf) -> tuple[mpf, mpf, mpf]:
    e = mp.exp(-2 * abs(u))
    tanh = mp.sign(u) * -mp.expm1(-2 * abs(u)) / (1 + e)
    sech2 = 4 * e / (1 + e) ** 2
    return tanh, sech2, -2 * tanh * sech2


def _log_cosh_bulk(r: np.ndarray, d: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u = np.abs(r) / d
    e = np.exp(-2 * u)
    near = np.log1p(2 * np.sinh(np.minimum(u, 1) / 2) ** 2)
    value = d * d * np.where(u < 1, near, u - np.log(2) + np.log1p(e))
    return value, d * np.tanh(r / d), 4 * e / (1 + e) ** 2


def _pseudo_huber(r: mpf, d: mpf) -> mpf:
    # d**2 (sqrt(1 + u**2) - 1), by its conjugate: u = 1e-68 would need 150 digits.
    return r**2 / (1 + mp.sqrt(1 + (r / d) ** 2))


def _pseudo_huber_profile(u: mpf) -> tuple[mpf, mpf, mpf]:
    q = 1 + u * u
    return u / mp.sqrt(q), q ** mpf("-1.5"), -3 * u * q ** mpf("-2.5")


def _pseudo_huber_bulk(r: np.ndarray, d: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    root = np.sqrt(1 + (r / d) ** 2)
    return r * r / (1 + root), r / root, root**-3.0


TRUTH = {
    "squared_error": Witness(
        value=lambda r, d: r**2,
        profile=lambda u: (2 * u, mpf(2), mpf(0)),
        bulk=lambda r, d: (r * r, 2 * r, np.full_like(r, 2.0)),
        ulps=(0.5, 0.5, 0.5),
        deltas=(1.0,),
    ),
    "absolute_error": Witness(
        value=lambda r, d: abs(r),
        profile=lambda u: (mp.sign(u), mpf(0), mpf(0)),
        bulk=lambda r, d: (np.abs(r), np.sign(r), np.zeros_like(r)),
        ulps=(0.5, 0.5, 0.5),
        deltas=(1.0,),
        kinks=(0.0,),
    ),
    "huber": Witness(
        value=_huber,
        profile=_huber_profile,
        bulk=_huber_bulk,
        ulps=(1.6, 0.51, 0.51),
        kinks=(1.0,),
    ),
    "log_cosh": Witness(
        value=_log_cosh,
        profile=_log_cosh_profile,
        bulk=_log_cosh_bulk,
        ulps=(3.0, 2.2, 5.0),
    ),
    "pseudo_huber": Witness(
        value=_pseudo_huber,
        profile=_pseudo_huber_profile,
        bulk=_pseudo_huber_bulk,
        ulps=(3.0, 3.5, 4.0),
    ),
}
