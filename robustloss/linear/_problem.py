"""A regression in coordinates in which its columns are of one size and close to orthogonal.

Every solver works on the rows `q` of a `Problem`, so none meets a column in unusual units, a large
mean or two columns that are nearly the same; one that depends on the others has become 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_factor, cho_solve

from robustloss.scale import mad

_ROWS = 4096  # enough to center and to scale a column by


class Problem(NamedTuple):
    """Minimise over b what a loss makes of `y - q @ b`."""

    q: Array
    """(n, k), rows that are dropped 0"""
    y: Array
    """(n,), less a constant if there is an intercept"""
    w: Array | None
    """(n,) weights, or None"""
    keep: Array | None
    """(n,) booleans, or None"""
    basis: Array
    """(k, k): `basis @ b` are coefficients of the columns (1, (X - center) / spread)"""
    center: Array
    spread: Array
    middle: Array
    """what was taken from y"""
    rank: Array
    told: Array
    """(k,) which coefficients the data tell from the others"""
    intercept: bool

    def each(self) -> Array:
        """The weight of each row, 0 where dropped."""
        w = jnp.ones_like(self.y) if self.w is None else self.w
        return w if self.keep is None else jnp.where(self.keep, w, 0)


def problem(X: Array, y: Array, keep: Array | None, w: Array | None, intercept: bool) -> Problem:
    """X is (n, p) and y is (n,), both floating and at least float32."""
    if keep is not None:
        X, y = jnp.where(keep[:, None], X, 0), jnp.where(keep, y, 0)
    n, p = X.shape
    step = -(-n // _ROWS)
    some = None if keep is None else keep[::step]
    # Of most of the rows: one wild entry must not flatten the others.
    if intercept:
        center, middle = _median(X[::step], some), _median(y[::step, None], some)[0]
    else:
        center, middle = jnp.zeros(p, X.dtype), jnp.zeros((), y.dtype)
    z = X - center
    where = None if some is None else some[:, None]
    spread = mad(z[::step], center=0.0, axis=0, where=where)
    size = jnp.max(jnp.abs(z), axis=0, where=True if keep is None else keep[:, None], initial=0)
    spread = jnp.where(spread > 0, spread, jnp.where(size > 0, size, 1))
    z = z / spread
    if intercept:
        z = jnp.concatenate([jnp.ones((n, 1), z.dtype), z], axis=1)
        y = y - middle
    k = z.shape[1]
    each = jnp.ones_like(y) if w is None else (w > 0).astype(y.dtype)
    each = each / (1 + jnp.sum(z * z, axis=1) / k)
    if keep is not None:
        each = jnp.where(keep, each, 0)
    gram = (z * each[:, None]).T @ z
    diagonal = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    unit = jnp.where(diagonal > 0, diagonal, 1)
    values, vectors = jnp.linalg.eigh(gram / (unit[:, None] * unit))
    kept = values > 4 * k * jnp.finfo(z.dtype).eps * jnp.max(values)
    total = jnp.sqrt(jnp.sum(each))
    basis = jnp.where(kept, vectors / jnp.sqrt(jnp.where(kept, values, 1)), 0) * (
        total / unit[:, None]
    )
    q = z @ basis
    if keep is not None:
        q, y = jnp.where(keep[:, None], q, 0), jnp.where(keep, y, 0)
    # Coefficients that change along a direction in which the fit does not.
    free = jnp.where(kept, 0, vectors / unit[:, None])
    size = jnp.abs(free)
    if intercept:
        slopes = free[1:] / spread[:, None]
        parts = center[:, None] * slopes
        size = size.at[0].add(jnp.sum(jnp.abs(parts), axis=0))
        free = free.at[0].add(-jnp.sum(parts, axis=0))
    largest = jnp.maximum(size, jnp.max(jnp.abs(jnp.where(kept, 0, vectors)) / unit[:, None], 0))
    lost = jnp.any(jnp.abs(free) > jnp.finfo(z.dtype).eps ** 0.5 * largest, axis=1)
    rank = jnp.sum(kept, dtype=jnp.int32)
    return Problem(q, y, w, keep, basis, center, spread, middle, rank, ~lost, intercept)


def _median(x: Array, keep: Array | None) -> Array:
    """A middle of each column, 0 where nothing is kept."""
    x = x if keep is None else jnp.where(keep[:, None], x, jnp.nan)
    return jnp.nan_to_num(jnp.nanmedian(x, axis=0))


def solve(gram: Array, right: Array) -> Array:
    """`gram b = right` for a gram that is positive definite but for columns of 0."""
    k = len(gram)
    largest = jnp.max(jnp.diagonal(gram))
    ridge = k * jnp.finfo(gram.dtype).eps * jnp.where(largest > 0, largest, 1)
    return cho_solve(cho_factor(gram + ridge * jnp.eye(k, dtype=gram.dtype), lower=True), right)


def gram(q: Array, w: Array) -> Array:
    """`q' diag(w) q`."""
    return (q * w[:, None]).T @ q


def coefficients(of: Problem, b: Array) -> Array:
    """In the units of the user, the intercept first if there is one."""
    scaled = of.basis @ b
    if not of.intercept:
        return scaled / of.spread
    slopes = scaled[1:] / of.spread
    return jnp.concatenate([(of.middle + scaled[0] - slopes @ of.center)[None], slopes])


def raw_basis(of: Problem) -> Array:
    """The matrix that takes b to the coefficients, but for the constant `middle`."""
    if not of.intercept:
        return of.basis / of.spread[:, None]
    slopes = of.basis[1:] / of.spread[:, None]
    return jnp.concatenate([(of.basis[0] - of.center @ slopes)[None], slopes])


def from_coefficients(of: Problem, given: Array) -> Array:
    """The b of coefficients in the user's units."""
    if of.intercept:
        scaled = given[1:] * of.spread
        first = given[0] - of.middle + given[1:] @ of.center
        scaled = jnp.concatenate([first[None], scaled])
    else:
        scaled = given * of.spread
    return jnp.linalg.pinv(of.basis) @ scaled
