"""Robust scales: the spread of most of a sample, whatever the rest does.

Every one is consistent at the normal (of a large normal sample it is the standard deviation),
moves with the data (`scale(a x + b) = |a| scale(x)`) and is exactly 0 where the data have no
spread, which is for the caller to handle.

Of weights only the ratios count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss._arguments import check_loss, constrained, positive, readable
from robustloss._numerics import normal
from robustloss._numerics.order_statistics import (
    as_integers,
    bare_median,
    in_order,
    median,
    quartiles,
    ranked,
    rounding,
    weight_of,
)
from robustloss._numerics.reduction import Axis, over_axis
from robustloss.losses.convex import absolute_error
from robustloss.losses.redescending import tukey

__all__ = [
    "LocationScale",
    "iqr",
    "location_scale",
    "m_scale",
    "mad",
    "proposal2",
    "qn",
    "sn",
    "tau",
]

Loss = Callable[..., Array]

# What makes each consistent at the normal; Phi is its distribution function.
_QN = 2.2191444659850758  # 1 / (sqrt 2 Phi^-1(5/8))
_SN = 1.1925985531232085  # c of Phi(q + 1/c) - Phi(q - 1/c) = 1/2, q = Phi^-1(3/4)
_TAU = 0.9247153921761308  # E min(|Z|, 3 q)**2
_BIWEIGHT = partial(tukey, delta=1.547644980928226)  # E rho(Z) = rho(inf) / 2


def mad(
    x: ArrayLike,
    *,
    center: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> Array:
    """The median absolute deviation, `1.4826 median(|x - median(x)|)`.

    The most robust of scales: just under half of the data can be anything. It has 37 % of the
    efficiency of the standard deviation at the normal. Regression takes it of residuals about
    0: `center=0.0`.

    A weighted median is the middle between the lowest and the highest m that have at most half
    of the weight on either side, so a weight of 3 is the same as three equal entries.

    What `where` drops may hold anything, NaN and infinity included. A weight of 0 is not a
    mask: a NaN under it still shows. Infinite entries are outliers like others; where they are
    too many, the scale is infinite. The gradient is that of the entries selected, and 0 where
    the scale is 0.

    Args:
        x: real numbers of any shape.
        center: what deviations are taken from; broadcasts to x. None takes the median.
        where: booleans that broadcast to x; True keeps an entry.
        weights: numbers >= 0 that broadcast to x; only their ratios count.
        axis: the axis or axes to reduce; None reduces all.

    Returns:
        A scalar, or an array of the axes that are left, in the dtype of x. One entry has the
        scale 0; nothing kept, or nothing but weights of 0, has none: NaN.

    Raises:
        ValueError: shapes that do not fit, negative or NaN weights (traced: the result is NaN).
        TypeError: complex or non-numeric input, a `where` that is not boolean.

    Source: Hampel (1974), Journal of the American Statistical Association 69, 383-393.

    >>> mad(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0]))
    Array(1.4826022, dtype=float32)
    """
    return over_axis(partial(_mad, center is None), x, center, where, weights, axis)


@partial(jax.jit, static_argnums=0)
def _mad(centers: bool, x: Array, w: Array | None) -> Array:
    return normal.MAD * _deviation(_centered(x, w) if centers else x, w)


def mad_near(
    r: Array,
    *,
    guess: tuple[Array, Array],
    where: Array | None = None,
    weights: Array | None = None,
) -> Array:
    """The MAD about 0 of one row; sooner the nearer it is to s, for the guess `s, far`."""
    s, far = guess
    far = jnp.maximum(far, jnp.finfo(r.dtype).eps ** 0.5 * s)  # or rounding might exclude it
    w = weights
    if where is not None:
        w = where.astype(jnp.int32) if w is None else jnp.where(where, w, 0)
    nan = jnp.any(jnp.isnan(r))
    found = bare_median(
        jnp.where(nan, 0, jnp.abs(r)), w, jnp.stack([s - far, s + far]) / normal.MAD
    )
    return jnp.where(nan, jnp.nan, normal.MAD * found)


def iqr(
    x: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> Array:
    """The interquartile range, `0.7413 (upper quartile - lower quartile)`.

    A quarter of the data can be anything. The quartiles are those of `numpy.quantile` and R
    (type 7): at rank (n - 1) p, counted from 0 and interpolated. Interpolation needs to know
    what one observation weighs; with weights it is `u = sum(w**2) / sum(w)`, and a quartile is
    the mean of the data from weight `h = (sum(w) - u) p` to weight `h + u` in sorted order.
    Equal weights are then the same as none, and weights of 0 and 1 as `where`.

    Arguments, masks, weights and errors are those of `mad`.

    Source: Hyndman and Fan (1996), The American Statistician 50, 361-365.

    >>> iqr(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0]))
    Array(1.4826022, dtype=float32)
    """
    return over_axis(_iqr, x, None, where, weights, axis)


@jax.jit
def _iqr(x: Array, w: Array | None) -> Array:
    low, high = quartiles(x, w)
    return normal.IQR * _flat_at_0(_gap(high, low))


class LocationScale(NamedTuple):
    """What `location_scale` estimates."""

    location: Array
    scale: Array


def proposal2(
    x: ArrayLike,
    *,
    k: ArrayLike = 1.5,
    center: ArrayLike | None = None,
    ddof: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> Array:
    """Huber's proposal 2: the scale s at which the clipped `(x - m) / s` has a normal's variance.

    Solves `sum(clip((x - m) / s, -k, k)**2) = (n - 1) beta`, beta = E clip(Z, -k, k)**2, with
    the location m of `sum(clip((x - m) / s, -k, k)) = 0`, which `location_scale` gives too;
    with a `center` given that is m, and n stands for n - 1, unless `ddof` says what is taken from
    n: for the residuals of a regression, the number of coefficients. Efficient at the normal,
    but at k = 1.5 no more than a quarter of the data may be far off.

    Solved to the last digits, and unique, as the minimum of a convex function. It is 0 where
    that lies at s = 0: where, at k = 1.5, about two thirds of the data are one number. (MASS
    gives 0 wherever the MAD is 0.) With weights, n - 1 is `sum(w) - u`, u as in `iqr`.

    Other arguments, masks, weights and errors are those of `mad`.

    Args:
        x: real numbers of any shape.
        k: where deviations are clipped, one number > 0, in units of s; can be differentiated.
        center: the location, if known; broadcasts to x.
        ddof: degrees of freedom that were used up, one number >= 0.
        where: booleans that broadcast to x; True keeps an entry.
        weights: numbers >= 0 that broadcast to x; only their ratios count.
        axis: the axis or axes to reduce; None reduces all.

    Source: Huber (1964), Annals of Mathematical Statistics 35, 73-101; `MASS::hubers` in R.

    >>> proposal2(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0]))
    Array(4.073255, dtype=float32)
    """
    return _huber(x, k, center, ddof, where, weights, axis).scale


def location_scale(
    x: ArrayLike,
    *,
    k: ArrayLike = 1.5,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> LocationScale:
    """Location and scale together, by Huber's proposal 2; see `proposal2`.

    Arguments, masks, weights and errors are those of `proposal2`.

    >>> location_scale(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0])).location
    Array(4.0274706, dtype=float32)
    """
    return _huber(x, k, None, None, where, weights, axis)


def _huber(
    x: ArrayLike,
    k: ArrayLike,
    center: ArrayLike | None,
    ddof: ArrayLike | None,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    axis: Axis,
) -> LocationScale:
    clip = positive("k", k)
    lost = constrained(
        "ddof", "must be >= 0", lambda x: x >= 0, float(center is None) if ddof is None else ddof
    )
    for name, number in (("k", clip), ("ddof", lost)):
        if number.shape != ():
            raise ValueError(f"{name} must be one number, got shape {number.shape}")
    kernel = partial(_proposal2, center is None)
    return LocationScale(*over_axis(kernel, x, center, where, weights, axis, clip, lost))


@partial(jax.jit, static_argnums=0)
def _proposal2(
    centers: bool, x: Array, w: Array | None, k: Array, lost: Array
) -> tuple[Array, Array]:
    """Location and scale, the location being 0 if it is not to be found."""
    start = median(x, w) if centers else jnp.zeros_like(x, shape=())
    r, each = _gap(x, start), _each(x, w)
    size = jnp.sum(each)
    inner = lax.erf(k * math.sqrt(0.5))
    beta = inner - k * jnp.exp(-0.5 * k * k) * math.sqrt(2 / math.pi) + k * k * (1 - inner)
    target = beta * (size - lost * (jnp.sum(each * each) / size))

    def clipped(out: Array) -> Array:
        """What sum(psi**2) comes to where these are clipped and no other point has a spread."""
        others = weight_of(each, ~out)
        tilt = jnp.sum(jnp.where(out, jnp.sign(r) * each, 0)) if centers else 0
        return k * k * (size - others + tilt**2 / jnp.where(others > 0, others, 1))

    slack = rounding(r) * size
    none = clipped(r != 0) <= target + slack
    endless = clipped(jnp.isinf(r)) >= target - slack
    r = _finite(r)
    given = lax.stop_gradient((r, each, k, target))
    root = _proposal2_root(centers, *given, none | endless)
    m, s = _newton(centers, r, each, k, target, *root)  # now as a function of the data
    m = jnp.where(none, 0, jnp.where(endless, jnp.nan, m))
    return start + m, jnp.where(none, 0, jnp.where(endless, jnp.inf, s))


def _proposal2_root(
    centers: bool, r: Array, each: Array, k: Array, target: Array, done: Array
) -> tuple[Array, Array]:
    size = jnp.sum(each)

    def equations(m: Array, s: Array) -> tuple[Array, Array, Array]:
        z = (r - m) / s
        psi = jnp.clip(z, -k, k)
        pull = jnp.sum(each * psi) if centers else jnp.zeros_like(s)
        sides = jnp.stack([weight_of(each, z < -k), weight_of(each, z > k)])
        return pull, jnp.sum(each * psi * psi), sides

    def step(state: Any) -> Any:
        m, s, best, steps, _ = state
        pull, square, sides = equations(m, s)
        # Huber's own iteration, which is MASS's too, always converges, but may be slow.
        mean = pull / size
        slow = m + s * mean, s * jnp.sqrt(jnp.maximum(square - pull * mean, 0) / target)
        # Newton's is at the solution once the points that are clipped there are known.
        fast = _newton(centers, r, each, k, target, m, s)
        pull, square, sides_there = equations(*fast)
        error = jnp.hypot(pull / k, (square - target) / (k * k))
        solved = jnp.all(sides == sides_there)
        # Fewer are clipped at a larger scale, so from there Newton's approaches step by step.
        better = solved | (error <= best / 2) | ((square <= target) & (fast[1] < s))
        new = [jnp.where(better, f, g) for f, g in zip(fast, slow, strict=True)]
        still = jnp.abs(new[0] - m) + jnp.abs(new[1] - s) < rounding(r) * s
        return *new, jnp.where(better, error, best), steps + 1, solved | still

    finite = (jnp.abs(r) < float(jnp.finfo(r.dtype).max)) & (each > 0)
    s = jnp.max(jnp.where(finite, jnp.abs(r), 0)) / k  # where none is clipped
    start = jnp.zeros_like(s), s, jnp.full_like(s, jnp.inf), jnp.int32(0), done
    m, s, *_ = lax.while_loop(lambda state: ~state[-1] & (state[-2] < 500), step, start)
    return m, s


def _newton(
    centers: bool, r: Array, each: Array, k: Array, target: Array, m: Array, s: Array
) -> tuple[Array, Array]:
    """The solution if those clipped at (m, s) are clipped at the solution, else maybe NaN."""
    low, high = (r - m) / s < -k, (r - m) / s > k
    n_low, n_high, n = weight_of(each, low), weight_of(each, high), weight_of(each, ~(low | high))
    some = jnp.where(n > 0, n, 1)
    # In units of the largest one left, so that no square under- or overflows.
    inside = jnp.where(low | high | (each == 0), 0, r)
    unit = lax.stop_gradient(jnp.max(jnp.abs(inside)))
    unit = jnp.where(unit > 0, unit, 1)
    z = inside / unit
    mean = jnp.sum(each * z) / some if centers else jnp.zeros_like(s)
    tilt = k * (n_high - n_low) / some if centers else jnp.zeros_like(s)
    square = jnp.sum(jnp.where(low | high, 0, each * (z - mean) ** 2))
    room = target - k * k * (n_low + n_high) - n * tilt * tilt
    found = (room > 0) & (square > 0)
    ratio = jnp.where(found, square, 1) / jnp.where(found, room, 1)
    s = jnp.where(found, unit * jnp.sqrt(ratio), jnp.nan)
    return unit * mean + tilt * s, s


def qn(x: ArrayLike, *, where: ArrayLike | None = None, axis: Axis = None) -> Array:
    """Rousseeuw and Croux's Qn, `2.2191 {|x_i - x_j|: i < j}_(k)`: an order statistic of gaps.

    k = h (h - 1) / 2 with h = n // 2 + 1, so about a quarter of the n (n - 1) / 2 distances
    between two entries are smaller. Needs no center, resists just under half of the data and
    has 82 % of the efficiency of the standard deviation at the normal.

    The distance is found exactly, without forming them all: O(n log n) time and O(n) memory.
    The constant is 1 / (sqrt(2) Phi^-1(5/8)); the 2.2219 of the article is a misprint. There
    is no correction for small samples, which robustbase's `Qn` makes unless told otherwise.
    Nor are there weights: no definition of an order statistic of weighted pairs is agreed on.

    Arguments, masks and errors are those of `mad`. Distances are taken in the dtype of x.

    Source: Rousseeuw and Croux (1993), Journal of the American Statistical Association 88,
    1273-1283.

    >>> qn(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0]))
    Array(2.2191446, dtype=float32)
    """
    return over_axis(_qn, x, None, where, None, axis)


@jax.jit
def _qn(x: Array, w: Array | None) -> Array:
    x, n = in_order(x, w)
    i = jnp.arange(x.size, dtype=jnp.int32)
    h = n // 2 + 1
    fixed = lax.stop_gradient(x)

    def bisect(state: Any) -> Any:
        # Of row i, the j in (i, first) have a distance below the answer, those from `last` on
        # one above it.
        low, high, first, last = state
        middle = low + (high - low) // 2
        distance = lax.bitcast_convert_type(middle, x.dtype)

        def halve(between: tuple[Array, Array]) -> tuple[Array, Array]:
            first, last = between
            j = first + (last - first) // 2
            near = (fixed[j] - fixed <= distance) & (first < last)
            return jnp.where(near, j + 1, first), jnp.where(near, last, j)

        end, _ = lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, (first, last))
        enough = _pairs_reach(end - i - 1, h)
        return (
            jnp.where(enough, low, middle + 1),
            jnp.where(enough, middle, high),
            jnp.where(enough, first, end),
            jnp.where(enough, end, last),
        )

    infinity = as_integers(jnp.full_like(x, jnp.inf, shape=()))
    start = jnp.zeros_like(infinity), infinity, i + 1, jnp.maximum(i + 1, n)
    bits, _, j, last = lax.while_loop(lambda state: state[0] < state[1], bisect, start)
    distance = lax.bitcast_convert_type(bits, x.dtype)
    # A row that holds this distance, for the derivative.
    i = jnp.argmax((j < last) & (fixed[j] - fixed == distance))
    return _QN * jnp.where((distance > 0) & (distance < jnp.inf), x[j[i]] - x[i], distance)


def _pairs_reach(counts: Array, h: Array) -> Array:
    """sum(counts) >= h (h - 1) / 2, of numbers that may be too large for an int32."""
    half = jnp.where(h % 2 == 0, (h // 2) * (h - 1), h * ((h - 1) // 2))
    exact = jnp.sum(counts, dtype=jnp.int32) - half  # wraps round
    wide = h.astype(jnp.float32)
    rough = jnp.sum(counts.astype(jnp.float32)) - 0.5 * wide * (wide - 1)
    return jnp.where(jnp.abs(rough) < 2.0**30, exact >= 0, rough >= 0)


def sn(x: ArrayLike, *, where: ArrayLike | None = None, axis: Axis = None) -> Array:
    """Rousseeuw and Croux's Sn, `1.1926 med_i med_j |x_i - x_j|`: a typical distance to others.

    The inner median is the high one, of rank n // 2 + 1 with j = i among the j, and the outer
    the low one, of rank (n + 1) // 2. Needs no center, resists just under half of the data and
    has 58 % of the efficiency of the standard deviation at the normal.

    Exact, in O(n log n) time and O(n) memory. Corrections for small samples and weights: none,
    as for `qn`.

    Arguments, masks and errors are those of `mad`. Distances are taken in the dtype of x.

    Source: Rousseeuw and Croux (1993), Journal of the American Statistical Association 88,
    1273-1283.

    >>> sn(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0]))
    Array(2.3851972, dtype=float32)
    """
    return over_axis(_sn, x, None, where, None, axis)


@jax.jit
def _sn(x: Array, w: Array | None) -> Array:
    x, n = in_order(x, w)
    i = jnp.arange(x.size, dtype=jnp.int32)
    h = n // 2 + 1
    # The h nearest to x_i are some x_left ... x_(left + h - 1), and the farthest is at either end.
    lowest, highest = jnp.maximum(i - h + 1, 0), jnp.minimum(i, n - h)
    fixed = lax.stop_gradient(x)

    def halve(between: tuple[Array, Array]) -> tuple[Array, Array]:
        first, last = between
        left = first + (last - first) // 2
        right = fixed[jnp.minimum(left + h - 1, x.size - 1)] - fixed >= fixed - fixed[left]
        right |= first >= last
        return jnp.where(right, first, left + 1), jnp.where(right, left, last)

    def unsettled(between: tuple[Array, Array]) -> Array:
        return jnp.any(between[0] < between[1])

    left, _ = lax.while_loop(unsettled, halve, (lowest, highest + 1))
    to_right = _gap(x[jnp.minimum(left + h - 1, x.size - 1)], x)
    to_left = _gap(x, x[jnp.maximum(left - 1, 0)])
    right = (left <= highest) & ((left <= lowest) | (to_right <= to_left))
    each = jnp.where(right, to_right, to_left)
    index, _ = ranked(each, (i < n).astype(jnp.int32), (n + 1) // 2, (n + 1) // 2)
    return _SN * _flat_at_0(each[index])


def tau(
    x: ArrayLike,
    *,
    center: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> Array:
    """The tau scale, `s0 sqrt(mean(min((x - m) / s0, 3)**2) / 0.9247)`: truncated moments.

    s0 = median(|x - median(x)|), not scaled; the location m is the mean of x with the weights
    `max(0, 1 - ((x - median(x)) / (4.5 s0))**2)**2`, or `center`. It resists just under half of
    the data and comes close to the standard deviation's efficiency at the normal. This is the
    form of Maronna and Zamar (2002) that robustbase's `scaleTau2` computes by default, of which
    Yohai and Zamar's (1988) first step is an M-scale instead of a MAD. 0 where the MAD is 0.

    Arguments, masks, weights and errors are those of `mad`.

    Source: Maronna and Zamar (2002), Technometrics 44, 307-317; Yohai and Zamar (1988), Journal
    of the American Statistical Association 83, 406-413.

    >>> tau(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0]))
    Array(1.7440975, dtype=float32)
    """
    return over_axis(partial(_tau, center is None), x, center, where, weights, axis)


@partial(jax.jit, static_argnums=0)
def _tau(centers: bool, x: Array, w: Array | None) -> Array:
    each = _each(x, w)
    r = _centered(x, w) if centers else x
    s = _deviation(r, w)
    some = (s > 0) & (s < jnp.inf)
    unit = jnp.where(some, s, 1)
    z = jnp.clip(r, -9 * unit, 9 * unit) / unit  # more makes no difference, less no overflow
    if centers:
        pull = each * (1 - jnp.clip(z / 4.5, -1, 1) ** 2) ** 2
        z = z - jnp.sum(pull * z) / jnp.sum(pull)
    square = jnp.sum(each * jnp.clip(z, -3, 3) ** 2) / jnp.sum(each)
    return s * jnp.where(some, jnp.sqrt(jnp.where(some, square, 1) / _TAU), 1)


def m_scale(
    x: ArrayLike,
    loss: Loss = _BIWEIGHT,
    *,
    breakdown: ArrayLike = 0.5,
    center: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> Array:
    """The M-scale: the s at which `mean(rho((x - m) / s)) = breakdown rho(inf)`.

    m is the median of x, or `center`: 0.0 for the residuals of an S-estimate. The share
    `breakdown` of the data can be anything, and the scale is exactly 0 where no more than this
    share differs from m. The default loss makes it consistent at the normal and its breakdown
    the highest, one half; any other loss of the kind needs a `delta` of its own for that.

    Solved to the last digits by Newton's method in a bracket. The first derivatives, also in
    what the loss and `breakdown` depend on, are those of the solution.

    Other arguments, masks, weights and errors are those of `mad`.

    Args:
        x: real numbers of any shape.
        loss: a bounded elementwise function of the residual, `loss(inf)` being its bound, with
            its parameters fixed: `functools.partial(rl.tukey, delta=1.547645)`.
        breakdown: a number in (0, 0.5].
        center: what deviations are taken from; broadcasts to x. None takes the median.
        where: booleans that broadcast to x; True keeps an entry.
        weights: numbers >= 0 that broadcast to x; only their ratios count.
        axis: the axis or axes to reduce; None reduces all.

    Raises:
        ValueError: also a loss without a bound, or a `breakdown` outside (0, 0.5] (traced: NaN).

    Source: Huber (1964), Annals of Mathematical Statistics 35, 73-101; Rousseeuw and Yohai
    (1984), Lecture Notes in Statistics 26, 256-272.

    >>> m_scale(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0])).round(2)
    Array(1.86, dtype=float32)
    """
    check_loss(loss)
    share = _share(breakdown)

    kernel = _biweight_scale if loss is _BIWEIGHT else partial(_m_scale, loss)
    return over_axis(partial(kernel, center is None), x, center, where, weights, axis, share)


def _share(breakdown: ArrayLike) -> Array:
    share = positive("breakdown", breakdown)
    if share.shape != ():
        raise ValueError(f"breakdown must be one number, got shape {share.shape}")
    given = readable(breakdown)
    if given is not None and given > 0.5:
        raise ValueError(f"breakdown must be in (0, 0.5], got {given}")
    return share * jnp.where(share <= 0.5, 1.0, jnp.nan)


def _m_scale(loss: Loss, centers: bool, x: Array, w: Array | None, share: Array) -> Array:
    r = _centered(x, w) if centers else x
    bound = _bound(loss, r.dtype)
    each = _each(r, w)
    size, slack = jnp.sum(each), rounding(r)
    none = weight_of(each, r != 0) <= share * size * (1 + slack)
    endless = weight_of(each, jnp.isinf(r)) >= share * size * (1 - slack)
    done = none | endless | jnp.isnan(share * bound)

    def excess(s: Array) -> tuple[Array, Array]:
        """What the mean of the loss at r / s is above its share, and its slope in -log(s)."""
        beyond = jnp.isinf(r / s)
        u = jnp.where(beyond, 0, r) / s
        rho, slope = jax.jvp(loss, (u,), (u,))
        mean = jnp.sum(each * jnp.where(beyond, bound, rho)) / size
        return mean / bound - share, jnp.sum(each * slope) / size / bound

    def step(state: Any) -> Any:
        s, low, high, steps, _ = state
        above, slope = lax.stop_gradient(excess(s))
        low, high = jnp.where(above > 0, s, low), jnp.where(above > 0, high, s)
        newton = s * jnp.exp(jnp.clip(above / slope, -3, 3))
        middle = as_integers(low) + (as_integers(high) - as_integers(low)) // 2
        inside = (newton >= low) & (newton <= high) & (steps < 30)
        new = jnp.where(inside, newton, lax.bitcast_convert_type(middle, r.dtype))
        return new, low, high, steps + 1, jnp.abs(new - s) <= slack * s

    a = lax.stop_gradient(jnp.abs(r))
    rank = (1 - share) * size
    index, _ = ranked(a, each, rank, rank)
    s = jnp.where(done | ~(a[index] > 0), 1, a[index])
    ends = jnp.zeros_like(s), jnp.full_like(s, jnp.finfo(r.dtype).max)
    start = lax.stop_gradient((s, *ends, jnp.int32(0), done))
    s, *_ = lax.while_loop(lambda state: ~state[-1] & (state[-2] < 100), step, start)
    # From the root, two steps of Newton's carry its first three derivatives.
    s = lax.stop_gradient(s)
    for _ in range(2):
        above, slope = excess(s)
        s = s * jnp.exp(jnp.where(slope > 0, above, 0) / jnp.where(slope > 0, slope, 1))
    s = jnp.where(none, 0, jnp.where(endless, jnp.inf, s))
    return s + 0 * share * bound  # NaN if these are


# Called eagerly, this one need not be traced and compiled each time.
_biweight_scale = jax.jit(partial(_m_scale, _BIWEIGHT), static_argnums=0)


def _bound(loss: Loss, dtype: Any) -> Array:
    with jax.ensure_compile_time_eval():
        bound = loss(jnp.full((), jnp.inf, dtype))
    given = readable(bound)
    if given is not None and not 0 < given < np.inf:
        raise ValueError(f"loss must be bounded, such as rl.tukey, got loss(inf) = {given}")
    return bound * jnp.where(jnp.isfinite(bound), 1, jnp.nan)


def _centered(x: Array, w: Array | None) -> Array:
    return _gap(x, median(x, w))


def _gap(x: Array, y: Array) -> Array:
    """x - y, and inf between equal infinities: they are outliers, not neighbours."""
    gap = x - y
    return jnp.where(jnp.isnan(gap), jnp.inf, gap)


def _flat_at_0(s: Array) -> Array:
    """s, with the derivative 0 where it is 0."""
    return jnp.where(s == 0, 0, s)


def _deviation(r: Array, w: Array | None) -> Array:
    return median(absolute_error(r), w)


def _each(x: Array, w: Array | None) -> Array:
    return jnp.ones_like(x) if w is None else w.astype(x.dtype)


def _finite(x: Array) -> Array:
    """inf as the largest number, lest 0 * inf make a NaN of a derivative."""
    return jnp.clip(x, -float(jnp.finfo(x.dtype).max), float(jnp.finfo(x.dtype).max))
