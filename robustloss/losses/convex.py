"""Convex losses: an odd influence that never decreases.

No point loses influence with its distance. So a linear fit has no local minima besides the global
one, and every residual has some influence on it.

The values are written so that their mean and its gradient are fast. XLA compiles these two into one
reduction and one map. It vectorises a reduction with min and max, but not with `where`. If the
reduction and the map share a term, be it |r| or a broadcast constant, XLA writes it to memory as
an array. So values are in terms of a half or a quarter of delta, which is exact, and slopes compute
|r| as max(r, -r). XLA's vectorised min and max drop a NaN on some CPUs, so a value also contains
the residual itself.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustloss._arguments import between, positive
from robustloss.losses._double import multiply, quotient, ratio_with_errors
from robustloss.losses._pieces import (
    atanh_series,
    capped,
    cosine,
    excess,
    inside_indicator,
    nan_or_zero,
    outside_sign,
    polynomial,
    sine,
)
from robustloss.losses._rule import elementwise, with_partials

__all__ = [
    "absolute_error",
    "epsilon_insensitive",
    "fair",
    "huber",
    "log_cosh",
    "pseudo_huber",
    "squared_error",
]


def squared_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """Squared error, `r**2`: the loss of least squares, whose mean is the MSE.

    The influence is `2 r`, without bound: one wild residual can move a fit anywhere. The loss has
    its textbook form, so near 0 it is twice the `r**2 / 2` of the other losses.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN; an infinite residual costs infinity.

    Raises:
        ValueError: the shapes differ.
        TypeError: complex or non-numeric input.

    Source: Gauss (1809), Theoria motus; Legendre (1805).

    >>> squared_error(3.0, 1.0)
    Array(4., dtype=float32)
    """
    return elementwise(_squared, predictions, targets)


@with_partials(lambda r: _squared_slope(r))
def _squared(r: Array) -> Array:
    return r * r


@with_partials(lambda r: 2 * nan_or_zero(r) + 2)
def _squared_slope(r: Array) -> Array:
    return 2 * r


def absolute_error(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, kink: ArrayLike = 0.0
) -> Array:
    """Absolute error, `|r|`: the loss of medians, whose mean is the MAE.

    The influence is `sign(r)`: only the sign of a residual counts, not its size. At r = 0 every
    number in [-1, 1] is a subgradient, and the derivative is `kink`. With the default 0, a perfect
    fit is stationary. The second derivative is 0 everywhere.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        kink: the derivative at r = 0, in [-1, 1].

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN has the value NaN and the slope NaN; infinity the slope 1.

    Raises:
        ValueError: the shapes differ, or `kink` is outside [-1, 1] (traced: a NaN slope).
        TypeError: complex or non-numeric input.

    Source: Boscovich (1757); Laplace (1793).

    >>> absolute_error(3.0, 5.0)
    Array(2., dtype=float32)
    >>> jax.vmap(jax.grad(absolute_error))(jnp.array([-2.0, 0.0, float("nan")]))
    Array([-1.,  0., nan], dtype=float32)
    """
    return elementwise(_absolute, predictions, targets, between("kink", kink, -1.0, 1.0))


@with_partials(lambda r, kink: _sign_with_kink(r, kink), lambda r, kink: jnp.zeros_like(r))
def _absolute(r: Array, kink: Array) -> Array:
    return jnp.abs(r)


@with_partials(
    lambda r, kink: nan_or_zero(r), lambda r, kink: jnp.where(r == 0, 1.0, nan_or_zero(r))
)
def _sign_with_kink(r: Array, kink: Array) -> Array:
    return jnp.where(r == 0, kink, jnp.sign(r))


def huber(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Huber's loss: `r**2 / 2` up to `|r| = delta`, then `delta (|r| - delta / 2)`.

    The influence is `clip(r, -delta, delta)`. At `|r| = delta` the second derivative is that of
    the quadratic side, 1; beyond, it is 0.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the |r| from which the loss is linear, > 0, in the residual's units; broadcasts to
            the residual and can be differentiated. Infinity gives half the squared error.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual has the slope `delta`.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Huber (1964), Annals of Mathematical Statistics 35, 73-101.

    >>> huber(jnp.array([0.5, -3.0]), delta=1.0)
    Array([0.125, 2.5  ], dtype=float32)
    """
    return elementwise(_huber, predictions, targets, positive("delta", delta))


@with_partials(lambda r, d: _clipped(r, d), lambda r, d: excess(r, d))
def _huber(r: Array, delta: Array) -> Array:
    a = jnp.abs(r)
    half = jnp.minimum(0.5 * a, 0.5 * capped(delta))
    return (half + half) * (a - half)


@with_partials(lambda r, d: inside_indicator(r, d), lambda r, d: outside_sign(r, d))
def _clipped(r: Array, delta: Array) -> Array:
    return jnp.maximum(jnp.minimum(r, delta), -delta)


def log_cosh(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Log-cosh, `delta**2 log(cosh(r / delta))`: a Huber loss without a corner.

    The influence is `delta tanh(r / delta)`, the curvature `sech(r / delta)**2`; the loss is
    smooth everywhere. For a large |r| it is `delta (|r| - delta log 2)`.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the size of residuals from which the loss departs from `r**2 / 2`, > 0, in the
            residual's units; broadcasts to the residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual has the slope `delta`.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Green (1990), IEEE Transactions on Medical Imaging 9, 84-93.

    >>> log_cosh(jnp.array([0.0, 100.0]))
    Array([ 0.      , 99.306854], dtype=float32)
    """
    return elementwise(_log_cosh, predictions, targets, positive("delta", delta))


@with_partials(lambda r, d: _log_cosh_slope(r, d), lambda r, d: _log_cosh_by_delta(r, d))
def _log_cosh(r: Array, delta: Array) -> Array:
    # log cosh(c + w) = log cosh c + w + log(1 + k (exp(-2 w) - 1)), k = 1 / (1 + exp(2 c)). The
    # series gives the first term, up to its end c. Before c, w and the remainder are exactly 0.
    a, fourth = jnp.abs(r), 0.25 * capped(delta, 32)
    inner = jnp.minimum(a, 4 * _SERIES_END * fourth)
    w = a - inner
    z = 0.0625 * (inner / fourth) ** 2
    k = 1 / (1 + math.exp(2 * _SERIES_END))
    remainder = 0.25 * w + fourth * jnp.log1p(k * (jnp.exp(-0.5 * (w / fourth)) - 1))
    return inner * (inner * (0.5 + z * _value_series(z))) + 16 * fourth * remainder


@with_partials(lambda r, d: _log_cosh_curvature(r, d), lambda r, d: _log_cosh_slope_by_delta(r, d))
def _log_cosh_slope(r: Array, delta: Array) -> Array:
    a = jnp.maximum(r, -r)
    z = (r / delta) ** 2
    far = delta - 2 * delta / (1 + jnp.exp(2 * (a / delta)))
    return jnp.where(
        a > 0.99 * _SERIES_END * delta, jnp.copysign(far, r), r + r * (z * _slope_series(z))
    )


@with_partials(
    lambda r, d: -_log_cosh_third(r, d), lambda r, d: _clipped_ratio(r, d) * _log_cosh_third(r, d)
)
def _log_cosh_curvature(r: Array, delta: Array) -> Array:
    delta = capped(delta)
    u, error = quotient(jnp.minimum(jnp.abs(r), _VANISHED * delta), delta)
    # The rounding error of u, which the exponential amplifies 2 u times, and that of 1 + e are
    # corrected. As e may be subnormal where 4 e is not, a part of its exponent is left to the end.
    shift = jnp.where(u > 40.0, 4.0, 0.0)
    e = jnp.exp(shift - 2 * u)
    q = 1 + e
    e = e - 2 * e * (error + (e - (q - 1)) / q)
    return 4 * e * jnp.exp(-shift) / (q * q)


@with_partials(
    lambda r, d: _log_cosh_slope_by_delta(r, d),
    lambda r, d: _log_cosh_by_delta2(r, d),
)
def _log_cosh_by_delta(r: Array, delta: Array) -> Array:
    """delta (2 log cosh u - u tanh u), u = r / delta."""
    delta = capped(delta)
    u = jnp.abs(r) / delta
    z = u * u
    tanh = jnp.abs(_log_cosh_slope(r, delta)) / delta
    far = u * (2 - tanh) - 2 * (math.log(2) - jnp.log1p(jnp.exp(-2 * u)))
    near = multiply(delta, u, u, u, u, _series(z, _BY_DELTA_32, _BY_DELTA_64))
    return jnp.where(u > 1, delta * far, near)


@with_partials(
    lambda r, d: _clipped_ratio(r, d) * _log_cosh_third(r, d),
    lambda r, d: -(_clipped_ratio(r, d) ** 2) * _log_cosh_third(r, d),
)
def _log_cosh_slope_by_delta(r: Array, delta: Array) -> Array:
    """tanh u - u sech(u)**2, u = r / delta."""
    u = _clipped_ratio(r, delta)
    far = _log_cosh_slope(r, delta) / delta - u * _log_cosh_curvature(r, delta)
    near = multiply(u, u, u, _series(u * u, _SLOPE_BY_DELTA_32, _SLOPE_BY_DELTA_64))
    return jnp.where(jnp.abs(u) > _SERIES_END, far, near)


@with_partials(
    lambda r, d: -(_clipped_ratio(r, d) ** 2) * _log_cosh_third(r, d),
    lambda r, d: _clipped_ratio(r, d) ** 3 * _log_cosh_third(r, d),
)
def _log_cosh_by_delta2(r: Array, delta: Array) -> Array:
    """2 log cosh u - 2 u tanh u + (u sech u)**2, u = r / delta."""
    delta = capped(delta)
    u = jnp.abs(_clipped_ratio(r, delta))
    e = jnp.exp(-2 * u)
    far = (
        4 * u * e / (1 + e)
        - 2 * (math.log(2) - jnp.log1p(e))
        + u * u * _log_cosh_curvature(r, delta)
    )
    near = u * (u * (u * (u * _series(u * u, _BY_DELTA2_32, _BY_DELTA2_64))))
    return jnp.where(u > _SERIES_END, far, near)


def _log_cosh_third(r: Array, delta: Array) -> Array:
    """2 tanh(u) sech(u)**2 / delta. Times a power of -u, it is any third derivative, up to sign."""
    return 2 * (_log_cosh_slope(r, delta) / delta) * _log_cosh_curvature(r, delta) / delta


def _clipped_ratio(r: Array, delta: Array) -> Array:
    """r / delta, clipped where every derivative is 0."""
    return jnp.clip(r, -_VANISHED * delta, _VANISHED * delta) / delta


_SERIES_END = 0.625  # |r| / delta up to which the series are used
_VANISHED = 400.0  # |r| / delta from which sech**2 is 0 in every precision


def _value_series(z: Array) -> Array:
    """(log cosh u - u**2 / 2) / u**4 in z = u**2."""
    return _series(z, _VALUE_32, _VALUE_64)


def _slope_series(z: Array) -> Array:
    """(tanh u - u) / u**3 in z = u**2."""
    return _series(z, _SLOPE_32, _SLOPE_64)


def _series(z: Array, single: tuple[float, ...], double: tuple[float, ...]) -> Array:
    """A minimax polynomial in the precision of z = u**2.

    It holds for u up to `_SERIES_END`, that of `_log_cosh_by_delta` up to 1.
    """
    return polynomial(z, double if z.dtype == jnp.float64 else single)


# The coefficients of the series in z = u**2: of the value and the slope as above, and of the
# formulas of _log_cosh_by_delta, _log_cosh_slope_by_delta and _log_cosh_by_delta2, each divided by
# the first power of u in its Taylor series.

# fmt: off
_VALUE_32 = (
    -0.08333329515900928, 0.02222081242089496, -0.006728983486077059, 0.002095441212180546,
    -0.0005060380640072278,
)
_SLOPE_32 = (
    -0.3333333080273412, 0.13333206008408596, -0.05394676305861096, 0.021700703174011307,
    -0.008177398064015762, 0.0021429616470536516,
)
_VALUE_64 = (
    -0.08333333333333315, 0.022222222222193534, -0.006746031744538705, 0.0021869488147878285,
    -0.0007386023725483203, 0.0002565749472076815, -9.09541768407684e-05,
    3.2629123692427735e-05, -1.1530091974281804e-05, 3.611982108220787e-06,
    -7.170295355774862e-07,
)
_SLOPE_64 = (
    -0.33333333333332854, 0.13333333333262093, -0.0539682539312682, 0.02186948757610254,
    -0.008863221002700417, 0.003591989174171409, -0.0014549588790114668,
    0.0005863165416739727, -0.00022856421066295903, 7.714436331846061e-05,
    -1.6072566963512767e-05,
)
_BY_DELTA_32 = (
    0.16666666665415025, -0.08888888640527244, 0.040476108479912606, -0.017494531008707764,
    0.0073789913929030075, -0.0030516750392980503, 0.0012077593705269263,
    -0.0004209382413587263, 0.00010850839776102556, -1.4498586684581439e-05,
)
_BY_DELTA_64 = (
    0.16666666666666666, -0.08888888888888889, 0.04047619047619048, -0.01749559082892416,
    0.007386029608251749, -0.0030789668884888383, 0.0012738550886415292,
    -0.0005244688360882594, 0.0002152162003473032, -8.810487538950701e-05,
    3.6005058135433985e-05, -1.469410211082186e-05, 5.9900339654974105e-06,
    -2.4384546099592805e-06, 9.895416469190414e-07, -3.978610039875819e-07,
    1.5603244159003133e-07, -5.786897320148164e-08, 1.9321023760103844e-08,
    -5.426320848542117e-09, 1.1704359912503845e-09, -1.6863964164656636e-10,
    1.1980684232270514e-11,
)
_SLOPE_BY_DELTA_32 = (
    0.6666666657782155, -0.5333331100306452, 0.3238002914866809, -0.17481143542159985,
    0.08754032151305012, -0.03875322118010126, 0.01121582721572889,
)
_SLOPE_BY_DELTA_64 = (
    0.6666666666666666, -0.5333333333333332, 0.3238095238094988, -0.17495590828759544,
    0.08863235524238856, -0.04310553526906652, 0.020381665719041014, -0.009440295479679874,
    0.004303403972176167, -0.0019341192787946954, 0.0008505636376324807,
    -0.0003511859448315776, 0.00011959328181757888, -2.3860938579908752e-05,
)
_BY_DELTA2_32 = (
    -0.49999999916382415, 0.4444442342780715, -0.283324643591624, 0.15732431866456206,
    -0.08021812469784864, 0.035927076692472915, -0.010467707179957876,
)
_BY_DELTA2_64 = (
    -0.5, 0.4444444444444443, -0.2833333333333091, 0.1574603174587261, -0.08124632563602249,
    0.040026568419506664, -0.01910781115247088, 0.008915831413195865, -0.0040882182949176634,
    0.001846153076371265, -0.0008150062412886079, 0.00033750638185739955,
    -0.00011517383549896093, 2.3008979522176295e-05,
)
# fmt: on


def pseudo_huber(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Pseudo-Huber loss, `delta**2 (sqrt(1 + (r / delta)**2) - 1)`: a hyperbola.

    The influence is `r / sqrt(1 + (r / delta)**2)`, the curvature `(1 + (r / delta)**2)**(-3/2)`;
    the loss is smooth everywhere. For a large |r| it is `delta (|r| - delta)`. In computer vision
    it is Charbonnier's loss, and SciPy's `soft_l1` is twice this loss.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the size of residuals from which the loss departs from `r**2 / 2`, > 0, in the
            residual's units; broadcasts to the residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual has the slope `delta`.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Charbonnier et al. (1997), IEEE Transactions on Image Processing 6, 298-311;
    Hartley and Zisserman (2003), Multiple View Geometry, appendix 6.

    >>> pseudo_huber(jnp.array([0.75, -2.4]))
    Array([0.25, 1.6 ], dtype=float32)
    """
    return elementwise(_pseudo_huber, predictions, targets, positive("delta", delta))


@with_partials(lambda r, d: _pseudo_huber_slope(r, d), lambda r, d: _pseudo_huber_by_delta(r, d))
def _pseudo_huber(r: Array, delta: Array) -> Array:
    a, half = jnp.abs(r), 0.5 * capped(delta, 32)
    big, small = jnp.maximum(0.5 * a, half), jnp.minimum(0.5 * a, half)
    # small a / (delta / big + sqrt(1 + t**2)), where the root is 1 + t**2 / (1 + root). Its 1 is
    # added last, so that there is one rounding instead of three.
    t2 = (2 * small / big) ** 2
    return 16 * small * (a / (8 + (8 * half / big + 4 * t2 / (2 + jnp.sqrt(4 + t2)))))


@with_partials(lambda r, d: _pseudo_huber_curvature(r, d), lambda r, d: sine(r, d) ** 3)
def _pseudo_huber_slope(r: Array, delta: Array) -> Array:
    a = jnp.maximum(r, -r)
    big, small = jnp.maximum(a, delta), jnp.minimum(a, delta)
    return jnp.sign(r) * (small / jnp.sqrt(1 + (small / big) ** 2))


@with_partials(
    lambda r, d: sine(r, d) ** 3,
    lambda r, d: -(_versine(r, d) * (2 + cosine(r, d))) * _versine(r, d),
)
def _pseudo_huber_by_delta(r: Array, delta: Array) -> Array:
    delta = capped(delta)
    s, c = sine(r, delta), cosine(r, delta)
    return multiply(delta, s, s, s, s, 1 / (c * (1 + c) ** 2))


@with_partials(
    lambda r, d: -3 * sine(r, d) * cosine(r, d) ** 4 / d,
    lambda r, d: 3 * sine(r, d) ** 2 * cosine(r, d) ** 3 / d,
)
def _pseudo_huber_curvature(r: Array, delta: Array) -> Array:
    # (1 + t**2)**(-3/2), times t**3 for |r| > delta.
    t, t2, q, t_error, t2_error, q_error = ratio_with_errors(r, delta)
    cube = 1 / (q * jnp.sqrt(q))
    inside = cube - cube * (1.5 * q_error)
    outside = t * (t2 * cube)
    outside = outside + outside * (t2_error + t_error - 1.5 * q_error)
    cubed = jnp.where(jnp.abs(r) > delta, outside, inside)
    return jnp.where(jnp.isinf(r), nan_or_zero(delta), cubed)


def _versine(r: Array, delta: Array) -> Array:
    """1 - cosine, without cancellation near r = 0."""
    return sine(r, delta) ** 2 / (1 + cosine(r, delta))


def fair(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Fair's loss, `delta**2 (|r| / delta - log(1 + |r| / delta))`.

    The influence is `r / (1 + |r| / delta)`, the weight `1 / (1 + |r| / delta)`, and the curvature
    the square of the weight. The curvature is 1 at 0, where it has a corner, and decreases slowly:
    at `|r| = 10 delta` the influence is still only 10/11 of its bound `delta`.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the |r| at which the influence is half its bound, > 0, in the residual's units;
            broadcasts to the residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual has the slope `delta`.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Fair (1974), Annals of Economic and Social Measurement 3, 667-677.

    >>> rl.influence(fair, jnp.array([0.0, 1.0, -3.0]))
    Array([ 0.  ,  0.5 , -0.75], dtype=float32)
    """
    return elementwise(_fair, predictions, targets, positive("delta", delta))


@with_partials(lambda r, d: _fair_slope(r, d), lambda r, d: _fair_by_delta(r, d))
def _fair(r: Array, delta: Array) -> Array:
    # log(1 + u) = 2 atanh(s), s = u / (2 + u), so that u - log(1 + u) = s (u - 2 s**2 (...)).
    a, delta = jnp.abs(r), capped(delta)
    u = jnp.minimum(a, 2 * delta) / delta
    s, p = u / (2 + u), jnp.minimum(a, 2 * delta) / (2 + u)
    near = p * (a - 2 * p * s * atanh_series(s * s))
    far = delta * (a - delta * jnp.log1p(_limited_ratio(a, delta)))
    return jnp.where(a > 2 * delta, far, near)


@with_partials(lambda r, d: _fair_weight(r, d) ** 2, lambda r, d: _fair_slope_by_delta(r, d))
def _fair_slope(r: Array, delta: Array) -> Array:
    a = jnp.abs(r)
    small, big = jnp.minimum(a, delta), jnp.maximum(a, delta)
    return jnp.sign(r) * (small / (1 + small / big))


@with_partials(
    lambda r, d: -jnp.sign(r) * _fair_weight(r, d) ** 2 / d,
    lambda r, d: _fair_complement(r, d) * _fair_weight(r, d) / d,
)
def _fair_weight(r: Array, delta: Array) -> Array:
    """1 / (1 + u), u = |r| / delta."""
    a, delta = jnp.abs(r), capped(delta)
    small, big = jnp.minimum(a, delta), jnp.maximum(a, delta)
    return delta / big / (1 + small / big)


@with_partials(
    lambda r, d: jnp.sign(r) * _fair_weight(r, d) ** 2 / d,
    lambda r, d: -_fair_complement(r, d) * _fair_weight(r, d) / d,
)
def _fair_complement(r: Array, delta: Array) -> Array:
    """1 - weight = u / (1 + u)."""
    return jnp.abs(_fair_slope(r, delta)) / delta


def _fair_slope_by_delta(r: Array, delta: Array) -> Array:
    return jnp.sign(r) * _fair_complement(r, delta) ** 2


@with_partials(lambda r, d: _fair_slope_by_delta(r, d), lambda r, d: _fair_by_delta2(r, d))
def _fair_by_delta(r: Array, delta: Array) -> Array:
    """delta (u - 2 log(1 + u) + u / (1 + u))."""
    a, delta = jnp.abs(r), capped(delta)
    u = jnp.minimum(a, 2 * delta) / delta
    s = u / (2 + u)
    near = multiply(delta, s, u * u / (1 + u) - 4 * s * s * atanh_series(s * s))
    complement = _fair_complement(r, delta)
    far = a - delta * (2 * jnp.log1p(_limited_ratio(a, delta)) - complement)
    return jnp.where(a > 2 * delta, far, near)


@with_partials(
    lambda r, d: -2 * jnp.sign(r) * _fair_complement(r, d) ** 2 * _fair_weight(r, d) / d,
    lambda r, d: 2 * _fair_complement(r, d) ** 3 / d,
)
def _fair_by_delta2(r: Array, delta: Array) -> Array:
    """3 u / (1 + u) - u / (1 + u)**2 - 2 log(1 + u)."""
    a, delta = jnp.abs(r), capped(delta)
    complement = _fair_complement(r, delta)
    far = complement * (3 - _fair_weight(r, delta)) - 2 * jnp.log1p(a / delta)
    u = jnp.minimum(a, 2 * delta) / delta
    s = u / (2 + u)
    near = s * (u * u / (1 + u) - 4 * s * s * atanh_series(s * s)) - u * complement**2
    return jnp.where(a > 2 * delta, far, near)


def _limited_ratio(a: Array, delta: Array) -> Array:
    """a / delta, at most 1e30, where its logarithm is negligible compared with it."""
    return jnp.minimum(a / delta, 1e30)


def epsilon_insensitive(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> Array:
    """Epsilon-insensitive loss, `max(|r| - delta, 0)`, of support vector regression.

    The influence is 0 inside the tube `|r| <= delta`, its edge included, and `sign(r)` outside. The
    loss is the absolute error with a dead zone. So it is 0 near r = 0, where other losses with a
    `delta` are `r**2 / 2`. The second derivative is 0 everywhere. The loss is also the derivative
    of Huber's loss with respect to `delta`.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        delta: the half-width of the tube (the epsilon of the name), > 0, in the residual's
            units; broadcasts to the residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope; an infinite residual has the slope 1.

    Raises:
        ValueError: the shapes differ, or `delta` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Vapnik (1995), The Nature of Statistical Learning Theory.

    >>> epsilon_insensitive(jnp.array([0.3, -2.0]), delta=0.5)
    Array([0. , 1.5], dtype=float32)
    """
    return elementwise(_tube, predictions, targets, positive("delta", delta))


def _tube(r: Array, delta: Array) -> Array:
    return excess(r, capped(delta))
