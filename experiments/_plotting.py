"""How every picture looks."""

from __future__ import annotations

import matplotlib as mpl

import robustloss as rl

mpl.use("Agg")

# Okabe and Ito: told apart by the colour-blind; dashes and markers tell them apart in print.
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


def color(name: str) -> str:
    """The colour of a loss, the same in every picture."""
    return COLORS[list(rl.LOSSES).index(name) % len(COLORS)]


def line(name: str) -> dict[str, object]:
    """The colour and dashes of a loss."""
    return style(list(rl.LOSSES).index(name))


def style(i: int) -> dict[str, object]:
    """The i-th pair of colour and dashes."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)]}
