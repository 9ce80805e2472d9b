"""Linear regression that outliers do not spoil: to the last digit, with standard errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from robustloss.linear import inference
from robustloss.linear._choice import (
    checked_method,
    level,
    redescends,
    residual_scale,
    s_loss,
    scale_of,
    takes,
    tuned,
)
from robustloss.linear._problem import Problem, coefficients, from_coefficients, problem
from robustloss.linear._result import LinearFit
from robustloss.linear.high_breakdown import s_estimate
from robustloss.linear.interior_point import quantile_fit
from robustloss.linear.irls import At, Estimate, Spread, least_squares, m_estimate, thinned
from robustloss.losses._elementwise import (
    at_least_float32,
    between,
    check_loss,
    positive,
    real_array,
    with_leaves,
)
from robustloss.losses.convex import huber
from robustloss.reduce import mask, nonnegative
from robustloss.views import weight

__all__ = ["LinearFit", "fit_linear"]

Loss = Callable[..., Array]
Scale = Callable[..., Array]


def fit_linear(
    X: ArrayLike,
    y: ArrayLike,
    loss: Loss = huber,
    *,
    tuning: ArrayLike | None = None,
    scale: str | Scale | ArrayLike = "mad",
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
    | `"interior_point"` | `absolute_error`, `quantile` | the exact optimum, met in as many \
rows as there are coefficients |
    | `"mm"` | losses whose influence returns to zero | the S-estimate, which just under half of \
the rows cannot carry off, then the M-estimate next to it, at its scale |

    By default a loss gets the safe one of these that is made for it. Outliers in y alone are no
    match for any loss with a bounded influence; rows of X far from the others draw every convex
    loss to them, and only `"mm"` withstands. What decides there is where the fit starts:
    redescending losses have many minima, and the lowest need not be the robust one.

    Runs compiled, under jit and vmap, in float32 and float64; another tuning, scale, mask or
    parameter of the loss does not compile again. Columns of X may be in any units. Where columns
    depend on others, the fit is still defined, `unique` is False and the covariance NaN.

    Args:
        X: real numbers of the shape (rows, columns), without a column of ones.
        y: of the shape (rows,), or (rows, targets): one fit each, with a first axis for them.
        loss: an elementwise function of the residual; other parameters than `delta` with
            `functools.partial`. If it has no free `delta`, it is taken as it is.
        tuning: `delta` in units of the scale; None takes 95 % efficiency at the normal.
        scale: what is estimated along with the coefficients, of residuals about 0: a name in
            `robustloss.scale` ("proposal2" with k = 1.345 and degrees of freedom as in R), a
            function such as those, or a number that is the scale. "mm" has its own.
        method: one of the table, or None.
        start: the coefficients to start from, the intercept first if there is one; None takes
            least squares. Only for "irls".
        intercept: whether the fit has one.
        where: booleans of the shape (rows,); False drops a row, which may then hold anything.
        weights: numbers >= 0 of the shape (rows,), on the losses; only their ratios count.
        key: a `jax.random.key` for the subsets of "mm"; None takes always the same.

    Returns:
        A `LinearFit`. Not converged, or NaN, where the data hold a NaN or infinity.

    Raises:
        ValueError: shapes that do not fit, fewer rows than coefficients, a method that is not
            made for the loss, or anything out of its range.
        TypeError: what is not real numbers, or no function.

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
    check_loss(loss)
    X, y = _data(X, y)
    n, k = X.shape[0], X.shape[1] + bool(intercept)
    if not 0 < k <= n:
        raise ValueError(f"{k} coefficients need at least one and as many rows, got {n}")
    keep = None if where is None else mask(where, (n,))
    w = None if weights is None else nonnegative(weights, (n,), where).astype(y.dtype)
    method = checked_method(loss, method)
    b = None if start is None else real_array("start", start).astype(y.dtype)
    if b is not None and (b.shape != (k,) or method != "irls"):
        raise ValueError(
            f'start is for method="irls" and must have the shape ({k},), '
            f"got method={method!r} and the shape {b.shape}"
        )
    free = takes(loss, "delta")
    if tuning is not None and not free:
        raise ValueError("tuning sets delta, but this loss has no free delta")
    if tuning is None:
        tuning = tuned(loss) if free else 1.0
    if method == "mm" and not (isinstance(scale, str) and scale == "mad"):
        raise ValueError(f'method="mm" estimates its own scale, got scale={scale!r}')
    estimated, number = residual_scale(scale, w is not None)
    # One minimum is found from anywhere, several only from where one starts.
    anywhere = b is None and method == "irls" and redescends(loss) is False
    return _fit_linear(
        method, free, bool(intercept), anywhere, with_leaves(loss),
        s_loss(loss) if method == "mm" else None,
        estimated,
        X, y, positive("tuning", tuning).astype(y.dtype),
        positive("scale", number).astype(y.dtype),
        between("q", level(loss) if method == "interior_point" else 0.5, 0, 1).astype(y.dtype),
        b, keep, w, jax.random.key(0) if key is None else key,
    )  # fmt: skip


@partial(jax.jit, static_argnums=range(4))
def _fit_linear(
    method: str, free: bool, intercept: bool, anywhere: bool, loss: Partial, chi: Partial | None,
    of_residuals: Partial | None, X: Array, y: Array, tuning: Array, given: Array, level: Array,
    start: Array | None, keep: Array | None, w: Array | None, key: Array,
) -> LinearFit:  # fmt: skip
    def at(s: Array) -> Loss:
        return partial(loss, delta=tuning * s) if free else loss

    def one(y: Array) -> LinearFit:
        of = problem(X, y, keep, w, intercept)
        floor = 16 * jnp.finfo(y.dtype).eps * of.size
        floor = jnp.where(floor > 0, floor, jnp.finfo(y.dtype).tiny ** 0.5)

        def spread(of: Problem, r: Array, s: Array, far: Array) -> Array:
            if of_residuals is None:
                return given
            return jnp.maximum(scale_of(of_residuals, r, of, s, far), floor)

        if method == "interior_point":
            vertex = quantile_fit(of, level)
            s = spread(of, vertex.residuals, of.size, of.size)
            found = Estimate(vertex.b, s, vertex.residuals, vertex.converged, vertex.steps)
            covariance = inference.powell(of, level, vertex.residuals)
            return _result(of, at, found, floor, covariance, vertex.unique)
        if chi is not None:
            found, covariance = _mm(of, at, chi, floor, key)
        else:
            b = None if start is None else from_coefficients(of, start)
            found = _m(of, at, spread, b, anywhere, joint=free and of_residuals is not None)
            covariance = inference.huber_h1(of, at, found)
        return _result(of, at, found, floor, covariance, jnp.asarray(True))

    with jax.default_matmul_precision("highest"):
        return one(y) if y.ndim == 1 else jax.vmap(one, 1)(y)


def _m(
    of: Problem, at: At, spread: Spread, start: Array | None, anywhere: bool, joint: bool
) -> Estimate:
    """The M-estimate, from least squares unless told."""
    some = thinned(of) if anywhere else None
    if some is not None:
        near = m_estimate(some, at, spread, least_squares(some), joint=joint)
        return m_estimate(of, at, spread, near.b, near.scale, joint=joint)
    return m_estimate(of, at, spread, least_squares(of) if start is None else start, joint=joint)


def _mm(of: Problem, at: At, chi: Partial, floor: Array, key: Array) -> tuple[Estimate, Array]:
    """The M-estimate at the scale of the S-estimate, which it starts from."""
    _, n = inference.counts(of)
    share = jnp.maximum(0.5 * (1 - of.rank / n), 0.5 / n)
    initial = s_estimate(of, chi, share, floor, key)
    s = initial.scale
    found = m_estimate(of, at, lambda of, r, s, far: s, initial.b, s)
    # A scale of 0 leaves nothing to improve.
    exact = s <= floor
    found = jax.tree.map(lambda x, y: jnp.where(exact, y, x), found, initial)
    found = found._replace(
        converged=found.converged & initial.converged, steps=found.steps + initial.steps
    )

    def of_s(s: Array) -> Loss:
        return lambda r: s * (s * chi(r / s))

    return found, inference.after_s(of, at, of_s, 0.5, found, initial)


def _result(
    of: Problem, at: At, found: Estimate, floor: Array, covariance: Array, unique: Array
) -> LinearFit:
    raw = coefficients(of, found.b)
    exact = found.scale <= floor
    # What rounding left of 0 is nobody's outlier.
    residuals = jnp.where(exact & (jnp.abs(found.residuals) <= floor), 0, -found.residuals)
    each = weight(at(found.scale), -residuals)
    if of.keep is not None:
        residuals, each = jnp.where(of.keep, residuals, jnp.nan), jnp.where(of.keep, each, 0)
    return LinearFit(
        raw[1:] if of.intercept else raw,
        raw[0] if of.intercept else jnp.zeros_like(raw, shape=()),
        jnp.where(exact, 0, found.scale),
        each,
        residuals,
        jnp.where(exact & ~jnp.isnan(covariance), 0, covariance),
        found.converged,
        found.steps,
        unique & jnp.all(of.told),
    )


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
