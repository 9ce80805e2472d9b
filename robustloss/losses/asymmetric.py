"""Asymmetric losses, which weigh the two signs differently: `rho(r; q) = rho(-r; 1 - q)`.

The residual is `predictions - targets`, so it is positive if the prediction is too high. The weight
of a positive residual is `1 - q`, that of a negative one `q`. So a quantile fit with q = 0.9 has
nine tenths of the targets below it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustloss._arguments import constrained, positive
from robustloss.losses._pieces import (
    capped,
    excess,
    inside_indicator,
    nan_or_zero,
    nan_or_zero_both,
    outside_sign,
)
from robustloss.losses._rule import elementwise, with_partials
from robustloss.losses.convex import _clipped, _huber

__all__ = ["expectile", "quantile", "quantile_huber"]


def quantile(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    q: ArrayLike = 0.5,
    kink: ArrayLike = 0.0,
) -> Array:
    """Quantile (pinball, check) loss: `(1 - q) r` for r > 0 and `-q r` for r < 0.

    Its mean is least where a share `q` of the targets lies below the prediction. The influence is
    `1 - q` for r > 0 and `-q` for r < 0. At r = 0 every number in [-q, 1 - q] is a subgradient, and
    the derivative is `kink`. The second derivative is 0 everywhere. With q = 1/2, the loss is half
    the absolute error.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        q: the share of targets below, in the open interval (0, 1); broadcasts to the residual
            and can be differentiated.
        kink: the derivative at r = 0, in [-q, 1 - q].

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN has the value NaN and the slope NaN.

    Raises:
        ValueError: the shapes differ, `q` is not in (0, 1) (traced: the result is NaN), or
            `kink` is not in [-q, 1 - q] (traced: a NaN slope at 0).
        TypeError: complex or non-numeric input.

    Source: Koenker and Bassett (1978), Econometrica 46, 33-50.

    >>> quantile(jnp.array([-2.0, 3.0]), q=0.75)
    Array([1.5 , 0.75], dtype=float32)
    """
    checked_q, law = _checked_q(q), "must be in [-q, 1 - q]"
    slope = constrained("kink", law, lambda k, q: (k >= -q) & (k <= 1 - q), kink, q)
    return elementwise(_quantile, predictions, targets, checked_q, slope)


@with_partials(
    lambda r, q, kink: _quantile_slope(r, q, kink),
    lambda r, q, kink: nan_or_zero_both(r, q) - r,
    lambda r, q, kink: jnp.zeros_like(r),
)
def _quantile(r: Array, q: Array, kink: Array) -> Array:
    return jnp.where(r > 0, 1 - q, q) * jnp.abs(r)


@with_partials(
    lambda r, q, kink: nan_or_zero(r),
    lambda r, q, kink: jnp.where(r == 0, 0.0, nan_or_zero(r) - 1),
    lambda r, q, kink: jnp.where(r == 0, 1.0, nan_or_zero(r)),
)
def _quantile_slope(r: Array, q: Array, kink: Array) -> Array:
    return jnp.where(r == 0, kink, jnp.where(r > 0, 1 - q, -q) + nan_or_zero(r))


def expectile(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, q: ArrayLike = 0.5
) -> Array:
    """Expectile loss: `(1 - q) r**2` for r > 0 and `q r**2` for r < 0.

    The loss of asymmetric least squares. It is to the squared error what the quantile loss is to
    the absolute error. The influence is `2 (1 - q) r` for r > 0 and `2 q r` for r < 0, without
    bound. The second derivative jumps at r = 0, where its value is 1, the mean of both sides. With
    q = 1/2, the loss is `r**2 / 2`.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        q: the weight of targets above the prediction, in the open interval (0, 1); broadcasts
            to the residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN; an infinite residual costs infinity.

    Raises:
        ValueError: the shapes differ, or `q` is not in (0, 1) (traced: the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Newey and Powell (1987), Econometrica 55, 819-847.

    >>> expectile(jnp.array([-2.0, 2.0]), q=0.75)
    Array([3., 1.], dtype=float32)
    """
    return elementwise(_expectile, predictions, targets, _checked_q(q))


@with_partials(
    lambda r, q: _expectile_slope(r, q), lambda r, q: nan_or_zero_both(r, q) - r * jnp.abs(r)
)
def _expectile(r: Array, q: Array) -> Array:
    return _side_weight(r, q) * r * r


@with_partials(lambda r, q: 2 * _side_weight(r, q), lambda r, q: -2 * jnp.abs(r))
def _expectile_slope(r: Array, q: Array) -> Array:
    return 2 * _side_weight(r, q) * r


def quantile_huber(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    q: ArrayLike = 0.5,
    delta: ArrayLike = 1.0,
) -> Array:
    """Quantile Huber loss: Huber's, times `2 (1 - q)` for r > 0 and `2 q` for r < 0.

    The expectile loss up to `|r| = delta`, then linear like the quantile loss. The influence is
    `2 (1 - q) min(r, delta)` for r > 0 and `2 q max(r, -delta)` for r < 0. With q = 1/2, it is
    Huber's loss, and as `delta` goes to 0, the loss over `2 delta` goes to the quantile loss. At
    `|r| = delta` the second derivative is that of the quadratic side. At r = 0 it jumps, and its
    value is 1, the mean of both sides. (Distributional reinforcement learning divides by
    `2 delta`.)

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        q: the weight of targets above the prediction, in the open interval (0, 1); broadcasts
            to the residual and can be differentiated.
        delta: the |r| from which the loss is linear, > 0, in the residual's units; broadcasts to
            the residual and can be differentiated.

    Returns:
        The loss of each residual, in its shape and in the dtype that JAX promotes to.
        NaN stays NaN, also as a slope.

    Raises:
        ValueError: the shapes differ, `q` is not in (0, 1), or `delta` is not > 0 (traced:
            the result is NaN).
        TypeError: complex or non-numeric input.

    Source: Dabney et al. (2018), AAAI 32, 2892-2901; Aravkin et al. (2014), arXiv:1402.4624.

    >>> quantile_huber(jnp.array([-3.0, 0.5]), q=0.75)
    Array([3.75  , 0.0625], dtype=float32)
    """
    return elementwise(
        _quantile_huber, predictions, targets, _checked_q(q), positive("delta", delta)
    )


@with_partials(
    lambda r, q, d: 2 * _side_weight(r, q) * _clipped(r, capped(d)),
    lambda r, q, d: nan_or_zero_both(r, q) - 2 * jnp.sign(r) * _huber(r, d),
    lambda r, q, d: _quantile_overshoot(r, q, d),
)
def _quantile_huber(r: Array, q: Array, delta: Array) -> Array:
    a = jnp.abs(r)
    half = jnp.minimum(0.5 * a, 0.5 * capped(delta))
    return 2 * (2 * _side_weight(r, q) * half * (a - half))


@with_partials(
    lambda r, q, d: 2 * (_side_weight(r, q) * outside_sign(r, d)),
    lambda r, q, d: -2 * jnp.sign(r) * excess(r, d),
    lambda r, q, d: 2 * (_side_weight(r, q) * (inside_indicator(r, d) - 1)),
)
def _quantile_overshoot(r: Array, q: Array, delta: Array) -> Array:
    return 2 * (_side_weight(r, q) * excess(r, capped(delta)))


# Functions that the losses of this family share.


@with_partials(lambda r, q: nan_or_zero(r), lambda r, q: -jnp.sign(r))
def _side_weight(r: Array, q: Array) -> Array:
    """The weight of the residual's side: 1 - q for r > 0, q for r < 0, and 1/2 at 0."""
    return jnp.where(r > 0, 1 - q, jnp.where(r < 0, q, 0.5)) + nan_or_zero(r + q)


def _checked_q(q: ArrayLike) -> Array:
    return constrained("q", "must be in (0, 1)", lambda q: (q > 0) & (q < 1), q)
