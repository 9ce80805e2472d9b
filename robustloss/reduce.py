"""From the losses of residuals to one number: masked, weighted, safe from NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from robustloss.losses._elementwise import (
    at_least_float32,
    check_loss,
    readable,
    real_array,
    residual,
)
from robustloss.losses.convex import absolute_error, squared_error

__all__ = ["mae", "mean", "mse", "total"]

Loss = Callable[..., Array]
Axis = int | Sequence[int] | None


def mean(
    loss: Loss,
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> Array:
    """The mean loss over the entries kept: `sum(w rho(r)) / sum(w)`.

    What `where` drops may hold anything, NaN and infinity included: value and gradient are
    those of the kept entries alone, because the residual is masked before the loss sees it.
    A weight of 0 is not a mask: a NaN under it still shows. Nothing kept, or nothing but
    weights of 0, gives 0 with a zero gradient. 16-bit types are summed in float32.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`; other parameters
            with `functools.partial(rl.huber, delta=1.345)`.
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        where: booleans that broadcast to the residual; True keeps an entry.
        weights: numbers >= 0 that broadcast to the residual.
        axis: the axis or axes to reduce; None reduces all.

    Returns:
        A scalar, or an array of the axes that are left, in the dtype of the residual.

    Raises:
        ValueError: shapes that do not fit, negative or NaN weights.
        TypeError: complex or non-numeric input, a `where` that is not boolean.

    >>> y, nan = jnp.array([1.0, 2.0, 3.0]), float("nan")
    >>> mean(rl.huber, jnp.array([1.0, 2.5, nan]), y, where=jnp.array([True, True, False]))
    Array(0.0625, dtype=float32)
    """
    losses, w, dtype = _kept(loss, predictions, targets, where, weights)
    if w is None:
        summed = jnp.sum(losses, axis)
        return (summed / max(losses.size // max(summed.size, 1), 1)).astype(dtype)
    size = jnp.sum(w, axis)
    return (jnp.sum(losses * w, axis) / jnp.where(size > 0, size, 1)).astype(dtype)


def total(
    loss: Loss,
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> Array:
    """The total loss over the entries kept: `sum(w rho(r))`.

    Arguments, masks, weights and errors are those of `mean`. Nothing kept gives 0.

    >>> total(rl.huber, jnp.array([1.0, -3.0]), weights=jnp.array([1.0, 2.0]))
    Array(5.5, dtype=float32)
    """
    losses, w, dtype = _kept(loss, predictions, targets, where, weights)
    return jnp.sum(losses if w is None else losses * w, axis).astype(dtype)


def mae(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> Array:
    """The mean absolute error: `mean(absolute_error, ...)`, with 0 as the slope at 0.

    Arguments, masks, weights and errors are those of `mean`.

    >>> mae(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
    Array(1., dtype=float32)
    """
    return mean(absolute_error, predictions, targets, where=where, weights=weights, axis=axis)


def mse(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> Array:
    """The mean squared error: `mean(squared_error, ...)`.

    Arguments, masks, weights and errors are those of `mean`.

    >>> mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
    Array(2., dtype=float32)
    """
    return mean(squared_error, predictions, targets, where=where, weights=weights, axis=axis)


def _kept(
    loss: Loss,
    predictions: ArrayLike,
    targets: ArrayLike | None,
    where: ArrayLike | None,
    weights: ArrayLike | None,
) -> tuple[Array, Array | None, jnp.dtype]:
    """The losses with 0 where dropped, their weights (None: all 1), and the result's dtype."""
    check_loss(loss)
    r, dtype = residual(predictions, targets)
    keep = None if where is None else mask(where, r.shape)
    losses = loss(r) if keep is None else jnp.where(keep, loss(jnp.where(keep, r, 0)), 0)
    if losses.shape != r.shape:
        raise ValueError(
            f"a loss must keep the residual's shape {r.shape}, got shape {losses.shape}"
        )
    losses = losses.astype(at_least_float32(losses.dtype))
    if weights is None:
        return losses, None if keep is None else keep.astype(losses.dtype), dtype
    w = nonnegative(weights, r.shape, where)
    dtype = jnp.result_type(dtype, w)
    wide = at_least_float32(dtype)
    return losses.astype(wide), w.astype(wide), dtype


def mask(where: ArrayLike, shape: tuple[int, ...]) -> Array:
    """`where` as booleans of this shape."""
    keep = real_array("where", where)
    if keep.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean, got dtype {keep.dtype}")
    return _spread("where", keep, shape)


def nonnegative(
    weights: ArrayLike, shape: tuple[int, ...], where: ArrayLike | None = None
) -> Array:
    """`weights` of this shape, 0 where dropped; those that can be read must be >= 0."""
    w = _spread("weights", real_array("weights", weights), shape)
    given, kept = readable(weights), True if where is None else readable(where)
    if given is not None and kept is not None:
        wrong = np.broadcast_to(given, shape)[np.broadcast_to(~(given >= 0) & kept, shape)]
        if wrong.size:
            raise ValueError(f"weights must be >= 0, got {wrong[0]}")
    return w if where is None else jnp.where(mask(where, shape), w, 0)


def _spread(name: str, x: Array, shape: tuple[int, ...]) -> Array:
    try:
        return jnp.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to the residual's shape {shape}, got shape {x.shape}"
        ) from None
