"""A regression in coordinates in which its columns are of one size and close to orthogonal.

Every solver works on the rows q of a `Problem`. So no solver meets a column in unusual units, a
column with a large mean, or two columns that are nearly the same. A column that depends on the
others has become 0. Where rows are many, they are made when they are needed, a block at a time, so
that no second copy of X is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_solve

from robustloss._numerics.columns import (
    largest_deviation,
    locations_and_scales,
    mean_size,
    orthogonal_basis,
    orthogonal_rows,
)
from robustloss._numerics.sums import joint_sums
from robustloss.losses._double import frexp, ldexp

LossAtScale = Callable[[Array], Callable[..., Array]]
"""The loss whose residuals are in units of a given scale."""

_SAMPLE = 1024  # rows, enough to center and to scale a column by
_BLOCK = 16384  # rows, few enough for a cache


class Problem(NamedTuple):
    """Minimise over b a loss of `y - q b`, `q = (x - center) slopes + constants` of each row x.

    A solver finds its steps in the coordinates b. What it adds them up to are the coefficients of
    x - center: where columns are nearly dependent, the coefficients are small differences of large
    terms of b, and would lose digits if they were computed from b at the end.
    """

    X: Array
    """(n, p) as given"""
    y: Array
    """(n,) minus `y_center`, in units of `y_unit`; 0 where dropped"""
    weights: Array | None
    """(n,) the largest 1, or None"""
    where: Array | None
    """(n,) booleans, False where dropped, or None"""
    design: Array | None
    """(n, k) the rows q, where they are few enough to be kept; None where they are made in
    blocks"""
    center: Array
    """(p,) robust location of the columns"""
    column_scale: Array
    """(p,) robust scale of the columns"""
    slopes: Array
    """(p, k)"""
    constants: Array
    """(k,)"""
    y_center: Array
    """robust location of y, in its own units, if there is an intercept; else 0"""
    y_unit: Array
    """1, or a power of 2 where squares of y would leave the range of its type"""
    y_size: Array
    """robust size of y in this unit, to which rounding errors are relative"""
    rank: Array
    """number of columns that do not depend on the others"""
    identifiable: Array
    """(k,) whether the data determine each coefficient"""
    intercept: bool

    def row_weights(self) -> Array:
        """(n,) the weight of each row, 0 where dropped."""
        weights = jnp.ones_like(self.y) if self.weights is None else self.weights
        return weights if self.where is None else jnp.where(self.where, weights, 0)

    def weighted_rows(self) -> Array | None:
        """(n,) which rows have a weight; None for all, so that XLA need not count them."""
        if self.weights is None and self.where is None:
            return None
        return self.row_weights() > 0

    def coefficients(self, b: Array) -> Array:
        """(k,) of x - center: the constant first if there is an intercept, then the slopes."""
        slopes = self.slopes @ b
        return jnp.concatenate([(self.constants @ b)[None], slopes]) if self.intercept else slopes

    def term_sizes(self, coefficients: Array) -> tuple[Array, Array]:
        """The size of the constant and of the other terms of a prediction of a typical row."""
        sizes = jnp.abs(coefficients)
        constant = sizes[0] if self.intercept else jnp.zeros_like(self.y_unit)
        return constant, self.column_scale @ sizes[self.intercept :]


class Estimate(NamedTuple):
    """Where a solver ended."""

    coefficients: Array
    """(k,) of x - center, as `Problem.coefficients` has them"""
    scale: Array
    residuals: Array
    """(n,) prediction - y, as a loss takes them"""
    converged: Array
    steps: Array


def standardise(
    X: Array,
    y: Array,
    where: Array | None,
    weights: Array | None,
    intercept: bool,
    *,
    in_units: bool = True,
) -> Problem:
    """The problem in coordinates in which the columns have one size and are nearly orthogonal.

    X is (n, p) and y is (n,), both floating and at least float32. `in_units`: y may be divided by
    a power of 2, for a loss whose delta is in units of y.
    """
    p = X.shape[1]
    k = p + intercept
    y = y if where is None else jnp.where(where, y, 0)
    center, column_scale, y_center, y_size = _locations_and_scales(X, y, where, intercept)
    y_unit = _unit(y_size) if in_units else jnp.ones_like(y_size)
    y_size, y = y_size / y_unit, y * (1 / y_unit)
    y = y - y_center / y_unit if intercept else y
    y = y if where is None else jnp.where(where, y, 0)

    per_column = jnp.diag(1 / column_scale)
    if intercept:
        per_column = jnp.concatenate([jnp.zeros((p, 1), X.dtype), per_column], axis=1)
    ones = jnp.zeros(k, X.dtype).at[0].set(1.0) if intercept else jnp.zeros(k, X.dtype)
    scaled = Problem(
        X, y, weights, where, None, center, column_scale, per_column, ones, y_center, y_unit,
        y_size, jnp.int32(k), jnp.ones(k, bool), intercept,
    )  # fmt: skip
    basis, null_space, rank, design = _orthogonalise(scaled)
    return scaled._replace(
        design=design,
        slopes=per_column @ basis,
        constants=ones @ basis,
        rank=rank,
        identifiable=_identifiable(scaled, null_space),
    )


def _locations_and_scales(
    X: Array, y: Array, where: Array | None, intercept: bool
) -> tuple[Array, Array, Array, Array]:
    """Robust location and scale of the columns of X, and of y, from a sample of the rows."""
    n, p = X.shape
    chosen = spaced_rows(where, n, _SAMPLE)
    kept = None
    if where is not None and not isinstance(chosen, slice):
        kept = where[chosen] & (chosen < n)
    table = jnp.concatenate([X[chosen], y[chosen, None]], axis=1)
    locations, scales = locations_and_scales(table, kept, intercept)
    center, y_center, column_scale, y_size = locations[:p], locations[p], scales[:p], scales[p]
    # The scale is 0 where most entries of a column are one number.
    column_scale = jnp.where(
        column_scale > 0, column_scale, largest_deviation(X, center, where, column_scale)
    )
    y_size = jnp.where(y_size > 0, y_size, mean_size(table[:, p] - y_center, kept))
    return center, column_scale, y_center, y_size


def _orthogonalise(scaled: Problem) -> tuple[Array, Array, Array, Array | None]:
    """A basis of orthogonal columns; directions in which all rows are 0; the rank; the rows.

    Rows far out in X count less, so that one of them does not decide on the basis.
    """
    k = len(scaled.constants)

    def bounded(z: Array, weights: Array) -> Array:
        return (weights > 0) / (1 + jnp.sum(z * z, axis=1) / k)

    def terms(z: Array, weights: Array) -> tuple[Array, Array]:
        weights = bounded(z, weights)
        return gram(z, weights), jnp.sum(weights)

    # All rows at once can be factorised where their gram has too few digits.
    z = design_rows(scaled) if len(scaled.y) < _BLOCK else None
    normal, total = sum_over_rows(scaled, terms)
    diagonal = jnp.sqrt(jnp.maximum(jnp.diagonal(normal), 0))
    diagonal = jnp.where(diagonal > 0, diagonal, 1)
    unit_normal = normal / (diagonal[:, None] * diagonal)
    root = jnp.sqrt(total)
    if z is None:
        basis, null_space, rank = orthogonal_basis(unit_normal)
        design = None
    else:
        eps = jnp.finfo(z.dtype).eps
        rounding = jnp.ones(k, z.dtype)
        rounding = rounding.at[scaled.intercept :].add(jnp.abs(scaled.center) / scaled.column_scale)
        root_weights = jnp.sqrt(bounded(z, scaled.row_weights()))[:, None]
        basis, null_space, rank, design = orthogonal_rows(
            unit_normal, z / diagonal, root_weights, rounding * eps
        )
        design = design * root
    return basis * (root / diagonal[:, None]), null_space / diagonal[:, None], rank, design


def _unit(size: Array) -> Array:
    """A power of 2 next to the size of y, or 1 where squares of y are well within range."""
    info = jnp.finfo(size.dtype)
    ordinary = (size > 2.0 ** (info.minexp // 3)) & (size < 2.0 ** (info.maxexp // 3))
    _, exponent = frexp(lax.stop_gradient(size))
    exponent = jnp.clip(exponent, info.minexp // 2 - info.maxexp // 3, info.maxexp - 2)
    return jnp.where(ordinary | ~(size > 0), 1, ldexp(jnp.ones_like(size), exponent))


def _identifiable(scaled: Problem, null_space: Array) -> Array:
    """Which coefficients do not change along the directions in which the fit does not change."""
    size = jnp.abs(null_space)
    largest = jnp.max(size, axis=0)
    if scaled.intercept:
        slopes = null_space[1:] / scaled.column_scale[:, None]
        parts = scaled.center[:, None] * slopes
        size = size.at[0].add(jnp.sum(jnp.abs(parts), axis=0))
        null_space = null_space.at[0].add(-jnp.sum(parts, axis=0))
    rounding = jnp.finfo(null_space.dtype).eps ** 0.5 * jnp.maximum(size, largest)
    return ~jnp.any(jnp.abs(null_space) > rounding, axis=1)


# Rows.


def design_rows(problem: Problem) -> Array:
    """(n, k) all rows q, 0 where dropped. Only for as many rows as may be copied."""
    if problem.design is not None:
        return problem.design
    q = (problem.X - problem.center) @ problem.slopes + problem.constants
    return q if problem.where is None else jnp.where(problem.where[:, None], q, 0)


@overload
def spaced_rows(kept: Array, n: int, count: int) -> Array: ...
@overload
def spaced_rows(kept: Array | None, n: int, count: int) -> slice | Array: ...
def spaced_rows(kept: Array | None, n: int, count: int) -> slice | Array:
    """About `count` of n rows at equal distances, of those that are kept; the index n is none."""
    if kept is None:
        return slice(None, None, -(-n // count))
    step = jnp.maximum(1, -(-jnp.sum(kept, dtype=jnp.int32) // count))
    chosen = kept & ((jnp.cumsum(kept, dtype=jnp.int32) - 1) % step == 0)
    return first_rows(chosen, min(n, count))


def first_rows(chosen: Array, count: int) -> Array:
    """The indices of the first `count` of the chosen rows; the index n is none."""
    ranks = jnp.cumsum(chosen, dtype=jnp.int32)
    return jnp.searchsorted(ranks, jnp.arange(1, count + 1, dtype=jnp.int32)).astype(jnp.int32)


def subset(problem: Problem, indices: slice | Array) -> Problem:
    """The same coordinates for some of the rows; an index past the last drops its row."""

    def select(x: Array | None) -> Array | None:
        return None if x is None else x[indices]

    where = select(problem.where)
    if not isinstance(indices, slice):
        inside = indices < len(problem.y)
        where = inside if where is None else where & inside
    return problem._replace(
        X=problem.X[indices],
        y=problem.y[indices],
        weights=select(problem.weights),
        where=where,
        design=select(problem.design),
    )


def dependent_columns(problem: Problem) -> Array:
    """(k,) which columns of q are 0, since they depend on the others."""
    return jnp.sum(jnp.abs(problem.slopes), axis=0) + jnp.abs(problem.constants) == 0


def predictions(problem: Problem, coefficients: Array) -> Array:
    """(n,) the prediction of each row by coefficients of x - center."""
    # Without the barrier, XLA makes only one of the two, which is slower.
    return lax.optimization_barrier(two_predictions(problem, coefficients, coefficients))[0]


def two_predictions(problem: Problem, c: Array, d: Array) -> tuple[Array, Array]:
    """(n,) the predictions by c and by d, in a third of the time that XLA's CPU takes for one."""
    # A product of matrices would first write one of them to memory. The barrier keeps XLA from
    # writing X - center to memory before a loop over many c.
    c, d, center = lax.optimization_barrier((c, d, problem.center))
    centered, first = problem.X - center, int(problem.intercept)
    sums = joint_sums(centered * c[first:], centered * d[first:], axis=1)
    by_c, by_d = (x + u[0] if problem.intercept else x for x, u in zip(sums, (c, d), strict=True))
    if problem.where is None:
        return by_c, by_d
    return jnp.where(problem.where, by_c, 0), jnp.where(problem.where, by_d, 0)


def row_lengths(problem: Problem) -> Array:
    """(n,) the length of each q."""
    k = len(problem.constants)
    columns = jax.vmap(problem.coefficients)(jnp.eye(k + k % 2, k, dtype=problem.X.dtype))

    def add(i: Array, squares: Array) -> Array:
        u, v = two_predictions(problem, columns[2 * i], columns[2 * i + 1])
        return squares + u * u + v * v

    return jnp.sqrt(lax.fori_loop(0, len(columns) // 2, add, jnp.zeros_like(problem.y)))


def sum_over_rows(problem: Problem, terms: Callable[..., Any], *vectors: Array) -> Any:
    """The sum of `terms(q, weights, *vectors)` over blocks of rows.

    `terms` takes the rows (m, k), their weights (m,) and the parts (m,) of the vectors; a row of
    weight 0 must add nothing. A block has rows from each of up to 64 groups, so that every device
    works on its own rows where the data are on several devices.
    """
    n = len(problem.y)
    groups = gcd(n, 64)
    length, height = n // groups, -(-_BLOCK // groups)
    if length <= height:
        return terms(design_rows(problem), problem.row_weights(), *vectors)

    def add(i: Array, total: Any) -> Any:
        start = jnp.minimum(i * height, length - height)

        def select(x: Array) -> Array:
            x = x.reshape(groups, length, *x.shape[1:])
            x = lax.dynamic_slice_in_dim(x, start, height, 1)
            return x.reshape(groups * height, *x.shape[2:])

        block = problem._replace(
            X=select(problem.X),
            y=jnp.zeros(groups * height, problem.y.dtype),
            weights=None if problem.weights is None else select(problem.weights),
            where=None if problem.where is None else select(problem.where),
        )
        # The last block starts with rows of the one before.
        new = jnp.tile(start + jnp.arange(height) >= i * height, groups)
        weights = jnp.where(new, block.row_weights(), 0)
        added = terms(design_rows(block), weights, *map(select, vectors))
        return jax.tree.map(jnp.add, total, added)

    one = subset(problem, slice(1))
    shapes = jax.eval_shape(terms, design_rows(one), one.row_weights(), *(x[:1] for x in vectors))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.fori_loop(0, -(-length // height), add, zero)


# Normal equations.


def gram(q: Array, weights: Array) -> Array:
    """`q' diag(weights) q`."""
    return (q * weights[:, None]).T @ q


def cross_product(q: Array, columns: Array) -> Array:
    """`q' columns`, for a step of a solver."""
    # XLA's CPU takes half the time where q' is in memory. All rows at once are the same in each
    # step, so that q' is written once for all steps; blocks of rows are not.
    all_rows = len(q) < _BLOCK
    return (lax.optimization_barrier(q.T) if all_rows else q.T) @ columns


def solve(gram: Array, right: Array) -> Array:
    """`gram b = right` for a gram that is positive definite but for columns of 0.

    The gram is first scaled to a diagonal of ones. So a direction that is determined by one row far
    out alone, or by the rows near the center alone, keeps its digits.
    """
    k = len(gram)
    diagonal = jnp.diagonal(gram)
    empty = ~(diagonal > 0)
    unit = jnp.where(empty, 1, lax.rsqrt(jnp.where(empty, 1, diagonal)))
    scaled = unit[:, None] * gram * unit
    ridge = jnp.where(empty, 1, k * jnp.finfo(gram.dtype).eps)
    factor = lax.linalg.cholesky(scaled + jnp.diag(ridge))
    columns = right.reshape(k, -1) * unit[:, None]
    solution = cho_solve((factor, True), columns) * unit[:, None]
    return solution.reshape(right.shape)


def coefficient_basis(problem: Problem) -> Array:
    """The matrix that takes b to the coefficients, up to the constant `y_center`."""
    if not problem.intercept:
        return problem.slopes
    return jnp.concatenate(
        [(problem.constants - problem.center @ problem.slopes)[None], problem.slopes]
    )


def in_user_units(problem: Problem, coefficients: Array) -> Array:
    """The coefficients of x in the units of y, the intercept first if there is one."""
    if not problem.intercept:
        return problem.y_unit * coefficients
    first = problem.y_center / problem.y_unit + coefficients[0] - coefficients[1:] @ problem.center
    return problem.y_unit * jnp.concatenate([first[None], coefficients[1:]])


def from_user_units(problem: Problem, given: Array) -> Array:
    """Coefficients of x - center that predict the same as coefficients in the user's units.

    Where columns depend on others, they are the smallest of those that do.
    """
    basis = problem.slopes * problem.column_scale[:, None]
    given = given / problem.y_unit
    if not problem.intercept:
        return problem.coefficients(jnp.linalg.pinv(basis) @ (given * problem.column_scale))
    basis = jnp.concatenate([problem.constants[None], basis])
    first = given[0] - problem.y_center / problem.y_unit + given[1:] @ problem.center
    given = jnp.concatenate([first[None], given[1:] * problem.column_scale])
    return problem.coefficients(jnp.linalg.pinv(basis) @ given)
