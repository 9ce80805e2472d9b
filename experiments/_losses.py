"""The losses as the experiments take them: every one of the library, its parameters fixed."""

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
"""Numbers for the parameters that have no default, or a dull one."""

ALIASES = {"mse": "squared_error", "mae": "absolute_error"}
TITLES = {"squared_error": "MSE", "absolute_error": "MAE"}
WORDS = {
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
}


def title(name: str) -> str:
    """How a loss is called in tables and pictures."""
    return TITLES.get(name) or WORDS.get(name) or name.replace("_", "-").capitalize()


def example(name: str) -> Callable[..., Array]:
    """The loss, with numbers for its parameters other than `delta`."""
    return partial(rl.LOSSES[name], **EXAMPLES.get(name, {}))


def comparable(name: str) -> str:
    """The library's name of a loss that has a fit to compare, or an error with the nearest one."""
    name = ALIASES.get(name.lower(), name)
    if name not in rl.LOSSES:
        near = difflib.get_close_matches(name, [*rl.LOSSES, *ALIASES], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(rl.LOSSES)}."
        raise UsageError(f"no loss is called {name!r}; {hint}")
    if has_delta(name) and np.isnan(tuned(name, efficiency=0.95)):
        raise UsageError(f"no delta makes {name} 95 % efficient: nothing to compare it at.")
    return name


def has_delta(name: str) -> bool:
    """Whether the loss has a `delta`."""
    return "delta" in inspect.signature(rl.LOSSES[name]).parameters


def with_delta(name: str, delta: ArrayLike) -> Callable[..., Array]:
    """The loss with this `delta`, or as it is where it has none."""
    return partial(example(name), delta=delta) if has_delta(name) else example(name)


@cache
def tuned(name: str, *, efficiency: float | None = None, breakdown: float | None = None) -> float:
    """The `delta` that buys this at the normal; NaN where the loss has no `delta` or none does."""
    if not has_delta(name):
        return float("nan")
    try:
        return rl.tune(example(name), efficiency=efficiency, breakdown=breakdown)
    except ValueError:  # out of reach, as the message of `tune` would say
        return float("nan")
