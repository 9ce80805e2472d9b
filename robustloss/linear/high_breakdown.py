"""S-estimates: the coefficients whose residuals have the smallest M-scale.

That has many local minima, and what makes the fit robust is the one it starts from. Fast-S
(Salibian-Barrera and Yohai 2006) draws many subsets of as few rows as determine a fit: some are
free of outliers, whatever the rest is. Each takes a few steps of reweighting on a small group of
the rows, the best of each group some more on all groups together, the best of these on all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustloss.linear import _problem
from robustloss.linear._problem import Problem, rows, solve
from robustloss.linear.irls import Estimate, m_estimate
from robustloss.scale import smallest
from robustloss.views import weight

Loss = Callable[..., Array]
Starts = tuple[Array, Array]  # coefficients and scales, a row for each

_SUBSETS = 1000
_GROUPS = 5
_ROWS = 400  # in a group, or 20 for each coefficient
_FINALISTS = 50  # go on to all groups
_LAST = 5  # and to the last digit


def s_estimate(of: Problem, loss: Loss, share: Array, floor: Array, key: Array) -> Estimate:
    """The S-estimate whose scale s solves `mean(loss(r / s)) = share loss(inf)`.

    The scale is at least `floor`, which is what rounding makes of 0.
    """
    n, k = len(of.y), len(of.constants)
    draw, order = jax.random.split(key)
    # Far above what rounding leaves of a residual that is 0.
    tiny = floor / jnp.finfo(of.y.dtype).eps ** 0.5
    target = share * loss(jnp.full((), jnp.inf, of.y.dtype))

    def steps(count: int, q: Array, y: Array, w: Array, at: Starts) -> Starts:
        """Of reweighting, each with a step of the scale, from many starts at once."""
        squares = (q[:, :, None] * q[:, None, :]).reshape(-1, k * k)

        def nearer(s: Array, r: Array) -> Array:
            exact = (jnp.abs(r) > tiny) @ w <= share
            return jnp.where(exact, tiny, s * jnp.sqrt(loss(r / s[:, None]) @ w / target))

        def step(_: Array, at: Starts) -> Starts:
            b, s = at
            r = b @ q.T - y
            s = nearer(s, r)
            pull = w * weight(loss, r / s[:, None])
            grams = (pull @ squares).reshape(-1, k, k)
            return jax.vmap(solve)(grams, (pull * y) @ q), s

        b, s = lax.fori_loop(0, count, step, at)
        r = b @ q.T - y
        s = lax.fori_loop(0, 4, lambda _, s: nearer(s, r), s)
        return b, jnp.where(jnp.all(jnp.isfinite(b), axis=1) & (s > 0), s, jnp.inf)

    def best(count: int, at: Starts) -> Starts:
        _, first = lax.top_k(-at[1], count)
        return at[0][first], at[1][first]

    def of_group(rows: Array, uniform: Array) -> Starts:
        q, y, w = all_q[rows], all_y[rows], each[rows]
        w, size = w / jnp.sum(w), jnp.sum(w > 0)
        b = jax.vmap(partial(_subset, q, y, size))(uniform)
        s = jnp.maximum(1.5 * _rough_median(jnp.abs(b @ q.T - y), w), tiny)
        return best(_FINALISTS // groups, steps(2, q, y, w, (b, s)))

    size = max(_ROWS, 20 * k)
    groups = _GROUPS if n > _GROUPS * size else 1
    taken = min(n, _GROUPS * size)
    luck = jnp.where(of.each() > 0, jax.random.uniform(order, (n,)), jnp.inf)
    chosen = jnp.isfinite(luck) & (luck <= smallest(luck, taken) if taken < n else True)
    # Those that count come first.
    sample = _problem.part(of, jnp.nonzero(chosen, size=taken, fill_value=n)[0])
    all_q, all_y, each = rows(sample), sample.y, sample.each()
    dealt = jnp.arange(taken).reshape(-1, groups).T
    uniform = jax.random.uniform(draw, (groups, _SUBSETS // groups, k), of.y.dtype)
    found = jax.vmap(of_group)(dealt, uniform)
    found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    # If those are all the rows, to the end; minima that lie close together are told apart then.
    count, close = (30, 1e-3) if groups == 1 else (10, 1e-2)
    found = steps(count, all_q, all_y, each / jnp.sum(each), found)
    b, s = best(_LAST, _distinct(best(_FINALISTS, found), close))

    def closer(of: Problem, r: Array, s: Array) -> Array:
        """Newton's step towards the M-scale, in its logarithm."""
        w = of.each()
        rho, slope = jax.jvp(loss, (r / s,), (r / s,))
        above = jnp.sum(jnp.where(w > 0, w * rho, 0)) - target * jnp.sum(w)
        slope = jnp.sum(jnp.where(w > 0, w * slope, 0))
        slope = jnp.maximum(slope, jnp.finfo(r.dtype).tiny)
        return jnp.maximum(s * jnp.exp(jnp.clip(above / slope, -1, 1)), floor)

    def at_scale(s: Array) -> Loss:
        return lambda r: s * (s * loss(r / s))

    ends = lax.map(lambda at: m_estimate(of, at_scale, closer, *at), (b, s))
    lowest = jnp.argmin(jnp.where(jnp.isnan(ends.scale), jnp.inf, ends.scale))
    return jax.tree.map(lambda x: x[lowest], ends)


def _distinct(at: Starts, close: float) -> Starts:
    """NaN and an infinite scale for what is where one of those before is."""
    b, s = at
    near = jnp.max(jnp.abs(b[:, None] - b), axis=-1) <= close * s
    again = jnp.any(jnp.tril(near, -1), axis=1)
    return jnp.where(again[:, None], jnp.nan, b), jnp.where(again, jnp.inf, s)


def _rough_median(x: Array, w: Array) -> Array:
    """Of each row of x >= 0, to a hundredth part, the weights adding up to 1.

    The steps of an M-scale are too short to come down from outliers to where it is.
    """
    info = jnp.finfo(x.dtype)
    integer = jnp.int64 if info.bits == 64 else jnp.int32
    coarse = (lax.bitcast_convert_type(x, integer) >> (info.nmant - 7)).astype(jnp.int32)

    def halve(i: Array, low: Array) -> Array:
        middle = low + (1 << (info.nexp + 6 - i))
        below = jnp.sum((coarse < middle[:, None]).astype(w.dtype) * w, axis=1)
        return jnp.where(below <= 0.5, middle, low)

    low = lax.fori_loop(0, info.nexp + 7, halve, jnp.zeros(len(x), jnp.int32))
    return lax.bitcast_convert_type(low.astype(integer) << (info.nmant - 7), x.dtype)


def _subset(q: Array, y: Array, size: Array, uniform: Array) -> Array:
    """The b that fits as many of the first `size` rows as there are coefficients."""
    k = q.shape[1]

    def draw(i: Array, rows: Array) -> Array:
        # Floyd's, without replacement.
        top = jnp.maximum(size - k + i, 0)
        row = jnp.minimum((uniform[i] * (top + 1)).astype(rows.dtype), top)
        return rows.at[i].set(jnp.where(jnp.any(rows == row), top, row))

    rows = lax.fori_loop(0, k, draw, jnp.full(k, -1))
    a = q[rows]
    return solve(a.T @ a, a.T @ y[rows])
