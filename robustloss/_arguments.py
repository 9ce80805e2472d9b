"""Checks and conversions of arguments.

An argument becomes a real array of a known type and shape, or an error that says why it cannot. A
parameter outside its range is a ValueError if its numbers can be read, and NaN if they are traced.
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
    """`x` as a JAX array of real numbers, or a TypeError that names its type."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        dtype = np.asarray(x).dtype
    given = type(x).__name__ if x is None else f"dtype {dtype}"
    if not isinstance(dtype, np.dtype) and not isinstance(x, jax.Array) and hasattr(x, "__array__"):
        x = np.asarray(x)  # a data frame's own type, such as Int64 of pandas
        dtype = x.dtype
    kinds = (np.floating, np.signedinteger, np.unsignedinteger, np.bool_)
    real = any(jnp.issubdtype(dtype, kind) for kind in kinds)
    if not real or jnp.issubdtype(dtype, np.timedelta64):  # which NumPy calls a signed integer
        if dtype == np.object_ and x is not None:
            given += (
                " (of NumPy: missing values, text or numbers of several kinds); convert it to "
                "floats first, such as a data frame's column by .to_numpy(dtype=float)"
            )
        raise TypeError(f"{name} must be real numbers, got {given}")
    if not isinstance(x, jax.Array) and jnp.issubdtype(dtype, np.integer):
        # An integer outside the range of JAX's integers would be taken modulo 2**32.
        host, limits = np.asarray(x), jnp.iinfo(jnp.result_type(int))
        if host.size and not (limits.min <= host.min() and host.max() <= limits.max):
            return jnp.asarray(host.astype(float))
    return jnp.asarray(x)


def residual(predictions: ArrayLike, targets: ArrayLike | None = None) -> tuple[Array, jnp.dtype]:
    """`predictions - targets` in at least float32, and the dtype of a result made from it.

    The wide type keeps a 16-bit difference from overflowing and from being rounded twice.
    """
    p = real_array("predictions", predictions)
    if targets is None:
        dtype = _floating_dtype(p)
        return p.astype(at_least_float32(dtype)), dtype
    t = real_array("targets", targets)
    if p.shape != t.shape:
        raise ValueError(
            f"predictions and targets must have equal shapes, got {p.shape} and {t.shape}"
        )
    dtype = _floating_dtype(p, t)
    wide = at_least_float32(dtype)
    return p.astype(wide) - t.astype(wide), dtype


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The type to compute and to sum in: float32 for a 16-bit type, else the type itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def _floating_dtype(*arrays: Array) -> jnp.dtype:
    """The dtype that JAX promotes to, or its default floating type if that is an integer."""
    dtype = jnp.result_type(*arrays)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)


def readable(x: ArrayLike) -> np.ndarray | None:
    """The numbers in `x`, or None where it is traced or on another machine."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to the target shape."""
    if len(shape) > len(target):
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(target), strict=False))


# Functions and their parameters.


def check_loss(loss: Any) -> None:
    """A TypeError for a loss that is not a function, such as its name or its result."""
    if not callable(loss):
        raise TypeError(f"loss must be a function such as rl.huber, got {type(loss).__name__}")


def with_leaves(function: Callable[..., Any], *leaves: type) -> Partial:
    """A function as a pytree, whose leaves are the keywords that a `functools.partial` fixes.

    Only keywords of the types `leaves` (by default numbers) become leaves, so that another value
    does not compile the program again. Everything else is static.
    """
    if not isinstance(function, partial):
        return Partial(function)
    kinds = leaves or (jax.Array, np.ndarray, float)
    values = {k: v for k, v in function.keywords.items() if isinstance(v, kinds)}
    static = {k: v for k, v in function.keywords.items() if k not in values}
    fixed = function.args or static
    return Partial(
        partial(function.func, *function.args, **static) if fixed else function.func, **values
    )


def positive(name: str, x: ArrayLike) -> Array:
    """A parameter that must be > 0: a ValueError if it can be read, NaN if it is traced.

    XLA on a CPU reads subnormal numbers as 0. So a subnormal parameter is refused too, and so is
    one of which a quarter is subnormal, because some losses compute with a quarter of delta.
    """
    array = constrained(name, "must be > 0", lambda x: x > 0, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    wide = at_least_float32(array.dtype)
    least = 4 * float(jnp.finfo(wide).tiny)
    law = f"must be at least {least:.3g}, as next to nothing counts as 0 in {wide}"
    return constrained(name, law, lambda x: x >= least, array if readable(x) is None else x)


def between(name: str, x: ArrayLike, low: float, high: float) -> Array:
    """A parameter in the closed interval [low, high], checked like `positive`."""
    law = f"must be in [{low}, {high}]"
    return constrained(name, law, lambda x: (x >= low) & (x <= high), x)


def constrained(
    name: str, law: str, holds: Callable[..., Any], x: ArrayLike, *others: ArrayLike
) -> Array:
    """A parameter for which `holds(x, *others)`, checked like `positive`.

    The error is `name law, got ...`, with the first number for which the law does not hold.
    """
    array = real_array(name, x)
    values = [readable(y) for y in (x, *others)]
    if any(y is None for y in values):
        # A factor, and not a choice between the array and NaN, so that the gradient is NaN too.
        allowed = holds(array, *(real_array(name, y) for y in others))
        return array * jnp.where(allowed, 1.0, jnp.nan)
    allowed = holds(*values)
    if not np.all(allowed):
        wrong = np.broadcast_to(np.asarray(values[0]), np.shape(allowed))[~np.asarray(allowed)]
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
    """`weights` broadcast to this shape, 0 where dropped.

    A weight that is kept must be finite, and 0 or at least the smallest normal number, because XLA
    on a CPU reads a subnormal number as 0. Another weight is a ValueError if it can be read, and
    NaN if it is traced.
    """
    with np.errstate(over="ignore"):  # the error below reports an overflow
        w = broadcast("weights", real_array("weights", weights), shape)
    values = _valid_weights(weights, shape, where)
    if jnp.issubdtype(w.dtype, jnp.floating):
        info = jnp.finfo(w.dtype)
        if values is None:
            # Compared as integers of the same order, since a comparison reads subnormals as 0.
            smallest = jnp.asarray(info.tiny, w.dtype)
            bits = lax.bitcast_convert_type(jnp.abs(w), f"uint{info.bits}")
            subnormal = (bits > 0) & (bits < lax.bitcast_convert_type(smallest, bits.dtype))
            w = jnp.where((w >= 0) & (w < jnp.inf) & ~subnormal, w, jnp.nan)
        elif (wrong := values[_unrepresentable(values, w.dtype)]).size:
            raise ValueError(
                f"weights must be 0 or in [{float(info.tiny):.4g}, {float(info.max):.4g}], the "
                f"numbers of {w.dtype}, got {wrong[0]}"
            )
    elif values is None and jnp.issubdtype(w.dtype, jnp.signedinteger):
        w = jnp.where(w >= 0, w.astype(float), jnp.nan)
    return w if where is None else jnp.where(mask(where, shape), w, 0)


def ratios(
    weights: ArrayLike, shape: tuple[int, ...], where: ArrayLike | None, axes: tuple[int, ...]
) -> tuple[Array, jnp.dtype]:
    """Weights of which only the ratios along the axes count, and the dtype of `weights`.

    They are broadcast to this shape, 0 where dropped, and meant for `relative`. Errors are those of
    `nonnegative`, but every finite magnitude is allowed: numbers that JAX's type cannot represent,
    such as NumPy's 1e-50 in float32, are first multiplied by a power of 2.
    """
    values = readable(weights)
    if values is not None and values.dtype == np.float64:
        weights = _representable_ratios(values, shape, where, axes)
    array = real_array("weights", weights)
    w = broadcast("weights", array, shape)
    _valid_weights(weights, shape, where)
    w = w if where is None else jnp.where(mask(where, shape), w, 0)
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    wide = at_least_float32(array.dtype if floating else jnp.result_type(float))
    return w.astype(wide), array.dtype


def _representable_ratios(
    w: np.ndarray, shape: tuple[int, ...], where: ArrayLike | None, axes: tuple[int, ...]
) -> np.ndarray:
    """Weights with the same ratios along the axes, that JAX's floating type can represent.

    They are the weights themselves if it can represent these, or if the shapes do not fit.
    """
    keep = None if where is None else readable(where)
    shapes_fit = all(broadcasts(x.shape, shape) for x in (w, keep) if x is not None)
    if not (shapes_fit and np.any(_unrepresentable(w, jnp.result_type(float)))):
        return w
    w = np.broadcast_to(w, shape)
    scalable = np.broadcast_to(True if keep is None else keep, shape) & (w >= 0) & (w < np.inf)
    _, exponent = np.frexp(np.max(w, axes, keepdims=True, initial=0, where=scalable))
    return np.ldexp(w, -exponent, where=scalable, out=w.copy())


def _valid_weights(
    weights: ArrayLike, shape: tuple[int, ...], where: ArrayLike | None
) -> np.ndarray | None:
    """The weights kept, as one axis, all finite and >= 0; None if they cannot be read."""
    values, keep = readable(weights), True if where is None else readable(where)
    if values is None or keep is None:
        return None
    kept = np.broadcast_to(values, shape)[np.broadcast_to(keep, shape)]
    for law, holds in ((">= 0", kept >= 0), ("finite", kept < np.inf)):
        if not np.all(holds):
            raise ValueError(f"weights must be {law}, got {kept[~holds][0]}")
    return kept


def _unrepresentable(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Whether each value would become 0 or infinite in this type."""
    info = jnp.finfo(dtype)
    return (values > 0) & ((values < float(info.tiny)) | (values > float(info.max)))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def relative(w: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """`w unit` and the unit, a power of 2 that brings the largest w along the axes to [1, 4).

    The first has w's shape, with NaN for a w that is negative or not finite; the unit has length 1
    along the axes. XLA on a CPU reads subnormal numbers as 0, so they are made from their bits.
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
    lowest = 1 << info.nmant  # the bits of the smallest normal number
    fraction = (bits & (lowest - 1)).astype(w.dtype) * (1 / lowest)
    subnormal = fraction * power_of_2(jnp.maximum(2 - top - exponent, 2 - top))
    valid = ((bits >= 0) & (bits < (2 * top - 1) << info.nmant)) | (bits == minus_0)
    scaled = jnp.where(jnp.abs(bits) < lowest, subnormal, w * unit)
    return jnp.where(valid, scaled, jnp.nan), unit


@relative.defjvp
def _relative_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> Any:
    scaled, unit = relative(*primals, axes)
    return (scaled, unit), (tangents[0] * unit, jnp.zeros_like(unit))


def axes_of(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes to reduce, as numbers from 0 to ndim - 1."""
    if axis is None:
        return tuple(range(ndim))
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of bounds for an array of {ndim} dimensions")
    return tuple(a % ndim for a in axes)


def broadcast(name: str, x: Array, shape: tuple[int, ...]) -> Array:
    """`x` broadcast to the residual's shape, or a ValueError that says why it cannot be."""
    try:
        return jnp.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to the residual's shape {shape}, got shape {x.shape}"
        ) from None
