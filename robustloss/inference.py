"""Covariances of the coefficients of robust fits.

Weights count as `sum(w)**2 / sum(w**2)` observations. So equal weights are the same as none, and
only the ratios of weights count.
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

# A curvature counts as positive above this many units of rounding for each column: the curvature is
# a sum over all rows, and the factor leaves room for the rounding of the sum.
_DEFINITE = 64


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
    weights = problem.row_weights()
    psi, bends = (
        jnp.where(weights > 0, f(loss_at_s, found.residuals), 0) for f in (influence, curvature)
    )
    # In units of the largest influence, whose square may be out of range.
    largest = jnp.max(jnp.abs(psi))
    largest = jnp.where(largest > 0, largest, 1)
    psi = psi / largest
    moments = joint_sums(*(weights * x for x in (psi * psi, bends, bends * bends)))
    square, bend, square_bend = (unit * x for x in moments)

    def grams(q: Array, weights: Array, bends: Array) -> tuple[Array, Array]:
        # Many rows determine the fit, and do not need the second gram.
        few_rows = problem.design is not None
        curvatures = gram(q, weights * bends) if few_rows else jnp.eye(q.shape[1], dtype=q.dtype)
        # In least squares the first gram is the same expression, which XLA then computes once.
        return gram(q, weights), curvatures

    squares, curvatures = (unit * x for x in sum_over_rows(problem, grams, bends))
    mean = bend / n
    variance = (square_bend - n * mean**2) / (n - 1)
    kappa = 1 + problem.rank * variance / (n * mean**2)
    degrees = n - problem.rank
    square = square / jnp.where(degrees > 0, degrees, jnp.nan)
    inverse = square * _inverse(squares, definite=True)
    covariance = _in_units(problem, inverse, largest * jnp.abs(kappa / mean))
    return covariance._replace(definite=_definite(problem, curvatures))


def after_s(
    problem: Problem,
    loss: LossAtScale,
    chi: Callable[[Array], Array],
    breakdown: ArrayLike,
    found: Estimate,
    start: Estimate,
) -> Covariance:
    """The sandwich of an MM-estimate, with the variance that comes from the estimated scale.

    `chi` is the loss of the S-estimate `start`, of residuals in units of its scale, and `breakdown`
    is its breakdown point. The errors need be neither symmetric nor of one scale. The covariance is
    that of `robustbase::lmrob` with `cov = ".vcov.avar1"`. Where it is not positive definite, it is
    the sandwich with the scale taken as known.

    Source: Croux, Dhaene and Hoorelbeke (2003), Robust standard errors for robust estimators.
    """
    unit, n = counts(problem)
    s = start.scale
    loss_at_s = loss(s)
    bound = chi(jnp.full((), jnp.inf, s.dtype))

    def moments(q: Array, weights: Array, r: Array, initial: Array) -> tuple[Array, ...]:
        weights = unit * weights

        def weighted(x: Array) -> Array:
            return jnp.where(weights > 0, weights * x, 0)

        psi, bends, initial = influence(loss_at_s, r) / s, curvature(loss_at_s, r), initial / s
        level = chi(initial) / bound
        pull = influence(chi, initial) * initial / bound
        return (
            gram(q, weighted(bends)),
            gram(q, weighted(psi * psi)),
            q.T @ weighted(bends * (r / s)),
            q.T @ weighted(psi * level),
            jnp.sum(weighted(pull)),
            jnp.sum(weighted(level**2 - breakdown**2)),
        )

    curvatures, squares, shift, together, pull, variance = sum_over_rows(
        problem, moments, found.residuals, start.residuals
    )
    inverse = _inverse(curvatures)
    by_scale, both = inverse @ (shift * n / pull), inverse @ together
    known_scale = inverse @ squares @ inverse
    covariance = (
        known_scale
        - jnp.outer(by_scale, both) / n
        - jnp.outer(both, by_scale) / n
        + variance * jnp.outer(by_scale, by_scale) / n**2
    )
    # In small samples the corrections for the scale can outweigh the rest.
    kept = jnp.diagonal(covariance) != 0
    factor = lax.linalg.cholesky(covariance + jnp.diag(jnp.where(kept, 0, 1).astype(s.dtype)))
    positive = jnp.all(jnp.isfinite(factor))
    covariance = _in_units(problem, jnp.where(positive, covariance, known_scale), s)
    return covariance._replace(definite=_definite(problem, curvatures))


def powell(problem: Problem, level: Array, residuals: Array) -> Covariance:
    """Powell's kernel sandwich of a quantile regression, `level (1 - level) D**-1 (X'X) D**-1`.

    D is X'X with each row weighted by the density of its error at 0. The density is estimated with
    a normal kernel and the bandwidth of Hall and Sheather, as by `quantreg::summary.rq` with
    `se = "ker"`.

    Source: Powell (1991); Koenker (2005), Quantile Regression, section 3.4.2.
    """
    unit, n = counts(problem)
    x = ndtri(level)
    z = normal.TWO_SIDED_95
    h = n ** (-1 / 3) * z ** (2 / 3) * (1.5 * _normal_density(x) ** 2 / (2 * x * x + 1)) ** (1 / 3)
    # As in quantreg, h is halved until both level - h and level + h are in (0, 1).
    largest = jnp.minimum(level, 1 - level)
    halvings = jnp.maximum(jnp.floor(jnp.log2(h / largest)) + 1, 0)
    h = h * 0.5**halvings
    weights = unit * problem.row_weights()
    mean = jnp.sum(weights * residuals) / n
    deviation = jnp.sqrt(jnp.sum(weights * (residuals - mean) ** 2) / (n - 1))
    quartiles = iqr(residuals, where=problem.where, weights=problem.weights) / normal.IQR
    residual_scale = jnp.minimum(deviation, quartiles / 1.34)  # 1.34 is quantreg's rounded factor
    below, above = ndtri(level + h * jnp.asarray([-1, 1], h.dtype))
    width = (above - below) * residual_scale
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
    """The factor at which the weights add up to the number of observations, and this number."""
    weights = problem.row_weights()
    total = jnp.sum(weights)
    n = total**2 / jnp.sum(weights * weights)
    return n / total, n


def _definite(problem: Problem, curvatures: Array) -> Array:
    """Whether a sum of psi' q q' is positive definite beyond rounding, columns of 0 apart."""
    diagonal = jnp.diagonal(curvatures)
    empty = dependent_columns(problem)
    unit = jnp.where(diagonal > 0, lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
    scaled = unit[:, None] * curvatures * unit
    rounding = _DEFINITE * len(scaled) * jnp.finfo(scaled.dtype).eps
    factor = lax.linalg.cholesky(scaled + jnp.diag(jnp.where(empty, 1, -rounding)))
    return jnp.all(jnp.isfinite(factor))


def _inverse(a: Array, *, definite: bool = False) -> Array:
    """The inverse of a symmetric matrix, whose rows and columns of 0 stay 0."""
    kept = jnp.diagonal(a) != 0
    full = a + jnp.diag(jnp.where(kept, 0, 1).astype(a.dtype))
    unit = jnp.sqrt(jnp.abs(jnp.diagonal(full)))
    full = full / jnp.outer(unit, unit)
    eye = jnp.eye(len(a), dtype=a.dtype)
    inverse = cho_solve(cho_factor(full, lower=True), eye) if definite else jnp.linalg.inv(full)
    inverse = inverse / jnp.outer(unit, unit)
    return jnp.where(kept[:, None] & kept, inverse, 0)


def _in_units(problem: Problem, covariance: Array, size: Array) -> Covariance:
    """The covariance of the coefficients, if that of b is `size**2 covariance`.

    NaN where the data do not identify a coefficient.
    """
    basis = coefficient_basis(problem)
    longest = jnp.max(jnp.abs(basis), axis=1)
    longest = jnp.where(longest > 0, longest, 1)
    basis = basis / longest[:, None]
    scaled = basis @ covariance @ basis.T
    units = jnp.where(problem.identifiable, longest * (size * problem.y_unit), jnp.nan)
    matrix = units[:, None] * scaled * units
    return Covariance(matrix, units * jnp.sqrt(jnp.diagonal(scaled)))
