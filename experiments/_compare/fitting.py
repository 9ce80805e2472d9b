"""Fits a linear model to one data set with each of several losses."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import robustloss as rl
from experiments import Progress
from experiments._losses import set_delta, tune_delta
from experiments.data import Data
from robustloss._numerics.normal import UPPER_QUARTILE
from robustloss.losses import redescending


class Result(NamedTuple):
    """The fits in the order of the losses, everything in the units of the data."""

    data: Data
    losses: tuple[str, ...]
    scale: float  # of the residuals, in units of the target
    scale_note: str
    deltas: np.ndarray  # NaN where a loss has none
    coefficients: np.ndarray  # (losses, 1 + features), the intercept first
    residuals: np.ndarray  # (losses, rows), fitted minus observed
    spreads: np.ndarray  # MAD / 0.6745 of the residuals of each fit
    objectives: np.ndarray  # mean loss
    excesses: np.ndarray  # (objective - exact minimum) / objective
    weights: np.ndarray  # (losses, rows), relative to a typical row, at most 1
    steps: np.ndarray
    converged: np.ndarray
    kinked: np.ndarray  # whether a loss has no slope at its minimum
    drifts: np.ndarray  # relative decrease of the objective in the last tenth of the steps
    seconds: np.ndarray
    mm: rl.LinearFit | None  # with exact fits


class Description(NamedTuple):
    """The loss and its derivatives at the residuals of a fit."""

    objective: jax.Array  # mean loss
    weights: jax.Array  # relative to a residual of median size, at most 1
    influence: jax.Array
    curvature: jax.Array


class _Standardised(NamedTuple):
    """The data in columns of mean 0 and standard deviation 1, and how to transform back."""

    X: np.ndarray  # (rows, 1 + features), a column of ones first
    y: np.ndarray
    center: np.ndarray
    deviation: np.ndarray
    target_center: float
    target_deviation: float

    def transform_back(self, params: np.ndarray) -> np.ndarray:
        """(losses, 1 + features) coefficients in the units of the data."""
        coefficients = params * self.target_deviation
        coefficients[:, 1:] /= self.deviation
        coefficients[:, 0] += self.target_center - coefficients[:, 1:] @ self.center
        return coefficients


def _standardise(data: Data) -> _Standardised:
    center, deviation = data.X.mean(0), data.X.std(0, ddof=1)
    target_center, target_deviation = data.y.mean(), data.y.std(ddof=1)
    X = np.column_stack([np.ones(len(data.y)), (data.X - center) / deviation])
    y = (data.y - target_center) / target_deviation
    return _Standardised(X, y, center, deviation, target_center, target_deviation)


def fit_data(
    data: Data,
    names: tuple[str, ...],
    *,
    scale: float | None,
    steps: int,
    seed: int | None,
    exact: bool,
    progress: Progress,
) -> Result:
    """Fits each loss to the data in standardised columns and transforms the fits back."""
    standardised = _standardise(data)
    X, y, target_deviation = standardised.X, standardised.y, standardised.target_deviation
    start = np.zeros(X.shape[1])
    if seed is not None:
        start = np.asarray(jax.random.normal(jax.random.key(seed), start.shape))
    seconds: dict[str, float] = {}

    def fit(name: str, delta: float, start: np.ndarray = start) -> rl.Fit:
        loss = set_delta(name, delta)
        optimizer = _build_adam(steps) if _has_kink(name) else _LBFGS
        begin = time.perf_counter()
        found = jax.block_until_ready(
            rl.fit(loss, _predict, start, X, y, optimizer=optimizer, steps=steps)
        )
        seconds.setdefault(name, time.perf_counter() - begin)  # the first fit compiles
        return found

    progress(0, "scale")
    if scale is None:
        unit, note = _estimate_scale(fit, X, y)
    else:
        unit, note = scale / target_deviation, "given by --scale"

    deltas, fits = [], []
    for i, name in enumerate(names):
        progress((1 + i) / (2 + len(names)), name)
        deltas.append(tune_delta(name, efficiency=0.95) * unit)
        # A redescending loss has several minima: the one near Huber's fit is wanted.
        redescends = name in redescending.__all__
        huber = fit("huber", tune_delta("huber", efficiency=0.95) * unit) if redescends else None
        fits.append(fit(name, deltas[-1], start if huber is None else huber.params))

    params = np.array([f.params for f in fits])
    residuals = (params @ X.T - y) * target_deviation
    deltas = np.array(deltas) * target_deviation
    descriptions = [
        jax.device_get(_describe(name, delta, r))
        for name, delta, r in zip(names, deltas, residuals, strict=True)
    ]
    progress((1 + len(names)) / (2 + len(names)), "exact fits")
    mm = jax.device_get(rl.fit_linear(data.X, data.y, rl.tukey)) if exact else None
    return Result(
        data=data,
        losses=names,
        scale=float(unit * target_deviation),
        scale_note=note,
        deltas=deltas,
        coefficients=standardised.transform_back(params),
        residuals=residuals,
        spreads=np.median(np.abs(residuals), axis=1) / UPPER_QUARTILE,
        objectives=np.array([description.objective for description in descriptions]),
        excesses=np.array(
            [
                _measure_excess(name, X / target_deviation, data if exact else None, description)
                for name, description in zip(names, descriptions, strict=True)
            ]
        ),
        weights=np.array([description.weights for description in descriptions]),
        steps=np.array([f.steps for f in fits]),
        converged=np.array([f.converged for f in fits]),
        kinked=np.array([_has_kink(name) for name in names]),
        drifts=np.array([_measure_drift(f) for f in fits]),
        seconds=np.array([seconds[name] for name in names]),
        mm=mm,
    )


def _estimate_scale(
    fit: Callable[[str, float], rl.Fit], X: np.ndarray, y: np.ndarray
) -> tuple[float, str]:
    """MAD / 0.6745 of the residuals of Huber's fit, and a note on how it was found.

    Scale and fit are found together by iteration from MAE's fit. Where more than half of the
    residuals are 0, their MAD is 0, and the mean size of the residuals takes its place.
    """

    def measure_residuals(found: rl.Fit) -> np.ndarray:
        return np.abs(X @ np.asarray(found.params) - y)

    size = measure_residuals(fit("absolute_error", np.nan))
    exact = 1e-6  # in spreads of the target: the error of a first-order fit to exact data
    for _ in range(200):
        scale = float(np.median(size)) / UPPER_QUARTILE
        if scale < exact:
            break
        size = measure_residuals(fit("huber", tune_delta("huber", efficiency=0.95) * scale))
        if abs(np.median(size) / UPPER_QUARTILE - scale) <= 1e-9 * scale:
            return scale, "MAD / 0.6745 of Huber's residuals, found together with the fit"
    else:
        return scale, "MAD / 0.6745 of Huber's residuals after 200 rounds, not yet settled"
    mean = float(np.sqrt(np.pi / 2) * np.mean(size))
    if mean >= exact:
        return (
            mean,
            "half of the rows lie on the fit, so the MAD is 0; 1.25 mean |residual| instead",
        )
    return 1.0, "all rows lie on the fit; the standard deviation of the target instead"


# An optimizer is part of the compiled program: another object of the same kind compiles again.
_LBFGS = optax.lbfgs()


@cache
def _build_adam(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(0.1, steps))


@cache
def _has_kink(name: str) -> bool:
    return bool(np.isinf(jax.jit(partial(rl.weight, set_delta(name, 1.0)))(0.0)))


def _measure_drift(found: rl.Fit) -> float:
    """The relative decrease of the objective in the last tenth of the steps."""
    history = np.asarray(found.history)
    before, last = history[int(0.9 * int(found.steps))], history[int(found.steps)]
    return float(abs(before - last) / last) if last > 0 else 0.0


def _predict(params: jax.Array, X: jax.Array) -> jax.Array:
    return X @ params


def _measure_excess(name: str, X: np.ndarray, data: Data | None, description: Description) -> float:
    """The excess of the objective over the exact minimum, relative to the objective.

    For a smooth loss the excess is that of the quadratic approximation. A loss with a kink needs
    an exact fit to the data; without the data its excess is NaN.
    """
    objective = description.objective
    if objective == 0:
        return 0.0
    if _has_kink(name):
        if data is None:
            return np.nan
        best = rl.fit_linear(data.X, data.y, set_delta(name, np.nan))
        exact = float(rl.mean(set_delta(name, np.nan), -best.residuals))
        return max(objective - exact, 0.0) / objective
    slope = X.T @ description.influence
    step = np.linalg.lstsq(X.T @ (description.curvature[:, None] * X), slope)[0]
    return float(abs(slope @ step) / 2 / len(description.influence) / objective)


@partial(jax.jit, static_argnums=0)
def _describe(name: str, delta: float, residuals: jax.Array) -> Description:
    loss = set_delta(name, delta)
    weights = rl.weight(loss, residuals)
    unit = rl.weight(loss, jnp.median(jnp.abs(residuals)))
    relative = jnp.where(jnp.isinf(weights), 1.0, jnp.minimum(weights / unit, 1.0))
    return Description(
        rl.mean(loss, residuals),
        relative + 0.0,  # no -0
        rl.influence(loss, residuals),
        rl.curvature(loss, residuals),
    )
