"""The picture of `kink`."""

from __future__ import annotations

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import robustloss as rl
from experiments._compare_plots import COLORS, STYLE
from experiments.kink import Result


def plot(result: Result) -> Figure:
    """The slope around 0, and what it does to a fit that is exact."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4))
        left, right = figure.subplots(1, 2)
        r = np.linspace(-1, 1, 401)
        for side in (r[r < 0], r[r > 0]):
            left.plot(side, jax.vmap(jax.grad(rl.absolute_error))(side), color="0.6", lw=2)
        for i, (name, slopes) in enumerate(result.slopes.items()):
            left.plot(0, slopes["0"][1], "os^D"[i % 4], color=COLORS[i], ms=9 - i, label=name)
        left.set(title="Slope of |r|: what is taken at 0", xlabel="residual r", ylabel="slope")
        left.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        left.legend(loc="lower right")
        for i, (name, path) in enumerate(result.descent.items()):
            right.plot(path, color=COLORS[1 - i], lw=2, label=name)
        right.set(
            title="An exact fit rests only with 0 there",
            xlabel="step of gradient descent",
            ylabel="MAE",
        )
        right.set_ylim(top=1.25 * max(path.max() for path in result.descent.values()))
        right.xaxis.get_major_locator().set_params(integer=True)
        right.legend(loc="upper right", ncols=2)
        return figure
