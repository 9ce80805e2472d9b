"""What a tuning constant buys: efficiency where the errors are normal, resistance where not.

A robust loss gives up a little precision on clean, normal data, as an insurance premium, and
is paid back when some of the data are wrong. Its `delta` sets the premium. Three numbers say
what a `delta` buys, each at the standard normal, so `delta` counts in standard deviations of
the errors: on data, multiply it by a robust scale of the residuals.

- `efficiency`: the variance of the mean over that of the estimate. At 95 %, 100 residuals
  teach as much as 95 would teach least squares.
- `gross_error_sensitivity`: how far one wild residual among n can move the estimate, times n.
- `breakdown`: the fraction of wild data that the S-estimate with this loss survives.

`tune` goes back from the number to the `delta`. Usual are 95 % efficiency for an M-estimate
(Huber 1.345, Tukey 4.685) and 50 % breakdown for the S-estimate of the scale before it
(Tukey 1.548); no `delta` gives both, which is why MM-estimates take two steps.

All of it holds for any loss, the library's or yours: a function of the residual that JAX can
differentiate, other parameters fixed by `functools.partial`. Every number is an integral over
the normal, taken in float64 by a quadrature that closes in on kinks and jumps by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.experimental
import numpy as np
from jax import Array

from robustloss._arguments import check_loss, real_array, with_leaves
from robustloss._numerics.quadrature import integrals
from robustloss.views import influence

__all__ = ["breakdown", "efficiency", "gross_error_sensitivity", "tune"]

Loss = Callable[..., Array]
View = Callable[[Loss, Array], Array]
Curves = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`curves(r, i)`: the i-th of some functions of the residual, at r."""


def efficiency(loss: Loss) -> float:
    """The asymptotic efficiency at the normal: `(E psi'(Z))**2 / E psi(Z)**2`.

    The estimate of location that minimises the total loss of n normal errors has a variance
    of `1 / (n efficiency)` times theirs; in a regression it is the same for every
    coefficient. A jump of psi counts in E psi', as `E psi'(Z) = E Z psi(Z)`. A loss that
    weighs the two sides differently estimates a quantile or an expectile, say: then Z stands
    for Z + theta, where `E psi(Z + theta) = 0`. For `quantile` it is
    `phi(theta)**2 / (q (1 - q))`.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`; other parameters
            with `functools.partial(rl.huber, delta=1.345)`.

    Returns:
        A number in [0, 1], to about 13 digits. 0 where psi has no finite variance, or the
        total loss no minimum at theta; NaN where there is no theta within 20 standard
        deviations, the loss gives NaN, or its variance is in the tail beyond 37 of them.

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
    """The most that one residual counts, at the normal: `sup |psi| / E psi'(Z)`.

    One wild value among n moves the estimate of location by at most this over n, in standard
    deviations, whatever its size. The median's, `sqrt(pi / 2)`, is the smallest there is; that
    of the mean is infinite. E psi' is taken as in `efficiency`.

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
        most = _supremum(lambda r: psi(r, np.zeros(r.size, int)))
        return float(most if np.isinf(most) else most / np.maximum(slope[0], 0.0))


def breakdown(loss: Loss) -> float:
    """The breakdown point of the S-estimate: `min(b, 1 - b)`, `b = E rho(Z) / rho(inf)`.

    The S-estimate minimises the M-scale of the residuals, the s that solves
    `mean(rho(r / s)) = E rho(Z)`: right at the normal, carried off to infinity only when more
    than a fraction b of the data is wild, shrunk to 0 only when more than 1 - b fits exactly.
    It takes a rho with a bound, so a convex loss, whose rho has none, gives 0.

    The M-estimate with the same loss is another matter: with a bounded psi and a robust scale
    it survives half of the targets being wild if only a location is sought, but may break at
    the first wild row of inputs, unless the loss redescends and the start is a good one.

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
        b = _shares(loss)[0]
        return float(np.minimum(b, 1 - b))


def tune(loss: Loss, *, efficiency: float | None = None, breakdown: float | None = None) -> float:
    """The `delta` at which the loss has this efficiency, or this breakdown point.

    In standard deviations of the errors. Where several would do, it is the largest at which
    the efficiency is rising (if it only falls, the largest), or the breakdown point falling.

    Args:
        loss: an elementwise function of the residual and `delta`, such as `rl.huber`; other
            parameters with `functools.partial(rl.general, alpha=-1.0)`.
        efficiency: in (0, 1); what `rl.efficiency` gives at the `delta` that is returned.
        breakdown: in (0, 1/2]; what `rl.breakdown` gives there.

    Returns:
        `delta`, to about 12 digits, or as many as the request defines.

    Raises:
        TypeError: the loss is no function, has no free parameter `delta`, or depends on a
            traced value.
        ValueError: not exactly one of `efficiency` and `breakdown`; a number outside its
            interval; a request that no `delta` meets: the message says what is within reach.

    >>> round(tune(rl.huber, efficiency=0.95), 6)
    1.344998
    >>> def biweight(r, delta):  # a loss of your own
    ...     return -(jnp.clip(1 - (r / delta) ** 2, 0) ** 3)
    >>> round(tune(biweight, efficiency=0.95), 6), round(tune(biweight, breakdown=0.5), 6)
    (4.685065, 1.547645)
    """
    requests = {"efficiency": efficiency, "breakdown": breakdown}
    given = {what: x for what, x in requests.items() if x is not None}
    if len(given) != 1:
        raise ValueError(f"tune takes one of efficiency and breakdown, got {given or 'neither'}")
    _check_delta(loss)
    ((what, x),) = given.items()
    real_array(what, x)
    target = float(x)
    if what == "efficiency" and not 0 < target < 1:
        raise ValueError(f"efficiency must be in (0, 1), got {x}")
    if what == "breakdown" and not 0 < target <= 0.5:
        raise ValueError(f"breakdown must be in (0, 1/2], got {x}")
    with _in_float64(loss, delta=1.0):
        if what == "efficiency":
            return _solve(partial(_efficiencies, loss), target, f"{_name(loss)}: {what}")
        if np.isinf(_bounds(_curves(_value, loss, np.ones(1)), 1)[0]):
            raise ValueError(
                f"{_name(loss)} has no bound, so the breakdown point of its S-estimate is 0 for "
                f"every delta, got breakdown={x}; it takes a loss that levels off, as rl.tukey"
            )
        return _solve(partial(_shares, loss), target, f"{_name(loss)}: {what}")


# What holds at the normal, for all deltas at once (None: the loss has its own).


def _efficiencies(loss: Loss, deltas: np.ndarray | None = None) -> np.ndarray:
    square, slope = _moments(_curves(influence, loss, deltas), 1 if deltas is None else deltas.size)
    # At most 1, by Cauchy and Schwarz; more is rounding.
    found = np.minimum(np.maximum(slope, 0) / square * slope, 1)
    return np.where(np.isposinf(square), 0.0, found)


def _shares(loss: Loss, deltas: np.ndarray | None = None) -> np.ndarray:
    """`E rho(Z) / rho(inf)`, 0 where rho has no bound."""
    rho, n = _curves(_value, loss, deltas), 1 if deltas is None else deltas.size
    origin, bounds = rho(np.zeros(n), np.arange(n)), _bounds(rho, n)

    def share(r: np.ndarray, i: np.ndarray) -> np.ndarray:
        bounded = np.isfinite(bounds[i])
        y = np.where(bounded & (np.abs(r) < _END), rho(r, i) - origin[i], 0.0)
        return (y / np.where(bounded, bounds[i] - origin[i], 1.0) * _normal(r))[None]

    (shares,), _ = integrals(share, n, at_least=1.0)
    return shares + np.where(np.isnan(bounds), np.nan, 0.0)


def _moments(psi: Curves, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`E psi(Z + theta)**2` and `E psi'(Z + theta)`, where `E psi(Z + theta) = 0`."""
    theta = np.zeros(n)
    for _ in range(60):
        (mean, square, slope), size = integrals(partial(_integrands, psi, theta), n)
        # What is left of the mean of an odd psi is rounding.
        off = np.abs(mean) > 2e-14 * size[0]
        if not off.any():
            break
        newton = np.where(slope > 0, theta - np.clip(mean / slope, -1, 1), np.nan)
        theta = np.where(off, np.where(np.abs(newton) < 20, newton, np.nan), theta)
    centred = np.where(off, np.nan, 0.0)
    return _with_tail(psi, theta, square) + centred, slope + centred


def _integrands(psi: Curves, theta: np.ndarray, r: np.ndarray, i: np.ndarray) -> np.ndarray:
    z = r - theta[i]
    y = np.where(np.abs(z) < _END, psi(r, i), 0.0)
    return np.stack([y, y * y, z * y]) * _normal(z)


def _with_tail(psi: Curves, theta: np.ndarray, square: np.ndarray) -> np.ndarray:
    """`square`, or infinity where the integrand grows at the end, or NaN where it is not over."""
    z = np.array([-_END, 1 - _END, _END - 1, _END])
    i = np.arange(theta.size).repeat(4)
    tail = psi(theta[i] + np.tile(z, theta.size), i).reshape(-1, 4) ** 2 * _normal(z)
    end, before = np.maximum(tail[:, 0], tail[:, 3]), np.maximum(tail[:, 1], tail[:, 2])
    over = end <= 1e-15 * square
    return np.where(over | np.isnan(square), square, np.where(end >= before, np.inf, np.nan))


def _bounds(rho: Curves, n: int) -> np.ndarray:
    return np.maximum(*(_limit(rho, n, side) for side in (-1.0, 1.0)))


def _limit(curves: Curves, n: int, side: float) -> np.ndarray:
    """At infinity; where a formula has only NaN there, what its last octave shows."""
    i = np.arange(n)
    there, far, near = (curves(np.full(n, side * r), i) for r in (np.inf, _FAR, _FAR / 2))
    grows = np.abs(far) > (1 + 1e-9) * np.abs(near)
    return np.where(np.isnan(there), np.where(grows, np.copysign(np.inf, far), far), there)


def _supremum(psi: Callable[[np.ndarray], np.ndarray]) -> float:
    """`sup |psi|`."""
    r = 2.0 ** np.arange(-40, np.log2(_FAR), 0.125)
    ends = [_limit(lambda r, i: psi(r), 1, side)[0] for side in (-1.0, 1.0)]
    peaks = [_peak(lambda r: np.abs(psi(r)), side * r, rounds=16)[1] for side in (-1.0, 1.0)]
    return float(np.max(np.abs([*ends, *peaks])))


# From a number back to delta.


def _solve(of: Callable[[np.ndarray], np.ndarray], target: float, asked: str) -> float:
    """The delta where `of` crosses the target, by looking ever closer."""
    deltas = 2.0 ** np.arange(-20, 20.5, 0.5)
    values = of(deltas)
    i = _crossing(values, target)
    if i is None and np.isfinite(values).any():
        # A peak may stand between two deltas of the grid.
        sign = 1.0 if np.nanmax(values) < target else -1.0
        delta, value = _peak(lambda x: sign * of(x), deltas, rounds=6)
        at = np.searchsorted(deltas, delta)
        deltas, values = np.insert(deltas, at, delta), np.insert(values, at, sign * value)
        i = _crossing(values, target)
    if i is None:
        within = [f"{round(float(x), 9):.4g}" for x in np.sort(values[np.isfinite(values)])]
        reach = f"from {within[0]} to {within[-1]}" if within else "at no delta"
        raise ValueError(f"{asked} is within reach {reach}, got {target}")
    for _ in range(6):
        deltas = np.geomspace(deltas[i], deltas[i + 1], 17)
        values = of(deltas)
        i = _crossing(values, target)
        if i is None:  # the target is an end of the interval, to rounding
            return float(deltas[np.nanargmin(np.abs(values - target))])
    share = (target - values[i]) / (values[i + 1] - values[i])
    return float(deltas[i] + share * (deltas[i + 1] - deltas[i]))


def _crossing(values: np.ndarray, target: float) -> int | None:
    """After which value the target is crossed: the last time upwards, else the last time."""
    under, over = values < target, values >= target
    for crosses in (under[:-1] & over[1:], over[:-1] & under[1:]):
        if crosses.any():
            return int(np.flatnonzero(crosses)[-1])
    return None


def _peak(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, rounds: int) -> tuple[float, float]:
    """Where f is largest, and how large, by looking ever closer; a NaN is not large."""
    for _ in range(rounds):
        i = int(np.argmax(np.nan_to_num(f(x), nan=-np.inf)))
        x = np.linspace(x[max(i - 1, 0)], x[min(i + 1, x.size - 1)], 17)
    values = f(x)
    i = int(np.argmax(np.nan_to_num(values, nan=-np.inf)))
    return float(x[i]), float(values[i])


# Residuals at the normal.


_END = 37.5  # |z| where the normal density is near the smallest number
_FAR = 2.0**100  # a residual as good as infinite that can still be squared a few times
_CHUNK = 8192  # points per call: one shape is compiled, whatever is asked


def _normal(z: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)


# A loss as curves in float64.


def _value(loss: Loss, r: Array) -> Array:
    return loss(r)


def _curves(view: View, loss: Loss, deltas: np.ndarray | None = None) -> Curves:
    """The view of the loss at r, with the i-th of the deltas if there are any."""
    traced = with_leaves(loss)

    def curves(r: np.ndarray, i: np.ndarray) -> np.ndarray:
        out = np.empty(r.size)
        for start in range(0, r.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            x = {} if deltas is None else {"delta": deltas[i[part]]}
            x = {"r": r[part], **x}
            padded = {k: np.pad(v, (0, _CHUNK - v.size), mode="edge") for k, v in x.items()}
            out[part] = np.asarray(_compiled(view, traced, **padded))[: r[part].size]
        return out

    return curves


@partial(jax.jit, static_argnums=0)
def _compiled(view: View, loss: Loss, r: Array, **parameters: Array) -> Array:
    return jax.vmap(lambda r, x: view(partial(loss, **x), r))(r, parameters)


@contextmanager
def _in_float64(loss: Loss, **parameters: float) -> Iterator[None]:
    """Float64, also where it is off, and numbers, also under an outer `jit`."""
    check_loss(loss)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(_fixed(loss))):
        raise TypeError(f"tuning needs numbers, got the traced {_name(loss)}")
    with jax.ensure_compile_time_eval(), enable_x64(), np.errstate(all="ignore"):
        shape = jax.eval_shape(partial(loss, **parameters), np.zeros(2)).shape
        if shape != (2,):
            raise ValueError(f"a loss must keep the residual's shape (2,), got shape {shape}")
        yield


def enable_x64() -> Any:
    home: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # where jax 0.7 has it
    return home.enable_x64(True)


def _fixed(loss: Loss) -> dict[str, Any]:
    """What a partial, or a partial of a partial, fixes by keyword."""
    return dict(loss.keywords) if isinstance(loss, partial) else {}


def _name(loss: Loss) -> str:
    function = loss.func if isinstance(loss, partial) else loss
    name = getattr(function, "__name__", type(function).__name__)
    fixed = ", ".join(f"{k}={v}" for k, v in _fixed(loss).items())
    return f"{name}({fixed})" if fixed else name


def _check_delta(loss: Loss) -> None:
    check_loss(loss)
    if "delta" in _fixed(loss):
        raise TypeError(f"tune finds delta, but it is fixed already in {_name(loss)}")
    try:
        delta = inspect.signature(loss).parameters.get("delta")
    except ValueError:  # some built-in functions show no signature
        delta = None
    if delta is None or delta.kind not in (delta.KEYWORD_ONLY, delta.POSITIONAL_OR_KEYWORD):
        raise TypeError(f"tune needs a loss with a parameter delta, got {_name(loss)}")
