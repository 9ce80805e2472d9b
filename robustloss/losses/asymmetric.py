"""Asymmetric losses: over- and undershooting cost differently, `rho(r; q) = rho(-r; 1 - q)`.

The residual is `predictions - targets`, so a positive one is a prediction that is too high. It
costs `1 - q`, one that is too low costs `q`: with q = 0.9 the fit goes where nine tenths of the
targets lie below it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustloss._arguments import constrained, positive
from robustloss.losses._pieces import beyond, capped, flat, flat_in, overshoot, within
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

    Its mean is least where a share `q` of the targets lies below the prediction. Influence
    `1 - q` above and `-q` below. At r = 0 the derivative is any number in [-q, 1 - q];
    `kink` is the one that is taken. The second derivative is 0 everywhere. q = 1/2 is half
    the absolute error.

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        q: the share of targets below, in the open interval (0, 1); broadcasts to the residual
            and can be differentiated.
        kink: the derivative taken at r = 0, in [-q, 1 - q].

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
    share, law = _share(q), "must be in [-q, 1 - q]"
    slope = constrained("kink", law, lambda k, q: (k >= -q) & (k <= 1 - q), kink, q)
    return elementwise(_quantile, predictions, targets, share, slope)


@with_partials(
    lambda r, q, kink: _quantile_slope(r, q, kink),
    lambda r, q, kink: flat_in(r, q) - r,
    lambda r, q, kink: jnp.zeros_like(r),
)
def _quantile(r: Array, q: Array, kink: Array) -> Array:
    return jnp.where(r > 0, 1 - q, q) * jnp.abs(r)


@with_partials(
    lambda r, q, kink: flat(r),
    lambda r, q, kink: jnp.where(r == 0, 0.0, flat(r) - 1),
    lambda r, q, kink: jnp.where(r == 0, 1.0, flat(r)),
)
def _quantile_slope(r: Array, q: Array, kink: Array) -> Array:
    return jnp.where(r == 0, kink, jnp.where(r > 0, 1 - q, -q) + flat(r))


def expectile(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, q: ArrayLike = 0.5
) -> Array:
    """Expectile loss: `(1 - q) r**2` for r > 0 and `q r**2` for r < 0.

    Asymmetric least squares: what the quantile loss is to the absolute error, this is to
    the squared one. Influence `2 (1 - q) r` above and `2 q r` below, without bound. The
    second derivative jumps at 0; taken there is 1, the mean of both sides. q = 1/2 is
    `r**2 / 2`.

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
    return elementwise(_expectile, predictions, targets, _share(q))


@with_partials(lambda r, q: _expectile_slope(r, q), lambda r, q: flat_in(r, q) - r * jnp.abs(r))
def _expectile(r: Array, q: Array) -> Array:
    return _side(r, q) * r * r


@with_partials(lambda r, q: 2 * _side(r, q), lambda r, q: -2 * jnp.abs(r))
def _expectile_slope(r: Array, q: Array) -> Array:
    return 2 * _side(r, q) * r


def quantile_huber(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    q: ArrayLike = 0.5,
    delta: ArrayLike = 1.0,
) -> Array:
    """Quantile Huber loss: Huber's, times `2 (1 - q)` for r > 0 and `2 q` for r < 0.

    The expectile loss up to `|r| = delta`, then linear like the quantile loss: influence
    `2 (1 - q) min(r, delta)` above and `2 q max(r, -delta)` below. q = 1/2 is Huber's loss,
    and as `delta` goes to 0 the loss over `2 delta` goes to the quantile loss. At
    `|r| = delta` the quadratic side is taken; the second derivative jumps at 0, where 1, the
    mean of both sides, is taken. (Distributional reinforcement learning divides by
    `2 delta`.)

    Args:
        predictions: real numbers of any shape; with `targets=None`, the residual itself.
        targets: of exactly the same shape, or None.
        q: the weight of targets above the prediction, in the open interval (0, 1); broadcasts
            to the residual and can be differentiated.
        delta: where the loss turns linear, > 0, in the residual's units; broadcasts to the
            residual and can be differentiated.

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
    return elementwise(_quantile_huber, predictions, targets, _share(q), positive("delta", delta))


@with_partials(
    lambda r, q, d: 2 * _side(r, q) * _clipped(r, capped(d)),
    lambda r, q, d: flat_in(r, q) - 2 * jnp.sign(r) * _huber(r, d),
    lambda r, q, d: _quantile_overshoot(r, q, d),
)
def _quantile_huber(r: Array, q: Array, delta: Array) -> Array:
    a = jnp.abs(r)
    half = jnp.minimum(0.5 * a, 0.5 * capped(delta))
    return 2 * (2 * _side(r, q) * half * (a - half))


@with_partials(
    lambda r, q, d: 2 * (_side(r, q) * beyond(r, d)),
    lambda r, q, d: -2 * jnp.sign(r) * overshoot(r, d),
    lambda r, q, d: 2 * (_side(r, q) * (within(r, d) - 1)),
)
def _quantile_overshoot(r: Array, q: Array, delta: Array) -> Array:
    return 2 * (_side(r, q) * overshoot(r, capped(delta)))


# Shared by the family.


@with_partials(lambda r, q: flat(r), lambda r, q: -jnp.sign(r))
def _side(r: Array, q: Array) -> Array:
    """1 - q for r > 0, q for r < 0, and 1/2 at 0."""
    return jnp.where(r > 0, 1 - q, jnp.where(r < 0, q, 0.5)) + flat(r + q)


def _share(q: ArrayLike) -> Array:
    return constrained("q", "must be in (0, 1)", lambda q: (q > 0) & (q < 1), q)
