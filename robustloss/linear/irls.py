"""M-estimates: reweighted least squares until it is close, then Newton's method.

Reweighting cannot raise the objective at a fixed scale, whatever the loss, but comes closer by
a constant factor only; Newton's method squares the distance. A step of Newton's that does not
lower the objective is taken back, and one of reweighting follows. Where the scale is estimated
too, steps that take it as fixed come closer by a constant factor again, a poor one in a few data
sets of a thousand; so near the end they follow it along the line on which it leads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustloss._sums import joint_sums
from robustloss.linear._problem import (
    Problem,
    both_predictions,
    crossed,
    gram,
    part,
    predictions,
    solve,
    spaced,
    sums,
)
from robustloss.views import curvature, influence, weight

At = Callable[[Array], Callable[..., Array]]
"""The loss at a scale."""
Spread = Callable[[Problem, Array, Array, Array], Array]
"""Of residuals, the last scale, and how far off it may be: their scale, or closer to it."""

MANY = 2**16  # rows, for which a part of them shows where to start
_PART = 2**13


class Estimate(NamedTuple):
    """Where a solver ended."""

    b: Array
    scale: Array
    residuals: Array
    """q b - y, as a loss takes them"""
    converged: Array
    steps: Array


def least_squares(of: Problem) -> Array:
    """To start from: its rounding is not refined."""

    def terms(q: Array, each: Array, y: Array) -> tuple[Array, Array]:
        return gram(q, each), q.T @ (each * y)

    return solve(*sums(of, terms, of.y))


def thinned(of: Problem) -> Problem | None:
    """A part of the rows, if they are many: where a convex problem may start from."""
    n = len(of.y)
    if n < MANY:
        return None
    return part(of, spaced(of.counted(), n, _PART))


def _equations(
    of: Problem, loss: At, r: Array, s: Array, newton: Array, joint: bool
) -> tuple[Array, Array]:
    """The normal matrix and, as columns, the equations of b and what the scale does to them."""

    def terms(q: Array, each: Array, r: Array) -> Array:
        curve = jnp.where(newton, curvature(loss(s), r), weight(loss(s), r))
        pull = influence(loss(s), r)
        columns = [each * pull]
        if joint:
            columns.append(each * (pull - curve * r) / s)
        bent, *columns = (jnp.where(each > 0, x, 0) for x in (each * curve, *columns))
        if not joint:  # faster with the many starts of an S-estimate, which share q
            return jnp.column_stack([gram(q, bent), q.T @ columns[0]])
        return crossed(q, jnp.column_stack([q * bent[:, None], *columns]))  # in one pass

    found, k = sums(of, terms, r), len(of.constants)
    return found[:, :k], found[:, k:]


def _objectives(of: Problem, loss: Callable[..., Array], *residuals: Array) -> Array:
    def of_rows(_: Array, each: Array, *residuals: Array) -> Array:
        return jnp.sum(jnp.where(each > 0, each * loss(jnp.stack(residuals)), 0), axis=1)

    return sums(of, of_rows, *residuals)


def _followed(
    scale: Callable[..., Array], s: Array, r: Array, v: Array, size: Array, may: Array, room: Array
) -> tuple[Array, Array]:
    """The change t of s where residuals `r - t v` have the scale s + t, by a secant; their scale.

    t is 0 unless it `may` be followed and is at most `room`. `size` is what r has moved by.
    """

    # One loop, of which the scale is a part once: it is most of what there is to compile.
    def step(at: tuple[Array, ...]) -> tuple[Array, ...]:
        i, t, off, _, far = at
        there = scale(jnp.where(t == 0, r, r - t * v), s + t, far)
        off = jnp.where(i == 0, there - s, off)
        slope = (there - s - off) / jnp.where(off == 0, 1, off)
        # Where s is hard to follow, as a median is from row to row, at most five times as far.
        ahead = off / (1 - jnp.clip(slope, -2, 0.8))
        aim = jnp.where(i == 0, off, jnp.where(jnp.abs(ahead) <= room, ahead, 0))
        aim = jnp.where(may & (i < 2), aim, t)
        return i + 1, aim, off, there, jnp.abs(aim - t)

    zero = jnp.zeros_like(s)
    begin: tuple[Array, ...] = jnp.int32(0), zero, zero, s, size
    _, t, _, there, _ = lax.while_loop(lambda at: (at[0] == 0) | (may & (at[0] < 3)), step, begin)
    return t, there


def _bend(loss: At, each: Array, r: Array, s: Array, last_r: Array, last_s: Array) -> Array:
    """How far the influences are from what a step of Newton's took them to become, on average."""
    here = loss(last_s)
    pull, curve = influence(here, last_r), curvature(here, last_r)
    expected = pull + curve * (r - last_r) + (pull - curve * last_r) / last_s * (s - last_s)
    off = jnp.abs(influence(loss(s), r) - expected)
    total, curves = joint_sums(*(jnp.where(each > 0, each * x, 0) for x in (off, curve)))
    return total / jnp.abs(curves)


def m_estimate(
    of: Problem,
    loss: At,
    spread: Spread,
    start: Array,
    s: Array | None = None,
    steps: int = 500,
    *,
    joint: bool = False,
) -> Estimate:
    """The b at which `sum(psi(q b - y; s) q) = 0` with `s = spread(of, q b - y, s)`.

    `spread` must be positive. `joint`: Newton's steps are of b and s together, for a spread that
    is a function of the residuals alone and a loss whose unit it is; else each step takes s as
    fixed. Converged means that a step moved neither b nor s by more than rounding can tell, in
    units of s, or, if joint, that the next would not.
    """
    each = of.each()
    eps = jnp.finfo(of.y.dtype).eps
    tolerance = eps**0.75
    noise = 4 * eps * of.size  # of residuals

    class State(NamedTuple):
        b: Array
        r: Array
        s: Array
        steps: Array
        moved: Array
        newton: Array
        limit: Array  # of a step, in units of s, below which Newton's may be next
        near: Array  # the same for one that follows the scale
        followed: Array
        rest: Array

    def step(at: State) -> State:
        normal, right = _equations(of, loss, at.r, at.s, at.newton, joint)
        moves = solve(normal, right)
        move, t = moves[:, 0], jnp.zeros_like(at.s)
        size = jnp.max(jnp.abs(move))
        if not joint:
            r = predictions(of, at.b - move) - of.y
            s = spread(of, r, at.s, size)
        else:
            by_scale = moves[:, 1]
            r, v = both_predictions(of, at.b - move, by_scale)
            r = r - of.y
            may = at.newton & (size <= at.near * at.s)
            room = 16 * size / jnp.max(jnp.abs(by_scale))
            t, s = _followed(partial(spread, of), at.s, r, v, size, may, room)
            move, r = move + t * by_scale, jnp.where(t == 0, r, r - t * v)
        follows = t != 0
        b = at.b - move
        before, after = _objectives(of, loss(at.s), at.r, r)
        taken = ~at.newton | follows | (after <= before + 64 * eps * jnp.abs(before))
        moved = jnp.max(jnp.abs(move))
        still = jnp.maximum(moved, jnp.abs(s - at.s)) <= tolerance * s + noise
        if joint:  # The next step is 0 where the equations were as straight as this one took them.
            bend = _bend(loss, each, r, s, at.r, at.s) + jnp.abs(s - at.s - t)
            still |= at.newton & (bend <= 0.1 * tolerance * s)
        rest = taken & still
        # From afar, a loss with several minima could be led from the nearest to another; and
        # where its curvature jumps, round in circles.
        further = ~(taken & (moved <= 0.5 * at.moved))
        astray = at.newton & ~follows & further & (at.limit < jnp.inf)
        limit = jnp.where(astray, 0.1 * at.limit, at.limit)
        near = jnp.where(at.followed & further, 0.1 * at.near, at.near)
        new = State(b, r, s, at.steps + 1, moved, moved <= limit * s, limit, near, follows, rest)
        old = at._replace(steps=at.steps + 1, newton=jnp.asarray(False), limit=limit)
        return jax.tree.map(lambda x, y: jnp.where(taken, x, y), new, old)

    def goes_on(at: State) -> Array:
        return ~at.rest & (at.steps < steps) & jnp.all(jnp.isfinite(at.b))

    r = predictions(of, start) - of.y
    guess = of.size if s is None else s
    s = spread(of, r, guess, guess)
    convex = jnp.all((curvature(loss(s), r) >= 0) | (each == 0))
    limit = jnp.where(convex, jnp.inf, jnp.asarray(0.1, s.dtype))
    no, inf, near = jnp.asarray(False), jnp.full_like(s, jnp.inf), jnp.ones_like(s)
    begin = State(start, r, s, jnp.int32(0), inf, convex, limit, near, no, no)
    end = lax.while_loop(goes_on, step, begin)
    finite = jnp.all(jnp.isfinite(end.b)) & jnp.isfinite(end.s)
    return Estimate(end.b, end.s, end.r, end.rest & finite, end.steps)
