"""One look for all pictures: the style of the axes, and the colour and marker of each fit."""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")

# Okabe and Ito's palette, distinguishable by colour-blind readers, and two of Tol's dark colours.
VERMILLION, BLUE, GREEN, PURPLE = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#999999"
WINE, INDIGO = "#882255", "#332288"
SOLID, DASHED, DASHDOT, DOTTED = "-", "--", "-.", ":"
LONG, DOUBLE = (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1))

STYLE = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 11,
    "legend.frameon": False,
}


class Look(NamedTuple):
    """How a fit is drawn; line styles and markers distinguish fits in black and white."""

    color: str
    linestyle: Any
    marker: str


LOOKS = {
    "squared_error": Look(VERMILLION, SOLID, "s"),
    "absolute_error": Look(BLUE, DASHED, "^"),
    "huber": Look(GREEN, SOLID, "o"),
    "log_cosh": Look(SKY, DASHDOT, "D"),
    "pseudo_huber": Look(PURPLE, DOUBLE, "v"),
    "fair": Look(ORANGE, LONG, "P"),
    "epsilon_insensitive": Look(GREY, DASHED, "X"),
    "cauchy": Look(ORANGE, DASHED, "<"),
    "tukey": Look(WINE, DASHDOT, ">"),
    "welsch": Look(GREEN, DASHDOT, "p"),
    "geman_mcclure": Look(SKY, SOLID, "h"),
    "andrews": Look(BLUE, LONG, "d"),
    "hampel": Look(GREY, SOLID, "8"),
    "talwar": Look(INDIGO, DOTTED, "*"),
    "quantile": Look(BLUE, DASHDOT, ">"),
    "expectile": Look(VERMILLION, DASHED, "D"),
    "quantile_huber": Look(GREEN, LONG, "v"),
    "general": Look(PURPLE, SOLID, "p"),
    "gaussian_nll": Look(VERMILLION, DASHDOT, "o"),
    "laplace_nll": Look(BLUE, DOTTED, "s"),
    "student_t_nll": Look(ORANGE, SOLID, "^"),
    "general_nll": Look(INDIGO, DOUBLE, "X"),
    "mm": Look(BLACK, DOTTED, "*"),
}
"""The look of each loss in `rl.LOSSES`, and of the MM-estimate."""

SERIES = (
    Look(BLACK, SOLID, "o"),
    Look(PURPLE, DASHED, "s"),
    Look(ORANGE, DASHDOT, "^"),
    Look(SKY, LONG, "D"),
)
"""The looks of curves that are not fits, in the order of the curves."""


def get_color(name: str) -> str:
    """The colour of a fit."""
    return LOOKS[name].color


def get_line(name: str) -> dict[str, Any]:
    """The colour and line style of a fit."""
    return _convert_line(LOOKS[name])


def get_points(name: str) -> dict[str, Any]:
    """The colour and marker of a fit."""
    return {"color": LOOKS[name].color, "marker": LOOKS[name].marker}


def get_series_line(i: int) -> dict[str, Any]:
    """The colour and line style of the i-th curve that is not a fit."""
    return _convert_line(SERIES[i])


def _convert_line(look: Look) -> dict[str, Any]:
    return {"color": look.color, "linestyle": look.linestyle}
