"""Redescending losses: an odd influence that returns to zero.

A point that is far enough away has no influence, or hardly any. In exchange, the mean loss has more
than one minimum, and the fit depends on the start: start from a robust fit, and not from least
squares. `delta` is the constant c of the usual convention, in which Tukey's is 4.685 for 95 %
efficiency at the normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustloss._arguments import constrained, positive
from robustloss.losses._double import multiply, product, quotient, ratio_with_errors
from robustloss.losses._extended import one_plus_square
from robustloss.losses._pieces import (
    atanh_series,
    bounded_ratio,
    capped,
    cosine,
    exp_series,
    inside_indicator,
    nan_or_zero,
    polynomial,
    sine,
)
from robustloss.losses._rule import automatic_partials, elementwise, with_partials

__all__ = ["andrews", "cauchy", "geman_mcclure", "hampel", "talwar", "tukey", "welsch"]


def cauchy(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Cauchy's loss, `delta**2 / 2 log(1 + (r / delta)**2)`, also called Lorentzian.

    The influence is `r / (1 + (r / delta)**2)`, largest at `|r| = delta`. It returns to zero
    slowly, as `delta**2 / r`, and the loss itself grows without bound. It is smooth everywhere.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the |r| with the largest influence, > 0, in the residual's units; broadcasts to the
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


@with_partials(lambda r, d: _cauchy_slope(r, d), lambda r, d: _cauchy_by_delta(r, d))
def _cauchy(r: Array, delta: Array) -> Array:
    # log(1 + z) = 2 atanh(s), s = z / (2 + z), for z = (r / delta)**2 up to 1.
    a, delta = jnp.abs(r), capped(delta)
    t = bounded_ratio(r, delta)
    z, _ = product(t, t)  # a rounded product, which no program can fuse into 2 + z
    s = z / (2 + z)
    series = 1 + s * s * atanh_series(s * s)
    near = a * (a / (2 + z)) * series
    far = delta * (delta * (_log_ratio(a, delta) + s * series))
    return jnp.where(a > delta, far, near)


@with_partials(lambda r, d: _cauchy_curvature(r, d), lambda r, d: _cauchy_slope_by_delta(r, d))
def _cauchy_slope(r: Array, delta: Array) -> Array:
    a, t = jnp.abs(r), bounded_ratio(r, delta)
    # With a sixteenth of the divisor, as the quotient may be subnormal where its product with
    # delta is not.
    far = 0.0625 * (delta * (delta / (0.0625 * jnp.maximum(a, delta))))
    return jnp.sign(r) * (jnp.where(a > delta, far, a) / (1 + t * t))


@with_partials(
    lambda r, d: 2 * sine(r, d) * cosine(r, d) ** 3 * (1 - 4 * cosine(r, d) ** 2) / d,
    lambda r, d: -2 * (sine(r, d) * cosine(r, d)) ** 2 * (1 - 4 * cosine(r, d) ** 2) / d,
)
def _cauchy_curvature(r: Array, delta: Array) -> Array:
    t = bounded_ratio(r, delta)
    w = 1 / (1 + t * t)
    return (1 - t) * (1 + t) * (w * w) * jnp.where(jnp.abs(r) > delta, -t * t, 1.0)


def _cauchy_slope_by_delta(r: Array, delta: Array) -> Array:
    return 2 * sine(r, delta) ** 3 * cosine(r, delta)


@with_partials(lambda r, d: _cauchy_slope_by_delta(r, d), lambda r, d: _cauchy_by_delta2(r, d))
def _cauchy_by_delta(r: Array, delta: Array) -> Array:
    """delta (log(1 + z) - z / (1 + z)), z = (r / delta)**2."""
    a, delta = jnp.abs(r), capped(delta)
    z = bounded_ratio(r, delta) ** 2
    s = z / (2 + z)
    near = multiply(delta, s, z / (1 + z) + 2 * s * s * atanh_series(s * s))
    far = 2 * _log_ratio(a, delta) + jnp.log1p(z) - 1 / (1 + z)
    return jnp.where(a > delta, delta * far, near)


@with_partials(
    lambda r, d: 2 * sine(r, d) ** 3 * cosine(r, d) * (1 - 4 * cosine(r, d) ** 2) / d,
    lambda r, d: -2 * sine(r, d) ** 4 * (1 - 4 * cosine(r, d) ** 2) / d,
)
def _cauchy_by_delta2(r: Array, delta: Array) -> Array:
    """log(1 + z) - t - 2 t**2, t = z / (1 + z)."""
    a, delta = jnp.abs(r), capped(delta)
    z = bounded_ratio(r, delta) ** 2
    s, t = z / (2 + z), z / (1 + z)
    near = s * (t + 2 * s * s * atanh_series(s * s)) - 2 * t * t
    one = jnp.ones_like(delta)
    w = one_plus_square(r, one, 0 * one, delta)
    far = w.log - (w.t + 2 * w.t * w.t - w.log_error)
    return jnp.where(jnp.isinf(r), a, jnp.where(a > delta, far, near))


def _log_ratio(a: Array, delta: Array) -> Array:
    """log(a / delta) for a > delta, even if the quotient overflows."""
    half = jnp.finfo(a.dtype).maxexp // 2
    t = delta / a
    # The rounding error of t in -log(t) mostly cancels with that in the rest of the formula.
    near = -jnp.log(jnp.maximum(t, 2.0**-half))
    far = jnp.log(capped(a * 2.0**-half / delta)) + half * math.log(2)
    return jnp.where(t > 2.0**-half, near, jnp.where(jnp.isinf(a), a, far))


def geman_mcclure(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Geman and McClure's loss, `(r**2 / 2) / (1 + (r / delta)**2)`.

    The influence is `r / (1 + (r / delta)**2)**2`, largest at `delta / sqrt(3)`. It returns to
    zero as the inverse cube. The loss is bounded by `delta**2 / 2` and smooth everywhere.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the |r| at which the loss is half its bound, > 0, in the residual's units;
            broadcasts to the residual and can be differentiated.

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
    lambda r, d: _geman_mcclure_slope(d, jnp.abs(r)) + nan_or_zero(r),
)
def _geman_mcclure(r: Array, delta: Array) -> Array:
    delta = capped(delta)
    small = jnp.minimum(jnp.abs(r), delta)
    return 0.5 * small * (small / (1 + bounded_ratio(r, delta) ** 2)) + nan_or_zero(r)


@with_partials(
    lambda r, d: _geman_mcclure_curvature(r, d),
    lambda r, d: _geman_mcclure_slope_by_delta(r, d),
)
def _geman_mcclure_slope(r: Array, delta: Array) -> Array:
    # The loss, (r delta)**2 / (r**2 + delta**2) / 2, is symmetric in |r| and delta. So this
    # function with the two exchanged is the derivative in delta.
    a = jnp.abs(r)
    t, t2, q, t_error, t2_error, q_error = ratio_with_errors(r, delta)
    small = jnp.minimum(a, delta) / (q * q)
    inside = small - small * (2 * q_error)
    outside = small * t * t2
    outside = outside + outside * (t_error + t2_error - 2 * q_error)
    return jnp.sign(r) * jnp.where(a > delta, outside, inside)


@with_partials(
    lambda r, d: 12 * sine(r, d) * cosine(r, d) ** 5 * (1 - 2 * cosine(r, d) ** 2) / d,
    lambda r, d: -12 * sine(r, d) ** 2 * cosine(r, d) ** 4 * (1 - 2 * cosine(r, d) ** 2) / d,
)
def _geman_mcclure_curvature(r: Array, delta: Array) -> Array:
    # (1 - 3 z) / (1 + z)**3
    _, t2, q, _, t2_error, q_error = ratio_with_errors(r, delta)
    cube = 1 / (q * q * q)
    cube = cube - cube * (3 * q_error)
    outside = t2 * (t2 * (t2 - 3))
    outside = outside + outside * (2 * t2_error)
    curvature = cube * jnp.where(jnp.abs(r) > delta, outside, 1 - 3 * t2)
    return jnp.where(jnp.isinf(r), nan_or_zero(delta), curvature) + nan_or_zero(r)


@with_partials(
    lambda r, d: -12 * sine(r, d) ** 2 * cosine(r, d) ** 4 * (1 - 2 * cosine(r, d) ** 2) / d,
    lambda r, d: 12 * (sine(r, d) * cosine(r, d)) ** 3 * (1 - 2 * cosine(r, d) ** 2) / d,
)
def _geman_mcclure_slope_by_delta(r: Array, delta: Array) -> Array:
    """4 u**3 / (1 + u**2)**3, where u / (1 + u**2) is the same for 1 / u."""
    t = bounded_ratio(r, delta)
    return _four_cubed(jnp.sign(r) * (t / (1 + t * t)))


def _four_cubed(x: Array) -> Array:
    """4 x**3."""
    return 4 * x * x * x


def welsch(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Welsch's loss, `delta**2 / 2 (1 - exp(-(r / delta)**2))`, also called Leclerc's.

    The influence is `r exp(-(r / delta)**2)`, largest at `delta / sqrt(2)`. It decays faster than
    any power. The loss is bounded by `delta**2 / 2` and smooth everywhere. (Other authors write
    `exp(-(r / k)**2 / 2)`, where k is `delta / sqrt(2)`.)

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the |r| at which the weight is 1 / e, > 0, in the residual's units; broadcasts to the
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


@with_partials(lambda r, d: _welsch_slope(r, d), lambda r, d: _welsch_by_delta(r, d))
def _welsch(r: Array, delta: Array) -> Array:
    delta = capped(delta, 64)
    a = _minimum(jnp.abs(r), _VANISHED * delta)
    z = (a / delta) ** 2
    near = 0.5 * a * (a * (1 + z * exp_series(z)))
    far = 0.5 * delta * (delta * (1 - jnp.exp(-z)))
    return jnp.where(z > math.log(2), far, near)


@with_partials(
    lambda r, d: _welsch_curvature(r, d),
    lambda r, d: _welsch_slope_by_delta(r, d),
)
def _welsch_slope(r: Array, delta: Array) -> Array:
    _, multiply_weight = _welsch_weight(r, delta)
    return multiply_weight(jnp.where(jnp.isinf(r), 0.0, r))


@with_partials(
    lambda r, d: _welsch_third(r, d),
    lambda r, d: -_clipped_ratio(r, d) * _welsch_third(r, d),
)
def _welsch_curvature(r: Array, delta: Array) -> Array:
    z, multiply_weight = _welsch_weight(r, delta)
    return multiply_weight(1 - 2 * z)


@with_partials(
    lambda r, d: -_clipped_ratio(r, d) * _welsch_third(r, d),
    lambda r, d: _clipped_ratio(r, d) ** 2 * _welsch_third(r, d),
)
def _welsch_slope_by_delta(r: Array, delta: Array) -> Array:
    """2 u**3 exp(-z), u = r / delta, z = u**2."""
    u, (_, multiply_weight) = _clipped_ratio(r, delta), _welsch_weight(r, delta)
    return multiply_weight(2 * u * u * u)


@with_partials(lambda r, d: _welsch_slope_by_delta(r, d), lambda r, d: _welsch_by_delta2(r, d))
def _welsch_by_delta(r: Array, delta: Array) -> Array:
    """delta (1 - (1 + z) exp(-z))."""
    delta = capped(delta)
    z = _clipped_ratio(r, delta) ** 2
    far = delta * (1 - (1 + z) * jnp.exp(-z))
    return jnp.where(z > math.log(2), far, multiply(delta, z, z, _welsch_series(z)))


@with_partials(
    lambda r, d: _clipped_ratio(r, d) ** 2 * _welsch_third(r, d),
    lambda r, d: -(_clipped_ratio(r, d) ** 3) * _welsch_third(r, d),
)
def _welsch_by_delta2(r: Array, delta: Array) -> Array:
    """1 - (1 + z + 2 z**2) exp(-z)."""
    z = _clipped_ratio(r, capped(delta)) ** 2
    e = jnp.exp(-z)
    near = z * (z * (_welsch_series(z) - 2 * e))
    return jnp.where(z > math.log(2), 1 - (1 + z + 2 * z * z) * e, near)


def _welsch_series(z: Array) -> Array:
    """(1 - (1 + z) exp(-z)) / z**2 for z up to log 2."""
    small = jnp.where(z > math.log(2), 0.0, z)
    series = exp_series(small)
    return 1 + series + small * series


@with_partials(
    *automatic_partials(
        lambda r, d: (
            (4 * _clipped_ratio(r, d) ** 2 - 6)
            * _clipped_ratio(r, d)
            * jnp.exp(-(_clipped_ratio(r, d) ** 2))
            / d
        ),
        2,
    )
)
def _welsch_third(r: Array, delta: Array) -> Array:
    """u (4 z - 6) exp(-z) / delta. Times a power of -u, it is any third derivative."""
    z, multiply_weight = _welsch_weight(r, delta)
    return multiply_weight((4 * z - 6) * _clipped_ratio(r, delta) / delta)


def _welsch_weight(r: Array, delta: Array) -> tuple[Array, Callable[[Array], Array]]:
    """z = (r / delta)**2, and a function that multiplies by exp(-z).

    The exponential amplifies the rounding error of z, which is corrected. The exponential may be
    subnormal where the product is not, so it is multiplied in up to three parts.
    """
    delta = capped(delta, 64)
    u, u_error = quotient(_minimum(jnp.abs(r), _VANISHED * delta), delta)
    z, z_error = product(u, u)
    part = 64.0 if z.dtype == jnp.float32 else 512.0
    above_one, above_two = z > part, z > 2 * part
    shift = jnp.where(above_two, 2 * part, jnp.where(above_one, part, 0.0))
    e = jnp.exp(shift - z) * (1 - (z_error + 2 * u * u_error))

    def multiply_weight(x: Array) -> Array:
        x = x * e * jnp.where(above_one, math.exp(-part), 1.0)
        return x * jnp.where(above_two, math.exp(-part), 1.0)

    return z, multiply_weight


def _clipped_ratio(r: Array, delta: Array) -> Array:
    """r / delta, clipped where exp(-(r / delta)**2) is 0."""
    delta = capped(delta, 64)
    return jnp.clip(r, -_VANISHED * delta, _VANISHED * delta) / delta


_VANISHED = 40.0  # |r| / delta from which exp(-(r / delta)**2) is 0 in every precision


def tukey(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Tukey's biweight (bisquare), `delta**2 / 6 (1 - (1 - (r / delta)**2)**3)` up to `delta`.

    The influence is `r (1 - (r / delta)**2)**2`, largest at `delta / sqrt(5)` and 0 from `delta`
    on, where the loss stays at `delta**2 / 6`. The influence and its derivative are continuous.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the |r| from which a residual has no influence, > 0, in the residual's units;
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


@with_partials(lambda r, d: _tukey_slope(r, d), lambda r, d: _tukey_by_delta(r, d))
def _tukey(r: Array, delta: Array) -> Array:
    delta = capped(delta)
    a = _minimum(jnp.abs(r), delta)
    z = (a / delta) ** 2
    q = _margin(a, delta)
    far = delta * (delta * ((1 - q * q * q) / 6))
    return jnp.where(z > 0.5, far, 0.5 * a * (a * (1 - z + z * z / 3)))


@with_partials(lambda r, d: _tukey_curvature(r, d), lambda r, d: _tukey_slope_by_delta(r, d))
def _tukey_slope(r: Array, delta: Array) -> Array:
    delta = capped(delta)
    inside = _truncated(r, delta)
    q = _margin(jnp.abs(r), delta)
    return inside * (q * q)


@with_partials(
    lambda r, d: _tukey_third(r, d),
    lambda r, d: -_truncated_ratio(r, d) * _tukey_third(r, d),
)
def _tukey_curvature(r: Array, delta: Array) -> Array:
    delta = capped(delta)
    u = _truncated_ratio(r, delta)
    return _margin(jnp.abs(r), delta) * (1 - 5 * u * u)


@with_partials(
    lambda r, d: -_truncated_ratio(r, d) * _tukey_third(r, d),
    lambda r, d: _truncated_ratio(r, d) ** 2 * _tukey_third(r, d),
)
def _tukey_slope_by_delta(r: Array, delta: Array) -> Array:
    """4 u**3 (1 - u**2), u = r / delta."""
    delta = capped(delta)
    return _four_cubed(_truncated_ratio(r, delta)) * _margin(jnp.abs(r), delta)


@with_partials(lambda r, d: _tukey_slope_by_delta(r, d), lambda r, d: _tukey_by_delta2(r, d))
def _tukey_by_delta(r: Array, delta: Array) -> Array:
    """delta u**4 (1 - 2 / 3 u**2), and delta / 3 beyond delta."""
    delta = capped(delta)
    u = _truncated_ratio(r, delta)
    inside = multiply(delta, u, u, u, u, 1 - 2 * u * u / 3)
    return jnp.where(jnp.abs(r) > delta, delta / 3, inside)


@with_partials(
    lambda r, d: _truncated_ratio(r, d) ** 2 * _tukey_third(r, d),
    lambda r, d: -(_truncated_ratio(r, d) ** 3) * _tukey_third(r, d),
)
def _tukey_by_delta2(r: Array, delta: Array) -> Array:
    """u**4 (10 / 3 u**2 - 3), and 1 / 3 beyond delta."""
    delta = capped(delta)
    z = _truncated_ratio(r, delta) ** 2
    return jnp.where(jnp.abs(r) > delta, 1 / 3, z * (z * (10 * z / 3 - 3)))


def _tukey_third(r: Array, delta: Array) -> Array:
    """u (20 u**2 - 12) / delta. Times a power of -u, it is any third derivative."""
    u = _truncated_ratio(r, delta)
    return u * (20 * u * u - 12) / delta


def _truncated_ratio(r: Array, delta: Array) -> Array:
    """r / delta for |r| <= delta, else 0."""
    return _truncated(r, delta) / delta


@with_partials(
    lambda a, d: -2 * _truncated(a, d) / d / d,
    lambda a, d: 2 * (_truncated(a, d) / d) ** 2 / d,
)
def _margin(a: Array, delta: Array) -> Array:
    """1 - (a / delta)**2 for a <= delta, else 0, without cancellation."""
    t, error = quotient(delta - _minimum(a, delta), delta)
    return t * (2 - t) + 2 * (1 - t) * error


def andrews(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Andrews' wave, `delta**2 (1 - cos(r / delta))` up to `|r| = pi delta`.

    The influence is `delta sin(r / delta)`, largest at `pi / 2 delta` and 0 from `pi delta` on,
    where the loss stays at `2 delta**2`. The second derivative is `cos(r / delta)`. At
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


@with_partials(lambda r, d: _andrews_slope(r, d), lambda r, d: _andrews_by_delta(r, d))
def _andrews(r: Array, delta: Array) -> Array:
    delta = capped(delta, 4)
    a = _minimum(jnp.abs(r), math.pi * delta)
    u = a / delta
    near = 0.5 * a * (a * polynomial(u * u, _ANDREWS_VALUE))
    return jnp.where(u > 0.5 * math.pi, delta * (delta * (1 - jnp.cos(u))), near)


@with_partials(lambda r, d: _andrews_curvature(r, d), lambda r, d: _andrews_slope_by_delta(r, d))
def _andrews_slope(r: Array, delta: Array) -> Array:
    delta = capped(delta, 4)
    return _scaled_sine(_truncated_open(r, math.pi * delta), delta)


@with_partials(
    lambda r, d: -jnp.sin(_truncated_angle(r, d)) / d,
    lambda r, d: _truncated_angle(r, d) * jnp.sin(_truncated_angle(r, d)) / d,
)
def _andrews_curvature(r: Array, delta: Array) -> Array:
    delta = capped(delta, 4)
    return jnp.where(jnp.abs(r) >= math.pi * delta, 0.0, jnp.cos(_truncated_angle(r, delta)))


@with_partials(
    lambda r, d: _truncated_angle(r, d) * jnp.sin(_truncated_angle(r, d)) / d,
    lambda r, d: -(_truncated_angle(r, d) ** 2) * jnp.sin(_truncated_angle(r, d)) / d,
)
def _andrews_slope_by_delta(r: Array, delta: Array) -> Array:
    """sin u - u cos u, u = r / delta."""
    u = _truncated_angle(r, delta)
    small = jnp.where(jnp.abs(u) > 1, 1.0, u)
    near = small * (small * (small * polynomial(small * small, _ANDREWS_SLOPE_BY_DELTA)))
    return jnp.where(jnp.abs(u) > 1, jnp.sin(u) - u * jnp.cos(u), near)


@with_partials(lambda r, d: _andrews_slope_by_delta(r, d), lambda r, d: _andrews_by_delta2(r, d))
def _andrews_by_delta(r: Array, delta: Array) -> Array:
    """delta (2 (1 - cos u) - u sin u), and 4 delta from pi delta on."""
    u = _truncated_angle(r, delta)
    small = jnp.where(jnp.abs(u) > 1, 1.0, u)
    outside, delta = jnp.abs(r) >= math.pi * capped(delta, 4), capped(delta)
    near = multiply(delta, small, small, small, small, polynomial(small * small, _ANDREWS_BY_DELTA))
    far = delta * jnp.where(outside, 4.0, 2 * (1 - jnp.cos(u)) - u * jnp.sin(u))
    return jnp.where(outside | (jnp.abs(u) > 1), far, near)


@with_partials(
    lambda r, d: -(_truncated_angle(r, d) ** 2) * jnp.sin(_truncated_angle(r, d)) / d,
    lambda r, d: _truncated_angle(r, d) ** 3 * jnp.sin(_truncated_angle(r, d)) / d,
)
def _andrews_by_delta2(r: Array, delta: Array) -> Array:
    """2 (1 - cos u) - 2 u sin u + u**2 cos u, and 4 from pi delta on."""
    u = _truncated_angle(r, delta)
    small = jnp.where(jnp.abs(u) > 1, 1.0, u)
    z = small * small
    near = z * (z * polynomial(z, _ANDREWS_BY_DELTA2))
    far = 2 * (1 - jnp.cos(u)) - 2 * u * jnp.sin(u) + u * u * jnp.cos(u)
    curvature = jnp.where(jnp.abs(u) > 1, far, near)
    return jnp.where(jnp.abs(r) >= math.pi * capped(delta, 4), 4.0, curvature)


def _scaled_sine(r: Array, delta: Array) -> Array:
    """delta sin(r / delta), which is r for a quotient so small that it may underflow."""
    a = jnp.abs(r)
    u, error = quotient(a, delta)
    sine = jnp.sin(u) + error * jnp.cos(u)
    return jnp.sign(r) * jnp.where(u * u < jnp.finfo(r.dtype).eps, a, delta * sine)


def _truncated_angle(r: Array, delta: Array) -> Array:
    """r / delta for |r| < pi delta, else 0."""
    delta = capped(delta, 4)
    return _truncated_open(r, math.pi * delta) / delta


_ANDREWS_VALUE = tuple((-1.0) ** k * 2 / math.factorial(2 * k + 2) for k in range(13))
_ANDREWS_SLOPE_BY_DELTA = tuple(
    (-1.0) ** (k + 1) * 2 * k / math.factorial(2 * k + 1) for k in range(1, 11)
)
_ANDREWS_BY_DELTA = tuple((-1.0) ** k * (2 * k - 2) / math.factorial(2 * k) for k in range(2, 12))
_ANDREWS_BY_DELTA2 = tuple(
    (-1.0) ** (k + 1) * (4 * k - 2) * (k - 1) / math.factorial(2 * k) for k in range(2, 13)
)


def hampel(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    delta: ArrayLike = 1.0,
    knots: Sequence[ArrayLike] = (1.5, 3.5, 8.0),
) -> Array:
    """Hampel's three-part loss: Huber's loss, but with an influence that returns to zero.

    With the knots a, b, c (times `delta`) the influence is r up to a, stays at a up to b,
    decreases linearly to 0 at c, and is 0 beyond, where the loss stays at `a (b + c - a) / 2`. At
    a knot the second derivative is that of the side nearer to 0: 1 at a, 0 at b and
    `-a / (c - b)` at c.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the unit of the knots, > 0, in the residual's units; broadcasts to the residual
            and can be differentiated.
        knots: three numbers 0 < a <= b < c, in units of `delta`; with the default
            `delta=1.0` they are the knots themselves. Each broadcasts to the residual and
            can be differentiated. The default of R's MASS is (2, 4, 8). This one is
            robustbase's, where 95 % efficiency at the normal is at `delta=0.9014`.

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
    return elementwise(_hampel_capped, predictions, targets, a * unit, b * unit, c * unit)


def _hampel_capped(r: Array, a: Array, b: Array, c: Array) -> Array:
    invalid = nan_or_zero(a + b + c)
    a, b, c = capped(a, 4) + invalid, capped(b, 2) + invalid, capped(c) + invalid
    return _hampel(r, a, b, c)


@with_partials(
    lambda r, a, b, c: _hampel_slope(r, a, b, c),
    lambda r, a, b, c: _hampel_by_a(r, a, b, c),
    lambda r, a, b, c: 0.5 * a * (1 - _descent(r, b, c) ** 2) * _outside_indicator(r, b),
    lambda r, a, b, c: 0.5 * a * (1 - _descent(r, b, c)) ** 2 * _outside_indicator(r, b),
)
def _hampel(r: Array, a: Array, b: Array, c: Array) -> Array:
    x = _minimum(jnp.abs(r), c)
    y = jnp.maximum(x - b, 0)
    # y (1 - y / (c - b) / 2) is the integral of the descent, in units of a.
    descent_gain = 0.5 * y * (2 - y / (c - b))
    outer = a * ((jnp.minimum(x, b) - 0.5 * a) + jnp.where(x > b, descent_gain, 0.0))
    return jnp.where(x > a, outer, 0.5 * x * x)


def _hampel_slope(r: Array, a: Array, b: Array, c: Array) -> Array:
    x = jnp.where(jnp.abs(r) > a, jnp.sign(r) * a, r)
    return x * _descent(r, b, c) + nan_or_zero(jnp.abs(r) + c)


def _hampel_by_a(r: Array, a: Array, b: Array, c: Array) -> Array:
    x = _minimum(jnp.abs(r), b)
    rise = 0.5 * (c - b) * (1 - _descent(r, b, c) ** 2)
    return jnp.where(jnp.abs(r) > a, x - a + rise, 0.0) + nan_or_zero(r)


@with_partials(
    lambda r, b, c: -jnp.sign(r) * _descent_indicator(r, b, c) / (c - b),
    lambda r, b, c: _descent_indicator(r, b, c) * _descent(r, b, c) / (c - b),
    lambda r, b, c: _descent_indicator(r, b, c) * (1 - _descent(r, b, c)) / (c - b),
)
def _descent(r: Array, b: Array, c: Array) -> Array:
    """1 for |r| <= b, then a linear descent to 0 at c."""
    x = _minimum(jnp.abs(r), c)
    return jnp.where(x > b, (c - x) / (c - b), 1.0)


def _descent_indicator(r: Array, b: Array, c: Array) -> Array:
    """1 for b < |r| <= c, else 0."""
    return inside_indicator(r, c) - inside_indicator(r, b)


def _outside_indicator(r: Array, b: Array) -> Array:
    """1 for |r| > b, else 0."""
    return 1 - inside_indicator(r, b)


def talwar(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Talwar's loss, `min(r**2, delta**2) / 2`: least squares without the far points.

    The influence is r up to `|r| = delta`, the edge included, and 0 beyond. It jumps at the edge,
    and the second derivative, 1 inside and 0 outside, does not show the jump. Other names are the
    truncated or skipped-mean loss, and the truncated quadratic.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the |r| from which a residual has no influence, > 0, in the residual's units;
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
    lambda r, d: _truncated(r, d) * inside_indicator(r, d),
    lambda r, d: capped(d) * (1 - inside_indicator(r, d)),
)
def _talwar(r: Array, delta: Array) -> Array:
    a = _minimum(jnp.abs(r), delta)
    return 0.5 * a * a


# Functions that the losses of this family share.


def _minimum(a: Array, upper: Array) -> Array:
    """min(a, upper); NaN stays NaN."""
    return jnp.where(a > upper, upper, a) + nan_or_zero(a + upper)


def _truncated(r: Array, edge: Array) -> Array:
    """r for |r| <= edge, else 0; NaN stays NaN."""
    return jnp.where(jnp.abs(r) > edge, 0.0, r) + nan_or_zero(r + edge)


def _truncated_open(r: Array, edge: Array) -> Array:
    """r for |r| < edge, else 0. At the edge, pi rounded may be above pi, with a negative sine."""
    return jnp.where(jnp.abs(r) >= edge, 0.0, r) + nan_or_zero(r + edge)
