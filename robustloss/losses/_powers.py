"""The powers and logarithms of w = 1 + (r / delta)**2 / b, b = abs(2 - alpha), that `general` is
made of, with their derivatives, and its care for the ends: alpha at 2 and at infinity, r infinite.
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

HUGE = 2.0**80  # from where degrees of freedom are infinite to every digit
TERMS = {"float32": 16, "float64": 27}  # of series in |x| < 2


# With y = (r / delta)**2 / b:


def root(r: Array, b: Array, delta: Array) -> Array:
    """sqrt(y)."""
    return jnp.abs(r) / delta / jnp.sqrt(b)


@with_partials(
    lambda r, b, d: 2 * pull(r, b, d),
    lambda r, b, d: -fraction(r, b, d) / b,
    lambda r, b, d: -2 * fraction(r, b, d) / d,
)
def log_w(r: Array, b: Array, delta: Array) -> Array:
    """L = log w."""
    q = root(r, b, delta)
    far = 2 * (jnp.log(jnp.abs(r)) - jnp.log(delta)) - jnp.log(b)
    return jnp.where(q > 2.0**30, far, jnp.log1p(q * q))


@with_partials(
    lambda r, b, d: 2 * pull(r, b, d) * inverse(r, b, d),
    lambda r, b, d: -fraction(r, b, d) * inverse(r, b, d) / b,
    lambda r, b, d: -2 * fraction(r, b, d) * inverse(r, b, d) / d,
)
def fraction(r: Array, b: Array, delta: Array) -> Array:
    """t = y / w."""
    q = root(r, b, delta)
    s = jnp.where(q > 1, 1 / q, q) ** 2
    return jnp.where(q > 1, 1, s) / (1 + s)


@with_partials(
    lambda r, b, d: -2 * pull(r, b, d) * inverse(r, b, d),
    lambda r, b, d: fraction(r, b, d) * inverse(r, b, d) / b,
    lambda r, b, d: 2 * fraction(r, b, d) * inverse(r, b, d) / d,
)
def inverse(r: Array, b: Array, delta: Array) -> Array:
    """1 / w."""
    q = root(r, b, delta)
    s = jnp.where(q > 1, 1 / q, q) ** 2
    return jnp.where(q > 1, s, 1) / (1 + s)


@with_partials(
    lambda r, b, d: (1 - 2 * fraction(r, b, d)) * pull_per_residual(r, b, d),
    lambda r, b, d: -pull(r, b, d) * inverse(r, b, d) / b,
    lambda r, b, d: -2 * pull(r, b, d) * inverse(r, b, d) / d,
)
def pull(r: Array, b: Array, delta: Array) -> Array:
    """t / r."""
    near = ratio(r, delta) / b * inverse(r, b, delta) / delta
    return jnp.where(root(r, b, delta) > 1, fraction(r, b, delta) / r, near)


@with_partials(
    lambda r, b, d: -2 * pull(r, b, d) * pull_per_residual(r, b, d),
    lambda r, b, d: -pull_per_residual(r, b, d) * inverse(r, b, d) / b,
    lambda r, b, d: -2 * pull_per_residual(r, b, d) * inverse(r, b, d) / d,
)
def pull_per_residual(r: Array, b: Array, delta: Array) -> Array:
    """t / r**2 = 1 / (b delta**2 + r**2)."""
    near = multiply(inverse(r, b, delta), 1 / b, 1 / delta, 1 / delta)
    far = multiply(fraction(r, b, delta), 1 / r, 1 / r)
    return jnp.where(root(r, b, delta) > 1, far, near)


@with_partials(
    lambda r, alpha, d: (
        -per(two_minus(alpha) * fraction_of(r, alpha, d), r) * power_of(r, alpha, d)
    ),
    lambda r, a, d: 0.5 * tail(log_of(r, a, d)) * power_of(r, a, d),
    lambda r, a, d: two_minus(a) * fraction_of(r, a, d) * power_of(r, a, d) / d,
)
def power_of(r: Array, alpha: Array, delta: Array) -> Array:
    """E = w**(-beta / 2)."""
    beta, lost = two_minus_exactly(alpha)
    w = one_plus_square(r, beta, lost, delta)
    return ldexp(*exponential(*times(-0.5 * beta, -0.5 * lost, w)))


def fraction_of(r: Array, alpha: Array, delta: Array) -> Array:
    return fraction(r, jnp.abs(two_minus(alpha)), delta)


def log_of(r: Array, alpha: Array, delta: Array) -> Array:
    return log_w(r, jnp.abs(two_minus(alpha)), delta)


# Integrals of exponentials, and the ends.


def moment(k: int, x: Array, shift: Array) -> Array:
    """Integral of v**k exp(x v - shift) over v from 0 to 1."""
    small, constant = jnp.abs(x) < 2, jnp.exp(-shift)
    up, down = jnp.where(small & (x >= 0), x, 0), jnp.where(small & (x < 0), -x, 0)
    far = jnp.where(small, 2, x)
    top, closed = jnp.exp(x - shift), jnp.zeros_like(x)
    for j in range(k + 1):
        closed = (top - (j * closed if j else constant)) / far
    # Series of positive terms: of exp(x v), and for x < 0 of exp(x) exp(-x (1 - v)).
    terms = range(TERMS[x.dtype.name])
    rising = tuple(1 / (math.factorial(n) * (n + k + 1)) for n in terms)
    falling = tuple(math.factorial(k) / math.factorial(n + k + 1) for n in terms)
    series = jnp.where(x < 0, top * polynomial(down, falling), constant * polynomial(up, rising))
    return jnp.where(small, series, closed)


def tail(L: Array) -> Array:
    """L - t = L - 1 + exp(-L)."""
    return L**2 * moment(1, L, L)


def bounded(alpha: Array) -> Array:
    """alpha, but finite where it is infinite to every digit of the power."""
    return clamped(alpha, _bound(alpha))


def _bound(alpha: Array) -> float:
    """2 +- 1 / bound is 2, too. Where it is larger, u**2 / b is 0 before the derivatives are."""
    return 2.0**40 if alpha.dtype == jnp.float32 else 2.0**80


def two_minus(alpha: Array) -> Array:
    """beta; next to 0 at alpha = 2 and finite at infinity."""
    beta = 2 - bounded(alpha)
    return jnp.where(beta == 0, 1 / _bound(alpha), beta)


def two_minus_exactly(alpha: Array) -> tuple[Array, Array]:
    """The same in two numbers."""
    minus, two = -bounded(alpha), jnp.full_like(alpha, 2)
    large = jnp.abs(minus) > 2
    beta, lost = sum_of_two(jnp.where(large, minus, two), jnp.where(large, two, minus))
    return jnp.where(beta == 0, 1 / _bound(alpha), beta), lost


def tame(r: Array) -> Array:
    """r, but 0 where it is infinite and a limit takes the formula's place."""
    return jnp.where(jnp.isinf(r), 0, r)


def above_0(h: Array) -> Array:
    """max(h, 0), a constant to differentiation."""
    return lax.stop_gradient(jnp.where(h > 0, h, 0))


def negative(alpha: Array) -> Array:
    """alpha where it is < 0, and -1 elsewhere, so that nothing is divided by 0."""
    return jnp.where(alpha < 0, alpha, -1)


def sign_infinity(x: Array) -> Array:
    """The limit of `x s` as s grows."""
    return jnp.where(x == 0, 0, jnp.copysign(jnp.inf, x))


def at_infinity(r: Array, limit: ArrayLike, formula: Array) -> Array:
    """The limit where |r| is infinite, but for a formula that says NaN."""
    return jnp.where(jnp.isinf(r) & ~jnp.isnan(formula), limit, formula)


def at_two(r: Array, alpha: Array, formula: Array, limit: ArrayLike) -> Array:
    """The limit at alpha = 2, but for r = 0 and a formula that says NaN."""
    return jnp.where((alpha == 2) & (r != 0) & ~jnp.isnan(formula), limit, formula)


def past_bound(alpha: Array, formula: Array, k: int = 2) -> Array:
    """A derivative in alpha, which falls like |alpha|**-k where alpha is replaced by its bound."""
    scale = (bounded(alpha) / alpha) ** k
    scaled = jnp.where(jnp.abs(alpha) > _bound(alpha), formula * scale, formula)
    return jnp.where(jnp.isinf(alpha) & ~jnp.isnan(formula), 0, scaled)


def per(x: Array, r: Array) -> Array:
    """`x / r`, and 0 at r = 0."""
    return x / jnp.where(r == 0, 1, r)


@with_partials(lambda r, d: jnp.ones_like(r) / d, lambda r, d: -ratio(r, d) / d)
def ratio(r: Array, delta: Array) -> Array:
    return r / delta
