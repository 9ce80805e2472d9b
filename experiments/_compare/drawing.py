"""Draws the result of `compare`: the fits or residuals, the weights of the rows, the losses."""

from __future__ import annotations

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import robustloss as rl
from experiments import _plotting
from experiments._compare.fitting import Result
from experiments._compare.wording import LOW, describe_ratio
from experiments._losses import set_delta, title

MAX_POINTS = 80  # up to this number, rows are distinguishable along an axis


def draw_lines(result: Result) -> Figure:
    """The data with the line of each loss."""
    data = result.data
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    x = data.X[:, 0]
    robust, low = _find_low_weights(result)
    axes.plot(x[~low], data.y[~low], "o", color="0.35", ms=5, label="rows")
    if low.any():
        label = f"low weight in {title(robust)}"
        axes.plot(x[low], data.y[low], "o", mfc="white", mec="0.1", ms=7, label=label)
        _number_points(axes, x[low], data.y[low], data.rows[low])
    ends = np.array([x.min(), x.max()])
    lines = dict(zip(result.losses, result.coefficients, strict=True))
    if result.mm is not None:
        lines["mm"] = np.append(result.mm.intercept, result.mm.coefficients)
    for name, (intercept, slope) in lines.items():
        line, label = _plotting.get_line(name), f"{title(name)} {slope:.3g}"
        axes.plot(ends, intercept + slope * ends, lw=2.2, label=label, **line)
    axes.set(xlabel=data.features[0], ylabel=data.target, title=_headline(result))
    axes.legend(title="loss and slope", loc="best", fontsize=10)
    return figure


def draw_residuals(result: Result) -> Figure:
    """The residuals of each loss by row."""
    data, count = result.data, len(result.losses)
    figure = Figure(figsize=(9, 1.2 + 1.5 * count))
    panels = np.atleast_1d(figure.subplots(count, 1, sharex=True, sharey=True))
    scaled = -result.residuals / result.scale
    many = len(data.y) > MAX_POINTS
    limit = 1.3 * np.quantile(np.abs(scaled), 0.9995 if many else 1.0)
    for axes, name, values, weights in zip(
        panels, result.losses, scaled, result.weights, strict=True
    ):
        color = _plotting.get_color(name)
        axes.axhline(0, color="0.7", lw=1)
        if many:
            _draw_dots(axes, data.rows, values, limit, color)
        else:
            _draw_stems(axes, data.rows, values, weights < LOW, color)
        axes.set_ylabel(title(name))
    panels[0].set_ylim(-limit, limit)
    key = "triangles: beyond the frame" if many else "hollow: low weight"
    panels[0].set_title(f"Observed - fitted, in units of the robust scale; {key}")
    panels[-1].set_xlabel("row")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_dots(axes: Axes, rows: np.ndarray, values: np.ndarray, limit: float, color: str) -> None:
    style = {"color": color, "rasterized": True, "lw": 0}
    axes.plot(rows, values, marker=".", ms=2, alpha=0.3, mew=0, **style)
    for sign, marker in ((1, "^"), (-1, "v")):
        beyond = sign * values > limit
        axes.plot(rows[beyond], np.full(beyond.sum(), 0.96 * sign * limit), marker, **style)


def _draw_stems(
    axes: Axes, rows: np.ndarray, values: np.ndarray, low: np.ndarray, color: str
) -> None:
    axes.vlines(rows, 0, values, color=color, lw=1.5)
    axes.plot(rows[~low], values[~low], "o", color=color, ms=4)
    axes.plot(rows[low], values[low], "o", mfc="white", mec=color, ms=6)
    for row, value in zip(rows[low], values[low], strict=True):
        axes.annotate(
            str(row), (row, value), (0, 6 if value > 0 else -6), fontsize=8,
            textcoords="offset points", ha="center", va="bottom" if value > 0 else "top",
        )  # fmt: skip


def draw_weights(result: Result) -> Figure:
    """The weight of each row in each fit."""
    data = result.data
    low = np.sum(np.any(result.weights < LOW, axis=0))
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    if len(data.y) > MAX_POINTS:
        share = np.linspace(0, 100, len(data.y))
        for name, weights in zip(result.losses, result.weights, strict=True):
            line = _plotting.get_line(name)
            axes.plot(share, np.sort(weights), lw=2.2, label=title(name), **line)
        axes.set(xlabel="rows in order of weight, %", xlim=(0, 100))
    else:
        for i, (name, weights) in enumerate(zip(result.losses, result.weights, strict=True)):
            x = data.rows + 0.12 * (i - (len(result.losses) - 1) / 2)
            axes.plot(x, weights, ls="", ms=5, label=title(name), **_plotting.get_points(name))
        axes.set(xlabel="row", xlim=(data.rows.min() - 1, data.rows.max() + 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(LOW, color="0.7", lw=1, zorder=0)
    axes.set(
        ylabel="weight relative to a typical row",
        ylim=(-0.03, 1.05),
        title=f"{str(low) if low else 'No'} row{'s have' if low > 1 else ' has'} less than half of "
        "a typical row's weight",
    )
    axes.legend(ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_losses(result: Result) -> Figure:
    """Each loss with its influence and its weight."""
    figure = Figure(figsize=(11, 3.8))
    views = (
        (lambda f, r: f(r), r"loss $\rho(r)$", (0, 6)),
        (rl.influence, r"influence $\psi(r) = \rho'(r)$", (-3, 3)),
        (rl.weight, r"weight $w(r) = \psi(r)/r$", (0, 2.1)),
    )
    panels = figure.subplots(1, 3)
    with jax.enable_x64(True):
        r = np.linspace(-5, 5, 1001)
        for axes, (view, label, limits) in zip(panels, views, strict=True):
            for name, delta in zip(result.losses, result.deltas / result.scale, strict=True):
                values = np.asarray(view(set_delta(name, delta), r))
                axes.plot(r, values, lw=2, label=title(name), **_plotting.get_line(name))
            axes.set(title=label, ylim=limits, xlim=(-5, 5), xlabel="residual / scale")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _find_low_weights(result: Result) -> tuple[str, np.ndarray]:
    """The first loss other than MSE and MAE, and which rows have a low weight in its fit."""
    for name, weights in zip(result.losses, result.weights, strict=True):
        if name not in ("squared_error", "absolute_error"):
            return name, weights < LOW
    return "", np.zeros(len(result.data.y), bool)


def _number_points(axes: Axes, x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> None:
    """Writes the row beside each point, except where the numbers would overlap."""
    places: list[np.ndarray] = []
    for row, point in zip(rows, np.column_stack([x, y]), strict=True):
        place = axes.transAxes.inverted().transform(axes.transData.transform(point))
        if all(np.any(np.abs(place - other) > (0.03, 0.05)) for other in places):
            axes.annotate(
                str(row), point, (-7, 4), textcoords="offset points", fontsize=9, ha="right"
            )
            places.append(place)


def _headline(result: Result) -> str:
    name = result.data.name
    if not {"squared_error", "huber"} <= set(result.losses):
        return f"{name}: {result.data.target} by {result.data.features[0]}"
    ratio = describe_ratio(result, "huber")
    if ratio is None:
        return f"{name}: the lines of MSE and Huber nearly agree"
    return f"{name}: MSE's slope is {ratio} Huber's"
