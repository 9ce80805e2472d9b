"""What is the derivative of MAE at zero, what do frameworks return, and does it matter?

Measures the derivatives of |r| at 0, -0, NaN and infinity in forward and reverse mode: in JAX, in
this library and, where they are installed, in PyTorch and Keras on JAX. Then measures the errors of
other losses of optax at small residuals, in 16-bit types and at a masked NaN; the effect of the
slope at the kink on an exact fit; and the cost of smooth stand-ins for MAE.
"""

from __future__ import annotations

import importlib.util
import os
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
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import robustloss as rl
from experiments import Progress, UsageError, _plotting, _results, ignore_progress, require

POINTS = {"0": 0.0, "-0": -0.0, "NaN": np.nan, "inf": np.inf, "-inf": -np.inf}
OURS = "rl.absolute_error"
PRICES = {  # of the stand-ins: the largest error times the curvature at 0
    "pseudo-Huber / mu": 1.0,
    "sqrt(r^2 + mu^2)": 1.0,
    "log-cosh / mu": np.log(2),
    "r tanh(r / mu)": 0.556929,  # 2 W(1 / e), twice the maximum of x (1 - tanh x)
    "Huber / mu": 0.5,
}


@dataclass(frozen=True)
class Config:
    """Settings of `kink`."""

    steps: int = 20
    """Steps of gradient descent from the exact fit."""
    learning_rate: float = 0.01
    """The constant step size."""
    out: Path | None = None
    """The output folder; results/kink by default."""
    plots: bool = True
    """Draw the picture."""


SMOKE = Config()


class Result(NamedTuple):
    """The measurements."""

    slopes: dict[str, dict[str, tuple[float, float]]]  # by framework and point: forward and reverse
    losses: list[
        tuple[str, str, float, float, float]
    ]  # task, source, value of the source, ours, truth
    descent: dict[str, np.ndarray]  # MAE by step, from an exact fit
    smooth: dict[str, tuple[float, float]]  # the largest error and the curvature at 0


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Measures the slopes, the losses, the descent and the stand-ins."""
    if config.steps < 1:
        raise UsageError(f"--steps must be >= 1, got {config.steps}.")
    if not 0 < config.learning_rate < np.inf:
        raise UsageError(f"--learning-rate must be a positive number, got {config.learning_rate}.")
    progress(0.0, "slopes at the kink")
    frameworks = {"jnp.abs": jnp.abs, OURS: rl.absolute_error}
    slopes = (
        {name: _measure_slopes(f) for name, f in frameworks.items()}
        | _measure_torch()
        | _measure_keras()
    )
    progress(0.5, "other losses near 0")
    losses = _measure_losses()
    progress(0.8, "an exact fit")
    return Result(slopes, losses, _trace_descent(config), _measure_stand_ins())


def check(result: Result) -> None:
    """Our slope at 0 is 0 and at NaN is NaN; with slope 1 at 0 an exact fit does not rest."""
    ours = result.slopes[OURS]
    require(all(slope == 0 for slope in (*ours["0"], *ours["-0"])), "our slope is not 0 at 0")
    require(np.isnan(ours["NaN"]).all(), "our slope is not NaN at NaN")
    require(ours["inf"] == (1, 1), "our slope is not 1 at infinity")
    require(ours["-inf"] == (-1, -1), "our slope is not -1 at -infinity")
    for task, _, peer, own, truth in result.losses:
        require(
            _relative_error(own, truth) <= min(1e-2, _relative_error(peer, truth)),
            f"{task}: {own}",
        )
    require(result.descent["kink = 0"].max() == 0, "with kink 0 an exact fit does not rest")
    require(result.descent["kink = 1"][1::2].min() > 0, "with kink 1 an exact fit rests")
    for name, (error, bend) in result.smooth.items():
        require(abs(error * bend - PRICES[name]) < 1e-5, f"{name}: {error * bend}")


def show(result: Result, console: Console) -> None:
    """Prints the tables."""
    table = Table("slope of |r|, forward / reverse", *POINTS)
    for name, slopes in result.slopes.items():
        table.add_row(name, *[f"{f:g} / {r:g}" for f, r in (slopes[p] for p in POINTS)])
    console.print(table)
    table = Table("task", "source", "value", "ours", "truth")
    for task, source, peer, ours, truth in result.losses:
        table.add_row(task, source, *[f"{v:.4g}" for v in (peer, ours, truth)])
    console.print(table)
    table = Table(
        "smooth stand-in, mu = 0.1", "largest error", "curvature at 0", "error x curvature"
    )
    for name, (error, bend) in result.smooth.items():
        table.add_row(name, f"{error:.4f}", f"{bend:.4g}", f"{error * bend:.3f}")
    console.print(table)


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    largest = result.descent["kink = 1"].max()
    taken = ", ".join(f"{name} {slopes['0'][1]:g}" for name, slopes in result.slopes.items())
    return [
        f"At 0 any number in [-1, 1] is a slope of |r|. The slopes taken at 0: {taken}.",
        "Gradient descent on MAE from an exact fit does not move with the slope 0 at 0. With "
        f"the slope 1, that of jnp.abs, every other step moves to an MAE of {largest:.2g} and the "
        "next step moves back.",
        "The nearer a smooth stand-in is to |r|, the larger its curvature, which limits the step: "
        "the largest error times the curvature at 0 is 1 for pseudo-Huber and sqrt(r^2 + mu^2), "
        "0.69 for log-cosh, 0.56 for r tanh(r / mu) and 0.5 for Huber's loss.",
    ]


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    written = {
        "result.json": _results.record(
            config,
            slopes=result.slopes,
            near_zero=result.losses,
            descent=result.descent,
            smooth=result.smooth,
        )
    }
    if config.plots:
        written["kink.png"] = _results.render(plot(result))
    return written


def plot(result: Result) -> Figure:
    """The slope around 0, and its effect on an exact fit."""
    with mpl.rc_context(_plotting.STYLE):
        figure = Figure(figsize=(10, 4))
        left, right = figure.subplots(1, 2)
        r = np.linspace(-1, 1, 401)
        for side in (r[r < 0], r[r > 0]):
            left.plot(side, jax.vmap(jax.grad(rl.absolute_error))(side), color="0.6", lw=2)
        for i, (name, slopes) in enumerate(result.slopes.items()):
            color, _, marker = _plotting.SERIES[i]
            left.plot(0, slopes["0"][1], marker, color=color, ms=9 - i, label=name)
        left.set(title="Slope of |r| and its value at 0", xlabel="residual r", ylabel="slope")
        left.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        left.legend(loc="lower right")
        for (name, path), i in zip(result.descent.items(), (1, 0), strict=True):
            right.plot(path, **_plotting.get_series_line(i), lw=2, label=name)
        right.set(
            title="An exact fit rests only with slope 0 at 0",
            xlabel="step of gradient descent",
            ylabel="MAE",
        )
        right.set_ylim(top=1.25 * max(path.max() for path in result.descent.values()))
        right.xaxis.get_major_locator().set_params(integer=True)
        right.legend(loc="upper right", ncols=2)
        return figure


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "kink"


def _measure_slopes(f: Callable[..., Any]) -> dict[str, tuple[float, float]]:
    def differentiate(x: float) -> tuple[float, float]:
        r = jnp.float32(x)
        return float(jax.jvp(f, (r,), (jnp.ones_like(r),))[1]), float(jax.grad(f)(r))

    return {name: differentiate(x) for name, x in POINTS.items()}


def _measure_torch() -> dict[str, dict[str, tuple[float, float]]]:
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch  # noqa: PLC0415

    def reverse(x: float) -> float:
        r = torch.tensor(x, requires_grad=True)
        torch.nn.functional.l1_loss(r, torch.zeros(())).backward()
        return float(r.grad)

    def forward(x: float) -> float:
        return float(torch.func.jvp(torch.abs, (torch.tensor(x),), (torch.tensor(1.0),))[1])

    return {"torch": {name: (forward(x), reverse(x)) for name, x in POINTS.items()}}


def _measure_keras() -> dict[str, dict[str, tuple[float, float]]]:
    if importlib.util.find_spec("keras") is None:
        return {}
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras  # noqa: PLC0415

    if keras.backend.backend() != "jax":
        return {}
    loss = keras.losses.MeanAbsoluteError()
    return {"keras on jax": _measure_slopes(lambda r: loss(jnp.zeros((1,)), r[None]))}


def _measure_losses() -> list[tuple[str, str, float, float, float]]:
    """Tasks in which losses of optax fail: task, source, value of the source, ours, the truth."""
    float16, bfloat16 = jnp.float16, jnp.bfloat16
    small = float(bfloat16(0.001))
    nan_target = (jnp.array([1.0, 2.0]), jnp.array([0.5, jnp.nan]), jnp.array([True, False]))

    def masked(loss: Callable[..., jax.Array]) -> float:
        p, t, keep = nan_target
        mean = jax.grad(lambda p: jnp.mean(loss(p, t), where=keep))
        return float(mean(p)[1])

    ours_masked = jax.grad(partial(rl.mean, rl.huber))
    p, t, keep = nan_target
    bend = jax.grad(jax.grad(optax.huber_loss))
    return [
        ("log-cosh at 1e-4", "optax.log_cosh", float(optax.log_cosh(jnp.float32(1e-4))),
         float(rl.log_cosh(jnp.float32(1e-4))), float(np.log(np.cosh(np.longdouble(1e-4))))),
        ("log-cosh at 0.03, float16", "optax.log_cosh", float(optax.log_cosh(float16(0.03))),
         float(rl.log_cosh(float16(0.03))), float(np.log(np.cosh(float(float16(0.03)))))),
        ("slope of Huber at 0.001, bfloat16", "optax.huber_loss",
         float(jax.grad(optax.huber_loss)(bfloat16(0.001))),
         float(jax.grad(rl.huber)(bfloat16(0.001))), small),
        ("curvature of Huber at delta", "optax.huber_loss",
         float(bend(1.0)), float(rl.curvature(rl.huber, 1.0)), 1.0),
        ("slope at a NaN target that is masked", "optax.huber_loss", masked(optax.huber_loss),
         float(ours_masked(p, t, where=keep)[1]), 0.0),
    ]  # fmt: skip


def _trace_descent(config: Config) -> dict[str, np.ndarray]:
    """MAE by step of gradient descent from the exact fit of y = 2 x + 1."""
    x = jnp.linspace(0.0, 1.0, 11)
    exact = jnp.array([2.0, 1.0])
    y = exact[0] * x + exact[1]

    def path(kink: float) -> np.ndarray:
        loss = partial(rl.absolute_error, kink=kink)

        def objective(params: jax.Array) -> jax.Array:
            return rl.mean(loss, params[0] * x + params[1], y)

        def step(params: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            value, slope = jax.value_and_grad(objective)(params)
            return params - config.learning_rate * slope, value

        return np.asarray(jax.lax.scan(step, exact, length=config.steps + 1)[1])

    return {f"kink = {kink:g}": path(kink) for kink in (0.0, 1.0)}


def _measure_stand_ins() -> dict[str, tuple[float, float]]:
    """The largest difference from |r| and the curvature at 0, by stand-in."""
    mu, r = 0.1, np.append(np.linspace(0.0, 20.0, 400_001), 1e6)
    stand_ins = {
        "pseudo-Huber / mu": lambda r: rl.pseudo_huber(r, delta=mu) / mu,
        "sqrt(r^2 + mu^2)": lambda r: jnp.sqrt(r * r + mu * mu),
        "log-cosh / mu": lambda r: rl.log_cosh(r, delta=mu) / mu,
        "r tanh(r / mu)": lambda r: r * jnp.tanh(r / mu),
        "Huber / mu": lambda r: rl.huber(r, delta=mu) / mu,
    }
    with jax.enable_x64(True):
        return {
            name: (
                float(np.max(np.abs(jax.jit(f)(r) - r))),
                float(jax.grad(jax.grad(f))(0.0)),
            )
            for name, f in stand_ins.items()
        }


def _relative_error(got: float, truth: float) -> float:
    if np.isnan(got):
        return np.inf
    return abs(got - truth) / abs(truth) if truth else abs(got)
