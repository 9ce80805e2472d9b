"""Experiments: one file, one question. `python -m experiments` lists them."""

from collections.abc import Callable
from typing import Any

import numpy as np

Progress = Callable[[float, str], None]
"""Told the share that is done, and what is done next."""

Keep = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
"""`keep(name, compute)` gives the arrays that `compute()` does, unless it has them already."""


def compute(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The `Keep` that has nothing already."""
    return {key: np.asarray(value) for key, value in compute().items()}


class UsageError(ValueError):
    """Input that cannot be used; the message is one clear sentence for the user."""
