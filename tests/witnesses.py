"""The rows of `experiments/_truth.py` as witnesses: the truth about a loss at given parameters.

A witness stands for a loss with its other parameters fixed. `TRUTH` holds the witnesses by a label
such as `quantile(q=0.5)`, and `loss(label)` is the library's loss. `TRUTH[label](r, delta)` is the
value, and `TRUTH[label](r, delta, m, n)` the derivative, m times in r and n times in delta
(m + n <= 3), away from kinks. At r = 0 it is what the library promises there: derivatives of odd
order in r are 0. A loss without `delta` ignores delta.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf

import robustloss as rl
from experiments import _truth
from experiments._truth import ROWS, Row, Series, Three

mp.dps = 50
DIGITS = 160  # of a witness: enough for the mixed derivatives at r = 1e-30 delta

DELTAS = (1.0, 1.345, 1.9999, 0.1, 3.3, 1e-3, 12345.678, 1e-30, 1e30)


@dataclass(frozen=True)
class Witness:
    """A row at one case of its parameters."""

    loss: str
    fixed: dict[str, Any]
    """Its parameters other than delta."""
    ulps: Three
    """The accepted error of value, slope and curvature in float32, at any delta."""

    @property
    def row(self) -> Row:
        return ROWS[self.loss]

    @property
    def degree(self) -> int:
        return self.row.degree

    @property
    def even(self) -> bool:
        return not self.row.side_factor or self.fixed["q"] == 0.5

    @property
    def unit(self) -> bool:
        """Whether the loss is r**2 / 2 near 0."""
        return self.row.unit and self.even

    @property
    def has_delta(self) -> bool:
        return "delta" in self.row.parameters

    @property
    def deltas(self) -> tuple[float, ...]:
        return DELTAS if self.has_delta else (1.0,)

    @property
    def kinks(self) -> tuple[float, ...]:
        """The values of |r| / delta at which a derivative jumps; with 0, if one jumps there."""
        with mp.workdps(DIGITS):
            right = self._series(mpf(0), mpf(1), by_delta=False)
            jumps = any(abs(right.derivative((order,))) > 1e-30 for order in (1, 3))
        knots = self.fixed.get("knots", self.row.kinks)
        return ((0.0,) if jumps or not self.even else ()) + tuple(map(float, knots))

    def __call__(self, r: float, delta: float = 1.0, m: int = 0, n: int = 0) -> mpf:
        with mp.workdps(DIGITS):
            return self.derivative(mpf(float(r)), mpf(float(delta)), m, n)

    def derivative(self, r: mpf, d: mpf, m: int = 0, n: int = 0) -> mpf:
        if r == 0 and m % 2:
            return mpf(0)
        found = self._series(r, d, by_delta=n > 0).derivative((m, n) if n else (m,))
        # r = 1e-30 delta leaves values of 1e-120 in these units, and rounding far less of 0.
        unit = d ** (self.degree - m - n)
        return found if abs(found) > mpf(10) ** (20 - DIGITS) * unit else mpf(0)

    def value(self, r: mpf, d: mpf) -> mpf:
        return self._series(r, d, by_delta=False).value

    def _series(self, r: mpf, d: mpf, *, by_delta: bool) -> Series:
        """The loss as a series in r, and in delta too if asked: that takes three times as long."""
        r, *others = _truth.variables(r, d) if by_delta else _truth.variables(r)
        delta = others[0] if by_delta else 0 * r + d
        constants = {k: 0 * r + mpf(x) for k, x in self.fixed.items() if k != "knots"}
        return self.row.formula(r, *self._ordered(delta=delta, **constants), **self._knots)

    def _views(self, r: np.ndarray, delta: float) -> tuple[Any, ...]:
        return self.row.in_float64(
            np, r, *self._ordered(**{"delta": delta} | self.fixed), **self._knots
        )

    def _ordered(self, **values: Any) -> list[Any]:
        return [values[name] for name in self.row.parameters]

    @property
    def _knots(self) -> dict[str, Any]:
        return {k: x for k, x in self.fixed.items() if k == "knots"}

    def bulk(self, r: np.ndarray, delta: float) -> tuple[Any, ...]:
        """Value, slope and curvature in float64, for float32 residuals."""
        return self._views(r, delta)[:3]

    def sizes(self, r: np.ndarray, delta: float) -> list[Any]:
        """The sizes of the terms of value, slope and curvature, if they pass through 0 off 0."""
        return [0.0, *map(np.abs, self._views(r, delta)[3:])]


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


class Mpmath:
    """The functions of NumPy that the rows use, for one number of any precision."""

    abs, sign, exp, expm1, log1p = abs, mp.sign, mp.exp, mp.expm1, mp.log1p
    log, sqrt, minimum, maximum = mp.log, mp.sqrt, min, max
    sin, cos, arctan, sinh, cosh, tanh = mp.sin, mp.cos, mp.atan, mp.sinh, mp.cosh, mp.tanh

    @staticmethod
    def where(condition: bool, x: mpf, y: mpf) -> mpf:
        return x if condition else y


def psi(name: str, u: mpf, **fixed: float) -> mpf:
    """The influence at u >= 0 with delta = 1."""
    given = {"delta": mpf(1)} | fixed
    row = ROWS[name]
    return row.in_float64(Mpmath, u, *(given[parameter] for parameter in row.parameters))[1]


def _witnesses() -> dict[str, Witness]:
    found = {}
    for name, row in ROWS.items():
        if row.ulps is None:
            continue
        for i, fixed in enumerate(row.cases):
            values = ", ".join(f"{k}={v}" for k, v in fixed.items())
            label = f"{name}({values})" if fixed else name
            found[label] = Witness(name, fixed, row.case_ulps[i] if row.case_ulps else row.ulps)
    return found


TRUTH = _witnesses()

# Not r -> 0 at 0, and so without a witness here: tests/test_adaptive.py integrates them.
LIKELIHOODS: dict[str, dict[str, Any]] = {
    name: row.cases[0] for name, row in ROWS.items() if row.ulps is None
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
