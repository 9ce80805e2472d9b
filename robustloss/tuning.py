"""Tuning constants: the efficiency and the resistance that a `delta` gives.

A robust loss is a little less precise than least squares on clean, normal data, and far more
precise when some of the data are wrong. Its `delta` sets the balance. Three numbers describe the
effect of a `delta`, each at the standard normal. So `delta` counts in standard deviations of the
errors: on data, multiply it by a robust scale of the residuals.

- `efficiency`: the variance of the mean over the variance of the estimate. At 95 %, an estimate
  from 100 residuals is as precise as least squares from 95.
- `gross_error_sensitivity`: how far one wild residual among n can move the estimate, times n.
- `breakdown`: the fraction of wild data that the S-estimate with this loss survives.

`tune` is the inverse: it finds the `delta` for one of these numbers. Usual requests are 95 %
efficiency for an M-estimate (Huber 1.345, Tukey 4.685) and a breakdown point of 50 % for the
S-estimate of the scale before it (Tukey 1.548). No `delta` gives both, and so an MM-estimate has
two steps.

The functions take any loss, the library's or the user's own: a function of the residual that JAX
can differentiate, with its other parameters fixed by `functools.partial`. Every number is an
integral over the normal distribution, computed in float64 by a quadrature that refines its
intervals at kinks and jumps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import jax
import numpy as np
from jax import Array

from robustloss._arguments import real_array, with_leaves
from robustloss._description import describe, enable_x64
from robustloss._numerics.quadrature import integrals
from robustloss.types import Loss
from robustloss.views import influence

__all__ = ["breakdown", "efficiency", "gross_error_sensitivity", "tune"]

View = Callable[[Loss, Array], Array]
Curves = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`curves(r, i)`: the i-th of n functions of the residual, at r; r and i have the same shape."""

# |z| from which the normal density, below 1e-305, counts as 0 here.
_NORMAL_END = 37.5
# A residual that stands for infinity and can still be squared a few times.
_FAR = 2.0**100
# Points in one call of a compiled loss. The shape is always the same, so that it compiles once.
_CHUNK = 8192
# Newton's steps for theta, each of at most one standard deviation, and the largest theta.
_MAX_THETA_STEPS = 60
_THETA_LIMIT = 20


def efficiency(loss: Loss) -> float:
    """The asymptotic efficiency at the normal: `(E psi'(Z))**2 / E psi(Z)**2`.

    The estimate of location that minimises the total loss of n normal errors has a variance of
    `1 / (n efficiency)` times the variance of an error. In a regression the factor is the same for
    every coefficient. E psi' includes the jumps of psi, because it is computed by
    `E psi'(Z) = E Z psi(Z)`. A loss that weighs the two sides differently estimates, for example,
    a quantile or an expectile: then Z stands for Z + theta, where `E psi(Z + theta) = 0`. The
    efficiency of `quantile` is `phi(theta)**2 / (q (1 - q))`.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`; other parameters
            with `functools.partial(rl.huber, delta=1.345)`.

    Returns:
        A number in [0, 1], to about 13 digits. It is 0 where psi has no finite variance, or the
        total loss has no minimum at theta. It is NaN where there is no theta within 20 standard
        deviations, where the loss gives NaN, or where the variance of psi comes from the tail
        beyond 37 standard deviations.

    Raises:
        TypeError: the loss is no function, or depends on a traced value.
        ValueError: the loss does not keep the shape of the residual.

    Source: Huber (1964), Annals of Mathematical Statistics 35, 73-101.

    >>> round(efficiency(rl.absolute_error), 6)  # 2 / pi
    0.63662
    >>> from functools import partial
    >>> round(efficiency(partial(rl.huber, delta=1.0)), 6)
    0.903124
    """
    with _in_float64(loss):
        return float(_efficiencies(loss)[0])


def gross_error_sensitivity(loss: Loss) -> float:
    """The largest influence of one residual, at the normal: `sup |psi| / E psi'(Z)`.

    One wild value among n, whatever its size, moves the estimate of location by at most this
    number over n, in standard deviations. The sensitivity of the median, `sqrt(pi / 2)`, is the
    smallest possible; that of the mean is infinite. E psi' is computed as in `efficiency`.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`.

    Returns:
        A number > 0, to about 13 digits; infinity where psi has no bound, or E psi' is not
        positive. NaN as in `efficiency`.

    Raises:
        TypeError: the loss is no function, or depends on a traced value.
        ValueError: the loss does not keep the shape of the residual.

    Source: Hampel (1974), Journal of the American Statistical Association 69, 383-393.

    >>> from functools import partial
    >>> round(gross_error_sensitivity(partial(rl.huber, delta=1.345)), 6)
    1.637499
    """
    with _in_float64(loss):
        psi = _curves(influence, loss)
        _, slope = _moments(psi, 1)
        largest = _supremum(lambda r: psi(r, np.zeros(r.size, int)))
        return float(largest if np.isinf(largest) else largest / np.maximum(slope[0], 0.0))


def breakdown(loss: Loss) -> float:
    """The breakdown point of the S-estimate: `min(b, 1 - b)`, `b = E rho(Z) / rho(inf)`.

    The S-estimate minimises the M-scale of the residuals, the s that solves
    `mean(rho(r / s)) = E rho(Z)`. This scale is consistent at the normal. It goes to infinity only
    if more than a fraction b of the data is wild, and to 0 only if more than 1 - b is fitted
    exactly. The result is 0 for a loss without a bound, such as a convex one.

    The breakdown point of the M-estimate with the same loss differs. With a bounded psi and a
    robust scale, an M-estimate of location survives wild values in half of the targets. In a
    regression it may break down with the first wild row of inputs, unless the loss redescends and
    the start is a good one.

    Args:
        loss: an elementwise function of the residual, such as
            `functools.partial(rl.tukey, delta=1.548)`.

    Returns:
        A number in [0, 1/2], to about 13 digits; NaN where the loss gives NaN.

    Raises:
        TypeError: the loss is no function, or depends on a traced value.
        ValueError: the loss does not keep the shape of the residual.

    Source: Rousseeuw and Yohai (1984), Lecture Notes in Statistics 26, 256-272.

    >>> from functools import partial
    >>> round(breakdown(partial(rl.tukey, delta=1.547645)), 6)
    0.5
    >>> breakdown(rl.huber)
    0.0
    """
    with _in_float64(loss):
        b = _rho_ratios(loss)[0]
        return float(np.minimum(b, 1 - b))


def tune(loss: Loss, *, efficiency: float | None = None, breakdown: float | None = None) -> float:
    """The `delta` at which the loss has this efficiency, or this breakdown point.

    The `delta` is in standard deviations of the errors. If several meet the request, the result is
    the largest at which the efficiency rises, or the breakdown point falls. If there is none such,
    it is the largest of all.

    Args:
        loss: an elementwise function of the residual and `delta`, such as `rl.huber`; other
            parameters with `functools.partial(rl.general, alpha=-1.0)`.
        efficiency: the value of `rl.efficiency` at the `delta` returned, in (0, 1).
        breakdown: the value of `rl.breakdown` at the `delta` returned, in (0, 1/2].

    Returns:
        `delta`, to about 12 digits, or to as many as the request determines.

    Raises:
        TypeError: the loss is no function, has no free parameter `delta`, or depends on a
            traced value.
        ValueError: not exactly one of `efficiency` and `breakdown`; a number outside its
            interval; a request that no `delta` meets: the message names the range within reach.

    >>> round(tune(rl.huber, efficiency=0.95), 6)
    1.344998
    >>> def biweight(r, delta):  # a loss of your own
    ...     return -(jnp.clip(1 - (r / delta) ** 2, 0) ** 3)
    >>> round(tune(biweight, efficiency=0.95), 6), round(tune(biweight, breakdown=0.5), 6)
    (4.685065, 1.547645)
    """
    requests = {"efficiency": efficiency, "breakdown": breakdown}
    given = {name: x for name, x in requests.items() if x is not None}
    if len(given) != 1:
        raise ValueError(f"tune takes one of efficiency and breakdown, got {given or 'neither'}")
    label = _with_free_delta(loss)
    ((quantity, x),) = given.items()
    real_array(quantity, x)
    target = float(x)
    if quantity == "efficiency" and not 0 < target < 1:
        raise ValueError(f"efficiency must be in (0, 1), got {x}")
    if quantity == "breakdown" and not 0 < target <= 0.5:
        raise ValueError(f"breakdown must be in (0, 1/2], got {x}")
    with _in_float64(loss, delta=1.0):
        if quantity == "efficiency":
            return _solve(partial(_efficiencies, loss), target, f"{label}: {quantity}")
        if np.isinf(_bounds(_curves(_value, loss, np.ones(1)), 1)[0]):
            raise ValueError(
                f"{label} has no bound, so the breakdown point of its S-estimate is 0 for "
                f"every delta, got breakdown={x}; use a bounded loss, such as rl.tukey"
            )
        return _solve(partial(_rho_ratios, loss), target, f"{label}: {quantity}")


# Expectations at the normal, for all deltas at once, (deltas,). If deltas is None, the loss has a
# delta of its own or none, and the shape is (1,).


def _efficiencies(loss: Loss, deltas: np.ndarray | None = None) -> np.ndarray:
    square, slope = _moments(_curves(influence, loss, deltas), 1 if deltas is None else deltas.size)
    # At most 1, by the inequality of Cauchy and Schwarz; the excess is rounding.
    ratio = np.minimum(np.maximum(slope, 0) / square * slope, 1)
    return np.where(np.isposinf(square), 0.0, ratio)


def _rho_ratios(loss: Loss, deltas: np.ndarray | None = None) -> np.ndarray:
    """`E rho(Z) / rho(inf)`, 0 where rho has no bound."""
    rho, n = _curves(_value, loss, deltas), 1 if deltas is None else deltas.size
    origin, bounds = rho(np.zeros(n), np.arange(n)), _bounds(rho, n)

    def integrand(r: np.ndarray, i: np.ndarray) -> np.ndarray:
        bounded = np.isfinite(bounds[i])
        y = np.where(bounded & (np.abs(r) < _NORMAL_END), rho(r, i) - origin[i], 0.0)
        return (y / np.where(bounded, bounds[i] - origin[i], 1.0) * _normal_density(r))[None]

    (ratios,), _ = integrals(integrand, n, at_least=1.0)
    return ratios + np.where(np.isnan(bounds), np.nan, 0.0)


def _moments(psi: Curves, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`E psi(Z + theta)**2` and `E psi'(Z + theta)`, where `E psi(Z + theta) = 0`."""
    theta = np.zeros(n)
    for _ in range(_MAX_THETA_STEPS):
        (mean, square, slope), size = integrals(partial(_moment_integrands, psi, theta), n)
        # The mean of an odd psi is not exactly 0, but at most this rounding error.
        uncentred = np.abs(mean) > 2e-14 * size[0]
        if not uncentred.any():
            break
        newton = np.where(slope > 0, theta - np.clip(mean / slope, -1, 1), np.nan)
        newton = np.where(np.abs(newton) < _THETA_LIMIT, newton, np.nan)
        theta = np.where(uncentred, newton, theta)
    nan = np.where(uncentred, np.nan, 0.0)
    return _with_tail(psi, theta, square) + nan, slope + nan


def _moment_integrands(psi: Curves, theta: np.ndarray, r: np.ndarray, i: np.ndarray) -> np.ndarray:
    """The integrands of E psi, E psi**2 and E psi' = E Z psi, (3, *r.shape)."""
    z = r - theta[i]
    y = np.where(np.abs(z) < _NORMAL_END, psi(r, i), 0.0)
    return np.stack([y, y * y, z * y]) * _normal_density(z)


def _with_tail(psi: Curves, theta: np.ndarray, square: np.ndarray) -> np.ndarray:
    """`square`, corrected by the integrand's tail at the end of the normal density.

    If the tail is not negligible there, the result is infinity where it grows, else NaN.
    """
    z = np.array([-_NORMAL_END, 1 - _NORMAL_END, _NORMAL_END - 1, _NORMAL_END])
    i = np.arange(theta.size).repeat(4)
    tail = psi(theta[i] + np.tile(z, theta.size), i).reshape(-1, 4) ** 2 * _normal_density(z)
    end, before = np.maximum(tail[:, 0], tail[:, 3]), np.maximum(tail[:, 1], tail[:, 2])
    negligible = end <= 1e-15 * square
    return np.where(negligible | np.isnan(square), square, np.where(end >= before, np.inf, np.nan))


def _bounds(rho: Curves, n: int) -> np.ndarray:
    """The larger of the limits of rho at -infinity and infinity, (n,)."""
    return np.maximum(*(_limit(rho, n, side) for side in (-1.0, 1.0)))


def _limit(curves: Curves, n: int, side: float) -> np.ndarray:
    """The limits at side times infinity, (n,).

    Where a formula gives NaN at infinity, its values at `_FAR` and half of it decide: infinity if
    it grows between them, else the value at `_FAR`.
    """
    i = np.arange(n)
    limit, far, half = (curves(np.full(n, side * r), i) for r in (np.inf, _FAR, _FAR / 2))
    grows = np.abs(far) > (1 + 1e-9) * np.abs(half)
    return np.where(np.isnan(limit), np.where(grows, np.copysign(np.inf, far), far), limit)


def _supremum(psi: Callable[[np.ndarray], np.ndarray]) -> float:
    """`sup |psi|`."""
    r = 2.0 ** np.arange(-40, np.log2(_FAR), 0.125)
    ends = [_limit(lambda r, i: psi(r), 1, side)[0] for side in (-1.0, 1.0)]
    maxima = [_maximum(lambda r: np.abs(psi(r)), side * r, rounds=16)[1] for side in (-1.0, 1.0)]
    return float(np.max(np.abs([*ends, *maxima])))


# The inverse: the delta for a number.


def _solve(f: Callable[[np.ndarray], np.ndarray], target: float, quantity: str) -> float:
    """The delta where f crosses the target, by grids that get finer around the crossing."""
    deltas = 2.0 ** np.arange(-20, 20.5, 0.5)
    values = f(deltas)
    i = _crossing(values, target)
    if i is None and np.isfinite(values).any():
        # An extremum beyond the target may lie between two deltas of the grid.
        sign = 1.0 if np.nanmax(values) < target else -1.0
        delta, value = _maximum(lambda x: sign * f(x), deltas, rounds=6)
        index = np.searchsorted(deltas, delta)
        deltas, values = np.insert(deltas, index, delta), np.insert(values, index, sign * value)
        i = _crossing(values, target)
    if i is None:
        within = [f"{round(float(x), 9):.4g}" for x in np.sort(values[np.isfinite(values)])]
        reach = f"from {within[0]} to {within[-1]}" if within else "at no delta"
        raise ValueError(f"{quantity} is within reach {reach}, got {target}")
    for _ in range(6):
        deltas = np.geomspace(deltas[i], deltas[i + 1], 17)
        values = f(deltas)
        i = _crossing(values, target)
        if i is None:  # the target is an end of the interval, to rounding
            return float(deltas[np.nanargmin(np.abs(values - target))])
    fraction = (target - values[i]) / (values[i + 1] - values[i])
    return float(deltas[i] + fraction * (deltas[i + 1] - deltas[i]))


def _crossing(values: np.ndarray, target: float) -> int | None:
    """The index of the value before the last upward crossing, else before the last downward one."""
    under, over = values < target, values >= target
    for crosses in (under[:-1] & over[1:], over[:-1] & under[1:]):
        if crosses.any():
            return int(np.flatnonzero(crosses)[-1])
    return None


def _maximum(
    f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, rounds: int
) -> tuple[float, float]:
    """The argument and the value of f's maximum, by grids ever finer; NaN is the least value."""
    for _ in range(rounds):
        i = int(np.argmax(np.nan_to_num(f(x), nan=-np.inf)))
        x = np.linspace(x[max(i - 1, 0)], x[min(i + 1, x.size - 1)], 17)
    values = f(x)
    i = int(np.argmax(np.nan_to_num(values, nan=-np.inf)))
    return float(x[i]), float(values[i])


def _normal_density(z: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)


# A loss as functions of NumPy arrays in float64.


def _value(loss: Loss, r: Array) -> Array:
    return loss(r)


def _curves(view: View, loss: Loss, deltas: np.ndarray | None = None) -> Curves:
    """The view (rho or psi) of the loss, with the i-th of the deltas if there are any."""
    traced = with_leaves(loss)

    def curves(r: np.ndarray, i: np.ndarray) -> np.ndarray:
        out = np.empty(r.size)
        for start in range(0, r.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            arguments = {"r": r[part]}
            if deltas is not None:
                arguments["delta"] = deltas[i[part]]
            padded = {
                name: np.pad(x, (0, _CHUNK - x.size), mode="edge") for name, x in arguments.items()
            }
            out[part] = np.asarray(_compiled(view, traced, **padded))[: r[part].size]
        return out

    return curves


@partial(jax.jit, static_argnums=0)
def _compiled(view: View, loss: Loss, r: Array, **parameters: Array) -> Array:
    return jax.vmap(lambda r, x: view(partial(loss, **x), r))(r, parameters)


@contextmanager
def _in_float64(loss: Loss, **parameters: float) -> Iterator[None]:
    """A context in which float64 is on and numbers are computed at once, even under `jit`."""
    described = describe(loss)
    if described.is_traced:
        raise TypeError(f"tuning needs numbers, got the traced {described.label}")
    with jax.ensure_compile_time_eval(), enable_x64(), np.errstate(all="ignore"):
        shape = jax.eval_shape(partial(loss, **parameters), np.zeros(2)).shape
        if shape != (2,):
            raise ValueError(f"a loss must keep the residual's shape (2,), got shape {shape}")
        yield


def _with_free_delta(loss: Loss) -> str:
    """The label of a loss whose delta can be tuned."""
    described = describe(loss)
    if "delta" in described.fixed:
        raise TypeError(f"tune finds delta, but it is fixed already in {described.label}")
    if not described.has_delta:
        raise TypeError(f"tune needs a loss with a parameter delta, got {described.label}")
    return described.label
