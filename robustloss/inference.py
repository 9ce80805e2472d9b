"""How far the coefficients of a robust fit can be trusted.

Weights count as observations of which there are `sum(w)**2 / sum(w**2)`, so equal ones are the same
as none and only their ratios count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_factor, cho_solve
from jax.scipy.special import ndtri
from jax.typing import ArrayLike

from robustloss._numerics import normal
from robustloss._numerics.sums import joint_sums
from robustloss._regression import (
    Estimate,
    LossAtScale,
    Problem,
    coefficient_basis,
    dependent_columns,
    gram,
    sum_over_rows,
)
from robustloss.scale import iqr
from robustloss.views import curvature, influence

_DEFINITE = 64  # units of rounding for each column, below which a curvature counts as 0


class Covariance(NamedTuple):
    """Of the coefficients, in the user's units: `matrix`, and the roots of its diagonal.

    The roots are computed beside the matrix, whose entries are squares and can leave the range of
    floats where the roots do not.
    """

    matrix: Array
    standard_errors: Array
    definite: Array | bool = True
    """Whether the objective curves upwards in all directions, so that no other b is as good."""


def huber_h1(problem: Problem, loss: LossAtScale, found: Estimate) -> Covariance:
    """Huber's first form, `kappa**2 (sum psi**2 / (n - p)) / mean(psi')**2 (X'X)**-1`.

    kappa is `1 + p var(psi') / (n mean(psi')**2)`, with the sample variance, as `MASS::rlm`.

    Source: Huber (1981), Robust Statistics, equation 7.6.9.
    """
    unit, n = counts(problem)
    loss_at_s = loss(found.scale)
    # In units of the largest influence, whose square may be out of range.
    psi = jnp.where(problem.row_weights() > 0, jnp.abs(influence(loss_at_s, found.residuals)), 0)
    largest = jnp.max(psi)
    largest = jnp.where(largest > 0, largest, 1)

    def moments(q: Array, weights: Array, r: Array) -> tuple[Array, ...]:
        psi, bends = (jnp.where(weights > 0, f(loss_at_s, r), 0) for f in (influence, curvature))
        psi = psi / largest
        # Only few rows can leave the fit undetermined; many are spared the second gram.
        curvatures = (
            jnp.eye(q.shape[1], dtype=q.dtype) if problem.design is None else gram(q, weights * bends)
        )
        # The first is the same gram as in least squares, where XLA sees both at once.
        weighted = joint_sums(*(weights * x for x in (psi * psi, bends, bends * bends)))
        return gram(q, weights), curvatures, *weighted

    squares, curvatures, square, bends, square_bends = (
        unit * x for x in sum_over_rows(problem, moments, found.residuals)
    )
    mean = bends / n
    variance = (square_bends - n * mean**2) / (n - 1)
    kappa = 1 + problem.rank * variance / (n * mean**2)
    degrees = n - problem.rank
    square = square / jnp.where(degrees > 0, degrees, jnp.nan)
    covariance = square * _inverse(squares, definite=True)
    covariance = _in_units(problem, covariance, largest * jnp.abs(kappa / mean))
    return covariance._replace(definite=_definite(problem, curvatures))


def after_s(
    problem: Problem,
    loss: LossAtScale,
    chi: Callable[[Array], Array],
    half: ArrayLike,
    found: Estimate,
    start: Estimate,
) -> Covariance:
    """The sandwich of an MM-estimate, which minds that its scale was estimated too.

    `chi` is the loss of the S-estimate `start`, of residuals in units of its scale, and `half` its
    breakdown point. Neither symmetric errors nor errors of one spread are assumed. As
    `robustbase::lmrob` with `cov = ".vcov.avar1"`; where that is not positive definite, the
    sandwich with the scale taken as known.

    Source: Croux, Dhaene and Hoorelbeke (2003), Robust standard errors for robust estimators.
    """
    unit, n = counts(problem)
    s = start.scale
    loss_at_s = loss(s)
    bound = chi(jnp.full((), jnp.inf, s.dtype))

    def moments(q: Array, weights: Array, r: Array, initial: Array) -> tuple[Array, ...]:
        weights = unit * weights

        def of_rows(f: Array) -> Array:
            return jnp.where(weights > 0, weights * f, 0)

        psi, bends, initial = influence(loss_at_s, r) / s, curvature(loss_at_s, r), initial / s
        level = chi(initial) / bound
        pull = influence(chi, initial) * initial / bound
        return (
            gram(q, of_rows(bends)),
            gram(q, of_rows(psi * psi)),
            q.T @ of_rows(bends * (r / s)),
            q.T @ of_rows(psi * level),
            jnp.sum(of_rows(pull)),
            jnp.sum(of_rows(level**2 - half**2)),
        )

    curvatures, squares, shift, together, pull, spread = sum_over_rows(
        problem, moments, found.residuals, start.residuals
    )
    inverse = _inverse(curvatures)
    by_scale, both = inverse @ (shift * n / pull), inverse @ together
    known_scale = inverse @ squares @ inverse
    covariance = (
        known_scale
        - jnp.outer(by_scale, both) / n
        - jnp.outer(both, by_scale) / n
        + spread * jnp.outer(by_scale, by_scale) / n**2
    )
    # In small samples the corrections for the scale can outweigh the rest.
    kept = jnp.diagonal(covariance) != 0
    factor = lax.linalg.cholesky(covariance + jnp.diag(jnp.where(kept, 0, 1).astype(s.dtype)))
    positive = jnp.all(jnp.isfinite(factor))
    covariance = _in_units(problem, jnp.where(positive, covariance, known_scale), s)
    return covariance._replace(definite=_definite(problem, curvatures))


def powell(problem: Problem, level: Array, residuals: Array) -> Covariance:
    """Powell's kernel sandwich of a quantile regression, `q (1 - q) D**-1 (X'X) D**-1`.

    D weighs each row by the density of its residual at 0, taken from those about it: a normal
    kernel, Hall and Sheather's bandwidth. As `quantreg::summary.rq`, `se = "ker"`.

    Source: Powell (1991); Koenker (2005), Quantile Regression, section 3.4.2.
    """
    unit, n = counts(problem)
    x = ndtri(level)
    z = normal.TWO_SIDED_95
    h = n ** (-1 / 3) * z ** (2 / 3) * (1.5 * _normal_density(x) ** 2 / (2 * x * x + 1)) ** (1 / 3)
    room = jnp.minimum(level, 1 - level)
    halvings = jnp.maximum(jnp.floor(jnp.log2(h / room)) + 1, 0)
    h = h * 0.5**halvings
    weights = unit * problem.row_weights()
    mean = jnp.sum(weights * residuals) / n
    deviation = jnp.sqrt(jnp.sum(weights * (residuals - mean) ** 2) / (n - 1))
    quartiles = iqr(residuals, where=problem.where, weights=problem.weights) / normal.IQR
    spread = jnp.minimum(deviation, quartiles / 1.34)
    below, above = ndtri(level + h * jnp.asarray([-1, 1], h.dtype))
    width = (above - below) * spread
    wide = jnp.where(width > 0, width, 1)

    def moments(q: Array, weights: Array, r: Array) -> tuple[Array, Array]:
        weights = unit * weights
        return gram(q, weights), gram(q, weights * _normal_density(r / wide))

    squares, density = sum_over_rows(problem, moments, residuals)
    inverse = _inverse(density, definite=True)
    covariance = level * (1 - level) * inverse @ squares @ inverse
    return _in_units(problem, covariance, jnp.where(width > 0, width, jnp.nan))


def _normal_density(x: Array) -> Array:
    return jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def counts(problem: Problem) -> tuple[Array, Array]:
    """What makes the weights add up to the number of observations; and this number."""
    weights = problem.row_weights()
    total = jnp.sum(weights)
    n = total**2 / jnp.sum(weights * weights)
    return n / total, n


def _definite(problem: Problem, curvatures: Array) -> Array:
    """Whether a sum of psi' q q' is positive definite beyond rounding, but for columns of 0."""
    diagonal = jnp.diagonal(curvatures)
    empty = dependent_columns(problem)
    unit = jnp.where(diagonal > 0, lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
    scaled = unit[:, None] * curvatures * unit
    rounding = _DEFINITE * len(scaled) * jnp.finfo(scaled.dtype).eps
    factor = lax.linalg.cholesky(scaled + jnp.diag(jnp.where(empty, 1, -rounding)))
    return jnp.all(jnp.isfinite(factor))


def _inverse(a: Array, *, definite: bool = False) -> Array:
    # A column of 0 stays one.
    kept = jnp.diagonal(a) != 0
    full = a + jnp.diag(jnp.where(kept, 0, 1).astype(a.dtype))
    unit = jnp.sqrt(jnp.abs(jnp.diagonal(full)))
    full = full / jnp.outer(unit, unit)
    eye = jnp.eye(len(a), dtype=a.dtype)
    inverse = cho_solve(cho_factor(full, lower=True), eye) if definite else jnp.linalg.inv(full)
    inverse = inverse / jnp.outer(unit, unit)
    return jnp.where(kept[:, None] & kept, inverse, 0)


def _in_units(problem: Problem, covariance: Array, size: Array) -> Covariance:
    """The covariance of the coefficients, for `size**2 covariance` of b; NaN where not told."""
    basis = coefficient_basis(problem)
    longest = jnp.max(jnp.abs(basis), axis=1)
    longest = jnp.where(longest > 0, longest, 1)
    basis = basis / longest[:, None]
    scaled = basis @ covariance @ basis.T
    units = jnp.where(problem.identifiable, longest * (size * problem.y_unit), jnp.nan)
    matrix = units[:, None] * scaled * units
    return Covariance(matrix, units * jnp.sqrt(jnp.diagonal(scaled)))
