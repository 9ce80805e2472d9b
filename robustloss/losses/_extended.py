"""Numbers as a sum of two, or with an exponent of their own: for powers and logarithms whose
rounding would be an error of the result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss.losses._double import (
    clamped,
    finite,
    frexp,
    ldexp,
    product,
    quotient_near_1,
    sum_of_two,
)
from robustloss.losses._pieces import atanh_series, polynomial


class OnePlus(NamedTuple):
    """w = 1 + y."""

    y: Array
    log: Array
    lost: Array
    """What `log` lost by rounding."""
    t: Array
    """y / w"""
    inverse: Array
    """1 / w"""


def one_plus_square(r: Array, b: Array, lost: Array, delta: Array) -> OnePlus:
    """w = 1 + (r / delta)**2 / |b + lost|, for any finite delta and b, and r of any size."""
    (m, e), (scale, e_scale) = frexp(finite(jnp.abs(r))), frexp(finite(delta))
    lost, (b, e_b) = lost / b, frexp(jnp.abs(b))
    # y = f 2**k, f in (1/4, 8), and what f lost.
    u, lost_u = quotient_near_1(m, scale)
    square, lost_square = product(u, u)
    f, lost_f = quotient_near_1(square, b)
    lost_f = lost_f + (lost_square + 2 * u * lost_u) / b - f * lost
    k = jnp.where(f == 0, 0, 2 * (e - e_scale) - e_b)
    # w = 2**j (1 + n), n in [sqrt(1/2) - 1, sqrt(2) - 1].
    f, e_f = frexp(f)
    k, lost_f = k + e_f, ldexp(lost_f, -e_f)
    above = jnp.maximum(k, 0)
    _, j = frexp((ldexp(f, k - above) + ldexp(jnp.ones_like(f), -above)) * math.sqrt(2))
    j = above + j - 1
    info = jnp.finfo(f.dtype)
    scaled = ldexp(f, k - j)
    half = lax.reduce_precision(scaled, info.nexp, info.nmant // 2)
    one = ldexp(jnp.ones_like(f), -j)
    n, lost_n = sum_of_two(jnp.where(j == 0, 0, half - 1), jnp.where(j == 0, half, one))
    n, lost_n = sum_of_two(n, (scaled - half) + (lost_n + ldexp(lost_f, k - j)))
    # log(1 + n) = 2 atanh(s), s = n / (2 + n).
    d, lost_d = sum_of_two(jnp.full_like(n, 2), n)
    s, lost_s = quotient_near_1(n, d)
    lost_s = lost_s + (lost_n - s * (lost_d + lost_n)) / d
    high, low = _LN2[f.dtype.name]
    log, lost_log = sum_of_two(j.astype(f.dtype) * high, 2 * s)
    lost_log = lost_log + (
        j.astype(f.dtype) * low + 2 * (lost_s + s * (s * s) * atanh_series(s * s))
    )
    # t and 1 / w are quotients by 1 + n, with what all roundings before took from them.
    one = jnp.ones_like(n)
    d, lost_d = sum_of_two(one, n)
    lost_d = lost_d + lost_n
    t, lost_t = quotient_near_1(scaled, d)
    t = t + (lost_t + (ldexp(lost_f, k - j) - t * lost_d) / d)
    inverse, lost_inverse = quotient_near_1(one, d)
    inverse = ldexp(inverse + (lost_inverse - inverse * lost_d / d), -j)
    y = ldexp(f, k)
    log, lost_log = sum_of_two(log, lost_log)
    # With a power in the same loop, the vectoriser of jaxlib 0.12 takes minutes: so, a fence.
    return OnePlus(y, lax.optimization_barrier(log), lost_log, t, inverse)


def times(p: Array, lost: ArrayLike, w: OnePlus) -> tuple[Array, Array]:
    """(p + lost) log w, in two numbers."""
    h, lost_h = product(p, w.log)
    return h, lost_h + p * w.lost + lost * w.log


def exponential(h: Array, lost: Array) -> tuple[Array, Array]:
    """exp(h + lost) as a number near 1 and an exponent of 2."""
    high, low = _LN2[h.dtype.name]
    h, lost = clamped(h, _FAR[h.dtype.name]), clamped(lost, 1)
    n = jnp.round(h / math.log(2))
    return jnp.exp((h - n * high) + (lost - n * low)), n.astype(jnp.int32)


def exp_ratio(h: Array, lost: Array) -> tuple[Array, Array]:
    """(exp(h + lost) - 1) / h as a number and an exponent of 2."""
    near = jnp.abs(h) < 2
    # Near 0 it is exp(h / 2) sinh(h / 2) / (h / 2).
    half = 0.5 * jnp.where(near, h, 0)
    terms = 6 if h.dtype == jnp.float32 else 10
    series = polynomial(half * half, tuple(1 / math.factorial(2 * k + 1) for k in range(terms)))
    power, n = exponential(h, lost)
    above = jnp.maximum(n, 0)
    far = (ldexp(power, n - above) - ldexp(jnp.ones_like(h), -above)) / jnp.where(near, 1, h + lost)
    ratio = jnp.where(near, jnp.exp(half + 0.5 * lost) * series, far)
    return ratio, jnp.where(near, 0, above)


_FAR = {"float32": 2e3, "float64": 8e3}  # exp of it is out of range even times delta**2
_LN2 = {  # its high part times any exponent is exact
    "float32": (0.693115234375, 3.1946184945309415e-05),
    "float64": (6.93147180369123816490e-01, 1.90821492927058770002e-10),
}
