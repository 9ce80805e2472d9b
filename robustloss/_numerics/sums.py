"""Several sums in one pass over the data."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def joint_sums(*x: Array, axis: int = 0) -> list[Array]:
    """Of each x along an axis, in one pass, which XLA's CPU makes faster than a sum of one."""

    def add(a: list[Array], b: list[Array]) -> list[Array]:
        return [i + j for i, j in zip(a, b, strict=True)]

    return lax.reduce(list(x), [jnp.zeros((), each.dtype) for each in x], add, (axis,))
