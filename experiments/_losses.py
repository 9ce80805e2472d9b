"""The losses of the library with fixed parameters, as the experiments use them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from jax import Array
from jax.typing import ArrayLike

import robustloss as rl
from experiments import UsageError

EXAMPLES: dict[str, dict[str, Any]] = {
    "general": {"alpha": 1.0},
    "general_nll": {"alpha": 1.0},
    "student_t_nll": {"df": 3.0},
    "quantile": {"q": 0.75},
    "expectile": {"q": 0.75},
    "quantile_huber": {"q": 0.75},
}
"""Values for parameters that have no default, or a default that shows little of the loss."""

ALIASES = {"mse": "squared_error", "mae": "absolute_error"}
TITLES = {
    "squared_error": "MSE",
    "absolute_error": "MAE",
    "log_cosh": "log-cosh",
    "pseudo_huber": "pseudo-Huber",
    "geman_mcclure": "Geman-McClure",
    "quantile_huber": "quantile Huber",
    "epsilon_insensitive": "epsilon-insensitive",
    "quantile": "quantile",
    "expectile": "expectile",
    "general": "general",
    "gaussian_nll": "Gaussian NLL",
    "laplace_nll": "Laplace NLL",
    "student_t_nll": "Student t NLL",
    "general_nll": "general NLL",
    "mm": "MM",
}
"""Titles of losses, and of the MM-estimate, that are not the capitalised name."""


def title(name: str) -> str:
    """The title of a loss, or of the MM-estimate, in tables and pictures."""
    return TITLES.get(name) or name.replace("_", "-").capitalize()


def fix_parameters(name: str) -> Callable[..., Array]:
    """The loss with fixed values for all parameters but `delta`."""
    return partial(rl.LOSSES[name], **EXAMPLES.get(name, {}))


def set_delta(name: str, delta: ArrayLike) -> Callable[..., Array]:
    """The loss with this `delta`, or the loss itself if it has no `delta`."""
    return partial(fix_parameters(name), delta=delta) if has_delta(name) else fix_parameters(name)


def has_delta(name: str) -> bool:
    """Whether the loss has a `delta`."""
    return "delta" in inspect.signature(rl.LOSSES[name]).parameters


def resolve_loss(name: str) -> str:
    """The library's name of a loss that experiments can tune; an error names the nearest one."""
    name = ALIASES.get(name.lower(), name)
    if name not in rl.LOSSES:
        near = difflib.get_close_matches(name, [*rl.LOSSES, *ALIASES], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(rl.LOSSES)}."
        raise UsageError(f"no loss is called {name!r}; {hint}")
    if has_delta(name) and np.isnan(tune_delta(name, efficiency=0.95)):
        raise UsageError(f"no delta makes {name} 95 % efficient, so it has no fit to compare.")
    return name


@cache
def tune_delta(
    name: str, *, efficiency: float | None = None, breakdown: float | None = None
) -> float:
    """The `delta` for this efficiency at the normal or this breakdown point; NaN if none exists."""
    if not has_delta(name):
        return float("nan")
    try:
        return rl.tune(fix_parameters(name), efficiency=efficiency, breakdown=breakdown)
    except ValueError:  # the message of `tune`: out of reach
        return float("nan")
