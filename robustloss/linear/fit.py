"""Linear regression that outliers do not spoil: to the last digit, with standard errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from robustloss import inference
from robustloss._arguments import (
    at_least_float32,
    mask,
    positive,
    ratios,
    real_array,
    relative,
    with_leaves,
)
from robustloss._regression import (
    Estimate,
    LossAtScale,
    Problem,
    from_user_units,
    in_user_units,
    standardise,
)
from robustloss.linear.high_breakdown import s_estimate
from robustloss.linear.irls import EstimateScale, least_squares, m_estimate, met_exactly, subsample
from robustloss.linear.quantile import quantile_fit
from robustloss.linear.result import LinearFit
from robustloss.linear.settings import (
    checked_key,
    checked_loss,
    checked_method,
    level,
    one_number,
    residual_scale,
    s_loss,
    scale_of,
    tuned,
)
from robustloss.losses.convex import huber
from robustloss.types import Loss
from robustloss.views import weight

__all__ = ["LinearFit", "fit_linear"]

Scale = Callable[..., Array]

# Power of eps, in sizes of y. At a smaller scale the rounding of the residuals is more than a
# thousandth of the scale in float64, and more than a hundredth in float32. Rows that are this close
# to the fit count as met exactly.
_SCALE_FLOOR = 0.75


def fit_linear(
    X: ArrayLike,
    y: ArrayLike,
    loss: Loss = huber,
    *,
    tuning: ArrayLike | None = None,
    scale: str | Scale | ArrayLike | None = None,
    method: str | None = None,
    start: ArrayLike | None = None,
    intercept: bool = True,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    key: Array | None = None,
) -> LinearFit:
    """Fits `y = X @ coefficients + intercept` so that outliers do not spoil it.

    Minimises the total loss of the residuals, each divided by a robust scale: the loss's
    `delta` is `tuning * scale`.

    | method | for | what it does |
    |---|---|---|
    | `"irls"` | losses with a slope that is smooth at 0 | Newton's steps and reweighted least \
squares until the equations of the coefficients and of the scale hold together |
    | `"interior_point"` | `absolute_error`, `quantile` | the exact optimum, which meets as many \
rows as there are coefficients |
    | `"mm"` | losses whose influence returns to zero | the S-estimate, which just under half of \
the rows cannot carry off, then the M-estimate next to it, at its scale |

    By default each loss gets the safe method that is made for it. A loss with a bounded influence
    resists outliers in y alone. Rows of X far from the others draw every fit with a convex loss to
    them; only `"mm"` resists such rows. A redescending loss has many minima, of which the lowest
    need not be the robust one: the start of the fit decides.

    The fit runs compiled, under jit and vmap, in float32 and float64; another tuning, scale, mask
    or parameter of the loss does not compile again. Columns of X may be in any units. Where columns
    depend on others, the fit is still defined, `unique` is False and the covariance NaN.

    Args:
        X: real numbers of the shape (rows, columns), without a column of ones.
        y: real numbers of the shape (rows,), or (rows, targets) for one fit of each target; the
            targets are then the last axis of every field of the result.
        loss: an elementwise function of the residual; parameters other than `delta` with
            `functools.partial`. A loss without a free `delta` is used as it is.
        tuning: `delta` in units of the scale; None takes 95 % efficiency at the normal.
        scale: the scale of the residuals about 0, estimated together with the coefficients: a name
            in `robustloss.scale` ("proposal2" with k = 1.345 and degrees of freedom as in R), a
            function like those, or a number that is the scale. None takes the scale of the
            method: "mad", or for "mm" the scale of its S-estimate, which cannot be replaced.
        method: one of the table, or None.
        start: the coefficients to start from, the intercept first if there is one; None takes
            least squares. Only for "irls".
        intercept: whether the fit has an intercept.
        where: booleans of the shape (rows,); False drops a row, which may then hold anything.
        weights: numbers >= 0 of the shape (rows,), factors of the losses; only their ratios count.
        key: a `jax.random.key` that draws the subsets of "mm"; None always takes the same key.

    Returns:
        A `LinearFit`. `converged` says that the equations of the coefficients and of the scale
        hold to rounding at what is returned. It is False, and every number NaN, where the data
        hold a NaN or an infinity that is not dropped, where no row has a weight, or where a
        traced weight is negative.

    Raises:
        ValueError: shapes that do not fit, fewer rows than coefficients, a method that is not
            made for the loss, or an argument outside its range.
        TypeError: data that are not real numbers, or a loss that is not a function.

    Source: Huber (1981), Robust Statistics; Portnoy and Koenker (1997), Statistical Science 12,
    279-300; Yohai (1987), Annals of Statistics 15, 642-656.

    >>> x = jnp.arange(8.0)
    >>> y = (2 * x + 1).at[3].set(99.0)
    >>> found = fit_linear(x[:, None], y)
    >>> print(f"{found.coefficients[0]:.2f} x + {found.intercept:.2f}, {found.converged}")
    2.00 x + 1.00, True
    >>> found.flagged().nonzero()[0]
    Array([3], dtype=int32)
    """
    X, y = _data(X, y)
    described = checked_loss(loss)
    n, k = X.shape[0], X.shape[1] + bool(intercept)
    if not 0 < k <= n:
        raise ValueError(f"{k} coefficients need at least one and as many rows, got {n}")
    kept = None if where is None else mask(where, (n,))
    relative_weights = None if weights is None else _relative(weights, n, where).astype(y.dtype)
    method = checked_method(described, method)
    b = None if start is None else real_array("start", start).astype(y.dtype)
    if b is not None and (b.shape != (k,) or method != "irls"):
        raise ValueError(
            f'start is for method="irls" and must have the shape ({k},), '
            f"got method={method!r} and the shape {b.shape}"
        )
    has_delta = described.has_delta
    if tuning is not None and not has_delta:
        raise ValueError("tuning sets delta, but this loss has no free delta")
    if tuning is None:
        tuning = tuned(described) if has_delta else 1.0
    if method == "mm" and scale is not None:
        raise ValueError(f'method="mm" estimates its own scale, got scale={scale!r}')
    estimated, number = residual_scale("mad" if scale is None else scale, weights is not None)
    return _fit_linear(
        method, has_delta, bool(intercept), method == "irls" and described.is_convex,
        with_leaves(loss),
        s_loss(described) if method == "mm" else None,
        estimated,
        X, y, one_number("tuning", positive("tuning", tuning)).astype(y.dtype),
        one_number("scale", positive("scale", number)).astype(y.dtype),
        (level(described) if method == "interior_point" else jnp.asarray(0.5)).astype(y.dtype),
        b, kept, relative_weights, checked_key(key),
    )  # fmt: skip


@partial(jax.jit, static_argnums=range(4))
def _fit_linear(
    method: str, has_delta: bool, intercept: bool, convex: bool, loss: Partial, chi: Partial | None,
    scale_function: Partial | None, X: Array, y: Array, tuning: Array, given_scale: Array,
    level: Array, start: Array | None, where: Array | None, weights: Array | None, key: Array,
) -> LinearFit:  # fmt: skip
    def loss_at_scale(s: Array) -> Loss:
        return partial(loss, delta=tuning * s) if has_delta else loss

    def one(y: Array) -> LinearFit:
        problem = standardise(X, y, where, weights, intercept, in_units=has_delta)
        # A scale of 0 becomes about this by rounding.
        floor = jnp.finfo(y.dtype).eps ** _SCALE_FLOOR * problem.y_size
        floor = jnp.where(floor > 0, floor, jnp.finfo(y.dtype).tiny ** 0.5)

        def estimate_scale(problem: Problem, r: Array, s: Array, distance: Array) -> Array:
            if scale_function is None:
                return given_scale / problem.y_unit
            found = scale_of(scale_function, r, problem, s, distance)
            return jnp.where(found >= 0, jnp.maximum(found, floor), jnp.nan)

        if method == "interior_point":
            vertex = quantile_fit(problem, level)
            s = estimate_scale(problem, vertex.residuals, problem.y_size, problem.y_size)
            found = Estimate(
                vertex.coefficients, s, vertex.residuals, vertex.converged, vertex.steps
            )
            covariance, unique = inference.powell(problem, level, vertex.residuals), vertex.unique
        elif chi is not None:
            found, covariance = _mm(problem, loss_at_scale, chi, floor, key)
            unique = jnp.asarray(covariance.definite)
        else:
            begin = None if start is None else from_user_units(problem, start)
            joint = has_delta and scale_function is not None
            found = _m(problem, loss_at_scale, estimate_scale, begin, convex, joint)
            covariance = inference.huber_h1(problem, loss_at_scale, found)
            unique = jnp.asarray(covariance.definite)
        # A scale that is given is never one that was found to be 0.
        exact = (found.scale <= floor) & (chi is not None or scale_function is not None)
        if method != "interior_point" and has_delta:
            found = lax.cond(exact, partial(met_exactly, problem), lambda found: found, found)
        scaled = has_delta or method == "mm"
        return _result(problem, loss_at_scale, found, exact, floor, covariance, unique, scaled)

    # The user's strict settings for promotion apply to the user's code, not to this.
    allowed = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with jax.default_matmul_precision("highest"), allowed[0], allowed[1]:
        if y.ndim == 1:
            return one(y)
        return replace(jax.vmap(one, 1, -1)(y), several=True)


def _m(
    problem: Problem,
    loss: LossAtScale,
    estimate_scale: EstimateScale,
    start: Array | None,
    convex: bool,
    joint: bool,
) -> Estimate:
    """The M-estimate, from least squares unless a start is given."""
    estimate = partial(m_estimate, convex=convex, joint=joint)
    if start is not None:
        return estimate(problem, loss, estimate_scale, start)
    # A convex loss has one minimum, so a start from a subsample leads to the same solution.
    sample = subsample(problem) if convex else None
    if sample is None:
        b = least_squares(problem, clipped=convex)
        return estimate(problem, loss, estimate_scale, problem.coefficients(b))
    b = least_squares(sample, clipped=True)
    near = estimate(sample, loss, estimate_scale, problem.coefficients(b))
    return estimate(problem, loss, estimate_scale, near.coefficients, near.scale)


def _mm(
    problem: Problem, loss: LossAtScale, chi: Partial, floor: Array, key: Array
) -> tuple[Estimate, inference.Covariance]:
    """The M-estimate that starts from the S-estimate and keeps its scale."""
    _, n = inference.counts(problem)
    share = jnp.maximum(0.5 * (1 - problem.rank / n), 0.5 / n)
    initial = s_estimate(problem, chi, share, floor, key)
    s = initial.scale
    found = m_estimate(problem, loss, lambda problem, r, s, distance: s, initial.coefficients, s)
    # Where the scale is 0, the S-estimate meets its rows exactly and is the result.
    exact = s <= floor
    found = jax.tree.map(lambda x, y: jnp.where(exact, y, x), found, initial)
    found = found._replace(
        converged=found.converged & initial.converged, steps=found.steps + initial.steps
    )
    return found, inference.after_s(problem, loss, chi, 0.5, found, initial)


def _result(
    problem: Problem,
    loss: LossAtScale,
    found: Estimate,
    exact: Array,
    floor: Array,
    covariance: inference.Covariance,
    unique: Array,
    scaled: bool,
) -> LinearFit:
    """The fit in the user's units; NaN where nothing could be fitted or the data hold a NaN."""
    row_weights = problem.row_weights()
    kept = jnp.ones(problem.y.shape, bool) if problem.where is None else problem.where
    sound = jnp.all(jnp.isfinite(found.residuals) | ~kept) & jnp.isfinite(found.scale)
    sound &= jnp.any(row_weights > 0)
    sound &= jnp.all(jnp.isfinite(row_weights) & (row_weights >= 0))
    sound &= jnp.all(jnp.isfinite(found.coefficients))
    nan = jnp.where(sound, 0, jnp.nan).astype(problem.y.dtype)

    # A residual that rounding left of 0 must not be flagged as an outlier of a scale of 0.
    met = jnp.abs(found.residuals) <= jnp.where(exact, floor, 0)
    residuals = jnp.where(met, 0, found.residuals)
    weights = weight(loss(found.scale), residuals)
    residuals = jnp.where(kept, -problem.y_unit * residuals + nan, jnp.nan)
    # A scale of 0 does not measure the errors, unless all errors are 0.
    perfect = jnp.all(met | ~kept)
    unknown = jnp.where(exact & scaled & ~perfect, jnp.nan, 0)
    matrix, errors = (
        jnp.where(exact & perfect, 0 * x, x) + nan + unknown
        for x in (covariance.matrix, covariance.standard_errors)
    )
    identifiable = problem.identifiable
    matrix = jnp.where(identifiable[:, None] & identifiable, matrix, jnp.nan)
    raw = in_user_units(problem, found.coefficients) + nan
    return LinearFit(
        raw[1:] if problem.intercept else raw,
        raw[0] if problem.intercept else jnp.zeros_like(raw, shape=()),
        jnp.where(exact, 0, problem.y_unit * found.scale) + nan,
        jnp.where(kept, weights + nan, 0),
        residuals,
        matrix,
        found.converged & sound,
        found.steps,
        unique & jnp.all(identifiable),
        errors,
    )


def _relative(weights: ArrayLike, n: int, where: ArrayLike | None) -> Array:
    """Weights of which the largest is near 1, since only their ratios count; NaN where invalid."""
    given, _ = ratios(weights, (n,), where, (0,))
    return relative(given, (0,))[0]


def _data(X: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """X and y in one floating type, of shapes that fit."""
    X, y = real_array("X", X), real_array("y", y)
    if X.ndim != 2 or y.ndim not in (1, 2) or len(X) != len(y):
        raise ValueError(
            "X must have the shape (rows, columns) and y (rows,) or (rows, targets), "
            f"got {X.shape} and {y.shape}"
        )
    dtype = jnp.result_type(X, y)
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    dtype = at_least_float32(dtype)
    return X.astype(dtype), y.astype(dtype)
