"""S-estimates: the coefficients whose residuals have the smallest M-scale.

The M-scale of the residuals has many local minima, and the fit is robust because of where it
starts. Fast-S (Salibian-Barrera and Yohai 2006) draws many subsets of as few rows as determine a
fit: some subsets are free of outliers, whatever the other rows are. Each subset's fit takes two
steps of reweighting on a small group of the rows. The best fits of each group are taken to their
minimum on all groups together, and the distinct ones of these to their minimum on all rows.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustloss._numerics.order_statistics import smallest
from robustloss._regression import (
    Estimate,
    Problem,
    design_rows,
    first_rows,
    predictions,
    solve,
    subset,
    sum_over_rows,
)
from robustloss.linear.irls import m_estimate
from robustloss.types import Loss
from robustloss.views import weight

Starts = tuple[Array, Array]  # coefficients, a row for each start, and scales

_SUBSETS = 1000
_GROUPS = 5
_GROUP_ROWS = 400  # or 20 for each coefficient
_FINALISTS = 100  # of one group
_GROUP_FINALISTS = 5  # of each of several
# Rows times coefficients, up to which least squares are solved without normal equations: of few
# rows, one that lies far out in X may belong to most of the subsets that fit the others.
_FEW_NUMBERS = 1024


def s_estimate(problem: Problem, loss: Loss, share: Array, floor: Array, key: Array) -> Estimate:
    """The S-estimate, whose scale s solves `mean(loss(r / s)) = share loss(inf)`.

    The scale is at least `floor`, which is what rounding makes of 0. The scale counts as found only
    where its equation determines it: if as many rows as the breakdown point allows are infinitely
    far away, any scale solves the equation to rounding.
    """
    target = share * loss(jnp.full((), jnp.inf, problem.y.dtype))

    def equation(problem: Problem, r: Array, s: Array) -> tuple[Array, Array, Array]:
        """The mean loss minus its target, its derivative by -log s, and whether s is 0."""

        def terms(_: Array, weights: Array, r: Array) -> Array:
            rho, slope = jax.jvp(loss, (r / s,), (r / s,))
            columns = rho, slope, (~(jnp.abs(r) <= floor)).astype(r.dtype)
            return jnp.stack([jnp.sum(jnp.where(weights > 0, weights * x, 0)) for x in columns])

        total = jnp.sum(problem.row_weights())
        rho, slope, inexact = sum_over_rows(problem, terms, r) / total
        # As many rows as the breakdown point allows may be off the fit; shares are rounded.
        most = share * (1 + 8 * jnp.finfo(r.dtype).eps)
        return rho - target, slope, inexact <= most

    def scale_step(problem: Problem, r: Array, s: Array, _: Array) -> Array:
        """Newton's step towards the M-scale, in the logarithm of the scale."""
        excess, slope, exact = equation(problem, r, s)
        slope = jnp.maximum(slope, jnp.finfo(r.dtype).tiny)
        new = s * jnp.exp(jnp.clip(excess / slope, -1, 1))
        return jnp.where(exact, floor, jnp.maximum(new, floor))

    def loss_at_scale(s: Array) -> Loss:
        return lambda r: s * (s * loss(r / s))

    def minimum(problem: Problem, steps: int, start: Starts) -> Estimate:
        return m_estimate(problem, loss_at_scale, scale_step, *start, steps)

    def with_own_scale(problem: Problem, found: Estimate) -> Estimate:
        """Solves for the M-scale of the residuals."""

        def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            s, _, i = state
            return scale_step(problem, found.residuals, s, s), s, i + 1

        def goes_on(state: tuple[Array, Array, Array]) -> Array:
            s, last, i = state
            return (jnp.abs(s - last) > 1e-6 * s) & (i < 50)

        first = scale_step(problem, found.residuals, found.scale, found.scale)
        begin = first, found.scale, jnp.int32(0)
        return found._replace(scale=lax.while_loop(goes_on, step, begin)[0])

    sample, groups, starts = _starts(problem, loss, share, floor, key)
    ends = jax.vmap(partial(minimum, sample, 100 if groups == 1 else 8))(starts)
    if groups > 1:
        ends = lax.map(partial(minimum, problem, 100), _distinct(problem, ends))
        # The scale of an estimate that has not converged may be too low.
        eligible = ends.converged | ~jnp.any(ends.converged)
    else:
        # Few rows: where the steps did not suffice, the scale is solved for.
        ends = jax.vmap(partial(with_own_scale, sample))(ends)
        eligible = jnp.isfinite(ends.scale)
    # A start that is not finite has no residuals, and so no scale.
    finite = jnp.all(jnp.isfinite(ends.coefficients), axis=1) & ~jnp.isnan(ends.scale)
    lowest = jnp.argmin(jnp.where(eligible & finite, ends.scale, jnp.inf))
    found = jax.tree.map(lambda x: x[lowest], ends)
    r = predictions(problem, found.coefficients) - problem.y  # of all rows, and not of a sample
    _, slope, exact = equation(problem, r, found.scale)
    determined = exact | (slope > jnp.finfo(r.dtype).eps ** 0.5 * target)
    return found._replace(residuals=r, converged=found.converged & determined)


def _starts(
    problem: Problem, loss: Loss, share: Array, floor: Array, key: Array
) -> tuple[Problem, int, Starts]:
    """A sample of the rows, the number of its groups, and the best fits of subsets."""
    n, k = len(problem.y), len(problem.constants)
    subset_key, sample_key = jax.random.split(key)
    size = max(_GROUP_ROWS, 20 * k)
    groups = _GROUPS if n > _GROUPS * size else 1
    count = min(n, _GROUPS * size)
    eligible = problem.row_weights() > 0
    if count < n:
        lots = jnp.where(eligible, jax.random.uniform(sample_key, (n,)), jnp.inf)
        eligible &= lots <= smallest(lots, count)
    # Rows with a weight come first.
    sample = subset(problem, first_rows(eligible, count))
    # One row of random numbers is less to compile than a table.
    uniform = jax.random.uniform(subset_key, (_SUBSETS * k,), jnp.float32)
    uniform = uniform.reshape(groups, _SUBSETS // groups, k)
    dropping = problem.weighted_rows() is not None
    # Of many rows, float32 is enough to see which subsets are best, with y in units of its size.
    unit = jnp.where(problem.y_size > 0, problem.y_size, 1)
    dtype = problem.y.dtype if count * k <= _FEW_NUMBERS else jnp.dtype(jnp.float32)
    limit = float(jnp.finfo(dtype).max) ** 0.4  # its square is finite, and no fit reaches it
    q, y, weights, narrow_loss = jax.tree.map(
        lambda x: x.astype(dtype),
        (design_rows(sample), jnp.clip(sample.y / unit, -limit, limit), sample.row_weights(), loss),
    )
    dealt = (jnp.swapaxes(x.reshape(-1, groups, *x.shape[1:]), 0, 1) for x in (q, y, weights))
    finalists = _FINALISTS if groups == 1 else _GROUP_FINALISTS
    best = jax.vmap(lambda *group: _screened(narrow_loss, share, finalists, dropping, *group))
    b, s = jax.tree.map(jnp.concatenate, best(*dealt, uniform))
    coefficients = jax.vmap(problem.coefficients)(b.astype(unit.dtype) * unit)
    return sample, groups, (coefficients, jnp.maximum(s.astype(unit.dtype) * unit, floor))


def _screened(
    loss: Loss,
    share: Array,
    count: int,
    dropping: bool,
    q: Array,
    y: Array,
    weights: Array,
    uniform: Array,
) -> Starts:
    """The best fits of many subsets, after two steps of reweighting on these rows.

    The subsets are drawn by the random numbers `uniform`, a row for each subset. `dropping`: rows
    at the end may have the weight 0.
    """
    k = q.shape[1]
    size, weights = jnp.sum(weights > 0), weights / jnp.sum(weights)
    target = share.astype(y.dtype) * loss(jnp.full((), jnp.inf, y.dtype))
    least_scale = 64 * jnp.finfo(y.dtype).eps  # far above what rounding leaves of a residual of 0
    i, j = np.triu_indices(k)
    products = q[:, i] * q[:, j]
    position = np.zeros((k, k), int)
    position[i, j] = position[j, i] = np.arange(len(i))

    def weighted_least_squares(weights: Array) -> Array:
        if len(y) * k <= _FEW_NUMBERS:
            root = jnp.sqrt(weights)
            return jax.vmap(lambda root: _least_squares(root[:, None] * q, root * y))(root)
        return jax.vmap(solve)((weights @ products)[:, position], (weights * y) @ q)

    def scale_step(s: Array, r: Array) -> Array:
        mean = loss(r / s[:, None]) @ weights
        return jnp.maximum(s * jnp.sqrt(mean / target), least_scale)

    def step(_: Array, at: Starts) -> Starts:
        b, s = at
        r = b @ q.T - y
        s = scale_step(s, r)
        return weighted_least_squares(weights * weight(loss, r / s[:, None])), s

    subsets = _subsets(len(y), size, dropping, uniform)
    b = jax.vmap(lambda rows: _least_squares(q[rows], y[rows]))(subsets)
    s = jnp.maximum(1.5 * _rough_median(jnp.abs(b @ q.T - y), weights), least_scale)
    b, s = lax.fori_loop(0, 2, step, (b, s))
    r = b @ q.T - y
    s = lax.fori_loop(0, 4, lambda _, s: scale_step(s, r), s)
    # Among all subsets of few rows are subsets with rows that are dropped.
    valid = jnp.all(jnp.isfinite(b), axis=1) & (s > 0) & jnp.all(subsets < size, axis=1)
    s = jnp.where(valid, s, jnp.inf)
    _, lowest = lax.top_k(-s, min(count, len(s)))
    return b[lowest], s[lowest]


def _distinct(problem: Problem, ends: Estimate) -> Starts:
    """The minima, with NaN in the place of one that is the same as one before."""
    c, s = ends.coefficients, ends.scale
    distance = sum(jax.vmap(jax.vmap(problem.term_sizes))(c[:, None] - c))
    # Rows far out in X make distinct minima that are 0.01 s apart, so the same is a tenth of it.
    repeated = jnp.any(jnp.tril(distance <= 1e-3 * s, -1), axis=1)
    return jnp.where(repeated[:, None], jnp.nan, c), s


def _rough_median(x: Array, w: Array) -> Array:
    """The median of each row of x >= 0, to an eighth of itself; the weights add up to 1.

    The M-scale starts here, because its steps are too short to come down from a start that outliers
    have raised.
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


def _subsets(n: int, size: Array, dropping: bool, uniform: Array) -> Array:
    """(subsets, k) indices among the first `size` of n rows: all subsets if they are few enough.

    So a fit of few rows does not depend on chance, whether other rows are dropped or are not there.
    """
    count, k = uniform.shape
    few = k  # rows that have at most `count` subsets
    while few < n and math.comb(few + 1, k) <= count:
        few += 1
    every = np.array(list(itertools.combinations(range(few), k)), np.int32)
    if few == n:
        return jnp.asarray(every)
    drawn = jax.vmap(partial(_drawn, k, size))(uniform)
    if not dropping:
        return drawn
    every = np.concatenate([every, np.full((count - len(every), k), n, np.int32)])
    return jnp.where(size <= few, every, drawn)


def _drawn(k: int, size: Array, uniform: Array) -> Array:
    """The indices of k of the first `size` rows, without replacement, by Floyd's method."""

    def draw(i: Array, rows: Array) -> Array:
        top = jnp.maximum(size - k + i, 0).astype(rows.dtype)
        row = jnp.minimum((uniform[i] * (top + 1)).astype(rows.dtype), top)
        return rows.at[i].set(jnp.where(jnp.any(rows == row), top, row))

    return lax.fori_loop(0, k, draw, jnp.full(k, -1, jnp.int32))


def _least_squares(a: Array, y: Array) -> Array:
    """The b of `a b = y`, by Gram and Schmidt's orthogonalisation of the columns.

    The normal equations would square the condition number, which rows far out in X make large, and
    float32 has too few digits for the square. Columns are first brought to unit size.
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
