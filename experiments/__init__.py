"""Experiments: one file, one question. `python -m experiments` lists them."""

from collections.abc import Callable

Progress = Callable[[float, str], None]
"""Told the share that is done, and what is done next."""


class UsageError(ValueError):
    """Input that cannot be used; the message is one clear sentence for the user."""
