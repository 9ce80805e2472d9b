"""The linear program of quantile regression, as the interior point and the simplex method take it.

Minimise over b the sum of `quantile_loss(y - a b)` of some rows, plus what the other rows add while
each stays on its side of the fit. Weights are factors of the rows: `w loss(e) = loss(w e)`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class FixedRows(NamedTuple):
    """What the rows add that take no part, each on the side of the fit where it is taken to stay.

    With the slope `level` of the loss above the fit and `level - 1` below it.
    """

    gradient: Array
    """(k,) sum of slope times row"""
    gradient_size: Array
    """(k,) sum of the sizes of these terms, to which rounding is relative"""
    value: Array
    """sum of slope times y"""


class Program(NamedTuple):
    """A quantile regression of n rows on k columns."""

    a: Array
    """(n, k) rows, each times its weight"""
    y: Array
    """(n,) each times its weight"""
    kept: Array
    """(n,) False where a row has no weight"""
    level: Array
    """the quantile, in (0, 1)"""
    fixed: FixedRows


def no_fixed_rows(k: int, dtype: jnp.dtype) -> FixedRows:
    """Where all rows take part."""
    zeros = jnp.zeros(k, dtype)
    return FixedRows(zeros, zeros, jnp.zeros((), dtype))


def quantile_loss(e: Array, level: Array) -> Array:
    """Of `e = y - a b`: level times e above the fit, (level - 1) times e below it."""
    return jnp.maximum(level * e, (level - 1) * e)
