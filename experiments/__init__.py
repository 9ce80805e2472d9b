"""Experiments: one file, one question. `python -m experiments` lists them."""


class UsageError(ValueError):
    """Input that cannot be used; the message is one clear sentence for the user."""
