"""Descent by an optax optimiser that returns every step; `rl.fit` returns the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array


def descend(
    objective: Callable[[Any], Array], optimizer: Any, start: Any, steps: int
) -> tuple[Any, Any]:
    """The parameters after the last step, and after each step."""
    optimizer = optax.with_extra_args_support(optimizer)  # for a line search

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=objective
        )
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (params, _), path = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return params, path
