"""What does each loss make of the outliers in a data set, built in or your own?

Fits a linear model with every loss and shows the coefficients, the rows of low weight, and
pictures. Columns are standardised for the fit and the coefficients transformed back. A loss with
a `delta` gets its tuning constant for 95 % efficiency at the normal, times a robust scale of the
residuals. The scale is the MAD / 0.6745 of Huber's fit; scale and fit are found together. The
MM-estimate is shown with its standard errors: it starts from a fit that outliers cannot influence.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import matplotlib as mpl
import numpy as np
import tyro
from matplotlib.figure import Figure

import robustloss as rl
from experiments import Progress, UsageError, _plotting, _results, ignore_progress, require
from experiments._compare import drawing
from experiments._compare.fitting import Result, fit_data
from experiments._compare.reading import DEFAULT, check_independence, read_data
from experiments._compare.wording import find_low_rows, findings, show
from experiments._losses import resolve_loss, set_delta
from robustloss.losses import redescending

__all__ = [
    "SMOKE", "Config", "Result", "check", "files", "findings", "folder", "plot", "run", "show",
]  # fmt: skip

COMPARED = ("absolute_error", "huber", "log_cosh", "pseudo_huber", "squared_error")


@dataclass(frozen=True)
class Config:
    """Settings of `compare`."""

    data: str | None = None
    """A built-in data set, phones by default; experiments/data/SOURCES.md describes each."""
    csv: Path | None = None
    """A CSV file of your own, with a header; needs --target."""
    target: str | None = None
    """The column of --csv to predict."""
    features: tuple[str, ...] = ()
    """The columns of --csv to predict the target from; all others by default."""
    drop_missing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave out the rows of --csv with blanks instead of refusing the file."""
    losses: tuple[str, ...] = COMPARED
    """The losses to compare, any of `robustloss.LOSSES`."""
    scale: float | None = None
    """The scale of the residuals, in units of the target; estimated by default."""
    steps: int = 5000
    """The largest number of steps of a fit."""
    seed: int | None = None
    """Start from a random plane instead of the mean; a convex loss ends in the same place."""
    exact: bool = True
    """Exact fits too: the MM-estimate, and the minimum that a fit of MAE is measured against."""
    out: Path | None = None
    """The output folder; results/compare-NAME by default."""
    plots: bool = True
    """Draw the pictures."""


SMOKE = Config(losses=("squared_error", "huber"), exact=False)


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Fits every loss of the config to its data."""
    if not config.losses:
        raise UsageError(f"--losses needs at least one of {', '.join(rl.LOSSES)}.")
    names = tuple(dict.fromkeys(resolve_loss(name) for name in config.losses))
    data = read_data(config.data, config.csv, config.target, config.features, config.drop_missing)
    if config.steps < 1:
        raise UsageError(f"--steps must be >= 1, got {config.steps}.")
    if config.scale is not None and not 0 < config.scale < np.inf:
        raise UsageError(f"--scale must be a positive number, got {config.scale}.")
    check_independence(data)
    with jax.enable_x64(True):
        return fit_data(
            data, names, scale=config.scale, steps=config.steps, seed=config.seed,
            exact=config.exact, progress=progress,
        )  # fmt: skip


def check(result: Result) -> None:
    """Every fit has converged, and every convex loss is smallest at its own fit."""
    for name, converged, kinked in zip(result.losses, result.converged, result.kinked, strict=True):
        require(kinked or converged, f"{name} did not converge; raise --steps")
    for i, name in enumerate(result.losses):
        if name in redescending.__all__:
            continue  # the loss can have a lower minimum that follows the outliers
        loss = set_delta(name, result.deltas[i])
        with jax.enable_x64(True):
            best = min(float(rl.mean(loss, r)) for r in result.residuals)
            constant = float(rl.mean(loss, result.data.y - np.median(result.data.y)))
        slack, exact = (1e-3, 1e-5) if result.kinked[i] else (1e-9, 1e-12)
        limit = best * (1 + slack) + constant * exact  # the second term is for perfect fits
        require(result.objectives[i] <= limit, f"{name} is smaller at another fit; raise --steps")


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("loss", "intercept", *result.data.features))
    table.writerows(
        (name, *map(float, row))
        for name, row in zip(result.losses, result.coefficients, strict=True)
    )
    if result.mm is not None:
        table.writerow(("mm", *map(float, (result.mm.intercept, *result.mm.coefficients))))
    written = {"coefficients.csv": text.getvalue().encode()}
    low_rows = find_low_rows(result)
    written["result.json"] = _results.record(
        config,
        data={"name": result.data.name, "rows": len(result.data.y), "note": result.data.note},
        scale={"value": result.scale, "from": result.scale_note},
        fits={
            name: {
                "delta": None if np.isnan(result.deltas[i]) else result.deltas[i],
                "coefficients": result.coefficients[i],
                "robust_scale": result.spreads[i],
                "objective": result.objectives[i],
                "above_the_minimum": result.excesses[i],
                "steps": result.steps[i],
                "converged": result.converged[i],
                "seconds": result.seconds[i],
                "low_weight_rows": low_rows[name],
            }
            for i, name in enumerate(result.losses)
        },
        mm=None
        if result.mm is None
        else {
            **{name: value for name, value in vars(result.mm).items() if name[0] != "_"},
            "standard_errors": result.mm.standard_errors(),
        },
        findings=findings(result),
    )
    if config.plots:
        written |= {f"{name}.png": _results.render(f) for name, f in plot(result).items()}
    return written


def plot(result: Result) -> dict[str, Figure]:
    """`fit`: the data with the fits; `weights`: the weights of the rows; `losses`: the curves."""
    with mpl.rc_context(_plotting.STYLE):
        lines = len(result.data.features) == 1
        return {
            "fit": drawing.draw_lines(result) if lines else drawing.draw_residuals(result),
            "weights": drawing.draw_weights(result),
            "losses": drawing.draw_losses(result),
        }


def folder(config: Config) -> Path:
    """The output folder."""
    name = config.csv.stem if config.csv else config.data or DEFAULT
    return config.out or Path("results") / f"compare-{name}"
