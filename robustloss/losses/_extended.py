"""Powers and logarithms of w = 1 + u**2 / b in double words, or with a separate exponent.

The exponent of a power can be in the hundreds, and its rounding error becomes a relative error of
the power. In these formulas it is corrected.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss.losses._double import (
    clamped,
    clamped_to_finite,
    frexp,
    ldexp,
    product,
    quotient_near_1,
    sum_of_two,
)
from robustloss.losses._pieces import atanh_series, polynomial


class OnePlus(NamedTuple):
    """w = 1 + y, all of the shape of the residual."""

    y: Array
    log: Array
    """log w"""
    log_error: Array
    """The rounding error of `log`: log w is their sum."""
    t: Array
    """y / w"""
    inverse: Array
    """1 / w"""


def one_plus_square(r: Array, b: Array, error: Array, delta: Array) -> OnePlus:
    """w = 1 + (r / delta)**2 / |b + error|, for any finite delta and b and any r."""
    (m, e), (scale, e_scale) = frexp(clamped_to_finite(jnp.abs(r))), frexp(clamped_to_finite(delta))
    error, (b, e_b) = error / b, frexp(jnp.abs(b))
    # y = f 2**k, f in (1/4, 8), with the rounding error of f.
    u, u_error = quotient_near_1(m, scale)
    square, square_error = product(u, u)
    f, f_error = quotient_near_1(square, b)
    f_error = f_error + (square_error + 2 * u * u_error) / b - f * error
    k = jnp.where(f == 0, 0, 2 * (e - e_scale) - e_b)
    # w = 2**j (1 + n), n in [sqrt(1/2) - 1, sqrt(2) - 1].
    f, e_f = frexp(f)
    k, f_error = k + e_f, ldexp(f_error, -e_f)
    above = jnp.maximum(k, 0)
    _, j = frexp((ldexp(f, k - above) + ldexp(jnp.ones_like(f), -above)) * math.sqrt(2))
    j = above + j - 1
    info = jnp.finfo(f.dtype)
    scaled = ldexp(f, k - j)
    half = lax.reduce_precision(scaled, info.nexp, info.nmant // 2)
    one = ldexp(jnp.ones_like(f), -j)
    n, n_error = sum_of_two(jnp.where(j == 0, 0, half - 1), jnp.where(j == 0, half, one))
    n, n_error = sum_of_two(n, (scaled - half) + (n_error + ldexp(f_error, k - j)))
    # log(1 + n) = 2 atanh(s), s = n / (2 + n).
    d, d_error = sum_of_two(jnp.full_like(n, 2), n)
    s, s_error = quotient_near_1(n, d)
    s_error = s_error + (n_error - s * (d_error + n_error)) / d
    high, low = _LN2[f.dtype.name]
    log, log_error = sum_of_two(j.astype(f.dtype) * high, 2 * s)
    log_error = log_error + (
        j.astype(f.dtype) * low + 2 * (s_error + s * (s * s) * atanh_series(s * s))
    )
    # t and 1 / w are quotients by 1 + n, corrected by the errors of all roundings before.
    one = jnp.ones_like(n)
    d, d_error = sum_of_two(one, n)
    d_error = d_error + n_error
    t, t_error = quotient_near_1(scaled, d)
    t = t + (t_error + (ldexp(f_error, k - j) - t * d_error) / d)
    inverse, inverse_error = quotient_near_1(one, d)
    inverse = ldexp(inverse + (inverse_error - inverse * d_error / d), -j)
    y = ldexp(f, k)
    log, log_error = sum_of_two(log, log_error)
    # The barrier keeps a power out of this loop, for which the vectoriser of jaxlib 0.12 takes
    # minutes.
    return OnePlus(y, lax.optimization_barrier(log), log_error, t, inverse)


def times(p: Array, error: ArrayLike, w: OnePlus) -> tuple[Array, Array]:
    """(p + error) log w, as a double word."""
    h, h_error = product(p, w.log)
    return h, h_error + p * w.log_error + error * w.log


def exponential(h: Array, error: Array) -> tuple[Array, Array]:
    """exp(h + error) as a number near 1 and an exponent of 2."""
    high, low = _LN2[h.dtype.name]
    h, error = clamped(h, _EXP_LIMIT[h.dtype.name]), clamped(error, 1)
    n = jnp.round(h / math.log(2))
    return jnp.exp((h - n * high) + (error - n * low)), n.astype(jnp.int32)


def exp_ratio(h: Array, error: Array) -> tuple[Array, Array]:
    """(exp(h + error) - 1) / h as a number and an exponent of 2."""
    small = jnp.abs(h) < 2
    # For small h the quotient is exp(h / 2) sinh(h / 2) / (h / 2), where sinh has a series.
    half = 0.5 * jnp.where(small, h, 0)
    terms = 6 if h.dtype == jnp.float32 else 10
    series = polynomial(half * half, tuple(1 / math.factorial(2 * k + 1) for k in range(terms)))
    power, n = exponential(h, error)
    above = jnp.maximum(n, 0)
    far = (ldexp(power, n - above) - ldexp(jnp.ones_like(h), -above)) / jnp.where(
        small, 1, h + error
    )
    ratio = jnp.where(small, jnp.exp(half + 0.5 * error) * series, far)
    return ratio, jnp.where(small, 0, above)


# The exponential of a larger number is out of range even times delta**2.
_EXP_LIMIT = {"float32": 2e3, "float64": 8e3}
# log 2 in two parts. The product of the high part with an exponent is exact.
_LN2 = {
    "float32": (0.693115234375, 3.1946184945309415e-05),
    "float64": (6.93147180369123816490e-01, 1.90821492927058770002e-10),
}
