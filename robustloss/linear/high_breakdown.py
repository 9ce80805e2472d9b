"""S-estimates: the coefficients whose residuals have the smallest M-scale.

That has many local minima, and what makes the fit robust is the one it starts from. Fast-S
(Salibian-Barrera and Yohai 2006) draws many subsets of as few rows as determine a fit: some are
free of outliers, whatever the rest is. Each takes two steps of reweighting on a small group of the
rows; the best of each group go to their minimum on all groups together, and those of these that
differ to theirs on all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustloss._order_statistics import smallest
from robustloss.linear._problem import Problem, first, part, predictions, rows, solve, sums
from robustloss.linear.irls import Estimate, m_estimate
from robustloss.views import weight

Loss = Callable[..., Array]
Starts = tuple[Array, Array]  # coefficients and scales, a row for each

_SUBSETS = 1000
_GROUPS = 5
_ROWS = 400  # in a group, or 20 for each coefficient
_FINALISTS = 100  # or 5 of each group


def s_estimate(of: Problem, loss: Loss, share: Array, floor: Array, key: Array) -> Estimate:
    """The S-estimate whose scale s solves `mean(loss(r / s)) = share loss(inf)`.

    The scale is at least `floor`, which is what rounding makes of 0.
    """
    n, k = len(of.y), len(of.constants)
    target = share * loss(jnp.full((), jnp.inf, of.y.dtype))

    def closer(of: Problem, r: Array, s: Array, _: Array) -> Array:
        """Newton's step towards the M-scale, in its logarithm."""

        def of_rows(_: Array, w: Array, r: Array) -> Array:
            rho, slope = jax.jvp(loss, (r / s,), (r / s,))
            terms = rho, slope, (~(jnp.abs(r) <= floor)).astype(r.dtype)
            return jnp.stack([jnp.sum(jnp.where(w > 0, w * term, 0)) for term in terms])

        total = jnp.sum(of.each())
        rho, slope, inexact = sums(of, of_rows, r)
        above = rho - target * total
        slope = jnp.maximum(slope, jnp.finfo(r.dtype).tiny)
        nearer = s * jnp.exp(jnp.clip(above / slope, -1, 1))
        exact = inexact <= share * total
        return jnp.where(exact, floor, jnp.maximum(nearer, floor))

    def at_scale(s: Array) -> Loss:
        return lambda r: s * (s * loss(r / s))

    def minimum(of: Problem, steps: int, at: Starts) -> Estimate:
        return m_estimate(of, at_scale, closer, *at, steps)

    draw, order = jax.random.split(key)
    size = max(_ROWS, 20 * k)
    groups = _GROUPS if n > _GROUPS * size else 1
    taken = min(n, _GROUPS * size)
    chosen = of.each() > 0
    if taken < n:
        luck = jnp.where(chosen, jax.random.uniform(order, (n,)), jnp.inf)
        chosen &= luck <= smallest(luck, taken)
    # Those that count come first.
    sample = part(of, first(chosen, taken))
    uniform = jax.random.uniform(draw, (_SUBSETS * k,), jnp.float32)  # in a row: less to compile
    uniform = uniform.reshape(groups, _SUBSETS // groups, k)
    # In float32, which is enough to see which are best: with y in units of its own.
    unit = jnp.where(of.size > 0, of.size, 1)
    q, y, w, short = jax.tree.map(
        lambda x: x.astype(jnp.float32),
        (rows(sample), jnp.clip(sample.y / unit, -1e15, 1e15), sample.each(), loss),
    )
    dealt = (jnp.swapaxes(x.reshape(-1, groups, *x.shape[1:]), 0, 1) for x in (q, y, w))
    count = _FINALISTS if groups == 1 else 5
    best = jax.vmap(lambda *group: _screened(short, share, count, *group))
    b, s = jax.tree.map(jnp.concatenate, best(*dealt, uniform))
    starts = (b.astype(of.y.dtype) * unit, jnp.maximum(s.astype(of.y.dtype) * unit, floor))
    ends = jax.vmap(partial(minimum, sample, 100 if groups == 1 else 8))(starts)
    if groups > 1:
        ends = lax.map(partial(minimum, of, 100), _distinct(ends.b, ends.scale))
    # One that is not there yet may have a scale that is too low.
    there = ends.converged | ~jnp.any(ends.converged)
    lowest = jnp.argmin(jnp.where(there & ~jnp.isnan(ends.scale), ends.scale, jnp.inf))
    found = jax.tree.map(lambda x: x[lowest], ends)
    return found._replace(residuals=predictions(of, found.b) - of.y)  # those of a sample until now


def _screened(
    loss: Loss, share: Array, count: int, q: Array, y: Array, w: Array, uniform: Array
) -> Starts:
    """The best of many subsets, after two steps of reweighting on these rows."""
    k = q.shape[1]
    size, w = jnp.sum(w > 0), w / jnp.sum(w)
    target = share.astype(y.dtype) * loss(jnp.full((), jnp.inf, y.dtype))
    tiny = 64 * jnp.finfo(y.dtype).eps  # far above what rounding leaves of a residual that is 0
    i, j = np.triu_indices(k)
    squares = q[:, i] * q[:, j]
    place = np.zeros((k, k), int)
    place[i, j] = place[j, i] = np.arange(len(i))

    def nearer(s: Array, r: Array) -> Array:
        mean = loss(r / s[:, None]) @ w
        return jnp.maximum(s * jnp.sqrt(mean / target), tiny)

    def step(_: Array, at: Starts) -> Starts:
        b, s = at
        r = b @ q.T - y
        s = nearer(s, r)
        pull = w * weight(loss, r / s[:, None])
        return jax.vmap(solve)((pull @ squares)[:, place], (pull * y) @ q), s

    b = jax.vmap(partial(_subset, q, y, size))(uniform)
    s = jnp.maximum(1.5 * _rough_median(jnp.abs(b @ q.T - y), w), tiny)
    b, s = lax.fori_loop(0, 2, step, (b, s))
    r = b @ q.T - y
    s = lax.fori_loop(0, 4, lambda _, s: nearer(s, r), s)
    s = jnp.where(jnp.all(jnp.isfinite(b), axis=1) & (s > 0), s, jnp.inf)
    _, lowest = lax.top_k(-s, count)
    return b[lowest], s[lowest]


def _distinct(b: Array, s: Array) -> Starts:
    """The minima, with NaN for what is the same as one before."""
    # Rows far out in X make minima that are 0.01 s apart, of which few starts lead to the lowest.
    near = jnp.max(jnp.abs(b[:, None] - b), axis=-1) <= 1e-3 * s
    again = jnp.any(jnp.tril(near, -1), axis=1)
    return jnp.where(again[:, None], jnp.nan, b), s


def _rough_median(x: Array, w: Array) -> Array:
    """Of each row of x >= 0, in float32, to an eighth part; the weights add up to 1.

    The steps of an M-scale are too short to come down from outliers to where it is.
    """
    coarse = lax.bitcast_convert_type(x, jnp.int32) >> 20  # the exponent and three bits

    def halve(i: Array, low: Array) -> Array:
        middle = low + (1 << (10 - i))
        below = jnp.sum((coarse < middle[:, None]).astype(w.dtype) * w, axis=1)
        return jnp.where(below <= 0.5, middle, low)

    low = lax.fori_loop(0, 11, halve, jnp.zeros(len(x), jnp.int32))
    return lax.bitcast_convert_type(low << 20, x.dtype)


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
