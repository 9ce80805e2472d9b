"""Linear fits by optax: one data set by many losses, thousands of sets in one compiled call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.scipy.linalg import solve_triangular
from jax.sharding import Mesh, PartitionSpec

import robustloss as rl
from experiments import UsageError
from experiments._losses import has_delta, tuned, with_delta
from robustloss.losses import redescending

Loss = Callable[..., Array]

_LBFGS = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(8, initial_guess_strategy="one"))
_ADAM = optax.adam(optax.cosine_decay_schedule(0.01, 300))  # in units of the scale
_ONE_STEP = optax.sgd(0.5)
_TOWARDS_MAE = (0.3, 0.1, 0.03, 0.01)  # delta of Huber's loss, in scales, before MAE itself
_AT_ONCE = 16  # data sets, few enough for a cache


def fit_each(names: tuple[str, ...], X: Array, y: Array) -> tuple[Array, Array]:
    """The parameters of each loss's fit, the intercept first, and whether they converged.

    The residuals' scale is taken to be 1, and each `delta` is 95 % efficient at it. Convex losses
    start at the best of what is known by then; those that redescend start at MSE's fit. MAE is
    the end of a path of Huber's fits with ever smaller `delta`, and converged if these are.
    """
    # In columns that are orthogonal.
    A = jnp.concatenate([jnp.ones((len(y), 1), X.dtype), X], axis=1)
    triangle = jnp.linalg.cholesky(A.T @ A / len(y))
    Q = solve_triangular(triangle, A.T, lower=True).T
    least = Q.T @ y / len(y)
    known = [triangle.T @ jnp.zeros_like(least).at[0].set(jnp.median(y)), least]

    def best(loss: Loss) -> Array:
        values = [rl.mean(loss, _model(b, Q), y) for b in known]
        return jnp.stack(known)[jnp.argmin(jnp.stack(values))]

    def fit(loss: Loss, start: Array, optimizer: Any = _LBFGS, steps: int = 60) -> rl.Fit:
        found = rl.fit(loss, _model, start, Q, y, optimizer=optimizer, steps=steps)
        better = found.value <= rl.mean(loss, _model(start, Q), y)  # a line search may fail
        return found._replace(params=jnp.where(better, found.params, start))

    def nearer(b: Array, delta: Array) -> tuple[Array, Array]:
        found = fit(partial(rl.huber, delta=delta), b)
        return found.params, found.converged

    fits = {}
    for name in names:
        if name == "absolute_error":
            path, settled = lax.scan(nearer, best(rl.absolute_error), jnp.array(_TOWARDS_MAE))
            fits[name] = fit(rl.absolute_error, path, _ADAM, 300).params, jnp.all(settled)
            continue
        loss = with_delta(name, tuned(name, efficiency=0.95) if has_delta(name) else 1.0)
        redescends = name in redescending.__all__
        if name == "squared_error":  # whose curvature is 2 in these columns
            found = fit(loss, known[0], _ONE_STEP, 5)
        else:
            found = fit(loss, least if redescends else best(loss))
        fits[name] = found.params, found.converged
        if not redescends:
            known.append(found.params)
    params, converged = (jnp.stack(x) for x in zip(*fits.values(), strict=True))
    return solve_triangular(triangle.T, params.T, lower=False).T, converged


def check_losses(names: tuple[str, ...]) -> None:
    """Tells which can be compared: those that have a fit at 95 % efficiency, with three of them."""
    for name in names:
        if name not in rl.LOSSES or (has_delta(name) and np.isnan(tuned(name, efficiency=0.95))):
            raise UsageError(f"--losses takes what `experiments compare` takes, got {name!r}.")
    needed = ("squared_error", "absolute_error", "huber")
    if missing := set(needed) - set(names):
        raise UsageError(
            f"--losses needs {', '.join(needed)}; {', '.join(sorted(missing))} missing."
        )


def exactly(name: str, X: Array, y: Array) -> Array:
    """The parameters at the exact optimum of a convex loss."""
    fixed = {"scale": 1.0} if has_delta(name) else {}
    found = rl.fit_linear(X, y, rl.LOSSES[name], **fixed)
    return jnp.append(found.intercept, found.coefficients)


def over_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of one item for a batch of them, compiled, the batch split over all devices.

    Each device has its own share and knows of no other. It takes a few items at a time: all of
    these wait for the one whose line search takes longest.
    """
    unit = jax.device_count() * _AT_ONCE
    split = PartitionSpec("items")

    def share(batch: Any) -> Any:
        return lax.map(function, batch, batch_size=_AT_ONCE)

    each = jax.jit(
        jax.shard_map(
            share, mesh=Mesh(np.array(jax.devices()), ("items",)), in_specs=split,
            out_specs=split, check_vma=False,
        )
    )  # fmt: skip

    def whole(batch: Any) -> Any:
        """Filled up, so that all devices and all turns have the same number."""
        n = len(jax.tree.leaves(batch)[0])
        return jax.tree.map(lambda x: x[np.arange(n + -n % unit) % n], batch)

    def run(batch: Any) -> Any:
        n = len(jax.tree.leaves(batch)[0])
        return jax.tree.map(lambda x: x[:n], each(whole(batch)))

    run.lower = lambda batch: each.lower(whole(batch))  # type: ignore[attr-defined]
    return run


def _model(params: Array, Q: Array) -> Array:
    return Q @ params
