"""Linear regression that outliers do not spoil: to the last digit, with standard errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.stats import norm
from jax.tree_util import Partial
from jax.typing import ArrayLike

from robustloss import scale as scales
from robustloss.linear import inference
from robustloss.linear._problem import Problem, coefficients, from_coefficients, problem
from robustloss.linear.high_breakdown import s_estimate
from robustloss.linear.interior_point import quantile_fit
from robustloss.linear.irls import At, Estimate, least_squares, m_estimate
from robustloss.losses._elementwise import (
    at_least_float32,
    between,
    check_loss,
    positive,
    real_array,
    with_leaves,
)
from robustloss.losses.asymmetric import quantile
from robustloss.losses.convex import absolute_error, huber
from robustloss.losses.redescending import tukey
from robustloss.reduce import mask, nonnegative
from robustloss.tuning import tune
from robustloss.views import influence, weight

__all__ = ["LinearFit", "fit_linear"]

Loss = Callable[..., Array]
Scale = Callable[..., Array]

METHODS = ("irls", "interior_point", "mm")


class LinearFit(NamedTuple):
    """What `fit_linear` found.

    A pytree: under vmap, and where y has several columns, each field has one more axis in front.
    """

    coefficients: Array
    """One for each column of X."""
    intercept: Array
    """0 in a fit without."""
    scale: Array
    """Of the residuals, robust; 0 where at least half of the rows are fitted exactly."""
    weights: Array
    """What each row counted, `psi(r) / r`; 0 where dropped, inf where MAE meets a row exactly."""
    residuals: Array
    """`y - predict(X)`; NaN where dropped."""
    covariance: Array
    """Of the intercept, where there is one, and the coefficients, in this order. NaN for those
    that the data cannot tell from others."""
    converged: Array
    """Whether what defines the fit holds, to rounding."""
    steps: Array
    """How many it took."""
    unique: Array
    """False where other coefficients are known to serve as well: columns that depend on
    others, of which the smallest solution was taken, or a MAE with a level edge."""

    def predict(self, X: ArrayLike) -> Array:
        """`X @ coefficients + intercept`; a row for each target if there are several."""
        rows = real_array("X", X)
        if rows.ndim == 0 or rows.shape[-1] != self.coefficients.shape[-1]:
            columns = self.coefficients.shape[-1]
            raise ValueError(f"X must have {columns} columns, got the shape {rows.shape}")
        return self.coefficients @ rows.T + self.intercept[..., None]

    def flagged(self, cutoff: float = 2.5) -> Array:
        """The rows whose residual is larger than `cutoff` scales."""
        return jnp.abs(self.residuals) > cutoff * self.scale[..., None]

    def standard_errors(self) -> Array:
        """The roots of the covariance's diagonal."""
        return jnp.sqrt(jnp.diagonal(self.covariance, axis1=-2, axis2=-1))

    def summary(self, names: Sequence[str] | None = None) -> str:
        """A table to print: coefficients, standard errors, z, p-values, 95 % intervals.

        Args:
            names: of the columns of X.

        Raises:
            ValueError: a batch of fits, or not one name for each column.
        """
        if self.coefficients.ndim != 1:
            raise ValueError("summary takes one fit; take one of a batch with jax.tree.map")
        columns = len(self.coefficients)
        names = [f"x{i + 1}" for i in range(columns)] if names is None else list(names)
        if len(names) != columns:
            raise ValueError(f"names must be {columns}, one for each column, got {len(names)}")
        values = np.asarray(self.coefficients)
        if len(self.covariance) > columns:
            names, values = ["intercept", *names], np.append(self.intercept, values)
        errors = np.asarray(self.standard_errors())
        with np.errstate(all="ignore"):
            z = values / errors
        p = 2 * np.asarray(norm.sf(np.abs(z)))
        low, high = values - 1.959963985 * errors, values + 1.959963985 * errors
        head = ["", "coef", "std err", "z", "P>|z|", "[0.025", "0.975]"]
        rows = [
            [name, *(f"{x:.4f}" for x in row[:2]), f"{row[2]:.3f}", f"{row[3]:.3f}",
             *(f"{x:.3f}" for x in row[4:])]
            for name, *row in zip(names, values, errors, z, p, low, high, strict=True)
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [head, *rows]) + 2 for i in range(len(head))]
        lines = [
            row[0].ljust(widths[0]) + "".join(
                cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
            )
            for row in [head, *rows]
        ]  # fmt: skip
        rule = "-" * len(lines[0])
        flagged = np.flatnonzero(np.asarray(self.flagged())) + 1
        kept = int(np.sum(~np.isnan(np.asarray(self.residuals))))
        end = "converged" if bool(self.converged) else "NOT CONVERGED"
        notes = [f"{kept} rows, scale {float(self.scale):.5g}, {end} in {int(self.steps)} steps"]
        if not bool(self.unique):
            notes.append("not unique: other coefficients serve as well")
        if flagged.size:
            shown = ", ".join(map(str, flagged[:12])) + (", ..." if flagged.size > 12 else "")
            notes.append(f"rows beyond 2.5 scales: {shown}")
        return "\n".join([lines[0], rule, *lines[1:], rule, *notes])


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
    method = _checked_method(loss, method)
    b = None if start is None else real_array("start", start).astype(y.dtype)
    if b is not None and (b.shape != (k,) or method != "irls"):
        raise ValueError(
            f'start is for method="irls" and must have the shape ({k},), '
            f"got method={method!r} and the shape {b.shape}"
        )
    free = _takes(loss, "delta")
    if tuning is not None and not free:
        raise ValueError("tuning sets delta, but this loss has no free delta")
    if tuning is None:
        tuning = _tuned(loss) if free else 1.0
    if method == "mm" and scale != "mad":
        raise ValueError(f'method="mm" estimates its own scale, got scale={scale!r}')
    estimated, number = _scale(scale, w is not None)
    return _fit_linear(
        method, free, bool(intercept), with_leaves(loss),
        _s_loss(loss) if method == "mm" else None,
        estimated,
        X, y, positive("tuning", tuning).astype(y.dtype),
        positive("scale", number).astype(y.dtype),
        between("q", _level(loss) if method == "interior_point" else 0.5, 0, 1).astype(y.dtype),
        b, keep, w, jax.random.key(0) if key is None else key,
    )  # fmt: skip


@partial(jax.jit, static_argnums=range(3))
def _fit_linear(
    method: str, free: bool, intercept: bool, loss: Partial, chi: Partial | None,
    of_residuals: Partial | None, X: Array, y: Array, tuning: Array, given: Array, level: Array,
    start: Array | None, keep: Array | None, w: Array | None, key: Array,
) -> LinearFit:  # fmt: skip
    def at(s: Array) -> Loss:
        return partial(loss, delta=tuning * s) if free else loss

    def one(y: Array) -> LinearFit:
        of = problem(X, y, keep, w, intercept)
        floor = 16 * jnp.finfo(y.dtype).eps * scales.mad(of.y, center=0.0, where=keep)
        floor = jnp.where(floor > 0, floor, jnp.finfo(y.dtype).tiny ** 0.5)

        def scale_of(r: Array) -> Array:
            return (
                given
                if of_residuals is None
                else jnp.maximum(_of_residuals(of_residuals, r, of), floor)
            )

        if method == "interior_point":
            vertex = quantile_fit(of, level)
            found = Estimate(
                vertex.b, scale_of(vertex.residuals), vertex.residuals, vertex.converged,
                vertex.steps,
            )  # fmt: skip
            covariance = inference.powell(of, level, vertex.residuals)
            return _result(of, at, found, floor, covariance, vertex.unique)
        if chi is not None:
            found, covariance = _mm(of, at, chi, floor, key)
        else:
            b = least_squares(of) if start is None else from_coefficients(of, start)
            found = m_estimate(of, at, scale_of, b)
            covariance = inference.huber_h1(of, at, found)
        return _result(of, at, found, floor, covariance, jnp.asarray(True))

    with jax.default_matmul_precision("highest"):
        return one(y) if y.ndim == 1 else jax.vmap(one, 1)(y)


def _mm(of: Problem, at: At, chi: Partial, floor: Array, key: Array) -> tuple[Estimate, Array]:
    """The M-estimate at the scale of the S-estimate, which it starts from."""
    _, n = inference.counts(of)
    share = jnp.maximum(0.5 * (1 - of.rank / n), 0.5 / n)
    initial = s_estimate(of, chi, share, floor, key)
    s = initial.scale
    found = m_estimate(of, at, lambda r: s, initial.b)
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


def _checked_method(loss: Loss, method: str | None) -> str:
    if method is None:
        if _base(loss) in (absolute_error, quantile):
            return "interior_point"
        method = "mm" if _redescends(loss) else "irls"
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "irls" and np.isinf(_weight_at_0(loss)):
        raise ValueError(
            'method="irls" cannot use a loss with a kink at 0, where its weight is infinite; '
            'absolute_error and quantile have method="interior_point"'
        )
    return method


def _base(loss: Loss) -> Loss:
    return loss.func if isinstance(loss, partial) else loss


def _takes(loss: Loss, name: str) -> bool:
    """Whether a function has a parameter that is not fixed yet."""
    if isinstance(loss, partial) and name in loss.keywords:
        return False
    return name in inspect.signature(loss).parameters


def _redescends(loss: Loss) -> bool:
    """Whether a residual of a million counts less than one of 1."""
    with jax.ensure_compile_time_eval():
        try:
            near, far = np.abs(np.asarray(influence(loss, jnp.asarray([0.5, 1e6]))))
        except jax.errors.TracerArrayConversionError:
            raise ValueError(
                "a loss with traced parameters does not tell its law: name the method"
            ) from None
    return bool(far < 0.01 * near)


def _weight_at_0(loss: Loss) -> float:
    with jax.ensure_compile_time_eval():
        try:
            return float(weight(loss, jnp.asarray(0.0)))
        except jax.errors.ConcretizationTypeError:
            return 1.0


def _level(loss: Loss) -> ArrayLike:
    """The quantile that a loss with a kink seeks."""
    if _base(loss) is absolute_error:
        return 0.5
    if _base(loss) is not quantile:
        raise ValueError('method="interior_point" is for absolute_error and quantile')
    fixed = loss.keywords if isinstance(loss, partial) else {}
    if "q" not in fixed:
        raise ValueError("quantile needs its q: functools.partial(rl.quantile, q=0.9)")
    return fixed["q"]


def _s_loss(loss: Loss) -> Partial:
    """The loss of the S-estimate: the same if it has a bound, else Tukey's."""
    if _takes(loss, "delta"):
        with jax.ensure_compile_time_eval():
            bound = loss(jnp.asarray(jnp.inf))
        if not isinstance(bound, jax.core.Tracer) and np.isfinite(bound):
            return with_leaves(partial(loss, delta=_tuned(loss, breakdown=0.5)))
    if not _redescends(loss):
        raise ValueError('method="mm" is for losses whose influence returns to zero')
    return with_leaves(partial(tukey, delta=_tuned(tukey, breakdown=0.5)))


def _tuned(loss: Loss, **request: float) -> float:
    """`tune` for 95 % efficiency, or as requested."""
    request = request or {"efficiency": 0.95}
    fixed = loss.keywords if isinstance(loss, partial) and not loss.args else {}
    try:
        hash(tuple(fixed.values()))
    except TypeError:
        return tune(loss, **request)
    if isinstance(loss, partial) and loss.args:
        return tune(loss, **request)
    return _tuned_once(_base(loss), tuple(sorted(fixed.items())), tuple(request.items()))


@lru_cache
def _tuned_once(function: Loss, fixed: Any, request: Any) -> float:
    return tune(partial(function, **dict(fixed)) if fixed else function, **dict(request))


def _scale(scale: str | Scale | ArrayLike, weighted: bool) -> tuple[Partial | None, ArrayLike]:
    """A function as a pytree, or None and the number that is given instead."""
    if not isinstance(scale, str) and not callable(scale):
        return None, scale
    if isinstance(scale, str):
        named = [name for name in scales.__all__ if name.islower() and name != "location_scale"]
        if scale not in named:
            known = ", ".join(named)
            raise ValueError(f"scale must be a number, a function or one of {known}, got {scale!r}")
        scale = partial(scales.proposal2, k=1.345) if scale == "proposal2" else vars(scales)[scale]
    if weighted and not _takes(scale, "weights"):
        raise ValueError(f"weights were given, but the scale {_base(scale).__name__} takes none")
    return with_leaves(scale), 1.0


def _of_residuals(scale: Partial, r: Array, of: Problem) -> Array:
    known = {"center": 0.0, "where": of.keep, "weights": of.w, "ddof": of.rank}
    return scale(r, **{name: x for name, x in known.items() if _takes(scale.func, name)})
