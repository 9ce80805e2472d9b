"""Why is MAE slower, and what is it that chatters?

Gradient descent on the same linear fit by MSE, Huber, log-cosh and MAE, with four optimisers and
two schedules of the step: how many steps until the parameters are near the optimum. Then MAE with
constant steps of many sizes, which never come to rest, and what makes them.
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
RULES = {  # what an optimizer does with the gradient, and the step size that goes with it
    "sgd": (optax.identity(), 0.3),
    "momentum": (optax.trace(0.9), 0.03),
    "adam": (optax.scale_by_adam(), 0.1),
}
SCHEDULES = ("constant", "cosine")
LBFGS = optax.lbfgs()
NEAR = (1e-1, 1e-3, 1e-6)  # distances from the optimum, in standard deviations of the noise


@dataclass(frozen=True)
class Config:
    """Settings of `convergence`."""

    rows: int = 200
    """Of the data."""
    features: int = 4
    """Of the data."""
    steps: int = 3000
    """Of each descent."""
    seed: int = 0
    """Of the data."""
    out: Path | None = None
    """The output folder; results/convergence by default."""
    plots: bool = True
    """Draw the picture."""


SMOKE = Config(rows=60, features=2, steps=1000)


class Result(NamedTuple):
    """Distances are of the parameters from the exact optimum, in standard deviations of noise."""

    paths: dict[tuple[str, str, str], np.ndarray]  # by loss, optimizer and schedule: by step
    sizes: np.ndarray  # of constant steps
    chatter: np.ndarray  # MAE's typical distance at the end, by size
    smooth: np.ndarray  # Huber's, by size
    rest: dict[str, float]  # the distance of MAE at the end of a large step, by remedy


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Descends every way."""
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
    for_X, for_y, for_b = jax.random.split(jax.random.key(config.seed), 3)
    X = jax.random.normal(for_X, (config.rows, config.features))
    truth = jax.random.normal(for_b, (config.features + 1,))
    y = truth[0] + X @ truth[1:] + jax.random.normal(for_y, (config.rows,))
    A = jnp.concatenate([jnp.ones((config.rows, 1)), X], axis=1)
    optima = {name: fit_exact(name, X, y) for name in LOSSES}
    flat = jnp.zeros_like(truth)
    k = jnp.arange(config.steps)
    # Like optax.cosine_decay_schedule, but as numbers, so that one program does for both.
    factors = jnp.stack([jnp.ones(config.steps), 0.5 * (1 + jnp.cos(jnp.pi * k / config.steps))])

    paths = {}
    for i, name in enumerate(LOSSES):
        progress(0.7 * i / len(LOSSES), title(name))
        objective = partial(_objective, name, A, y)
        for rule, (transform, size) in RULES.items():
            both = jax.jit(jax.vmap(partial(_descent, objective, transform, flat)))(size * factors)
            for schedule, path in zip(SCHEDULES, both, strict=True):
                paths[name, rule, schedule] = _distance(path, optima[name])
        whole = partial(descend, objective, LBFGS, steps=config.steps // 10)
        path = jax.jit(whole)(flat)[1]
        paths[name, "lbfgs", "line search"] = _distance(path, optima[name])

    progress(0.8, "steps of many sizes")
    sizes = 2.0 ** -np.arange(2, 11)

    def ends(name: str, size: Array) -> Array:
        steps = size * jnp.ones(4 * config.steps)
        path = _descent(partial(_objective, name, A, y), optax.identity(), optima[name], steps)
        return jnp.median(jnp.linalg.norm(path[len(path) // 2 :] - optima[name], axis=1))

    chatter, smooth = (
        np.asarray(jax.jit(jax.vmap(partial(ends, name)))(sizes))
        for name in ("absolute_error", "huber")
    )
    best = optima["absolute_error"]
    large = jax.jit(
        partial(_descent, partial(_objective, "absolute_error", A, y), optax.identity(), flat)
    )(0.3 * factors[0])
    tail = large[len(large) // 2 :]
    rest = {
        "constant step": float(np.median(_distance(tail, best))),
        "mean of its second half": float(jnp.linalg.norm(tail.mean(0) - best)),
        "cosine schedule": float(paths["absolute_error", "sgd", "cosine"][-1]),
    }
    return Result(paths, sizes, chatter, smooth, rest)


def check(result: Result) -> None:
    """MAE's chatter is proportional to its step; a schedule ends it; smooth losses have none."""
    slope = np.polyfit(np.log(result.sizes), np.log(result.chatter), 1)[0]
    require(0.9 < slope < 1.1, f"MAE's chatter grows with the step to the power {slope:.2f}")
    require(result.smooth.max() < 1e-9, "Huber's loss chatters")
    calm = result.rest["cosine schedule"]
    require(calm < 0.2 * result.rest["constant step"], "a schedule does not end the chatter")
    for name in ("squared_error", "huber", "log_cosh"):
        require(
            steps_to(result, name, "lbfgs", "line search", 1e-6) < 100, f"{name}: lbfgs is slow"
        )
        require(steps_to(result, name, "sgd", "constant", 1e-6) < np.inf, f"{name} is not near")
    require(
        steps_to(result, "absolute_error", "sgd", "constant", 1e-3) == np.inf, "MAE came to rest"
    )


def steps_to(result: Result, name: str, rule: str, schedule: str, near: float) -> float:
    """The step from which on the distance stays below."""
    path = result.paths[name, rule, schedule]
    away = np.flatnonzero(~(path <= near))
    last = away[-1] + 1 if len(away) else 0
    return float(last) if last < len(path) else np.inf


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    slope = np.polyfit(np.log(result.sizes), np.log(result.chatter), 1)[0]
    mse, huber = (
        steps_to(result, name, "sgd", "constant", 1e-3) for name in ("squared_error", "huber")
    )
    rest = result.rest
    return [
        f"By gradient descent with a constant step MSE is within a thousandth of the noise after "
        f"{mse:g} steps, Huber's loss after {huber:g}, MAE never: the slope of MAE does not get "
        "smaller near the optimum, so neither do its steps.",
        f"What is left is proportional to the step (to the power {slope:.2f}, from 1/4 to 1/1024). "
        f"At a step of 0.3 it is {rest['constant step']:.2g} of the noise; a cosine schedule "
        f"leaves {rest['cosine schedule']:.1g}, the mean of the last iterates "
        f"{rest['mean of its second half']:.1g}. Or a loss that is round at the bottom: Huber's "
        f"does not chatter (below {max(result.smooth.max(), 1e-16):.0e}).",
    ]


def show(result: Result, console: Console) -> None:
    """Steps to given distances."""
    heads = [f"{near:g}" for near in NEAR]
    table = Table(
        "loss", "optimizer", "schedule", *heads,
        title="Steps until the parameters stay this near the optimum, in sd of the noise",
    )  # fmt: skip
    for name, rule, schedule in result.paths:
        counts = [steps_to(result, name, rule, schedule, near) for near in NEAR]
        table.add_row(
            title(name), rule, schedule, *["-" if c == np.inf else f"{c:g}" for c in counts]
        )
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    table = {
        ", ".join(key): {f"{near:g}": steps_to(result, *key, near) for near in NEAR}
        for key in result.paths
    }
    written = {
        "result.json": _results.record(
            config, steps=table, sizes=result.sizes, chatter=result.chatter, rest=result.rest
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
    """The way to the optimum, and what is left of it by the size of the step."""
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
            title="MAE does not come to rest", xlabel="step of gradient descent", xscale="log",
            yscale="log", ylabel="distance from the optimum, sd of the noise", ylim=(1e-12, 1e3),
        )  # fmt: skip
        left.legend(loc="upper right", fontsize=10, ncols=2)
        right.plot(
            result.sizes, result.chatter, ls="", **_plotting.get_points("absolute_error"), ms=7,
            label="MAE, measured",
        )  # fmt: skip
        at = len(result.sizes) // 2
        line = result.chatter[at] * result.sizes / result.sizes[at]
        right.plot(result.sizes, line, "-", color="0.5", lw=1.2, label="in proportion to the step")
        right.set(
            title="What is left is as large as the step", xscale="log", yscale="log",
            xlabel="size of the constant step", ylabel="distance that is left, sd of the noise",
        )  # fmt: skip
        right.legend(loc="upper left")
        return figure


def _objective(name: str, A: Array, y: Array, b: Array) -> Array:
    loss = set_delta(name, tune_delta(name, efficiency=0.95) if has_delta(name) else 1.0)
    return jnp.mean(loss(A @ b, y))


def _descent(
    objective: Callable[[Array], Array], transform: Any, start: Array, sizes: Array
) -> Array:
    """The parameters after each step of these sizes."""
    stepped = optax.chain(transform, optax.scale_by_schedule(lambda k: -sizes[k]))
    return descend(objective, stepped, start, len(sizes))[1]


def _distance(path: Array, optimum: Array) -> np.ndarray:
    return np.linalg.norm(np.asarray(path) - np.asarray(optimum), axis=1)
