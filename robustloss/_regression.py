"""A regression in coordinates in which its columns are of one size and close to orthogonal.

Every solver works on the rows q of a `Problem`, so none meets a column in unusual units, a large
mean or two columns that are nearly the same; one that depends on the others has become 0. Rows
are made when they are needed, a block at a time, so that no second copy of X is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_solve

from robustloss._numerics.columns import axes, factorised, largest, mean_size, middles_and_spreads
from robustloss._numerics.sums import joint_sums
from robustloss.losses._double import frexp, ldexp

_SAMPLE = 1024  # rows, enough to center and to scale a column by
_BLOCK = 16384  # rows, few enough for a cache


LossAtScale = Callable[[Array], Callable[..., Array]]
"""The loss at a scale."""


class Problem(NamedTuple):
    """Minimise over b what a loss makes of `y - q b`, `q = (X - center) slopes + constants`."""

    X: Array
    """(n, p), as given"""
    y: Array
    """(n,), less a constant if there is an intercept, in units of `unit`; 0 where dropped"""
    w: Array | None
    """(n,) weights, the largest 1, or None"""
    keep: Array | None
    """(n,) booleans, or None"""
    q: Array | None
    """(n, k) the rows, where they are few enough to be kept; None where they are made in blocks"""
    center: Array
    spread: Array
    """(p,) of the columns, robust"""
    slopes: Array
    constants: Array
    """(p, k) and (k,)"""
    middle: Array
    """what was taken from y, in its own units"""
    unit: Array
    """of y: 1, or a power of 2 where squares of y would leave the range of its type"""
    size: Array
    """of y in this unit, robust: what rounding is relative to"""
    rank: Array
    told: Array
    """(k,) which coefficients the data tell from the others"""
    intercept: bool

    def each(self) -> Array:
        """The weight of each row, 0 where dropped."""
        w = jnp.ones_like(self.y) if self.w is None else self.w
        return w if self.keep is None else jnp.where(self.keep, w, 0)

    def counted(self) -> Array | None:
        """Which rows have a weight; None for all, which XLA should not find out by counting."""
        return None if self.w is None and self.keep is None else self.each() > 0

    def typical_size(self, b: Array) -> Array:
        """Of the terms that a typical prediction is the sum of."""
        return self.spread @ (jnp.abs(self.slopes) @ jnp.abs(b)) + jnp.abs(self.constants @ b)


class Estimate(NamedTuple):
    """Where a solver ended."""

    b: Array
    scale: Array
    residuals: Array
    """q b - y, as a loss takes them"""
    converged: Array
    steps: Array


def problem(
    X: Array,
    y: Array,
    keep: Array | None,
    w: Array | None,
    intercept: bool,
    *,
    in_units: bool = True,
) -> Problem:
    """X is (n, p) and y is (n,), both floating and at least float32.

    `in_units`: y may be divided by a power of 2, for a loss whose delta is in units of y.
    """
    n, p = X.shape
    y = y if keep is None else jnp.where(keep, y, 0)
    some = spaced(keep, n, _SAMPLE)
    kept = None
    if keep is not None and not isinstance(some, slice):
        kept = keep[some] & (some < n)
    # Of most of the rows: one wild entry must not flatten the others.
    table = jnp.concatenate([X[some], y[some, None]], axis=1)
    middles, spreads = middles_and_spreads(table, kept, intercept)
    center, middle, spread, size = middles[:p], middles[p], spreads[:p], spreads[p]
    spread = jnp.where(spread > 0, spread, largest(X, center, keep, spread))
    size = jnp.where(size > 0, size, mean_size(table[:, p] - middle, kept))
    unit = _unit(size) if in_units else jnp.ones_like(size)
    size, y = size / unit, y * (1 / unit)
    y = y - middle / unit if intercept else y
    y = y if keep is None else jnp.where(keep, y, 0)

    per_column = jnp.diag(1 / spread)
    k = p + intercept
    if intercept:
        per_column = jnp.concatenate([jnp.zeros((p, 1), X.dtype), per_column], axis=1)
    first = jnp.zeros(k, X.dtype).at[0].set(1.0) if intercept else jnp.zeros(k, X.dtype)
    raw = Problem(
        X, y, w, keep, None, center, spread, per_column, first, middle, unit, size, jnp.int32(k),
        jnp.ones(k, bool), intercept,
    )  # fmt: skip

    def bounded(z: Array, each: Array) -> Array:
        return (each > 0) / (1 + jnp.sum(z * z, axis=1) / k)

    def terms(z: Array, each: Array) -> tuple[Array, Array]:
        each = bounded(z, each)
        return gram(z, each), jnp.sum(each)

    # All rows at once can be factorised where their gram has too few digits.
    z = rows(raw) if n < _BLOCK else None
    normal, total = sums(raw, terms)
    diagonal = jnp.sqrt(jnp.maximum(jnp.diagonal(normal), 0))
    diagonal = jnp.where(diagonal > 0, diagonal, 1)
    scaled = normal / (diagonal[:, None] * diagonal)
    root = jnp.sqrt(total)
    if z is None:
        basis, free, rank = axes(scaled)
        q = None
    else:
        each = bounded(z, raw.each())
        noise = jnp.ones_like(first)
        noise = noise.at[intercept:].add(jnp.abs(center) / spread) * jnp.finfo(X.dtype).eps
        root_each = jnp.sqrt(each)[:, None]
        basis, free, rank, q = factorised(scaled, z / diagonal, root_each, noise)
        q = q * root
    basis = basis * (root / diagonal[:, None])
    free = free / diagonal[:, None]
    return raw._replace(
        q=q,
        slopes=per_column @ basis,
        constants=first @ basis,
        rank=rank,
        told=_told(raw, free),
    )


def _unit(size: Array) -> Array:
    """A power of 2 next to the size of y, or 1 where squares of y are well within range."""
    info = jnp.finfo(size.dtype)
    ordinary = (size > 2.0 ** (info.minexp // 3)) & (size < 2.0 ** (info.maxexp // 3))
    _, exponent = frexp(lax.stop_gradient(size))
    exponent = jnp.clip(exponent, info.minexp // 2 - info.maxexp // 3, info.maxexp - 2)
    return jnp.where(ordinary | ~(size > 0), 1, ldexp(jnp.ones_like(size), exponent))


def _told(raw: Problem, free: Array) -> Array:
    """Which coefficients stay what they are along directions in which the fit does not change."""
    size = jnp.abs(free)
    largest = jnp.max(size, axis=0)
    if raw.intercept:
        slopes = free[1:] / raw.spread[:, None]
        parts = raw.center[:, None] * slopes
        size = size.at[0].add(jnp.sum(jnp.abs(parts), axis=0))
        free = free.at[0].add(-jnp.sum(parts, axis=0))
    noise = jnp.finfo(free.dtype).eps ** 0.5 * jnp.maximum(size, largest)
    return ~jnp.any(jnp.abs(free) > noise, axis=1)


def rows(of: Problem) -> Array:
    """All q, 0 where dropped: for as many rows as may be copied."""
    if of.q is not None:
        return of.q
    q = (of.X - of.center) @ of.slopes + of.constants
    return q if of.keep is None else jnp.where(of.keep[:, None], q, 0)


@overload
def spaced(keep: Array, n: int, count: int) -> Array: ...
@overload
def spaced(keep: Array | None, n: int, count: int) -> slice | Array: ...
def spaced(keep: Array | None, n: int, count: int) -> slice | Array:
    """About `count` of n rows at equal distances, of those that are kept; n stands for none."""
    if keep is None:
        return slice(None, None, -(-n // count))
    step = jnp.maximum(1, -(-jnp.sum(keep, dtype=jnp.int32) // count))
    chosen = keep & ((jnp.cumsum(keep, dtype=jnp.int32) - 1) % step == 0)
    return first(chosen, min(n, count))


def first(chosen: Array, count: int) -> Array:
    """Where the first `count` of those chosen are; n stands for none."""
    upto = jnp.cumsum(chosen, dtype=jnp.int32)
    return jnp.searchsorted(upto, jnp.arange(1, count + 1, dtype=jnp.int32)).astype(jnp.int32)


def part(of: Problem, which: slice | Array) -> Problem:
    """The same coordinates for some of the rows; an index past the last drops its row."""

    def these(x: Array | None) -> Array | None:
        return None if x is None else x[which]

    keep = these(of.keep)
    if not isinstance(which, slice):
        inside = which < len(of.y)
        keep = inside if keep is None else keep & inside
    return of._replace(X=of.X[which], y=of.y[which], w=these(of.w), keep=keep, q=these(of.q))


def dependent_columns(of: Problem) -> Array:
    """Which columns of q are 0, since they depend on the others."""
    return jnp.sum(jnp.abs(of.slopes), axis=0) + jnp.abs(of.constants) == 0


def predictions(of: Problem, b: Array) -> Array:
    """`q b` of each row."""
    return lax.optimization_barrier(both_predictions(of, b, b))[0]  # or XLA makes but one, slower


def both_predictions(of: Problem, b: Array, v: Array) -> tuple[Array, Array]:
    """`q b` and `q v` of each row, in a third of the time that XLA's CPU takes for one."""
    # Not a product of matrices, of which one would have to be written first; nor may XLA write
    # X - center before a loop over many b.
    b, v, center = lax.optimization_barrier((b, v, of.center))
    moved = of.X - center
    sums = joint_sums(moved * (of.slopes @ b), moved * (of.slopes @ v), axis=1)
    both = (each + of.constants @ x for each, x in zip(sums, (b, v), strict=True))
    first, second = (x if of.keep is None else jnp.where(of.keep, x, 0) for x in both)
    return first, second


def lengths(of: Problem) -> Array:
    """The length of each q."""
    k = len(of.constants)
    axes = jnp.eye(k + k % 2, k, dtype=of.X.dtype)

    def add(i: Array, squares: Array) -> Array:
        u, v = both_predictions(of, axes[2 * i], axes[2 * i + 1])
        return squares + u * u + v * v

    return jnp.sqrt(lax.fori_loop(0, len(axes) // 2, add, jnp.zeros_like(of.y)))


def sums(of: Problem, terms: Callable[..., Any], *vectors: Array) -> Any:
    """What `terms(q, each, *vectors)` makes of the rows, added up over blocks of them.

    It must be a sum that a row with the weight 0 in `each` has no part in. A block has rows from
    each of up to 64 groups, so that every device has its own where they are on several.
    """
    n = len(of.y)
    groups = gcd(n, 64)
    length, height = n // groups, -(-_BLOCK // groups)
    if length <= height:
        return terms(rows(of), of.each(), *vectors)

    def block(i: Array, total: Any) -> Any:
        first = jnp.minimum(i * height, length - height)

        def here(x: Array) -> Array:
            x = x.reshape(groups, length, *x.shape[1:])
            x = lax.dynamic_slice_in_dim(x, first, height, 1)
            return x.reshape(groups * height, *x.shape[2:])

        these = of._replace(
            X=here(of.X),
            y=jnp.zeros(groups * height, of.y.dtype),
            w=None if of.w is None else here(of.w),
            keep=None if of.keep is None else here(of.keep),
        )
        # The last block starts with rows of the one before.
        new = jnp.tile(first + jnp.arange(height) >= i * height, groups)
        added = terms(rows(these), jnp.where(new, these.each(), 0), *map(here, vectors))
        return jax.tree.map(jnp.add, total, added)

    one = part(of, slice(1))
    shapes = jax.eval_shape(terms, rows(one), one.each(), *(x[:1] for x in vectors))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.fori_loop(0, -(-length // height), block, nothing)


def gram(q: Array, w: Array) -> Array:
    """`q' diag(w) q`."""
    return (q * w[:, None]).T @ q


def crossed(q: Array, columns: Array) -> Array:
    """`q' columns`, for a step of a solver."""
    # XLA's CPU takes half the time where q' is in memory. All rows at once are the same in each
    # step, so that it is written there once; blocks of them are not.
    whole = len(q) < _BLOCK
    return (lax.optimization_barrier(q.T) if whole else q.T) @ columns


def solve(gram: Array, right: Array) -> Array:
    """`gram b = right` for a gram that is positive definite but for columns of 0.

    The gram is scaled to a diagonal of ones first: a direction that only one row far out tells,
    or only the rows near the middle, keeps its digits.
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


def raw_basis(of: Problem) -> Array:
    """The matrix that takes b to the coefficients, but for the constant `middle`."""
    if not of.intercept:
        return of.slopes
    return jnp.concatenate([(of.constants - of.center @ of.slopes)[None], of.slopes])


def coefficients(of: Problem, b: Array) -> Array:
    """In the units of the user, the intercept first if there is one."""
    slopes = of.slopes @ b
    if not of.intercept:
        return of.unit * slopes
    first = of.middle / of.unit + of.constants @ b - slopes @ of.center
    return of.unit * jnp.concatenate([first[None], slopes])


def from_coefficients(of: Problem, given: Array) -> Array:
    """The b of coefficients in the user's units."""
    basis = of.slopes * of.spread[:, None]
    given = given / of.unit
    if not of.intercept:
        return jnp.linalg.pinv(basis) @ (given * of.spread)
    basis = jnp.concatenate([of.constants[None], basis])
    first = given[0] - of.middle / of.unit + given[1:] @ of.center
    return jnp.linalg.pinv(basis) @ jnp.concatenate([first[None], given[1:] * of.spread])
