"""Adaptive losses: one `alpha` runs from half the squared error through all degrees of robustness.

`general` is the loss and its limits are the losses of the other families. The likelihoods are
losses with their normaliser, so that a shape and a scale can be learned along with a model:
without it, the largest scale and the smallest alpha would always win.
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
    finite,
    frexp,
    ldexp,
    multiply,
    multiply_exactly,
    quotient,
    sum_of_two,
)
from robustloss.losses._extended import exp_ratio, exponential, one_plus_square, times
from robustloss.losses._pieces import flat, polynomial
from robustloss.losses._powers import (
    HUGE,
    above_0,
    at_infinity,
    at_two,
    bounded,
    fraction,
    fraction_of,
    inverse,
    log_of,
    log_w,
    moment,
    negative,
    past_bound,
    per,
    power_of,
    pull,
    pull_per_residual,
    ratio,
    sign_infinity,
    tail,
    tame,
    two_minus,
    two_minus_exactly,
)
from robustloss.losses._rule import elementwise, partials_of, with_partials

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
    counts; where the formula is 0 / 0, its limit is meant. Near 0 it is `r**2 / 2`.

    | alpha | the loss |
    |---|---|
    | inf | `delta**2 (exp(u**2 / 2) - 1)` |
    | 2 | half the squared error |
    | 1 | `pseudo_huber`, with the same delta |
    | 0 | `cauchy`, with delta sqrt(2) |
    | -2 | `geman_mcclure`, with 2 delta |
    | -inf | `welsch`, with delta sqrt(2) |

    The influence is `r (1 + u**2 / b)**(alpha / 2 - 1)`. It never decreases for alpha >= 1.

    The derivative by alpha is positive. At alpha = 2 it grows like `log(1 / b)` from both
    sides and truly is infinite: `inf` is what you get, 0 at r = 0, and NaN for the second.
    What learns alpha has to stay off 2, as the example of `general_nll` does.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        alpha: the shape, any number in [-inf, inf]; broadcasts to the residual and can be
            differentiated.
        delta: where the loss starts to bend, > 0, in the residual's units; broadcasts to the
            residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN; at an infinite residual, derivatives to the second order, and the third
        by r and delta, are their limits.

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


# With w = 1 + u**2 / b, L = log w and beta = 2 - alpha, all is made of powers of w: the slope
# is r E, E = w**(-beta / 2) = exp(-beta L / 2), and the value grows with exp(h), h = alpha L / 2.
# h reaches hundreds, and its rounding is an error of the power: so L is a sum of two numbers.
# A power, or u**2, leaves the range of floats before the loss does: so exponents are kept apart.


@with_partials(
    lambda r, alpha, d: _slope(r, alpha, d),
    lambda r, alpha, d: _by_alpha(r, alpha, d),
    lambda r, alpha, d: _by_delta(r, alpha, d),
)
def _general(r: Array, alpha: Array, delta: Array) -> Array:
    beta, lost = two_minus_exactly(alpha)
    b, w = jnp.abs(beta + lost), one_plus_square(r, beta, lost, delta)
    growth, exponent = exp_ratio(*times(0.5 * bounded(alpha), 0.0, w))
    (m, e), (scale, e_scale) = frexp(tame(r)), frexp(finite(delta))
    # (r**2 / 2) (L / y) growth, y = u**2 / b, where L = y to the last digit; else delta**2 b L / 2.
    tiny = w.y < 0.5 * jnp.finfo(r.dtype).eps
    mantissa = 0.5 * jnp.where(tiny, m * m, scale * scale * (b * (w.log + w.lost))) * growth
    value = ldexp(mantissa, exponent + 2 * jnp.where(tiny, e, e_scale))
    value = jnp.where((alpha == 2) & ~jnp.isnan(value), (0.5 * r) * r, value)
    limit = jnp.where(alpha < 0, delta * (delta * (1 - 2 / negative(alpha))), jnp.inf)
    return at_infinity(r, limit, value)


@with_partials(
    lambda r, alpha, d: _curvature(r, alpha, d),
    lambda r, alpha, d: _slope_by_alpha(r, alpha, d),
    lambda r, alpha, d: _slope_by_delta(r, alpha, d),
)
def _slope(r: Array, alpha: Array, delta: Array) -> Array:
    beta, lost = two_minus_exactly(alpha)
    w = one_plus_square(r, beta, lost, delta)
    power, exponent = exponential(*times(-0.5 * beta, -0.5 * lost, w))
    m, e = frexp(jnp.abs(tame(r)))
    limit = jnp.where(alpha == 1, delta, sign_infinity(alpha - 1))
    size = at_infinity(r, jnp.maximum(limit, 0), ldexp(m * power, exponent + e))
    return jnp.sign(r) * size


@with_partials(
    lambda r, alpha, d: _third(r, alpha, d),
    lambda r, alpha, d: _curvature_by_alpha(r, alpha, d),
    lambda r, alpha, d: _third(r, alpha, d, 1),
)
def _curvature(r: Array, alpha: Array, delta: Array) -> Array:
    """E (1 - beta t), t = 1 - 1 / w."""
    beta, lost = two_minus_exactly(alpha)
    w = one_plus_square(r, beta, lost, delta)
    power, exponent = exponential(*times(-0.5 * beta, -0.5 * lost, w))
    # Next to alpha = 1 and beyond w = 2 the smaller terms are those of the second form.
    inner = (alpha >= 0) & (alpha <= 2) & ((alpha >= 0.5) | (w.y > 1))
    bend = jnp.where(inner, (clamped(alpha, 4) - 1) + beta * w.inverse, 1 - beta * w.t)
    limit = jnp.where(alpha == 2, 1, jnp.where(alpha > 2, jnp.inf, 0))
    return at_infinity(r, limit, ldexp(power * bend, exponent))


def _third(r: Array, alpha: Array, delta: Array, k: int = 0) -> Array:
    """(-r / delta)**k times the third derivative by r, which goes like r**(alpha - 3)."""
    beta, x = two_minus(alpha), tame(r)
    b, t = jnp.abs(beta), fraction_of(x, alpha, delta)
    factor = 3 * inverse(x, b, delta) + (1 - beta) * t
    third = -per(beta * t, x) * power_of(x, alpha, delta) * factor * (-ratio(x, delta)) ** k
    ends = jnp.where(alpha < 3 - k, 0, (-1) ** k * sign_infinity((alpha - 1) * (alpha - 2)))
    flat_end = {0: 2 / delta, 3: -4 / delta}.get(k, 0.0)  # at alpha = 3 - k
    ends = jnp.where(alpha == 3 - k, flat_end, ends)
    return at_infinity(r, ends * jnp.sign(r) ** (k + 1), third)


def _curvature_by_alpha(r: Array, alpha: Array, delta: Array) -> Array:
    beta = two_minus(alpha)
    L, t = log_w(r, jnp.abs(beta), delta), fraction(r, jnp.abs(beta), delta)
    by_alpha = power_of(r, alpha, delta) * (0.5 * tail(L) * (1 - beta * t) + t * t)
    return at_two(r, alpha, by_alpha, jnp.inf)


@with_partials(
    lambda r, alpha, d: _curvature_by_alpha(r, alpha, d),
    lambda r, alpha, d: _slope_by_alpha2(r, alpha, d),
    lambda r, alpha, d: _slope_by_alpha_delta(r, alpha, d),
)
def _slope_by_alpha(r: Array, alpha: Array, delta: Array) -> Array:
    """r E (L - t) / 2."""
    x = _terms(r, alpha, delta)
    power, exponent = x.power
    by_alpha = multiply_exactly(
        (
            tame(r),
            power,
            0.5 * x.L,
            x.L,
            x.s,
        ),
        exponent,
    )
    sign = jnp.sign(r)
    limit = jnp.where(alpha < 1, 0, sign * jnp.inf)
    by_alpha = at_two(r, alpha, past_bound(alpha, by_alpha), sign * jnp.inf)
    return at_infinity(r, limit, by_alpha)


@with_partials(
    lambda r, alpha, d: _third(r, alpha, d, 1),
    lambda r, alpha, d: _slope_by_alpha_delta(r, alpha, d),
    lambda r, alpha, d: _third(r, alpha, d, 2),
)
def _slope_by_delta(r: Array, alpha: Array, delta: Array) -> Array:
    """r E beta t / delta."""
    x = _terms(r, alpha, delta)
    power, exponent = x.power
    by_delta = multiply_exactly(
        (
            tame(r),
            1 / finite(delta),
            power,
            x.beta,
            x.t,
        ),
        exponent,
    )
    limit = jnp.where(alpha == 1, 1, jnp.where(alpha < 1, 0, sign_infinity(2 - alpha)))
    return at_two(r, alpha, at_infinity(r, jnp.sign(r) * limit, by_delta), 0.0)


# What alpha and delta do to the value are integrals over x from 0 to L, with a = alpha / 2,
# t = 1 - exp(-x) and s = x - t:
#   d / d delta = delta (beta b / 2) T,              T = integral of exp(a x) t,
#   d / d alpha = delta**2 (b / 4) S,                S = integral of exp(a x) s,
#   d2 / d alpha2 = +-delta**2 / 4 integral of exp(a x) ((1 - a) s**2 + t**2),
#   d2 / d alpha d delta = delta (b / 2) integral of exp(a x) ((1 - a) s t - t**2).
# For alpha <= 2 nothing in the first three cancels. Parts give closed forms in moments of the
# exponential function; which of these does not cancel depends on a and on L.


class _Terms(NamedTuple):
    """What the derivatives in alpha and delta are made of."""

    beta: Array
    b: Array
    a: Array
    L: Array
    t: Array
    s: Array
    """(L - t) / L**2"""
    h: Array
    """a L"""
    shift: Array
    """max(h, 0): integrals are of exp(a x - shift)."""
    growth: tuple[Array, Array]
    """exp(shift), as a number near 1 and an exponent of 2."""
    start: Array
    """exp(-shift), with what h lost by rounding."""
    power: tuple[Array, Array]
    """E, likewise."""


def _terms(r: Array, alpha: Array, delta: Array) -> _Terms:
    beta, lost = two_minus_exactly(alpha)
    w = one_plus_square(tame(r), beta, lost, delta)
    a = 0.5 * bounded(alpha)
    h, lost_h = times(a, 0.0, w)
    shift, lost_shift = above_0(h), jnp.where(h > 0, lost_h, 0)
    growth, start = exponential(shift, lost_shift), jnp.exp(-shift) * (1 - lost_shift)
    power = exponential(*times(-0.5 * beta, -0.5 * lost, w))
    beta, L = beta + lost, w.log + w.lost
    s = moment(1, L, L)
    return _Terms(beta, jnp.abs(beta), a, L, w.t, s, h, shift, growth, start, power)


@with_partials(
    lambda r, alpha, d: _slope_by_alpha(r, alpha, d),
    lambda r, alpha, d: _by_alpha2(r, alpha, d),
    lambda r, alpha, d: _by_alpha_delta(r, alpha, d),
)
def _by_alpha(r: Array, alpha: Array, delta: Array) -> Array:
    """delta**2 (b / 4) S."""
    x, delta = _terms(r, alpha, delta), finite(delta)
    growth, exponent = x.growth
    integral = _inner_integral(x.L, x.a, x.b, x.h, x.shift)
    near = multiply_exactly(
        (
            delta,
            delta,
            0.25 * x.b,
            x.L,
            x.L,
            x.L,
            integral,
            growth,
        ),
        exponent,
    )
    ended, a = x.h < _ENDED, jnp.where(x.h < _ENDED, x.a, -1)
    far = multiply(delta / a, delta / a, 0.5 * (_whole(x) - _last(x)))
    limit = jnp.where(alpha < 0, 2 * (delta / negative(alpha)) ** 2, jnp.inf)
    by_alpha = past_bound(alpha, jnp.where(ended, far, near))
    return at_infinity(r, limit, at_two(r, alpha, by_alpha, jnp.inf))


@with_partials(
    lambda r, alpha, d: _slope_by_delta(r, alpha, d),
    lambda r, alpha, d: _by_alpha_delta(r, alpha, d),
    lambda r, alpha, d: _by_delta2(r, alpha, d),
)
def _by_delta(r: Array, alpha: Array, delta: Array) -> Array:
    """delta (beta b / 2) T."""
    x, delta = _terms(r, alpha, delta), finite(delta)
    growth, exponent = x.growth
    integral = _outer_integral(x.L, x.a, x.b, x.h, x.shift)
    near = multiply_exactly(
        (
            delta,
            0.5 * x.b,
            x.beta,
            x.L,
            x.L,
            integral,
            growth,
        ),
        exponent,
    )
    near = jnp.where(x.h > 1e4, sign_infinity(x.beta), near)  # where exp(h) is out of every range
    ended, a = x.h < _ENDED, jnp.where(x.h < _ENDED, x.a, -1)
    far = multiply(delta, x.beta / -a, _whole(x))
    limit = jnp.where(alpha < 0, 2 * delta * (1 - 2 / negative(alpha)), sign_infinity(2 - alpha))
    by_delta = jnp.where(ended, far, near)
    return at_two(r, alpha, at_infinity(r, limit, by_delta), 0.0)


@with_partials(
    lambda r, alpha, d: _slope_by_alpha2(r, alpha, d),
    lambda r, alpha, d: _by_alpha3(r, alpha, d),
    lambda r, alpha, d: (2 * _by_alpha2(r, alpha, d) - r * _slope_by_alpha2(r, alpha, d)) / d,
)
def _by_alpha2(r: Array, alpha: Array, delta: Array) -> Array:
    """The integral by parts: of x**2 exp(a x), minus exp(h) (L - t)**2."""
    x, delta = _terms(r, alpha, delta), finite(delta)
    growth, exponent = x.growth
    parts = moment(2, x.h, x.shift) - jnp.exp(x.h - x.shift) * x.L * x.s**2
    rest, square, _ = _squares(x)
    integral = jnp.where(_far_out(x), (0.5 * x.beta * rest + square) / x.L**2, parts)
    sign = 0.25 * jnp.sign(x.beta)
    near = multiply_exactly(
        (
            delta,
            delta,
            sign,
            x.L,
            x.L,
            x.L,
            integral,
            growth,
        ),
        exponent,
    )
    ended, a = x.h < _ENDED, jnp.where(x.h < _ENDED, x.a, -1)
    e, k = jnp.exp(x.h), -x.h
    gamma = 1 - (e + e * k + (e * k) * (0.5 * k)) - (e * k) * k * (0.5 * k * x.L * x.s**2)
    far = multiply(delta / a, delta / a, -0.5 / a, gamma)
    limit = -4 * (delta / negative(alpha)) ** 2 / negative(alpha)
    limit = jnp.where(alpha < 0, limit, jnp.inf)
    by_alpha2 = past_bound(alpha, jnp.where(ended, far, near), 3)
    return at_two(r, alpha, at_infinity(r, limit, by_alpha2), jnp.nan)


@with_partials(
    lambda r, alpha, d: _slope_by_alpha_delta(r, alpha, d),
    lambda r, alpha, d: (2 * _by_alpha2(r, alpha, d) - r * _slope_by_alpha2(r, alpha, d)) / d,
    lambda r, alpha, d: (_by_alpha_delta(r, alpha, d) - r * _slope_by_alpha_delta(r, alpha, d)) / d,
)
def _by_alpha_delta(r: Array, alpha: Array, delta: Array) -> Array:
    """The integral by parts: S - exp(h) t (L - t)."""
    x, delta = _terms(r, alpha, delta), finite(delta)
    growth, exponent = x.growth
    inner = _inner_integral(x.L, x.a, x.b, x.h, x.shift)
    parts = x.L * inner - jnp.exp(x.h - x.shift) * x.t * x.s
    _, square, product = _squares(x)
    integral = jnp.where(_far_out(x), (0.5 * x.beta * product - square) / x.L, parts)
    near = multiply_exactly(
        (
            delta,
            0.5 * x.b,
            x.L,
            x.L,
            integral,
            growth,
        ),
        exponent,
    )
    ended, a = x.h < _ENDED, jnp.where(x.h < _ENDED, x.a, -1)
    far = multiply(delta, 1 / a, 1 / a, _whole(x) - _last(x) * (1 - a * x.t))
    mixed = past_bound(alpha, jnp.where(ended, far, near))
    mixed = at_two(r, alpha, mixed, -0.5 * tame(r) * ratio(tame(r), delta))
    far = jnp.where(alpha < 2, jnp.inf, -jnp.inf)
    limit = jnp.where(alpha < 0, 4 * (delta / negative(alpha)) / negative(alpha), far)
    return at_infinity(r, limit, mixed)


@with_partials(
    lambda r, alpha, d: _third(r, alpha, d, 2),
    lambda r, alpha, d: (_by_alpha_delta(r, alpha, d) - r * _slope_by_alpha_delta(r, alpha, d)) / d,
    lambda r, alpha, d: _third(r, alpha, d, 3),
)
def _by_delta2(r: Array, alpha: Array, delta: Array) -> Array:
    """beta b (T / 2 - t**2 exp(h))."""
    x = _terms(r, alpha, delta)
    growth, exponent = x.growth
    outer = _outer_integral(x.L, x.a, x.b, x.h, x.shift)
    by_parts = 0.5 * outer - jnp.exp(x.h - x.shift) * per(x.t, x.L) ** 2
    # Next to alpha = 1 both grow like r and their difference does not. It is that of T and of
    # the same integral with a - 1 in place of a.
    inner = (alpha > 0.5) & (alpha <= 2)
    a = jnp.where(inner, x.a, 0) - 1
    less = _outer_integral(x.L, a, 2 - 2 * a, a * x.L, jnp.zeros_like(a))
    difference = 0.5 * (1 - clamped(alpha, 4)) * outer + (a - 1) * (less * x.start)
    integral = jnp.where(inner, difference, by_parts)
    near = multiply_exactly(
        (
            x.b,
            x.beta,
            x.L,
            x.L,
            integral,
            growth,
        ),
        exponent,
    )
    ended, a = x.h < _ENDED, jnp.where(x.h < _ENDED, x.a, -1)
    far = x.beta / -a * (_whole(x) + jnp.exp(x.h) * (x.b * x.t) * (a * x.t))
    by_delta2 = jnp.where(ended, far, near)
    far = jnp.where(alpha == 1, -2, sign_infinity((2 - alpha) * (1 - alpha)))
    limit = jnp.where(alpha < 0, 2 * (1 - 2 / negative(alpha)), far)
    return at_two(r, alpha, at_infinity(r, limit, by_delta2), 0.0)


def _slope_by_alpha2(r: Array, alpha: Array, delta: Array) -> Array:
    beta = two_minus(alpha)
    rest, t = tail(log_of(r, alpha, delta)), fraction_of(r, alpha, delta)
    return _slope(r, alpha, delta) * (0.25 * rest**2 + 0.5 * t * (t / beta))


def _slope_by_alpha_delta(r: Array, alpha: Array, delta: Array) -> Array:
    beta = two_minus(alpha)
    rest, t = tail(log_of(r, alpha, delta)), fraction_of(r, alpha, delta)
    return _slope(r, alpha, delta) / delta * (0.5 * beta * t * rest - t * t)


def _by_alpha3(r: Array, alpha: Array, delta: Array) -> Array:
    beta = two_minus(alpha)
    L, t = log_of(r, alpha, delta), fraction_of(r, alpha, delta)
    h = 0.5 * bounded(alpha) * L
    shift = above_0(h)
    cubes = jnp.exp(h - shift) * (tail(L) ** 3 - 2 * t**2 * (t / beta))
    by_alpha3 = jnp.sign(beta) / 8 * (L**4 * moment(3, h, shift) - cubes)
    return delta * (delta * by_alpha3) * jnp.exp(shift)


def _outer_integral(L: Array, a: Array, b: Array, h: Array, shift: Array) -> Array:
    """T / L**2 exp(shift), for b = 2 |1 - a| and h = a L."""
    far = (moment(0, h, shift) - moment(0, (a - 1) * L, shift)) / jnp.where(L > 1, L, 1)
    parts = jnp.exp(h - shift) * moment(1, L, L) - h * _inner_integral(L, a, b, h, shift)
    return jnp.where((a > 0) & (L > 1), far, parts)


def _inner_integral(L: Array, a: Array, b: Array, h: Array, shift: Array) -> Array:
    """S / L**3 exp(shift), for b = 2 |1 - a| and h = a L."""
    parts = jnp.exp(h - shift) * moment(2, L, L) - a * moment(2, h, shift)
    parts = jnp.where(a > 1, -1.0, 1.0) * parts / b
    # Next to alpha = 2 these differ by next to nothing; there a series in L, and for a large h
    # the three terms of S.
    near, c = b < 1, jnp.where(b < 1, a, 1)
    series, term, p, q = jnp.zeros_like(L), jnp.full_like(L, 1 / 6), (c - 1) ** 2, c
    for n in range(3, 20 if L.dtype == jnp.float32 else 32):
        series, term = series + term * (p + q * (n - 1 - c)), term * jnp.minimum(L, 2.5) / (n + 1)
        p, q = p * (c - 1), q * c
    long = jnp.where(near, L > 2.5, (a <= 1) & (h > 1.2))
    far = moment(0, h - L, shift) - moment(0, h, shift) + L * moment(1, h, shift)
    far = far / jnp.where(long, L, 1) ** 2
    return jnp.where(long, far, jnp.where(near, series * jnp.exp(-shift), parts))


def _far_out(x: _Terms) -> Array:
    """Where second derivatives by alpha cancel when they are written by parts."""
    return (x.a > 0.6) & (x.L > 2)


def _squares(x: _Terms) -> tuple[Array, Array, Array]:
    """The integrals of s**2, t**2 and s t, over L exp(shift)."""
    L = jnp.where(_far_out(x), x.L, 2)
    h0, h1, h2 = (jnp.where(_far_out(x), x.h - k * L, 1) for k in range(3))
    (m0, m1, m2), (n0, n1) = (
        [moment(k, h, x.shift) for k in range(many)] for h, many in ((h0, 3), (h1, 2))
    )
    p0 = moment(0, h2, x.shift)
    rest = L * (L * m2 - 2 * m1 + 2 * n1) + (m0 - 2 * n0 + p0)
    return rest, m0 - 2 * n0 + p0, L * (m1 - n1) - (m0 - 2 * n0 + p0)


# From h = a L < _ENDED on the integrals have nearly ended; what follows is what is left of them,
# with no power of a, which may be huge, in a denominator.


def _whole(x: _Terms) -> Array:
    """b T |a| / 2 = 1 - E - (b / 2) t exp(h)."""
    E = jnp.exp(x.h - x.L)
    return 1 - (E + jnp.exp(x.h) * (0.5 * x.b * x.t))


def _last(x: _Terms) -> Array:
    """(|a| b / 2) (L - t) exp(h)."""
    return jnp.exp(x.h) * -x.h * (0.5 * x.b * x.L) * x.s


_ENDED = -3.0


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
    lambda r, s: flat(r) + multiply(1 / s, 1 / s),
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
    lambda r, s: flat(r),
    lambda r, s: multiply(-_sign(r), 1 / s, 1 / s),
)
def _laplace_slope(r: Array, scale: Array) -> Array:
    return jnp.sign(r) / scale


@with_partials(lambda r: flat(r))
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


# With nu = df, z = u**2, t = z / (nu + z) and c = nu / (nu + z) = 1 - t: the fraction and the
# inverse of _powers, whose pull is p = t / r.


@with_partials(
    lambda r, df, s: _student_t_slope(r, df, s),
    lambda r, df, s: _student_t_by_df(r, df, s),
    lambda r, df, s: _student_t_by_scale(r, df, s),
)
def _student_t(r: Array, df: Array, scale: Array) -> Array:
    normal, nu = jnp.isinf(df), clamped(df, HUGE)
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
    nu = clamped(df, HUGE)
    t = fraction(r, nu, scale)
    slope = jnp.where(t > 0.5, (nu + 1) * t / r, (nu + 1) * pull(r, nu, scale))
    return jnp.where(jnp.isinf(df), r / scale * (1 / scale), slope)


@with_partials(
    *partials_of(
        lambda r, df, s: (
            (clamped(df, HUGE) + 1)
            * (1 - 2 * fraction(r, clamped(df, HUGE), s))
            * pull_per_residual(r, clamped(df, HUGE), s)
        ),
        3,
    )
)
def _student_t_curvature(r: Array, df: Array, scale: Array) -> Array:
    """(nu + 1) (1 - 2 t) t / r**2, where t / r**2 is c / (nu scale**2)."""
    nu, x = clamped(df, HUGE), tame(r)
    t, c = fraction(x, nu, scale), inverse(x, nu, scale)
    near = t < c
    factors = [
        jnp.where(near, f, g) for f, g in ((c / nu, t), (1 / scale, 1 / x), (1 / scale, 1 / x))
    ]
    curvature = multiply(nu + 1, 1 - 2 * t, *factors)
    curvature = jnp.where(
        jnp.isinf(df), multiply(1 / scale, 1 / scale), at_infinity(r, 0, curvature)
    )
    return curvature + flat(r)


@with_partials(
    *partials_of(lambda r, nu, s: pull(r, nu, s) * (fraction(r, nu, s) - inverse(r, nu, s) / nu), 3)
)
def _student_t_slope_by_df(r: Array, df: Array, scale: Array) -> Array:
    """p (t - c / nu) = u (z - 1) / (scale (nu + z)**2)."""
    nu = clamped(df, HUGE)
    t, c = fraction(r, nu, scale), inverse(r, nu, scale)
    near, x = t < c, tame(r)
    factors = [jnp.where(near, f, g) for f, g in ((x / scale, t), (c, 1 / r), (1 / nu, 1))]
    return multiply(*factors, jnp.where(near, 1 / scale, 1), t - c / nu)


@with_partials(
    *partials_of(lambda r, nu, s: -2 * (nu + 1) * inverse(r, nu, s) * pull(r, nu, s) / s, 3)
)
def _student_t_slope_by_scale(r: Array, df: Array, scale: Array) -> Array:
    """-2 (nu + 1) c p / scale."""
    nu = clamped(df, HUGE)
    x, t, c = tame(r), fraction(r, nu, scale), inverse(r, nu, scale)
    # c = nu t / u**2, which may be next to nothing where the product is not.
    factors = [jnp.where(t < c, f, g) for f, g in ((c, nu * t), (1, scale / x), (1, scale / x))]
    by_scale = multiply(-2 * (nu + 1), *factors, pull(x, nu, scale), 1 / scale)
    by_scale = jnp.where(jnp.isinf(r), flat(nu + scale), by_scale)
    return jnp.where(jnp.isinf(df), -2 * multiply(r, 1 / scale, 1 / scale, 1 / scale), by_scale)


@with_partials(
    lambda r, df, s: _student_t_slope_by_df(r, df, s),
    lambda r, df, s: _student_t_by_df2(r, df, s),
    lambda r, df, s: _student_t_by_df_scale(r, df, s),
)
def _student_t_by_df(r: Array, df: Array, scale: Array) -> Array:
    """(log w - t) / 2 - t / (2 nu), and what the normaliser adds."""
    nu = clamped(df, HUGE)
    w = one_plus_square(tame(r), nu, jnp.zeros_like(nu), scale)
    rest = tail(w.log + w.lost) + flat(r)
    share, lost = quotient(w.t, nu)
    by_df = 0.5 * ((rest - share) - lost) + _student_t_excess_slope(nu)
    return jnp.where(jnp.isinf(df), flat(r), at_infinity(r, jnp.inf, by_df))


def _student_t_by_df2(r: Array, df: Array, scale: Array) -> Array:
    """t / nu**2 (1 - (nu + 1) t / 2), and what the normaliser adds."""
    nu = clamped(df, HUGE)
    t = fraction(r, nu, scale)
    by_df2 = t / nu * (1 / nu - 0.5 * (1 + 1 / nu) * t) + _student_t_excess_bend(nu)
    return jnp.where(jnp.isinf(df), flat(r), by_df2)


@with_partials(
    *partials_of(
        lambda r, nu, s: fraction(r, nu, s) * (inverse(r, nu, s) / nu - fraction(r, nu, s)) / s,
        3,
    )
)
def _student_t_by_df_scale(r: Array, df: Array, scale: Array) -> Array:
    """t (c / nu - t) / scale."""
    nu = clamped(df, HUGE)
    t, c = fraction(r, nu, scale), inverse(r, nu, scale)
    near, u = t < c, tame(r) / scale
    factors = [jnp.where(near, f, g) for f, g in ((u, t), (u, 1), (1 / nu, 1), (c, 1))]
    return multiply(*factors, c / nu - t, 1 / scale)


@with_partials(
    lambda r, df, s: _student_t_slope_by_scale(r, df, s),
    lambda r, df, s: _student_t_by_df_scale(r, df, s),
    lambda r, df, s: _student_t_by_scale2(r, df, s),
)
def _student_t_by_scale(r: Array, df: Array, scale: Array) -> Array:
    """(c - nu t) / scale = nu (1 - z) / (nu + z) / scale."""
    nu = clamped(df, HUGE)
    by_scale = (inverse(r, nu, scale) - nu * fraction(r, nu, scale)) / scale
    return jnp.where(jnp.isinf(df), _gaussian_by_scale(r, scale), by_scale)


def _student_t_by_scale2(r: Array, df: Array, scale: Array) -> Array:
    """(nu t**2 + (3 nu + 1) c t - c**2) / scale**2."""
    nu, s = clamped(df, HUGE), scale
    t, c = fraction(r, nu, s), inverse(r, nu, s)
    u = jnp.where(jnp.isinf(df), r, 0) / s
    normal = multiply(_ROOT3 * u - 1, _ROOT3 * u + 1, 1 / s, 1 / s)
    by_scale2 = multiply(t * (nu * t + (3 * nu + 1) * c) - c * c, 1 / s, 1 / s)
    return jnp.where(jnp.isinf(df), normal, by_scale2)


# log gamma(x) - log gamma(x + 1 / 2) + log(x) / 2, x = df / 2, is what the normaliser has beyond
# the normal's. Stirling's series holds from 12 on; below, the functions are those of x + 12, and
# what lies between is a product or, of the derivatives, a sum of terms of one sign.


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


def _student_t_excess_bend(df: Array) -> Array:
    large, x, y = _stirling_argument(df)
    between = jnp.zeros_like(x)
    for k in reversed(range(12)):
        p, q, s = 1 / (x + k), 1 / (x + (k + 0.5)), 1 / (x + (k + 1))
        between = between + p * q * s * (p + q + s)
    series = tuple((2 * k + 1) * (2 * k + 2) * c for k, c in enumerate(_STIRLING))
    bend = y * y * y * polynomial(y * y, series) + jnp.where(large, 0, 0.25 * between)
    return 0.25 * bend


def _stirling_argument(df: Array) -> tuple[Array, Array, Array]:
    """Whether the series holds at x = df / 2, x where it does not, and 1 over its argument."""
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
    `gaussian_nll`, at 0 the likelihood of a Cauchy error of scale `sqrt(2) scale`, between
    them the tails grow heavier as alpha falls. Below 0 there is no such distribution.

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

    How to learn alpha and the scale along with a model: `docs/adaptive.md`. In short, let free
    parameters be mapped to alpha in (0, 2) and to a scale > 0:

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
    power, exponent = x.power
    moved = multiply_exactly((u, u, power), exponent)
    # Far out the 1 does not count, and only the whole product stays in range.
    far = multiply_exactly((u, u, power, -1 / scale), exponent)
    by_scale = jnp.where(moved > 1 / jnp.finfo(r.dtype).eps, far, (1 - moved) / scale)
    return at_infinity(r, jnp.where(alpha > 0, -jnp.inf, -1 / scale), by_scale)


# With E, t, w and L of u: the second derivatives, each a product that is rounded as a whole.


def _nll_terms(r: Array, alpha: Array, scale: Array) -> tuple[Array, _Terms, Array]:
    """u, its terms, and beta / w = 2 - alpha - beta t."""
    u = r / scale
    x = _terms(u, alpha, jnp.ones_like(scale))
    return tame(u), x, x.beta * inverse(tame(u), x.b, jnp.ones_like(scale))


@with_partials(
    *partials_of(lambda r, alpha, s: _curvature(r / s, alpha, jnp.ones_like(s)) / s / s, 3)
)
def _general_nll_curvature(r: Array, alpha: Array, scale: Array) -> Array:
    """E (1 - beta t) / scale**2."""
    _, x, rest = _nll_terms(r, alpha, scale)
    power, exponent = x.power
    bend = jnp.where((alpha >= 0.5) | (x.t > 0.5), (alpha - 1) + rest, 1 - x.beta * x.t)
    curvature = multiply_exactly((power, bend, 1 / scale, 1 / scale), exponent)
    return at_infinity(r, jnp.where(alpha == 2, multiply(1 / scale, 1 / scale), 0), curvature)


@with_partials(
    *partials_of(lambda r, alpha, s: _slope_by_alpha(r / s, alpha, jnp.ones_like(s)) / s, 3)
)
def _general_nll_slope_by_alpha(r: Array, alpha: Array, scale: Array) -> Array:
    """u E (L - t) / 2 / scale."""
    u, x, _ = _nll_terms(r, alpha, scale)
    power, exponent = x.power
    by_alpha = multiply_exactly((u, power, 0.5 * x.L, x.L, x.s, 1 / scale), exponent)
    by_alpha = at_two(r, alpha, by_alpha, jnp.sign(r) * jnp.inf)
    return at_infinity(r, jnp.where(alpha < 1, 0, jnp.sign(r) * jnp.inf), by_alpha)


@with_partials(
    *partials_of(
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
    u, x, rest = _nll_terms(r, alpha, scale)
    power, exponent = x.power
    factors = u, power, -(alpha + rest), 1 / scale, 1 / scale
    limit = jnp.where(alpha > 1, jnp.inf, jnp.where(alpha == 1, multiply(1 / scale, 1 / scale), 0))
    return at_infinity(r, -jnp.sign(r) * limit, multiply_exactly(factors, exponent))


@with_partials(
    *partials_of(
        lambda r, alpha, s: -(r / s) * _slope_by_alpha(r / s, alpha, jnp.ones_like(s)) / s,
        3,
    )
)
def _general_nll_by_alpha_scale(r: Array, alpha: Array, scale: Array) -> Array:
    """-u**2 E (L - t) / 2 / scale."""
    u, x, _ = _nll_terms(r, alpha, scale)
    power, exponent = x.power
    by_both = multiply_exactly((u, u, power, -0.5 * x.L, x.L, x.s, 1 / scale), exponent)
    return at_infinity(r, -jnp.inf, at_two(r, alpha, by_both, -jnp.inf))


@with_partials(
    *partials_of(
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
    u, x, rest = _nll_terms(r, alpha, scale)
    power, exponent = x.power
    bend = 1 + alpha + rest
    moved = multiply_exactly((u, u, power, bend), exponent)
    near = multiply(moved - 1, 1 / scale, 1 / scale)
    far = multiply_exactly((u, u, power, bend, 1 / scale, 1 / scale), exponent)
    limit = jnp.where(alpha > 0, jnp.inf, multiply(1 / scale, 1 / scale))
    return at_infinity(r, limit, jnp.where(moved > 1 / jnp.finfo(r.dtype).eps, far, near))


@with_partials(lambda alpha: _log_partition_by_alpha(alpha))
def _log_partition(alpha: Array) -> Array:
    """log Z(alpha), Z the integral of exp(-general(u)) over all u, for alpha in [0, 2].

    With u = sqrt(b) sinh(v) the integrand is analytic about the real axis and dies out at its
    ends, so that the trapezoidal rule converges geometrically: Trefethen and Weideman (2014),
    SIAM Review 56, 385-458. All derivatives are those of `general` at the nodes.
    """
    nodes, weights = _nodes(alpha[..., None], 2.2, 150)
    density = jnp.exp(-_general(nodes, alpha[..., None], jnp.ones_like(alpha)[..., None]))
    Z, lost = sum_of_two(*_sum(weights * density))
    return math.log(4) + (jnp.log(Z / 4) + lost / Z)


def _sum(terms: Array) -> tuple[Array, Array]:
    """The sum of what is left of numbers near 1 when they are cut short, and that of the rest.

    The first is exact; in a plain sum roundings add up.
    """
    short = jnp.round(terms * 2**14) / 2**14
    return jnp.sum(short, axis=-1), jnp.sum(terms - short, axis=-1)


@with_partials(lambda alpha: _log_partition_by_alpha2(alpha))
def _log_partition_by_alpha(alpha: Array) -> Array:
    """Minus the mean, over the density, of the loss's derivative in alpha."""
    share, nodes, a, one = _density(alpha)
    high, low = _sum(share * _by_alpha(nodes, a, one))
    return -(high + low)


def _log_partition_by_alpha2(alpha: Array) -> Array:
    """The variance of the loss's derivative in alpha, minus the mean of the second one."""
    share, nodes, a, one = _density(alpha)
    first = _by_alpha(nodes, a, one)
    change = (first + _log_partition_by_alpha(alpha)[..., None]) ** 2 - _by_alpha2(nodes, a, one)
    high, low = _sum(share * change)
    return high + low


def _density(alpha: Array) -> tuple[Array, Array, Array, Array]:
    """What each node of the rule has of the density, the nodes, alpha, and delta = 1.

    The derivatives grow like powers of log(u), so the rule reaches further out than that of Z.
    """
    a = alpha[..., None]
    nodes, weights = _nodes(a, 3.2, 150 if alpha.dtype == jnp.float32 else 300)
    one = jnp.ones_like(a)
    terms = weights * jnp.exp(-_general(nodes, a, one))
    high, low = _sum(terms)
    return terms / (high + low)[..., None], nodes, a, one


def _nodes(alpha: Array, digits: float, many: int) -> tuple[Array, Array]:
    """The rule for alpha of shape (..., 1). Its steps are short numbers: no rounding there.

    At the last node the density is about eps**digits.
    """
    alpha, info = lax.stop_gradient(alpha), jnp.finfo(alpha.dtype)
    b = jnp.maximum(2 - alpha, float(info.eps))  # and the largest power of 2 up to its root:
    root = ldexp(jnp.ones_like(b), (frexp(b)[1] - 1) >> 1)
    far, a = -digits * math.log(info.eps), jnp.maximum(alpha, float(info.tiny) ** 0.5)
    last = jnp.log1p(a * (far / b)) / a + jnp.log(2 * jnp.sqrt(b) / root)
    h = lax.reduce_precision(last / many, info.nexp, 8)
    k = jnp.arange(many + 1, dtype=alpha.dtype)
    up, down = jnp.exp(h * k), jnp.exp(-h * k)  # XLA's sinh and cosh are rougher
    weights = jnp.where(k == 0, 0.5 * root, root) * h * (up + down)
    return 0.5 * root * (up - down), weights
