"""Cheap, approximate location, size and rank of columns.

One wild entry moves none of these by much, unless most entries of a column are one number.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustloss._numerics import normal
from robustloss._numerics.order_statistics import near_median

_FAR_OUT = 300.0  # length of a row, where that of a typical row is 1


def locations_and_scales(x: Array, kept: Array | None, intercept: bool) -> tuple[Array, Array]:
    """Near the median of each column, or 0 without an intercept; and near the MAD about it."""
    weights = None if kept is None else kept.astype(jnp.int32)
    x = lax.stop_gradient(x if kept is None else jnp.where(kept[:, None], x, 0))

    def locate(x: Array, centered: Array) -> tuple[Array, Array]:
        medians = jax.vmap(lambda column: near_median(column, weights))(x)
        medians = jnp.where(centered, jnp.nan_to_num(medians), 0)
        return jnp.abs(x - medians[:, None]), medians

    _, (medians, deviations) = lax.scan(locate, x.T, jnp.asarray([intercept, True]))
    return medians, normal.MAD * deviations


def largest_deviation(X: Array, center: Array, kept: Array | None, scale: Array) -> Array:
    """The largest |X - center| of each column, 1 where that is 0; only if some `scale` is 0."""

    def find() -> Array:
        where = True if kept is None else kept[:, None]
        size = jnp.max(jnp.abs(X - center), axis=0, where=where, initial=0)
        return jnp.where(size > 0, size, 1)

    return lax.cond(jnp.all(scale > 0), lambda: jnp.ones_like(scale), find)


def mean_size(x: Array, kept: Array | None) -> Array:
    """The geometric mean of the |x| that are not 0; 0 where all are."""
    counted = (x != 0) & jnp.isfinite(x)
    counted = counted if kept is None else counted & kept
    logs = jnp.log(jnp.where(counted, jnp.abs(x), 1))
    number = jnp.sum(counted)
    return jnp.where(number > 0, jnp.exp(jnp.sum(logs) / jnp.maximum(number, 1)), 0)


def orthogonal_basis(normal: Array) -> tuple[Array, Array, Array]:
    """A basis in which the normal matrix is the identity; its null space; its rank.

    `normal` has ones, or zeros, on its diagonal. Of the basis, columns in the null space are 0; of
    the null space, the others.
    """
    k = len(normal)
    eps = float(jnp.finfo(normal.dtype).eps)
    inverse, independent = _triangular_inverse(normal)

    def decompose(state: Any) -> Any:
        values, vectors = jnp.linalg.eigh(state[1])
        nonzero = values > 4 * k * eps * jnp.max(values)
        basis = jnp.where(nonzero, vectors / jnp.sqrt(jnp.where(nonzero, values, 1)), 0)
        null_space = jnp.where(nonzero, 0, vectors)
        return jnp.asarray(True), null_space, basis, jnp.sum(nonzero, dtype=jnp.int32)

    # A loop of at most one round: for a batch of problems, lax.cond would decompose all of them.
    # The matrix is part of the loop's state, since XLA would else take eigh out of the loop.
    begin = independent, normal, inverse.T, jnp.int32(k)
    _, null_space, basis, rank = lax.while_loop(lambda state: ~state[0], decompose, begin)
    return basis, jnp.where(independent, 0, null_space), rank


def orthogonal_rows(
    normal: Array, z: Array, root_weights: Array, rounding: Array
) -> tuple[Array, Array, Array, Array]:
    """`orthogonal_basis` of `normal = z' diag(root_weights**2) z`, and the rows z in this basis.

    Where the columns nearly depend on each other, the normal matrix has lost half of the digits:
    then the singular values of the rows themselves decide. A direction counts as 0 where it is no
    longer than the rounding error of the data, `rounding` in each column. Where rows lie far out,
    the axes are turned towards them, so that sums of squares keep their digits in the other axes.
    """
    k = len(normal)
    eps = float(jnp.finfo(normal.dtype).eps)
    inverse, independent = _triangular_inverse(normal)
    rows = z @ inverse.T
    length = jnp.max(jnp.sum(root_weights * root_weights, axis=0)) ** 0.5
    independent &= length * jnp.max(jnp.abs(rows), initial=0) < _FAR_OUT

    def decompose(state: Any) -> Any:
        _, z, *_ = state
        table = jnp.nan_to_num(root_weights * z, posinf=0, neginf=0)
        left, values, right = jnp.linalg.svd(table, full_matrices=False)
        vectors = right.T
        errors = jnp.sqrt((rounding * rounding) @ (vectors * vectors))
        nonzero = values > 8 * k * jnp.maximum(errors, eps * jnp.max(values))
        basis = vectors * jnp.where(nonzero, 1 / jnp.where(nonzero, values, 1), 0)
        null_space = jnp.where(nonzero, 0, vectors)
        # A row far out has a small weight: `left / root_weights` has more digits than `z @ basis`.
        weighted = root_weights > 0
        left = jnp.where(nonzero, left, 0) / jnp.where(weighted, root_weights, 1)
        q = jnp.where(weighted, left, z @ basis)
        _, turn = jnp.linalg.eigh(jnp.nan_to_num(q.T @ q))
        turn = jnp.where(jnp.all(nonzero), turn, jnp.eye(k, dtype=turn.dtype))
        rank = jnp.sum(nonzero, dtype=jnp.int32)
        return jnp.asarray(True), q @ turn, null_space, basis @ turn, rank

    # The loop's state replaces z, since XLA would else take the decomposition out of the loop.
    begin = independent, z, jnp.zeros_like(inverse), inverse.T, jnp.int32(k)
    _, q, null_space, basis, rank = lax.while_loop(lambda state: ~state[0], decompose, begin)
    return basis, null_space, rank, jnp.where(independent, rows, q)


def _triangular_inverse(normal: Array) -> tuple[Array, Array]:
    """The inverse of Cholesky's factor, and whether the columns are far from dependent."""
    eps = float(jnp.finfo(normal.dtype).eps)
    factor = lax.linalg.cholesky(normal)
    eye = jnp.eye(len(normal), dtype=normal.dtype)
    inverse = lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    # The sum of squares is the trace of the inverse matrix; where it is NaN, the answer is no.
    independent = jnp.sum(inverse * inverse) < eps**-0.5
    return jnp.where(independent, inverse, eye), independent
