"""S-estimates: the coefficients whose residuals have the smallest M-scale.

That has many local minima, and what makes the fit robust is the one it starts from. Fast-S
(Salibian-Barrera and Yohai 2006) draws many subsets of as few rows as determine a fit: some are
free of outliers, whatever the rest is. Each moves towards its minimum by a few steps of
reweighting, on a sample of the rows where they are many; the best go on to theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustloss.linear._problem import Problem, solve
from robustloss.linear.irls import Estimate, m_estimate
from robustloss.scale import m_scale
from robustloss.views import weight

Loss = Callable[..., Array]
Starts = tuple[Array, Array]  # coefficients and scales, a row for each

_SUBSETS = 1000
_FINALISTS = 100  # go on to their minimum, on the sample
_WINNERS = 20  # and on all rows
_LAST = 5  # to the last digit
_ROWS = 2000  # in a sample
_SAMPLES = 5  # at most


def s_estimate(of: Problem, loss: Loss, share: Array, floor: Array, key: Array) -> Estimate:
    """The S-estimate whose scale s solves `mean(loss(r / s)) = share loss(inf)`.

    The scale is at least `floor`, which is what rounding makes of 0.
    """
    n, k = of.q.shape
    draw, order = jax.random.split(key)
    each = of.each()
    # Those that count come first, in a random order, dealt out to the samples.
    rows = jnp.argsort(jax.random.uniform(order, (n,)) + (each <= 0))
    samples = min(_SAMPLES, n // _ROWS) if n > _ROWS else 1
    rows = rows[: samples * min(n, _ROWS)].reshape(-1, samples).T
    target = share * loss(jnp.full((), jnp.inf, of.y.dtype))
    # Far above what rounding leaves of a residual that is 0.
    tiny = floor / jnp.finfo(of.y.dtype).eps ** 0.5

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

    def of_sample(rows: Array, uniform: Array) -> Starts:
        q, y, w = of.q[rows], of.y[rows], each[rows]
        w, size = w / jnp.sum(w), jnp.sum(w > 0)
        b = jax.vmap(partial(_subset, q, y, size))(uniform)
        s = jnp.maximum(1.5 * _rough_median(jnp.abs(b @ q.T - y), w), tiny)
        at = best(_FINALISTS // samples, steps(3, q, y, w, (b, s)))
        return best(_WINNERS // samples, steps(30, q, y, w, at))

    uniform = jax.random.uniform(draw, (samples, _SUBSETS // samples, k), of.y.dtype)
    at = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(of_sample)(rows, uniform))
    if n > _ROWS:
        every = partial(steps, 20, of.q, of.y, each / jnp.sum(each))
        at = lax.map(lambda one: jax.tree.map(lambda x: x[0], every(one)),
                     jax.tree.map(lambda x: x[:, None], at))  # fmt: skip
    at = best(min(_LAST, _WINNERS), at)

    def scale(r: Array) -> Array:
        s = m_scale(r, loss, breakdown=share, center=0.0, where=of.keep, weights=of.w)
        return jnp.maximum(s, floor)

    ends = lax.map(partial(m_estimate, of, lambda s: lambda r: s * (s * loss(r / s)), scale), at[0])
    lowest = jnp.argmin(jnp.where(jnp.isnan(ends.scale), jnp.inf, ends.scale))
    return jax.tree.map(lambda x: x[lowest], ends)


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
