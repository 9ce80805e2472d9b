"""Arithmetic whose rounding is known: double words, and numbers with an exponent of their own.

A double word is a number and what rounding took from it. A compiler may fuse a product into a sum
and so skip the rounding of the product: below, every product in a sum is one of half significands,
which is exact either way.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

# Double words.


def product(x: Array, y: Array) -> tuple[Array, Array]:
    """`x * y` rounded to one bit less than x has, and what that took from it."""
    info = jnp.finfo(x.dtype)
    p = lax.reduce_precision(x * y, info.nexp, info.nmant - 1)
    return p, -_minus_product(p, x, y)


def quotient(x: Array, y: Array) -> tuple[Array, Array]:
    """`x / y` for finite x and y > 0, and what rounding took from it."""
    unit, _ = _unit(y)  # lest a product under- or overflows
    x, y = x * unit, y * unit
    q = x / y
    return q, _minus_product(x, q, y) / y


def _minus_product(z: Array, x: Array, y: Array) -> Array:
    """`z - x y` for a z that is next to it."""
    info = jnp.finfo(x.dtype)

    def halves(x: Array) -> tuple[Array, Array]:
        high = lax.reduce_precision(x, info.nexp, (info.nmant - 1) // 2)
        return high, x - high

    (x1, x0), (y1, y0) = halves(x), halves(y)
    return ((z - x1 * y1) - x1 * y0 - x0 * y1) - x0 * y0


def sum_of_two(x: Array, y: Array) -> tuple[Array, Array]:
    """`x + y` rounded to one bit less than x has, and what that took from it, for |x| >= |y|.

    Without the bit less, a compiler would take (y + 2) - 2 for y.
    """
    info = jnp.finfo(y.dtype)
    s = lax.reduce_precision(x + y, info.nexp, info.nmant - 1)
    return s, y - (s - x)


def quotient_near_1(x: Array, y: Array) -> tuple[Array, Array]:
    """`x / y` and what rounding took from it, for numbers near 1."""
    q = x / y
    p, lost = product(q, y)
    return q, ((x - p) - lost) / y


def careful_ratio(r: Array, delta: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
    """t = min(|r|, delta) / max(|r|, delta), t**2 and 1 + t**2, and what rounding took from each.

    What was taken is relative to the number. For formulas that take high powers of them, which
    would multiply it.
    """
    a, delta = finite(jnp.abs(r)), finite(delta)
    t, lost_t = quotient(jnp.minimum(a, delta), jnp.maximum(a, delta))
    t = jnp.where(jnp.isinf(r), 0, t)
    t2, lost_t2 = product(t, t)
    lost_t2 = lost_t2 + 2 * t * lost_t
    q = 1 + t2
    lost_q = ((1 - q) + t2) + lost_t2
    tiny = jnp.finfo(t.dtype).tiny / jnp.finfo(t.dtype).eps  # below it t**3 is 0
    return t, t2, q, lost_t / jnp.maximum(t, tiny), lost_t2 / jnp.maximum(t2, tiny), lost_q / q


# Exponents.


def frexp(x: Array) -> tuple[Array, Array]:
    """`m, e` with x = m 2**e, as NumPy's: m in [1/2, 1), or smaller if x is subnormal."""
    unit, exponent = _unit(x)
    return 0.25 * (x * unit), jnp.where(x == 0, 0, exponent)


def ldexp(x: Array, n: Array) -> Array:
    """`x 2**n` for any integers n, rounded once."""
    info = jnp.finfo(x.dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    n = jnp.clip(n, 2 * info.minexp, 2 * info.maxexp - 2).astype(integer)

    def power(n: Array) -> Array:
        return lax.bitcast_convert_type((n + (info.maxexp - 1)) << info.nmant, x.dtype)

    return x * power(n >> 1) * power(n - (n >> 1))


def _unit(x: Array) -> tuple[Array, Array]:
    """The power of 2 that takes a finite |x| > 0 to [2, 4), and the exponent of what is left."""
    info = jnp.finfo(x.dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    lowest, exponents = 1 << info.nmant, (2 * info.maxexp - 1) << info.nmant
    bits = jnp.maximum(lax.bitcast_convert_type(x, integer) & exponents, lowest)
    exponent = (bits >> info.nmant).astype(jnp.int32) - (info.maxexp - 2)
    return lax.bitcast_convert_type(exponents - bits, x.dtype), exponent


@jax.custom_jvp
def multiply(*factors: Array) -> Array:
    """The product of the factors, of which only the result over- or underflows.

    (A chain of divisions is no such thing: XLA takes x / y / z for x / (y z).)
    """
    return multiply_exactly(factors)


def multiply_exactly(factors: Sequence[Array], exponent: ArrayLike = 0) -> Array:
    """`multiply`, and the result times `2**exponent`; to be differentiated by a rule alone."""
    infinite = reduce(operator.or_, (jnp.isinf(x) for x in factors))
    mantissas, exponents = zip(*(frexp(finite(x)) for x in factors), strict=True)
    product = ldexp(reduce(operator.mul, mantissas), reduce(operator.add, exponents) + exponent)
    return jnp.where(infinite, reduce(operator.mul, factors), product)


def _multiply_rule(factors: Sequence[Array], tangents: Sequence[Any]) -> tuple[Array, Array]:
    out = multiply(*factors)
    change = jnp.zeros_like(out)
    for k, t in enumerate(tangents):
        if not isinstance(t, SymbolicZero):
            others = [x for i, x in enumerate(factors) if i != k]
            change = change + (multiply(*others) if others else 1) * t
    return out, change


multiply.defjvp(_multiply_rule, symbolic_zeros=True)


def clamped(x: Array, limit: float) -> Array:
    """`x` within +-limit; NaN stays NaN, which a minimum may lose."""
    return jnp.where(jnp.abs(x) > limit, jnp.copysign(jnp.full_like(x, limit), x), x)


def finite(x: Array) -> Array:
    """`x` with the largest number in the place of infinity; NaN stays NaN."""
    return clamped(x, float(jnp.finfo(x.dtype).max))
