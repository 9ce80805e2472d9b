"""The simplex method on vertices: from one next to the optimum, along edges that lead down.

A vertex is named by its basis, k rows which are met exactly. From it lead 2 k edges, along each
of which one of them is no longer met.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss._numerics.columns import mean_size


class Others(NamedTuple):
    """What the rows that take no part add, each on a side that it is taken to stay on."""

    pull: Array
    """(k,) the sum of `level q` above and `(level - 1) q` below"""
    size: Array
    """(k,) of the terms of that sum"""
    value: Array
    """the sum of `level y` above and `(level - 1) y` below"""


class Basis(NamedTuple):
    """A vertex, and what its edges say."""

    rows: Array
    b: Array
    optimal: Array
    """no edge leads down"""
    alone: Array
    """no other row is met, so that the edges are all there is to look at"""
    unique: Array
    steps: Array


class _Seen(NamedTuple):
    """A vertex, and the slope along each of its edges, up and down."""

    rows: Array
    b: Array
    inverse: Array
    e: Array
    chance: Array
    """rows that are met without being in the basis"""
    slopes: Array
    noise: Array


class _At(NamedTuple):
    rows: Array
    taken: Array
    goes: Array
    optimal: Array
    seen: _Seen
    """the last vertex that was looked at"""


def simplex(
    a: Array,
    y: Array,
    kept: Array,
    level: Array,
    others: Others,
    near: Array,
    steps: ArrayLike = 200,
) -> Basis:
    """From the vertex next to `near`, along edges that lead down.

    To tell whether the optimum is unique, `near` must be where an interior point ended.
    """
    n, k = a.shape
    eps = jnp.finfo(y.dtype).eps
    empty = jnp.sum(a * a, axis=0) == 0
    # A column of 0 is met by a row of its own, which nothing else depends on.
    a = jnp.concatenate([a, jnp.diag(empty.astype(a.dtype))])
    y = jnp.concatenate([y, jnp.zeros(k, y.dtype)])
    kept = jnp.concatenate([kept, empty])
    level = jnp.asarray(level, y.dtype)

    def look(rows: Array) -> _Seen:
        square = a[rows]
        lu = jax.scipy.linalg.lu_factor(square)
        inverse = jax.scipy.linalg.lu_solve(lu, jnp.eye(k, dtype=a.dtype))
        b = inverse @ y[rows]
        b = b + inverse @ (y[rows] - square @ b)
        e = (y - a @ b).at[rows].set(0)
        met = jnp.abs(e) <= 16 * eps * (jnp.abs(y) + jnp.sum(jnp.abs(a) * jnp.abs(b), axis=1))
        e = jnp.where(met, 0, e)
        pull = jnp.where(met, 0, jnp.where(e > 0, level, level - 1))
        v = (a.T @ jnp.where(kept, pull, 0) + others.pull) @ inverse
        size = (
            jnp.sum(jnp.abs(a) * jnp.where(kept, jnp.abs(pull), 0)[:, None], axis=0) + others.size
        )
        size = size @ jnp.abs(inverse)
        # Rows that are met by chance have a slope of their own to either side.
        chance = (met & kept).at[rows].set(False)

        def of_chance() -> tuple[Array, Array]:
            move = jnp.where(chance[:, None], a @ inverse, 0)
            return quantile_loss(-move, level).sum(0), quantile_loss(move, level).sum(0)

        def none() -> tuple[Array, Array]:
            return jnp.zeros(k, a.dtype), jnp.zeros(k, a.dtype)

        up, down = lax.cond(jnp.any(chance), of_chance, none)
        slopes = jnp.stack([(1 - level) - v + up, level + v + down])
        return _Seen(rows, b, inverse, e, chance, slopes, 64 * eps * (size + 1))

    def walk(at: _At) -> _At:
        here = look(at.rows)
        side, j = jnp.unravel_index(jnp.argmin(here.slopes / here.noise), here.slopes.shape)
        downhill = here.slopes[side, j] < -here.noise[j]
        goes = downhill & (at.taken < steps)
        move = a @ here.inverse[:, j] * jnp.where(side == 0, 1, -1)
        slope = jnp.where(goes, here.slopes[side, j], jnp.inf)
        row = jnp.where(goes, _lowest(here.e, move, kept, slope), at.rows[j])
        rows = at.rows.at[j].set(row.astype(jnp.int32))
        return _At(rows, at.taken + goes, goes, ~downhill, here)

    start = _choose(a, y - a @ near, kept)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(look, start))
    begin = _At(start, jnp.int32(0), jnp.asarray(True), jnp.asarray(False), nothing)
    end = lax.while_loop(lambda at: at.goes, walk, begin)
    found = end.seen
    # An edge that is level and not of length 0 leads to other optima.
    blocked = jnp.any(found.chance[:, None] & (jnp.abs(a @ found.inverse) > eps), axis=0)
    unique = ~jnp.any((jnp.abs(found.slopes) <= found.noise) & ~blocked)
    # Where other rows are met too, edges are not all the ways that lead away; but an interior
    # point ends amid all optima, which is not a vertex if there are others.
    size = jnp.max(jnp.abs(found.b)) + mean_size(y, kept)
    off = jnp.max(jnp.abs(found.b - near))
    unique &= ~jnp.any(found.chance) | (off <= eps**0.5 * size)
    rows = jnp.where(found.rows < n, found.rows, n)
    return Basis(rows, found.b, end.optimal, ~jnp.any(found.chance), unique, end.taken)


def _lowest(e: Array, move: Array, kept: Array, slope: Array) -> Array:
    """The row where an edge stops to lead down; each that it meets adds to its slope."""
    turns = kept & (e * move > 0)
    ahead = jnp.where(turns, e / jnp.where(turns, move, 1), jnp.inf)

    def further(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        slope, ahead, _ = state
        i = jnp.argmin(ahead)
        slope = jnp.where(ahead[i] < jnp.inf, slope + jnp.abs(move[i]), jnp.inf)
        return slope, ahead.at[i].set(jnp.inf), i

    return lax.while_loop(lambda state: state[0] < 0, further, (slope, ahead, jnp.asarray(0)))[2]


def _choose(a: Array, e: Array, kept: Array) -> Array:
    """Rows that are nearly met and far from depending on each other, as many as columns."""
    n, k = a.shape
    scale = jnp.max(jnp.abs(e), where=kept, initial=0)
    info = jnp.finfo(e.dtype)
    pull = jnp.where(kept, 1 / (jnp.abs(e) + info.eps * scale + info.tiny), 0)

    def pick(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        left, rows, taken = state
        size = jnp.sum(left * left, axis=1)
        # What is left of a row that depends on those taken is rounding.
        apart = size > 1e-10 * jnp.sum(a * a, axis=1)
        row = jnp.argmax(jnp.where(apart & ~taken, jnp.sqrt(size) * pull, -1))
        direction = left[row] / jnp.sqrt(jnp.where(size[row] > 0, size[row], 1))
        left = left - (left @ direction)[:, None] * direction
        return left, rows.at[i].set(row.astype(jnp.int32)), taken.at[row].set(True)

    start = a, jnp.zeros(k, jnp.int32), jnp.zeros(n, bool)
    _, rows, _ = lax.fori_loop(0, k, pick, start)
    return rows


def quantile_loss(e: Array, level: Array) -> Array:
    """Of `e = y - q b`: level times what is above the fit, 1 - level times what is below."""
    return jnp.maximum(level * e, (level - 1) * e)
