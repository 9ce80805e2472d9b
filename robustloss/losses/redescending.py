"""Redescending losses: an odd influence that returns to zero.

A point that is far enough away has no say at all. The price is a landscape with more than one
minimum: where a fit ends depends on where it starts, so start from a robust fit, and not from
least squares. `delta` is the constant c of the convention in which Tukey's is 4.685 for 95 %
efficiency at the normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustloss._arguments import constrained, positive
from robustloss.losses._double import careful_ratio, multiply, product, quotient
from robustloss.losses._extended import one_plus_square
from robustloss.losses._pieces import (
    atanh_series,
    bounded_ratio,
    capped,
    cosine,
    exp_series,
    flat,
    polynomial,
    sine,
    within,
)
from robustloss.losses._rule import elementwise, partials_of, with_partials

__all__ = ["andrews", "cauchy", "geman_mcclure", "hampel", "talwar", "tukey", "welsch"]


def cauchy(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Cauchy's loss, `delta**2 / 2 log(1 + (r / delta)**2)`, also called Lorentzian.

    Influence `r / (1 + (r / delta)**2)`, largest at `|r| = delta`; it returns to zero slowly,
    as `delta**2 / r`, and the loss itself grows without bound. Smooth everywhere.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: where the influence turns, > 0, in the residual's units; broadcasts to the
            residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual costs infinity, with slope 0.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Black and Anandan (1996), Computer Vision and Image Understanding 63, 75-104; the
    likelihood of Student's t with one degree of freedom.

    >>> rl.influence(cauchy, jnp.array([0.0, 1.0, -2.0])).round(3)
    Array([ 0. ,  0.5, -0.4], dtype=float32)
    """
    return elementwise(_cauchy, predictions, targets, positive("delta", delta))


@with_partials(lambda r, d: _cauchy_slope(r, d), lambda r, d: _cauchy_delta(r, d))
def _cauchy(r: Array, delta: Array) -> Array:
    # log(1 + z) = 2 atanh(s), s = z / (2 + z), for z = u**2 up to 1.
    a, delta = jnp.abs(r), capped(delta)
    t = bounded_ratio(r, delta)
    z, _ = product(t, t)  # which cannot be fused into 2 + z in one program and not in another
    s = z / (2 + z)
    series = 1 + s * s * atanh_series(s * s)
    near = a * (a / (2 + z)) * series
    far = delta * (delta * (_log(a, delta) + s * series))
    return jnp.where(a > delta, far, near)


@with_partials(lambda r, d: _cauchy_bend(r, d), lambda r, d: _cauchy_mixed(r, d))
def _cauchy_slope(r: Array, delta: Array) -> Array:
    a, t = jnp.abs(r), bounded_ratio(r, delta)
    # Of a sixteenth, because the quotient would be subnormal before its product with delta is.
    far = 0.0625 * (delta * (delta / (0.0625 * jnp.maximum(a, delta))))
    return jnp.sign(r) * (jnp.where(a > delta, far, a) / (1 + t * t))


@with_partials(
    lambda r, d: 2 * sine(r, d) * cosine(r, d) ** 3 * (1 - 4 * cosine(r, d) ** 2) / d,
    lambda r, d: -2 * (sine(r, d) * cosine(r, d)) ** 2 * (1 - 4 * cosine(r, d) ** 2) / d,
)
def _cauchy_bend(r: Array, delta: Array) -> Array:
    t = bounded_ratio(r, delta)
    w = 1 / (1 + t * t)
    return (1 - t) * (1 + t) * (w * w) * jnp.where(jnp.abs(r) > delta, -t * t, 1.0)


def _cauchy_mixed(r: Array, delta: Array) -> Array:
    return 2 * sine(r, delta) ** 3 * cosine(r, delta)


@with_partials(lambda r, d: _cauchy_mixed(r, d), lambda r, d: _cauchy_delta2(r, d))
def _cauchy_delta(r: Array, delta: Array) -> Array:
    """delta (log(1 + z) - z / (1 + z)), z = (r / delta)**2."""
    a, delta = jnp.abs(r), capped(delta)
    z = bounded_ratio(r, delta) ** 2
    s = z / (2 + z)
    near = multiply(delta, s, z / (1 + z) + 2 * s * s * atanh_series(s * s))
    far = 2 * _log(a, delta) + jnp.log1p(z) - 1 / (1 + z)
    return jnp.where(a > delta, delta * far, near)


@with_partials(
    lambda r, d: 2 * sine(r, d) ** 3 * cosine(r, d) * (1 - 4 * cosine(r, d) ** 2) / d,
    lambda r, d: -2 * sine(r, d) ** 4 * (1 - 4 * cosine(r, d) ** 2) / d,
)
def _cauchy_delta2(r: Array, delta: Array) -> Array:
    """log(1 + z) - t - 2 t**2, t = z / (1 + z)."""
    a, delta = jnp.abs(r), capped(delta)
    z = bounded_ratio(r, delta) ** 2
    s, t = z / (2 + z), z / (1 + z)
    near = s * (t + 2 * s * s * atanh_series(s * s)) - 2 * t * t
    one = jnp.ones_like(delta)
    w = one_plus_square(r, one, 0 * one, delta)
    far = w.log - (w.t + 2 * w.t * w.t - w.lost)
    return jnp.where(jnp.isinf(r), a, jnp.where(a > delta, far, near))


def _log(a: Array, delta: Array) -> Array:
    """log(a / delta) for a > delta, also where the quotient overflows."""
    half = jnp.finfo(a.dtype).maxexp // 2
    t = delta / a
    # -log(t) errs with t as the rest of the formula does, so that most of it cancels.
    near = -jnp.log(jnp.maximum(t, 2.0**-half))
    far = jnp.log(capped(a * 2.0**-half / delta)) + half * math.log(2)
    return jnp.where(t > 2.0**-half, near, jnp.where(jnp.isinf(a), a, far))


def geman_mcclure(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Geman and McClure's loss, `(r**2 / 2) / (1 + (r / delta)**2)`.

    Influence `r / (1 + (r / delta)**2)**2`, largest at `delta / sqrt(3)`; it returns to zero
    as the inverse cube. The loss is bounded by `delta**2 / 2`. Smooth everywhere.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: where the loss is half its bound, > 0, in the residual's units; broadcasts to
            the residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual costs the bound, with slope 0.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Geman and McClure (1987), Bulletin of the International Statistical Institute 52,
    5-21.

    >>> geman_mcclure(jnp.array([1.0, 2.0, jnp.inf]))
    Array([0.25, 0.4 , 0.5 ], dtype=float32)
    """
    return elementwise(_geman_mcclure, predictions, targets, positive("delta", delta))


@with_partials(
    lambda r, d: _geman_mcclure_slope(r, d),
    lambda r, d: _geman_mcclure_slope(d, jnp.abs(r)) + flat(r),
)
def _geman_mcclure(r: Array, delta: Array) -> Array:
    delta = capped(delta)
    small = jnp.minimum(jnp.abs(r), delta)
    return 0.5 * small * (small / (1 + bounded_ratio(r, delta) ** 2)) + flat(r)


@with_partials(
    lambda r, d: _geman_mcclure_bend(r, d),
    lambda r, d: _geman_mcclure_mixed(r, d),
)
def _geman_mcclure_slope(r: Array, delta: Array) -> Array:
    # The loss, (r delta)**2 / (r**2 + delta**2) / 2, is the same with |r| and delta exchanged:
    # so this is its derivative in delta, too.
    a = jnp.abs(r)
    t, t2, q, lost_t, lost_t2, lost_q = careful_ratio(r, delta)
    small = jnp.minimum(a, delta) / (q * q)
    inside = small - small * (2 * lost_q)
    outside = small * t * t2
    outside = outside + outside * (lost_t + lost_t2 - 2 * lost_q)
    return jnp.sign(r) * jnp.where(a > delta, outside, inside)


@with_partials(
    lambda r, d: 12 * sine(r, d) * cosine(r, d) ** 5 * (1 - 2 * cosine(r, d) ** 2) / d,
    lambda r, d: -12 * sine(r, d) ** 2 * cosine(r, d) ** 4 * (1 - 2 * cosine(r, d) ** 2) / d,
)
def _geman_mcclure_bend(r: Array, delta: Array) -> Array:
    # (1 - 3 z) / (1 + z)**3
    _, t2, q, _, lost_t2, lost_q = careful_ratio(r, delta)
    cube = 1 / (q * q * q)
    cube = cube - cube * (3 * lost_q)
    outside = t2 * (t2 * (t2 - 3))
    outside = outside + outside * (2 * lost_t2)
    bend = cube * jnp.where(jnp.abs(r) > delta, outside, 1 - 3 * t2)
    return jnp.where(jnp.isinf(r), flat(delta), bend) + flat(r)


@with_partials(
    lambda r, d: -12 * sine(r, d) ** 2 * cosine(r, d) ** 4 * (1 - 2 * cosine(r, d) ** 2) / d,
    lambda r, d: 12 * (sine(r, d) * cosine(r, d)) ** 3 * (1 - 2 * cosine(r, d) ** 2) / d,
)
def _geman_mcclure_mixed(r: Array, delta: Array) -> Array:
    """4 u**3 / (1 + u**2)**3, and u / (1 + u**2) is the same of 1 / u."""
    t = bounded_ratio(r, delta)
    return _cube(jnp.sign(r) * (t / (1 + t * t)))


def _cube(x: Array) -> Array:
    return 4 * x * x * x


def welsch(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Welsch's loss, `delta**2 / 2 (1 - exp(-(r / delta)**2))`, also called Leclerc's.

    Influence `r exp(-(r / delta)**2)`, largest at `delta / sqrt(2)`; it dies out faster than
    any power. The loss is bounded by `delta**2 / 2`. Smooth everywhere. (With
    `exp(-(r / k)**2 / 2)`, as others write it, k is `delta / sqrt(2)`.)

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: where the weight is 1 / e, > 0, in the residual's units; broadcasts to the
            residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual costs the bound, with slope 0.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Dennis and Welsch (1978), Communications in Statistics B 7, 345-359.

    >>> welsch(jnp.array([0.0, 1.0, jnp.inf])).round(5)
    Array([0.     , 0.31606, 0.5    ], dtype=float32)
    """
    return elementwise(_welsch, predictions, targets, positive("delta", delta))


@with_partials(lambda r, d: _welsch_slope(r, d), lambda r, d: _welsch_delta(r, d))
def _welsch(r: Array, delta: Array) -> Array:
    delta = capped(delta, 64)
    a = _at_most(jnp.abs(r), _SPENT * delta)
    z = (a / delta) ** 2
    near = 0.5 * a * (a * (1 + z * exp_series(z)))
    far = 0.5 * delta * (delta * (1 - jnp.exp(-z)))
    return jnp.where(z > math.log(2), far, near)


@with_partials(
    lambda r, d: _welsch_bend(r, d),
    lambda r, d: _welsch_mixed(r, d),
)
def _welsch_slope(r: Array, delta: Array) -> Array:
    _, times_weight = _welsch_weight(r, delta)
    return times_weight(jnp.where(jnp.isinf(r), 0.0, r))


@with_partials(
    lambda r, d: _welsch_third(r, d),
    lambda r, d: -_tail(r, d) * _welsch_third(r, d),
)
def _welsch_bend(r: Array, delta: Array) -> Array:
    z, times_weight = _welsch_weight(r, delta)
    return times_weight(1 - 2 * z)


@with_partials(
    lambda r, d: -_tail(r, d) * _welsch_third(r, d),
    lambda r, d: _tail(r, d) ** 2 * _welsch_third(r, d),
)
def _welsch_mixed(r: Array, delta: Array) -> Array:
    """2 u**3 exp(-z), u = r / delta, z = u**2."""
    u, (_, times_weight) = _tail(r, delta), _welsch_weight(r, delta)
    return times_weight(2 * u * u * u)


@with_partials(lambda r, d: _welsch_mixed(r, d), lambda r, d: _welsch_delta2(r, d))
def _welsch_delta(r: Array, delta: Array) -> Array:
    """delta (1 - (1 + z) exp(-z))."""
    delta = capped(delta)
    z = _tail(r, delta) ** 2
    far = delta * (1 - (1 + z) * jnp.exp(-z))
    return jnp.where(z > math.log(2), far, multiply(delta, z, z, _welsch_series(z)))


@with_partials(
    lambda r, d: _tail(r, d) ** 2 * _welsch_third(r, d),
    lambda r, d: -(_tail(r, d) ** 3) * _welsch_third(r, d),
)
def _welsch_delta2(r: Array, delta: Array) -> Array:
    """1 - (1 + z + 2 z**2) exp(-z)."""
    z = _tail(r, capped(delta)) ** 2
    e = jnp.exp(-z)
    near = z * (z * (_welsch_series(z) - 2 * e))
    return jnp.where(z > math.log(2), 1 - (1 + z + 2 * z * z) * e, near)


def _welsch_series(z: Array) -> Array:
    """(1 - (1 + z) exp(-z)) / z**2 for z up to log 2."""
    held = jnp.where(z > math.log(2), 0.0, z)
    series = exp_series(held)
    return 1 + series + held * series


@with_partials(
    *partials_of(
        lambda r, d: (4 * _tail(r, d) ** 2 - 6) * _tail(r, d) * jnp.exp(-(_tail(r, d) ** 2)) / d, 2
    )
)
def _welsch_third(r: Array, delta: Array) -> Array:
    """u (4 z - 6) exp(-z) / delta; times a power of -u it is every third derivative."""
    z, times_weight = _welsch_weight(r, delta)
    return times_weight((4 * z - 6) * _tail(r, delta) / delta)


def _welsch_weight(r: Array, delta: Array) -> tuple[Array, Callable[[Array], Array]]:
    """z = (r / delta)**2, and a function that multiplies by exp(-z).

    The exponential amplifies what rounding took from z, so that is put back; and it would be
    subnormal before its product is, so it is multiplied in up to three parts.
    """
    delta = capped(delta, 64)
    u, lost_u = quotient(_at_most(jnp.abs(r), _SPENT * delta), delta)
    z, lost_z = product(u, u)
    part = 64.0 if z.dtype == jnp.float32 else 512.0
    once, twice = z > part, z > 2 * part
    shift = jnp.where(twice, 2 * part, jnp.where(once, part, 0.0))
    e = jnp.exp(shift - z) * (1 - (lost_z + 2 * u * lost_u))

    def times_weight(x: Array) -> Array:
        x = x * e * jnp.where(once, math.exp(-part), 1.0)
        return x * jnp.where(twice, math.exp(-part), 1.0)

    return z, times_weight


def _tail(r: Array, delta: Array) -> Array:
    """r / delta, held finite where exp(-(r / delta)**2) is 0."""
    delta = capped(delta, 64)
    return jnp.clip(r, -_SPENT * delta, _SPENT * delta) / delta


_SPENT = 40.0  # r / delta from which exp(-(r / delta)**2) is 0 in every precision


def tukey(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Tukey's biweight (bisquare), `delta**2 / 6 (1 - (1 - (r / delta)**2)**3)` up to `delta`.

    Influence `r (1 - (r / delta)**2)**2`, largest at `delta / sqrt(5)` and 0 from `delta` on,
    where the loss stays at `delta**2 / 6`. The influence and its slope are continuous.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: from where on a residual has no influence, > 0, in the residual's units;
            broadcasts to the residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual costs the bound, with slope 0.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Beaton and Tukey (1974), Technometrics 16, 147-185.

    >>> rl.influence(tukey, jnp.array([0.0, 0.5, 9.0]))
    Array([0.     , 0.28125, 0.     ], dtype=float32)
    """
    return elementwise(_tukey, predictions, targets, positive("delta", delta))


@with_partials(lambda r, d: _tukey_slope(r, d), lambda r, d: _tukey_delta(r, d))
def _tukey(r: Array, delta: Array) -> Array:
    delta = capped(delta)
    a = _at_most(jnp.abs(r), delta)
    z = (a / delta) ** 2
    q = _margin(a, delta)
    far = delta * (delta * ((1 - q * q * q) / 6))
    return jnp.where(z > 0.5, far, 0.5 * a * (a * (1 - z + z * z / 3)))


@with_partials(lambda r, d: _tukey_bend(r, d), lambda r, d: _tukey_mixed(r, d))
def _tukey_slope(r: Array, delta: Array) -> Array:
    delta = capped(delta)
    inside = _inside(r, delta)
    q = _margin(jnp.abs(r), delta)
    return inside * (q * q)


@with_partials(
    lambda r, d: _tukey_third(r, d),
    lambda r, d: -_share(r, d) * _tukey_third(r, d),
)
def _tukey_bend(r: Array, delta: Array) -> Array:
    delta = capped(delta)
    u = _share(r, delta)
    return _margin(jnp.abs(r), delta) * (1 - 5 * u * u)


@with_partials(
    lambda r, d: -_share(r, d) * _tukey_third(r, d),
    lambda r, d: _share(r, d) ** 2 * _tukey_third(r, d),
)
def _tukey_mixed(r: Array, delta: Array) -> Array:
    """4 u**3 (1 - u**2), u = r / delta."""
    delta = capped(delta)
    return _cube(_share(r, delta)) * _margin(jnp.abs(r), delta)


@with_partials(lambda r, d: _tukey_mixed(r, d), lambda r, d: _tukey_delta2(r, d))
def _tukey_delta(r: Array, delta: Array) -> Array:
    """delta u**4 (1 - 2 / 3 u**2), and delta / 3 beyond delta."""
    delta = capped(delta)
    u = _share(r, delta)
    inside = multiply(delta, u, u, u, u, 1 - 2 * u * u / 3)
    return jnp.where(jnp.abs(r) > delta, delta / 3, inside)


@with_partials(
    lambda r, d: _share(r, d) ** 2 * _tukey_third(r, d),
    lambda r, d: -(_share(r, d) ** 3) * _tukey_third(r, d),
)
def _tukey_delta2(r: Array, delta: Array) -> Array:
    """u**4 (10 / 3 u**2 - 3), and 1 / 3 beyond delta."""
    delta = capped(delta)
    z = _share(r, delta) ** 2
    return jnp.where(jnp.abs(r) > delta, 1 / 3, z * (z * (10 * z / 3 - 3)))


def _tukey_third(r: Array, delta: Array) -> Array:
    """u (20 u**2 - 12) / delta; times a power of -u it is every third derivative."""
    u = _share(r, delta)
    return u * (20 * u * u - 12) / delta


def _share(r: Array, delta: Array) -> Array:
    """r / delta up to |r| = delta and 0 beyond."""
    return _inside(r, delta) / delta


@with_partials(
    lambda a, d: -2 * _inside(a, d) / d / d,
    lambda a, d: 2 * (_inside(a, d) / d) ** 2 / d,
)
def _margin(a: Array, delta: Array) -> Array:
    """1 - (a / delta)**2 up to a = delta and 0 beyond, to its last digits."""
    t, lost = quotient(delta - _at_most(a, delta), delta)
    return t * (2 - t) + 2 * (1 - t) * lost


def andrews(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Andrews' wave, `delta**2 (1 - cos(r / delta))` up to `|r| = pi delta`.

    Influence `delta sin(r / delta)`, largest at `pi / 2 delta` and 0 from `pi delta` on,
    where the loss stays at `2 delta**2`. The second derivative is `cos(r / delta)`; at
    `pi delta` it jumps from -1 to 0.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the bound of the influence, > 0, in the residual's units; a residual has no
            influence from `pi delta` on. Broadcasts to the residual and can be
            differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual costs the bound, with slope 0.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Andrews et al. (1972), Robust Estimates of Location; Andrews (1974), Technometrics
    16, 523-531.

    >>> andrews(jnp.array([0.0, 1.0, 9.0])).round(5)
    Array([0.    , 0.4597, 2.    ], dtype=float32)
    """
    return elementwise(_andrews, predictions, targets, positive("delta", delta))


@with_partials(lambda r, d: _andrews_slope(r, d), lambda r, d: _andrews_delta(r, d))
def _andrews(r: Array, delta: Array) -> Array:
    delta = capped(delta, 4)
    a = _at_most(jnp.abs(r), math.pi * delta)
    u = a / delta
    near = 0.5 * a * (a * polynomial(u * u, _VALUE))
    return jnp.where(u > 0.5 * math.pi, delta * (delta * (1 - jnp.cos(u))), near)


@with_partials(lambda r, d: _andrews_bend(r, d), lambda r, d: _andrews_mixed(r, d))
def _andrews_slope(r: Array, delta: Array) -> Array:
    delta = capped(delta, 4)
    return _arc(_before(r, math.pi * delta), delta)


@with_partials(
    lambda r, d: -jnp.sin(_wave(r, d)) / d,
    lambda r, d: _wave(r, d) * jnp.sin(_wave(r, d)) / d,
)
def _andrews_bend(r: Array, delta: Array) -> Array:
    delta = capped(delta, 4)
    return jnp.where(jnp.abs(r) >= math.pi * delta, 0.0, jnp.cos(_wave(r, delta)))


@with_partials(
    lambda r, d: _wave(r, d) * jnp.sin(_wave(r, d)) / d,
    lambda r, d: -(_wave(r, d) ** 2) * jnp.sin(_wave(r, d)) / d,
)
def _andrews_mixed(r: Array, delta: Array) -> Array:
    """sin u - u cos u, u = r / delta."""
    u = _wave(r, delta)
    held = jnp.where(jnp.abs(u) > 1, 1.0, u)
    near = held * (held * (held * polynomial(held * held, _MIXED)))
    return jnp.where(jnp.abs(u) > 1, jnp.sin(u) - u * jnp.cos(u), near)


@with_partials(lambda r, d: _andrews_mixed(r, d), lambda r, d: _andrews_delta2(r, d))
def _andrews_delta(r: Array, delta: Array) -> Array:
    """delta (2 (1 - cos u) - u sin u), and 4 delta from pi delta on."""
    u = _wave(r, delta)
    held = jnp.where(jnp.abs(u) > 1, 1.0, u)
    beyond, delta = jnp.abs(r) >= math.pi * capped(delta, 4), capped(delta)
    near = multiply(delta, held, held, held, held, polynomial(held * held, _BY_DELTA))
    far = delta * jnp.where(beyond, 4.0, 2 * (1 - jnp.cos(u)) - u * jnp.sin(u))
    return jnp.where(beyond | (jnp.abs(u) > 1), far, near)


@with_partials(
    lambda r, d: -(_wave(r, d) ** 2) * jnp.sin(_wave(r, d)) / d,
    lambda r, d: _wave(r, d) ** 3 * jnp.sin(_wave(r, d)) / d,
)
def _andrews_delta2(r: Array, delta: Array) -> Array:
    """2 (1 - cos u) - 2 u sin u + u**2 cos u, and 4 from pi delta on."""
    u = _wave(r, delta)
    held = jnp.where(jnp.abs(u) > 1, 1.0, u)
    z = held * held
    near = z * (z * polynomial(z, _BY_DELTA2))
    far = 2 * (1 - jnp.cos(u)) - 2 * u * jnp.sin(u) + u * u * jnp.cos(u)
    bend = jnp.where(jnp.abs(u) > 1, far, near)
    return jnp.where(jnp.abs(r) >= math.pi * capped(delta, 4), 4.0, bend)


def _arc(r: Array, delta: Array) -> Array:
    """delta sin(r / delta), which is r where the quotient may underflow."""
    a = jnp.abs(r)
    u, lost = quotient(a, delta)
    sine = jnp.sin(u) + lost * jnp.cos(u)
    return jnp.sign(r) * jnp.where(u * u < jnp.finfo(r.dtype).eps, a, delta * sine)


def _wave(r: Array, delta: Array) -> Array:
    """r / delta up to pi and 0 from there on."""
    delta = capped(delta, 4)
    return _before(r, math.pi * delta) / delta


_VALUE = tuple((-1.0) ** k * 2 / math.factorial(2 * k + 2) for k in range(13))
_MIXED = tuple((-1.0) ** (k + 1) * 2 * k / math.factorial(2 * k + 1) for k in range(1, 11))
_BY_DELTA = tuple((-1.0) ** k * (2 * k - 2) / math.factorial(2 * k) for k in range(2, 12))
_BY_DELTA2 = tuple(
    (-1.0) ** (k + 1) * (4 * k - 2) * (k - 1) / math.factorial(2 * k) for k in range(2, 13)
)


def hampel(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    delta: ArrayLike = 1.0,
    knots: Sequence[ArrayLike] = (1.5, 3.5, 8.0),
) -> Array:
    """Hampel's three-part loss: Huber's, with an influence that is led back to zero.

    With the knots a, b, c (times `delta`) the influence is r up to a, stays at a up to b,
    falls linearly to 0 at c, and is 0 beyond, where the loss stays at `a (b + c - a) / 2`. At
    a knot the side nearer to 0 is taken: the second derivative is 1 at a, 0 at b and
    `-a / (c - b)` at c.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the unit of the knots, > 0, in the residual's units; broadcasts to the residual
            and can be differentiated.
        knots: three numbers 0 < a <= b < c, in units of `delta`; with the default
            `delta=1.0` they are the knots themselves. Each broadcasts to the residual and
            can be differentiated. R's MASS takes (2, 4, 8); the default is robustbase's,
            where 95 % efficiency at the normal is at `delta=0.9014`.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual costs the bound, with slope 0.

    Raises:
        ValueError: the shapes differ, `delta` is not > 0, or the knots are not three in that
            order (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Hampel (1974), Journal of the American Statistical Association 69, 383-393;
    Andrews et al. (1972), Robust Estimates of Location.

    >>> rl.influence(hampel, jnp.array([1.0, 2.0, 5.75, -9.0]))
    Array([1.  , 1.5 , 0.75, 0.  ], dtype=float32)
    """
    if len(knots) != 3:
        raise ValueError(f"knots must be three numbers (a, b, c), got {len(knots)}")
    unit = positive("delta", delta)
    a, c = (positive("knots", knot) for knot in (knots[0], knots[2]))
    law = "must be in the order a <= b < c"
    b = constrained("knots", law, lambda b, a, c: (a <= b) & (b < c), knots[1], knots[0], knots[2])
    return elementwise(_hampel_held, predictions, targets, a * unit, b * unit, c * unit)


def _hampel_held(r: Array, a: Array, b: Array, c: Array) -> Array:
    broken = flat(a + b + c)
    a, b, c = capped(a, 4) + broken, capped(b, 2) + broken, capped(c) + broken
    return _hampel(r, a, b, c)


@with_partials(
    lambda r, a, b, c: _hampel_slope(r, a, b, c),
    lambda r, a, b, c: _hampel_by_a(r, a, b, c),
    lambda r, a, b, c: 0.5 * a * (1 - _fall(r, b, c) ** 2) * _past(r, b),
    lambda r, a, b, c: 0.5 * a * (1 - _fall(r, b, c)) ** 2 * _past(r, b),
)
def _hampel(r: Array, a: Array, b: Array, c: Array) -> Array:
    x = _at_most(jnp.abs(r), c)
    y = jnp.maximum(x - b, 0)
    # y (1 - y / (c - b) / 2) is what the falling part adds to b - a / 2.
    top = 0.5 * y * (2 - y / (c - b))
    bent = a * ((jnp.minimum(x, b) - 0.5 * a) + jnp.where(x > b, top, 0.0))
    return jnp.where(x > a, bent, 0.5 * x * x)


def _hampel_slope(r: Array, a: Array, b: Array, c: Array) -> Array:
    x = jnp.where(jnp.abs(r) > a, jnp.sign(r) * a, r)
    return x * _fall(r, b, c) + flat(jnp.abs(r) + c)


def _hampel_by_a(r: Array, a: Array, b: Array, c: Array) -> Array:
    x = _at_most(jnp.abs(r), b)
    rise = 0.5 * (c - b) * (1 - _fall(r, b, c) ** 2)
    return jnp.where(jnp.abs(r) > a, x - a + rise, 0.0) + flat(r)


@with_partials(
    lambda r, b, c: -jnp.sign(r) * _falling(r, b, c) / (c - b),
    lambda r, b, c: _falling(r, b, c) * _fall(r, b, c) / (c - b),
    lambda r, b, c: _falling(r, b, c) * (1 - _fall(r, b, c)) / (c - b),
)
def _fall(r: Array, b: Array, c: Array) -> Array:
    """1 up to |r| = b, then falling linearly to 0 at c."""
    x = _at_most(jnp.abs(r), c)
    return jnp.where(x > b, (c - x) / (c - b), 1.0)


def _falling(r: Array, b: Array, c: Array) -> Array:
    """1 between b and c, c included."""
    return within(r, c) - within(r, b)


def _past(r: Array, b: Array) -> Array:
    return 1 - within(r, b)


def talwar(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Talwar's loss, `min(r**2, delta**2) / 2`: least squares with the far points left out.

    Influence r up to `|r| = delta`, the edge included, and 0 beyond. It jumps there, and the
    second derivative, 1 inside and 0 outside, does not show the jump. Also called the
    truncated or skipped-mean loss, and the truncated quadratic.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: from where on a residual has no influence, > 0, in the residual's units;
            broadcasts to the residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual costs the bound, with slope 0.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Hinich and Talwar (1975), Journal of the American Statistical Association 70,
    113-119.

    >>> talwar(jnp.array([0.5, -3.0]), delta=2.0)
    Array([0.125, 2.   ], dtype=float32)
    """
    return elementwise(_talwar, predictions, targets, positive("delta", delta))


@with_partials(
    lambda r, d: _inside(r, d) * within(r, d),
    lambda r, d: capped(d) * (1 - within(r, d)),
)
def _talwar(r: Array, delta: Array) -> Array:
    a = _at_most(jnp.abs(r), delta)
    return 0.5 * a * a


# Shared by the family.


def _at_most(a: Array, top: Array) -> Array:
    """min(a, top), but NaN stays NaN."""
    return jnp.where(a > top, top, a) + flat(a + top)


def _inside(r: Array, edge: Array) -> Array:
    """r up to |r| = edge and 0 beyond."""
    return jnp.where(jnp.abs(r) > edge, 0.0, r) + flat(r + edge)


def _before(r: Array, edge: Array) -> Array:
    """r up to |r| = edge and 0 from there on: pi rounded may lie beyond pi, with a sine below 0."""
    return jnp.where(jnp.abs(r) >= edge, 0.0, r) + flat(r + edge)
