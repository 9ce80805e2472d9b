"""Adaptive losses, whose `alpha` sets the robustness, from none (half the squared error) up.

`general` is the loss; at special values of alpha it is a loss of another family. The negative
log-likelihoods include the normaliser of the density, so that a shape and a scale can be learned
along with a model. Without it, the largest scale and the smallest alpha would always be best.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss._arguments import between, positive
from robustloss.losses._double import (
    clamped,
    clamped_to_finite,
    frexp,
    ldexp,
    multiply,
    multiply_scaled,
    quotient,
    sum_of_two,
)
from robustloss.losses._extended import exp_ratio, exponential, one_plus_square, times
from robustloss.losses._pieces import nan_or_zero, polynomial
from robustloss.losses._powers import (
    INFINITE_DF,
    bounded_alpha,
    decayed_beyond_bound,
    fraction,
    fraction_at_alpha,
    fraction_over_r,
    fraction_over_r2,
    inverse,
    limit_at_infinity,
    limit_at_two,
    log_minus_fraction,
    log_w,
    log_w_at_alpha,
    moment,
    negative_or_minus_1,
    positive_part,
    quotient_or_zero,
    ratio,
    signed_infinity,
    two_minus,
    two_minus_exactly,
    weight,
    zero_at_infinity,
)
from robustloss.losses._rule import automatic_partials, elementwise, with_partials

__all__ = ["gaussian_nll", "general", "general_nll", "laplace_nll", "student_t_nll"]

_ROOT3 = math.sqrt(3)


def general(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    alpha: ArrayLike,
    delta: ArrayLike = 1.0,
) -> Array:
    """Barron's general loss, `delta**2 b / alpha ((1 + u**2 / b)**(alpha / 2) - 1)`.

    Here `u = r / delta` and `b = |alpha - 2|`. The smaller alpha, the less a large residual
    counts. Where the formula is 0 / 0, the loss is its limit. Near r = 0 it is `r**2 / 2`.

    | alpha | the loss |
    |---|---|
    | inf | `delta**2 (exp(u**2 / 2) - 1)` |
    | 2 | half the squared error |
    | 1 | `pseudo_huber`, with the same delta |
    | 0 | `cauchy`, with delta sqrt(2) |
    | -2 | `geman_mcclure`, with 2 delta |
    | -inf | `welsch`, with delta sqrt(2) |

    The influence is `r (1 + u**2 / b)**(alpha / 2 - 1)`. It never decreases for alpha >= 1.

    The derivative in alpha is positive. Towards alpha = 2 it grows like `log(1 / b)` from both
    sides, and at 2 it is infinite: the result is `inf`, or 0 at r = 0, and NaN for the second
    derivative. A fit that learns alpha has to keep it off 2, as the example of `general_nll` does.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        alpha: the shape, any number in [-inf, inf]; broadcasts to the residual and can be
            differentiated.
        delta: the size of residuals from which the loss departs from `r**2 / 2`, > 0, in the
            residual's units; broadcasts to the residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN. At an infinite residual, the derivatives up to the second order, and
        those of the third order in r and delta, are their limits.

    Raises:
        ValueError: the shapes differ, `alpha` is NaN, or `delta` is not > 0 (traced: the
            result is NaN).
        TypeError: complex or non-numeric input.

    Source: Barron (2019), A General and Adaptive Robust Loss Function, CVPR; times delta**2.

    >>> [round(float(general(0.75, alpha=alpha)), 4) for alpha in (2, 1, 0, -jnp.inf)]
    [0.2812, 0.25, 0.2478, 0.2452]
    >>> round(float(jax.grad(lambda alpha: general(1.5, alpha=alpha))(0.0)), 6)
    0.029863
    """
    inf = math.inf
    return elementwise(
        _general, predictions, targets, between("alpha", alpha, -inf, inf), positive("delta", delta)
    )


# Notation, with u = r / delta, beta = 2 - alpha and b = |beta|: w = 1 + u**2 / b, L = log w,
# t = 1 - 1 / w, and h = alpha L / 2. The slope is r E, where E = w**(-beta / 2) = exp(-beta L / 2)
# is the weight, and the value grows with exp(h). h can be in the hundreds, and its rounding error
# is a relative error of the power, so L is a double word. A power of w, or u**2, may be out of the
# range of floats where the loss is not, so exponents are kept as separate integers.


@with_partials(
    lambda r, alpha, d: _slope(r, alpha, d),
    lambda r, alpha, d: _by_alpha(r, alpha, d),
    lambda r, alpha, d: _by_delta(r, alpha, d),
)
def _general(r: Array, alpha: Array, delta: Array) -> Array:
    beta, error = two_minus_exactly(alpha)
    b, w = jnp.abs(beta + error), one_plus_square(r, beta, error, delta)
    growth, exponent = exp_ratio(*times(0.5 * bounded_alpha(alpha), 0.0, w))
    (m, e), (scale, e_scale) = frexp(zero_at_infinity(r)), frexp(clamped_to_finite(delta))
    # delta**2 (b L / 2) growth, y = u**2 / b. Where L = y to the last digit, (r**2 / 2) growth.
    tiny = w.y < 0.5 * jnp.finfo(r.dtype).eps
    mantissa = 0.5 * jnp.where(tiny, m * m, scale * scale * (b * (w.log + w.log_error))) * growth
    value = ldexp(mantissa, exponent + 2 * jnp.where(tiny, e, e_scale))
    value = jnp.where((alpha == 2) & ~jnp.isnan(value), (0.5 * r) * r, value)
    limit = jnp.where(alpha < 0, delta * (delta * (1 - 2 / negative_or_minus_1(alpha))), jnp.inf)
    return limit_at_infinity(r, limit, value)


@with_partials(
    lambda r, alpha, d: _curvature(r, alpha, d),
    lambda r, alpha, d: _slope_by_alpha(r, alpha, d),
    lambda r, alpha, d: _slope_by_delta(r, alpha, d),
)
def _slope(r: Array, alpha: Array, delta: Array) -> Array:
    beta, error = two_minus_exactly(alpha)
    w = one_plus_square(r, beta, error, delta)
    weight, exponent = exponential(*times(-0.5 * beta, -0.5 * error, w))
    m, e = frexp(jnp.abs(zero_at_infinity(r)))
    limit = jnp.where(alpha == 1, delta, signed_infinity(alpha - 1))
    size = limit_at_infinity(r, jnp.maximum(limit, 0), ldexp(m * weight, exponent + e))
    return jnp.sign(r) * size


@with_partials(
    lambda r, alpha, d: _third(r, alpha, d),
    lambda r, alpha, d: _curvature_by_alpha(r, alpha, d),
    lambda r, alpha, d: _third(r, alpha, d, 1),
)
def _curvature(r: Array, alpha: Array, delta: Array) -> Array:
    """E (1 - beta t), t = 1 - 1 / w."""
    beta, error = two_minus_exactly(alpha)
    w = one_plus_square(r, beta, error, delta)
    weight, exponent = exponential(*times(-0.5 * beta, -0.5 * error, w))
    # With beta / w = 2 - alpha - beta t, two forms: near alpha = 1 and for w > 2, the terms of
    # alpha - 1 + beta / w are the smaller ones.
    inner = (alpha >= 0) & (alpha <= 2) & ((alpha >= 0.5) | (w.y > 1))
    factor = jnp.where(inner, (clamped(alpha, 4) - 1) + beta * w.inverse, 1 - beta * w.t)
    limit = jnp.where(alpha == 2, 1, jnp.where(alpha > 2, jnp.inf, 0))
    return limit_at_infinity(r, limit, ldexp(weight * factor, exponent))


def _third(r: Array, alpha: Array, delta: Array, k: int = 0) -> Array:
    """(-r / delta)**k times the third derivative by r, which goes like r**(alpha - 3)."""
    beta, x = two_minus(alpha), zero_at_infinity(r)
    b, t = jnp.abs(beta), fraction_at_alpha(x, alpha, delta)
    factor = 3 * inverse(x, b, delta) + (1 - beta) * t
    third = (
        -quotient_or_zero(beta * t, x) * weight(x, alpha, delta) * factor * (-ratio(x, delta)) ** k
    )
    limit = jnp.where(alpha < 3 - k, 0, (-1) ** k * signed_infinity((alpha - 1) * (alpha - 2)))
    finite_limit = {0: 2 / delta, 3: -4 / delta}.get(k, 0.0)
    limit = jnp.where(alpha == 3 - k, finite_limit, limit)
    return limit_at_infinity(r, limit * jnp.sign(r) ** (k + 1), third)


def _curvature_by_alpha(r: Array, alpha: Array, delta: Array) -> Array:
    beta = two_minus(alpha)
    L, t = log_w(r, jnp.abs(beta), delta), fraction(r, jnp.abs(beta), delta)
    by_alpha = weight(r, alpha, delta) * (0.5 * log_minus_fraction(L) * (1 - beta * t) + t * t)
    return limit_at_two(r, alpha, by_alpha, jnp.inf)


@with_partials(
    lambda r, alpha, d: _curvature_by_alpha(r, alpha, d),
    lambda r, alpha, d: _slope_by_alpha2(r, alpha, d),
    lambda r, alpha, d: _slope_by_alpha_delta(r, alpha, d),
)
def _slope_by_alpha(r: Array, alpha: Array, delta: Array) -> Array:
    """r E (L - t) / 2."""
    x = _integral_terms(r, alpha, delta)
    weight, exponent = x.weight
    by_alpha = multiply_scaled((zero_at_infinity(r), weight, 0.5 * x.L, x.L, x.s), exponent)
    sign = jnp.sign(r)
    limit = jnp.where(alpha < 1, 0, sign * jnp.inf)
    by_alpha = limit_at_two(r, alpha, decayed_beyond_bound(alpha, by_alpha), sign * jnp.inf)
    return limit_at_infinity(r, limit, by_alpha)


@with_partials(
    lambda r, alpha, d: _third(r, alpha, d, 1),
    lambda r, alpha, d: _slope_by_alpha_delta(r, alpha, d),
    lambda r, alpha, d: _third(r, alpha, d, 2),
)
def _slope_by_delta(r: Array, alpha: Array, delta: Array) -> Array:
    """r E beta t / delta."""
    x = _integral_terms(r, alpha, delta)
    weight, exponent = x.weight
    by_delta = multiply_scaled(
        (zero_at_infinity(r), 1 / clamped_to_finite(delta), weight, x.beta, x.t), exponent
    )
    limit = jnp.where(alpha == 1, 1, jnp.where(alpha < 1, 0, signed_infinity(2 - alpha)))
    return limit_at_two(r, alpha, limit_at_infinity(r, jnp.sign(r) * limit, by_delta), 0.0)


# The derivatives of the value in alpha and delta are integrals over x from 0 to L. With
# a = alpha / 2 and, in the integrands, t = 1 - exp(-x) and s = x - t:
#   d / d delta = delta (beta b / 2) T,              T = integral of exp(a x) t,
#   d / d alpha = delta**2 (b / 4) S,                S = integral of exp(a x) s,
#   d2 / d alpha2 = +-delta**2 / 4 integral of exp(a x) ((1 - a) s**2 + t**2),
#   d2 / d alpha d delta = delta (b / 2) integral of exp(a x) ((1 - a) s t - t**2).
# For alpha <= 2 the integrands of the first three are positive, so nothing cancels. Integration by
# parts gives closed forms in moments of the exponential function. Which closed form does not cancel
# depends on a and on L.


class _IntegralTerms(NamedTuple):
    """The terms of the derivatives in alpha and delta, all of the shape of the residual."""

    beta: Array
    """2 - alpha"""
    b: Array
    """|beta|"""
    a: Array
    """alpha / 2"""
    L: Array
    """log w"""
    t: Array
    """1 - 1 / w"""
    s: Array
    """(L - t) / L**2"""
    h: Array
    """a L"""
    shift: Array
    """max(h, 0). The integrals computed have exp(a x - shift) in the place of exp(a x)."""
    growth: tuple[Array, Array]
    """exp(shift), as a number near 1 and an exponent of 2."""
    decay: Array
    """exp(-shift), corrected by the rounding error of h."""
    weight: tuple[Array, Array]
    """E, as a number near 1 and an exponent of 2."""


def _integral_terms(r: Array, alpha: Array, delta: Array) -> _IntegralTerms:
    beta, error = two_minus_exactly(alpha)
    w = one_plus_square(zero_at_infinity(r), beta, error, delta)
    a = 0.5 * bounded_alpha(alpha)
    h, h_error = times(a, 0.0, w)
    shift, shift_error = positive_part(h), jnp.where(h > 0, h_error, 0)
    growth, decay = exponential(shift, shift_error), jnp.exp(-shift) * (1 - shift_error)
    weight = exponential(*times(-0.5 * beta, -0.5 * error, w))
    beta, L = beta + error, w.log + w.log_error
    s = moment(1, L, L)
    return _IntegralTerms(beta, jnp.abs(beta), a, L, w.t, s, h, shift, growth, decay, weight)


@with_partials(
    lambda r, alpha, d: _slope_by_alpha(r, alpha, d),
    lambda r, alpha, d: _by_alpha2(r, alpha, d),
    lambda r, alpha, d: _by_alpha_delta(r, alpha, d),
)
def _by_alpha(r: Array, alpha: Array, delta: Array) -> Array:
    """delta**2 (b / 4) S."""
    x, delta = _integral_terms(r, alpha, delta), clamped_to_finite(delta)
    growth, exponent = x.growth
    integral = _integral_s(x.L, x.a, x.b, x.h, x.shift)
    integral_form = multiply_scaled(
        (delta, delta, 0.25 * x.b, x.L, x.L, x.L, integral, growth), exponent
    )
    converged, a = x.h < _CONVERGED_BELOW, jnp.where(x.h < _CONVERGED_BELOW, x.a, -1)
    converged_form = multiply(delta / a, delta / a, 0.5 * (_converged_t(x) - _remainder(x)))
    limit = jnp.where(alpha < 0, 2 * (delta / negative_or_minus_1(alpha)) ** 2, jnp.inf)
    by_alpha = decayed_beyond_bound(alpha, jnp.where(converged, converged_form, integral_form))
    return limit_at_infinity(r, limit, limit_at_two(r, alpha, by_alpha, jnp.inf))


@with_partials(
    lambda r, alpha, d: _slope_by_delta(r, alpha, d),
    lambda r, alpha, d: _by_alpha_delta(r, alpha, d),
    lambda r, alpha, d: _by_delta2(r, alpha, d),
)
def _by_delta(r: Array, alpha: Array, delta: Array) -> Array:
    """delta (beta b / 2) T."""
    x, delta = _integral_terms(r, alpha, delta), clamped_to_finite(delta)
    growth, exponent = x.growth
    integral = _integral_t(x.L, x.a, x.b, x.h, x.shift)
    integral_form = multiply_scaled(
        (delta, 0.5 * x.b, x.beta, x.L, x.L, integral, growth), exponent
    )
    # For h > 1e4, exp(h) is out of range whatever its factors are.
    integral_form = jnp.where(x.h > 1e4, signed_infinity(x.beta), integral_form)
    converged, a = x.h < _CONVERGED_BELOW, jnp.where(x.h < _CONVERGED_BELOW, x.a, -1)
    converged_form = multiply(delta, x.beta / -a, _converged_t(x))
    limit = jnp.where(
        alpha < 0, 2 * delta * (1 - 2 / negative_or_minus_1(alpha)), signed_infinity(2 - alpha)
    )
    by_delta = jnp.where(converged, converged_form, integral_form)
    return limit_at_two(r, alpha, limit_at_infinity(r, limit, by_delta), 0.0)


@with_partials(
    lambda r, alpha, d: _slope_by_alpha2(r, alpha, d),
    lambda r, alpha, d: _by_alpha3(r, alpha, d),
    lambda r, alpha, d: (2 * _by_alpha2(r, alpha, d) - r * _slope_by_alpha2(r, alpha, d)) / d,
)
def _by_alpha2(r: Array, alpha: Array, delta: Array) -> Array:
    """The integral by parts: of x**2 exp(a x), minus exp(h) (L - t)**2."""
    x, delta = _integral_terms(r, alpha, delta), clamped_to_finite(delta)
    growth, exponent = x.growth
    by_parts = moment(2, x.h, x.shift) - jnp.exp(x.h - x.shift) * x.L * x.s**2
    s_square, t_square, _ = _square_integrals(x)
    integral = jnp.where(_parts_cancel(x), (0.5 * x.beta * s_square + t_square) / x.L**2, by_parts)
    sign = 0.25 * jnp.sign(x.beta)
    integral_form = multiply_scaled((delta, delta, sign, x.L, x.L, x.L, integral, growth), exponent)
    converged, a = x.h < _CONVERGED_BELOW, jnp.where(x.h < _CONVERGED_BELOW, x.a, -1)
    e, k = jnp.exp(x.h), -x.h
    gamma = 1 - (e + e * k + (e * k) * (0.5 * k)) - (e * k) * k * (0.5 * k * x.L * x.s**2)
    converged_form = multiply(delta / a, delta / a, -0.5 / a, gamma)
    limit = -4 * (delta / negative_or_minus_1(alpha)) ** 2 / negative_or_minus_1(alpha)
    limit = jnp.where(alpha < 0, limit, jnp.inf)
    by_alpha2 = decayed_beyond_bound(alpha, jnp.where(converged, converged_form, integral_form), 3)
    return limit_at_two(r, alpha, limit_at_infinity(r, limit, by_alpha2), jnp.nan)


@with_partials(
    lambda r, alpha, d: _slope_by_alpha_delta(r, alpha, d),
    lambda r, alpha, d: (2 * _by_alpha2(r, alpha, d) - r * _slope_by_alpha2(r, alpha, d)) / d,
    lambda r, alpha, d: (_by_alpha_delta(r, alpha, d) - r * _slope_by_alpha_delta(r, alpha, d)) / d,
)
def _by_alpha_delta(r: Array, alpha: Array, delta: Array) -> Array:
    """The integral by parts: S - exp(h) t (L - t)."""
    x, delta = _integral_terms(r, alpha, delta), clamped_to_finite(delta)
    growth, exponent = x.growth
    integral_s = _integral_s(x.L, x.a, x.b, x.h, x.shift)
    by_parts = x.L * integral_s - jnp.exp(x.h - x.shift) * x.t * x.s
    _, t_square, s_t = _square_integrals(x)
    integral = jnp.where(_parts_cancel(x), (0.5 * x.beta * s_t - t_square) / x.L, by_parts)
    integral_form = multiply_scaled((delta, 0.5 * x.b, x.L, x.L, integral, growth), exponent)
    converged, a = x.h < _CONVERGED_BELOW, jnp.where(x.h < _CONVERGED_BELOW, x.a, -1)
    converged_form = multiply(delta, 1 / a, 1 / a, _converged_t(x) - _remainder(x) * (1 - a * x.t))
    mixed = decayed_beyond_bound(alpha, jnp.where(converged, converged_form, integral_form))
    mixed = limit_at_two(
        r, alpha, mixed, -0.5 * zero_at_infinity(r) * ratio(zero_at_infinity(r), delta)
    )
    limit = jnp.where(
        alpha < 0,
        4 * (delta / negative_or_minus_1(alpha)) / negative_or_minus_1(alpha),
        jnp.where(alpha < 2, jnp.inf, -jnp.inf),
    )
    return limit_at_infinity(r, limit, mixed)


@with_partials(
    lambda r, alpha, d: _third(r, alpha, d, 2),
    lambda r, alpha, d: (_by_alpha_delta(r, alpha, d) - r * _slope_by_alpha_delta(r, alpha, d)) / d,
    lambda r, alpha, d: _third(r, alpha, d, 3),
)
def _by_delta2(r: Array, alpha: Array, delta: Array) -> Array:
    """beta b (T / 2 - t**2 exp(h))."""
    x = _integral_terms(r, alpha, delta)
    growth, exponent = x.growth
    integral_t = _integral_t(x.L, x.a, x.b, x.h, x.shift)
    by_parts = 0.5 * integral_t - jnp.exp(x.h - x.shift) * quotient_or_zero(x.t, x.L) ** 2
    # Near alpha = 1 both terms grow like r, but their difference does not. The difference is that
    # of multiples of T and of the same integral with a - 1 in the place of a.
    inner = (alpha > 0.5) & (alpha <= 2)
    a = jnp.where(inner, x.a, 0) - 1
    integral_less_1 = _integral_t(x.L, a, 2 - 2 * a, a * x.L, jnp.zeros_like(a))
    difference = 0.5 * (1 - clamped(alpha, 4)) * integral_t + (a - 1) * (integral_less_1 * x.decay)
    integral = jnp.where(inner, difference, by_parts)
    integral_form = multiply_scaled((x.b, x.beta, x.L, x.L, integral, growth), exponent)
    converged, a = x.h < _CONVERGED_BELOW, jnp.where(x.h < _CONVERGED_BELOW, x.a, -1)
    converged_form = x.beta / -a * (_converged_t(x) + jnp.exp(x.h) * (x.b * x.t) * (a * x.t))
    by_delta2 = jnp.where(converged, converged_form, integral_form)
    limit = jnp.where(alpha == 1, -2, signed_infinity((2 - alpha) * (1 - alpha)))
    limit = jnp.where(alpha < 0, 2 * (1 - 2 / negative_or_minus_1(alpha)), limit)
    return limit_at_two(r, alpha, limit_at_infinity(r, limit, by_delta2), 0.0)


def _slope_by_alpha2(r: Array, alpha: Array, delta: Array) -> Array:
    beta = two_minus(alpha)
    s, t = (
        log_minus_fraction(log_w_at_alpha(r, alpha, delta)),
        fraction_at_alpha(r, alpha, delta),
    )
    return _slope(r, alpha, delta) * (0.25 * s**2 + 0.5 * t * (t / beta))


def _slope_by_alpha_delta(r: Array, alpha: Array, delta: Array) -> Array:
    beta = two_minus(alpha)
    s, t = (
        log_minus_fraction(log_w_at_alpha(r, alpha, delta)),
        fraction_at_alpha(r, alpha, delta),
    )
    return _slope(r, alpha, delta) / delta * (0.5 * beta * t * s - t * t)


def _by_alpha3(r: Array, alpha: Array, delta: Array) -> Array:
    beta = two_minus(alpha)
    L, t = log_w_at_alpha(r, alpha, delta), fraction_at_alpha(r, alpha, delta)
    h = 0.5 * bounded_alpha(alpha) * L
    shift = positive_part(h)
    cubes = jnp.exp(h - shift) * (log_minus_fraction(L) ** 3 - 2 * t**2 * (t / beta))
    by_alpha3 = jnp.sign(beta) / 8 * (L**4 * moment(3, h, shift) - cubes)
    return delta * (delta * by_alpha3) * jnp.exp(shift)


def _integral_t(L: Array, a: Array, b: Array, h: Array, shift: Array) -> Array:
    """T / (L**2 exp(shift)), for b = 2 |1 - a| and h = a L."""
    difference = (moment(0, h, shift) - moment(0, (a - 1) * L, shift)) / jnp.where(L > 1, L, 1)
    by_parts = jnp.exp(h - shift) * moment(1, L, L) - h * _integral_s(L, a, b, h, shift)
    return jnp.where((a > 0) & (L > 1), difference, by_parts)


def _integral_s(L: Array, a: Array, b: Array, h: Array, shift: Array) -> Array:
    """S / (L**3 exp(shift)), for b = 2 |1 - a| and h = a L."""
    by_parts = jnp.exp(h - shift) * moment(2, L, L) - a * moment(2, h, shift)
    by_parts = jnp.where(a > 1, -1.0, 1.0) * by_parts / b
    # Near alpha = 2 the two terms by parts cancel. There S is a series in L, or for a large L the
    # sum of the integrals of the three terms of s = x - 1 + exp(-x). For a <= 1 and a large h it is
    # this sum at every alpha.
    near_two, c = b < 1, jnp.where(b < 1, a, 1)
    series, term, p, q = jnp.zeros_like(L), jnp.full_like(L, 1 / 6), (c - 1) ** 2, c
    for n in range(3, 20 if L.dtype == jnp.float32 else 32):
        series, term = series + term * (p + q * (n - 1 - c)), term * jnp.minimum(L, 2.5) / (n + 1)
        p, q = p * (c - 1), q * c
    use_three_terms = jnp.where(near_two, L > 2.5, (a <= 1) & (h > 1.2))
    three_terms = moment(0, h - L, shift) - moment(0, h, shift) + L * moment(1, h, shift)
    three_terms = three_terms / jnp.where(use_three_terms, L, 1) ** 2
    return jnp.where(
        use_three_terms, three_terms, jnp.where(near_two, series * jnp.exp(-shift), by_parts)
    )


def _parts_cancel(x: _IntegralTerms) -> Array:
    """Where the second derivatives in alpha cancel if they are integrated by parts."""
    return (x.a > 0.6) & (x.L > 2)


def _square_integrals(x: _IntegralTerms) -> tuple[Array, Array, Array]:
    """The integrals of exp(a x) times s**2, t**2 and s t, divided by L exp(shift)."""
    L = jnp.where(_parts_cancel(x), x.L, 2)
    h0, h1, h2 = (jnp.where(_parts_cancel(x), x.h - k * L, 1) for k in range(3))
    (m0, m1, m2), (n0, n1) = (
        [moment(k, h, x.shift) for k in range(orders)] for h, orders in ((h0, 3), (h1, 2))
    )
    p0 = moment(0, h2, x.shift)
    s_square = L * (L * m2 - 2 * m1 + 2 * n1) + (m0 - 2 * n0 + p0)
    return s_square, m0 - 2 * n0 + p0, L * (m1 - n1) - (m0 - 2 * n0 + p0)


# For h = a L < _CONVERGED_BELOW, exp(a x) is small at the end of the integrals, which have nearly
# reached their limits for an infinite L. The forms below are the limit minus the remainder. Their
# denominators have no power of a, which may be huge.
_CONVERGED_BELOW = -3.0


def _converged_t(x: _IntegralTerms) -> Array:
    """b T |a| / 2 = 1 - E - (b / 2) t exp(h)."""
    E = jnp.exp(x.h - x.L)
    return 1 - (E + jnp.exp(x.h) * (0.5 * x.b * x.t))


def _remainder(x: _IntegralTerms) -> Array:
    """(|a| b / 2) (L - t) exp(h)."""
    return jnp.exp(x.h) * -x.h * (0.5 * x.b * x.L) * x.s


def gaussian_nll(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, scale: ArrayLike = 1.0
) -> Array:
    """Negative log-likelihood of a normal error, `u**2 / 2 + log(scale) + log(2 pi) / 2`.

    Here `u = r / scale`. With a scale to learn, it estimates the standard deviation.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        scale: the standard deviation, > 0, in the residual's units; broadcasts to the
            residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to; below 0
        where the density is above 1. NaN stays NaN; an infinite residual costs infinity.

    Raises:
        ValueError: the shapes differ, or `scale` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Gauss (1809), Theoria motus.

    >>> gaussian_nll(jnp.array([0.0, 2.0]))
    Array([0.9189385, 2.9189386], dtype=float32)
    """
    return elementwise(_gaussian, predictions, targets, positive("scale", scale))


@with_partials(
    lambda r, s: _gaussian_slope(r, s),
    lambda r, s: _gaussian_by_scale(r, s),
)
def _gaussian(r: Array, scale: Array) -> Array:
    u = r / scale
    return (0.5 * u) * u + (jnp.log(scale) + 0.5 * math.log(2 * math.pi))


@with_partials(
    lambda r, s: nan_or_zero(r) + multiply(1 / s, 1 / s),
    lambda r, s: -2 * multiply(r, 1 / s, 1 / s, 1 / s),
)
def _gaussian_slope(r: Array, scale: Array) -> Array:
    return r / scale * (1 / scale)


@with_partials(
    lambda r, s: -2 * multiply(r, 1 / s, 1 / s, 1 / s),
    lambda r, s: multiply(_ROOT3 * (r / s) - 1, _ROOT3 * (r / s) + 1, 1 / s, 1 / s),
)
def _gaussian_by_scale(r: Array, scale: Array) -> Array:
    """(1 - u**2) / scale."""
    u = r / scale
    return multiply(1 - u, 1 + u, 1 / scale)


def laplace_nll(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, scale: ArrayLike = 1.0
) -> Array:
    """Negative log-likelihood of a Laplace error, `|u| + log(2 scale)`.

    Here `u = r / scale`. With a scale to learn, it estimates the mean absolute error. At r = 0
    the derivative is taken as 0.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        scale: the mean of `|r|`, > 0, in the residual's units; broadcasts to the residual and
            can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to; below 0
        where the density is above 1. NaN stays NaN, also as a slope.

    Raises:
        ValueError: the shapes differ, or `scale` is not > 0 (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Laplace (1774), Mémoire sur la probabilité des causes par les événements.

    >>> laplace_nll(jnp.array([0.0, 2.0]))
    Array([0.6931472, 2.6931472], dtype=float32)
    """
    return elementwise(_laplace, predictions, targets, positive("scale", scale))


@with_partials(
    lambda r, s: _laplace_slope(r, s),
    lambda r, s: _laplace_by_scale(r, s),
)
def _laplace(r: Array, scale: Array) -> Array:
    return jnp.abs(r) / scale + (jnp.log(scale) + math.log(2))


@with_partials(
    lambda r, s: multiply(-_sign(r), 1 / s, 1 / s),
    lambda r, s: multiply(2 * (jnp.abs(r) / s) - 1, 1 / s, 1 / s),
)
def _laplace_by_scale(r: Array, scale: Array) -> Array:
    """(1 - |u|) / scale."""
    return (1 - jnp.abs(r) / scale) * (1 / scale)


@with_partials(
    lambda r, s: nan_or_zero(r),
    lambda r, s: multiply(-_sign(r), 1 / s, 1 / s),
)
def _laplace_slope(r: Array, scale: Array) -> Array:
    return jnp.sign(r) / scale


@with_partials(lambda r: nan_or_zero(r))
def _sign(r: Array) -> Array:
    return jnp.sign(r)


def student_t_nll(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    df: ArrayLike,
    scale: ArrayLike = 1.0,
) -> Array:
    """Negative log-likelihood of an error with Student's t-distribution.

    `(df + 1) / 2 log(1 + u**2 / df) + log(scale) + log(df) / 2 + log B(df / 2, 1 / 2)` with
    `u = r / scale`. At df = 1 it is that of a Cauchy error, at df = inf `gaussian_nll`.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        df: the degrees of freedom, > 0; broadcasts to the residual and can be differentiated.
        scale: the scale of the distribution, > 0, in the residual's units (the standard
            deviation is `scale sqrt(df / (df - 2))`); broadcasts to the residual and can be
            differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to; below 0
        where the density is above 1. NaN stays NaN; an infinite residual costs infinity.

    Raises:
        ValueError: the shapes differ, or `df` or `scale` is not > 0 (traced: the result is
            NaN).
        TypeError: complex or non-numeric input.

    Source: Student (1908), Biometrika 6, 1-25; Lange, Little and Taylor (1989), JASA 84,
    881-896.

    >>> student_t_nll(jnp.array([0.0, 2.0]), df=1.0).round(5)
    Array([1.14473, 2.75417], dtype=float32)
    """
    return elementwise(
        _student_t, predictions, targets, positive("df", df), positive("scale", scale)
    )


# Notation: nu = df, z = u**2, t = z / (nu + z), c = nu / (nu + z) = 1 - t and p = t / r. In
# `_powers`, t is the fraction, c the inverse and p the fraction over r.


@with_partials(
    lambda r, df, s: _student_t_slope(r, df, s),
    lambda r, df, s: _student_t_by_df(r, df, s),
    lambda r, df, s: _student_t_by_scale(r, df, s),
)
def _student_t(r: Array, df: Array, scale: Array) -> Array:
    normal, nu = jnp.isinf(df), clamped(df, INFINITE_DF)
    normaliser = jnp.log(scale) + (0.5 * math.log(2 * math.pi) + _student_t_excess(nu))
    u = jnp.where(normal, r, 0) / scale
    distance = (0.5 * nu + 0.5) * log_w(jnp.where(normal, 0, r), nu, scale)
    return (0.5 * u) * u + distance + normaliser


@with_partials(
    lambda r, df, s: _student_t_curvature(r, df, s),
    lambda r, df, s: _student_t_slope_by_df(r, df, s),
    lambda r, df, s: _student_t_slope_by_scale(r, df, s),
)
def _student_t_slope(r: Array, df: Array, scale: Array) -> Array:
    """(nu + 1) p."""
    nu = clamped(df, INFINITE_DF)
    t = fraction(r, nu, scale)
    slope = jnp.where(t > 0.5, (nu + 1) * t / r, (nu + 1) * fraction_over_r(r, nu, scale))
    return jnp.where(jnp.isinf(df), r / scale * (1 / scale), slope)


@with_partials(
    *automatic_partials(
        lambda r, df, s: (
            (clamped(df, INFINITE_DF) + 1)
            * (1 - 2 * fraction(r, clamped(df, INFINITE_DF), s))
            * fraction_over_r2(r, clamped(df, INFINITE_DF), s)
        ),
        3,
    )
)
def _student_t_curvature(r: Array, df: Array, scale: Array) -> Array:
    """(nu + 1) (1 - 2 t) t / r**2, where t / r**2 is c / (nu scale**2)."""
    nu, x = clamped(df, INFINITE_DF), zero_at_infinity(r)
    t, c = fraction(x, nu, scale), inverse(x, nu, scale)
    small_t = t < c
    factors = [
        jnp.where(small_t, f, g) for f, g in ((c / nu, t), (1 / scale, 1 / x), (1 / scale, 1 / x))
    ]
    curvature = multiply(nu + 1, 1 - 2 * t, *factors)
    curvature = jnp.where(
        jnp.isinf(df), multiply(1 / scale, 1 / scale), limit_at_infinity(r, 0, curvature)
    )
    return curvature + nan_or_zero(r)


@with_partials(
    *automatic_partials(
        lambda r, nu, s: fraction_over_r(r, nu, s) * (fraction(r, nu, s) - inverse(r, nu, s) / nu),
        3,
    )
)
def _student_t_slope_by_df(r: Array, df: Array, scale: Array) -> Array:
    """p (t - c / nu) = u (z - 1) / (scale (nu + z)**2)."""
    nu = clamped(df, INFINITE_DF)
    t, c = fraction(r, nu, scale), inverse(r, nu, scale)
    small_t, x = t < c, zero_at_infinity(r)
    factors = [jnp.where(small_t, f, g) for f, g in ((x / scale, t), (c, 1 / r), (1 / nu, 1))]
    return multiply(*factors, jnp.where(small_t, 1 / scale, 1), t - c / nu)


@with_partials(
    *automatic_partials(
        lambda r, nu, s: -2 * (nu + 1) * inverse(r, nu, s) * fraction_over_r(r, nu, s) / s, 3
    )
)
def _student_t_slope_by_scale(r: Array, df: Array, scale: Array) -> Array:
    """-2 (nu + 1) c p / scale."""
    nu = clamped(df, INFINITE_DF)
    x, t, c = zero_at_infinity(r), fraction(r, nu, scale), inverse(r, nu, scale)
    # c = nu t / u**2 may underflow where the product does not.
    factors = [jnp.where(t < c, f, g) for f, g in ((c, nu * t), (1, scale / x), (1, scale / x))]
    by_scale = multiply(-2 * (nu + 1), *factors, fraction_over_r(x, nu, scale), 1 / scale)
    by_scale = jnp.where(jnp.isinf(r), nan_or_zero(nu + scale), by_scale)
    return jnp.where(jnp.isinf(df), -2 * multiply(r, 1 / scale, 1 / scale, 1 / scale), by_scale)


@with_partials(
    lambda r, df, s: _student_t_slope_by_df(r, df, s),
    lambda r, df, s: _student_t_by_df2(r, df, s),
    lambda r, df, s: _student_t_by_df_scale(r, df, s),
)
def _student_t_by_df(r: Array, df: Array, scale: Array) -> Array:
    """(log w - t) / 2 - t / (2 nu), plus the derivative of the normaliser."""
    nu = clamped(df, INFINITE_DF)
    w = one_plus_square(zero_at_infinity(r), nu, jnp.zeros_like(nu), scale)
    log_term = log_minus_fraction(w.log + w.log_error) + nan_or_zero(r)
    fraction_term, error = quotient(w.t, nu)
    by_df = 0.5 * ((log_term - fraction_term) - error) + _student_t_excess_slope(nu)
    return jnp.where(jnp.isinf(df), nan_or_zero(r), limit_at_infinity(r, jnp.inf, by_df))


def _student_t_by_df2(r: Array, df: Array, scale: Array) -> Array:
    """t / nu**2 (1 - (nu + 1) t / 2), plus the second derivative of the normaliser."""
    nu = clamped(df, INFINITE_DF)
    t = fraction(r, nu, scale)
    by_df2 = t / nu * (1 / nu - 0.5 * (1 + 1 / nu) * t) + _student_t_excess_curvature(nu)
    return jnp.where(jnp.isinf(df), nan_or_zero(r), by_df2)


@with_partials(
    *automatic_partials(
        lambda r, nu, s: fraction(r, nu, s) * (inverse(r, nu, s) / nu - fraction(r, nu, s)) / s,
        3,
    )
)
def _student_t_by_df_scale(r: Array, df: Array, scale: Array) -> Array:
    """t (c / nu - t) / scale."""
    nu = clamped(df, INFINITE_DF)
    t, c = fraction(r, nu, scale), inverse(r, nu, scale)
    small_t, u = t < c, zero_at_infinity(r) / scale
    factors = [jnp.where(small_t, f, g) for f, g in ((u, t), (u, 1), (1 / nu, 1), (c, 1))]
    return multiply(*factors, c / nu - t, 1 / scale)


@with_partials(
    lambda r, df, s: _student_t_slope_by_scale(r, df, s),
    lambda r, df, s: _student_t_by_df_scale(r, df, s),
    lambda r, df, s: _student_t_by_scale2(r, df, s),
)
def _student_t_by_scale(r: Array, df: Array, scale: Array) -> Array:
    """(c - nu t) / scale = nu (1 - z) / (nu + z) / scale."""
    nu = clamped(df, INFINITE_DF)
    by_scale = (inverse(r, nu, scale) - nu * fraction(r, nu, scale)) / scale
    return jnp.where(jnp.isinf(df), _gaussian_by_scale(r, scale), by_scale)


def _student_t_by_scale2(r: Array, df: Array, scale: Array) -> Array:
    """(nu t**2 + (3 nu + 1) c t - c**2) / scale**2."""
    nu, s = clamped(df, INFINITE_DF), scale
    t, c = fraction(r, nu, s), inverse(r, nu, s)
    u = jnp.where(jnp.isinf(df), r, 0) / s
    normal = multiply(_ROOT3 * u - 1, _ROOT3 * u + 1, 1 / s, 1 / s)
    by_scale2 = multiply(t * (nu * t + (3 * nu + 1) * c) - c * c, 1 / s, 1 / s)
    return jnp.where(jnp.isinf(df), normal, by_scale2)


# The excess is the difference between the normaliser and that of the normal distribution:
# log gamma(x) - log gamma(x + 1 / 2) + log(x) / 2, x = df / 2. Stirling's series holds for x > 12.
# For a smaller x, the functions are those of x + 12, and the difference is the logarithm of a
# product or, in the derivatives, a sum of terms of one sign.


def _student_t_excess(df: Array) -> Array:
    large, small, y = _stirling_argument(df)
    up = math.prod(((small + (k + 0.5)) / (small + k) for k in range(1, 12)), start=small + 0.5)
    shift = jnp.where(large, 0, jnp.log(up / jnp.sqrt(small * (small + 12))))
    return y * polynomial(y * y, _STIRLING) + shift


def _student_t_excess_slope(df: Array) -> Array:
    large, x, y = _stirling_argument(df)
    between = sum(1 / ((x + k) * (x + (k + 0.5)) * (x + (k + 1))) for k in reversed(range(12)))
    series = tuple((2 * k + 1) * c for k, c in enumerate(_STIRLING))
    return -0.5 * (y * y * polynomial(y * y, series) + jnp.where(large, 0, 0.25 * between))


def _student_t_excess_curvature(df: Array) -> Array:
    large, x, y = _stirling_argument(df)
    between = jnp.zeros_like(x)
    for k in reversed(range(12)):
        p, q, s = 1 / (x + k), 1 / (x + (k + 0.5)), 1 / (x + (k + 1))
        between = between + p * q * s * (p + q + s)
    series = tuple((2 * k + 1) * (2 * k + 2) * c for k, c in enumerate(_STIRLING))
    second = y * y * y * polynomial(y * y, series) + jnp.where(large, 0, 0.25 * between)
    return 0.25 * second


def _stirling_argument(df: Array) -> tuple[Array, Array, Array]:
    """Whether x = df / 2 is large; x where it is not, else 1; 1 / the argument of the series."""
    x = 0.5 * df
    large = x > 12
    small = jnp.where(large, 1, x)
    return large, small, 1 / jnp.where(large, x, small + 12)


_BERNOULLI = (
    1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798,
    -174611 / 330,
)  # fmt: skip
_STIRLING = tuple(B * (1 - 4.0**-k) / (k * (2 * k - 1)) for k, B in enumerate(_BERNOULLI, 1))


def general_nll(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    alpha: ArrayLike,
    scale: ArrayLike = 1.0,
) -> Array:
    """Negative log-likelihood of Barron's family, `general(u) + log(scale) + log Z(alpha)`.

    Here `u = r / scale` and `general` has this alpha and delta 1. At alpha = 2 it is
    `gaussian_nll`, at 0 the likelihood of a Cauchy error of scale `sqrt(2) scale`. Between
    them the tails get heavier as alpha decreases. Below 0 there is no such distribution.

    Z(alpha) is the integral of `exp(-general(u))`, by the trapezoidal rule: 1e-14 in float64,
    1e-7 in float32. Its derivative is finite at alpha = 0 and -inf at 2, where that of
    `general` is inf: at alpha = 2 exactly, their sum is NaN for r != 0.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        alpha: the shape, in [0, 2]; broadcasts to the residual and can be differentiated.
        scale: the scale, > 0, in the residual's units; broadcasts to the residual and can be
            differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to; below 0
        where the density is above 1. NaN stays NaN; an infinite residual costs infinity.

    Raises:
        ValueError: the shapes differ, `alpha` is outside [0, 2], or `scale` is not > 0
            (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Barron (2019), A General and Adaptive Robust Loss Function, CVPR.

    `docs/adaptive.md` shows how to learn alpha and the scale along with a model. In short, map free
    parameters to alpha in (0, 2) and to a scale > 0:

    >>> def loss(free, r):
    ...     alpha, scale = 0.001 + 1.998 * jax.nn.sigmoid(free[0]), jnp.exp(free[1])
    ...     return rl.mean(functools.partial(rl.general_nll, alpha=alpha, scale=scale), r)
    """
    return elementwise(
        _general_nll,
        predictions,
        targets,
        between("alpha", alpha, 0.0, 2.0),
        positive("scale", scale),
    )


@with_partials(
    lambda r, alpha, s: _general_nll_slope(r, alpha, s),
    lambda r, alpha, s: _general_nll_by_alpha(r, alpha, s),
    lambda r, alpha, s: _general_nll_by_scale(r, alpha, s),
)
def _general_nll(r: Array, alpha: Array, scale: Array) -> Array:
    distance = _general(r / scale, alpha, jnp.ones_like(scale))
    return distance + (jnp.log(scale) + _log_partition(alpha))


@with_partials(
    lambda r, alpha, s: _general_nll_curvature(r, alpha, s),
    lambda r, alpha, s: _general_nll_slope_by_alpha(r, alpha, s),
    lambda r, alpha, s: _general_nll_slope_by_scale(r, alpha, s),
)
def _general_nll_slope(r: Array, alpha: Array, scale: Array) -> Array:
    return _slope(r / scale, alpha, jnp.ones_like(scale)) / scale


@with_partials(
    lambda r, alpha, s: _general_nll_slope_by_alpha(r, alpha, s),
    lambda r, alpha, s: (
        _by_alpha2(r / s, alpha, jnp.ones_like(s)) + _log_partition_by_alpha2(alpha)
    ),
    lambda r, alpha, s: _general_nll_by_alpha_scale(r, alpha, s),
)
def _general_nll_by_alpha(r: Array, alpha: Array, scale: Array) -> Array:
    by_alpha = _by_alpha(r / scale, alpha, jnp.ones_like(scale))
    return by_alpha + _log_partition_by_alpha(alpha)


@with_partials(
    lambda r, alpha, s: _general_nll_slope_by_scale(r, alpha, s),
    lambda r, alpha, s: _general_nll_by_alpha_scale(r, alpha, s),
    lambda r, alpha, s: _general_nll_by_scale2(r, alpha, s),
)
def _general_nll_by_scale(r: Array, alpha: Array, scale: Array) -> Array:
    """(1 - u**2 E) / scale."""
    u, x, _ = _nll_terms(r, alpha, scale)
    weight, exponent = x.weight
    weighted_square = multiply_scaled((u, u, weight), exponent)
    # For a large u the 1 does not count, and only the whole product stays in range.
    large_form = multiply_scaled((u, u, weight, -1 / scale), exponent)
    by_scale = jnp.where(
        weighted_square > 1 / jnp.finfo(r.dtype).eps, large_form, (1 - weighted_square) / scale
    )
    return limit_at_infinity(r, jnp.where(alpha > 0, -jnp.inf, -1 / scale), by_scale)


# The second derivatives, with E, t, w and L at the residual u. Each is one product of all factors,
# so that no partial product over- or underflows.


def _nll_terms(r: Array, alpha: Array, scale: Array) -> tuple[Array, _IntegralTerms, Array]:
    """u, the terms at the residual u with delta 1, and beta / w = 2 - alpha - beta t."""
    u = r / scale
    x = _integral_terms(u, alpha, jnp.ones_like(scale))
    return zero_at_infinity(u), x, x.beta * inverse(zero_at_infinity(u), x.b, jnp.ones_like(scale))


@with_partials(
    *automatic_partials(lambda r, alpha, s: _curvature(r / s, alpha, jnp.ones_like(s)) / s / s, 3)
)
def _general_nll_curvature(r: Array, alpha: Array, scale: Array) -> Array:
    """E (1 - beta t) / scale**2."""
    _, x, beta_over_w = _nll_terms(r, alpha, scale)
    weight, exponent = x.weight
    factor = jnp.where((alpha >= 0.5) | (x.t > 0.5), (alpha - 1) + beta_over_w, 1 - x.beta * x.t)
    curvature = multiply_scaled((weight, factor, 1 / scale, 1 / scale), exponent)
    return limit_at_infinity(r, jnp.where(alpha == 2, multiply(1 / scale, 1 / scale), 0), curvature)


@with_partials(
    *automatic_partials(lambda r, alpha, s: _slope_by_alpha(r / s, alpha, jnp.ones_like(s)) / s, 3)
)
def _general_nll_slope_by_alpha(r: Array, alpha: Array, scale: Array) -> Array:
    """u E (L - t) / 2 / scale."""
    u, x, _ = _nll_terms(r, alpha, scale)
    weight, exponent = x.weight
    by_alpha = multiply_scaled((u, weight, 0.5 * x.L, x.L, x.s, 1 / scale), exponent)
    by_alpha = limit_at_two(r, alpha, by_alpha, jnp.sign(r) * jnp.inf)
    return limit_at_infinity(r, jnp.where(alpha < 1, 0, jnp.sign(r) * jnp.inf), by_alpha)


@with_partials(
    *automatic_partials(
        lambda r, alpha, s: (
            -(
                _slope(r / s, alpha, jnp.ones_like(s))
                + r / s * _curvature(r / s, alpha, jnp.ones_like(s))
            )
            / s
            / s
        ),
        3,
    )
)
def _general_nll_slope_by_scale(r: Array, alpha: Array, scale: Array) -> Array:
    """-u E (alpha + beta / w) / scale**2."""
    u, x, beta_over_w = _nll_terms(r, alpha, scale)
    weight, exponent = x.weight
    factors = u, weight, -(alpha + beta_over_w), 1 / scale, 1 / scale
    limit = jnp.where(alpha > 1, jnp.inf, jnp.where(alpha == 1, multiply(1 / scale, 1 / scale), 0))
    return limit_at_infinity(r, -jnp.sign(r) * limit, multiply_scaled(factors, exponent))


@with_partials(
    *automatic_partials(
        lambda r, alpha, s: -(r / s) * _slope_by_alpha(r / s, alpha, jnp.ones_like(s)) / s,
        3,
    )
)
def _general_nll_by_alpha_scale(r: Array, alpha: Array, scale: Array) -> Array:
    """-u**2 E (L - t) / 2 / scale."""
    u, x, _ = _nll_terms(r, alpha, scale)
    weight, exponent = x.weight
    by_both = multiply_scaled((u, u, weight, -0.5 * x.L, x.L, x.s, 1 / scale), exponent)
    return limit_at_infinity(r, -jnp.inf, limit_at_two(r, alpha, by_both, -jnp.inf))


@with_partials(
    *automatic_partials(
        lambda r, alpha, s: (
            (
                2 * (r / s) * _slope(r / s, alpha, jnp.ones_like(s))
                + (r / s) ** 2 * _curvature(r / s, alpha, jnp.ones_like(s))
                - 1
            )
            / s
            / s
        ),
        3,
    )
)
def _general_nll_by_scale2(r: Array, alpha: Array, scale: Array) -> Array:
    """(u**2 E (1 + alpha + beta / w) - 1) / scale**2."""
    u, x, beta_over_w = _nll_terms(r, alpha, scale)
    weight, exponent = x.weight
    factor = 1 + alpha + beta_over_w
    weighted_square = multiply_scaled((u, u, weight, factor), exponent)
    small_form = multiply(weighted_square - 1, 1 / scale, 1 / scale)
    large_form = multiply_scaled((u, u, weight, factor, 1 / scale, 1 / scale), exponent)
    limit = jnp.where(alpha > 0, jnp.inf, multiply(1 / scale, 1 / scale))
    return limit_at_infinity(
        r, limit, jnp.where(weighted_square > 1 / jnp.finfo(r.dtype).eps, large_form, small_form)
    )


@with_partials(lambda alpha: _log_partition_by_alpha(alpha))
def _log_partition(alpha: Array) -> Array:
    """log Z(alpha), Z the integral of exp(-general(u)) over all u, for alpha in [0, 2].

    With u = sqrt(b) sinh(v) the integrand is analytic about the real axis and dies out at its
    ends, so that the trapezoidal rule converges geometrically: Trefethen and Weideman (2014),
    SIAM Review 56, 385-458. All derivatives are those of `general` at the nodes.
    """
    nodes, weights = _quadrature(alpha[..., None], 2.2, 150)
    density = jnp.exp(-_general(nodes, alpha[..., None], jnp.ones_like(alpha)[..., None]))
    Z, error = sum_of_two(*_two_part_sum(weights * density))
    return math.log(4) + (jnp.log(Z / 4) + error / Z)


def _two_part_sum(terms: Array) -> tuple[Array, Array]:
    """The sum of numbers near 1 in two parts: of the numbers rounded to 2**-14, and of the rest.

    The first sum is exact, while in a plain sum rounding errors add up.
    """
    rounded = jnp.round(terms * 2**14) / 2**14
    return jnp.sum(rounded, axis=-1), jnp.sum(terms - rounded, axis=-1)


@with_partials(lambda alpha: _log_partition_by_alpha2(alpha))
def _log_partition_by_alpha(alpha: Array) -> Array:
    """Minus the mean, over the density, of the loss's derivative in alpha."""
    probability, nodes, a, one = _density(alpha)
    high, low = _two_part_sum(probability * _by_alpha(nodes, a, one))
    return -(high + low)


def _log_partition_by_alpha2(alpha: Array) -> Array:
    """The variance of the loss's derivative in alpha, minus the mean of the second one."""
    probability, nodes, a, one = _density(alpha)
    first = _by_alpha(nodes, a, one)
    change = (first + _log_partition_by_alpha(alpha)[..., None]) ** 2 - _by_alpha2(nodes, a, one)
    high, low = _two_part_sum(probability * change)
    return high + low


def _density(alpha: Array) -> tuple[Array, Array, Array, Array]:
    """The probability of each node of the rule, the nodes, alpha, and delta = 1.

    The first two have the shape (..., nodes), the others (..., 1). The derivatives grow like powers
    of log(u), so the rule reaches further out than that of Z.
    """
    a = alpha[..., None]
    nodes, weights = _quadrature(a, 3.2, 150 if alpha.dtype == jnp.float32 else 300)
    one = jnp.ones_like(a)
    terms = weights * jnp.exp(-_general(nodes, a, one))
    high, low = _two_part_sum(terms)
    return terms / (high + low)[..., None], nodes, a, one


def _quadrature(alpha: Array, digits: float, steps: int) -> tuple[Array, Array]:
    """The nodes and weights of the trapezoidal rule, (..., steps + 1), for alpha of shape (..., 1).

    The step has 8 bits, so that the multiples of it are not rounded. At the last node the density
    is about eps**digits.
    """
    alpha, info = lax.stop_gradient(alpha), jnp.finfo(alpha.dtype)
    b = jnp.maximum(2 - alpha, float(info.eps))
    # The factor of sinh is not sqrt(b), but the largest power of 2 up to it.
    root = ldexp(jnp.ones_like(b), (frexp(b)[1] - 1) >> 1)
    energy, a = -digits * math.log(info.eps), jnp.maximum(alpha, float(info.tiny) ** 0.5)
    end = jnp.log1p(a * (energy / b)) / a + jnp.log(2 * jnp.sqrt(b) / root)
    h = lax.reduce_precision(end / steps, info.nexp, 8)
    k = jnp.arange(steps + 1, dtype=alpha.dtype)
    up, down = jnp.exp(h * k), jnp.exp(-h * k)  # XLA's sinh and cosh are rougher
    weights = jnp.where(k == 0, 0.5 * root, root) * h * (up + down)
    return 0.5 * root * (up - down), weights
