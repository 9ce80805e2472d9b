"""Quantile regression, exactly: an interior point that ends on a vertex.

The problem is a linear one. Frisch and Newton's method, a primal and dual interior point in
Mehrotra's predictor-corrector form, comes near the optimum in some twenty steps, whatever the
number of rows. The rows it nearly meets then name a vertex, that is k rows which are met
exactly; the simplex method makes sure that no edge leads further down; and the dual point says
how far below any other coefficients could be.

Where rows are many, only those near the fit take part. The others are counted as being above or
below it, and once more, about the new fit, if one turns out to be on the other side.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss.linear._problem import Problem, gram, part, predictions, rows, solve, spaced, sums
from robustloss.linear.irls import least_squares, thinned
from robustloss.scale import smallest

_MANY = 2**16  # rows
_ROUNDS = 12


class Vertex(NamedTuple):
    """The optimum, and whether it is the only one."""

    b: Array
    residuals: Array
    """q b - y, exactly 0 in the rows that are met"""
    unique: Array
    converged: Array
    steps: Array


class _Others(NamedTuple):
    """What the rows that take no part add, each on a side that it is taken to stay on."""

    pull: Array
    """(k,) the sum of `level q` above and `(level - 1) q` below"""
    size: Array
    """(k,) of the terms of that sum"""
    value: Array
    """the sum of `level y` above and `(level - 1) y` below"""


class _Basis(NamedTuple):
    rows: Array
    b: Array
    optimal: Array
    unique: Array
    steps: Array


def quantile_fit(of: Problem, level: Array) -> Vertex:
    """The b that minimises the quantile loss at `level`. Portnoy and Koenker (1997)."""
    n, k = len(of.y), len(of.constants)
    each = of.each()
    unit = jnp.max(each)
    each = each / jnp.where(unit > 0, unit, 1)
    tolerance = float(jnp.finfo(of.y.dtype).eps)
    if n < _MANY:
        zero = jnp.zeros(k, of.y.dtype)
        nobody = _Others(zero, zero, jnp.zeros_like(of.size))
        a, y = each[:, None] * rows(of), each * of.y
        b, bound, taken = _frisch_newton(
            a, y, each > 0, level, nobody, least_squares(of), tolerance
        )
        found = _simplex(a, y, each > 0, level, nobody, b)
        residuals, settled = of.y - predictions(of, found.b), jnp.asarray(True)
        taken = taken + found.steps
    else:
        found, residuals, bound, taken, settled = _in_rounds(of, each, level, tolerance)
    residuals = residuals.at[found.rows].set(0, mode="drop")
    value = jnp.sum(_loss(each * residuals, level))
    # Sums of as many terms as there are rows, each rounded.
    slack = tolerance**0.75 * value + 64 * tolerance * jnp.sum(jnp.abs(each * of.y))
    optimal = settled & found.optimal & (value - bound <= slack) & jnp.all(jnp.isfinite(found.b))
    return Vertex(found.b, -residuals, found.unique, optimal, taken)


def _in_rounds(
    of: Problem, each: Array, level: Array, tolerance: float
) -> tuple[_Basis, Array, Array, Array, Array]:
    """With an eighth of the rows: first any, to see where the others are, then the nearest."""
    n, k = len(of.y), len(of.constants)
    count = max(_MANY // 2, n // 8)

    class State(NamedTuple):
        found: _Basis
        residuals: Array
        bound: Array
        steps: Array
        rounds: Array
        settled: Array

    def nearest(residuals: Array) -> tuple[Array, Array]:
        distance = jnp.where(each > 0, jnp.abs(residuals), jnp.inf)
        near = (distance <= smallest(distance, count)) & (each > 0)
        (which,) = jnp.nonzero(near, size=count, fill_value=n)
        return which.astype(jnp.int32), (each > 0).at[which].set(False, mode="drop")

    def pulls(q: Array, each: Array, side: Array, y: Array) -> _Others:
        pull = side * each
        return _Others(q.T @ pull, jnp.abs(q).T @ jnp.abs(pull), jnp.sum(pull * y))

    def round(at: State) -> State:
        first = at.rounds == 0
        which, out = nearest(at.residuals)
        which = jnp.where(first, any_rows, which)
        side = jnp.where(at.residuals >= 0, level, level - 1)
        pull = jnp.where(out & ~first, side * each, 0)
        others = sums(of, pulls, pull, of.y)
        near = part(of, which)
        w = jnp.where(which < n, each[which], 0)
        a, y, kept = w[:, None] * rows(near), w * near.y, w > 0
        b, bound, steps = _frisch_newton(
            a, y, kept, level, others, at.found.b, jnp.where(first, 1e-4, tolerance)
        )
        found = _simplex(a, y, kept, level, others, b, jnp.where(first, 0, 200))
        residuals = of.y - predictions(of, found.b)
        # A row that is met may count as on either side.
        noise = 64 * tolerance * (jnp.abs(of.y) + of.size)
        astray = out & (residuals * jnp.sign(side) < -noise)
        return State(
            found._replace(rows=jnp.where(found.rows < count, which[found.rows], n)),
            residuals,
            bound + others.value,
            at.steps + steps + found.steps,
            at.rounds + 1,
            ~first & ~jnp.any(astray),
        )

    any_rows = spaced(each > 0, n, count)
    start = least_squares(thinned(of) or of)
    no = jnp.asarray(False)
    zero = jnp.int32(0)
    begin = State(
        _Basis(jnp.zeros(k, jnp.int32), start, no, no, zero), of.y, jnp.zeros_like(of.size),
        zero, zero, no,
    )  # fmt: skip
    end = lax.while_loop(lambda at: ~at.settled & (at.rounds < _ROUNDS), round, begin)
    return end.found, end.residuals, end.bound, end.steps, end.settled


def _loss(e: Array, level: Array) -> Array:
    return jnp.maximum(level * e, (level - 1) * e)


class _Interior(NamedTuple):
    x: Array
    s: Array
    b: Array
    z: Array
    w: Array
    gap: Array
    steps: Array


def _frisch_newton(
    a: Array,
    y: Array,
    kept: Array,
    level: Array,
    others: _Others,
    start: Array,
    tolerance: ArrayLike,
    steps: int = 100,
) -> tuple[Array, Array, Array]:
    """b next to the optimum, and what no other b can be below.

    The dual: maximise y'x - (1 - level) y'1 over 0 <= x <= 1 with a'x = (1 - level) a'1, less
    what others pull; z and w are what is left of the inequalities, z - w = a b - y.
    """
    n = jnp.sum(kept)
    right = (1 - level) * jnp.sum(a, axis=0) - others.pull
    # A row that is dropped takes no part: its x stays where it is.
    r = a @ start - y
    size = jnp.max(jnp.abs(r), where=kept, initial=0)
    size = jnp.where(size > 0, size, 1)
    tiny = 1e-3 * jnp.mean(jnp.abs(r)) + jnp.finfo(y.dtype).eps * size
    z = jnp.maximum(r, 0) + jnp.where(kept, tiny, 0)
    w = z - r
    x = jnp.full_like(y, 1 - level)

    def lengths(at: _Interior, dx: Array, dz: Array, dw: Array) -> tuple[Array, Array]:
        def room(v: Array, dv: Array) -> Array:
            falls = kept & (dv < 0)
            return jnp.min(jnp.where(falls, -v / jnp.where(falls, dv, -1), jnp.inf))

        primal = jnp.minimum(room(at.x, dx), room(at.s, -dx))
        dual = jnp.minimum(room(at.z, dz), room(at.w, dw))
        return jnp.minimum(0.99995 * primal, 1), jnp.minimum(0.99995 * dual, 1)

    def total(v: Array) -> Array:
        return jnp.sum(jnp.where(kept, v, 0))

    def step(at: _Interior) -> _Interior:
        q = jnp.where(kept, 1 / (at.z / at.x + at.w / at.s), 0)
        r = at.z - at.w
        normal = gram(a, q)
        missing = right - a.T @ jnp.where(kept, at.x, 1 - level)
        # Predict. With r = a b - y, what moves b by db moves z - w by a db.
        db = -solve(normal, a.T @ (q * r) + missing)
        dx = -q * (a @ db + r)
        dz, dw = -at.z * (1 + dx / at.x), -at.w * (1 - dx / at.s)
        fx, fz = lengths(at, dx, dz, dw)
        # Correct, towards the central path.
        gap = total(at.x * at.z + at.s * at.w)
        left = total((at.x + fx * dx) * (at.z + fz * dz) + (at.s - fx * dx) * (at.w + fz * dw))
        mu = left * (left / gap) ** 2 / (2 * n)
        curve_x, curve_s = dx * dz, -dx * dw
        push = jnp.where(kept, mu * (1 / at.x - 1 / at.s) - curve_x / at.x + curve_s / at.s, 0)
        db = -solve(normal, a.T @ (q * (r - push)) + missing)
        dx = -q * (a @ db + r - push)
        dz = (mu - curve_x - at.z * dx) / at.x - at.z
        dw = (mu - curve_s + at.w * dx) / at.s - at.w
        fx, fz = lengths(at, dx, dz, dw)
        x, s, z, w = at.x + fx * dx, at.s - fx * dx, at.z + fz * dz, at.w + fz * dw
        b = at.b + fz * db
        gap = total(x * z + s * w)
        new = _Interior(x, s, b, z, w, gap, at.steps + 1)
        # Where rounding has the last word, the gap is no longer a number.
        sound = jnp.isfinite(gap) & (gap >= 0)
        return jax.tree.map(lambda v, u: jnp.where(sound, v, u), new, at._replace(gap=-at.gap))

    value = jnp.sum(_loss(-r, level))

    def goes_on(at: _Interior) -> Array:
        now = jnp.sum(_loss(y - a @ at.b, level))
        small = at.gap <= tolerance * (now + tolerance * value)
        return ~small & (at.steps < steps) & (at.gap > 0)

    s = 1 - x
    begin = _Interior(x, s, start, z, w, total(x * z + s * w), jnp.int32(0))
    end = lax.while_loop(goes_on, step, begin)
    bound = jnp.sum(jnp.where(kept, (end.x - (1 - level)) * y, 0))
    return end.b, bound, end.steps


def _simplex(
    a: Array,
    y: Array,
    kept: Array,
    level: Array,
    others: _Others,
    near: Array,
    steps: ArrayLike = 200,
) -> _Basis:
    """From the vertex next to `near`, along edges that lead down."""
    n, k = a.shape
    eps = jnp.finfo(y.dtype).eps
    empty = jnp.sum(a * a, axis=0) == 0
    # A column of 0 is met by a row of its own, which nothing else depends on.
    a = jnp.concatenate([a, jnp.diag(empty.astype(a.dtype))])
    y = jnp.concatenate([y, jnp.zeros(k, y.dtype)])
    kept = jnp.concatenate([kept, empty])
    level = jnp.asarray(level, y.dtype)

    def residuals(rows: Array) -> tuple[Array, Array, Array]:
        square = a[rows]
        lu = jax.scipy.linalg.lu_factor(square)
        b = jax.scipy.linalg.lu_solve(lu, y[rows])
        b = b + jax.scipy.linalg.lu_solve(lu, y[rows] - square @ b)
        inverse = jax.scipy.linalg.lu_solve(lu, jnp.eye(k, dtype=a.dtype))
        return b, inverse, (y - a @ b).at[rows].set(0)

    def edges(rows: Array) -> tuple[Array, ...]:
        """The slope along each edge, up and down, and what is needed to walk along one."""
        b, inverse, e = residuals(rows)
        met = jnp.abs(e) <= 16 * eps * (jnp.abs(y) + jnp.abs(a) @ jnp.abs(b))
        e = jnp.where(met, 0, e)
        inside = jnp.zeros(n + k, bool).at[rows].set(True)
        pull = jnp.where(met, 0, jnp.where(e > 0, level, level - 1))
        v = (a.T @ jnp.where(kept, pull, 0) + others.pull) @ inverse
        size = jnp.abs(a).T @ jnp.where(kept, jnp.abs(pull), 0) + others.size
        size = size @ jnp.abs(inverse)
        # Rows that are met by chance have a slope of their own to either side.
        chance = met & ~inside & kept

        def of_chance() -> tuple[Array, Array]:
            move = jnp.where(chance[:, None], a @ inverse, 0)
            return _loss(-move, level).sum(0), _loss(move, level).sum(0)

        def none() -> tuple[Array, Array]:
            return jnp.zeros(k, a.dtype), jnp.zeros(k, a.dtype)

        up, down = lax.cond(jnp.any(chance), of_chance, none)
        slopes = jnp.stack([(1 - level) - v + up, level + v + down])
        return slopes, 64 * eps * (size + 1), b, inverse, e

    def walk(at: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rows, taken, _ = at
        slopes, noise, _, inverse, e = edges(rows)
        side, j = jnp.unravel_index(jnp.argmin(slopes / noise), slopes.shape)
        downhill = slopes[side, j] < -noise[j]
        move = a @ inverse[:, j] * jnp.where(side == 0, 1, -1)
        slope = jnp.where(downhill, slopes[side, j], jnp.inf)
        row = jnp.where(downhill, _lowest(e, move, kept, slope), rows[j])
        return rows.at[j].set(row.astype(jnp.int32)), taken + 1, ~downhill

    start = _choose(a, y - a @ near, kept)
    rows, taken, rest = lax.while_loop(
        lambda at: ~at[2] & (at[1] < steps), walk, (start, jnp.int32(0), jnp.asarray(False))
    )
    slopes, noise, b, inverse, e = edges(rows)
    # An edge that is level and not of length 0 leads to other optima.
    chance = kept & (e == 0) & ~jnp.zeros(n + k, bool).at[rows].set(True)
    blocked = jnp.any(chance[:, None] & (jnp.abs(a @ inverse) > eps), axis=0)
    level_edges = (jnp.abs(slopes) <= noise) & ~blocked
    unique = ~jnp.any(level_edges)
    return _Basis(jnp.where(rows < n, rows, n), b, rest, unique, taken)


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
