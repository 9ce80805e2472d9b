"""Whether a fit of any model has converged: the conditions of `robustloss.fit`.

At a minimum, the value and the gradient have settled, and the curvature is positive. The curvature
is measured by products of the Hessian matrix with vectors, so no matrix is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Params = Any  # a pytree of floating arrays
Objective = Callable[..., Array]

# Conjugate gradients end after this number of products with the Hessian matrix, or after twice the
# number of parameters if that is less.
_MAX_HESSIAN_PRODUCTS = 100
# The rounding error of an entry of the gradient is taken as this number times eps times the scale
# of the entry.
_GRADIENT_ROUNDING = 8


class Criteria(NamedTuple):
    """The conditions of convergence of `fit`'s docstring."""

    objective: Objective
    tolerance: Array
    initial_value: Array
    """The objective at the start, a scalar."""
    typical_gradient: Array
    """The magnitude that each entry of the gradient would have at the start if the influences of
    the rows had random signs, (parameters,)."""

    def magnitudes(self, gradient: Params) -> Array:
        return jnp.abs(ravelled(gradient, self.initial_value.dtype))

    def value_scale(self, value: Array) -> Array:
        """The number that changes of the value are compared with."""
        # Below tolerance times the initial value, a fit is perfect to rounding and its value noise.
        return jnp.maximum(jnp.abs(value), self.tolerance * jnp.abs(self.initial_value))

    def is_stationary(
        self, value_before: Array, value: Array, gradient: Params, gradient_scale: Array
    ) -> Array:
        """Whether the value and the gradient have settled: the first two conditions."""
        settled = jnp.abs(value - value_before) <= self.tolerance * self.value_scale(value)
        limit = self.tolerance ** (2 / 3) * jnp.maximum(gradient_scale, self.typical_gradient)
        return settled & jnp.all(self.magnitudes(gradient) <= limit) & jnp.isfinite(value)

    def is_minimum(
        self,
        stationary: Array,
        params: Params,
        value: Array,
        gradient: Params,
        gradient_scale: Array,
    ) -> Array:
        """Whether the curvature is that of a minimum: the last two conditions.

        False where `stationary` is False, without any product with the Hessian matrix.
        """
        dtype = self.initial_value.dtype
        slope = ravelled(gradient, dtype)
        eps = float(jnp.finfo(_coarsest_dtype(jax.tree.leaves(params))).eps)
        scale = self._positive_scale(gradient_scale)
        rounding_error = _GRADIENT_ROUNDING * eps * scale
        unit = 1 / scale  # of the parameters, so that the units of a parameter do not matter
        hessian_product = self._hessian_product(params, unit)
        had_gradient = jnp.max(gradient_scale) > 0
        try:
            jax.eval_shape(hessian_product, unit)
        except (TypeError, ValueError, NotImplementedError):
            # A model that JAX cannot differentiate twice, such as one with a `custom_vjp`, has no
            # curvature to test; the docstring of `fit` says so.
            return stationary & (had_gradient | (value == 0))
        signs = jax.random.rademacher(jax.random.key(1), slope.shape, dtype)
        scaled_gradient, random_direction = jnp.stack([unit * slope, signs])
        tolerated = self.tolerance * self.value_scale(value)
        model = _conjugate_gradients(
            hessian_product, scaled_gradient, stationary, unit * rounding_error, tolerated, eps
        )
        random = _conjugate_gradients(
            hessian_product, random_direction, stationary, 0 * rounding_error, jnp.inf, eps
        )
        convex = jnp.minimum(model.least_curvature, random.least_curvature) >= 0
        # A start where the gradient is 0 may be a plateau, which has no curvature at all.
        no_plateau = had_gradient | (value == 0) | (random.largest_curvature > 0)
        return stationary & (convex & (model.decrease <= tolerated)) & no_plateau

    def _positive_scale(self, gradient_scale: Array) -> Array:
        """The scale of each entry of the gradient; where it is 0, the largest of the entries'."""
        scale = jnp.maximum(gradient_scale, self.typical_gradient)
        largest = jnp.max(scale)
        return jnp.where(scale > 0, scale, jnp.where(largest > 0, largest, 1))

    def _hessian_product(self, params: Params, unit: Array) -> Callable[[Array], Array]:
        """The product of the Hessian matrix with a vector, for parameters in these units."""

        def product(v: Array) -> Array:
            direction = _unravelled(params, unit * v)
            _, derivative = jax.jvp(jax.grad(self.objective), (params,), (direction,))
            return unit * ravelled(derivative, self.initial_value.dtype)

        return product


class _QuadraticModel(NamedTuple):
    """The result of `_conjugate_gradients` for `v H v / 2 - b v`. All fields are scalars."""

    decrease: Array
    """A lower bound of how far its minimum is below 0; infinite if it has no minimum."""
    least_curvature: Array
    """-1 if the curvature was negative in some direction, beyond rounding, else 0."""
    largest_curvature: Array
    """The largest magnitude of the curvature in the directions searched."""


def _conjugate_gradients(
    hessian_product: Callable[[Array], Array], b: Array, needed: Array, rounding_error: Array,
    tolerated: Any, eps: float,
) -> _QuadraticModel:  # fmt: skip
    """Minimises `v H v / 2 - b v` over v, unless not `needed`.

    The search ends where the residual `b - H v` is at most `rounding_error`, where the decrease is
    more than `tolerated`, or where a direction has no curvature. In such a direction the decrease
    is infinite. A NaN appears in all results.
    """
    # A quotient of rounded numbers may be as negative as this, relative to the largest curvature.
    curvature_error = eps**0.5

    def step(state: Any) -> Any:
        residual, direction, decrease, least, largest, products, _ = state
        product = hessian_product(direction)
        quadratic_form, squared_length = (
            jnp.vdot(direction, product),
            jnp.vdot(direction, direction),
        )
        curvature = quadratic_form / squared_length
        largest = jnp.maximum(largest, jnp.abs(curvature))
        negative = curvature < -curvature_error * largest
        no_curvature = ~(curvature > eps * largest)
        length = jnp.vdot(residual, residual) / jnp.where(no_curvature, 1, quadratic_form)
        decrease = jnp.where(
            no_curvature, jnp.inf, decrease + 0.5 * length * jnp.vdot(residual, residual)
        )
        new_residual = residual - length * product
        beta = jnp.vdot(new_residual, new_residual) / jnp.vdot(residual, residual)
        least = jnp.where(negative | jnp.isnan(curvature), -1, least)
        solved = jnp.all(jnp.abs(new_residual) <= rounding_error)
        done = no_curvature | (decrease > tolerated) | solved
        new_direction = new_residual + beta * direction
        return new_residual, new_direction, decrease, least, largest, products + 1, done

    zero = jnp.zeros_like(b, shape=())
    done = ~needed | jnp.all(jnp.abs(b) <= rounding_error)
    start = b, b, zero, zero, zero, jnp.asarray(0, jnp.int32), done
    limit = min(2 * b.size, _MAX_HESSIAN_PRODUCTS)
    _, _, decrease, least, largest, _, _ = lax.while_loop(
        lambda state: ~state[-1] & (state[-2] < limit), step, start
    )
    return _QuadraticModel(decrease, least, largest)


# Parameters as one vector.


def _coarsest_dtype(leaves: list[Array]) -> jnp.dtype:
    """The type of the parameters with the largest rounding error."""
    return max((x.dtype for x in leaves), key=lambda dtype: float(jnp.finfo(dtype).eps))


def ravelled(tree: Params, dtype: Any) -> Array:
    """The entries of all leaves as one vector."""
    return jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in jax.tree.leaves(tree)])


def _unravelled(tree: Params, vector: Array) -> Params:
    """The inverse of `ravelled`: the vector as a pytree like `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    parts = jnp.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    shaped = [
        part.reshape(leaf.shape).astype(leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)
