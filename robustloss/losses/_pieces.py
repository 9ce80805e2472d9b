"""Functions that the formulas of several losses share: pieces, an angle, series.

Each function maps NaN to NaN, takes its limit at infinity, and has derivatives of any order.
"""

from __future__ import annotations

from functools import reduce
from math import factorial

import jax.numpy as jnp
from jax import Array

from robustloss.losses._rule import with_partials

# Pieces.


@with_partials(lambda r, d: nan_or_zero(jnp.abs(r) + d), lambda r, d: nan_or_zero(jnp.abs(r) + d))
def inside_indicator(r: Array, delta: Array) -> Array:
    """1 for |r| <= delta, else 0; NaN stays NaN."""
    return jnp.where(jnp.abs(r) > delta, 0.0, 1.0) + nan_or_zero(jnp.abs(r) + delta)


@with_partials(lambda r, d: nan_or_zero(jnp.abs(r) + d), lambda r, d: nan_or_zero(jnp.abs(r) + d))
def outside_sign(r: Array, delta: Array) -> Array:
    """sign(r) for |r| > delta, else 0; NaN stays NaN."""
    return jnp.where(jnp.abs(r) > delta, jnp.sign(r), 0.0) + nan_or_zero(jnp.abs(r) + delta)


@with_partials(lambda r, d: outside_sign(r, d), lambda r, d: inside_indicator(r, d) - 1)
def excess(r: Array, delta: Array) -> Array:
    """max(|r| - delta, 0); NaN stays NaN, as it may not in XLA's maximum."""
    a = jnp.abs(r)
    return jnp.where(a > delta, a - delta, nan_or_zero(a + delta))


@with_partials(lambda r: nan_or_zero(r))
def nan_or_zero(r: Array) -> Array:
    """0, the derivative of a constant; NaN stays NaN."""
    return jnp.where(jnp.isnan(r), r, 0.0)


@with_partials(lambda r, p: nan_or_zero(r), lambda r, p: nan_or_zero_both(r, p))
def nan_or_zero_both(r: Array, p: Array) -> Array:
    """0, with derivatives 0 in r and p; a NaN in either gives NaN."""
    return nan_or_zero(r) + nan_or_zero(p)


def capped(x: Array, divisor: float = 1.0) -> Array:
    """min(x, largest number / divisor), so that inf - inf and 0 * inf do not arise."""
    return jnp.minimum(x, float(jnp.finfo(x.dtype).max) / divisor)


# The angle whose tangent is r / delta. The derivatives of algebraic losses are polynomials in its
# sine and cosine. Formulas in the quotient of the smaller and the larger of |r| and delta do not
# overflow.


def bounded_ratio(r: Array, delta: Array) -> Array:
    """The smaller over the larger of |r| and delta > 0."""
    a, delta = jnp.abs(r), capped(delta)
    return jnp.minimum(a, delta) / jnp.maximum(a, delta)


@with_partials(
    lambda r, d: cosine(r, d) ** 3 / d,
    lambda r, d: -sine(r, d) * cosine(r, d) ** 2 / d,
)
def sine(r: Array, delta: Array) -> Array:
    """r / sqrt(r**2 + delta**2)."""
    a, t = jnp.abs(r), bounded_ratio(r, delta)
    return jnp.sign(r) * jnp.where(a > delta, 1.0, t) / jnp.sqrt(1 + t * t)


@with_partials(
    lambda r, d: -sine(r, d) * cosine(r, d) ** 2 / d,
    lambda r, d: sine(r, d) ** 2 * cosine(r, d) / d,
)
def cosine(r: Array, delta: Array) -> Array:
    """delta / sqrt(r**2 + delta**2)."""
    a, t = jnp.abs(r), bounded_ratio(r, delta)
    return jnp.where(a > delta, t, 1.0) / jnp.sqrt(1 + t * t)


# Series for arguments where the terms of a formula would cancel.


def polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    """Horner's rule, the constant coefficient first."""
    *lower, highest = coefficients
    return reduce(lambda total, c: total * x + c, reversed(lower[:-1]), highest * x + lower[-1])


def atanh_series(v: Array) -> Array:
    """(atanh(s) / s - 1) / s**2 in v = s**2 <= 1/4; log(1 + x) = 2 atanh(x / (2 + x))."""
    return polynomial(v, _ATANH_64 if v.dtype == jnp.float64 else _ATANH_32)


def exp_series(z: Array) -> Array:
    """((1 - exp(-z)) / z - 1) / z for z in [0, log 2]."""
    return polynomial(z, _EXP_64 if z.dtype == jnp.float64 else _EXP_64[:8])


_EXP_64 = tuple((-1.0) ** (k + 1) / factorial(k + 2) for k in range(15))
# Minimax polynomials on [0, 1/4].
_ATANH_32 = (
    0.3333333168479454, 0.2000047330953935, 0.1426397985264627, 0.11469875161618762,
    0.06493489567669346, 0.15751780259152603,
)  # fmt: skip
_ATANH_64 = (
    0.3333333333333334, 0.19999999999988882, 0.14285714288195786, 0.11111110894155087,
    0.09090918911391244, 0.07692044266759973, 0.06671177979729383, 0.058309531156912356,
    0.056599417377332484, 0.026913545051501023, 0.1145475451088902, -0.10951650742612855,
    0.19745426478533493,
)  # fmt: skip
