"""Means and totals of losses, with masks and weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from robustloss._arguments import (
    Axis,
    at_least_float32,
    axes_of,
    check_loss,
    mask,
    nonnegative,
    ratios,
    relative,
    residual,
)
from robustloss.losses.convex import absolute_error, squared_error
from robustloss.types import Loss

__all__ = ["mae", "mean", "mse", "total"]


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

    A dropped entry may hold anything, NaN and infinity included: value and gradient are those of
    the kept entries alone, because the residual is masked before the loss is applied. A weight of
    0 is not a mask: a NaN with the weight 0 makes the mean NaN. If nothing is kept, or all weights
    are 0, the mean is 0 with a gradient of 0. 16-bit types are summed in float32.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`; other parameters
            with `functools.partial(rl.huber, delta=1.345)`.
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        where: booleans that broadcast to the residual; True keeps an entry.
        weights: finite numbers >= 0 that broadcast to the residual; only their ratios count,
            from the smallest numbers to the largest. One below 1e-38 of the largest counts as
            0 (in float32, in float64 below 1e-308).
        axis: the axis or axes to reduce; None reduces all.

    Returns:
        A scalar, or an array of the axes that are left, in the dtype of the residual. The mean of
        n losses does not overflow where their sum would; in exchange, a loss below 1e-38 n (in
        float64 1e-308 n) counts as 0.

    Raises:
        ValueError: shapes that do not fit, weights that are negative, infinite or NaN (traced:
            the result is NaN).
        TypeError: complex or non-numeric input, a `where` that is not boolean.

    >>> y, nan = jnp.array([1.0, 2.0, 3.0]), float("nan")
    >>> mean(rl.huber, jnp.array([1.0, 2.5, nan]), y, where=jnp.array([True, True, False]))
    Array(0.0625, dtype=float32)
    """
    losses, keep, dtype = _masked_losses(loss, predictions, targets, where)
    axes = axes_of(axis, losses.ndim)
    if weights is not None:
        w, weights_dtype = ratios(weights, losses.shape, where, axes)
        dtype = jnp.result_type(dtype, weights_dtype)
        wide = at_least_float32(dtype)
        return _weighted_mean(losses.astype(wide), w, axes).astype(dtype)
    size: Array | int = max(_length(losses, axes), 1)
    if keep is not None:
        size = jnp.maximum(jnp.sum(keep, axes, losses.dtype), 1)
    return _sum_quotient(losses, jnp.asarray(size, losses.dtype), axes).astype(dtype)


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

    Arguments, masks and errors are those of `mean`. If nothing is kept, the total is 0. A weight
    that is not 0 must be a normal number of its type, in float32 1.2e-38 or more. XLA on a CPU
    reads a smaller number as 0, so it is a ValueError (traced: NaN).

    >>> total(rl.huber, jnp.array([1.0, -3.0]), weights=jnp.array([1.0, 2.0]))
    Array(5.5, dtype=float32)
    """
    losses, _, dtype = _masked_losses(loss, predictions, targets, where)
    if weights is not None:
        w = nonnegative(weights, losses.shape, where)
        dtype = jnp.result_type(dtype, w)
        wide = at_least_float32(dtype)
        losses = losses.astype(wide) * w.astype(wide)
    return jnp.sum(losses, axes_of(axis, losses.ndim)).astype(dtype)


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


def _masked_losses(
    loss: Loss, predictions: ArrayLike, targets: ArrayLike | None, where: ArrayLike | None
) -> tuple[Array, Array | None, jnp.dtype]:
    """The losses with 0 where dropped, the mask (None: all are kept), and the result's dtype."""
    check_loss(loss)
    r, dtype = residual(predictions, targets)
    keep = None if where is None else mask(where, r.shape)
    losses = loss(r) if keep is None else loss(jnp.where(keep, r, 0))
    shape = getattr(losses, "shape", () if isinstance(losses, (int, float)) else None)
    if shape != r.shape:
        got = type(losses).__name__ if shape is None else f"shape {shape}"
        raise ValueError(
            f"a loss must be elementwise and keep the residual's shape {r.shape}, got {got}"
        )
    losses = jnp.asarray(losses)
    losses = losses if keep is None else jnp.where(keep, losses, 0)
    return losses.astype(at_least_float32(losses.dtype)), keep, dtype


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sum_quotient(x: Array, divisor: Array, axes: tuple[int, ...]) -> Array:
    """`sum(x) / divisor`, finite where the quotient is, even if the sum of the n numbers is not.

    Each x is divided by a power of 2 above n. This is exact, and it costs no time in the pass that
    computes x. The divisor is not n itself: XLA would find the same number in the gradient and
    write an array that holds nothing else for both.
    """
    share = 1 / float(1 << _length(x, axes).bit_length())
    return jnp.sum(x * share, axes) / (divisor * share)


@_sum_quotient.defjvp
def _sum_quotient_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    x, divisor = primals  # the divisor is not differentiated
    return _sum_quotient(x, divisor, axes), jnp.sum(tangents[0], axes) / divisor


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _weighted_mean(x: Array, w: Array, axes: tuple[int, ...]) -> Array:
    """`sum(w x) / sum(w)`, 0 where all w are 0, for w of any magnitude."""
    w = relative(w, axes)[0].astype(x.dtype)
    size = jnp.sum(w, axes)
    # A quarter, as the weights are up to 4 and a product with one might overflow.
    return _sum_quotient(0.25 * w * x, 0.25 * jnp.where(size == 0, 1, size), axes)


def _weighted_mean_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, w), (x_dot, w_dot) = primals, tangents
    out = _weighted_mean(x, w, axes)
    scaled, unit = (a.astype(x.dtype) for a in relative(w, axes))
    size = jnp.sum(scaled, axes, keepdims=True)
    size = jnp.where(size == 0, 1, size)
    tangent = jnp.zeros_like(out)
    if not isinstance(x_dot, SymbolicZero):
        tangent += jnp.sum(x_dot * scaled / size, axes)
    if not isinstance(w_dot, SymbolicZero):
        # One difference in the place of the two terms of the quotient rule, which may be infinite.
        w_dot = w_dot.astype(x.dtype)
        tangent += jnp.sum(w_dot * unit * (x - jnp.expand_dims(out, axes)) / size, axes)
    return out, tangent


_weighted_mean.defjvp(_weighted_mean_jvp, symbolic_zeros=True)


def _length(x: Array, axes: tuple[int, ...]) -> int:
    """The number of entries along the axes."""
    return math.prod(x.shape[axis] for axis in axes)
