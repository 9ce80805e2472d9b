"""What reduces one row, over any axes of an array, with masks, weights and 16-bit types."""

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
    """`kernel(row, weights, *parameters)` of each row along the axes; NaN where it has none."""
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
        w, its_dtype = ratios(weights, shape, where, axes_of(axis, len(shape)))
        dtype = jnp.result_type(dtype, its_dtype)
    r = r.astype(at_least_float32(dtype))
    r = r if keep is None else jnp.where(keep, r, 0)

    r = _rows(r, axis)
    w = None if w is None else _rows(w, axis)
    if w is not None and weights is not None:
        w = relative(w, (w.ndim - 1,))[0].astype(r.dtype)  # lest their sums overflow
    if r.shape[-1] == 0:  # one entry that is dropped
        r, w = jnp.zeros((*r.shape[:-1], 1), r.dtype), jnp.zeros((*r.shape[:-1], 1), jnp.int32)
    found = ~jnp.any(jnp.isnan(r), -1)
    if w is not None:
        size = jnp.sum(w, -1).astype(r.dtype)
        found &= (size > 0) & (size < jnp.inf) & jnp.all(w >= 0, -1)
    wide_parameters = [p.astype(r.dtype) for p in parameters]
    of_rows = kernel
    for _ in range(r.ndim - 1):
        of_rows = jax.vmap(of_rows, (0, None if w is None else 0, *(None for _ in parameters)))
    results = of_rows(r, w, *wide_parameters)
    # Added to the result and made of the data, so that its derivative is NaN too.
    kept = jnp.sum(jnp.where(found[..., None], 0, r), -1)
    nan = jnp.where(found, 0.0, jnp.nan).astype(r.dtype) * kept
    return jax.tree.map(lambda result: (result + nan).astype(dtype), results)


def _rows(x: Array, axis: Axis) -> Array:
    """The axes to reduce as one, the last."""
    if axis is None:
        return x.reshape(-1)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    left = x.shape[: x.ndim - len(axes)]
    return x.reshape(*left, int(np.prod(x.shape[len(left) :])))
