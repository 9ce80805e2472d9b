"""How arguments arrive at a loss, and how derivatives leave it.

A loss is a documented public function over a private *kernel* of floating arrays
`(residual, *parameters)`. The kernel carries the derivative rule; `elementwise` does
what is the same for every loss: check, promote, subtract, round once.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.tree_util import Partial
from jax.typing import ArrayLike, DTypeLike

Kernel = Callable[..., Array]


def elementwise(
    kernel: Kernel, predictions: ArrayLike, targets: ArrayLike | None, *parameters: Array
) -> Array:
    """`kernel(predictions - targets, *parameters)`, in the dtype that JAX promotes to."""
    r, dtype = residual(predictions, targets)
    for parameter in parameters:
        if not _broadcasts(parameter.shape, r.shape):
            raise ValueError(
                f"a parameter must broadcast to the residual's shape {r.shape}, "
                f"got shape {parameter.shape}"
            )
    dtype = jnp.result_type(dtype, *parameters)
    wide = at_least_float32(dtype)
    for parameter in parameters:
        given = readable(parameter) if parameter.dtype.itemsize > wide.itemsize else None
        if given is not None and np.any((given != 0) & (np.abs(given) < jnp.finfo(wide).tiny)):
            smallest = np.abs(given)[given != 0].min()
            raise ValueError(
                f"a parameter of {smallest} counts as 0 in {wide}, the residual's type"
            )
    return kernel(r.astype(wide), *(p.astype(wide) for p in parameters)).astype(dtype)


def residual(predictions: ArrayLike, targets: ArrayLike | None = None) -> tuple[Array, jnp.dtype]:
    """`predictions - targets` in at least float32, and the dtype of a result made from it.

    The wide type keeps a 16-bit difference from overflowing and from being rounded twice.
    """
    p = real_array("predictions", predictions)
    if targets is None:
        dtype = _inexact(p)
        return p.astype(at_least_float32(dtype)), dtype
    t = real_array("targets", targets)
    if p.shape != t.shape:
        raise ValueError(
            f"predictions and targets must have equal shapes, got {p.shape} and {t.shape}"
        )
    dtype = _inexact(p, t)
    wide = at_least_float32(dtype)
    return p.astype(wide) - t.astype(wide), dtype


def real_array(name: str, x: ArrayLike) -> Array:
    """`x` as a JAX array of real numbers, or a TypeError that says what it is instead."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        dtype = np.asarray(x).dtype
    given = type(x).__name__ if x is None else f"dtype {dtype}"
    if not isinstance(dtype, np.dtype) and not isinstance(x, jax.Array) and hasattr(x, "__array__"):
        x = np.asarray(x)  # of a data frame's own type, such as Int64 of pandas
        dtype = x.dtype
    kinds = (np.floating, np.signedinteger, np.unsignedinteger, np.bool_)
    real = any(jnp.issubdtype(dtype, kind) for kind in kinds)
    if not real or jnp.issubdtype(dtype, np.timedelta64):  # a signed integer to NumPy
        if dtype == np.object_ and x is not None:
            given += (
                " (of NumPy: missing values, text or numbers of several kinds); convert it to "
                "floats first, such as a data frame's column by .to_numpy(dtype=float)"
            )
        raise TypeError(f"{name} must be real numbers, got {given}")
    if not isinstance(x, jax.Array) and jnp.issubdtype(dtype, np.integer):
        # An integer that JAX's own cannot hold would wrap round.
        host, held = np.asarray(x), jnp.iinfo(jnp.result_type(int))
        if host.size and not (held.min <= host.min() and host.max() <= held.max):
            return jnp.asarray(host.astype(float))
    return jnp.asarray(x)


def check_loss(loss: Any) -> None:
    """Refuses what is no function, such as a loss's name or its result."""
    if not callable(loss):
        raise TypeError(f"loss must be a function such as rl.huber, got {type(loss).__name__}")


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The type to compute and to sum in: 16-bit types widen to float32."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def positive(name: str, x: ArrayLike) -> Array:
    """A parameter that must be > 0: ValueError where it can be read, NaN where it is traced.

    XLA on a CPU reads subnormal numbers as 0. So these are refused, too, and numbers of which a
    quarter, which some losses count in, would be subnormal.
    """
    array = constrained(name, "must be > 0", lambda x: x > 0, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    wide = at_least_float32(array.dtype)
    least = 4 * float(jnp.finfo(wide).tiny)
    law = f"must be at least {least:.3g}, as next to nothing counts as 0 in {wide}"
    return constrained(name, law, lambda x: x >= least, array if readable(x) is None else x)


def between(name: str, x: ArrayLike, low: float, high: float) -> Array:
    """A parameter of the closed interval [low, high], checked like `positive`."""
    law = f"must be in [{low}, {high}]"
    return constrained(name, law, lambda x: (x >= low) & (x <= high), x)


def constrained(
    name: str, law: str, holds: Callable[..., Any], x: ArrayLike, *others: ArrayLike
) -> Array:
    """A parameter for which `holds(x, *others)`, checked like `positive`."""
    array = real_array(name, x)
    given = [readable(y) for y in (x, *others)]
    if any(y is None for y in given):
        # A factor, not a choice between array and NaN, so that the gradient is NaN too.
        kept = holds(array, *(real_array(name, y) for y in others))
        return array * jnp.where(kept, 1.0, jnp.nan)
    allowed = holds(*given)
    if not np.all(allowed):
        wrong = np.broadcast_to(np.asarray(given[0]), np.shape(allowed))[~np.asarray(allowed)]
        raise ValueError(f"{name} {law}, got {wrong.ravel()[0]}")
    return array


def readable(x: ArrayLike) -> np.ndarray | None:
    """The numbers in `x`, or None where only a computation will know them."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    if len(shape) > len(to):
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def with_partials(*partials: Kernel) -> Callable[[Kernel], Kernel]:
    """Gives a kernel its partial derivatives, one formula per argument, in order.

    Write each as a lambda around a named kernel, `lambda r, d: _slope(r, d)`: the value can
    then stand above its slope, and higher orders follow the rules of the kernels named.
    """

    def decorate(value: Kernel) -> Kernel:
        arguments = len(inspect.signature(value).parameters)
        if len(partials) != arguments:
            raise TypeError(
                f"{value.__name__} takes {arguments} arguments but has {len(partials)} partials"
            )
        kernel = jax.custom_jvp(value)

        def rule(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
            out = kernel(*primals)
            # A symbolic zero is skipped, not multiplied: at r = inf, 0 * inf would be NaN.
            terms = [
                slope(*primals) * t
                for slope, t in zip(partials, tangents, strict=True)
                if not isinstance(t, SymbolicZero)
            ]
            return out, reduce(operator.add, terms) if terms else jnp.zeros_like(out)

        kernel.defjvp(rule, symbolic_zeros=True)
        return whole(kernel)

    return decorate


def partials_of(formula: Kernel, arguments: int) -> list[Kernel]:
    """The partial derivatives of a formula, for a kernel that says the same with more care."""

    def partial_of(i: int) -> Kernel:
        def slope(*x: Array) -> Array:
            def along(y: Array) -> Array:
                return formula(*x[:i], y, *x[i + 1 :])

            return jax.jvp(along, (x[i],), (jnp.ones_like(x[i]),))[1]

        return slope

    return [partial_of(i) for i in range(arguments)]


def whole(kernel: Kernel) -> Kernel:
    """The same kernel, compiled once where it is called eagerly, not once per operation."""
    return jax.jit(kernel, inline=True)


def with_leaves(function: Callable[..., Any], *leaves: type) -> Partial:
    """A function as a pytree: what a `functools.partial` fixes by keyword are its leaves.

    Only where it is of these types, by default numbers; everything else is part of the
    program. So another value does not compile again.
    """
    if not isinstance(function, partial):
        return Partial(function)
    kinds = leaves or (jax.Array, np.ndarray, float)
    values = {k: v for k, v in function.keywords.items() if isinstance(v, kinds)}
    rest = {k: v for k, v in function.keywords.items() if k not in values}
    fixed = function.args or rest
    return Partial(
        partial(function.func, *function.args, **rest) if fixed else function.func, **values
    )


# A compiler may fuse a product into a sum and so skip its rounding. Below, every product in a
# sum is one of half significands, which is exact either way.


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


def frexp(x: Array) -> tuple[Array, Array]:
    """`m, e` with x = m 2**e, as NumPy's: m in [1/2, 1), or smaller if x is subnormal."""
    unit, exponent = _unit(x)
    return 0.25 * (x * unit), jnp.where(x == 0, 0, exponent)


def _unit(x: Array) -> tuple[Array, Array]:
    """The power of 2 that takes a finite |x| > 0 to [2, 4), and the exponent of what is left."""
    info = jnp.finfo(x.dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    lowest, exponents = 1 << info.nmant, (2 * info.maxexp - 1) << info.nmant
    bits = jnp.maximum(lax.bitcast_convert_type(x, integer) & exponents, lowest)
    exponent = (bits >> info.nmant).astype(jnp.int32) - (info.maxexp - 2)
    return lax.bitcast_convert_type(exponents - bits, x.dtype), exponent


def _minus_product(z: Array, x: Array, y: Array) -> Array:
    """`z - x y` for a z that is next to it."""
    info = jnp.finfo(x.dtype)

    def halves(x: Array) -> tuple[Array, Array]:
        high = lax.reduce_precision(x, info.nexp, (info.nmant - 1) // 2)
        return high, x - high

    (x1, x0), (y1, y0) = halves(x), halves(y)
    return ((z - x1 * y1) - x1 * y0 - x0 * y1) - x0 * y0


def _inexact(*arrays: Array) -> jnp.dtype:
    dtype = jnp.result_type(*arrays)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
