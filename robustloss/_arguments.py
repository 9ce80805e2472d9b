"""How arguments arrive: as real arrays of known types and shapes, or as an error that says why not.

A parameter that breaks its law is a ValueError where its numbers can be read and NaN where they
are traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial
from jax.typing import ArrayLike, DTypeLike

Axis = int | Sequence[int] | None


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


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The type to compute and to sum in: 16-bit types widen to float32."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def _inexact(*arrays: Array) -> jnp.dtype:
    dtype = jnp.result_type(*arrays)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)


def readable(x: ArrayLike) -> np.ndarray | None:
    """The numbers in `x`, or None where only a computation will know them."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    if len(shape) > len(to):
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


# Functions and their parameters.


def check_loss(loss: Any) -> None:
    """Refuses what is no function, such as a loss's name or its result."""
    if not callable(loss):
        raise TypeError(f"loss must be a function such as rl.huber, got {type(loss).__name__}")


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


# Masks, weights and axes.


def mask(where: ArrayLike, shape: tuple[int, ...]) -> Array:
    """`where` as booleans of this shape."""
    keep = real_array("where", where)
    if keep.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean, got dtype {keep.dtype}")
    return broadcast("where", keep, shape)


def nonnegative(
    weights: ArrayLike, shape: tuple[int, ...], where: ArrayLike | None = None
) -> Array:
    """`weights` of this shape, 0 where dropped.

    Those that are kept must be finite, >= 0, and 0 or no less than the smallest normal number,
    since XLA on a CPU takes what is below it for 0. Others are a ValueError where they can be
    read, and NaN where they are traced.
    """
    with np.errstate(over="ignore"):  # it is told below
        w = broadcast("weights", real_array("weights", weights), shape)
    given = _checked(weights, shape, where)
    if jnp.issubdtype(w.dtype, jnp.floating):
        info = jnp.finfo(w.dtype)
        if given is None:
            low = jnp.asarray(info.tiny, w.dtype)
            size = lax.bitcast_convert_type(jnp.abs(w), f"uint{info.bits}")
            small = (size > 0) & (size < lax.bitcast_convert_type(low, size.dtype))
            w = jnp.where((w >= 0) & (w < jnp.inf) & ~small, w, jnp.nan)
        elif (lost := given[_lost(given, w.dtype)]).size:
            raise ValueError(
                f"weights must be 0 or in [{float(info.tiny):.4g}, {float(info.max):.4g}], the "
                f"numbers of {w.dtype}, got {lost[0]}"
            )
    elif given is None and jnp.issubdtype(w.dtype, jnp.signedinteger):
        w = jnp.where(w >= 0, w.astype(float), jnp.nan)
    return w if where is None else jnp.where(mask(where, shape), w, 0)


def ratios(
    weights: ArrayLike, shape: tuple[int, ...], where: ArrayLike | None, axes: tuple[int, ...]
) -> tuple[Array, jnp.dtype]:
    """`weights` of this shape, 0 where dropped, for `relative` along the axes; and their dtype.

    Errors are those of `nonnegative`, but every finite magnitude will do: numbers that JAX's
    type cannot hold, such as NumPy's 1e-50 in float32, are multiplied by a power of 2 here.
    """
    given = readable(weights)
    if given is not None and given.dtype == np.float64:
        weights = _scaled(given, shape, where, axes)
    array = real_array("weights", weights)
    w = broadcast("weights", array, shape)
    _checked(weights, shape, where)
    w = w if where is None else jnp.where(mask(where, shape), w, 0)
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    wide = at_least_float32(array.dtype if floating else jnp.result_type(float))
    return w.astype(wide), array.dtype


def _scaled(
    w: np.ndarray, shape: tuple[int, ...], where: ArrayLike | None, axes: tuple[int, ...]
) -> np.ndarray:
    """The same ratios along the axes, where the type that JAX will take cannot hold them."""
    known = None if where is None else readable(where)
    fit = all(broadcasts(x.shape, shape) for x in (w, known) if x is not None)
    if not (fit and np.any(_lost(w, jnp.result_type(float)))):
        return w
    w = np.broadcast_to(w, shape)
    kept = np.broadcast_to(True if known is None else known, shape) & (w >= 0) & (w < np.inf)
    _, exponent = np.frexp(np.max(w, axes, keepdims=True, initial=0, where=kept))
    return np.ldexp(w, -exponent, where=kept, out=w.copy())


def _checked(
    weights: ArrayLike, shape: tuple[int, ...], where: ArrayLike | None
) -> np.ndarray | None:
    """The weights that are kept, all finite and >= 0; None where they cannot be read."""
    given, kept = readable(weights), True if where is None else readable(where)
    if given is None or kept is None:
        return None
    given = np.broadcast_to(given, shape)[np.broadcast_to(kept, shape)]
    for law, holds in ((">= 0", given >= 0), ("finite", given < np.inf)):
        if not np.all(holds):
            raise ValueError(f"weights must be {law}, got {given[~holds][0]}")
    return given


def _lost(given: np.ndarray, dtype: Any) -> np.ndarray:
    """Which of these would become 0 or infinite."""
    info = jnp.finfo(dtype)
    return (given > 0) & ((given < float(info.tiny)) | (given > float(info.max)))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def relative(w: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """`w unit` and the unit, a power of 2 that takes the largest w along the axes to [1, 4).

    A w that is negative or not finite is NaN. Subnormal numbers, which XLA on a CPU reads as 0,
    are read from their bits.
    """
    info = jnp.finfo(w.dtype)
    bits = lax.bitcast_convert_type(w, jnp.int32 if info.bits == 32 else jnp.int64)
    minus_0 = jnp.iinfo(bits.dtype).min
    top, bias = info.maxexp, info.maxexp - 1

    def power_of_2(exponent: Array) -> Array:
        return lax.bitcast_convert_type((exponent + bias) << info.nmant, w.dtype)

    largest = jnp.max(bits, axes, keepdims=True, initial=0)
    exponent = jnp.clip(largest >> info.nmant, 1, 2 * top - 3) - bias
    exponent = jnp.where(largest == 0, 0, exponent)
    unit = power_of_2(-exponent)
    lowest = 1 << info.nmant  # of the normal numbers
    fraction = (bits & (lowest - 1)).astype(w.dtype) * (1 / lowest)
    subnormal = fraction * power_of_2(jnp.maximum(2 - top - exponent, 2 - top))
    valid = ((bits >= 0) & (bits < (2 * top - 1) << info.nmant)) | (bits == minus_0)
    near = jnp.where(jnp.abs(bits) < lowest, subnormal, w * unit)
    return jnp.where(valid, near, jnp.nan), unit


@relative.defjvp
def _relative_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> Any:
    near, unit = relative(*primals, axes)
    return (near, unit), (tangents[0] * unit, jnp.zeros_like(unit))


def axes_of(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes to reduce, counted from 0."""
    if axis is None:
        return tuple(range(ndim))
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for each in axes:
        if not -ndim <= each < ndim:
            raise ValueError(f"axis {each} is out of bounds for an array of {ndim} dimensions")
    return tuple(each % ndim for each in axes)


def broadcast(name: str, x: Array, shape: tuple[int, ...]) -> Array:
    try:
        return jnp.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to the residual's shape {shape}, got shape {x.shape}"
        ) from None
