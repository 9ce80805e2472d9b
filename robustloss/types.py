"""The types of what users pass as functions."""

from __future__ import annotations

from typing import Any, Protocol

from jax import Array

__all__ = ["Loss"]


class Loss(Protocol):
    """An elementwise function of the residual `predictions - targets`, such as `rl.huber`.

    The result has the residual's shape and its unit squared, or another power of it. Parameters
    follow the residual by name; `functools.partial` fixes them. Functions that scale the residual,
    such as `rl.tune` and `rl.fit_linear`, look for the parameter `delta`. Any function of this form
    is a loss:

    >>> def arctan(residual, *, delta=1.0):
    ...     return 0.5 * delta**2 * jnp.arctan((residual / delta) ** 2)
    >>> loss: rl.Loss = arctan
    >>> print(f"{rl.mean(loss, jnp.array([0.0, 1.0])):.5f}")
    0.19635
    """

    def __call__(self, residual: Array, /, *args: Any, **parameters: Any) -> Array:
        """The loss of each residual."""
