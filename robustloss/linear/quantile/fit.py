"""Quantile regression, exactly: an interior point that ends on a vertex, with a certificate.

Quantile regression is a linear program. The interior point comes near the optimum in some twenty
steps, whatever the number of rows. The rows that are nearly met there name a vertex: k rows which
are met exactly. The simplex method follows edges until none leads down. Where more than k rows are
met, the edges are not all directions, and the dual objective is the certificate: no other
coefficients can have a smaller objective.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from robustloss._regression import Problem, design_rows, predictions
from robustloss.linear.irls import MANY_ROWS, least_squares
from robustloss.linear.quantile.frisch_newton import frisch_newton
from robustloss.linear.quantile.preprocessing import fit_near_rows
from robustloss.linear.quantile.program import Program, no_fixed_rows, quantile_loss
from robustloss.linear.quantile.simplex import Vertex, simplex, vertex_shift

# The objective is a sum of as many terms as there are rows, each rounded: relative to its value, a
# power of eps; relative to the data, units of eps.
_OBJECTIVE_ROUNDING = 0.75
_DATA_ROUNDING = 64


class QuantileFit(NamedTuple):
    """The optimum, and whether it is the only one."""

    coefficients: Array
    """(k,) of x - center"""
    residuals: Array
    """(n,) prediction - y, exactly 0 in the rows that are met"""
    unique: Array
    converged: Array
    """whether the fit is certified as an optimum"""
    steps: Array


def quantile_fit(problem: Problem, level: Array) -> QuantileFit:
    """The b that minimises the quantile loss at `level`. Portnoy and Koenker (1997)."""
    n, k = len(problem.y), len(problem.constants)
    largest = jnp.max(problem.row_weights())
    weight_unit = jnp.where(largest > 0, largest, 1)
    row_weights = problem.row_weights() / weight_unit
    eps = float(jnp.finfo(problem.y.dtype).eps)
    if n < MANY_ROWS:
        a, y = row_weights[:, None] * design_rows(problem), row_weights * problem.y
        program = Program(a, y, row_weights > 0, level, no_fixed_rows(k, problem.y.dtype))
        b, bound, steps = frisch_newton(program, least_squares(problem), eps)
        vertex = simplex(program, b)
        steps, settled = steps + vertex.pivots, jnp.asarray(True)
        coefficients = _refined(problem, program, vertex, row_weights)
        residuals = problem.y - predictions(problem, coefficients)
    else:
        vertex, residuals, bound, steps, settled = fit_near_rows(problem, weight_unit, level, eps)
        coefficients = problem.coefficients(vertex.b)
    residuals = residuals.at[vertex.rows].set(0, mode="drop")
    value = jnp.sum(quantile_loss(row_weights * residuals, level))
    size = jnp.sum(jnp.abs(row_weights * problem.y))
    certified = settled & _is_optimal(vertex, value, bound, size)
    return QuantileFit(coefficients, -residuals, vertex.unique, certified, steps)


def _refined(problem: Problem, program: Program, vertex: Vertex, row_weights: Array) -> Array:
    """The coefficients of a vertex, after a step to what they leave of the rows of its basis.

    Where columns are nearly dependent, coefficients computed from b have lost digits.
    """
    coefficients = problem.coefficients(vertex.b)
    residuals = row_weights * (problem.y - predictions(problem, coefficients))
    return coefficients + problem.coefficients(vertex_shift(program.a, residuals, vertex.rows))


def _is_optimal(vertex: Vertex, value: Array, bound: Array, size: Array) -> Array:
    """The certificate: no edge leads down, and there are no other directions or no lower value.

    `value` is the objective, `bound` what it cannot be below, and `size` the sum of |y|, to which
    rounding is relative.
    """
    eps = jnp.finfo(value.dtype).eps
    rounding = float(eps) ** _OBJECTIVE_ROUNDING * value + _DATA_ROUNDING * float(eps) * size
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(vertex.b))
    return vertex.optimal & finite & (vertex.nondegenerate | (jnp.abs(value - bound) <= rounding))
