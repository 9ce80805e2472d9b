"""Linear fits by optax: many losses and thousands of data sets in one compiled call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

import robustloss as rl
from experiments import UsageError
from experiments._losses import has_delta, resolve_loss, set_delta, tune_delta
from robustloss.losses import redescending

Loss = Callable[..., Array]

_LBFGS = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(8, initial_guess_strategy="one"))
_ADAM = optax.adam(optax.cosine_decay_schedule(0.01, 300))  # in units of the scale
_ONE_STEP = optax.sgd(0.5)
_PATH = (0.3, 0.1, 0.03, 0.01)  # delta of the Huber fits, in scales, from which MAE's fit starts


def fit_losses(names: tuple[str, ...], X: Array, y: Array) -> tuple[Array, Array]:
    """The parameters of each loss's fit, the intercept first, and whether they converged.

    The scale of the residuals is taken as 1, and each `delta` is 95 % efficient at this scale.
    A convex loss starts at the best fit so far, a redescending loss at MSE's fit. MAE's fit is the
    end of a path of Huber fits with decreasing `delta`, and has converged if these have. A fit that
    starts or ends where a redescending loss is flat counts as converged too.
    """
    # The fit is in orthogonal columns.
    A = jnp.concatenate([jnp.ones((len(y), 1), X.dtype), X], axis=1)
    triangle = jnp.linalg.cholesky(A.T @ A / len(y))
    Q = solve_triangular(triangle, A.T, lower=True).T
    least_squares = Q.T @ y / len(y)
    candidates = [
        triangle.T @ jnp.zeros_like(least_squares).at[0].set(jnp.median(y)),
        least_squares,
    ]

    def choose_start(loss: Loss) -> Array:
        values = [rl.mean(loss, _model(b, Q), y) for b in candidates]
        return jnp.stack(candidates)[jnp.argmin(jnp.stack(values))]

    def fit(loss: Loss, start: Array, optimizer: Any = _LBFGS, steps: int = 60) -> rl.Fit:
        found = rl.fit(loss, _model, start, Q, y, optimizer=optimizer, steps=steps)
        improved = found.value <= rl.mean(loss, _model(start, Q), y)  # a line search may fail
        return replace(found, params=jnp.where(improved, found.params, start))

    def continue_path(b: Array, delta: Array) -> tuple[Array, Array]:
        found = fit(partial(rl.huber, delta=delta), b)
        return found.params, found.converged

    fits = {}
    for name in names:
        if name == "absolute_error":
            path, settled = lax.scan(
                continue_path, choose_start(rl.absolute_error), jnp.array(_PATH)
            )
            fits[name] = fit(rl.absolute_error, path, _ADAM, 300).params, jnp.all(settled)
            continue
        loss = set_delta(name, tune_delta(name, efficiency=0.95) if has_delta(name) else 1.0)
        redescends = name in redescending.__all__
        if name == "squared_error":  # the curvature is 2 in these columns
            found = fit(loss, candidates[0], _ONE_STEP, 5)
        else:
            found = fit(loss, least_squares if redescends else choose_start(loss))
        # Where no row has influence, the fit has ended, though `rl.fit` reports no minimum.
        slope = jax.grad(lambda b, loss=loss: rl.mean(loss, _model(b, Q), y))(found.params)
        fits[name] = found.params, found.converged | (redescends & jnp.all(slope == 0))
        if not redescends:
            candidates.append(found.params)
    params, converged = (jnp.stack(x) for x in zip(*fits.values(), strict=True))
    return solve_triangular(triangle.T, params.T, lower=False).T, converged


def resolve_losses(names: tuple[str, ...]) -> tuple[str, ...]:
    """The library's names of these losses; an error if MSE, MAE or Huber's loss is missing."""
    known = tuple(dict.fromkeys(resolve_loss(name) for name in names))
    if missing := {"squared_error", "absolute_error", "huber"} - set(known):
        raise UsageError(f"--losses needs {', '.join(sorted(missing))} as well.")
    return known


def fit_exact(name: str, X: Array, y: Array) -> Array:
    """The parameters at the exact optimum of a convex loss."""
    fixed = {"scale": 1.0} if has_delta(name) else {}
    found = rl.fit_linear(X, y, rl.LOSSES[name], **fixed)
    return jnp.append(found.intercept, found.coefficients)


def _model(params: Array, Q: Array) -> Array:
    return Q @ params
