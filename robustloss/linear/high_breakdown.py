"""S-estimates: the coefficients whose residuals have the smallest M-scale.

That has many local minima, and what makes the fit robust is the one it starts from. Fast-S
(Salibian-Barrera and Yohai 2006) draws many subsets of as few rows as determine a fit: some are
free of outliers, whatever the rest is. Each takes two steps of reweighting on a small group of the
rows; the best of each group go to their minimum on all groups together, and those of these that
differ to theirs on all rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustloss._numerics.order_statistics import smallest
from robustloss._regression import Estimate, Problem, first, part, predictions, rows, solve, sums
from robustloss.linear.irls import m_estimate
from robustloss.views import weight

Loss = Callable[..., Array]
Starts = tuple[Array, Array]  # coefficients and scales, a row for each

_SUBSETS = 1000
_GROUPS = 5
_ROWS = 400  # in a group, or 20 for each coefficient
_FINALISTS = 100  # or 5 of each group
# Rows times coefficients for which least squares are solved without normal equations: of few rows,
# one that lies far out may belong to most of the subsets that fit the others.
_CAREFUL = 1024


def s_estimate(of: Problem, loss: Loss, share: Array, floor: Array, key: Array) -> Estimate:
    """The S-estimate whose scale s solves `mean(loss(r / s)) = share loss(inf)`.

    The scale is at least `floor`, which is what rounding makes of 0. It counts as found only where
    the equation tells it: where as many rows as the breakdown point allows are infinitely far, any
    scale solves the equation to rounding.
    """
    target = share * loss(jnp.full((), jnp.inf, of.y.dtype))

    def equation(of: Problem, r: Array, s: Array) -> tuple[Array, Array, Array]:
        """What the mean loss is above its target, its slope in -log s, and whether s is 0."""

        def of_rows(_: Array, w: Array, r: Array) -> Array:
            rho, slope = jax.jvp(loss, (r / s,), (r / s,))
            terms = rho, slope, (~(jnp.abs(r) <= floor)).astype(r.dtype)
            return jnp.stack([jnp.sum(jnp.where(w > 0, w * term, 0)) for term in terms])

        total = jnp.sum(of.each())
        rho, slope, inexact = sums(of, of_rows, r) / total
        return rho - target, slope, inexact <= share

    def closer(of: Problem, r: Array, s: Array, _: Array) -> Array:
        """Newton's step towards the M-scale, in its logarithm."""
        above, slope, exact = equation(of, r, s)
        slope = jnp.maximum(slope, jnp.finfo(r.dtype).tiny)
        nearer = s * jnp.exp(jnp.clip(above / slope, -1, 1))
        return jnp.where(exact, floor, jnp.maximum(nearer, floor))

    def at_scale(s: Array) -> Loss:
        return lambda r: s * (s * loss(r / s))

    def minimum(of: Problem, steps: int, at: Starts) -> Estimate:
        return m_estimate(of, at_scale, closer, *at, steps)

    def with_own_scale(of: Problem, at: Estimate) -> Estimate:
        def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            s, _, i = state
            return closer(of, at.residuals, s, s), s, i + 1

        def goes_on(state: tuple[Array, Array, Array]) -> Array:
            s, last, i = state
            return (jnp.abs(s - last) > 1e-6 * s) & (i < 50)

        begin = closer(of, at.residuals, at.scale, at.scale), at.scale, jnp.int32(0)
        return at._replace(scale=lax.while_loop(goes_on, step, begin)[0])

    sample, groups, starts = _starts(of, loss, share, floor, key)
    ends = jax.vmap(partial(minimum, sample, 100 if groups == 1 else 8))(starts)
    if groups > 1:
        ends = lax.map(partial(minimum, of, 100), _distinct(ends.b, ends.scale))
        # One that is not there yet may have a scale that is too low.
        there = ends.converged | ~jnp.any(ends.converged)
    else:
        # Few rows: also where the steps did not suffice, the scale is made that of the residuals.
        ends = jax.vmap(partial(with_own_scale, sample))(ends)
        there = jnp.isfinite(ends.scale)
    lowest = jnp.argmin(jnp.where(there & ~jnp.isnan(ends.scale), ends.scale, jnp.inf))
    found = jax.tree.map(lambda x: x[lowest], ends)
    r = predictions(of, found.b) - of.y  # of all rows, and not of a sample
    _, slope, exact = equation(of, r, found.scale)
    told = exact | (slope > jnp.finfo(r.dtype).eps ** 0.5 * target)
    return found._replace(residuals=r, converged=found.converged & told)


def _starts(
    of: Problem, loss: Loss, share: Array, floor: Array, key: Array
) -> tuple[Problem, int, Starts]:
    """A sample of the rows, the number of groups it was dealt to, and the best fits of subsets."""
    n, k = len(of.y), len(of.constants)
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
    if math.comb(n, k) <= _SUBSETS:
        subsets = jnp.asarray([list(itertools.combinations(range(n), k))], jnp.int32)
    else:
        # In a row: less to compile.
        uniform = jax.random.uniform(draw, (_SUBSETS * k,), jnp.float32)
        subsets = uniform.reshape(groups, _SUBSETS // groups, k)
    # Of many rows float32 is enough to see which subsets are best: with y in units of its own.
    unit = jnp.where(of.size > 0, of.size, 1)
    dtype = of.y.dtype if taken * k <= _CAREFUL else jnp.dtype(jnp.float32)
    far = float(jnp.finfo(dtype).max) ** 0.4  # has finite squares, and more makes no difference
    q, y, w, short = jax.tree.map(
        lambda x: x.astype(dtype),
        (rows(sample), jnp.clip(sample.y / unit, -far, far), sample.each(), loss),
    )
    dealt = (jnp.swapaxes(x.reshape(-1, groups, *x.shape[1:]), 0, 1) for x in (q, y, w))
    count = _FINALISTS if groups == 1 else 5
    best = jax.vmap(lambda *group: _screened(short, share, count, *group))
    b, s = jax.tree.map(jnp.concatenate, best(*dealt, subsets))
    starts = b.astype(of.y.dtype) * unit, jnp.maximum(s.astype(of.y.dtype) * unit, floor)
    return sample, groups, starts


def _screened(
    loss: Loss, share: Array, count: int, q: Array, y: Array, w: Array, subsets: Array
) -> Starts:
    """The best of many subsets, after two steps of reweighting on these rows.

    `subsets` are the numbers of the rows, or random numbers to draw them by.
    """
    k = q.shape[1]
    size, w = jnp.sum(w > 0), w / jnp.sum(w)
    target = share.astype(y.dtype) * loss(jnp.full((), jnp.inf, y.dtype))
    tiny = 64 * jnp.finfo(y.dtype).eps  # far above what rounding leaves of a residual that is 0
    i, j = np.triu_indices(k)
    squares = q[:, i] * q[:, j]
    place = np.zeros((k, k), int)
    place[i, j] = place[j, i] = np.arange(len(i))

    def reweighted(pull: Array) -> Array:
        if len(y) * k <= _CAREFUL:
            root = jnp.sqrt(pull)
            return jax.vmap(lambda root: _least_squares(root[:, None] * q, root * y))(root)
        return jax.vmap(solve)((pull @ squares)[:, place], (pull * y) @ q)

    def nearer(s: Array, r: Array) -> Array:
        mean = loss(r / s[:, None]) @ w
        return jnp.maximum(s * jnp.sqrt(mean / target), tiny)

    def step(_: Array, at: Starts) -> Starts:
        b, s = at
        r = b @ q.T - y
        s = nearer(s, r)
        pull = w * weight(loss, r / s[:, None])
        return reweighted(pull), s

    if jnp.issubdtype(subsets.dtype, jnp.floating):
        subsets = jax.vmap(partial(_drawn, k, size))(subsets)
    b = jax.vmap(lambda subset: _least_squares(q[subset], y[subset]))(subsets)
    s = jnp.maximum(1.5 * _rough_median(jnp.abs(b @ q.T - y), w), tiny)
    b, s = lax.fori_loop(0, 2, step, (b, s))
    r = b @ q.T - y
    s = lax.fori_loop(0, 4, lambda _, s: nearer(s, r), s)
    # All subsets of few rows have those that are dropped, too.
    valid = jnp.all(jnp.isfinite(b), axis=1) & (s > 0) & jnp.all(subsets < size, axis=1)
    s = jnp.where(valid, s, jnp.inf)
    _, lowest = lax.top_k(-s, min(count, len(s)))
    return b[lowest], s[lowest]


def _distinct(b: Array, s: Array) -> Starts:
    """The minima, with NaN for what is the same as one before."""
    # Rows far out in X make minima that are 0.01 s apart, of which few starts lead to the lowest.
    near = jnp.max(jnp.abs(b[:, None] - b), axis=-1) <= 1e-3 * s
    again = jnp.any(jnp.tril(near, -1), axis=1)
    return jnp.where(again[:, None], jnp.nan, b), s


def _rough_median(x: Array, w: Array) -> Array:
    """Of each row of x >= 0, to an eighth part; the weights add up to 1.

    The steps of an M-scale are too short to come down from outliers to where it is.
    """
    dtype = x.dtype
    x = x.astype(jnp.float32)
    coarse = lax.bitcast_convert_type(x, jnp.int32) >> 20  # the exponent and three bits

    def halve(i: Array, low: Array) -> Array:
        middle = low + (1 << (10 - i))
        below = jnp.sum((coarse < middle[:, None]).astype(w.dtype) * w, axis=1)
        return jnp.where(below <= 0.5, middle, low)

    low = lax.fori_loop(0, 11, halve, jnp.zeros(len(x), jnp.int32))
    return lax.bitcast_convert_type(low << 20, x.dtype).astype(dtype)


def _drawn(k: int, size: Array, uniform: Array) -> Array:
    """The numbers of k of the first `size` rows, without replacement, by Floyd's method."""

    def draw(i: Array, rows: Array) -> Array:
        top = jnp.maximum(size - k + i, 0).astype(rows.dtype)
        row = jnp.minimum((uniform[i] * (top + 1)).astype(rows.dtype), top)
        return rows.at[i].set(jnp.where(jnp.any(rows == row), top, row))

    return lax.fori_loop(0, k, draw, jnp.full(k, -1, jnp.int32))


def _least_squares(a: Array, y: Array) -> Array:
    """The b of `a b = y`, by Gram and Schmidt's orthogonalisation of the columns.

    The normal equations would square what rows far out in X make of the condition, for which
    float32 has too few digits. Rows and columns are brought to unit size first.
    """
    k = a.shape[1]
    lengths = jnp.sqrt(jnp.sum(a * a, axis=0))
    empty = lengths == 0
    lengths = jnp.where(empty, 1, lengths)
    table = jnp.concatenate([a / lengths, y[:, None]], axis=1)

    def orthogonalise(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        table, triangle = state
        column = table[:, j]
        length = jnp.sqrt(jnp.sum(column * column))
        column = column / jnp.where(length > 0, length, 1)
        products = jnp.where(jnp.arange(k + 1) > j, column @ table, 0)
        products = products.at[j].set(length)
        table = table - column[:, None] * jnp.where(jnp.arange(k + 1) > j, products, 0)
        return table.at[:, j].set(column), triangle.at[j].set(products)

    start = table, jnp.zeros((k, k + 1), a.dtype)
    _, triangle = lax.fori_loop(0, k, orthogonalise, start)

    def substitute(i: Array, b: Array) -> Array:
        j = k - 1 - i
        pivot = triangle[j, j]
        known = triangle[j, :k] @ jnp.where(jnp.arange(k) > j, b, 0)
        return b.at[j].set(
            jnp.where(empty[j], 0, (triangle[j, k] - known) / jnp.where(empty[j], 1, pivot))
        )

    return lax.fori_loop(0, k, substitute, jnp.zeros(k, a.dtype)) / lengths
