"""M-estimates: reweighted least squares until it is close, then Newton's method.

At a fixed scale a step of reweighted least squares cannot raise the objective, whatever the loss,
but it shortens the distance to the solution by a constant factor only. Newton's method squares the
distance. A Newton step that does not lower the objective is taken back, and a step of reweighting
follows. Where the scale is estimated too, steps that hold it fixed converge slowly again; near the
end Newton's steps therefore move the coefficients and the scale together.

The loop ends when the equations of the coefficients, evaluated at the coefficients and the scale
that are returned, hold to rounding. That evaluation is what `converged` reports.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from robustloss._numerics.sums import joint_sums
from robustloss._regression import (
    Estimate,
    LossAtScale,
    Problem,
    both_predictions,
    crossed,
    dependent_columns,
    gram,
    part,
    predictions,
    solve,
    spaced,
    sums,
)
from robustloss.views import curvature, influence, weight

EstimateScale = Callable[[Problem, Array, Array, Array], Array]
"""Of residuals, the last scale, and how far off it may be: their scale, or closer to it."""

MANY = 2**16  # rows, for which a part of them shows where to start
_PART = 2**13  # rows of that part
_STEPS = 500
_CLIP = 1e4  # sizes of y: a start farther off than this costs steps and digits
_REACH = 30.0  # of a row, of which a typical one has the length 1
# Of the sum of |psi| |q|: an imbalance that sums of many rounded terms can leave.
_BALANCE = 0.75  # a power of eps
# Rounding of the residuals may hide at most this part of the pulls, or nothing can be verified.
_BLUR = 0.25
# Coefficients of rows of unit size move about as much as the scale that they follow. Much more, and
# the matrix of curvatures is nearly singular: too few rows are near the fit to tell.
_STIFFEST = 1e3
_STEEPEST = 0.995  # slope of the scale in itself, up to which the solution is looked for ahead
_SECANTS = 8
_LARGE = 0.02  # scales, for a step that need not be the last
_FEW = 8  # steps, after which those that are still large may be as small as they become


def least_squares(of: Problem, *, clipped: bool = False) -> Array:
    """To start from: its rounding is not refined. `clipped`: without the wildest values of y."""
    y = of.y
    if clipped:
        limit = _CLIP * jnp.where(of.size > 0, of.size, 1)
        y = jnp.clip(y, -limit, limit)

    def terms(q: Array, each: Array, y: Array) -> tuple[Array, Array]:
        return gram(q, each), q.T @ (each * y)

    return solve(*sums(of, terms, y))


def subsample(of: Problem) -> Problem | None:
    """A part of the rows, if they are many: where a convex problem may start from."""
    n = len(of.y)
    if n < MANY:
        return None
    return part(of, spaced(of.counted(), n, _PART))


class Equations(NamedTuple):
    """What a step is computed from, at some coefficients and their scale."""

    normal: Array
    """(k, k) the sum of `psi'(r) q q'`, or of `w(r) q q'` for a step of reweighting"""
    right: Array
    """(k, 1) the sum of `psi(r) q`; (k, 2) with its derivative by the scale"""
    balanced: Array
    """whether the sum of `psi(r) q` is 0 to rounding"""


def _equations(
    of: Problem,
    loss: Callable[..., Array],
    at: tuple[Array, Array, Array],
    newton: Array,
    last: tuple[Array, Array, Array],
    joint: bool,
) -> Equations:
    """The equations `sum(psi(r) q) = 0` at the b, r and s of `at`.

    `last` is how far the last step moved the residuals, what counts as still, and whether the
    equations may be balanced: where not, that is not computed.

    They count as balanced where each is 0 to rounding, relative to the sum of |psi| |q|. Rounding
    changes a residual by eps (|y| + |r| + |q b|), and psi by psi' times that: a row whose influence
    has levelled off blurs nothing, however far away it is. Where that blur hides the pulls
    themselves, as at a scale below the rounding of the data, nothing can be verified and the answer
    is no, unless every row that has an influence is met.

    A row that is far out in X and has an influence hides the equations of the others behind its
    own. So rows count no more than if they were at most `_REACH` away; or else the last step must
    have moved no row by more than `still`, or rounding.
    """
    b, r, s = at
    moved, still, candidate = last
    k = len(of.constants)
    typical = of.typical_size(b)

    def terms(q: Array, each: Array, r: Array, y: Array, moved: Array) -> tuple[Array, ...]:
        def counted(x: Array) -> Array:
            return jnp.where(each > 0, each * x, 0)

        psi, bend = influence(loss, r), curvature(loss, r)
        curve = jnp.where(newton, bend, weight(loss, r))
        pull = counted(psi)

        def sizes() -> tuple[Array, Array]:
            far = jnp.maximum(1, jnp.max(jnp.abs(q), axis=1))
            near = jnp.minimum(1, _REACH / far)
            rounding = jnp.finfo(r.dtype).eps * (jnp.abs(y) + jnp.abs(r) + typical * far)
            pulls, blurs = jnp.abs(pull), counted(jnp.abs(bend)) * rounding
            met = jnp.abs(r) <= 8 * rounding
            moves = ~(jnp.abs(moved) <= still + 8 * rounding)
            rows = (each > 0) & met, (pull != 0) & ~met, (each > 0) & moves
            over_rows = joint_sums(pulls * far, blurs * far, *(x.astype(r.dtype) for x in rows))
            columns = crossed(jnp.abs(q), jnp.column_stack([near * pulls, near * blurs]))
            return columns, jnp.stack(over_rows)

        nothing = jnp.zeros((k, 2), r.dtype), jnp.zeros(5, r.dtype)
        if joint:  # in one pass
            columns = counted(curve)[:, None] * q, pull, counted((psi - curve * r) / s)
            found = crossed(q, jnp.column_stack(columns))
        else:  # faster with the many starts of an S-estimate, which share q
            found = jnp.column_stack([gram(q, counted(curve)), q.T @ pull])
        return found, *lax.cond(candidate, sizes, lambda: nothing)

    found, columns, over_rows = sums(of, terms, r, of.y, moved)
    normal, right = found[:, :k], found[:, k:]
    pulls, blurs = columns.T
    far_pulls, far_blurs, met, missed, moves = over_rows
    clear = jnp.all((pulls > 0) & (blurs <= _BLUR * pulls) | dependent_columns(of))
    clear |= (missed == 0) & (met >= of.rank)
    part, total = jnp.finfo(r.dtype).eps ** _BALANCE, jnp.abs(right[:, 0])
    holds = jnp.all(total <= part * pulls + blurs)
    holds |= (moves == 0) & jnp.all(total <= part * far_pulls + far_blurs)
    return Equations(normal, right, candidate & clear & holds)


def _objective_change(
    of: Problem, loss: Callable[..., Array], r: Array, new: Array, moved: Array
) -> tuple[Array, Array]:
    """By how much the objective rises from r to `new`, and what rounding may have added.

    `moved` is `new - r`, known without the rounding of either. Where it is a small part of r, the
    change is taken from the influences, so that a row that is far away does not blur it.
    """
    each = of.each()
    before, after = loss(r), loss(new)
    pull, new_pull = influence(loss, r), influence(loss, new)
    near = jnp.abs(moved) <= 2.0**-8 * jnp.abs(r)
    change = jnp.where(near, 0.5 * moved * (pull + new_pull), after - before)
    largest = jnp.maximum(jnp.abs(pull), jnp.abs(new_pull))
    size = jnp.where(near, jnp.abs(moved) * largest, before + after)
    change, size = joint_sums(*(jnp.where(each > 0, each * x, 0) for x in (change, size)))
    return change, 16 * jnp.finfo(r.dtype).eps * size


def _follow_scale(
    scale: Callable[..., Array], s: Array, r: Array, v: Array, size: Array, may: Array
) -> tuple[Array, Array]:
    """The change t of s at which residuals `r - t v` have the scale s + t, by secants; their scale.

    t is 0 unless it `may` be followed. `size` is how far r has moved.
    """

    class Search(NamedTuple):
        steps: Array
        t: Array  # where the scale is evaluated next
        best: Array
        excess: Array  # of the scale over s + t, at the best t
        first: Array  # the excess at t = 0
        there: Array  # the scale at the best t
        slope: Array
        far: Array

    # One loop, of which the scale is a part once: it is most of what there is to compile.
    def step(at: Search) -> Search:
        there = scale(jnp.where(at.t == 0, r, r - at.t * v), s + at.t, at.far)
        excess = there - (s + at.t)
        start = at.steps == 0
        apart = jnp.where(start, 1, at.t - at.best)
        slope = jnp.where(start, 0, 1 + (excess - at.excess) / jnp.where(apart == 0, 1, apart))
        better = start | (jnp.abs(excess) < jnp.abs(at.excess))
        best, least = jnp.where(better, at.t, at.best), jnp.where(better, excess, at.excess)
        ahead = best + least / (1 - jnp.clip(slope, -2, _STEEPEST))
        ahead = jnp.clip(ahead, -0.9 * s, 2 * s)
        return Search(
            at.steps + 1, ahead, best, least, jnp.where(start, excess, at.first),
            jnp.where(better, there, at.there), slope, jnp.abs(ahead - best),
        )  # fmt: skip

    def goes_on(at: Search) -> Array:
        unsolved = jnp.abs(at.excess) > 0.1 * jnp.abs(at.first)
        return (at.steps == 0) | (may & ((at.steps < 3) | (unsolved & (at.steps < _SECANTS))))

    zero = jnp.zeros_like(s)
    begin = Search(jnp.int32(0), zero, zero, zero, zero, s, zero, size)
    end = lax.while_loop(goes_on, step, begin)
    return end.best, end.there


def m_estimate(
    of: Problem,
    loss: LossAtScale,
    estimate_scale: EstimateScale,
    start: Array,
    s: Array | None = None,
    steps: int = _STEPS,
    *,
    convex: bool = False,
    joint: bool = False,
) -> Estimate:
    """The b at which `sum(psi(q b - y; s) q) = 0` with `s = estimate_scale(of, q b - y, s)`.

    `estimate_scale` must be positive. `convex`: the loss is known to be. `joint`: Newton's steps
    are of b and s together, for a scale that is a function of the residuals alone and a loss whose
    unit it is; else each step takes s as fixed. Converged means that both equations hold to
    rounding at the b and s returned.
    """
    k, dtype = len(of.constants), of.y.dtype
    tolerance = jnp.finfo(dtype).eps ** 0.75
    dependent = dependent_columns(of)
    guess = of.size if s is None else s

    class State(NamedTuple):
        b: Array
        r: Array
        s: Array
        equations: Equations
        steps: Array
        moved: Array
        newton: Array
        limit: Array  # of a step, in units of s, below which Newton's may be next
        near: Array  # the same for one that follows the scale
        followed: Array
        rest: Array

    # The first step moves nothing: it is there to compute the residuals, the scale and the
    # equations, which a program would else contain twice.
    def step(at: State) -> State:
        first = at.steps < 0
        normal = at.equations.normal
        moves = solve(normal, at.equations.right)
        move, t = moves[:, 0], jnp.zeros_like(at.s)
        size = jnp.where(first, guess, jnp.max(jnp.abs(move)))
        if not joint:
            r, change = both_predictions(of, at.b - move, move)
            r, change = r - of.y, -change
            s = estimate_scale(of, r, at.s, size)
        else:
            by_scale = moves[:, 1]
            r, v = both_predictions(of, at.b - move, by_scale)
            r = r - of.y
            regular = jnp.max(jnp.abs(by_scale)) <= _STIFFEST
            may = at.newton & regular & (size <= at.near * at.s)
            t, s = _follow_scale(partial(estimate_scale, of), at.s, r, v, size, may)
            move, r = move + t * by_scale, jnp.where(t == 0, r, r - t * v)
            change = r - at.r
        follows = t != 0
        rise, noise = _objective_change(of, loss(at.s), at.r, r, change)
        # Where no row is near the fit there is no curvature to divide by.
        flat = jnp.any((jnp.diagonal(normal) <= 0) & ~dependent)
        taken = ~at.newton | (~flat & (follows | (rise <= noise)))
        moved = jnp.where(first, jnp.inf, jnp.max(jnp.abs(move)))
        # From afar, a loss with several minima could be led from the nearest to another; and
        # where its curvature jumps, round in circles.
        slow = ~(taken & (moved <= 0.5 * at.moved))
        lost = at.newton & ~follows & slow & (at.limit < jnp.inf)
        limit = jnp.where(lost, 0.1 * at.limit, at.limit)
        circles = at.followed & (moved > 0.9 * at.moved)
        near = jnp.where(circles, 0.1, jnp.where(slow, 1, 4)) * at.near
        # Of a step of Newton's, the distance left is about the square, and a part of another's.
        still = jnp.where(at.newton, tolerance**0.5, tolerance) * s
        same_scale = jnp.abs(s - at.s) <= tolerance * s

        b, r, s, moved, near, follows = (
            jnp.where(taken, new, old)
            for new, old in [
                (at.b - move, at.b), (r, at.r), (s, at.s), (moved, at.moved), (near, at.near),
                (follows, at.followed),
            ]
        )  # fmt: skip
        newton = taken & (moved <= limit * s)
        # A large step need not be followed by the sums that tell whether it was the last.
        candidate = taken & ((moved <= _LARGE * s) | (at.steps > _FEW))
        last = jnp.where(first, jnp.inf, change), still, candidate
        equations = _equations(of, loss(s), (b, r, s), newton, last, joint)
        rest = equations.balanced & (joint | same_scale)
        return State(b, r, s, equations, at.steps + 1, moved, newton, limit, near, follows, rest)

    def goes_on(at: State) -> Array:
        return ~at.rest & (at.steps < steps) & jnp.all(jnp.isfinite(at.b))

    no = jnp.asarray(False)
    nothing = Equations(jnp.eye(k, dtype=dtype), jnp.zeros((k, 1 + joint), dtype), no)
    limit = jnp.asarray(jnp.inf if convex else 0.1, dtype)
    begin = State(
        start, jnp.zeros_like(of.y), guess, nothing, jnp.int32(-1), jnp.full((), jnp.inf, dtype),
        no, limit, jnp.ones((), dtype) / 4, no, no,
    )  # fmt: skip
    end = lax.while_loop(goes_on, step, begin)
    finite = jnp.all(jnp.isfinite(end.b)) & jnp.isfinite(end.s)
    return Estimate(end.b, end.s, end.r, end.rest & finite, end.steps)


def met_exactly(of: Problem, found: Estimate) -> Estimate:
    """The fit through the rows that are met, where these are so many that the scale is 0.

    The M-estimate at a scale next to 0 is off it by a part of that scale.
    """

    def refine(_: int, b: Array) -> Array:
        r = predictions(of, b) - of.y

        def terms(q: Array, each: Array, r: Array, met: Array) -> Array:
            each = jnp.where(met, each, 0)
            return jnp.column_stack([gram(q, each), q.T @ jnp.where(each > 0, each * r, 0)])

        equations = sums(of, terms, r, met)
        move = solve(equations[:, :-1], equations[:, -1])
        told = jnp.max(jnp.abs(move)) <= _STIFFEST * found.scale
        return jnp.where(told, b - move, b)

    met = jnp.abs(found.residuals) <= 4 * found.scale
    b = lax.fori_loop(0, 2, refine, found.b)
    return found._replace(b=b, residuals=predictions(of, b) - of.y)
