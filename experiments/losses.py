"""What does each loss look like, and what does its tuning constant buy?

Draws a sheet for each family: the losses, influences, weights and curvatures, at the `delta` for
95 % efficiency at the normal; and, as functions of `delta`, the efficiency and the breakdown point
of the S-estimate. Prints a table of the constants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import robustloss as rl
from experiments import Progress, UsageError, _plotting, _results, ignore_progress, require
from experiments._losses import EXAMPLES, has_delta, set_delta, title, tune_delta
from robustloss import losses as families

VIEWS: dict[str, Callable[..., jax.Array]] = {
    r"loss $\rho(r)$": lambda loss, r: loss(r),
    r"influence $\psi = \rho'$": rl.influence,
    r"weight $w = \psi / r$": rl.weight,
    r"curvature $\rho''$": rl.curvature,
}
PUBLISHED = {  # `delta` for 95 % efficiency and for 50 % breakdown
    "huber": (1.344998, None),
    "log_cosh": (1.204707, None),
    "pseudo_huber": (1.287099, None),
    "fair": (1.399777, None),
    "cauchy": (2.384947, None),
    "geman_mcclure": (3.787419, 0.612003),
    "welsch": (2.984637, 0.816497),
    "tukey": (4.685065, 1.547645),
    "andrews": (1.338711, None),
    "talwar": (2.795483, 1.040873),
}


@dataclass(frozen=True)
class Config:
    """Settings of `losses`."""

    points: int = 25
    """Number of values of `delta` at which efficiency and breakdown are computed."""
    out: Path | None = None
    """The output folder; results/losses by default."""
    plots: bool = True
    """Draw the sheets."""


class Loss(NamedTuple):
    """The constants and curves of one loss."""

    family: str
    at_95: float  # the delta for 95 % efficiency; NaN: none
    at_50: float  # the delta for 50 % breakdown; NaN: none
    efficiency: float  # at at_95, or of a loss without a delta
    sensitivity: float  # gross-error sensitivity at the same delta
    curves: np.ndarray  # (views, residuals)
    efficiencies: np.ndarray  # at the deltas of the result; empty without a delta
    breakdowns: np.ndarray


SMOKE = Config()


class Result(NamedTuple):
    """All losses, in units of the standard deviation of normal errors."""

    residuals: np.ndarray
    deltas: np.ndarray
    losses: dict[str, Loss]


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Evaluates every loss of the library."""
    if config.points < 2:
        raise UsageError(f"--points must be at least 2, got {config.points}.")
    r = np.linspace(-7, 7, 1401)
    deltas = np.geomspace(0.1, 10, config.points)
    found = {}
    for i, name in enumerate(rl.LOSSES):
        progress(i / len(rl.LOSSES), name)
        at_95, at_50 = tune_delta(name, efficiency=0.95), tune_delta(name, breakdown=0.5)
        loss = set_delta(name, 1.0 if np.isnan(at_95) else at_95)
        with jax.enable_x64(True):
            views = jax.jit(lambda r, loss=loss: [view(loss, r) for view in VIEWS.values()])
            curves = np.array(views(r))
        grid = [set_delta(name, d) for d in deltas] if has_delta(name) else []
        bounded = np.isfinite(at_50)
        found[name] = Loss(
            family=rl.LOSSES[name].__module__.rsplit(".", 1)[-1],
            at_95=at_95,
            at_50=at_50,
            efficiency=rl.efficiency(loss),
            sensitivity=rl.gross_error_sensitivity(loss),
            curves=curves,
            efficiencies=np.array([rl.efficiency(f) for f in grid]),
            breakdowns=np.array([rl.breakdown(f) for f in grid] if bounded else []),
        )
    return Result(r, deltas, found)


def check(result: Result) -> None:
    """Each family obeys its law, and the constants are the published ones."""
    require(set(result.losses) == set(rl.LOSSES), "the sheets do not show every loss")
    for name, loss in result.losses.items():
        psi = loss.curves[1]
        if loss.family == "convex":
            require(np.all(np.diff(psi) >= -1e-12), f"the influence of {name} decreases")
        if loss.family == "redescending":
            unit_loss = set_delta(name, 1.0)
            require(
                abs(rl.influence(unit_loss, 1e6)) < 1e-5,
                f"the influence of {name} does not return to 0",
            )
            require(np.isfinite(loss.sensitivity), f"the influence of {name} is not bounded")
        if loss.family in ("convex", "redescending"):
            require(np.allclose(psi, -psi[::-1]), f"the influence of {name} is not odd")
        if np.isfinite(loss.at_95):
            require(abs(loss.efficiency - 0.95) < 1e-9, f"{name} is {loss.efficiency} efficient")
        for ours, published in zip((loss.at_95, loss.at_50), PUBLISHED.get(name, ()), strict=False):
            if published is not None:
                require(abs(ours - published) < 1e-6, f"{name}: {ours} is not {published}")


def show(result: Result, console: Console) -> None:
    """Prints the table."""
    table = Table("family", "loss", "delta at 95 %", "at 50 %", "efficiency", "sensitivity")
    for name, loss in result.losses.items():
        fixed = ", ".join(f"{k}={v:g}" for k, v in EXAMPLES.get(name, {}).items())
        table.add_row(
            loss.family,
            f"{name}({fixed})" if fixed else name,
            *("-" if np.isnan(d) else f"{d:.6f}" for d in (loss.at_95, loss.at_50)),
            f"{loss.efficiency:.4f}",
            f"{loss.sensitivity:.4g}",
        )
    console.print(table)


def findings(result: Result) -> list[str]:
    """An explanation of the table."""
    return [
        "delta at 95 %: for 95 % efficiency of the M-estimate at the normal; at 50 %: for a "
        "breakdown point of 50 % of the S-estimate, which requires a bounded loss. Efficiency and "
        "sensitivity are those at the delta for 95 %; a loss without such a delta has its own."
    ]


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    numbers = {
        name: {
            field: value
            for field, value in loss._asdict().items()
            if field not in ("curves", "efficiencies", "breakdowns")
        }
        for name, loss in result.losses.items()
    }
    written = {"result.json": _results.record(config, losses=numbers)}
    if config.plots:
        sheets = plot(result)
        written |= {f"{name}.png": _results.render(sheet) for name, sheet in sheets.items()}
    return written


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "losses"


def plot(result: Result) -> dict[str, Figure]:
    """A sheet for each family."""
    sheets = {}
    with mpl.rc_context(_plotting.STYLE):
        for family in families.FAMILIES:
            name = family.__name__.rsplit(".", 1)[-1]
            members = {n: loss for n, loss in result.losses.items() if loss.family == name}
            sheets[name] = _draw_sheet(name, members, result)
    return sheets


def _draw_sheet(family: str, members: dict[str, Loss], result: Result) -> Figure:
    figure = Figure(figsize=(12, 7.2))
    panels = figure.subplots(2, 3)
    styles = {name: _plotting.get_line(name) for name in members}
    highest = np.max([loss.curves[3].max() for loss in members.values()])
    top = 2.2 if highest > 1 else 1.1
    limits = ((-0.3, 9), (-4, 4), (-0.03 * top, top), (-1.1, top))
    for axes, view, i, limit in zip(
        (panels[0, 0], panels[0, 1], panels[1, 0], panels[1, 1]), VIEWS, range(4), limits,
        strict=True,
    ):  # fmt: skip
        for name, loss in members.items():
            axes.plot(result.residuals, loss.curves[i], lw=2, label=title(name), **styles[name])
        axes.set(title=view, ylim=limit, xlim=(-7, 7), xlabel="residual / standard deviation")
    _draw_deltas(panels[0, 2], members, styles, result, "efficiencies")
    panels[0, 2].axhline(0.95, color="0.7", lw=1, zorder=0)
    panels[0, 2].set(title="efficiency at the normal", ylim=(0, 1.02))
    _draw_deltas(panels[1, 2], members, styles, result, "breakdowns")
    panels[1, 2].set(title="breakdown of the S-estimate", ylim=(0, 0.52))
    if not panels[1, 2].lines:
        panels[1, 2].clear()
        panels[1, 2].axis("off")
        note = "No loss of this family is bounded:\nits S-estimate has\nbreakdown point 0"
        panels[1, 2].text(0.5, 0.5, note, ha="center", va="center", color="0.4", fontsize=12)
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=7)
    figure.suptitle(TITLES[family], x=0.01, ha="left", fontweight="bold", fontsize=14)
    return figure


def _draw_deltas(
    axes: Axes, members: dict[str, Loss], styles: dict[str, dict[str, object]], result: Result,
    field: str,
) -> None:  # fmt: skip
    for name, loss in members.items():
        values = getattr(loss, field)
        if len(values):
            x = result.deltas
            if field == "breakdowns":  # adds the peak, which is between points of the grid
                x, values = np.r_[x, loss.at_50], np.r_[values, 0.5]
            order = np.argsort(x)
            axes.plot(x[order], values[order], lw=2, **styles[name])
    axes.set(xscale="log", xlabel="delta / standard deviation", xlim=(0.1, 10))
    axes.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])


TITLES = {
    "convex": "Convex losses: the influence never decreases, so every residual counts",
    "redescending": "Redescending losses: the influence of a far point returns to 0",
    "asymmetric": "Asymmetric losses, q = 0.75: too low a prediction costs three times as much",
    "adaptive": "Adaptive losses: alpha selects the shape of the loss",
}
