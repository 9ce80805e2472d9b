"""Arithmetic with known rounding errors: double words, and numbers with a separate exponent.

A double word is a result x and its rounding error, so that x + error is exact or nearly so. A
compiler may fuse a product into a sum and so skip the rounding of the product. Here every product
in a sum has factors of half the digits, so that it is exact with and without fusion.
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
    """`x * y`, rounded to one bit less than the type has, and its rounding error."""
    info = jnp.finfo(x.dtype)
    p = lax.reduce_precision(x * y, info.nexp, info.nmant - 1)
    return p, -_minus_product(p, x, y)


def quotient(x: Array, y: Array) -> tuple[Array, Array]:
    """`x / y` and its rounding error, for finite x and y > 0."""
    unit, _ = _unit_and_exponent(y)  # with which no product under- or overflows
    x, y = x * unit, y * unit
    q = x / y
    return q, _minus_product(x, q, y) / y


def _minus_product(z: Array, x: Array, y: Array) -> Array:
    """`z - x y` without rounding error, for a z next to the product."""
    info = jnp.finfo(x.dtype)

    def halves(x: Array) -> tuple[Array, Array]:
        high = lax.reduce_precision(x, info.nexp, (info.nmant - 1) // 2)
        return high, x - high

    (x1, x0), (y1, y0) = halves(x), halves(y)
    return ((z - x1 * y1) - x1 * y0 - x0 * y1) - x0 * y0


def sum_of_two(x: Array, y: Array) -> tuple[Array, Array]:
    """`x + y`, rounded to one bit less than the type has, and its rounding error, for |x| >= |y|.

    Without the explicit rounding, a compiler would simplify (y + 2) - 2 to y.
    """
    info = jnp.finfo(y.dtype)
    s = lax.reduce_precision(x + y, info.nexp, info.nmant - 1)
    return s, y - (s - x)


def quotient_near_1(x: Array, y: Array) -> tuple[Array, Array]:
    """`x / y` and its rounding error, for numbers near 1."""
    q = x / y
    p, error = product(q, y)
    return q, ((x - p) - error) / y


def ratio_with_errors(r: Array, delta: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
    """t = min(|r|, delta) / max(|r|, delta), t**2 and 1 + t**2, and their relative rounding errors.

    A formula with a high power of one of these numbers multiplies its error, and so corrects it.
    """
    a, delta = clamped_to_finite(jnp.abs(r)), clamped_to_finite(delta)
    t, t_error = quotient(jnp.minimum(a, delta), jnp.maximum(a, delta))
    t = jnp.where(jnp.isinf(r), 0, t)
    t2, t2_error = product(t, t)
    t2_error = t2_error + 2 * t * t_error
    q = 1 + t2
    q_error = ((1 - q) + t2) + t2_error
    tiny = jnp.finfo(t.dtype).tiny / jnp.finfo(t.dtype).eps  # t**3 is 0 for a smaller t
    return t, t2, q, t_error / jnp.maximum(t, tiny), t2_error / jnp.maximum(t2, tiny), q_error / q


# Exponents.


def frexp(x: Array) -> tuple[Array, Array]:
    """`m, e` with x = m 2**e, as NumPy's: m in [1/2, 1), or smaller if x is subnormal."""
    unit, exponent = _unit_and_exponent(x)
    return 0.25 * (x * unit), jnp.where(x == 0, 0, exponent)


def ldexp(x: Array, n: Array) -> Array:
    """`x 2**n` for any integers n, rounded once."""
    info = jnp.finfo(x.dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    n = jnp.clip(n, 2 * info.minexp, 2 * info.maxexp - 2).astype(integer)

    def power(n: Array) -> Array:
        return lax.bitcast_convert_type((n + (info.maxexp - 1)) << info.nmant, x.dtype)

    return x * power(n >> 1) * power(n - (n >> 1))


def _unit_and_exponent(x: Array) -> tuple[Array, Array]:
    """A power of 2 with `|x| unit` in [2, 4), and the e of `frexp`, for a finite |x| > 0."""
    info = jnp.finfo(x.dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    lowest, exponents = 1 << info.nmant, (2 * info.maxexp - 1) << info.nmant
    bits = jnp.maximum(lax.bitcast_convert_type(x, integer) & exponents, lowest)
    exponent = (bits >> info.nmant).astype(jnp.int32) - (info.maxexp - 2)
    return lax.bitcast_convert_type(exponents - bits, x.dtype), exponent


@jax.custom_jvp
def multiply(*factors: Array) -> Array:
    """The product of the factors, without over- or underflow before the result.

    (A chain of divisions does not have this property: XLA replaces x / y / z by x / (y z).)
    """
    return multiply_scaled(factors)


def multiply_scaled(factors: Sequence[Array], exponent: ArrayLike = 0) -> Array:
    """`multiply`, times `2**exponent`; it may only be differentiated by the rule of a caller."""
    infinite = reduce(operator.or_, (jnp.isinf(x) for x in factors))
    mantissas, exponents = zip(*(frexp(clamped_to_finite(x)) for x in factors), strict=True)
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
    """`x` clamped to [-limit, limit]; NaN stays NaN, as it may not in XLA's minimum."""
    return jnp.where(jnp.abs(x) > limit, jnp.copysign(jnp.full_like(x, limit), x), x)


def clamped_to_finite(x: Array) -> Array:
    """`x` with the largest number in the place of infinity; NaN stays NaN."""
    return clamped(x, float(jnp.finfo(x.dtype).max))
