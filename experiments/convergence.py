"""Why is MAE slower, and why does it chatter?

Counts the steps until the parameters are near the optimum, for gradient descent on one linear fit
by MSE, Huber, log-cosh and MAE with four optimisers and two schedules of the step. Then measures
MAE with constant steps of many sizes, which never converges, and the remedies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments import Progress, UsageError, _plotting, _results, ignore_progress, require
from experiments._descent import descend
from experiments._linear_fits import fit_exact
from experiments._losses import has_delta, set_delta, title, tune_delta

LOSSES = ("squared_error", "huber", "log_cosh", "absolute_error")
RULES = {  # how an optimizer transforms the gradient, and the step size for it
    "sgd": (optax.identity(), 0.3),
    "momentum": (optax.trace(0.9), 0.03),
    "adam": (optax.scale_by_adam(), 0.1),
}
SCHEDULES = ("constant", "cosine")
LBFGS = optax.lbfgs()
DISTANCES = (1e-1, 1e-3, 1e-6)  # distances from the optimum, in standard deviations of the noise


@dataclass(frozen=True)
class Config:
    """Settings of `convergence`."""

    rows: int = 200
    """Rows of the data."""
    features: int = 4
    """Features of the data."""
    steps: int = 3000
    """Steps of each descent."""
    seed: int = 0
    """The seed of the data."""
    out: Path | None = None
    """The output folder; results/convergence by default."""
    plots: bool = True
    """Draw the picture."""


SMOKE = Config(rows=60, features=2, steps=1000)


class Result(NamedTuple):
    """Distances of the parameters from the exact optimum, in standard deviations of the noise."""

    paths: dict[
        tuple[str, str, str], np.ndarray
    ]  # by loss, optimizer and schedule; an entry for each step
    sizes: np.ndarray  # of the constant steps
    chatter: np.ndarray  # MAE's typical distance at the end, by size
    smooth: np.ndarray  # Huber's distance, by size
    remedies: dict[str, float]  # MAE's distance at the end with large steps, by remedy


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Descends with every loss, optimizer and schedule."""
    if config.rows < 5 * (config.features + 1) or config.features < 1:
        raise UsageError(
            f"--rows must be at least 5 times the parameters, got {config.rows} for "
            f"{config.features + 1}."
        )
    if config.steps < 100:
        raise UsageError(f"--steps must be >= 100, got {config.steps}.")
    with jax.enable_x64(True):
        return _run(config, progress)


def _run(config: Config, progress: Progress) -> Result:
    X_key, y_key, b_key = jax.random.split(jax.random.key(config.seed), 3)
    X = jax.random.normal(X_key, (config.rows, config.features))
    truth = jax.random.normal(b_key, (config.features + 1,))
    y = truth[0] + X @ truth[1:] + jax.random.normal(y_key, (config.rows,))
    A = jnp.concatenate([jnp.ones((config.rows, 1)), X], axis=1)
    optima = {name: fit_exact(name, X, y) for name in LOSSES}
    start = jnp.zeros_like(truth)
    k = jnp.arange(config.steps)
    # optax.cosine_decay_schedule as an array, so that both schedules share a compiled program.
    factors = jnp.stack([jnp.ones(config.steps), 0.5 * (1 + jnp.cos(jnp.pi * k / config.steps))])

    paths = {}
    for i, name in enumerate(LOSSES):
        progress(0.7 * i / len(LOSSES), title(name))
        objective = partial(_objective, name, A, y)
        for rule, (transform, size) in RULES.items():
            schedule_paths = jax.jit(jax.vmap(partial(_descend_rule, objective, transform, start)))(
                size * factors
            )
            for schedule, path in zip(SCHEDULES, schedule_paths, strict=True):
                paths[name, rule, schedule] = _distance(path, optima[name])
        descend_lbfgs = partial(descend, objective, LBFGS, steps=config.steps // 10)
        path = jax.jit(descend_lbfgs)(start)[1]
        paths[name, "lbfgs", "line search"] = _distance(path, optima[name])

    progress(0.8, "constant steps of many sizes")
    sizes = 2.0 ** -np.arange(2, 11)

    def measure_chatter(name: str, size: Array) -> Array:
        steps = size * jnp.ones(4 * config.steps)
        path = _descend_rule(partial(_objective, name, A, y), optax.identity(), optima[name], steps)
        return jnp.median(jnp.linalg.norm(path[len(path) // 2 :] - optima[name], axis=1))

    chatter, smooth = (
        np.asarray(jax.jit(jax.vmap(partial(measure_chatter, name)))(sizes))
        for name in ("absolute_error", "huber")
    )
    best = optima["absolute_error"]
    large = jax.jit(
        partial(_descend_rule, partial(_objective, "absolute_error", A, y), optax.identity(), start)
    )(0.3 * factors[0])
    tail = large[len(large) // 2 :]
    remedies = {
        "constant step": float(np.median(_distance(tail, best))),
        "mean of its second half": float(jnp.linalg.norm(tail.mean(0) - best)),
        "cosine schedule": float(paths["absolute_error", "sgd", "cosine"][-1]),
    }
    return Result(paths, sizes, chatter, smooth, remedies)


def check(result: Result) -> None:
    """MAE's chatter is proportional to the step, a schedule ends it, smooth losses have none."""
    slope = np.polyfit(np.log(result.sizes), np.log(result.chatter), 1)[0]
    require(0.9 < slope < 1.1, f"MAE's chatter grows with the step to the power {slope:.2f}")
    require(result.smooth.max() < 1e-9, "Huber's loss chatters")
    scheduled = result.remedies["cosine schedule"]
    require(
        scheduled < 0.2 * result.remedies["constant step"], "a schedule does not end the chatter"
    )
    for name in ("squared_error", "huber", "log_cosh"):
        require(
            count_steps(result, name, "lbfgs", "line search", 1e-6) < 100, f"{name}: L-BFGS is slow"
        )
        require(
            count_steps(result, name, "sgd", "constant", 1e-6) < np.inf, f"{name} does not converge"
        )
    require(
        count_steps(result, "absolute_error", "sgd", "constant", 1e-3) == np.inf,
        "MAE converges with a constant step",
    )


def count_steps(result: Result, name: str, rule: str, schedule: str, distance: float) -> float:
    """The number of steps after which the path stays within this distance."""
    path = result.paths[name, rule, schedule]
    beyond = np.flatnonzero(~(path <= distance))
    last = beyond[-1] + 1 if len(beyond) else 0
    return float(last) if last < len(path) else np.inf


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    slope = np.polyfit(np.log(result.sizes), np.log(result.chatter), 1)[0]
    mse, huber = (
        count_steps(result, name, "sgd", "constant", 1e-3) for name in ("squared_error", "huber")
    )
    remedies = result.remedies
    return [
        f"With a constant step of gradient descent, MSE is within a thousandth of the noise after "
        f"{mse:g} steps, Huber's loss after {huber:g}, MAE never: the slope of MAE does not "
        "decrease near the optimum, so the steps do not decrease either.",
        "MAE's remaining distance is proportional to the step (to the power "
        f"{slope:.2f}, from 1/4 to 1/1024). At a step of 0.3 the distance is "
        f"{remedies['constant step']:.2g} of the noise; with a cosine schedule it is "
        f"{remedies['cosine schedule']:.1g}, for the mean of the last iterates "
        f"{remedies['mean of its second half']:.1g}. Huber's loss, which is smooth at its minimum, "
        f"does not chatter (below {max(result.smooth.max(), 1e-16):.0e}).",
    ]


def show(result: Result, console: Console) -> None:
    """Prints the steps to several distances from the optimum."""
    heads = [f"{distance:g}" for distance in DISTANCES]
    table = Table(
        "loss", "optimizer", "schedule", *heads,
        title="Steps until the parameters stay within a distance of the optimum, sd of the noise",
    )  # fmt: skip
    for name, rule, schedule in result.paths:
        counts = [count_steps(result, name, rule, schedule, distance) for distance in DISTANCES]
        table.add_row(
            title(name), rule, schedule, *["-" if c == np.inf else f"{c:g}" for c in counts]
        )
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    table = {
        ", ".join(key): {
            f"{distance:g}": count_steps(result, *key, distance) for distance in DISTANCES
        }
        for key in result.paths
    }
    written = {
        "result.json": _results.record(
            config,
            steps=table,
            sizes=result.sizes,
            chatter=result.chatter,
            remedies=result.remedies,
        ),
        "convergence.npz": _results.pack_arrays(
            **{"-".join(key).replace(" ", "_"): path for key, path in result.paths.items()}
        ),
    }
    if config.plots:
        written["convergence.png"] = _results.render(plot(result))
    return written


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "convergence"


def plot(result: Result) -> Figure:
    """The distance from the optimum by step, and the remaining distance by step size."""
    with mpl.rc_context(_plotting.STYLE):
        figure = Figure(figsize=(10, 4.6))
        left, right = figure.subplots(1, 2)
        shown = [(name, "constant") for name in LOSSES] + [("absolute_error", "cosine")]
        for name, schedule in shown:
            line, label = _plotting.get_line(name), title(name)
            if schedule == "cosine":
                line, label = line | {"linestyle": ":"}, f"{label}, cosine schedule"
            path = np.maximum(result.paths[name, "sgd", schedule], 1e-13)
            left.plot(1 + np.arange(len(path)), path, **line, lw=2, label=label)
        left.set(
            title="MAE does not converge", xlabel="step of gradient descent", xscale="log",
            yscale="log", ylabel="distance from the optimum, sd of the noise", ylim=(1e-12, 1e3),
        )  # fmt: skip
        left.legend(loc="upper right", fontsize=10, ncols=2)
        right.plot(
            result.sizes, result.chatter, ls="", **_plotting.get_points("absolute_error"), ms=7,
            label="MAE, measured",
        )  # fmt: skip
        middle = len(result.sizes) // 2
        line = result.chatter[middle] * result.sizes / result.sizes[middle]
        right.plot(result.sizes, line, "-", color="0.5", lw=1.2, label="proportional to the step")
        right.set(
            title="MAE's distance is proportional to the step", xscale="log", yscale="log",
            xlabel="size of the constant step", ylabel="remaining distance, sd of the noise",
        )  # fmt: skip
        right.legend(loc="upper left")
        return figure


def _objective(name: str, A: Array, y: Array, b: Array) -> Array:
    loss = set_delta(name, tune_delta(name, efficiency=0.95) if has_delta(name) else 1.0)
    return jnp.mean(loss(A @ b, y))


def _descend_rule(
    objective: Callable[[Array], Array], transform: Any, start: Array, sizes: Array
) -> Array:
    """The parameters after each step, for steps of these sizes."""
    stepped = optax.chain(transform, optax.scale_by_schedule(lambda k: -sizes[k]))
    return descend(objective, stepped, start, len(sizes))[1]


def _distance(path: Array, optimum: Array) -> np.ndarray:
    return np.linalg.norm(np.asarray(path) - np.asarray(optimum), axis=1)
