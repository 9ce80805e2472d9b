"""Quantile regression of many rows, of which only those near the fit take part.

The others are counted as being above or below it, and once more, about the new fit, if one turns
out to be on the other side: Portnoy and Koenker (1997).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from robustloss._numerics.order_statistics import smallest
from robustloss._regression import (
    Problem,
    design_rows,
    row_lengths,
    solve,
    spaced_rows,
    subset,
    sum_over_rows,
    two_predictions,
)
from robustloss.linear.irls import least_squares, subsample
from robustloss.linear.quantile.frisch_newton import frisch_newton
from robustloss.linear.quantile.simplex import Basis, Others, simplex

_ROWS = 2**15  # take part at least
_ROUNDS = 12


def in_rounds(
    problem: Problem, unit: Array, level: Array, tolerance: float
) -> tuple[Basis, Array, Array, Array, Array]:
    """With a sixteenth of the rows: first any, to see where the others are, then the nearest.

    The vertex, `y - q b`, what no other b can be below, the steps, and whether all rows are on the
    side they were taken to be on.
    """
    n, k = len(problem.y), len(problem.constants)
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

    size = jnp.where(
        problem.y_size > 0, problem.y_size, jnp.mean(jnp.abs(problem.y))
    )  # most y may be one number
    size = jnp.where(size > 0, size, 1)

    def noise(y: Array) -> Array:
        return 64 * tolerance * (jnp.abs(y) + size)

    # More rows may be met than take part, and the side of the others is then anyone's guess. Moved
    # apart, by next to nothing, they are rows like all others; a basis that is the optimum then is
    # that of the rows where they were, as long as none is on another side there.
    fine = tolerance < 1e-12
    width = tolerance**0.375 * size

    def apart(these: Array) -> Array:
        return width * (these * jnp.asarray(0.6180339887498949, width.dtype) % 1 - 0.5)

    def weights() -> Array:  # made when needed, not kept
        return problem.row_weights() / unit

    def nearest(residuals: Array) -> tuple[Array, Array]:
        return _nearest(problem, weights(), residuals, anyway, count)

    def sample(residuals: Array) -> tuple[Array, Array]:
        return any_rows, jnp.zeros(n, bool)

    def round(at: State) -> State:
        each = weights()
        y = problem.y + jnp.where(at.apart, apart(jnp.arange(n)), 0)
        side = jnp.where(at.residuals >= 0, level, level - 1)
        which, out = lax.cond(at.sampling, sample, nearest, at.residuals)
        rough = at.sampling & ~at.apart
        others = sum_over_rows(problem, _pulls, jnp.where(out, side * each, 0), y)
        near = subset(problem, which)
        w = jnp.where(which < n, each[which], 0)
        moved = w * jnp.where(at.apart, apart(which), 0)
        a, near_y, kept = w[:, None] * design_rows(near), w * near.y + moved, w > 0
        b, bound, steps = frisch_newton(
            a, near_y, kept, level, others, at.found.b, jnp.where(rough, 1e-4, tolerance)
        )
        found = simplex(a, near_y, kept, level, others, b, jnp.where(rough, 0, 200))
        basis = jnp.where(found.rows < count, which[found.rows], n)
        exactly = found.b - _shift(a, moved, found.rows)
        theirs, ours = two_predictions(problem, found.b, exactly)
        ours = problem.y - ours
        theirs = (problem.y - theirs) + jnp.where(at.apart, apart(jnp.arange(n)), 0)
        # A row that is met may count as on either side.
        over = jnp.where(at.residuals >= 0, theirs, -theirs) < -noise(problem.y)
        astray = jnp.any(out & over)
        unlike = (each > 0) & (ours * jnp.sign(theirs) < -noise(problem.y))
        unlike = jnp.any(unlike.at[basis].set(False, mode="drop"))
        settled = ~at.sampling & ~astray
        # So rough a fit is only next to what they are met by.
        many = jnp.sum((each > 0) & (jnp.abs(ours) <= width)) > count // 4
        begins = rough & many & fine
        goes_on = at.apart & ~settled
        return State(
            found._replace(
                rows=basis,
                b=jnp.where(goes_on, found.b, exactly),
                # An edge may be level only for as long as rows are apart.
                unique=found.unique | at.apart,
            ),
            jnp.where(goes_on, theirs, ours + jnp.where(begins, apart(jnp.arange(n)), 0)),
            bound + others.value,
            at.steps + steps + found.steps,
            at.rounds + 1,
            begins,
            begins | goes_on,
            settled & ~unlike,
        )

    kept = problem.weighted_rows()
    if kept is None:
        any_rows = jnp.minimum(-(-n // count) * jnp.arange(count, dtype=jnp.int32), n)
    else:
        any_rows = spaced_rows(kept, n, count)
    anyway = any_rows[::8]  # or what sets a column apart could be missing
    start = least_squares(subsample(problem) or problem)
    no = jnp.asarray(False)
    zero = jnp.int32(0)
    begin = State(
        Basis(jnp.zeros(k, jnp.int32), start, no, no, no, zero), problem.y, jnp.zeros_like(problem.y_size),
        zero, zero, ~no, no, no,
    )  # fmt: skip
    end = lax.while_loop(lambda at: ~at.settled & (at.rounds < _ROUNDS), round, begin)
    return end.found, end.residuals, end.bound, end.steps, end.settled


def _nearest(
    problem: Problem, each: Array, residuals: Array, anyway: Array, count: int
) -> tuple[Array, Array]:
    """The rows next to the fit, with some anyway, and which are out."""
    # In how far the fit would have to move: a row far out crosses over sooner.
    reach = jnp.maximum(row_lengths(problem), jnp.finfo(problem.y.dtype).tiny)
    distance = jnp.where(each > 0, jnp.abs(residuals) / reach, jnp.inf)
    near = (distance <= smallest(distance, count - len(anyway))) & (each > 0)
    which = spaced_rows(near.at[anyway].set(True, mode="drop"), len(problem.y), count)
    return which, (each > 0).at[which].set(False, mode="drop")


def _pulls(q: Array, each: Array, pull: Array, y: Array) -> Others:
    pull = jnp.where(each > 0, pull, 0)
    return Others(q.T @ pull, jnp.abs(q).T @ jnp.abs(pull), jnp.sum(pull * y))


def _shift(a: Array, right: Array, basis: Array) -> Array:
    """What the right-hand side does to the vertex of this basis."""
    inside = basis < len(a)
    square, right = (jnp.where(inside, x[basis].T, 0).T for x in (a, right))
    empty = jnp.sum(a * a, axis=0) == 0
    return solve(square.T @ square + jnp.diag(empty.astype(a.dtype)), square.T @ right)
