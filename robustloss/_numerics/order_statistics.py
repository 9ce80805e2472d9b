"""Order statistics of one row by selection, without a sort.

Selection counts the entries below a guess a few times, which takes a small part of the time of a
sort and is as exact. A row x has the shape (n,). Its weights w are None, where every entry counts
as 1, or integers 0 and 1, or floating numbers, all of the shape (n,); a dropped entry has the
weight 0 and a finite x. The *weight at* a value is the sum of the weights of the entries at or
below it: without weights, a rank.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss._numerics.sums import joint_sums

_SAMPLED_LENGTH = 2**14  # the shortest row whose first bracket comes from a sample
_SAMPLE_SIZE = 512
# Passes of narrowing before the least entry of the interval is taken. Equal entries cannot be
# separated, so without a limit the narrowing would not end.
_MAX_PASSES = 24
_FEW_ENTRIES = 4  # left in the interval, that are taken one by one


def median(x: Array, w: Array | None) -> Array:
    i, j = rank_indices(x, w, *_median_ranks(x, w))
    return 0.5 * x[i] + 0.5 * x[j]


def median_value(x: Array, w: Array | None, bracket: Array | None = None) -> Array:
    """The median, not for differentiation.

    A `bracket`, (2,), is a guess of two numbers below and above the median. If it is right, the
    median is found sooner.
    """
    low, high = _order_statistics(x, w, *_median_ranks(x, w), bracket)
    return 0.5 * low + 0.5 * high


def near_median(x: Array, w: Array | None) -> Array:
    """An entry that 40 to 50 % of the entries are at or below, found in half the time."""
    rank, n = _median_ranks(x, w)[0], total_weight(x, w)
    return _order_statistics(x, w, rank, rank, slack=n // 10)[0]


def _median_ranks(x: Array, w: Array | None) -> tuple[Array, Array]:
    """The weights at the two entries whose mean is the median."""
    n = total_weight(x, w)
    if is_weighted(w):
        return 0.5 * n * (1 - rounding_tolerance(x)), 0.5 * n * (1 + rounding_tolerance(x))
    return (n + 1) // 2, n // 2 + 1


def quartiles(x: Array, w: Array | None) -> tuple[Array, Array]:
    if w is not None and is_weighted(w):
        return _weighted_quartiles(x, w)
    ranks = (total_weight(x, w) - 1) * jnp.asarray([1, 3], jnp.int32)  # in quarters, from 0
    i, j = lax.map(lambda rank: rank_indices(x, w, rank + 1, rank + 2), ranks >> 2)
    fraction = (ranks & 3).astype(x.dtype) / 4
    interpolated = jnp.where(fraction == 0, x[i], (1 - fraction) * x[i] + fraction * x[j])
    return interpolated[0], interpolated[1]


def _weighted_quartiles(x: Array, w: Array) -> tuple[Array, Array]:
    order = jnp.argsort(x)
    x, w = x[order], w[order]
    cumulative = jnp.cumsum(w)
    size = cumulative[-1]
    unit = jnp.maximum(jnp.sum(w * w) / size, jnp.finfo(x.dtype).eps * size)

    def quantile(p: float) -> Array:
        start = p * (size - unit)
        parts = jnp.diff(jnp.clip(cumulative, start, start + unit), prepend=start)
        return jnp.sum(jnp.where(parts > 0, parts * x, 0)) / jnp.sum(parts)

    return quantile(0.25), quantile(0.75)


def smallest(x: Array, rank: ArrayLike) -> Array:
    """The entry of x with this rank, counted from 1; not for differentiation."""
    return _order_statistics(x, None, rank, rank)[0]


def rank_indices(x: Array, w: Array | None, low: Any, high: Any) -> tuple[Array, Array]:
    """The indices of the order statistics with these weights; of equal entries, the first."""
    x = lax.stop_gradient(x)
    found, successor = _order_statistics(x, w, low, high)
    kept = True if w is None else w > 0
    return jnp.argmax((x == found) & kept), jnp.argmax((x == successor) & kept)


def _order_statistics(
    x: Array, w: Array | None, low: Any, high: Any, bracket: Array | None = None, slack: Any = 0
) -> tuple[Array, Array]:
    """The least entries at which the weight is at least `low` and at least `high`.

    `high` is `low` or so little more that the second entry is the first or the next larger one.

    The search narrows an interval (first, last] that holds the first entry. In the first pass, the
    guesses are the `bracket` if there is one, or come from a sample if the row is long. In later
    passes, they interpolate between the weights at the two ends, one a little below the target and
    one a little above. In every third pass, one guess halves the interval in the order of floating
    numbers, so that no data can slow the search down. Once few entries are left in the interval,
    they are taken in order. With `slack`, the weight at the first entry may be less than `low` by
    this much.
    """
    kept = True if w is None else w > 0
    total = total_weight(x, w)
    mean_weight = total / x.size if is_weighted(w) else 1
    if bracket is None and x.size >= _SAMPLED_LENGTH:
        bracket = _sampled_bracket(x, w, low / total)

    def unsettled(state: Any) -> Array:
        _, _, weight_first, weight_last, passes = state
        few = jnp.maximum(slack, _FEW_ENTRIES * mean_weight)
        return (weight_last - weight_first > few) & (passes < _MAX_PASSES)

    def take_next(state: Any) -> Any:
        """Narrows the interval and takes the least entry in it."""
        first, last, _, weight_last, _ = lax.while_loop(
            unsettled,
            lambda state: _narrowed(state, x, w, low, mean_weight, bracket),
            (*state[:4], jnp.int32(0)),
        )
        entry = jnp.min(jnp.where(~(x <= first) & kept, x, jnp.inf))
        weight = weight_sum(w, x <= entry)
        unfinished = (weight < low - slack) & (entry < jnp.inf)
        return entry, last, weight, weight_last, unfinished

    lowest = jnp.min(x, where=kept, initial=jnp.inf)
    # The interval starts below the lowest entry by more than a subnormal number, which may count
    # as 0.
    start = lowest - jnp.maximum(jnp.abs(lowest), float(jnp.finfo(x.dtype).tiny))
    start = jnp.where(lowest > -jnp.inf, start, _from_key(_to_key(lowest) - 1, x.dtype))
    highest = jnp.max(x, where=kept, initial=-jnp.inf)
    initial = start, highest, jnp.zeros_like(total), total, jnp.asarray(True)
    found, *_ = lax.while_loop(lambda state: state[-1], take_next, initial)
    next_larger = jnp.min(jnp.where((x > found) & kept, x, jnp.inf))
    successor = jnp.where(weight_sum(w, x <= found) >= high, found, next_larger)
    return found, successor


def _narrowed(
    state: Any, x: Array, w: Array | None, low: Any, mean_weight: Any, bracket: Array | None
) -> Any:
    """One pass of `_order_statistics`: the third of the interval that holds the entry."""
    first, last, weight_first, weight_last, passes = state
    entries = ((weight_last - weight_first) / mean_weight).astype(x.dtype)
    position = ((low - weight_first) / mean_weight).astype(x.dtype)
    margins = jnp.stack([-jnp.sqrt(entries), jnp.sqrt(entries)])
    guesses = first + (last - first) * ((position + margins) / entries)
    if bracket is not None:
        guesses = jnp.where(passes == 0, bracket, guesses)
    a, b = _to_key(first), _to_key(last)
    middle = _from_key((a & b) + ((a ^ b) >> 1), x.dtype)  # the mean, which cannot overflow
    outside = ~((guesses > first) & (guesses < last))
    halve = jnp.stack([passes % 3 == 2, False]) | outside
    guesses = jnp.where(halve, middle, guesses)
    lower, upper = jnp.min(guesses), jnp.max(guesses)
    weight_lower, weight_upper = weight_sums(w, x <= lower, x <= upper)

    def select(below: Array, between: Array, above: Array) -> Array:
        """One of three, by the third of the interval that holds the entry."""
        between = jnp.where(weight_upper >= low, between, above)
        return jnp.where(weight_lower >= low, below, between)

    return (
        select(first, lower, upper),
        select(lower, upper, last),
        select(weight_first, weight_lower, weight_upper),
        select(weight_lower, weight_upper, weight_last),
        passes + 1,
    )


def _to_key(value: Array) -> Array:
    """Integers of the same order as the floating numbers, negative ones included."""
    bits = as_integers(value)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _from_key(key: Array, dtype: Any) -> Array:
    """The inverse of `_to_key`."""
    bits = jnp.where(key < 0, key ^ jnp.iinfo(key.dtype).max, key)
    return lax.bitcast_convert_type(bits, dtype)


def _sampled_bracket(x: Array, w: Array | None, share: Array) -> Array:
    """Two numbers that most likely have the quantile at this share of the weight between them."""
    sample = slice(None, None, -(-x.size // _SAMPLE_SIZE))
    x = x[sample]
    w = jnp.ones_like(x) if w is None else w[sample].astype(x.dtype)
    shares = jnp.sum(jnp.where(x <= x[:, None], w, 0), axis=1) / jnp.sum(w)
    margin = 1.5 / _SAMPLE_SIZE**0.5  # three standard errors of a share of 1/2
    limits = jnp.stack([share - margin, share + margin])[:, None]
    return jnp.min(jnp.where((shares >= limits) & (w > 0), x, jnp.inf), axis=1)


def sorted_entries(x: Array, w: Array | None) -> tuple[Array, Array]:
    """The entries kept in sorted order, with infinity for the others; and the number kept."""
    return jnp.sort(x if w is None else jnp.where(w > 0, x, jnp.inf)), total_weight(x, w)


def is_weighted(w: Array | None) -> bool:
    """Whether the weights are floating numbers."""
    return w is not None and jnp.issubdtype(w.dtype, jnp.floating)


def total_weight(x: Array, w: Array | None) -> Array:
    return jnp.int32(x.size) if w is None else jnp.sum(w, dtype=w.dtype)


def weight_sum(w: Array | None, chosen: Array) -> Array:
    """The total weight of the chosen entries."""
    if w is not None and is_weighted(w):
        return jnp.sum(chosen.astype(w.dtype) * w, dtype=w.dtype)
    chosen = chosen if w is None else chosen & (w > 0)
    exact = chosen.size <= 2**24  # all counts are exact in float32, in which a sum is faster
    return jnp.sum(chosen, dtype=jnp.float32 if exact else jnp.int32).astype(jnp.int32)


def weight_sums(w: Array | None, first: Array, second: Array) -> list[Array]:
    """The total weights of two choices, in the time of one."""
    if is_weighted(w):
        return [weight_sum(w, first), weight_sum(w, second)]
    chosen = (first, second) if w is None else (first & (w > 0), second & (w > 0))
    return joint_sums(*(x.astype(jnp.int32) for x in chosen))


def as_integers(x: Array) -> Array:
    """The bits of x. For x >= 0, they are integers of the same order."""
    return lax.bitcast_convert_type(x, jnp.int64 if x.dtype == jnp.float64 else jnp.int32)


def rounding_tolerance(x: Array) -> float:
    """The relative difference up to which sums of weights count as equal: 8 eps of x's type."""
    return 8 * float(jnp.finfo(x.dtype).eps)
