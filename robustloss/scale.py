"""Robust scales: the spread of most of a sample, whatever the rest does.

Every scale is consistent at the normal (of a large normal sample it is the standard deviation),
equivariant (`scale(a x + b) = |a| scale(x)`), and exactly 0 where the data have no spread. The
caller has to handle a scale of 0.

Only the ratios of weights count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss._arguments import check_loss, constrained, positive, readable
from robustloss._numerics import normal
from robustloss._numerics.order_statistics import (
    as_integers,
    median,
    median_value,
    quartiles,
    rank_indices,
    rounding_tolerance,
    sorted_entries,
    weight_sum,
)
from robustloss._numerics.reduction import Axis, over_axis
from robustloss.losses.convex import absolute_error
from robustloss.losses.redescending import tukey
from robustloss.types import Loss

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


# The constants of consistency at the normal, whose distribution function is Phi.
_QN = 2.2191444659850758  # 1 / (sqrt 2 Phi^-1(5/8))
_SN = 1.1925985531232085  # c of Phi(q + 1/c) - Phi(q - 1/c) = 1/2, q = Phi^-1(3/4)
_TAU = 0.9247153921761308  # E min(|Z|, 3 q)**2
_BIWEIGHT = partial(tukey, delta=1.547644980928226)  # E rho(Z) = rho(inf) / 2

# Limits of the steps of iterations that converge long before: a guard against rounding.
_MAX_PROPOSAL2_STEPS = 500
_MAX_M_SCALE_STEPS = 100
_MAX_M_SCALE_NEWTON_STEPS = 30  # from then on, steps halve the bracket


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
    efficiency of the standard deviation at the normal. For the residuals of a regression, take
    deviations from 0: `center=0.0`.

    A weighted median is the middle between the lowest and the highest m that have at most half
    of the weight on either side, so a weight of 3 is the same as three equal entries.

    A dropped entry may hold anything, NaN and infinity included. A weight of 0 is not a mask: a
    NaN with the weight 0 makes the scale NaN. Infinite entries are outliers like others; where
    they are too many, the scale is infinite. The gradient is that of the entries that the medians
    select, and 0 where the scale is 0.

    Args:
        x: real numbers of any shape.
        center: the location that deviations are taken from; broadcasts to x. None takes the
            median.
        where: booleans that broadcast to x; True keeps an entry.
        weights: numbers >= 0 that broadcast to x; only their ratios count.
        axis: the axis or axes to reduce; None reduces all.

    Returns:
        A scalar, or an array of the axes that are left, in the dtype of x and in its units. The
        scale of one entry is 0. Where nothing is kept, or all weights are 0, it is NaN.

    Raises:
        ValueError: shapes that do not fit, negative or NaN weights (traced: the result is NaN).
        TypeError: complex or non-numeric input, a `where` that is not boolean.

    Source: Hampel (1974), Journal of the American Statistical Association 69, 383-393.

    >>> mad(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0]))
    Array(1.4826022, dtype=float32)
    """
    return over_axis(partial(_mad, center is None), x, center, where, weights, axis)


@partial(jax.jit, static_argnums=0)
def _mad(estimate_center: bool, x: Array, w: Array | None) -> Array:
    return normal.MAD * _median_deviation(_centered(x, w) if estimate_center else x, w)


def _mad_from_guess(
    r: Array,
    *,
    guess: tuple[Array, Array],
    where: Array | None = None,
    weights: Array | None = None,
) -> Array:
    """The MAD about 0 of one row, not for differentiation.

    The guess `s, margin` says that the MAD is most likely within `margin` of s. The smaller a right
    margin is, the sooner the MAD is found; a wrong guess only costs time.
    """
    s, margin = guess
    # A margin of rounding alone might exclude the MAD.
    margin = jnp.maximum(margin, jnp.finfo(r.dtype).eps ** 0.5 * s)
    w = weights
    if where is not None:
        w = where.astype(jnp.int32) if w is None else jnp.where(where, w, 0)
    has_nan = jnp.any(jnp.isnan(r))
    bracket = jnp.stack([s - margin, s + margin]) / normal.MAD
    deviation = median_value(jnp.where(has_nan, 0, jnp.abs(r)), w, bracket)
    return jnp.where(has_nan, jnp.nan, normal.MAD * deviation)


def iqr(
    x: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis: Axis = None,
) -> Array:
    """The interquartile range, `0.7413 (upper quartile - lower quartile)`.

    A quarter of the data can be anything. The quartiles are those of `numpy.quantile` and R
    (type 7): at rank (n - 1) p, counted from 0 and interpolated. Interpolation depends on
    the weight of one observation. With weights, this is `u = sum(w**2) / sum(w)`, and a quartile
    is the mean of the data from weight `h = (sum(w) - u) p` to weight `h + u` in sorted order.
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
    return normal.IQR * _zero_slope_at_0(_difference(high, low))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocationScale:
    """The result of `location_scale`."""

    location: Array
    """Of the shape of the axes that are left, in the units of the data."""
    scale: Array
    """The same shape and units."""


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
    """Huber's proposal 2: the scale s at which `(x - m) / s`, clipped, varies as a normal does.

    Solves `sum(clip((x - m) / s, -k, k)**2) = (n - 1) beta`, beta = E clip(Z, -k, k)**2, with
    the location m of `sum(clip((x - m) / s, -k, k)) = 0`, which `location_scale` returns too.
    If a `center` is given, m is the center, and n takes the place of n - 1. In general the factor
    is n - `ddof`: for the residuals of a regression, `ddof` is the number of coefficients. The
    scale is efficient at the normal, but at k = 1.5 no more than a quarter of the data may be far
    off.

    The equations are solved to the last digits. The solution is unique, as the minimum of a convex
    function. The scale is 0 where the minimum lies at s = 0: at k = 1.5, where about two thirds of
    the data are one number. (MASS gives 0 wherever the MAD is 0.) With weights, n - `ddof` is
    `sum(w) - ddof u`, u as in `iqr`.

    Other arguments, masks, weights and errors are those of `mad`.

    Args:
        x: real numbers of any shape.
        k: the deviation at which deviations are clipped, one number > 0, in units of s; can be
            differentiated.
        center: the location, if known; broadcasts to x.
        ddof: the degrees of freedom used by estimates, one number >= 0. None means 0 with a
            `center`, else 1.
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
    k = positive("k", k)
    default_ddof = float(center is None)
    ddof = constrained(
        "ddof", "must be >= 0", lambda x: x >= 0, default_ddof if ddof is None else ddof
    )
    for name, number in (("k", k), ("ddof", ddof)):
        if number.shape != ():
            raise ValueError(f"{name} must be one number, got shape {number.shape}")
    kernel = partial(_proposal2, center is None)
    return LocationScale(*over_axis(kernel, x, center, where, weights, axis, k, ddof))


@partial(jax.jit, static_argnums=0)
def _proposal2(
    estimate_center: bool, x: Array, w: Array | None, k: Array, ddof: Array
) -> tuple[Array, Array]:
    """Location and scale; the location is 0 if it is not to be estimated."""
    start = median(x, w) if estimate_center else jnp.zeros_like(x, shape=())
    r, w = _difference(x, start), _floating_weights(x, w)
    size = jnp.sum(w)
    inner = lax.erf(k * math.sqrt(0.5))
    beta = inner - k * jnp.exp(-0.5 * k * k) * math.sqrt(2 / math.pi) + k * k * (1 - inner)
    target = beta * (size - ddof * (jnp.sum(w * w) / size))

    def squares_at_scale_0(clipped: Array) -> Array:
        """sum(psi**2) where these entries are clipped and all others are equal."""
        others = weight_sum(w, ~clipped)
        imbalance = jnp.sum(jnp.where(clipped, jnp.sign(r) * w, 0)) if estimate_center else 0
        return k * k * (size - others + imbalance**2 / jnp.where(others > 0, others, 1))

    slack = rounding_tolerance(r) * size
    no_spread = squares_at_scale_0(r != 0) <= target + slack
    infinite = squares_at_scale_0(jnp.isinf(r)) >= target - slack
    r = _clipped_to_finite(r)
    constants = lax.stop_gradient((r, w, k, target))
    root = _proposal2_root(estimate_center, *constants, no_spread | infinite)
    # One more of Newton's steps, from the root, makes the solution a function of the data that can
    # be differentiated.
    m, s = _proposal2_newton(estimate_center, r, w, k, target, *root)
    m = jnp.where(no_spread, 0, jnp.where(infinite, jnp.nan, m))
    return start + m, jnp.where(no_spread, 0, jnp.where(infinite, jnp.inf, s))


def _proposal2_root(
    estimate_center: bool, r: Array, w: Array, k: Array, target: Array, done: Array
) -> tuple[Array, Array]:
    """The solution (m, s) of `sum(w psi) = 0` and `sum(w psi**2) = target`; any if `done`."""
    size = jnp.sum(w)

    def equations(m: Array, s: Array) -> tuple[Array, Array, Array]:
        """sum(w psi), sum(w psi**2) and the weights clipped below and above, (2,)."""
        z = (r - m) / s
        psi = jnp.clip(z, -k, k)
        psi_sum = jnp.sum(w * psi) if estimate_center else jnp.zeros_like(s)
        clipped = jnp.stack([weight_sum(w, z < -k), weight_sum(w, z > k)])
        return psi_sum, jnp.sum(w * psi * psi), clipped

    def step(state: Any) -> Any:
        m, s, least_error, steps, _ = state
        psi_sum, squares, clipped = equations(m, s)
        # The iteration of Huber and of MASS always converges, but may be slow.
        mean = psi_sum / size
        huber = m + s * mean, s * jnp.sqrt(jnp.maximum(squares - psi_sum * mean, 0) / target)
        # Newton's step reaches the solution once the entries clipped at it are known.
        newton = _proposal2_newton(estimate_center, r, w, k, target, m, s)
        psi_sum, squares, clipped_after = equations(*newton)
        error = jnp.hypot(psi_sum / k, (squares - target) / (k * k))
        solved = jnp.all(clipped == clipped_after)
        # At a scale above the solution's, fewer entries are clipped than at the solution, and
        # Newton's steps decrease the scale towards it.
        decreasing = (squares <= target) & (newton[1] < s)
        accept = solved | (error <= least_error / 2) | decreasing
        new = [jnp.where(accept, a, b) for a, b in zip(newton, huber, strict=True)]
        change = jnp.abs(new[0] - m) + jnp.abs(new[1] - s)
        unchanged = change < rounding_tolerance(r) * s
        return *new, jnp.where(accept, error, least_error), steps + 1, solved | unchanged

    finite = (jnp.abs(r) < float(jnp.finfo(r.dtype).max)) & (w > 0)
    s = jnp.max(jnp.where(finite, jnp.abs(r), 0)) / k  # at this scale no finite entry is clipped
    start = jnp.zeros_like(s), s, jnp.full_like(s, jnp.inf), jnp.int32(0), done
    m, s, *_ = lax.while_loop(
        lambda state: ~state[-1] & (state[-2] < _MAX_PROPOSAL2_STEPS), step, start
    )
    return m, s


def _proposal2_newton(
    estimate_center: bool, r: Array, w: Array, k: Array, target: Array, m: Array, s: Array
) -> tuple[Array, Array]:
    """The solution if the entries clipped at (m, s) are those clipped at it; else maybe NaN."""
    low, high = (r - m) / s < -k, (r - m) / s > k
    w_low, w_high, w_inner = weight_sum(w, low), weight_sum(w, high), weight_sum(w, ~(low | high))
    divisor = jnp.where(w_inner > 0, w_inner, 1)
    # In units of the largest entry that is not clipped, so that no square under- or overflows.
    inner = jnp.where(low | high | (w == 0), 0, r)
    unit = lax.stop_gradient(jnp.max(jnp.abs(inner)))
    unit = jnp.where(unit > 0, unit, 1)
    z = inner / unit
    # The location is `unit * mean + shift * s`.
    mean = jnp.sum(w * z) / divisor if estimate_center else jnp.zeros_like(s)
    shift = k * (w_high - w_low) / divisor if estimate_center else jnp.zeros_like(s)
    squares = jnp.sum(jnp.where(low | high, 0, w * (z - mean) ** 2))
    # The part of the target that the entries not clipped have to make up.
    remainder = target - k * k * (w_low + w_high) - w_inner * shift * shift
    exists = (remainder > 0) & (squares > 0)
    ratio = jnp.where(exists, squares, 1) / jnp.where(exists, remainder, 1)
    s = jnp.where(exists, unit * jnp.sqrt(ratio), jnp.nan)
    return unit * mean + shift * s, s


def qn(x: ArrayLike, *, where: ArrayLike | None = None, axis: Axis = None) -> Array:
    """Rousseeuw and Croux's Qn, `2.2191 {|x_i - x_j|: i < j}_(k)`: by the distances of pairs.

    k = h (h - 1) / 2 with h = n // 2 + 1, so about a quarter of the n (n - 1) / 2 distances
    between two entries are smaller. Qn needs no center, resists just under half of the data and
    has 82 % of the efficiency of the standard deviation at the normal.

    The distance is found exactly, without forming all distances: O(n log n) time and O(n) memory.
    The constant is 1 / (sqrt(2) Phi^-1(5/8)); the 2.2219 of the article is a misprint. There
    is no correction for small samples, which robustbase's `Qn` applies by default. There are no
    weights either, as no definition of an order statistic of weighted pairs is agreed on.

    Arguments, masks and errors are those of `mad`. Distances are taken in the dtype of x.

    Source: Rousseeuw and Croux (1993), Journal of the American Statistical Association 88,
    1273-1283.

    >>> qn(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0]))
    Array(2.2191446, dtype=float32)
    """
    return over_axis(_qn, x, None, where, None, axis)


@jax.jit
def _qn(x: Array, w: Array | None) -> Array:
    x, n = sorted_entries(x, w)
    i = jnp.arange(x.size, dtype=jnp.int32)
    h = n // 2 + 1
    fixed = lax.stop_gradient(x)

    def halve_distances(state: Any) -> Any:
        """Halves the range [low, high] of the answer, as integers of the same order as floats.

        Of the pairs (i, j), those with i < j < first[i] are nearer than the answer, and those with
        last[i] <= j are further apart.
        """
        low, high, first, last = state
        middle = low + (high - low) // 2
        distance = lax.bitcast_convert_type(middle, x.dtype)

        def halve_indices(between: tuple[Array, Array]) -> tuple[Array, Array]:
            first, last = between
            j = first + (last - first) // 2
            near = (fixed[j] - fixed <= distance) & (first < last)
            return jnp.where(near, j + 1, first), jnp.where(near, last, j)

        end, _ = lax.while_loop(
            lambda between: jnp.any(between[0] < between[1]), halve_indices, (first, last)
        )
        enough = _pairs_reach(end - i - 1, h)
        return (
            jnp.where(enough, low, middle + 1),
            jnp.where(enough, middle, high),
            jnp.where(enough, first, end),
            jnp.where(enough, end, last),
        )

    infinity = as_integers(jnp.full_like(x, jnp.inf, shape=()))
    start = jnp.zeros_like(infinity), infinity, i + 1, jnp.maximum(i + 1, n)
    bits, _, j, last = lax.while_loop(lambda state: state[0] < state[1], halve_distances, start)
    distance = lax.bitcast_convert_type(bits, x.dtype)
    # A pair with exactly this distance, for the derivative.
    i = jnp.argmax((j < last) & (fixed[j] - fixed == distance))
    return _QN * jnp.where((distance > 0) & (distance < jnp.inf), x[j[i]] - x[i], distance)


def _pairs_reach(counts: Array, h: Array) -> Array:
    """sum(counts) >= h (h - 1) / 2, where the sum may be too large for an int32."""
    half = jnp.where(h % 2 == 0, (h // 2) * (h - 1), h * ((h - 1) // 2))
    exact = jnp.sum(counts, dtype=jnp.int32) - half  # modulo 2**32
    wide = h.astype(jnp.float32)
    rough = jnp.sum(counts.astype(jnp.float32)) - 0.5 * wide * (wide - 1)
    # Below 2**30, with the rounding error of `rough`, the exact difference fits an int32.
    return jnp.where(jnp.abs(rough) < 2.0**30, exact >= 0, rough >= 0)


def sn(x: ArrayLike, *, where: ArrayLike | None = None, axis: Axis = None) -> Array:
    """Rousseeuw and Croux's Sn, `1.1926 med_i med_j |x_i - x_j|`: a typical distance to others.

    The inner median is the high one, of rank n // 2 + 1 with j = i among the j, and the outer
    the low one, of rank (n + 1) // 2. Sn needs no center, resists just under half of the data and
    has 58 % of the efficiency of the standard deviation at the normal.

    The result is exact, in O(n log n) time and O(n) memory. There are no corrections for small
    samples and no weights, as for `qn`.

    Arguments, masks and errors are those of `mad`. Distances are taken in the dtype of x.

    Source: Rousseeuw and Croux (1993), Journal of the American Statistical Association 88,
    1273-1283.

    >>> sn(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0]))
    Array(2.3851972, dtype=float32)
    """
    return over_axis(_sn, x, None, where, None, axis)


@jax.jit
def _sn(x: Array, w: Array | None) -> Array:
    x, n = sorted_entries(x, w)
    i = jnp.arange(x.size, dtype=jnp.int32)
    h = n // 2 + 1
    # The h entries nearest to x_i are x_left ... x_(left + h - 1), and the farthest of them is at
    # one end.
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
    to_right = _difference(x[jnp.minimum(left + h - 1, x.size - 1)], x)
    to_left = _difference(x, x[jnp.maximum(left - 1, 0)])
    right = (left <= highest) & ((left <= lowest) | (to_right <= to_left))
    inner_medians = jnp.where(right, to_right, to_left)
    index, _ = rank_indices(inner_medians, (i < n).astype(jnp.int32), (n + 1) // 2, (n + 1) // 2)
    return _SN * _zero_slope_at_0(inner_medians[index])


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
    `max(0, 1 - ((x - median(x)) / (4.5 s0))**2)**2`, or `center`. The scale resists just under
    half of the data and comes close to the standard deviation's efficiency at the normal. This is
    the form of Maronna and Zamar (2002), which robustbase's `scaleTau2` computes by default. The
    tau scale of Yohai and Zamar (1988) starts from an M-scale instead of a MAD. The scale is 0
    where the MAD is 0.

    Arguments, masks, weights and errors are those of `mad`.

    Source: Maronna and Zamar (2002), Technometrics 44, 307-317; Yohai and Zamar (1988), Journal
    of the American Statistical Association 83, 406-413.

    >>> tau(jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0]))
    Array(1.7440975, dtype=float32)
    """
    return over_axis(partial(_tau, center is None), x, center, where, weights, axis)


@partial(jax.jit, static_argnums=0)
def _tau(estimate_center: bool, x: Array, w: Array | None) -> Array:
    factors = _floating_weights(x, w)
    r = _centered(x, w) if estimate_center else x
    s0 = _median_deviation(r, w)
    regular = (s0 > 0) & (s0 < jnp.inf)
    unit = jnp.where(regular, s0, 1)
    # An entry beyond 9 s0 is beyond 4.5 s0 of the median and 3 s0 of m, so the clip only prevents
    # an overflow.
    z = jnp.clip(r, -9 * unit, 9 * unit) / unit
    if estimate_center:
        weights = factors * (1 - jnp.clip(z / 4.5, -1, 1) ** 2) ** 2
        z = z - jnp.sum(weights * z) / jnp.sum(weights)
    square = jnp.sum(factors * jnp.clip(z, -3, 3) ** 2) / jnp.sum(factors)
    return s0 * jnp.where(regular, jnp.sqrt(jnp.where(regular, square, 1) / _TAU), 1)


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
    share differs from m. With the default loss the scale is consistent at the normal at the
    highest breakdown point, one half; another bounded loss needs a `delta` of its own for that.

    The equation is solved to the last digits by Newton's method in a bracket. The first
    derivatives, also in the parameters of the loss and in `breakdown`, are those of the solution.

    Other arguments, masks, weights and errors are those of `mad`.

    Args:
        x: real numbers of any shape.
        loss: a bounded elementwise function of the residual, `loss(inf)` being its bound, with
            its parameters fixed: `functools.partial(rl.tukey, delta=1.547645)`.
        breakdown: a number in (0, 0.5].
        center: the location that deviations are taken from; broadcasts to x. None takes the
            median.
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
    share = _breakdown_share(breakdown)

    kernel = _biweight_scale if loss is _BIWEIGHT else partial(_m_scale, loss)
    return over_axis(partial(kernel, center is None), x, center, where, weights, axis, share)


def _breakdown_share(breakdown: ArrayLike) -> Array:
    share = positive("breakdown", breakdown)
    if share.shape != ():
        raise ValueError(f"breakdown must be one number, got shape {share.shape}")
    given = readable(breakdown)
    if given is not None and given > 0.5:
        raise ValueError(f"breakdown must be in (0, 0.5], got {given}")
    return share * jnp.where(share <= 0.5, 1.0, jnp.nan)


def _m_scale(loss: Loss, estimate_center: bool, x: Array, w: Array | None, share: Array) -> Array:
    r = _centered(x, w) if estimate_center else x
    bound = _bound(loss, r.dtype)
    w = _floating_weights(r, w)
    size, slack = jnp.sum(w), rounding_tolerance(r)
    no_spread = weight_sum(w, r != 0) <= share * size * (1 + slack)
    infinite = weight_sum(w, jnp.isinf(r)) >= share * size * (1 - slack)
    done = no_spread | infinite | jnp.isnan(share * bound)

    def equation(s: Array) -> tuple[Array, Array]:
        """mean(rho(r / s)) / bound - share, and its derivative in -log(s)."""
        overflows = jnp.isinf(r / s)
        u = jnp.where(overflows, 0, r) / s
        rho, slope = jax.jvp(loss, (u,), (u,))
        mean = jnp.sum(w * jnp.where(overflows, bound, rho)) / size
        return mean / bound - share, jnp.sum(w * slope) / size / bound

    def step(state: Any) -> Any:
        s, low, high, steps, _ = state
        excess, slope = lax.stop_gradient(equation(s))
        low, high = jnp.where(excess > 0, s, low), jnp.where(excess > 0, high, s)
        newton = s * jnp.exp(jnp.clip(excess / slope, -3, 3))
        middle = as_integers(low) + (as_integers(high) - as_integers(low)) // 2
        inside = (newton >= low) & (newton <= high) & (steps < _MAX_M_SCALE_NEWTON_STEPS)
        new = jnp.where(inside, newton, lax.bitcast_convert_type(middle, r.dtype))
        return new, low, high, steps + 1, jnp.abs(new - s) <= slack * s

    a = lax.stop_gradient(jnp.abs(r))
    rank = (1 - share) * size
    index, _ = rank_indices(a, w, rank, rank)
    s = jnp.where(done | ~(a[index] > 0), 1, a[index])
    ends = jnp.zeros_like(s), jnp.full_like(s, jnp.finfo(r.dtype).max)
    start = lax.stop_gradient((s, *ends, jnp.int32(0), done))
    s, *_ = lax.while_loop(lambda state: ~state[-1] & (state[-2] < _MAX_M_SCALE_STEPS), step, start)
    # Two steps of Newton's method from the root have its first three derivatives.
    s = lax.stop_gradient(s)
    for _ in range(2):
        excess, slope = equation(s)
        s = s * jnp.exp(jnp.where(slope > 0, excess, 0) / jnp.where(slope > 0, slope, 1))
    s = jnp.where(no_spread, 0, jnp.where(infinite, jnp.inf, s))
    return s + 0 * share * bound  # NaN if the share or the bound is NaN


# Compiled once, so that an eager call does not trace and compile the default kernel again.
_biweight_scale = jax.jit(partial(_m_scale, _BIWEIGHT), static_argnums=0)


def _bound(loss: Loss, dtype: Any) -> Array:
    with jax.ensure_compile_time_eval():
        bound = loss(jnp.full((), jnp.inf, dtype))
    given = readable(bound)
    if given is not None and not 0 < given < np.inf:
        raise ValueError(f"loss must be bounded, such as rl.tukey, got loss(inf) = {given}")
    return bound * jnp.where(jnp.isfinite(bound), 1, jnp.nan)


def _centered(x: Array, w: Array | None) -> Array:
    return _difference(x, median(x, w))


def _difference(x: Array, y: Array) -> Array:
    """x - y, and infinity for equal infinities, which are outliers and not neighbours."""
    difference = x - y
    return jnp.where(jnp.isnan(difference), jnp.inf, difference)


def _zero_slope_at_0(s: Array) -> Array:
    """s, with the derivative 0 where it is 0."""
    return jnp.where(s == 0, 0, s)


def _median_deviation(r: Array, w: Array | None) -> Array:
    return median(absolute_error(r), w)


def _floating_weights(x: Array, w: Array | None) -> Array:
    return jnp.ones_like(x) if w is None else w.astype(x.dtype)


def _clipped_to_finite(x: Array) -> Array:
    """x with infinity as the largest number, so that no derivative is 0 * inf = NaN."""
    return jnp.clip(x, -float(jnp.finfo(x.dtype).max), float(jnp.finfo(x.dtype).max))
