"""Applies a function of one row over any axes, with masks, weights and 16-bit types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from robustloss._arguments import (
    at_least_float32,
    axes_of,
    mask,
    ratios,
    real_array,
    relative,
    residual,
)

Axis = int | Sequence[int] | None


def over_axis(
    kernel: Callable[..., Any],
    x: ArrayLike,
    center: ArrayLike | None,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    axis: Axis,
    *parameters: Array,
) -> Any:
    """`kernel(row, weights, *parameters)` of each row along the axes.

    NaN for a row that has a NaN or an invalid weight, or of which nothing is kept. The rows that
    the kernel gets have 0 in the place of a dropped entry, `center` subtracted, and at least
    float32. Their weights are None where all entries count 1, integers 0 and 1 for a mask alone,
    else floating numbers of which the largest is in [1, 4).
    """
    real_array("x", x)
    r, dtype = residual(x)
    shape = r.shape
    if center is not None:
        middle = real_array("center", center)
        if np.broadcast_shapes(middle.shape, shape) != shape:
            raise ValueError(f"center must broadcast to the shape {shape}, got {middle.shape}")
        dtype = jnp.result_type(dtype, middle)
        wide = at_least_float32(dtype)
        r = r.astype(wide) - middle.astype(wide)
    keep = None if where is None else mask(where, shape)
    w = None if keep is None else keep.astype(jnp.int32)
    if weights is not None:
        w, weights_dtype = ratios(weights, shape, where, axes_of(axis, len(shape)))
        dtype = jnp.result_type(dtype, weights_dtype)
    r = r.astype(at_least_float32(dtype))
    r = r if keep is None else jnp.where(keep, r, 0)

    r = _rows(r, axis)
    w = None if w is None else _rows(w, axis)
    if w is not None and weights is not None:
        w = relative(w, (w.ndim - 1,))[0].astype(r.dtype)  # so that their sum cannot overflow
    if r.shape[-1] == 0:  # an empty row becomes one entry that is dropped
        r, w = jnp.zeros((*r.shape[:-1], 1), r.dtype), jnp.zeros((*r.shape[:-1], 1), jnp.int32)
    valid = ~jnp.any(jnp.isnan(r), -1)
    if w is not None:
        size = jnp.sum(w, -1).astype(r.dtype)
        valid &= (size > 0) & (size < jnp.inf) & jnp.all(w >= 0, -1)
    wide_parameters = [p.astype(r.dtype) for p in parameters]
    vmapped = kernel
    for _ in range(r.ndim - 1):
        vmapped = jax.vmap(vmapped, (0, None if w is None else 0, *(None for _ in parameters)))
    results = vmapped(r, w, *wide_parameters)
    # The NaN is a function of the data that is added to the result, so that the derivative is NaN
    # too.
    invalid_sum = jnp.sum(jnp.where(valid[..., None], 0, r), -1)
    nan = jnp.where(valid, 0.0, jnp.nan).astype(r.dtype) * invalid_sum
    return jax.tree.map(lambda result: (result + nan).astype(dtype), results)


def _rows(x: Array, axis: Axis) -> Array:
    """x with the axes to reduce merged into one, the last."""
    if axis is None:
        return x.reshape(-1)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    left = x.shape[: x.ndim - len(axes)]
    return x.reshape(*left, int(np.prod(x.shape[len(left) :])))
