"""The primal-dual interior point of Frisch and Newton: coefficients next to the optimum.

The method has the predictor and corrector of Mehrotra (1992), as in Portnoy and Koenker (1997). It
takes about twenty steps for any number of rows, and up to a hundred for extreme levels of data
with heavy tails.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss._regression import gram, solve
from robustloss.linear.quantile.program import Program, quantile_loss

_STEPS = 400  # several times what the hardest data in the tests take
# The part of the way to the boundary that a step goes: the value of Portnoy and Koenker (1997).
_TO_BOUNDARY = 0.99995
# The inequalities start with this part of the mean residual left, so that none starts at its end.
_INITIAL_SLACK = 1e-3


class _Interior(NamedTuple):
    """A point inside of all inequalities, primal and dual."""

    x: Array
    """(n,) dual variables in (0, 1)"""
    s: Array
    """(n,) `1 - x`"""
    b: Array
    """(k,) coefficients"""
    z: Array
    """(n,) multiplier of `x >= 0`"""
    w: Array
    """(n,) multiplier of `x <= 1`; `z - w = a b - y`"""
    gap: Array
    """sum of `x z + s w`: how far the objective is above the dual one"""
    steps: Array


class _Direction(NamedTuple):
    """A change of each variable; that of s is minus that of x."""

    x: Array
    b: Array
    z: Array
    w: Array


def frisch_newton(
    program: Program, start: Array, tolerance: ArrayLike
) -> tuple[Array, Array, Array]:
    """Coefficients next to the optimum, a lower bound of the objective, and the number of steps.

    The dual program: maximise `y'x - (1 - level) y'1` over `0 <= x <= 1` with
    `a'x = (1 - level) a'1 - fixed.gradient`. A dropped row takes no part: its x stays where it is.
    The bound is that of the rows that take part.
    """
    a, y, _, level, _ = program
    value = jnp.sum(quantile_loss(y - a @ start, level))

    def goes_on(at: _Interior) -> Array:
        now = _total(program, quantile_loss(at.w - at.z, level))
        closed = at.gap <= tolerance * (now + tolerance * value)
        return ~closed & (at.steps < _STEPS) & (at.gap > 0)

    begin = _initial(program, start)
    end = lax.while_loop(goes_on, lambda at: _mehrotra_step(program, at), begin)
    bound = _total(program, (end.x - (1 - level)) * y)
    return end.b, bound, end.steps


def _initial(program: Program, b: Array) -> _Interior:
    """The interior point at the coefficients b with all x equal."""
    a, y, kept, level, _ = program
    r = a @ b - y
    size = jnp.max(jnp.abs(r), where=kept, initial=0)
    size = jnp.where(size > 0, size, 1)
    slack = _INITIAL_SLACK * jnp.mean(jnp.abs(r)) + jnp.finfo(y.dtype).eps * size
    z = jnp.maximum(r, 0) + jnp.where(kept, slack, 0)
    w = z - r
    x = jnp.full_like(y, 1 - level)
    return _Interior(x, 1 - x, b, z, w, _total(program, x * z + (1 - x) * w), jnp.int32(0))


def _total(program: Program, terms: Array) -> Array:
    return jnp.sum(jnp.where(program.kept, terms, 0))


def _mehrotra_step(program: Program, at: _Interior) -> _Interior:
    """Newton's step to the boundary predicts how far the gap closes; a second one corrects it."""
    a, _, kept, level, fixed = program
    q = jnp.where(kept, 1 / (at.z / at.x + at.w / at.s), 0)
    r = at.z - at.w
    normal = gram(a, q)
    right = (1 - level) * jnp.sum(a, axis=0) - fixed.gradient
    infeasibility = right - a.T @ jnp.where(kept, at.x, 1 - level)
    # With r = a b - y, a change db of b changes z - w by a db.
    db = -solve(normal, a.T @ (q * r) + infeasibility)
    dx = -q * (a @ db + r)
    affine = _Direction(dx, db, -at.z * (1 + dx / at.x), -at.w * (1 - dx / at.s))
    predicted = _move(program, at, affine)
    # The smaller the predicted gap, the closer to the boundary the corrected step may end.
    mu = predicted.gap * (predicted.gap / at.gap) ** 2 / (2 * jnp.sum(kept))
    curve_x, curve_s = affine.x * affine.z, -affine.x * affine.w
    centering = jnp.where(kept, mu * (1 / at.x - 1 / at.s) - curve_x / at.x + curve_s / at.s, 0)
    db = -solve(normal, a.T @ (q * (r - centering)) + infeasibility)
    dx = -q * (a @ db + r - centering)
    dz = (mu - curve_x - at.z * dx) / at.x - at.z
    dw = (mu - curve_s + at.w * dx) / at.s - at.w
    new = _move(program, at, _Direction(dx, db, dz, dw))._replace(steps=at.steps + 1)
    # Once rounding outweighs what is left of the gap, a step gives no number or a negative gap.
    valid = jnp.isfinite(new.gap) & (new.gap >= 0) & jnp.all(jnp.isfinite(new.b))
    return jax.tree.map(lambda v, u: jnp.where(valid, v, u), new, at._replace(gap=-at.gap))


def _move(program: Program, at: _Interior, d: _Direction) -> _Interior:
    """The point in this direction, nearly at the first boundary on the way or at the whole step."""
    kept = program.kept

    def distance(v: Array, dv: Array) -> Array:
        falls = kept & (dv < 0)
        return jnp.min(jnp.where(falls, -v / jnp.where(falls, dv, -1), jnp.inf))

    primal = jnp.minimum(distance(at.x, d.x), distance(at.s, -d.x))
    dual = jnp.minimum(distance(at.z, d.z), distance(at.w, d.w))
    fx, fz = (jnp.minimum(_TO_BOUNDARY * length, 1) for length in (primal, dual))
    x, s, z, w = at.x + fx * d.x, at.s - fx * d.x, at.z + fz * d.z, at.w + fz * d.w
    return _Interior(x, s, at.b + fz * d.b, z, w, _total(program, x * z + s * w), at.steps)
