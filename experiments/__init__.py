"""Experiments: one file, one question. `python -m experiments` lists them."""

from collections.abc import Callable
from typing import Any

import numpy as np

Progress = Callable[[float, str], None]
"""`progress(share, task)` reports the share that is done and the task that begins."""

Cache = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
"""`cache(name, compute)` returns the arrays of `compute()`, from a file where there is one."""


class UsageError(ValueError):
    """Input that cannot be used; the message is one clear sentence for the user."""


class FindingError(Exception):
    """A finding of an experiment does not hold; the message says which."""


def require(condition: Any, message: str) -> None:
    """Raises a `FindingError` with the message if the condition is false, also in `python -O`."""
    if not condition:
        raise FindingError(message)


def ignore_progress(share: float, task: str) -> None:
    """The `Progress` that shows nothing."""


def compute_arrays(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The `Cache` that stores nothing."""
    return {key: np.asarray(value) for key, value in compute().items()}
