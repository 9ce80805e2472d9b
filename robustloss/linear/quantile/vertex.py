"""Quantile regression, exactly: an interior point that ends on a vertex.

The problem is a linear one. Frisch and Newton's method, a primal and dual interior point in
Mehrotra's predictor-corrector form, comes near the optimum in some twenty steps, whatever the
number of rows. The rows it nearly meets then name a vertex, that is k rows which are met
exactly; the simplex method makes sure that no edge leads further down; and where more rows are met
by chance, the dual point says how far below any other coefficients could be.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from robustloss._regression import Problem, design_rows, predictions
from robustloss.linear.irls import MANY_ROWS, least_squares
from robustloss.linear.quantile.frisch_newton import frisch_newton
from robustloss.linear.quantile.preprocessing import in_rounds
from robustloss.linear.quantile.simplex import Others, quantile_loss, simplex


class Vertex(NamedTuple):
    """The optimum, and whether it is the only one."""

    b: Array
    residuals: Array
    """q b - y, exactly 0 in the rows that are met"""
    unique: Array
    converged: Array
    steps: Array


def quantile_fit(problem: Problem, level: Array) -> Vertex:
    """The b that minimises the quantile loss at `level`. Portnoy and Koenker (1997)."""
    n, k = len(problem.y), len(problem.constants)
    largest = jnp.max(problem.row_weights())
    unit = jnp.where(largest > 0, largest, 1)
    each = problem.row_weights() / unit
    tolerance = float(jnp.finfo(problem.y.dtype).eps)
    if n < MANY_ROWS:
        zero = jnp.zeros(k, problem.y.dtype)
        nobody = Others(zero, zero, jnp.zeros_like(problem.y_size))
        a, y = each[:, None] * design_rows(problem), each * problem.y
        b, bound, taken = frisch_newton(
            a, y, each > 0, level, nobody, least_squares(problem), tolerance
        )
        found = simplex(a, y, each > 0, level, nobody, b)
        residuals, settled = problem.y - predictions(problem, found.b), jnp.asarray(True)
        taken = taken + found.steps
    else:
        found, residuals, bound, taken, settled = in_rounds(problem, unit, level, tolerance)
    residuals = residuals.at[found.rows].set(0, mode="drop")
    value = jnp.sum(quantile_loss(each * residuals, level))
    # Sums of as many terms as there are rows, each rounded.
    slack = tolerance**0.75 * value + 64 * tolerance * jnp.sum(jnp.abs(each * problem.y))
    certain = found.alone | (jnp.abs(value - bound) <= slack)
    sound = jnp.isfinite(value) & jnp.all(jnp.isfinite(found.b))
    optimal = settled & found.optimal & certain & sound
    return Vertex(found.b, -residuals, found.unique, optimal, taken)
