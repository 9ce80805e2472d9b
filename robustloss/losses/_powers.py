"""The powers and logarithms that `general` consists of, with their derivatives and limits.

In Barron's notation b = |alpha - 2|, and w = 1 + (r / delta)**2 / b. Here beta = 2 - alpha. The
limits are those at alpha = 2, at infinite alpha and at an infinite residual.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss.losses._double import clamped, ldexp, multiply, sum_of_two
from robustloss.losses._extended import exponential, one_plus_square, times
from robustloss.losses._pieces import polynomial
from robustloss.losses._rule import with_partials

INFINITE_DF = 2.0**80  # degrees of freedom that cannot be told from infinity in any digit
SERIES_TERMS = {"float32": 16, "float64": 27}  # of power series in x, for |x| < 2


# Functions of y = (r / delta)**2 / b and w = 1 + y.


def root_y(r: Array, b: Array, delta: Array) -> Array:
    """sqrt(y)."""
    return jnp.abs(r) / delta / jnp.sqrt(b)


@with_partials(
    lambda r, b, d: 2 * fraction_over_r(r, b, d),
    lambda r, b, d: -fraction(r, b, d) / b,
    lambda r, b, d: -2 * fraction(r, b, d) / d,
)
def log_w(r: Array, b: Array, delta: Array) -> Array:
    """L = log w."""
    q = root_y(r, b, delta)
    large_form = 2 * (jnp.log(jnp.abs(r)) - jnp.log(delta)) - jnp.log(b)
    return jnp.where(q > 2.0**30, large_form, jnp.log1p(q * q))


@with_partials(
    lambda r, b, d: 2 * fraction_over_r(r, b, d) * inverse(r, b, d),
    lambda r, b, d: -fraction(r, b, d) * inverse(r, b, d) / b,
    lambda r, b, d: -2 * fraction(r, b, d) * inverse(r, b, d) / d,
)
def fraction(r: Array, b: Array, delta: Array) -> Array:
    """t = y / w."""
    q = root_y(r, b, delta)
    s = jnp.where(q > 1, 1 / q, q) ** 2
    return jnp.where(q > 1, 1, s) / (1 + s)


@with_partials(
    lambda r, b, d: -2 * fraction_over_r(r, b, d) * inverse(r, b, d),
    lambda r, b, d: fraction(r, b, d) * inverse(r, b, d) / b,
    lambda r, b, d: 2 * fraction(r, b, d) * inverse(r, b, d) / d,
)
def inverse(r: Array, b: Array, delta: Array) -> Array:
    """1 / w."""
    q = root_y(r, b, delta)
    s = jnp.where(q > 1, 1 / q, q) ** 2
    return jnp.where(q > 1, s, 1) / (1 + s)


@with_partials(
    lambda r, b, d: (1 - 2 * fraction(r, b, d)) * fraction_over_r2(r, b, d),
    lambda r, b, d: -fraction_over_r(r, b, d) * inverse(r, b, d) / b,
    lambda r, b, d: -2 * fraction_over_r(r, b, d) * inverse(r, b, d) / d,
)
def fraction_over_r(r: Array, b: Array, delta: Array) -> Array:
    """t / r."""
    small_form = ratio(r, delta) / b * inverse(r, b, delta) / delta
    return jnp.where(root_y(r, b, delta) > 1, fraction(r, b, delta) / r, small_form)


@with_partials(
    lambda r, b, d: -2 * fraction_over_r(r, b, d) * fraction_over_r2(r, b, d),
    lambda r, b, d: -fraction_over_r2(r, b, d) * inverse(r, b, d) / b,
    lambda r, b, d: -2 * fraction_over_r2(r, b, d) * inverse(r, b, d) / d,
)
def fraction_over_r2(r: Array, b: Array, delta: Array) -> Array:
    """t / r**2 = 1 / (b delta**2 + r**2)."""
    small_form = multiply(inverse(r, b, delta), 1 / b, 1 / delta, 1 / delta)
    large_form = multiply(fraction(r, b, delta), 1 / r, 1 / r)
    return jnp.where(root_y(r, b, delta) > 1, large_form, small_form)


@with_partials(
    lambda r, alpha, d: (
        -quotient_or_zero(two_minus(alpha) * fraction_at_alpha(r, alpha, d), r)
        * weight(r, alpha, d)
    ),
    lambda r, a, d: 0.5 * log_minus_fraction(log_w_at_alpha(r, a, d)) * weight(r, a, d),
    lambda r, a, d: two_minus(a) * fraction_at_alpha(r, a, d) * weight(r, a, d) / d,
)
def weight(r: Array, alpha: Array, delta: Array) -> Array:
    """E = w**(-beta / 2) = psi(r) / r, the weight of `general`."""
    beta, error = two_minus_exactly(alpha)
    w = one_plus_square(r, beta, error, delta)
    return ldexp(*exponential(*times(-0.5 * beta, -0.5 * error, w)))


def fraction_at_alpha(r: Array, alpha: Array, delta: Array) -> Array:
    """t = y / w for b = |2 - alpha|."""
    return fraction(r, jnp.abs(two_minus(alpha)), delta)


def log_w_at_alpha(r: Array, alpha: Array, delta: Array) -> Array:
    """L = log w for b = |2 - alpha|."""
    return log_w(r, jnp.abs(two_minus(alpha)), delta)


# Integrals of exponentials.


def moment(k: int, x: Array, shift: Array) -> Array:
    """Integral of v**k exp(x v - shift) over v from 0 to 1."""
    small, constant = jnp.abs(x) < 2, jnp.exp(-shift)
    positive_x, minus_negative_x = (
        jnp.where(small & (x >= 0), x, 0),
        jnp.where(small & (x < 0), -x, 0),
    )
    divisor = jnp.where(small, 2, x)
    exp_end, closed_form = jnp.exp(x - shift), jnp.zeros_like(x)
    for j in range(k + 1):
        closed_form = (exp_end - (j * closed_form if j else constant)) / divisor
    # For a small x, series whose terms are all positive: that of exp(x v), or for x < 0 that of
    # exp(-x (1 - v)), times exp(x).
    terms = range(SERIES_TERMS[x.dtype.name])
    rising = tuple(1 / (math.factorial(n) * (n + k + 1)) for n in terms)
    falling = tuple(math.factorial(k) / math.factorial(n + k + 1) for n in terms)
    series = jnp.where(
        x < 0,
        exp_end * polynomial(minus_negative_x, falling),
        constant * polynomial(positive_x, rising),
    )
    return jnp.where(small, series, closed_form)


def log_minus_fraction(L: Array) -> Array:
    """L - t = L - 1 + exp(-L)."""
    return L**2 * moment(1, L, L)


# Limits.


def bounded_alpha(alpha: Array) -> Array:
    """alpha clamped to a bound beyond which no digit of a power of w changes."""
    return clamped(alpha, _alpha_bound(alpha))


def _alpha_bound(alpha: Array) -> float:
    """The bound of |alpha|.

    2 + 1 / bound is still 2. With a larger bound, u**2 / b would be 0 before the derivatives are.
    """
    return 2.0**40 if alpha.dtype == jnp.float32 else 2.0**80


def two_minus(alpha: Array) -> Array:
    """beta = 2 - alpha, but tiny and not 0 at alpha = 2, and finite at infinity."""
    beta = 2 - bounded_alpha(alpha)
    return jnp.where(beta == 0, 1 / _alpha_bound(alpha), beta)


def two_minus_exactly(alpha: Array) -> tuple[Array, Array]:
    """beta as a double word."""
    minus, two = -bounded_alpha(alpha), jnp.full_like(alpha, 2)
    large = jnp.abs(minus) > 2
    beta, error = sum_of_two(jnp.where(large, minus, two), jnp.where(large, two, minus))
    return jnp.where(beta == 0, 1 / _alpha_bound(alpha), beta), error


def zero_at_infinity(r: Array) -> Array:
    """r, but 0 where it is infinite and a limit replaces the formula."""
    return jnp.where(jnp.isinf(r), 0, r)


def positive_part(h: Array) -> Array:
    """max(h, 0), a constant in differentiation."""
    return lax.stop_gradient(jnp.where(h > 0, h, 0))


def negative_or_minus_1(alpha: Array) -> Array:
    """alpha where it is negative, else -1, so that no formula divides by 0."""
    return jnp.where(alpha < 0, alpha, -1)


def signed_infinity(x: Array) -> Array:
    """The limit of `x s` as s goes to infinity."""
    return jnp.where(x == 0, 0, jnp.copysign(jnp.inf, x))


def limit_at_infinity(r: Array, limit: ArrayLike, formula: Array) -> Array:
    """The limit where |r| is infinite and the formula is not NaN, else the formula."""
    return jnp.where(jnp.isinf(r) & ~jnp.isnan(formula), limit, formula)


def limit_at_two(r: Array, alpha: Array, formula: Array, limit: ArrayLike) -> Array:
    """The limit where alpha = 2, r is not 0 and the formula is not NaN, else the formula."""
    return jnp.where((alpha == 2) & (r != 0) & ~jnp.isnan(formula), limit, formula)


def decayed_beyond_bound(alpha: Array, formula: Array, k: int = 2) -> Array:
    """A derivative in alpha that decays like |alpha|**-k where the bound replaces alpha."""
    scale = (bounded_alpha(alpha) / alpha) ** k
    scaled = jnp.where(jnp.abs(alpha) > _alpha_bound(alpha), formula * scale, formula)
    return jnp.where(jnp.isinf(alpha) & ~jnp.isnan(formula), 0, scaled)


def quotient_or_zero(x: Array, r: Array) -> Array:
    """`x / r`, and 0 at r = 0."""
    return x / jnp.where(r == 0, 1, r)


@with_partials(lambda r, d: jnp.ones_like(r) / d, lambda r, d: -ratio(r, d) / d)
def ratio(r: Array, delta: Array) -> Array:
    return r / delta
