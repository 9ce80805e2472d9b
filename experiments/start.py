"""Why does the start, and not the optimiser, make a fit robust?

Fits Tukey's loss to the stars of the cluster CYG OB1, four of which are giants. Counts the minima
and the starts that end in each, and shows the minimum reached from the S-estimate. Every fit is
solved to the last digit; the fits differ only in the start.
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
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import robustloss as rl
from experiments import Progress, UsageError, _plotting, _results, ignore_progress, require
from experiments.data import load

LOOKS = {
    "least squares": "squared_error",
    "Huber": "huber",
    "Tukey, from least squares": "tukey",
    "MM: Tukey, from the S-estimate": "mm",
}


@dataclass(frozen=True)
class Config:
    """Settings of `start`."""

    starts: int = 500
    """The number of starts, lines through two random stars."""
    seed: int = 0
    """The seed of the random numbers."""
    out: Path | None = None
    """The output folder; results/start by default."""
    plots: bool = True
    """Draw the picture."""


SMOKE = Config(starts=100)


class Result(NamedTuple):
    """The lines and minima; a line is an intercept and a slope."""

    x: np.ndarray
    y: np.ndarray
    lines: dict[str, np.ndarray]  # by fit
    minima: np.ndarray  # the lines in which starts end, the lowest minimum first
    objectives: np.ndarray  # of the minima, in units of the S scale squared
    shares: np.ndarray  # of the starts that end in each minimum
    scale: float
    path: np.ndarray  # the objective between Tukey's fit from least squares and the MM fit


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Fits from every start."""
    if config.starts < 2:
        raise UsageError(f"--starts must be >= 2, got {config.starts}.")
    stars = load("starsCYG")
    progress(0.1, "compile")
    with jax.enable_x64(True):
        X, y = jnp.asarray(stars.X, float), jnp.asarray(stars.y, float)
        mm = rl.fit_linear(X, y, rl.tukey)
        least_squares = rl.fit_linear(X, y, lambda r: 0.5 * rl.squared_error(r), scale=1.0)
        fit_tukey = partial(rl.fit_linear, X, y, rl.tukey, method="irls", scale=mm.scale)
        fits = {
            "least squares": least_squares,
            "Huber": rl.fit_linear(X, y),
            "Tukey, from least squares": fit_tukey(start=_extract_line(least_squares)),
            "MM: Tukey, from the S-estimate": mm,
        }
        progress(0.6, f"{config.starts} starts")
        pairs = _draw_pairs(config, np.asarray(X[:, 0]))
        slopes = (y[pairs[:, 1]] - y[pairs[:, 0]]) / (X[pairs[:, 1], 0] - X[pairs[:, 0], 0])
        starts = jnp.stack([y[pairs[:, 0]] - slopes * X[pairs[:, 0], 0], slopes], axis=1)
        ends = jax.vmap(lambda start: fit_tukey(start=start))(starts)
        lines = np.asarray(jax.vmap(_extract_line)(ends))[np.asarray(ends.converged)]

        @jax.vmap
        def objective(line: jax.Array) -> jax.Array:
            loss = partial(rl.tukey, delta=rl.tune(rl.tukey, efficiency=0.95))
            return rl.total(loss, (line[0] + line[1] * X[:, 0] - y) / mm.scale)

        minima, counts = np.unique(lines.round(6), axis=0, return_counts=True)
        order = np.argsort(objective(minima))
        minima, counts = minima[order], counts[order]
        t = jnp.linspace(-0.3, 1.3, 321)[:, None]
        tilted, robust = _extract_line(fits["Tukey, from least squares"]), _extract_line(mm)
        path = objective(tilted + t * (robust - tilted))
        return Result(
            np.asarray(X[:, 0]),
            np.asarray(y),
            {name: np.asarray(_extract_line(fit)) for name, fit in fits.items()},
            minima,
            np.asarray(objective(minima)),
            counts / config.starts,
            float(mm.scale),
            np.c_[t, path],
        )


def check(result: Result) -> None:
    """One loss has two answers for one data set, and the start decides between them."""
    tilted = result.lines["Tukey, from least squares"]
    mm = result.lines["MM: Tukey, from the S-estimate"]
    require(len(result.minima) >= 2, "Tukey's loss has only one minimum")
    for name, line in (("least squares", tilted), ("the S-estimate", mm)):
        distance = np.min(np.max(np.abs(result.minima - line), axis=1))
        require(distance < 1e-4, f"no random start ends in the fit from {name}")
    require(tilted[1] < 0 < mm[1], "the giants do not decide the fit from least squares")
    require(result.shares.sum() > 0.95, "fits from random starts did not converge")


def show(result: Result, console: Console) -> None:
    """Prints the tables."""
    table = Table("fit", "intercept", "slope")
    for name, line in result.lines.items():
        table.add_row(name, *[f"{v:.3f}" for v in line])
    console.print(table)
    table = Table("minimum of Tukey's loss", "intercept", "slope", "objective", "share of starts")
    for i, (line, value, share) in enumerate(
        zip(result.minima, result.objectives, result.shares, strict=True)
    ):
        table.add_row(str(i + 1), *[f"{v:.3f}" for v in line], f"{value:.2f}", f"{share:.1%}")
    console.print(table)


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    lowest, robust = result.minima[0], result.lines["MM: Tukey, from the S-estimate"]
    verb = "is" if np.allclose(lowest, robust, atol=1e-4) else "is not"
    return [
        f"Tukey's loss has {len(result.minima)} minima for these data, each solved to the last "
        f"digit, and the lowest {verb} the robust one. The giants tilt the least-squares line; the "
        "fit from this line keeps the giants, the fit from the S-estimate rejects the giants. No "
        "optimiser knows which minimum is wanted: the start decides."
    ]


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    written = {"result.json": _results.record(config, **result._asdict())}
    if config.plots:
        written["start.png"] = _results.render(plot(result))
    return written


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "start"


def plot(result: Result) -> Figure:
    """The stars with the lines, and the objective between the two minima."""
    with mpl.rc_context(_plotting.STYLE):
        figure = Figure(figsize=(10, 4.4))
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        giants = result.x < 3.6
        left.plot(result.x[~giants], result.y[~giants], "o", color="#999999", ms=5)
        left.plot(result.x[giants], result.y[giants], "*", color="black", ms=11, label="giants")
        ends = np.array([result.x.min() - 0.05, result.x.max() + 0.05])
        for name, (intercept, slope) in result.lines.items():
            line = _plotting.get_line(LOOKS[name])
            left.plot(ends, intercept + slope * ends, **line, lw=2, label=name)
        left.set_ylim(result.y.min() - 0.6, result.y.max() + 1.9)
        left.invert_xaxis()
        left.set_xlabel("log temperature (hot stars on the left)")
        left.set_ylabel("log light intensity")
        left.set_title("One loss has two answers")
        left.legend(loc="upper center", ncols=2, fontsize=9)

        t, value = result.path.T
        right.plot(t, value, color="0.5", lw=2)
        for x, look, label in (
            (0.0, "tukey", "from least squares"), (1.0, "mm", "from the S-estimate"),
        ):  # fmt: skip
            right.plot(x, np.interp(x, t, value), ls="", **_plotting.get_points(look), ms=9)
            right.annotate(
                label, (x, np.interp(x, t, value)), (0, -16), textcoords="offset points",
                ha="center", fontsize=10,
            )  # fmt: skip
        right.set_ylim(value.min() - 0.18 * np.ptp(value), None)
        right.set_xlabel("from one fit to the other")
        right.set_ylabel("Tukey's loss at the S scale")
        right.set_title("A hill lies between them")
    return figure


def _extract_line(fit: rl.LinearFit) -> jax.Array:
    return jnp.append(fit.intercept, fit.coefficients)


def _draw_pairs(config: Config, x: np.ndarray) -> np.ndarray:
    """Random pairs of stars of different temperatures."""
    random = np.random.default_rng(config.seed)
    pairs = random.integers(0, len(x), (50 * config.starts, 2))
    return pairs[x[pairs[:, 0]] != x[pairs[:, 1]]][: config.starts]
