"""An independent truth for every loss: textbook formulas, in mpmath and in NumPy's float64.

A witness stands for a loss with its other parameters fixed; `TRUTH` holds them by a label such
as `quantile(q=0.1)`, and `loss(label)` is what it speaks for. `TRUTH[label](r, delta)` is the
value, `TRUTH[label](r, delta, m, n)` its derivative, m times in r and n times in delta
(m + n <= 3), for numbers that are not at a kink (there: what the design says is taken). A loss
without `delta` ignores it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf

import robustloss as rl

mp.dps = 50

DELTAS = (1.0, 1.345, 1.9999, 0.1, 3.3, 1e-3, 12345.678, 1e-30, 1e30)
Three = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Witness:
    loss: str
    """Its name in `rl.LOSSES`."""
    value: Callable[[mpf, mpf], mpf]
    """The textbook formula, of r and delta."""
    profile: Callable[[mpf], Three]
    """f', f'', f''' at u, where the loss is delta**degree f(r / delta)."""
    bulk: Callable[[np.ndarray, float], Three]
    """Value, slope and curvature in float64, for float32 residuals."""
    ulps: tuple[float, float, float]
    """The accepted error of value, slope and curvature in float32, at any delta."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Its other parameters."""
    size: Callable[[np.ndarray], Three] = lambda u: (0, 0, 0)
    """The size of the terms of f, f', f'', where these pass through 0 away from u = 0."""
    kinks: tuple[float, ...] = ()
    """|r / delta| where a derivative jumps."""
    degree: int = 2
    unit: bool = True
    """Whether it is r**2 / 2 near 0."""
    even: bool = True

    @property
    def has_delta(self) -> bool:
        return "delta" in inspect.signature(rl.LOSSES[self.loss]).parameters

    @property
    def deltas(self) -> tuple[float, ...]:
        return DELTAS if self.has_delta else (1.0,)

    def __call__(self, r: float, delta: float = 1.0, m: int = 0, n: int = 0) -> mpf:
        r, d = mpf(float(r)), mpf(float(delta))
        if m == n == 0:
            return self.value(r, d)
        u, p = r / d, self.degree
        f1, f2, f3 = self.profile(u)
        if m + n == 3:  # with degree 1 there is none
            return (-u) ** n * f3 / d
        f = self.value(r, d) / d**p
        return {
            (1, 0): f1 * d ** (p - 1),
            (2, 0): f2 * d ** (p - 2),
            (0, 1): (p * f - u * f1) * d ** (p - 1),
            (1, 1): ((p - 1) * f1 - u * f2) * d ** (p - 2),
            (0, 2): (p * (p - 1) * f - 2 * (p - 1) * u * f1 + u * u * f2) * d ** (p - 2),
        }[m, n]

    def sizes(self, r: np.ndarray, delta: float) -> list[np.ndarray]:
        """`size` in the units of value, slope and curvature."""
        units = (delta * delta, delta, 1.0)
        return [k * np.abs(s) for k, s in zip(units, self.size(r / delta), strict=True)]


def loss(label: str) -> Callable[..., Any]:
    """The loss that a witness speaks for, its other parameters fixed."""
    witness = TRUTH[label]
    return partial(rl.LOSSES[witness.loss], **witness.fixed)


def knobs(label: str) -> dict[str, inspect.Parameter]:
    """The parameters of `LOSSES[label]` that are left."""
    parameters = inspect.signature(LOSSES[label].func).parameters
    fixed = LOSSES[label].keywords
    return {k: p for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY and k not in fixed}


def at_infinity(witness: Witness, sign: float, delta: float, m: int = 0, n: int = 0) -> float:
    """The limit of a derivative as r goes to +-infinity, read off two far points."""
    unit = float(delta) ** (witness.degree - m - n)
    far, farther = (float(witness(sign * x * delta, delta, m, n) / unit) for x in (1e15, 1e30))
    if abs(farther) < 1e-15:
        return 0.0
    return farther * unit if abs(farther - far) < 1e-9 * abs(far) else np.copysign(np.inf, farther)


def _huber(r: mpf, d: mpf) -> mpf:
    return r**2 / 2 if abs(r) <= d else d * (abs(r) - d / 2)


def _huber_profile(u: mpf) -> Three:
    return (u, mpf(1), mpf(0)) if abs(u) <= 1 else (mp.sign(u), mpf(0), mpf(0))


def _huber_bulk(r: np.ndarray, d: float) -> Three:
    a = np.abs(r)
    value = np.where(a <= d, r * r / 2, d * (a - d / 2))
    return value, np.clip(r, -d, d), np.where(a <= d, 1.0, 0.0)


def _log_cosh(r: mpf, d: mpf) -> mpf:
    u = abs(r / d)
    if u < 1:
        # log(1 + x) with x = cosh u - 1, without the cancellation that outruns 50 digits.
        return d**2 * mp.log1p(2 * mp.sinh(u / 2) ** 2)
    return d**2 * (u - mp.log(2) + mp.log1p(mp.exp(-2 * u)))


def _log_cosh_profile(u: mpf) -> Three:
    e = mp.exp(-2 * abs(u))
    tanh = mp.sign(u) * -mp.expm1(-2 * abs(u)) / (1 + e)
    sech2 = 4 * e / (1 + e) ** 2
    return tanh, sech2, -2 * tanh * sech2


def _log_cosh_bulk(r: np.ndarray, d: float) -> Three:
    u = np.abs(r) / d
    e = np.exp(-2 * u)
    near = np.log1p(2 * np.sinh(np.minimum(u, 1) / 2) ** 2)
    value = d * d * np.where(u < 1, near, u - np.log(2) + np.log1p(e))
    return value, d * np.tanh(r / d), 4 * e / (1 + e) ** 2


def _pseudo_huber(r: mpf, d: mpf) -> mpf:
    # d**2 (sqrt(1 + u**2) - 1), by its conjugate: u = 1e-68 would need 150 digits.
    return r**2 / (1 + mp.sqrt(1 + (r / d) ** 2))


def _pseudo_huber_profile(u: mpf) -> Three:
    q = 1 + u * u
    return u / mp.sqrt(q), q ** mpf("-1.5"), -3 * u * q ** mpf("-2.5")


def _pseudo_huber_bulk(r: np.ndarray, d: float) -> Three:
    root = np.sqrt(1 + (r / d) ** 2)
    return r * r / (1 + root), r / root, root**-3.0


def _fair(r: mpf, d: mpf) -> mpf:
    u = abs(r / d)
    if u < mpf("1e-9"):
        return d**2 * (u**2 / 2 - u**3 / 3 + u**4 / 4 - u**5 / 5 + u**6 / 6)
    return d**2 * (u - mp.log1p(u))


def _fair_profile(u: mpf) -> Three:
    v = 1 / (1 + abs(u))
    return u * v, v**2, -2 * mp.sign(u) * v**3


def _fair_bulk(r: np.ndarray, d: float) -> Three:
    u = np.abs(r) / d
    x = np.minimum(u, 0.1)
    near = sum((-x) ** k / k for k in range(20, 1, -1))
    return d * d * np.where(u < 0.1, near, u - np.log1p(u)), r / (1 + u), (1 + u) ** -2.0


def _tube(r: mpf, d: mpf) -> mpf:
    return max(abs(r) - d, mpf(0))


def _tube_profile(u: mpf) -> Three:
    return (mp.sign(u) if abs(u) > 1 else mpf(0)), mpf(0), mpf(0)


def _tube_bulk(r: np.ndarray, d: float) -> Three:
    a = np.abs(r)
    return np.maximum(a - d, 0), np.where(a > d, np.sign(r), 0), np.zeros_like(r)


def _cauchy_profile(u: mpf) -> Three:
    z = u * u
    return u / (1 + z), (1 - z) / (1 + z) ** 2, 2 * u * (z - 3) / (1 + z) ** 3


def _cauchy_bulk(r: np.ndarray, d: float) -> Three:
    z = (r / d) ** 2
    return d * (d / 2 * np.log1p(z)), r / (1 + z), (1 - z) / (1 + z) ** 2


def _geman_mcclure_profile(u: mpf) -> Three:
    z = u * u
    return u / (1 + z) ** 2, (1 - 3 * z) / (1 + z) ** 3, 12 * u * (z - 1) / (1 + z) ** 4


def _geman_mcclure_bulk(r: np.ndarray, d: float) -> Three:
    z = (r / d) ** 2
    return r / (1 + z) * r / 2, r / (1 + z) / (1 + z), (1 - 3 * z) / (1 + z) / (1 + z) / (1 + z)


def _welsch_profile(u: mpf) -> Three:
    z = u * u
    e = mp.exp(-z)
    return u * e, (1 - 2 * z) * e, u * (4 * z - 6) * e


def _welsch_bulk(r: np.ndarray, d: float) -> Three:
    z = np.minimum((r / d) ** 2, 1e3)
    value = d * (-d / 2 * np.expm1(-z))
    # float64 alone would lose z ulps in exp(-z), which is little beside float32's.
    return value, r * np.exp(-z), (1 - 2 * z) * np.exp(-z)


def _tukey(r: mpf, d: mpf) -> mpf:
    z = min((r / d) ** 2, mpf(1))
    return d**2 * z * (3 - 3 * z + z * z) / 6


def _tukey_profile(u: mpf) -> Three:
    z = u * u
    if z > 1:
        return mpf(0), mpf(0), mpf(0)
    return u * (1 - z) ** 2, (1 - z) * (1 - 5 * z), u * (20 * z - 12)


def _tukey_bulk(r: np.ndarray, d: float) -> Three:
    a = np.minimum(np.abs(r), d)
    z, q = (a / d) ** 2, (d - a) / d * (1 + a / d)
    return a * (a * (3 - 3 * z + z * z) / 6), np.where(q > 0, r, 0) * q**2, q * (1 - 5 * z)


def _andrews(r: mpf, d: mpf) -> mpf:
    u = abs(r / d)
    return d**2 * (2 * mp.sin(u / 2) ** 2 if u <= mp.pi else 2)


def _andrews_profile(u: mpf) -> Three:
    if abs(u) > mp.pi:
        return mpf(0), mpf(0), mpf(0)
    return mp.sin(u), mp.cos(u), -mp.sin(u)


def _andrews_bulk(r: np.ndarray, d: float) -> Three:
    u = r / d
    x, inside = np.clip(u, -np.pi, np.pi), np.abs(u) <= np.pi
    slope = d * np.where(inside, np.sin(x), 0)
    return 2 * (d * np.sin(x / 2)) ** 2, slope, np.where(inside, np.cos(x), 0)


def _andrews_size(u: np.ndarray) -> Three:
    inside = np.abs(u) <= 3.2
    return 0, np.where(inside & (np.abs(u) > 1.5), 1, 0), np.where(inside, 1, 0)


def _hampel(knots: tuple[float, float, float]) -> dict[str, Any]:
    a, b, c = map(mpf, knots)
    a64, b64, c64 = knots

    def value(r: mpf, d: mpf) -> mpf:
        u = min(abs(r / d), c)
        if u <= a:
            return r**2 / 2
        if u <= b:
            return d**2 * a * (u - a / 2)
        return d**2 * a * ((b + c - a) / 2 - (c - u) ** 2 / (c - b) / 2)

    def profile(u: mpf) -> Three:
        if abs(u) <= a:
            return u, mpf(1), mpf(0)
        if abs(u) <= b:
            return mp.sign(u) * a, mpf(0), mpf(0)
        if abs(u) <= c:
            return mp.sign(u) * a * (c - abs(u)) / (c - b), -a / (c - b), mpf(0)
        return mpf(0), mpf(0), mpf(0)

    def bulk(r: np.ndarray, d: float) -> Three:
        u = np.minimum(np.abs(r) / d, c64)
        inner = [u <= a64, u <= b64]
        top = a64 * ((b64 + c64 - a64) / 2 - (c64 - u) ** 2 / (c64 - b64) / 2)
        value = d * (d * np.select(inner, [u * u / 2, a64 * (u - a64 / 2)], top))
        slope = np.select(inner, [u, a64 + 0 * u], a64 * (c64 - u) / (c64 - b64))
        bend = np.select([*inner, np.abs(r) / d <= c64], [1, 0, -a64 / (c64 - b64)], 0.0)
        return value, d * np.sign(r) * slope, bend

    def size(u: np.ndarray) -> Three:
        falling = (np.abs(u) > b64) & (np.abs(u) < 1.001 * c64)
        return 0, np.where(falling, a64 * c64 / (c64 - b64), 0), 0

    return {
        "loss": "hampel",
        "value": value,
        "profile": profile,
        "bulk": bulk,
        "size": size,
        "kinks": knots,
        "fixed": {"knots": knots},
    }


def _talwar_profile(u: mpf) -> Three:
    return (u, mpf(1), mpf(0)) if abs(u) <= 1 else (mpf(0), mpf(0), mpf(0))


def _talwar_bulk(r: np.ndarray, d: float) -> Three:
    inside = np.abs(r) <= d
    return np.minimum(np.abs(r), d) ** 2 / 2, np.where(inside, r, 0), np.where(inside, 1.0, 0.0)


def _quantile(q: float) -> dict[str, Any]:
    def slope(r: Any) -> Any:
        return np.where(r == 0, 0.0, np.where(r > 0, 1 - q, -q))

    return {
        "loss": "quantile",
        "fixed": {"q": q},
        "value": lambda r, d: (1 - mpf(q)) * r if r > 0 else -mpf(q) * r,
        "profile": lambda u: (
            mpf(0) if u == 0 else 1 - mpf(q) if u > 0 else -mpf(q), mpf(0), mpf(0)
        ),
        "bulk": lambda r, d: (r * slope(r), slope(r), np.zeros_like(r)),
        "kinks": (0.0,),
        "unit": False,
        "even": q == 0.5,
    }  # fmt: skip


def _side(q: float, x: Any) -> Any:
    return np.where(x == 0, 0.5, np.where(x > 0, 1 - q, q))


def _expectile(q: float) -> dict[str, Any]:
    def side(x: mpf) -> mpf:
        return mpf("0.5") if x == 0 else 1 - mpf(q) if x > 0 else mpf(q)

    return {
        "loss": "expectile",
        "fixed": {"q": q},
        "value": lambda r, d: side(r) * r**2,
        "profile": lambda u: (2 * side(u) * u, 2 * side(u), mpf(0)),
        "bulk": lambda r, d: (_side(q, r) * r * r, 2 * _side(q, r) * r, 2 * _side(q, r)),
        "kinks": (0.0,),
        "unit": q == 0.5,
        "even": q == 0.5,
    }


def _quantile_huber(q: float) -> dict[str, Any]:
    def side(x: mpf) -> mpf:
        return mpf("0.5") if x == 0 else 1 - mpf(q) if x > 0 else mpf(q)

    return {
        "loss": "quantile_huber",
        "fixed": {"q": q},
        "value": lambda r, d: 2 * side(r) * _huber(r, d),
        "profile": lambda u: tuple(2 * side(u) * f for f in _huber_profile(u)),
        "bulk": lambda r, d: tuple(2 * _side(q, r) * f for f in _huber_bulk(r, d)),
        "kinks": (0.0, 1.0),
        "unit": q == 0.5,
        "even": q == 0.5,
    }


def _general(alpha: float) -> dict[str, Any]:
    a, b, k = mpf(alpha), abs(mpf(alpha) - 2), mpf(alpha) / 2 - 1
    b64, k64 = abs(alpha - 2), alpha / 2 - 1

    def profile(u: mpf) -> Three:
        q = 1 + u * u / b
        f2 = q**k + 2 * k * u * u / b * q ** (k - 1)
        f3 = 6 * k * u / b * q ** (k - 1) + 4 * k * (k - 1) * u**3 / b**2 * q ** (k - 2)
        return u * q**k, f2, f3

    def bulk(r: np.ndarray, d: float) -> Three:
        y = (r / d) ** 2 / b64
        log = np.log1p(y)
        value = d * (d * (b64 / alpha) * np.expm1(alpha / 2 * log))
        power = np.exp(k64 * log)
        return value, r * power, power * (1 + 2 * k64 * y / (1 + y))

    def terms(y: np.ndarray) -> np.ndarray:
        return np.exp(k64 * np.log1p(y)) * (1 + abs(2 * k64) * y / (1 + y))

    return {
        "loss": "general",
        "fixed": {"alpha": alpha},
        "value": lambda r, d: d**2 * b / a * mp.expm1(a / 2 * mp.log1p((r / d) ** 2 / b)),
        "profile": profile,
        "bulk": bulk,
        "size": lambda u: (0, 0, terms(u * u / b64) if alpha < 1 else 0),
    }


ALL = (
    Witness(
        "squared_error",
        value=lambda r, d: r**2,
        profile=lambda u: (2 * u, mpf(2), mpf(0)),
        bulk=lambda r, d: (r * r, 2 * r, np.full_like(r, 2.0)),
        ulps=(0.5, 0.5, 0.5),
        unit=False,
    ),
    Witness(
        "absolute_error",
        value=lambda r, d: abs(r),
        profile=lambda u: (mp.sign(u), mpf(0), mpf(0)),
        bulk=lambda r, d: (np.abs(r), np.sign(r), np.zeros_like(r)),
        ulps=(0.5, 0.5, 0.5),
        kinks=(0.0,),
        unit=False,
    ),
    Witness("huber", _huber, _huber_profile, _huber_bulk, (1.6, 0.51, 0.51), kinks=(1.0,)),
    Witness("log_cosh", _log_cosh, _log_cosh_profile, _log_cosh_bulk, (3.0, 2.2, 5.0)),
    Witness(
        "pseudo_huber", _pseudo_huber, _pseudo_huber_profile, _pseudo_huber_bulk, (3.0, 3.5, 4.0)
    ),
    Witness("fair", _fair, _fair_profile, _fair_bulk, (3.3, 1.6, 5.5), kinks=(0.0,)),
    Witness(
        "epsilon_insensitive",
        _tube,
        _tube_profile,
        _tube_bulk,
        (0.5, 0.5, 0.5),
        degree=1,
        kinks=(1.0,),
        unit=False,
    ),
    Witness(
        "cauchy",
        value=lambda r, d: d**2 / 2 * mp.log1p((r / d) ** 2),
        profile=_cauchy_profile,
        bulk=_cauchy_bulk,
        ulps=(4.5, 3.2, 6.5),
        size=lambda u: (0, 0, 1 / (1 + u * u)),
    ),
    Witness(
        "geman_mcclure",
        value=lambda r, d: r**2 / 2 / (1 + (r / d) ** 2),
        profile=_geman_mcclure_profile,
        bulk=_geman_mcclure_bulk,
        ulps=(2.6, 3.4, 5.2),
        size=lambda u: (0, 0, (1 + 3 * u * u) / (1 + u * u) / (1 + u * u) / (1 + u * u)),
    ),
    Witness(
        "welsch",
        value=lambda r, d: -(d**2) / 2 * mp.expm1(-((r / d) ** 2)),
        profile=_welsch_profile,
        bulk=_welsch_bulk,
        ulps=(3.8, 4.4, 7.8),
        size=lambda u: (0, 0, (1 + 2 * np.minimum(u * u, 1e3)) * np.exp(-np.minimum(u * u, 1e3))),
    ),
    Witness(
        "tukey",
        value=_tukey,
        profile=_tukey_profile,
        bulk=_tukey_bulk,
        ulps=(4.0, 4.7, 4.4),
        size=lambda u: (0, 0, (1 - np.minimum(np.abs(u), 1)) * (1 + np.abs(u)) * (1 + 5 * u * u)),
        kinks=(1.0,),
    ),
    Witness(
        "andrews",
        _andrews,
        _andrews_profile,
        _andrews_bulk,
        (3.5, 2.4, 2.2),
        size=_andrews_size,
        kinks=(np.pi,),
    ),
    Witness(**_hampel((1.5, 3.5, 8.0)), ulps=(3.5, 1.5, 0.7)),
    Witness(**_hampel((2.0, 2.0, 2.75)), ulps=(2.0, 0.6, 1.8)),
    Witness(
        "talwar",
        value=lambda r, d: min(abs(r), d) ** 2 / 2,
        profile=_talwar_profile,
        bulk=_talwar_bulk,
        ulps=(0.5, 0.5, 0.5),
        kinks=(1.0,),
    ),
    Witness(**_quantile(0.5), ulps=(0.5, 0.5, 0.5)),
    Witness(**_quantile(0.875), ulps=(0.5, 0.5, 0.5)),
    Witness(**_expectile(0.25), ulps=(1.5, 0.5, 0.5)),
    Witness(**_general(-1.5), ulps=(5.0, 5.0, 8.0)),
    Witness(**_quantile_huber(0.875), ulps=(1.8, 0.51, 0.5)),
)


def _label(witness: Witness) -> str:
    fixed = ", ".join(f"{k}={v}" for k, v in witness.fixed.items())
    return f"{witness.loss}({fixed})" if fixed else witness.loss


TRUTH = {_label(witness): witness for witness in ALL}

# Not r -> 0 at 0, and so without a witness here: tests/test_adaptive.py integrates them.
LIKELIHOODS: dict[str, dict[str, Any]] = {
    "gaussian_nll": {},
    "laplace_nll": {},
    "student_t_nll": {"df": 3.0},
    "general_nll": {"alpha": 1.25},
}

LOSSES = {label: loss(label) for label in TRUTH} | {
    name: partial(rl.LOSSES[name], **fixed)
    for name, fixed in LIKELIHOODS.items()
    if name in rl.LOSSES
}
"""Every loss of the library, with numbers for the parameters that have no default."""

# What calls a loss knows it by its values and slopes alone. These have what it could stumble
# over: no bound, a kink, a flat tail, two sides.
FEW = {
    name: LOSSES[name]
    for name in ("squared_error", "absolute_error", "huber", "tukey", "quantile(q=0.875)")
}


def few_first(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: those of `FEW`, and the others only where tests are thorough."""
    return [n if n in FEW else pytest.param(n, marks=pytest.mark.thorough) for n in names]
