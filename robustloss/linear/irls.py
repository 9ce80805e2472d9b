"""M-estimates: reweighted least squares until it is close, then Newton's method.

Reweighting cannot raise the objective at a fixed scale, whatever the loss, but comes closer by
a constant factor only; Newton's method squares the distance. A step of Newton's that does not
lower the objective is taken back, and one of reweighting follows. Where the scale is estimated
too, steps that take it as fixed come closer by a constant factor again, a poor one in a few data
sets of a thousand; so near the end they take its gradient along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustloss.linear._problem import Problem, gram, part, predictions, solve, spaced, sums
from robustloss.views import curvature, influence, weight

At = Callable[[Array], Callable[..., Array]]
"""The loss at a scale."""
Spread = Callable[[Problem, Array, Array], Array]
"""The scale of residuals, or what comes closer to it than the last one."""

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
    """With one step of refinement."""

    def right(q: Array, each: Array, y: Array) -> Array:
        return q.T @ (each * y)

    normal, of_y = sums(of, lambda q, each, y: (gram(q, each), right(q, each, y)), of.y)
    b = solve(normal, of_y)
    return b + solve(normal, sums(of, right, of.y - predictions(of, b)))


def thinned(of: Problem) -> Problem | None:
    """A part of the rows, if they are many: where a convex problem may start from."""
    n = len(of.y)
    if n < MANY:
        return None
    return part(of, spaced(of.counted(), n, _PART))


def _move(equations: Array, newton: Array, near: Array) -> tuple[Array, Array, Array]:
    """The next step; whether it follows the scale, close to the end only; how much that falls."""
    k = len(equations)
    normal, terms = equations[:, :k], equations[:, k:]
    if terms.shape[1] == 1:
        return solve(normal, terms[:, 0]), jnp.asarray(False), jnp.zeros_like(near)
    move, by_scale = solve(normal, terms[:, :2]).T
    slope = terms[:, 2]
    whole = move - by_scale * (slope @ move) / (1 + slope @ by_scale)  # Sherman and Morrison
    size = jnp.max(jnp.abs(move))
    follows = newton & (size <= near) & (jnp.max(jnp.abs(whole)) <= 16 * size)
    move = jnp.where(follows, whole, move)
    return move, follows, jnp.where(follows, slope @ move, 0)


def _bend(loss: At, each: Array, r: Array, s: Array, last_r: Array, last_s: Array) -> Array:
    """How far the influences are from what a step of Newton's took them to become, on average."""
    here = loss(last_s)
    pull, curve = influence(here, last_r), curvature(here, last_r)
    expected = pull + curve * (r - last_r) + (pull - curve * last_r) / last_s * (s - last_s)
    off = jnp.abs(influence(loss(s), r) - expected)
    total, curves = (jnp.sum(jnp.where(each > 0, each * x, 0)) for x in (off, curve))
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

    def objective(s: Array, r: Array) -> Array:
        return jnp.sum(jnp.where(each > 0, each * loss(s)(r), 0))

    class State(NamedTuple):
        b: Array
        r: Array
        s: Array
        slope: tuple[Array, ...]  # the gradient of s in r, if joint
        steps: Array
        moved: Array
        newton: Array
        limit: Array  # of a step, in units of s, below which Newton's may be next
        near: Array  # the same for one that follows the scale
        followed: Array
        rest: Array

    def at_residuals(r: Array, s: Array) -> tuple[Array, tuple[Array, ...]]:
        if not joint:
            return spread(of, r, s), ()
        s, back = jax.vjp(lambda r: spread(of, r, s), r)
        return s, back(jnp.ones_like(s))

    def step(at: State) -> State:
        here = loss(at.s)

        def equations(q: Array, each: Array, r: Array, *slope: Array) -> Array:
            curve = jnp.where(at.newton, curvature(here, r), weight(here, r))
            pull = influence(here, r)
            terms = [each * pull]
            for g in slope:  # what the scale does to the equations, and the residuals to it
                terms += [each * (pull - curve * r) / at.s, g]
            bent, *terms = (jnp.where(each > 0, term, 0) for term in (each * curve, *terms))
            if not joint:  # faster with the many starts of an S-estimate, which share q
                return jnp.column_stack([gram(q, bent), q.T @ terms[0]])
            return q.T @ jnp.column_stack([q * bent[:, None], *terms])  # in one pass

        found = sums(of, equations, at.r, *at.slope)
        move, follows, falls = _move(found, at.newton, at.near * at.s)
        b = at.b - move
        r = predictions(of, b) - of.y
        before, after = objective(at.s, at.r), objective(at.s, r)
        taken = ~at.newton | follows | (after <= before + 64 * eps * jnp.abs(before))
        s, slope = at_residuals(r, at.s)
        moved = jnp.max(jnp.abs(move))
        still = jnp.maximum(moved, jnp.abs(s - at.s)) <= tolerance * s + noise
        if joint:  # The next step is 0 where the equations were as straight as this one took them.
            bend = _bend(loss, each, r, s, at.r, at.s) + jnp.abs(s - at.s + falls)
            still |= at.newton & (bend <= 0.1 * tolerance * s)
        rest = taken & still
        # From afar, a loss with several minima could be led from the nearest to another; and
        # where its curvature jumps, round in circles.
        further = ~(taken & (moved <= 0.5 * at.moved))
        astray = at.newton & ~follows & further & (at.limit < jnp.inf)
        limit = jnp.where(astray, 0.1 * at.limit, at.limit)
        near = jnp.where(at.followed & further, 0.1 * at.near, at.near)
        new = State(
            b, r, s, slope, at.steps + 1, moved, moved <= limit * s, limit, near, follows, rest
        )
        old = at._replace(steps=at.steps + 1, newton=jnp.asarray(False), limit=limit)
        return jax.tree.map(lambda x, y: jnp.where(taken, x, y), new, old)

    def goes_on(at: State) -> Array:
        return ~at.rest & (at.steps < steps) & jnp.all(jnp.isfinite(at.b))

    r = predictions(of, start) - of.y
    s, slope = at_residuals(r, of.size if s is None else s)
    convex = jnp.all((curvature(loss(s), r) >= 0) | (each == 0))
    limit = jnp.where(convex, jnp.inf, jnp.asarray(0.1, s.dtype))
    no, inf, near = jnp.asarray(False), jnp.full_like(s, jnp.inf), jnp.full_like(s, 0.3)
    begin = State(start, r, s, slope, jnp.int32(0), inf, convex, limit, near, no, no)
    end = lax.while_loop(goes_on, step, begin)
    finite = jnp.all(jnp.isfinite(end.b)) & jnp.isfinite(end.s)
    return Estimate(end.b, end.s, end.r, end.rest & finite, end.steps)
