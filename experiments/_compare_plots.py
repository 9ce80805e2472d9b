"""The pictures of `compare`."""

from __future__ import annotations

from functools import partial

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import robustloss as rl
from experiments.compare import LOW, Result, title

mpl.use("Agg")

# Okabe and Ito: told apart by the colour-blind. Dashes and markers tell them apart in print.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)))
MARKERS = "os^Dv<>P*X"
STYLE = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 11,
    "legend.frameon": False,
}
FEW = 80  # rows that can still be told apart along an axis


def plot(result: Result) -> dict[str, Figure]:
    """`fit`: the data with the fits; `weights`: what each row counts; `losses`: the curves."""
    with mpl.rc_context(STYLE):
        lines = len(result.data.features) == 1
        return {
            "fit": _lines(result) if lines else _residuals(result),
            "weights": _weights(result),
            "losses": _losses(result),
        }


def _style(result: Result, name: str) -> dict[str, object]:
    i = list(rl.LOSSES).index(name)
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)]}


def _lines(result: Result) -> Figure:
    data = result.data
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    x = data.X[:, 0]
    odd = _doubted(result)
    axes.plot(x[~odd], data.y[~odd], "o", color="0.35", ms=5, label="rows")
    if odd.any():
        axes.plot(x[odd], data.y[odd], "o", mfc="white", mec="0.1", ms=7, label="low weight")
        _name_rows(axes, x, data.y, data.rows, odd)
    ends = np.array([x.min(), x.max()])
    for name, (intercept, slope) in zip(result.losses, result.coefficients, strict=True):
        style = _style(result, name)
        axes.plot(
            ends, intercept + slope * ends, lw=2.2, label=f"{title(name)} {slope:.3g}", **style
        )
    axes.set(xlabel=data.features[0], ylabel=data.target, title=_headline(result))
    axes.legend(title="loss and slope", loc="best", fontsize=10)
    return figure


def _residuals(result: Result) -> Figure:
    data, count = result.data, len(result.losses)
    figure = Figure(figsize=(9, 1.2 + 1.5 * count))
    rows = np.atleast_1d(figure.subplots(count, 1, sharex=True, sharey=True))
    shown = -result.residuals / result.scale
    limit = np.abs(shown).max() * 1.3
    many = len(data.y) > FEW
    for axes, name, values, weights in zip(rows, result.losses, shown, result.weights, strict=True):
        color = _style(result, name)["color"]
        axes.axhline(0, color="0.7", lw=1)
        low = weights < LOW
        if many:
            axes.plot(data.rows, values, ",", color=color, rasterized=True)
        else:
            axes.vlines(data.rows, 0, values, color=color, lw=1.5)
            axes.plot(data.rows[~low], values[~low], "o", color=color, ms=4)
            axes.plot(data.rows[low], values[low], "o", mfc="white", mec=color, ms=6)
            for row, value in zip(data.rows[low], values[low], strict=True):
                axes.annotate(
                    str(row), (row, value), (0, 6 if value > 0 else -6), fontsize=8,
                    textcoords="offset points", ha="center", va="bottom" if value > 0 else "top",
                )  # fmt: skip
        axes.set_ylabel(title(name))
    rows[0].set_ylim(-limit, limit)
    rows[0].set_title("Residuals by row, in units of the robust scale" + ("" if many else
                      "; hollow: low weight"))  # fmt: skip
    rows[-1].set_xlabel("row")
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _weights(result: Result) -> Figure:
    data = result.data
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    if len(data.y) > FEW:
        share = np.linspace(0, 100, len(data.y))
        for name, weights in zip(result.losses, result.weights, strict=True):
            label, style = title(name), _style(result, name)
            axes.plot(share, np.sort(weights), lw=2.2, label=label, **style)
        axes.set(xlabel="rows, the least trusted first (%)", xlim=(0, 100))
    else:
        for i, (name, weights) in enumerate(zip(result.losses, result.weights, strict=True)):
            axes.plot(
                data.rows + 0.12 * (i - (len(result.losses) - 1) / 2), weights, MARKERS[i % 10],
                color=_style(result, name)["color"], ms=5, label=title(name),
            )  # fmt: skip
        axes.set(xlabel="row", xlim=(data.rows.min() - 1, data.rows.max() + 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(LOW, color="0.7", lw=1, zorder=0)
    axes.set(
        ylabel="weight, of a typical row's",
        ylim=(-0.03, 1.05),
        title="What each row counts in each fit",
    )
    axes.legend(ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _losses(result: Result) -> Figure:
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
                loss = rl.LOSSES[name] if np.isnan(delta) else partial(rl.LOSSES[name], delta=delta)
                values = np.asarray(view(loss, r))
                axes.plot(r, values, lw=2, label=title(name), **_style(result, name))
            axes.set(title=label, ylim=limits, xlim=(-5, 5), xlabel="residual / scale")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _doubted(result: Result) -> np.ndarray:
    """Rows with a low weight under a loss that bounds its influence smoothly, else none."""
    names = [n for n in result.losses if n not in ("squared_error", "absolute_error")]
    if not names:
        return np.zeros(len(result.data.y), bool)
    return result.weights[result.losses.index(names[0])] < LOW


def _name_rows(axes: Axes, x: np.ndarray, y: np.ndarray, rows: np.ndarray, odd: np.ndarray) -> None:
    if odd.sum() <= 12:
        for row in np.flatnonzero(odd):
            axes.annotate(
                str(rows[row]), (x[row], y[row]), (-7, 4), textcoords="offset points",
                fontsize=9, ha="right",
            )  # fmt: skip


def _headline(result: Result) -> str:
    slopes = dict(zip(result.losses, result.coefficients[:, 1], strict=True))
    name = result.data.name
    if {"squared_error", "huber"} <= set(slopes) and slopes["huber"] * slopes["squared_error"] > 0:
        ratio = slopes["squared_error"] / slopes["huber"]
        if not 0.9 < ratio < 1.1:
            return f"{name}: MSE's slope is {ratio:.2g} times Huber's"
        return f"{name}: MSE and Huber draw nearly the same line"
    return f"{name}: {result.data.target} by {result.data.features[0]}"
