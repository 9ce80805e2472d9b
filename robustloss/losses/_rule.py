"""The evaluation of a loss by its kernel, and the derivatives of a kernel.

A loss is a documented public function over a private *kernel* of floating arrays
`(residual, *parameters)`. The kernel carries the derivative rule. `elementwise` does the steps
that all losses share: check, promote, subtract, round once.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from robustloss._arguments import at_least_float32, broadcasts, readable, residual

Kernel = Callable[..., Array]


def elementwise(
    kernel: Kernel, predictions: ArrayLike, targets: ArrayLike | None, *parameters: Array
) -> Array:
    """`kernel(predictions - targets, *parameters)`, in the dtype that JAX promotes to."""
    r, dtype = residual(predictions, targets)
    for parameter in parameters:
        if not broadcasts(parameter.shape, r.shape):
            raise ValueError(
                f"a parameter must broadcast to the residual's shape {r.shape}, "
                f"got shape {parameter.shape}"
            )
    dtype = jnp.result_type(dtype, *parameters)
    wide = at_least_float32(dtype)
    for parameter in parameters:
        given = readable(parameter) if parameter.dtype.itemsize > wide.itemsize else None
        if given is not None and np.any((given != 0) & (np.abs(given) < jnp.finfo(wide).tiny)):
            smallest = np.abs(given)[given != 0].min()
            raise ValueError(
                f"a parameter of {smallest} counts as 0 in {wide}, the residual's type"
            )
    return kernel(r.astype(wide), *(p.astype(wide) for p in parameters)).astype(dtype)


def with_partials(*partials: Kernel) -> Callable[[Kernel], Kernel]:
    """A decorator that gives a kernel its partial derivatives, one formula for each argument.

    Write each formula as a lambda around a named kernel, `lambda r, d: _slope(r, d)`. Then the
    value can stand above its slope, and higher orders follow the rules of the named kernels.
    """

    def decorate(kernel: Kernel) -> Kernel:
        arguments = len(inspect.signature(kernel).parameters)
        if len(partials) != arguments:
            raise TypeError(
                f"{kernel.__name__} takes {arguments} arguments but has {len(partials)} partials"
            )
        differentiable = jax.custom_jvp(kernel)

        def rule(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
            out = differentiable(*primals)
            # A symbolic zero is skipped and not multiplied, as 0 * inf at r = inf would be NaN.
            terms = [
                slope(*primals) * t
                for slope, t in zip(partials, tangents, strict=True)
                if not isinstance(t, SymbolicZero)
            ]
            return out, reduce(operator.add, terms) if terms else jnp.zeros_like(out)

        differentiable.defjvp(rule, symbolic_zeros=True)
        return compiled(differentiable)

    return decorate


def automatic_partials(formula: Kernel, arguments: int) -> list[Kernel]:
    """The partial derivatives of a formula, for a kernel that evaluates it with less rounding."""

    def partial_of(i: int) -> Kernel:
        def partial_derivative(*x: Array) -> Array:
            def restricted(y: Array) -> Array:
                return formula(*x[:i], y, *x[i + 1 :])

            return jax.jvp(restricted, (x[i],), (jnp.ones_like(x[i]),))[1]

        return partial_derivative

    return [partial_of(i) for i in range(arguments)]


def compiled(kernel: Kernel) -> Kernel:
    """The same kernel, which an eager call compiles as a whole and not operation by operation."""
    return jax.jit(kernel, inline=True)
