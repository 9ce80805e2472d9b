"""The simplex method: from a vertex next to the optimum, along edges that lead down.

A vertex is named by its basis: k rows which are met exactly. From a vertex lead 2 k edges. Along
each edge one row of the basis is no longer met, and is above or below the fit.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss._numerics.columns import mean_size
from robustloss._regression import solve
from robustloss.linear.quantile.program import Program, quantile_loss

PIVOTS = 200  # after an interior point a few are usual
# Units of rounding. A residual is a sum of k + 1 terms, a slope a sum of all rows; the factors are
# wide enough for the sums and the solution with the basis, in the hostile data of the tests.
_RESIDUAL_ROUNDING = 16
_SLOPE_ROUNDING = 64
# A row of the basis must keep more than this part of its squared length when the rows chosen before
# are projected out: what is left of a row that depends on them is rounding.
_INDEPENDENT = 1e-10


class Vertex(NamedTuple):
    """Where the simplex method ended."""

    rows: Array
    """(k,) basis; the index n for a column of 0"""
    b: Array
    """(k,) coefficients"""
    optimal: Array
    """no edge leads down"""
    nondegenerate: Array
    """no row outside of the basis is met, so that the edges are all directions to look at"""
    unique: Array
    """no other optimum was seen"""
    pivots: Array


class _Edges(NamedTuple):
    """A vertex, and the slope of the objective along each of its edges."""

    rows: Array
    """(k,) basis"""
    b: Array
    """(k,)"""
    inverse: Array
    """(k, k) of the rows of the basis; its columns are the directions of the edges"""
    residuals: Array
    """(n,) y - a b, exactly 0 where met"""
    degenerate: Array
    """(n,) rows that are met without being in the basis"""
    slopes: Array
    """(2, k) along each column of the inverse, and against it"""
    rounding: Array
    """(k,) how far rounding may change a slope"""


class _State(NamedTuple):
    rows: Array  # the basis whose edges are examined next
    pivots: Array
    moved: Array
    optimal: Array
    edges: _Edges  # of the vertex examined last


def simplex(program: Program, interior: Array, pivots: ArrayLike = PIVOTS) -> Vertex:
    """The optimal vertex, from the one next to the coefficients `interior`.

    To tell whether the optimum is unique, `interior` must be where an interior point ended.
    """
    n = len(program.y)
    extended = _with_rows_for_empty_columns(program)
    start = _initial_basis(extended, interior)
    shapes = jax.eval_shape(partial(_edges, extended), start)
    no_edges = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    begin = _State(start, jnp.int32(0), jnp.asarray(True), jnp.asarray(False), no_edges)
    end = lax.while_loop(
        lambda at: at.moved, lambda at: _pivot(extended, at, at.pivots < pivots), begin
    )
    edges = end.edges
    return Vertex(
        jnp.where(edges.rows < n, edges.rows, n),
        edges.b,
        end.optimal,
        ~jnp.any(edges.degenerate),
        _is_unique(extended, edges, interior),
        end.pivots,
    )


def vertex_shift(a: Array, added: Array, basis: Array) -> Array:
    """How far the vertex of this basis moves where `added` is added to y."""
    inside = basis < len(a)
    square, right = (jnp.where(inside, x[basis].T, 0).T for x in (a, added))
    empty = jnp.sum(a * a, axis=0) == 0
    return solve(square.T @ square + jnp.diag(empty.astype(a.dtype)), square.T @ right)


def _with_rows_for_empty_columns(program: Program) -> Program:
    """With k more rows: a column of 0 is met by a row of its own, which no other row depends on."""
    a, y, kept, level, _ = program
    empty = jnp.sum(a * a, axis=0) == 0
    return program._replace(
        a=jnp.concatenate([a, jnp.diag(empty.astype(a.dtype))]),
        y=jnp.concatenate([y, jnp.zeros(len(empty), y.dtype)]),
        kept=jnp.concatenate([kept, empty]),
        level=jnp.asarray(level, y.dtype),
    )


def _edges(program: Program, rows: Array) -> _Edges:
    """The vertex of a basis and the slopes along its edges."""
    a, y, kept, level, fixed = program
    k, eps = a.shape[1], jnp.finfo(y.dtype).eps
    square = a[rows]
    lu = jax.scipy.linalg.lu_factor(square)
    inverse = jax.scipy.linalg.lu_solve(lu, jnp.eye(k, dtype=a.dtype))
    b = inverse @ y[rows]
    b = b + inverse @ (y[rows] - square @ b)
    e = (y - a @ b).at[rows].set(0)
    terms = jnp.abs(y) + jnp.sum(jnp.abs(a) * jnp.abs(b), axis=1)
    met = jnp.abs(e) <= _RESIDUAL_ROUNDING * eps * terms
    e = jnp.where(met, 0, e)
    slope = jnp.where(met | ~kept, 0, jnp.where(e > 0, level, level - 1))
    gradient = (a.T @ slope + fixed.gradient) @ inverse
    size = jnp.sum(jnp.abs(a) * jnp.abs(slope)[:, None], axis=0) + fixed.gradient_size
    size = size @ jnp.abs(inverse)
    degenerate = (met & kept).at[rows].set(False)

    # The loss of a row that is met rises in both directions.
    def rises() -> tuple[Array, Array]:
        move = jnp.where(degenerate[:, None], a @ inverse, 0)
        return quantile_loss(-move, level).sum(0), quantile_loss(move, level).sum(0)

    def no_rises() -> tuple[Array, Array]:
        return jnp.zeros(k, a.dtype), jnp.zeros(k, a.dtype)

    up, down = lax.cond(jnp.any(degenerate), rises, no_rises)
    slopes = jnp.stack([(1 - level) - gradient + up, level + gradient + down])
    return _Edges(rows, b, inverse, e, degenerate, slopes, _SLOPE_ROUNDING * eps * (size + 1))


def _pivot(program: Program, at: _State, may_move: Array) -> _State:
    """Moves along the steepest edge, relative to rounding, to the lowest point on it."""
    edges = _edges(program, at.rows)
    side, j = jnp.unravel_index(jnp.argmin(edges.slopes / edges.rounding), edges.slopes.shape)
    downhill = edges.slopes[side, j] < -edges.rounding[j]
    moved = downhill & may_move
    move = program.a @ edges.inverse[:, j] * jnp.where(side == 0, 1, -1)
    slope = jnp.where(moved, edges.slopes[side, j], jnp.inf)
    entering = _entering_row(edges.residuals, move, program.kept, slope)
    entering = jnp.where(moved, entering, at.rows[j])
    rows = at.rows.at[j].set(entering.astype(jnp.int32))
    return _State(rows, at.pivots + moved, moved, ~downhill, edges)


def _entering_row(e: Array, move: Array, kept: Array, slope: Array) -> Array:
    """The row at which an edge no longer leads down; each row it crosses adds to its slope."""
    crossed = kept & (e * move > 0)
    distances = jnp.where(crossed, e / jnp.where(crossed, move, 1), jnp.inf)

    def cross_next(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        slope, distances, _ = state
        i = jnp.argmin(distances)
        slope = jnp.where(distances[i] < jnp.inf, slope + jnp.abs(move[i]), jnp.inf)
        return slope, distances.at[i].set(jnp.inf), i

    begin = (slope, distances, jnp.asarray(0))
    return lax.while_loop(lambda state: state[0] < 0, cross_next, begin)[2]


def _initial_basis(program: Program, interior: Array) -> Array:
    """k rows that are nearly met and far from depending on each other."""
    a, y, kept, _, _ = program
    (n, k), info = a.shape, jnp.finfo(y.dtype)
    e = y - a @ interior
    size = jnp.max(jnp.abs(e), where=kept, initial=0)
    preference = jnp.where(kept, 1 / (jnp.abs(e) + info.eps * size + info.tiny), 0)

    def choose(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        remainder, rows, taken = state
        square = jnp.sum(remainder * remainder, axis=1)
        independent = square > _INDEPENDENT * jnp.sum(a * a, axis=1)
        row = jnp.argmax(jnp.where(independent & ~taken, jnp.sqrt(square) * preference, -1))
        direction = remainder[row] / jnp.sqrt(jnp.where(square[row] > 0, square[row], 1))
        remainder = remainder - (remainder @ direction)[:, None] * direction
        return remainder, rows.at[i].set(row.astype(jnp.int32)), taken.at[row].set(True)

    begin = a, jnp.zeros(k, jnp.int32), jnp.zeros(n, bool)
    return lax.fori_loop(0, k, choose, begin)[1]


def _is_unique(program: Program, edges: _Edges, interior: Array) -> Array:
    """Whether no edge is level, and the interior point ended at the vertex."""
    eps = jnp.finfo(program.y.dtype).eps
    # A level edge leads to other optima, unless a degenerate row ends it at once.
    moves = jnp.abs(program.a @ edges.inverse) > eps
    blocked = jnp.any(edges.degenerate[:, None] & moves, axis=0)
    unique = ~jnp.any((jnp.abs(edges.slopes) <= edges.rounding) & ~blocked)
    # At a degenerate vertex the edges are not all directions. But an interior point ends in the
    # middle of all optima, which is no vertex if there are several.
    size = jnp.max(jnp.abs(edges.b)) + mean_size(program.y, program.kept)
    distance = jnp.max(jnp.abs(edges.b - interior))
    return unique & (~jnp.any(edges.degenerate) | (distance <= eps**0.5 * size))
