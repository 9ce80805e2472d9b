"""Where columns lie, how large they are, and which depend on others; nothing of it exact.

One wild entry moves none of it by much, but where most entries of a column are one number.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustloss._numerics import normal
from robustloss._numerics.order_statistics import near_median

_FAR_OUT = 300.0  # of a row of which a typical one has the length 1


def middles_and_spreads(x: Array, keep: Array | None, intercept: bool) -> tuple[Array, Array]:
    """Next to the median of each column, or 0 without an intercept; and to the MAD about it."""
    w = None if keep is None else keep.astype(jnp.int32)
    x = lax.stop_gradient(x if keep is None else jnp.where(keep[:, None], x, 0))

    def middle(x: Array, wanted: Array) -> tuple[Array, Array]:
        found = jax.vmap(lambda column: near_median(column, w))(x)
        found = jnp.where(wanted, jnp.nan_to_num(found), 0)
        return jnp.abs(x - found[:, None]), found

    _, (middles, deviations) = lax.scan(middle, x.T, jnp.asarray([intercept, True]))
    return middles, normal.MAD * deviations


def largest(X: Array, center: Array, keep: Array | None, spread: Array) -> Array:
    """The size of columns of which most entries are one number; 1 for those that are 0."""

    def look() -> Array:
        size = jnp.max(
            jnp.abs(X - center), axis=0, where=True if keep is None else keep[:, None], initial=0
        )
        return jnp.where(size > 0, size, 1)

    return lax.cond(jnp.all(spread > 0), lambda: jnp.ones_like(spread), look)


def mean_size(x: Array, keep: Array | None) -> Array:
    """The geometric mean of what is not 0, if anything is: where most entries are one number."""
    counts = (x != 0) & jnp.isfinite(x)
    counts = counts if keep is None else counts & keep
    logs = jnp.log(jnp.where(counts, jnp.abs(x), 1))
    several = jnp.sum(counts)
    return jnp.where(several > 0, jnp.exp(jnp.sum(logs) / jnp.maximum(several, 1)), 0)


def axes(normal: Array) -> tuple[Array, Array, Array]:
    """A basis in which the normal matrix is 1; where it is 0 instead, and the rank.

    `normal` has ones, or zeros, on its diagonal.
    """
    k = len(normal)
    eps = float(jnp.finfo(normal.dtype).eps)
    inverse, plain = _triangular_inverse(normal)

    def by_eigenvalues(state: Any) -> Any:
        values, vectors = jnp.linalg.eigh(state[1])
        known = values > 4 * k * eps * jnp.max(values)
        basis = jnp.where(known, vectors / jnp.sqrt(jnp.where(known, values, 1)), 0)
        free = jnp.where(known, 0, vectors)
        return jnp.asarray(True), free, basis, jnp.sum(known, dtype=jnp.int32)

    # A loop of one round at most: of many problems at once, lax.cond would do both for all. The
    # matrix is part of its state, or XLA would take eigh out of it.
    begin = plain, normal, inverse.T, jnp.int32(k)
    _, free, basis, rank = lax.while_loop(lambda state: ~state[0], by_eigenvalues, begin)
    return basis, jnp.where(plain, 0, free), rank


def factorised(
    normal: Array, z: Array, root: Array, noise: Array
) -> tuple[Array, Array, Array, Array]:
    """The same as `axes`, and the rows z in this basis, for a normal matrix `z' diag(root**2) z`.

    Where the columns nearly depend on each other, the normal matrix has lost half of the digits:
    the rows themselves are then decomposed into singular values. A direction counts as 0 where it
    is no longer than the rounding of the data, which is `noise` in each column. Where rows lie far
    out, the axes are turned towards them, so that a sum of squares keeps its digits in the others.
    """
    k = len(normal)
    eps = float(jnp.finfo(normal.dtype).eps)
    inverse, plain = _triangular_inverse(normal)
    rows = z @ inverse.T
    length = jnp.max(jnp.sum(root * root, axis=0)) ** 0.5
    plain &= length * jnp.max(jnp.abs(rows), initial=0) < _FAR_OUT

    def by_singular_values(state: Any) -> Any:
        _, z, *_ = state
        table = jnp.nan_to_num(root * z, posinf=0, neginf=0)
        left, values, right = jnp.linalg.svd(table, full_matrices=False)
        vectors = right.T
        rounding = jnp.sqrt((noise * noise) @ (vectors * vectors))
        known = values > 8 * k * jnp.maximum(rounding, eps * jnp.max(values))
        scale = jnp.where(known, 1 / jnp.where(known, values, 1), 0)
        basis, free = vectors * scale, jnp.where(known, 0, vectors)
        # A row far out has a small root: its entries are left / root.
        q = jnp.where(root > 0, jnp.where(known, left, 0) / jnp.where(root > 0, root, 1), z @ basis)
        _, turn = jnp.linalg.eigh(jnp.nan_to_num(q.T @ q))
        turn = jnp.where(jnp.all(known), turn, jnp.eye(k, dtype=turn.dtype))
        rank = jnp.sum(known, dtype=jnp.int32)
        return jnp.asarray(True), q @ turn, free, basis @ turn, rank

    # The loop replaces z, or XLA would take the decomposition out of it.
    begin = plain, z, jnp.zeros_like(inverse), inverse.T, jnp.int32(k)
    _, q, free, basis, rank = lax.while_loop(lambda at: ~at[0], by_singular_values, begin)
    return basis, free, rank, jnp.where(plain, rows, q)


def _triangular_inverse(normal: Array) -> tuple[Array, Array]:
    """The inverse of Cholesky's factor, and whether the columns are far from dependent."""
    eps = float(jnp.finfo(normal.dtype).eps)
    factor = lax.linalg.cholesky(normal)
    eye = jnp.eye(len(normal), dtype=normal.dtype)
    inverse = lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    plain = jnp.sum(inverse * inverse) < eps**-0.5  # the trace of the inverse; else, or NaN, not
    return jnp.where(plain, inverse, eye), plain
