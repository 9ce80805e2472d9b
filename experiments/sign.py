"""If |error| drops the sign, how does the model know which way to go?

Traces the chain rule on one neuron whose prediction is 1 too low, then 1 too high: the losses are
equal, the slopes are not. Then computes the gradient as a function of the target, and compares the
textbook gradients of MSE and MAE with automatic differentiation, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import robustloss as rl
from experiments import Progress, UsageError, _plotting, _results, ignore_progress, require
from experiments._losses import title
from experiments.data import load

ROWS = 16  # of stackloss: the numbers are integers, and with a power of 2 every sum is exact


@dataclass(frozen=True)
class Config:
    """Settings of `sign`."""

    w: float = 2.0
    """The weight of the neuron `m(w) = w x`."""
    x: float = 3.0
    """The input of the neuron."""
    out: Path | None = None
    """The output folder; results/sign by default."""
    plots: bool = True
    """Draw the picture."""


SMOKE = Config()


class Chain(NamedTuple):
    """The prediction of one neuron, and the factors of the chain rule."""

    target: float
    error: float  # m - t
    value: float  # |m - t|
    outer: float  # derivative of |m - t| in m, (m - t) / |m - t|
    inner: float  # m'(w)
    slope: float  # of |m(w) - t| in w, by automatic differentiation
    better: float  # |m - t| after a small step against the slope


class Result(NamedTuple):
    """The traced chains, the gradients and the comparison."""

    w: float
    x: float
    chains: tuple[Chain, Chain]
    targets: np.ndarray
    gradients: dict[str, np.ndarray]  # of each loss in w, by target
    textbook: dict[
        str, tuple[np.ndarray, np.ndarray]
    ]  # by loss: from the formula, and by differentiation


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Traces the chain rule and compares the gradients."""
    if not np.isfinite(config.w) or not np.isfinite(config.x) or config.x == 0:
        raise UsageError(
            f"--w must be finite and --x finite and not 0, got {config.w} and {config.x}."
        )
    with jax.enable_x64(True):
        m = config.w * config.x
        targets = m + np.linspace(-3, 3, 121)

        def slope(loss: object, t: Array) -> Array:
            return jax.grad(lambda w: loss(w * config.x, t))(jnp.asarray(config.w))

        gradients = {
            name: np.asarray(jax.vmap(partial(slope, rl.LOSSES[name]))(targets))
            for name in ("squared_error", "huber", "absolute_error")
        }
        chains = tuple(_trace_chain(config, m - error) for error in (-1.0, 1.0))
        return Result(config.w, config.x, chains, targets, gradients, _compare_textbook())


def check(result: Result) -> None:
    """The losses are equal, the slopes opposite, both steps better, the textbook exact."""
    low, high = result.chains
    require(low.value == high.value == 1, "the losses differ")
    require(low.slope == -high.slope != 0, "the slopes are not opposite")
    for chain in result.chains:
        require(chain.outer * chain.inner == chain.slope, "the chain rule does not hold")
        require(chain.better < chain.value, "a step against the slope does not decrease the loss")
    size = abs(result.x)
    mae, mse = (result.gradients[name] for name in ("absolute_error", "squared_error"))
    error = result.w * result.x - result.targets
    require(set(np.abs(mae[error != 0])) == {size}, "MAE's gradient has another size than |x|")
    require(np.all(np.sign(mae) == np.sign(error * result.x)), "MAE's gradient has the wrong sign")
    expected = 2 * error * result.x
    require(np.allclose(mse, expected, 1e-12, 1e-12), "MSE's gradient is not 2 (m - t) x")
    for name, (formula, autodiff) in result.textbook.items():
        require(np.array_equal(formula, autodiff), f"{name}: {formula} is not {autodiff}")
        require(np.all(formula != 0), f"{name}: a gradient is 0")


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    low, high = result.chains
    return [
        "The value drops the sign and the derivative keeps it: errors of -1 and +1 have the same "
        f"loss, 1, and the slopes {low.slope:g} and {high.slope:g}. The derivative of |m(w) - t| "
        "is (m - t) / |m - t| m'(w), and its first factor is the sign.",
        "The target is a constant, but the slope of the loss depends on the position of the "
        "prediction relative to the target: for MAE on the side, for MSE on the distance, for "
        "Huber on both.",
        "The gradients of the textbook, -2/n sum(e x) for MSE and -1/n sum(sign(e) x) for MAE "
        f"with e = t - m, equal those of automatic differentiation to the last bit on {ROWS} rows "
        "of stackloss.",
    ]


def show(result: Result, console: Console) -> None:
    """Prints the tables."""
    table = Table("", "too low", "too high", title=f"One neuron: m(w) = w x, w = {result.w:g}")
    rows = {
        "x": [result.x] * 2,
        "target t": [c.target for c in result.chains],
        "error m - t": [c.error for c in result.chains],
        "loss |m - t|": [c.value for c in result.chains],
        "d loss / d m = (m - t) / |m - t|": [c.outer for c in result.chains],
        "d m / d w = x": [c.inner for c in result.chains],
        "d loss / d w": [c.slope for c in result.chains],
        "loss after a small step against the slope": [c.better for c in result.chains],
    }
    for name, values in rows.items():
        table.add_row(name, *[f"{v:g}" for v in values])
    console.print(table)
    table = Table("gradient on stackloss", "textbook", "jax.grad")
    for name, pair in result.textbook.items():
        table.add_row(name, *[", ".join(f"{v:.6g}" for v in g) for g in pair])
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    written = {
        "result.json": _results.record(
            config, chains=[c._asdict() for c in result.chains], textbook=result.textbook
        )
    }
    if config.plots:
        written["sign.png"] = _results.render(plot(result))
    return written


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "sign"


def plot(result: Result) -> Figure:
    """The two losses with their slopes, and the gradient by error."""
    with mpl.rc_context(_plotting.STYLE):
        figure = Figure(figsize=(10, 4.4))
        left, right = figure.subplots(1, 2)
        reach = 2 / abs(result.x)
        w = np.linspace(result.w - reach, result.w + reach, 401)
        names = ("too low", "too high")
        for i, (chain, name) in enumerate(zip(result.chains, names, strict=True)):
            look = _plotting.get_series_line(i)
            left.plot(w, np.abs(w * result.x - chain.target), **look, lw=2, label=f"1 {name}")
            step = -0.25 * reach * np.sign(chain.slope)
            left.annotate(
                "", (result.w + step, 1 + step * chain.slope), (result.w, 1.0),
                arrowprops={"arrowstyle": "-|>", "lw": 2.5, "color": look["color"]},
            )  # fmt: skip
        left.plot(result.w, 1, "o", color="black", ms=8, zorder=5)
        left.set(
            title="Same loss, opposite slopes", xlabel="weight w", ylabel="loss |w x - t|",
        )  # fmt: skip
        left.legend(loc="upper center", title="the prediction at the dot is")
        left.set_ylim(0, 3.6)
        error = result.w * result.x - result.targets
        for name, gradient in result.gradients.items():
            gap = (name == "absolute_error") & (np.abs(error) < 1e-9)  # the gradient jumps
            line = _plotting.get_line(name)
            right.plot(error, np.where(gap, np.nan, gradient), **line, lw=2, label=title(name))
        right.set_ylim(-3.2 * abs(result.x), 3.2 * abs(result.x))
        right.set(
            title="The gradient depends on the target", xlabel="prediction - target",
            ylabel="d loss / d w",
        )  # fmt: skip
        right.legend(loc="upper left")
        return figure


def _trace_chain(config: Config, target: float) -> Chain:
    def loss(w: Array) -> Array:
        return rl.absolute_error(w * config.x, target)

    w, m = jnp.asarray(config.w), config.w * config.x
    slope = jax.grad(loss)(w)
    return Chain(
        target,
        m - target,
        float(loss(w)),
        float(jax.grad(rl.absolute_error)(jnp.asarray(m), target)),
        float(jax.grad(lambda w: w * config.x)(w)),
        float(slope),
        float(loss(w - 0.01 * slope / config.x**2)),
    )


def _compare_textbook() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    data = load("stackloss")
    X, y = data.X[:ROWS], data.y[:ROWS]
    w = np.array([0.75, 0.5, -0.25])  # dyadic: no product or sum is rounded
    e = y - X @ w
    formula = {"MSE": -2 / ROWS * (e @ X), "MAE": -1 / ROWS * (np.sign(e) @ X)}
    losses = {"MSE": rl.squared_error, "MAE": rl.absolute_error}
    return {
        name: (g, np.asarray(jax.grad(lambda w, f=losses[name]: rl.mean(f, X @ w, y))(w)))
        for name, g in formula.items()
    }
