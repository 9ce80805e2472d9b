"""The functions that follow from a loss by differentiation: influence, weight, curvature.

Each of them takes any elementwise loss of a residual, the library's or the user's own; fix the
loss's parameters with `functools.partial`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustloss._arguments import check_loss, residual
from robustloss.losses._double import frexp, ldexp
from robustloss.losses.adaptive import gaussian_nll, general
from robustloss.losses.asymmetric import expectile
from robustloss.losses.convex import squared_error
from robustloss.types import Loss

__all__ = ["curvature", "influence", "weight"]


def influence(loss: Loss, predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """The influence psi(r) = rho'(r): the force of a point on the fit, with its sign.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`.
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.

    Returns:
        The derivative of the loss at each residual, in its shape and dtype. At a kink it
        is the derivative that the loss defines there; NaN stays NaN.

    Raises:
        ValueError: the shapes differ.
        TypeError: complex or non-numeric input.

    >>> influence(rl.huber, jnp.array([-0.5, 9.0]))
    Array([-0.5,  1. ], dtype=float32)
    """
    r, dtype = residual(predictions, targets)
    return _derivative(loss)(r).astype(dtype)


def curvature(loss: Loss, predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """The curvature psi'(r) = rho''(r), the divisor in Newton's method.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`.
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.

    Returns:
        The second derivative of the loss at each residual, in its shape and dtype. It
        does not show a jump of the influence, such as that of `absolute_error` at 0.

    Raises:
        ValueError: the shapes differ.
        TypeError: complex or non-numeric input.

    >>> curvature(rl.huber, jnp.array([-0.5, 1.0, 9.0]))
    Array([1., 1., 0.], dtype=float32)
    """
    r, dtype = residual(predictions, targets)
    return _derivative(_derivative(loss))(r).astype(dtype)


def weight(loss: Loss, predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """The weight w(r) = psi(r) / r of a point in iteratively reweighted least squares.

    At r = 0 the weight is the limit, which is the curvature at 0. Where the influence jumps at 0,
    as that of `absolute_error` does, the limit is infinite and the weight is `inf`: the fit
    cannot leave a point that it meets exactly. A reweighting loop over such a loss has to bound the
    weights itself; a finite number chosen here would only hide that. At an infinite residual the
    weight is the limit too.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`.
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.

    Returns:
        The weight at each residual, in its shape and dtype; NaN stays NaN.

    Raises:
        ValueError: the shapes differ.
        TypeError: complex or non-numeric input.

    >>> weight(rl.huber, jnp.array([0.0, 0.5, -4.0]))
    Array([1.  , 1.  , 0.25], dtype=float32)
    >>> weight(rl.absolute_error, jnp.array([0.0, 0.5, -4.0]))
    Array([ inf, 2.  , 0.25], dtype=float32)
    """
    r, dtype = residual(predictions, targets)
    second = _derivative(_derivative(loss))(r)
    original, r, loss = r, *_in_large_unit(loss, r)
    first = _derivative(loss)
    # Next to 0 a smooth influence is about rho''(0) r; an influence that jumps is far above this.
    smallest = jnp.finfo(r.dtype).tiny
    psi = first(jnp.where(r == 0, smallest, r))
    jumps = jnp.abs(psi) > (1 + jnp.abs(second)) * smallest / jnp.finfo(r.dtype).eps
    at_zero = jnp.where(jumps, jnp.copysign(jnp.inf, psi), second)
    ratio = psi / jnp.where(r == 0, smallest, r)
    if _function(loss) is gaussian_nll:
        ratio = second  # which is constant, and finite where psi overflows
    ratio = jnp.where(jnp.isinf(original), second, ratio)
    return jnp.where(original == 0, at_zero, ratio).astype(dtype)


def _in_large_unit(loss: Loss, r: Array) -> tuple[Array, Loss]:
    """The residual and the loss's `delta` in a unit in which a large residual is near 1.

    The weight does not depend on the unit, and an influence that grows like r or faster does not
    overflow in this one. Only the losses of the library with such an influence change their unit.
    """
    function = _function(loss)
    if function not in (squared_error, expectile, general):
        return r, loss
    mantissa, exponent = frexp(jnp.where(jnp.isfinite(r), r, 1))
    large = jnp.isfinite(r) & (exponent > 0)
    exponent = jnp.where(large, -exponent, 0)
    if function is general:
        keywords = loss.keywords if isinstance(loss, partial) else {}
        delta = jnp.asarray(keywords.get("delta", 1.0), r.dtype)
        loss = partial(loss, delta=jnp.where(jnp.isinf(delta), delta, ldexp(delta, exponent)))
    return jnp.where(large, mantissa, r), loss


def _function(loss: Loss) -> Loss:
    return loss.func if isinstance(loss, partial) else loss


def _derivative(loss: Loss) -> Callable[[Array], Array]:
    """The derivative of an elementwise function, as a function."""
    check_loss(loss)

    # A loss acts on each residual alone, so a tangent of ones gives the derivatives of all.
    def derivative(r: Array) -> Array:
        return jax.jvp(loss, (r,), (jnp.ones_like(r),))[1]

    return derivative
