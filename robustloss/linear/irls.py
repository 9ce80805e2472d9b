"""M-estimates: Newton's steps while the loss bends upward at every row, reweighting where not.

Reweighted least squares cannot raise the objective at a fixed scale, whatever the loss, but
comes closer by a constant factor only; Newton's method squares the distance. A step of Newton's
that does not lower the objective is taken back, and one of reweighting follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustloss.linear._problem import Problem, gram, solve
from robustloss.scale import mad
from robustloss.views import curvature, influence, weight

At = Callable[[Array], Callable[..., Array]]
"""The loss at a scale."""


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
    each = of.each()
    normal = gram(of.q, each)
    b = solve(normal, of.q.T @ (each * of.y))
    return b + solve(normal, of.q.T @ (each * (of.y - of.q @ b)))


def m_estimate(
    of: Problem, loss: At, scale: Callable[[Array], Array], start: Array, steps: int = 500
) -> Estimate:
    """The b at which `q' psi(q b - y; s) = 0` with `s = scale(q b - y)`.

    `scale` must be positive. Converged means that a step moved neither b nor s by more than
    rounding can tell, in units of s.
    """
    each = of.each()
    eps = jnp.finfo(of.y.dtype).eps
    tolerance = eps**0.75
    noise = 4 * eps * mad(of.y, center=0.0, where=of.keep)  # of residuals

    def objective(s: Array, r: Array) -> Array:
        return jnp.sum(jnp.where(each > 0, each * loss(s)(r), 0))

    class State(NamedTuple):
        b: Array
        r: Array
        s: Array
        steps: Array
        reweigh: Array
        rest: Array

    def step(at: State) -> State:
        here = loss(at.s)
        bend = curvature(here, at.r)
        newton = jnp.all((bend >= 0) | (each == 0)) & ~at.reweigh
        pull = of.q.T @ (each * influence(here, at.r))
        curve = jnp.where(newton, bend, weight(here, at.r))
        move = solve(gram(of.q, jnp.where(each > 0, each * curve, 0)), pull)
        b = at.b - move
        r = of.q @ b - of.y
        before, after = objective(at.s, at.r), objective(at.s, r)
        lower = after <= before + 64 * eps * jnp.abs(before)
        taken = ~newton | lower
        s = scale(r)
        shift = jnp.maximum(jnp.max(jnp.abs(move)), jnp.abs(s - at.s))
        rest = taken & (shift <= tolerance * s + noise)
        new = State(b, r, s, at.steps + 1, jnp.asarray(False), rest)
        old = at._replace(steps=at.steps + 1, reweigh=jnp.asarray(True))
        return jax.tree.map(lambda x, y: jnp.where(taken, x, y), new, old)

    def goes_on(at: State) -> Array:
        return ~at.rest & (at.steps < steps) & jnp.all(jnp.isfinite(at.b))

    r = of.q @ start - of.y
    no = jnp.asarray(False)
    begin = State(start, r, scale(r), jnp.int32(0), no, no)
    end = lax.while_loop(goes_on, step, begin)
    finite = jnp.all(jnp.isfinite(end.b)) & jnp.isfinite(end.s)
    return Estimate(end.b, end.s, end.r, end.rest & finite, end.steps)
