"""Quantile regression of many rows, of which only those near the fit take part.

The other rows count as above or below the fit. If one of them turns out to be on the other side of
the new fit, the next round chooses the rows near that fit: Portnoy and Koenker (1997).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from robustloss._numerics.order_statistics import smallest
from robustloss._regression import (
    Problem,
    design_rows,
    row_lengths,
    spaced_rows,
    subset,
    sum_over_rows,
    two_predictions,
)
from robustloss.linear.irls import least_squares, subsample
from robustloss.linear.quantile.frisch_newton import frisch_newton
from robustloss.linear.quantile.program import FixedRows, Program
from robustloss.linear.quantile.simplex import PIVOTS, Vertex, simplex, vertex_shift

# Rows that take part: at least so many, whose interior point takes less time than a pass over all
# rows, and at least this share of all.
_ROWS = 2**15
_SHARE = 16
# One of so many rows of the sample always takes part, or else the rows near the fit might not
# determine a column, such as one that is 0 in most rows.
_ALWAYS = 8
_ROUNDS = 12  # three are usual
_SAMPLE_TOLERANCE = 1e-4  # of the first fit, which only shows where the rows are
_ROUNDING = 64  # units, relative to |y| and its typical size, within which a row counts as met

# A perturbation is this power of eps, in sizes of y: 1e-6 in float64, far above rounding and far
# below the errors. In float32 it would be 0.003, which is not small, so that ties stay.
_PERTURBATION = 0.375
_PERTURBED_BELOW = 1e-12
_MANY_MET = 4  # rows are perturbed if more than one in so many of those that take part are met
_GOLDEN_RATIO = 0.6180339887498949  # its multiples are evenly spread modulo 1, and no two are equal


class _Setting(NamedTuple):
    """What is the same in all rounds."""

    problem: Problem
    level: Array
    tolerance: float
    weight_unit: Array
    """the largest weight"""
    size: Array
    """of y"""
    sample: Array
    """(count,) rows at equal distances; count is how many rows take part in a round"""

    def row_weights(self) -> Array:
        """(n,) relative to the largest; made when needed, so that no copy is kept."""
        return self.problem.row_weights() / self.weight_unit

    def rounding(self) -> Array:
        """(n,) a residual up to this size counts as 0."""
        return _ROUNDING * self.tolerance * (jnp.abs(self.problem.y) + self.size)

    def perturbation(self, rows: Array, perturbed: Array) -> Array:
        """What is added to y of these rows; 0 unless `perturbed`."""
        width = self.tolerance**_PERTURBATION * self.size
        ratio = jnp.asarray(_GOLDEN_RATIO, width.dtype)
        return jnp.where(perturbed, width * (rows * ratio % 1 - 0.5), 0)


class _Round(NamedTuple):
    """The fit after some rounds."""

    vertex: Vertex
    residuals: Array
    """(n,) y - q b, of the perturbed y if the next round is perturbed"""
    bound: Array
    """no coefficients have an objective below this"""
    steps: Array
    rounds: Array
    sampling: Array
    """whether a sample of the rows takes part in the next round, instead of those near the fit"""
    perturbed: Array
    """whether y is perturbed in the next round"""
    settled: Array
    """whether all rows are on the side they were taken to be on"""


def fit_near_rows(
    problem: Problem, weight_unit: Array, level: Array, tolerance: float
) -> tuple[Vertex, Array, Array, Array, Array]:
    """The vertex, `y - q b`, a lower bound of the objective, the steps, and whether it is settled.

    The first round fits a sample of the rows, to see where the others are; the rows that take part
    in the later rounds are those near the fit.

    More rows may be met than take part, for example of counts. The side of such rows is then left
    to chance. So if many rows are met after the first round, y is perturbed by far less than its
    errors, until a round settles. The basis that is optimal then is evaluated at the true y, and
    remains optimal if no row is on another side.
    """
    n, k = len(problem.y), len(problem.constants)
    count = max(_ROWS, n // _SHARE)
    # The typical size is 0 where most y are one number.
    size = jnp.where(problem.y_size > 0, problem.y_size, jnp.mean(jnp.abs(problem.y)))
    size = jnp.where(size > 0, size, 1)
    kept = problem.weighted_rows()
    if kept is None:
        sample = jnp.minimum(-(-n // count) * jnp.arange(count, dtype=jnp.int32), n)
    else:
        sample = spaced_rows(kept, n, count)
    setting = _Setting(problem, level, tolerance, weight_unit, size, sample)
    no, zero = jnp.asarray(False), jnp.int32(0)
    start = least_squares(subsample(problem) or problem)
    begin = _Round(
        Vertex(jnp.zeros(k, jnp.int32), start, no, no, no, zero), problem.y,
        jnp.zeros_like(problem.y_size), zero, zero, ~no, no, no,
    )  # fmt: skip
    end = lax.while_loop(
        lambda at: ~at.settled & (at.rounds < _ROUNDS), partial(_next_round, setting), begin
    )
    return end.vertex, end.residuals, end.bound, end.steps, end.settled


def _next_round(setting: _Setting, at: _Round) -> _Round:
    problem, level = setting.problem, setting.level
    n, count = len(problem.y), len(setting.sample)
    row_weights = setting.row_weights()
    all_rows = jnp.arange(n)
    y = problem.y + setting.perturbation(all_rows, at.perturbed)
    rows, fixed = lax.cond(
        at.sampling,
        lambda r: (setting.sample, jnp.zeros(n, bool)),
        partial(_rows_near_fit, setting),
        at.residuals,
    )
    slopes = jnp.where(at.residuals >= 0, level, level - 1)
    first = at.sampling & ~at.perturbed
    near = subset(problem, rows)
    weights = jnp.where(rows < n, row_weights[rows], 0)
    added = weights * setting.perturbation(rows, at.perturbed)
    program = Program(
        weights[:, None] * design_rows(near),
        weights * near.y + added,
        weights > 0,
        level,
        sum_over_rows(problem, _fixed_rows, jnp.where(fixed, slopes * row_weights, 0), y),
    )
    tolerance = jnp.where(first, _SAMPLE_TOLERANCE, setting.tolerance)
    b, bound, steps = frisch_newton(program, at.vertex.b, tolerance)
    vertex = simplex(program, b, jnp.where(first, 0, PIVOTS))
    basis = jnp.where(vertex.rows < count, rows[vertex.rows], n)
    true_b = vertex.b - vertex_shift(program.a, added, vertex.rows)

    residuals, true_residuals = two_predictions(
        problem, problem.coefficients(vertex.b), problem.coefficients(true_b)
    )
    true_residuals = problem.y - true_residuals
    residuals = (problem.y - residuals) + setting.perturbation(all_rows, at.perturbed)
    # A row that is met may count as on either side.
    rounding = setting.rounding()
    crossed = jnp.where(at.residuals >= 0, residuals, -residuals) < -rounding
    settled = ~at.sampling & ~jnp.any(fixed & crossed)
    changed = (row_weights > 0) & (true_residuals * jnp.sign(residuals) < -rounding)
    changed = jnp.any(changed.at[basis].set(False, mode="drop"))
    # The first fit is only near the rows that the optimum meets.
    width = setting.tolerance**_PERTURBATION * setting.size
    met = jnp.sum((row_weights > 0) & (jnp.abs(true_residuals) <= width))
    begins = first & (met > count // _MANY_MET) & (setting.tolerance < _PERTURBED_BELOW)
    goes_on = at.perturbed & ~settled
    return _Round(
        vertex._replace(
            rows=basis,
            b=jnp.where(goes_on, vertex.b, true_b),
            # A level edge may be so only because y is perturbed.
            unique=vertex.unique | at.perturbed,
        ),
        jnp.where(goes_on, residuals, true_residuals + setting.perturbation(all_rows, begins)),
        bound + program.fixed.value,
        at.steps + steps + vertex.pivots,
        at.rounds + 1,
        begins,
        begins | goes_on,
        settled & ~changed,
    )


def _rows_near_fit(setting: _Setting, residuals: Array) -> tuple[Array, Array]:
    """The rows next to the fit, with some of the sample; and whether each row is not among them."""
    problem, count = setting.problem, len(setting.sample)
    weighted = setting.row_weights() > 0
    always = setting.sample[::_ALWAYS]
    # The distance is how far the coefficients must change for the fit to cross the row: less for a
    # row that is far out in X.
    lengths = jnp.maximum(row_lengths(problem), jnp.finfo(problem.y.dtype).tiny)
    distance = jnp.where(weighted, jnp.abs(residuals) / lengths, jnp.inf)
    near = (distance <= smallest(distance, count - len(always))) & weighted
    rows = spaced_rows(near.at[always].set(True, mode="drop"), len(problem.y), count)
    return rows, weighted.at[rows].set(False, mode="drop")


def _fixed_rows(q: Array, weights: Array, slope: Array, y: Array) -> FixedRows:
    slope = jnp.where(weights > 0, slope, 0)
    return FixedRows(q.T @ slope, jnp.abs(q).T @ jnp.abs(slope), jnp.sum(slope * y))
