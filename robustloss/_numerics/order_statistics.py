"""Order statistics of one row, selected, not sorted for.

An order statistic takes a few counts over the data, a small part of the time of a sort, and is as
exact. A row x has the shape (n,). Its weights are None, where every entry counts as 1, integers
0 and 1, or floating; an entry that is dropped has the weight 0 and a finite x.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss._numerics.sums import joint_sums

_MANY = 2**14  # entries, of which a sample shows where to begin
_SAMPLE = 512


def median(x: Array, w: Array | None) -> Array:
    i, j = ranked(x, w, *_middle(x, w))
    return 0.5 * x[i] + 0.5 * x[j]


def bare_median(x: Array, w: Array | None, ends: Array | None = None) -> Array:
    """The same, not for differentiation; sooner if it is between two ends that are known."""
    low, high = _selected(x, w, *_middle(x, w), ends)
    return 0.5 * low + 0.5 * high


def near_median(x: Array, w: Array | None) -> Array:
    """An entry that 40 to 50 % of the entries are at or below, found in half the time."""
    rank, n = _middle(x, w)[0], count(x, w)
    return _selected(x, w, rank, rank, slack=n // 10)[0]


def _middle(x: Array, w: Array | None) -> tuple[Array, Array]:
    n = count(x, w)
    if is_weighted(w):
        return 0.5 * n * (1 - rounding(x)), 0.5 * n * (1 + rounding(x))
    return (n + 1) // 2, n // 2 + 1


def quartiles(x: Array, w: Array | None) -> tuple[Array, Array]:
    if w is not None and is_weighted(w):
        return _weighted_quartiles(x, w)
    ranks = (count(x, w) - 1) * jnp.asarray([1, 3], jnp.int32)
    i, j = lax.map(lambda rank: ranked(x, w, rank + 1, rank + 2), ranks >> 2)
    part = (ranks & 3).astype(x.dtype) / 4
    found = jnp.where(part == 0, x[i], (1 - part) * x[i] + part * x[j])
    return found[0], found[1]


def _weighted_quartiles(x: Array, w: Array) -> tuple[Array, Array]:
    order = jnp.argsort(x)
    x, w = x[order], w[order]
    above = jnp.cumsum(w)
    size = above[-1]
    unit = jnp.maximum(jnp.sum(w * w) / size, jnp.finfo(x.dtype).eps * size)

    def upto(share: float) -> Array:
        low = share * (size - unit)
        part = jnp.diff(jnp.clip(above, low, low + unit), prepend=low)
        return jnp.sum(jnp.where(part > 0, part * x, 0)) / jnp.sum(part)

    return upto(0.25), upto(0.75)


def smallest(x: Array, rank: ArrayLike) -> Array:
    """The entry of x, which is (n,), that has `rank` at or below it; not for differentiation."""
    return _selected(x, None, rank, rank)[0]


def ranked(x: Array, w: Array | None, low: Any, high: Any) -> tuple[Array, Array]:
    """Where the entries are that have these weights at or below them; the first of equal ones."""
    x = lax.stop_gradient(x)
    there, following = _selected(x, w, low, high)
    kept = True if w is None else w > 0
    return jnp.argmax((x == there) & kept), jnp.argmax((x == following) & kept)


def _selected(
    x: Array, w: Array | None, low: Any, high: Any, ends: Array | None = None, slack: Any = 0
) -> tuple[Array, Array]:
    """The least entries that have these weights at or below them, `high` next to `low`.

    A bracket (first, last] of the answer is narrowed, to the `ends` or what a sample says at
    first, then by interpolating between the weights up to its ends and aiming a little to both
    sides; every third time also by halving it as integers of the same order, which no data can
    slow down. Once few entries are left in it, they are met in turn. With `slack`, the answer may
    have so much less weight at or below it.
    """
    kept = True if w is None else w > 0
    sign = jnp.iinfo(as_integers(x).dtype).max
    everything = count(x, w)
    one = everything / x.size if is_weighted(w) else 1
    if ends is None and x.size >= _MANY:
        ends = _sampled(x, w, low / everything)

    def key(value: Array) -> Array:
        bits = as_integers(value)
        return jnp.where(bits < 0, bits ^ sign, bits)

    def number(key: Array) -> Array:
        return lax.bitcast_convert_type(jnp.where(key < 0, key ^ sign, key), x.dtype)

    def narrow(state: Any) -> Any:
        first, last, below, upto, steps = state
        entries = ((upto - below) / one).astype(x.dtype)
        part = ((low - below) / one).astype(x.dtype)
        aside = jnp.stack([-jnp.sqrt(entries), jnp.sqrt(entries)])
        guesses = first + (last - first) * ((part + aside) / entries)
        if ends is not None:
            guesses = jnp.where(steps == 0, ends, guesses)
        a, b = key(first), key(last)
        middle = number((a & b) + ((a ^ b) >> 1))  # their mean, which cannot overflow
        halve = jnp.stack([steps % 3 == 2, False]) | ~((guesses > first) & (guesses < last))
        guesses = jnp.where(halve, middle, guesses)
        nearer, further = jnp.min(guesses), jnp.max(guesses)
        upto_nearer, upto_further = weights_of(w, x <= nearer, x <= further)

        def third(lower: Array, central: Array, upper: Array) -> Array:
            central = jnp.where(upto_further >= low, central, upper)
            return jnp.where(upto_nearer >= low, lower, central)

        return (
            third(first, nearer, further),
            third(nearer, further, last),
            third(below, upto_nearer, upto_further),
            third(upto_nearer, upto_further, upto),
            steps + 1,
        )

    def meet(state: Any) -> Any:
        first, last, _, upto, _ = lax.while_loop(
            lambda state: (state[3] - state[2] > jnp.maximum(slack, 4 * one)) & (state[4] < 24),
            narrow,
            (*state[:4], jnp.int32(0)),
        )
        there = jnp.min(jnp.where(~(x <= first) & kept, x, jnp.inf))
        upto_there = weight_of(w, x <= there)
        return there, last, upto_there, upto, (upto_there < low - slack) & (there < jnp.inf)

    lowest = jnp.min(x, where=kept, initial=jnp.inf)
    # Below it by more than a subnormal number, which may count as 0.
    lower = lowest - jnp.maximum(jnp.abs(lowest), float(jnp.finfo(x.dtype).tiny))
    lower = jnp.where(lowest > -jnp.inf, lower, number(key(lowest) - 1))
    highest = jnp.max(x, where=kept, initial=-jnp.inf)
    start = lower, highest, jnp.zeros_like(everything), everything, jnp.asarray(True)
    there, *_ = lax.while_loop(lambda state: state[-1], meet, start)
    above = jnp.min(jnp.where((x > there) & kept, x, jnp.inf))
    following = jnp.where(weight_of(w, x <= there) >= high, there, above)
    return there, following


def _sampled(x: Array, w: Array | None, share: Array) -> Array:
    """What has most likely less than this share of the weight at or below it, and what has more."""
    some = slice(None, None, -(-x.size // _SAMPLE))
    x = x[some]
    w = jnp.ones_like(x) if w is None else w[some].astype(x.dtype)
    upto = jnp.sum(jnp.where(x <= x[:, None], w, 0), axis=1) / jnp.sum(w)
    off = 1.5 / _SAMPLE**0.5  # three standard errors
    ends = jnp.stack([share - off, share + off])[:, None]
    return jnp.min(jnp.where((upto >= ends) & (w > 0), x, jnp.inf), axis=1)


def in_order(x: Array, w: Array | None) -> tuple[Array, Array]:
    """What is kept in sorted order, then infinity; and how many are kept."""
    return jnp.sort(x if w is None else jnp.where(w > 0, x, jnp.inf)), count(x, w)


def is_weighted(w: Array | None) -> bool:
    return w is not None and jnp.issubdtype(w.dtype, jnp.floating)


def count(x: Array, w: Array | None) -> Array:
    return jnp.int32(x.size) if w is None else jnp.sum(w, dtype=w.dtype)


def weight_of(w: Array | None, chosen: Array) -> Array:
    """The weight of those chosen."""
    if w is not None and is_weighted(w):
        return jnp.sum(chosen.astype(w.dtype) * w, dtype=w.dtype)
    chosen = chosen if w is None else chosen & (w > 0)
    exact = chosen.size <= 2**24  # in floats, which are added up faster
    return jnp.sum(chosen, dtype=jnp.float32 if exact else jnp.int32).astype(jnp.int32)


def weights_of(w: Array | None, first: Array, second: Array) -> list[Array]:
    """The same of two choices, in the time of one."""
    if is_weighted(w):
        return [weight_of(w, first), weight_of(w, second)]
    chosen = (first, second) if w is None else (first & (w > 0), second & (w > 0))
    return joint_sums(*(x.astype(jnp.int32) for x in chosen))


def as_integers(x: Array) -> Array:
    """x >= 0 as integers of the same order."""
    return lax.bitcast_convert_type(x, jnp.int64 if x.dtype == jnp.float64 else jnp.int32)


def rounding(x: Array) -> float:
    """How far sums of weights may be from equal and count as equal."""
    return 8 * float(jnp.finfo(x.dtype).eps)
