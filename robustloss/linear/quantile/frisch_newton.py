"""The primal-dual interior point: next to the optimum of a quantile regression.

Mehrotra's predictor and corrector. It takes some twenty steps, whatever the number of rows; for
extreme levels of heavy tails a hundred, as other solvers do.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustloss._regression import gram, solve
from robustloss.linear.quantile.simplex import Others, quantile_loss


class _Interior(NamedTuple):
    x: Array
    s: Array
    b: Array
    z: Array
    w: Array
    gap: Array
    steps: Array


def frisch_newton(
    a: Array,
    y: Array,
    kept: Array,
    level: Array,
    others: Others,
    start: Array,
    tolerance: ArrayLike,
    steps: int = 400,
) -> tuple[Array, Array, Array]:
    """b next to the optimum, and what no other b can be below.

    The dual: maximise y'x - (1 - level) y'1 over 0 <= x <= 1 with a'x = (1 - level) a'1, less
    what others pull; z and w are what is left of the inequalities, z - w = a b - y.
    """
    n = jnp.sum(kept)
    right = (1 - level) * jnp.sum(a, axis=0) - others.pull
    # A row that is dropped takes no part: its x stays where it is.
    r = a @ start - y
    size = jnp.max(jnp.abs(r), where=kept, initial=0)
    size = jnp.where(size > 0, size, 1)
    tiny = 1e-3 * jnp.mean(jnp.abs(r)) + jnp.finfo(y.dtype).eps * size
    z = jnp.maximum(r, 0) + jnp.where(kept, tiny, 0)
    w = z - r
    x = jnp.full_like(y, 1 - level)

    def lengths(at: _Interior, dx: Array, dz: Array, dw: Array) -> tuple[Array, Array]:
        def room(v: Array, dv: Array) -> Array:
            falls = kept & (dv < 0)
            return jnp.min(jnp.where(falls, -v / jnp.where(falls, dv, -1), jnp.inf))

        primal = jnp.minimum(room(at.x, dx), room(at.s, -dx))
        dual = jnp.minimum(room(at.z, dz), room(at.w, dw))
        return jnp.minimum(0.99995 * primal, 1), jnp.minimum(0.99995 * dual, 1)

    def total(v: Array) -> Array:
        return jnp.sum(jnp.where(kept, v, 0))

    def step(at: _Interior) -> _Interior:
        q = jnp.where(kept, 1 / (at.z / at.x + at.w / at.s), 0)
        r = at.z - at.w
        normal = gram(a, q)
        missing = right - a.T @ jnp.where(kept, at.x, 1 - level)
        # Predict. With r = a b - y, what moves b by db moves z - w by a db.
        db = -solve(normal, a.T @ (q * r) + missing)
        dx = -q * (a @ db + r)
        dz, dw = -at.z * (1 + dx / at.x), -at.w * (1 - dx / at.s)
        fx, fz = lengths(at, dx, dz, dw)
        # Correct, towards the central path.
        gap = total(at.x * at.z + at.s * at.w)
        left = total((at.x + fx * dx) * (at.z + fz * dz) + (at.s - fx * dx) * (at.w + fz * dw))
        mu = left * (left / gap) ** 2 / (2 * n)
        curve_x, curve_s = dx * dz, -dx * dw
        push = jnp.where(kept, mu * (1 / at.x - 1 / at.s) - curve_x / at.x + curve_s / at.s, 0)
        db = -solve(normal, a.T @ (q * (r - push)) + missing)
        dx = -q * (a @ db + r - push)
        dz = (mu - curve_x - at.z * dx) / at.x - at.z
        dw = (mu - curve_s + at.w * dx) / at.s - at.w
        fx, fz = lengths(at, dx, dz, dw)
        x, s, z, w = at.x + fx * dx, at.s - fx * dx, at.z + fz * dz, at.w + fz * dw
        b = at.b + fz * db
        gap = total(x * z + s * w)
        new = _Interior(x, s, b, z, w, gap, at.steps + 1)
        # Where rounding has the last word, the gap is no longer a number.
        sound = jnp.isfinite(gap) & (gap >= 0) & jnp.all(jnp.isfinite(b))
        return jax.tree.map(lambda v, u: jnp.where(sound, v, u), new, at._replace(gap=-at.gap))

    value = jnp.sum(quantile_loss(-r, level))

    def goes_on(at: _Interior) -> Array:
        now = total(quantile_loss(at.w - at.z, level))
        small = at.gap <= tolerance * (now + tolerance * value)
        return ~small & (at.steps < steps) & (at.gap > 0)

    s = 1 - x
    begin = _Interior(x, s, start, z, w, total(x * z + s * w), jnp.int32(0))
    end = lax.while_loop(goes_on, step, begin)
    bound = jnp.sum(jnp.where(kept, (end.x - (1 - level)) * y, 0))
    return end.b, bound, end.steps
