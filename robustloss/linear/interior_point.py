"""Quantile regression, exactly: an interior point that ends on a vertex.

The problem is a linear one. Frisch and Newton's method, a primal and dual interior point in
Mehrotra's predictor-corrector form, comes near the optimum in some twenty steps, whatever the
number of rows. The rows it nearly meets then name a vertex, that is k rows which are met
exactly; the simplex method makes sure that no edge leads further down; and where more rows are met
by chance, the dual point says how far below any other coefficients could be.

Where rows are many, only those near the fit take part. The others are counted as being above or
below it, and once more, about the new fit, if one turns out to be on the other side.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss._order_statistics import smallest
from robustloss.linear._problem import (
    Problem,
    both_predictions,
    gram,
    lengths,
    part,
    predictions,
    rows,
    solve,
    spaced,
    sums,
)
from robustloss.linear._simplex import Basis, Others, quantile_loss, simplex
from robustloss.linear.irls import MANY, least_squares, thinned

_ROWS = 2**15  # at least take part, of many
_ROUNDS = 12


class Vertex(NamedTuple):
    """The optimum, and whether it is the only one."""

    b: Array
    residuals: Array
    """q b - y, exactly 0 in the rows that are met"""
    unique: Array
    converged: Array
    steps: Array


def quantile_fit(of: Problem, level: Array) -> Vertex:
    """The b that minimises the quantile loss at `level`. Portnoy and Koenker (1997)."""
    n, k = len(of.y), len(of.constants)
    each = of.each()
    unit = jnp.max(each)
    each = each / jnp.where(unit > 0, unit, 1)
    tolerance = float(jnp.finfo(of.y.dtype).eps)
    if n < MANY:
        zero = jnp.zeros(k, of.y.dtype)
        nobody = Others(zero, zero, jnp.zeros_like(of.size))
        a, y = each[:, None] * rows(of), each * of.y
        b, bound, taken = _frisch_newton(
            a, y, each > 0, level, nobody, least_squares(of), tolerance
        )
        found = simplex(a, y, each > 0, level, nobody, b)
        residuals, settled = of.y - predictions(of, found.b), jnp.asarray(True)
        taken = taken + found.steps
    else:
        found, residuals, bound, taken, settled = _in_rounds(of, each, level, tolerance)
    residuals = residuals.at[found.rows].set(0, mode="drop")
    value = jnp.sum(quantile_loss(each * residuals, level))
    # Sums of as many terms as there are rows, each rounded.
    slack = tolerance**0.75 * value + 64 * tolerance * jnp.sum(jnp.abs(each * of.y))
    certain = found.alone | (jnp.abs(value - bound) <= slack)
    optimal = settled & found.optimal & certain & jnp.all(jnp.isfinite(found.b))
    return Vertex(found.b, -residuals, found.unique, optimal, taken)


def _in_rounds(
    of: Problem, each: Array, level: Array, tolerance: float
) -> tuple[Basis, Array, Array, Array, Array]:
    """With a sixteenth of the rows: first any, to see where the others are, then the nearest."""
    n, k = len(of.y), len(of.constants)
    count = max(_ROWS, n // 16)

    class State(NamedTuple):
        found: Basis
        residuals: Array
        bound: Array
        steps: Array
        rounds: Array
        sampling: Array
        apart: Array  # whether rows that are met together are taken apart
        settled: Array

    def noise(y: Array) -> Array:
        return 64 * tolerance * (jnp.abs(y) + of.size)

    # More rows may be met than take part, and the side of the others is then anyone's guess. Moved
    # apart, by next to nothing, they are rows like all others; a basis that is the optimum then is
    # that of the rows where they were, as long as none is on another side there.
    fine = tolerance < 1e-12
    unit = tolerance**0.375 * of.size

    def apart(these: Array) -> Array:
        return unit * (these * jnp.asarray(0.6180339887498949, unit.dtype) % 1 - 0.5)

    def nearest(residuals: Array) -> tuple[Array, Array]:
        # In how far the fit would have to move: a row far out crosses over sooner.
        reach = jnp.maximum(lengths(of), jnp.finfo(of.y.dtype).tiny)
        distance = jnp.where(each > 0, jnp.abs(residuals) / reach, jnp.inf)
        near = (distance <= smallest(distance, count - len(anyway))) & (each > 0)
        which = spaced(near.at[anyway].set(True, mode="drop"), n, count)
        return which, (each > 0).at[which].set(False, mode="drop")

    def sample(residuals: Array) -> tuple[Array, Array]:
        return any_rows, jnp.zeros(n, bool)

    def pulls(q: Array, counts: Array, pull: Array, y: Array) -> Others:
        pull = jnp.where(counts > 0, pull, 0)
        return Others(q.T @ pull, jnp.abs(q).T @ jnp.abs(pull), jnp.sum(pull * y))

    def round(at: State) -> State:
        y = of.y + jnp.where(at.apart, apart(jnp.arange(n)), 0)
        side = jnp.where(at.residuals >= 0, level, level - 1)
        which, out = lax.cond(at.sampling, sample, nearest, at.residuals)
        rough = at.sampling & ~at.apart
        others = sums(of, pulls, jnp.where(out, side * each, 0), y)
        near = part(of, which)
        w = jnp.where(which < n, each[which], 0)
        moved = w * jnp.where(at.apart, apart(which), 0)
        a, near_y, kept = w[:, None] * rows(near), w * near.y + moved, w > 0
        b, bound, steps = _frisch_newton(
            a, near_y, kept, level, others, at.found.b, jnp.where(rough, 1e-4, tolerance)
        )
        found = simplex(a, near_y, kept, level, others, b, jnp.where(rough, 0, 200))
        basis = jnp.where(found.rows < count, which[found.rows], n)
        exactly = found.b - _shift(a, moved, found.rows)
        theirs, ours = both_predictions(of, found.b, exactly)
        theirs, ours = y - theirs, of.y - ours
        # A row that is met may count as on either side.
        astray = jnp.any(out & (theirs * (side - level + 0.5) < -noise(of.y)))
        unlike = (each > 0) & (ours * jnp.sign(theirs) < -noise(of.y))
        unlike = jnp.any(unlike.at[basis].set(False, mode="drop"))
        settled = ~at.sampling & ~astray
        many = jnp.sum((each > 0) & (jnp.abs(ours) <= noise(of.y))) > count // 4
        begins = rough & many & fine
        goes_on = at.apart & ~settled
        return State(
            found._replace(rows=basis, b=jnp.where(goes_on, found.b, exactly)),
            jnp.where(goes_on, theirs, ours + jnp.where(begins, apart(jnp.arange(n)), 0)),
            bound + others.value,
            at.steps + steps + found.steps,
            at.rounds + 1,
            begins,
            begins | goes_on,
            settled & ~unlike,
        )

    kept = of.counted()
    if kept is None:
        any_rows = jnp.minimum(-(-n // count) * jnp.arange(count, dtype=jnp.int32), n)
    else:
        any_rows = spaced(kept, n, count)
    anyway = any_rows[::8]  # or what sets a column apart could be missing
    start = least_squares(thinned(of) or of)
    no = jnp.asarray(False)
    zero = jnp.int32(0)
    begin = State(
        Basis(jnp.zeros(k, jnp.int32), start, no, no, no, zero), of.y, jnp.zeros_like(of.size),
        zero, zero, ~no, no, no,
    )  # fmt: skip
    end = lax.while_loop(lambda at: ~at.settled & (at.rounds < _ROUNDS), round, begin)
    return end.found, end.residuals, end.bound, end.steps, end.settled


def _shift(a: Array, right: Array, basis: Array) -> Array:
    """What the right-hand side does to the vertex of this basis."""
    inside = basis < len(a)
    square, right = (jnp.where(inside, x[basis].T, 0).T for x in (a, right))
    empty = jnp.sum(a * a, axis=0) == 0
    return solve(square.T @ square + jnp.diag(empty.astype(a.dtype)), square.T @ right)


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
    others: Others,
    start: Array,
    tolerance: ArrayLike,
    steps: int = 400,  # extreme levels with heavy tails take a hundred, in R too
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

    value = jnp.sum(quantile_loss(-r, level))

    def goes_on(at: _Interior) -> Array:
        now = total(quantile_loss(at.w - at.z, level))
        small = at.gap <= tolerance * (now + tolerance * value)
        return ~small & (at.steps < steps) & (at.gap > 0)

    s = 1 - x
    begin = _Interior(x, s, start, z, w, total(x * z + s * w), jnp.int32(0))
    end = lax.while_loop(goes_on, step, begin)
    bound = jnp.sum(jnp.where(kept, (end.x - (1 - level)) * y, 0))
    return end.b, bound, end.steps
