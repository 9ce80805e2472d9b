"""M-estimates: reweighted least squares until the solution is close, then Newton's method.

At a fixed scale, a step of reweighted least squares cannot raise the objective, whatever the loss
is, but it shortens the distance to the solution only by a constant factor. Newton's method squares
the distance. A Newton step that raises the objective is taken back, and a step of reweighting
follows. Where the scale is estimated too, steps that hold the scale fixed would converge slowly
again. Near the end, Newton's steps therefore move the coefficients and the scale together.

The loop ends when the equations of the coefficients, evaluated at the coefficients and the scale
that are returned, hold to rounding. That evaluation is what `converged` reports.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustloss._numerics.sums import joint_sums
from robustloss._regression import (
    Estimate,
    LossAtScale,
    Problem,
    cross_product,
    dependent_columns,
    gram,
    predictions,
    solve,
    spaced_rows,
    subset,
    sum_over_rows,
    two_predictions,
)
from robustloss.views import curvature, influence, weight

EstimateScale = Callable[[Problem, Array, Array, Array], Array]
"""`estimate_scale(problem, residuals, last, distance)`: the scale of the residuals, or a step
towards it from the last scale, which is about this distance away."""

MANY_ROWS = 2**16  # from here on, a subsample shows where to start
_SUBSAMPLE = 2**13  # rows of it
_STEPS = 500
_SMALL = 0.75  # power of eps: a relative error that sums of many rounded terms can have
# In sizes of y: a start that one wild value moves farther costs steps and digits.
_FARTHEST_START = 1e4
# A row that is longer, where a typical row has the length 1, hides the equations of the others.
_LONGEST_ROW = 30.0
# Where the rounding of the residuals may change more than this part of the influences, nothing
# can be verified.
_BLUR = 0.25
# Coefficients of rows of unit size move about as much as the scale. Where they would move much
# more, the matrix of curvatures is nearly singular: too few rows near the fit determine them.
_STEEPEST = 1e3
_STEEPEST_SCALE = 0.995  # derivative of the scale estimate by the scale; above, steps are cut
_SECANTS = 5
# Part of a relative rounding error: influences that differ by less from what Newton's step expects
# count as linear along the step.
_NONLINEAR = 0.1
# After so many steps, the equations are verified after each step: rounding may keep the steps long,
# and where the fit is not unique, a long step may lead away from a solution.
_STEPS_UNVERIFIED = 8
# Scales: the first Newton step of a loss with several minima is at most this long, because a
# longer one could lead to another minimum than the nearest.
_NEWTON_STEP = 0.1
# Newton's steps shrink by more than this factor where the quadratic model holds; steps that stay of
# one size to a tenth are taken for a cycle. Either makes the trusted size smaller.
_FAST_STEP = 0.5
_CYCLING_STEP = 0.9
_CUT = 0.1


def least_squares(problem: Problem, *, clipped: bool = False) -> Array:
    """The b of least squares. `clipped`: with the wildest values of y cut off."""
    y = problem.y
    if clipped:
        limit = _FARTHEST_START * jnp.where(problem.y_size > 0, problem.y_size, 1)
        y = jnp.clip(y, -limit, limit)

    def terms(q: Array, weights: Array, y: Array) -> tuple[Array, Array]:
        return gram(q, weights), q.T @ (weights * y)

    return solve(*sum_over_rows(problem, terms, y))


def subsample(problem: Problem) -> Problem | None:
    """A part of the rows, if rows are many: a convex problem may start from its solution."""
    n = len(problem.y)
    if n < MANY_ROWS:
        return None
    return subset(problem, spaced_rows(problem.weighted_rows(), n, _SUBSAMPLE))


class LastStep(NamedTuple):
    """What the last step tells about the equations that it led to."""

    change: Array
    """(n,) of the residuals"""
    short: Array
    """a change of the residuals that counts as none"""
    same_scale: Array
    """whether the scale is that of the residuals"""


class Equations(NamedTuple):
    """`sum(psi(r) q) = 0` at some coefficients and their scale."""

    normal: Array
    """(k, k) the sum of `psi'(r) q q'`, or of `w(r) q q'` for a step of reweighting"""
    right: Array
    """(k, 1) the sum of `psi(r) q`; (k, 2) with its derivative by the scale"""


def _equations(
    problem: Problem,
    loss: Callable[..., Array],
    r: Array,
    s: Array,
    newton: Array,
    joint: bool,
) -> Equations:
    """The equations at residuals r and their scale s."""
    k = len(problem.constants)

    def terms(q: Array, weights: Array, r: Array) -> Array:
        def weighted(x: Array) -> Array:
            return jnp.where(weights > 0, weights * x, 0)

        psi = influence(loss, r)
        curve = jnp.where(newton, curvature(loss, r), weight(loss, r))
        if not joint:  # faster with the many starts of an S-estimate, which share q
            return jnp.column_stack([gram(q, weighted(curve)), q.T @ weighted(psi)])
        by_scale = (psi - curve * r) / s
        columns = [weighted(curve)[:, None] * q, weighted(psi), weighted(by_scale)]
        return cross_product(q, jnp.column_stack(columns))  # in one pass

    sums = sum_over_rows(problem, terms, r)
    return Equations(sums[:, :k], sums[:, k:])


def _balanced(
    problem: Problem,
    loss: Callable[..., Array],
    coefficients: Array,
    r: Array,
    last: LastStep,
) -> Array:
    """Whether the equations of the coefficients hold to rounding at their residuals r.

    Each sum must be 0 to rounding, relative to the sum of |psi| |q|. Rounding changes a residual by
    eps (|y| + |r| + size of the prediction's terms), and psi by psi' times that. So a row whose
    influence has levelled off adds no rounding error, however far away it is. Where rounding may
    change the influences themselves, as at a scale below the rounding of the data, nothing can be
    verified, and the equations are not balanced unless every row with an influence is met exactly.

    A row that is far out in X and has an influence hides the equations of the others behind its
    own. So rows count as if they were no longer than `_LONGEST_ROW`; or else the last step must
    have changed no residual by more than `last.short`, or rounding.
    """
    eps = jnp.finfo(r.dtype).eps
    constant, typical = problem.term_sizes(coefficients)

    def terms(
        q: Array, weights: Array, r: Array, y: Array, change: Array
    ) -> tuple[Array, Array, Array]:
        def weighted(x: Array) -> Array:
            return jnp.where(weights > 0, weights * x, 0)

        # Without the barrier, XLA writes |q| to memory, as it is the same for all coefficients.
        q, r = lax.optimization_barrier((q, r))
        length = jnp.maximum(1, jnp.max(jnp.abs(q), axis=1))
        shortened = jnp.minimum(1, _LONGEST_ROW / length)
        rounding = eps * (jnp.abs(y) + jnp.abs(r) + constant + typical * length)
        pull, blurs = weighted(influence(loss, r)), weighted(jnp.abs(curvature(loss, r))) * rounding
        pulls, met = jnp.abs(pull), jnp.abs(r) <= 8 * rounding
        moves = ~(jnp.abs(change) <= last.short + 8 * rounding)
        rows = (weights > 0) & met, (pull != 0) & ~met, (weights > 0) & moves
        totals = joint_sums(pulls * length, blurs * length, *(x.astype(r.dtype) for x in rows))
        columns = ((shortened * u)[:, None] * q for u in (pulls, blurs))
        sizes = jnp.stack([jnp.sum(jnp.abs(x), axis=0) for x in columns])
        return pull @ q, sizes, jnp.stack(totals)

    sums, sizes, totals = sum_over_rows(problem, terms, r, problem.y, last.change)
    imbalance, small = jnp.abs(sums), eps**_SMALL
    pulls, blurs = sizes
    long_pulls, long_blurs, met, missed, moving = totals
    clear = jnp.all((pulls > 0) & (blurs <= _BLUR * pulls) | dependent_columns(problem))
    clear |= (missed == 0) & (met >= problem.rank)
    balanced = jnp.all(imbalance <= small * pulls + blurs)
    balanced |= (moving == 0) & jnp.all(imbalance <= small * long_pulls + long_blurs)
    return clear & balanced


def _objective_change(
    problem: Problem, loss: Callable[..., Array], r: Array, new: Array, change: Array
) -> tuple[Array, Array]:
    """By how much the objective rises from residuals r to `new`, and how far rounding reaches.

    `change` is `new - r` without the rounding of either. Where it is a small part of r, the rise
    is computed from the influences, so that a row that is far away adds no rounding error.
    """
    weights = problem.row_weights()
    before, after = loss(r), loss(new)
    pull, new_pull = influence(loss, r), influence(loss, new)
    small = jnp.abs(change) <= 2.0**-8 * jnp.abs(r)
    rise = jnp.where(small, 0.5 * change * (pull + new_pull), after - before)
    largest = jnp.maximum(jnp.abs(pull), jnp.abs(new_pull))
    size = jnp.where(small, jnp.abs(change) * largest, before + after)
    rise, size = joint_sums(*(jnp.where(weights > 0, weights * x, 0) for x in (rise, size)))
    return rise, 16 * jnp.finfo(r.dtype).eps * size


def _follow_scale(
    scale_of: Callable[..., Array], s: Array, r: Array, v: Array, distance: Array, follow: Array
) -> tuple[Array, Array]:
    """The change t of s at which residuals `r - t v` have the scale s + t, by secants; their scale.

    t is 0 unless `follow`. `distance` is how far r has moved.
    """

    class Search(NamedTuple):
        secants: Array
        t: Array  # where the scale is evaluated next
        best: Array  # the t with the smallest excess
        excess: Array  # of the scale over s + t, at the best t
        first_excess: Array  # at t = 0
        scale: Array  # at the best t
        distance: Array  # between the best t and the next

    # One loop, in which the scale is evaluated in one place: the scale is most of what the
    # compiler has to compile.
    def secant(at: Search) -> Search:
        scale = scale_of(jnp.where(at.t == 0, r, r - at.t * v), s + at.t, at.distance)
        excess = scale - (s + at.t)
        first = at.secants == 0
        run = jnp.where(first, 1, at.t - at.best)
        slope = jnp.where(first, 0, 1 + (excess - at.excess) / jnp.where(run == 0, 1, run))
        better = first | (jnp.abs(excess) < jnp.abs(at.excess))
        best, least = jnp.where(better, at.t, at.best), jnp.where(better, excess, at.excess)
        t = best + least / (1 - jnp.clip(slope, -2, _STEEPEST_SCALE))
        t = jnp.clip(t, -0.9 * s, 2 * s)  # so that the scale stays positive
        return Search(
            at.secants + 1, t, best, least, jnp.where(first, excess, at.first_excess),
            jnp.where(better, scale, at.scale), jnp.abs(t - best),
        )  # fmt: skip

    def goes_on(at: Search) -> Array:
        unsolved = jnp.abs(at.excess) > 0.1 * jnp.abs(at.first_excess)
        more = (at.secants < 3) | (unsolved & (at.secants < _SECANTS))
        return (at.secants == 0) | (follow & more)

    zero = jnp.zeros_like(s)
    begin = Search(jnp.int32(0), zero, zero, zero, zero, s, distance)
    end = lax.while_loop(goes_on, secant, begin)
    return end.best, end.scale


class _State(NamedTuple):
    """Where an M-estimate is after some steps."""

    c: Array  # coefficients of x - center
    r: Array
    s: Array
    steps: Array
    last: LastStep
    step_size: Array  # of the last step accepted
    newton: Array  # whether the next step is Newton's
    newton_limit: Array  # scales: after a step up to this size, Newton's is next
    follow_limit: Array  # scales: a Newton step up to this size follows the scale
    followed: Array  # whether the last step did
    settled: Array  # whether the equations are expected to hold
    converged: Array  # whether they do


class _Move(NamedTuple):
    """A step that may be accepted."""

    c: Array
    r: Array
    s: Array
    change: Array  # of the residuals, without the rounding of either
    size: Array  # the largest change of a coefficient
    scale_change: Array  # the change of the scale that the step includes


def _proposed_step(
    problem: Problem,
    estimate_scale: EstimateScale,
    at: _State,
    equations: Equations,
    first: Array,
    guess: Array,
    joint: bool,
) -> _Move:
    """The step that the equations ask for. The first one is 0, for a scale near `guess`."""
    moves = solve(equations.normal, equations.right)
    step = moves[:, 0]
    size = jnp.where(first, guess, jnp.max(jnp.abs(step)))
    if not joint:
        moved = problem.coefficients(step)
        r, change = two_predictions(problem, at.c - moved, moved)
        r = r - problem.y
        s = estimate_scale(problem, r, at.s, size)
        return _Move(at.c - moved, r, s, -change, size, jnp.zeros_like(s))
    by_scale = moves[:, 1]
    c, c_by_scale = at.c - problem.coefficients(step), problem.coefficients(by_scale)
    r, v = two_predictions(problem, c, c_by_scale)
    r = r - problem.y
    regular = jnp.max(jnp.abs(by_scale)) <= _STEEPEST
    follow = at.newton & regular & (size <= at.follow_limit * at.s)
    t, s = _follow_scale(partial(estimate_scale, problem), at.s, r, v, size, follow)
    r = jnp.where(t == 0, r, r - t * v)
    size = jnp.max(jnp.abs(step + t * by_scale))
    return _Move(c - t * c_by_scale, r, s, r - at.r, size, t)


def _acceptable(
    problem: Problem, loss: LossAtScale, at: _State, equations: Equations, new: _Move
) -> Array:
    """Whether to take a step: any of reweighting, and Newton's if the objective does not rise."""
    followed = new.scale_change != 0
    rise, rounding = lax.cond(
        at.newton & ~followed,
        lambda: _objective_change(problem, loss(at.s), at.r, new.r, new.change),
        lambda: (jnp.zeros_like(new.s), jnp.zeros_like(new.s)),
    )
    # Where no row is near the fit, there is no curvature to divide by.
    curved = jnp.diagonal(equations.normal) > 0
    regular = jnp.all(curved | dependent_columns(problem))
    return ~at.newton | (regular & (followed | (rise <= rounding)))


def _settled(
    problem: Problem, loss: LossAtScale, at: _State, new: _Move, last: LastStep, joint: bool
) -> Array:
    """Whether the equations are expected to hold after a step, which is then verified."""
    short = (new.size <= last.short) & last.same_scale
    if not joint:
        return short
    # Newton's step leads to the solution where the influences are linear along the step.
    weights, before = problem.row_weights(), loss(at.s)
    psi, curve = influence(before, at.r), curvature(before, at.r)
    expected = psi + curve * new.change + (psi - curve * at.r) / at.s * (new.s - at.s)
    error = jnp.abs(influence(loss(new.s), new.r) - expected)
    errors, curves = joint_sums(*(jnp.where(weights > 0, weights * x, 0) for x in (error, curve)))
    scale_error = jnp.abs(new.s - at.s - new.scale_change)
    tolerance = _NONLINEAR * jnp.finfo(new.r.dtype).eps ** _SMALL * new.s
    linear = errors + scale_error * jnp.abs(curves) <= tolerance * jnp.abs(curves)
    return short | (at.newton & linear)


def _limits(at: _State, new: _Move, accepted: Array, size: Array) -> tuple[Array, Array]:
    """The sizes up to which Newton's steps, and steps that follow the scale, are trusted next.

    From afar, Newton's steps for a loss with several minima could lead from the nearest to another
    minimum. Where the curvature jumps, they could go round in circles.
    """
    slow = ~(accepted & (size <= _FAST_STEP * at.step_size))
    distrusted = at.newton & (new.scale_change == 0) & slow & (at.newton_limit < jnp.inf)
    newton_limit = jnp.where(distrusted, _CUT * at.newton_limit, at.newton_limit)
    cycling = at.followed & (size > _CYCLING_STEP * at.step_size)
    return newton_limit, at.follow_limit * jnp.where(cycling, _CUT, jnp.where(slow, 1, 4))


def m_estimate(
    problem: Problem,
    loss: LossAtScale,
    estimate_scale: EstimateScale,
    start: Array,
    s: Array | None = None,
    max_steps: int = _STEPS,
    *,
    convex: bool = False,
    joint: bool = False,
) -> Estimate:
    """The coefficients at which `sum(psi(r; s) q) = 0` and `s = estimate_scale(problem, r, s)`.

    `start` are coefficients of x - center. `estimate_scale` must be positive. `convex`: the loss is
    known to be. `joint`: Newton's steps are of the coefficients and s together, for a scale that is
    a function of the residuals alone and a loss whose unit is the scale; else each step takes s as
    fixed. Converged means that both equations hold to rounding at the values returned.
    """
    k, dtype = len(problem.constants), problem.y.dtype
    tolerance = jnp.finfo(dtype).eps ** _SMALL
    guess = problem.y_size if s is None else s
    no, infinity = jnp.asarray(False), jnp.full((), jnp.inf, dtype)
    trivial = Equations(jnp.eye(k, dtype=dtype), jnp.zeros((k, 1 + joint), dtype))

    # The first step moves nothing: it computes the residuals and their scale, which the program
    # would else contain twice.
    def iterate(at: _State) -> _State:
        first = at.steps < 0
        equations = lax.cond(
            first,
            lambda: trivial,
            lambda: _equations(problem, loss(at.s), at.r, at.s, at.newton, joint),
        )
        new = _proposed_step(problem, estimate_scale, at, equations, first, guess, joint)
        accepted = _acceptable(problem, loss, at, equations, new)
        # The distance left is about the square of a Newton step, and a part of another step.
        short = jnp.where(at.newton, tolerance**0.5, tolerance) * new.s
        same_scale = joint | (jnp.abs(new.s - at.s) <= tolerance * new.s)
        last = LastStep(new.change, short, same_scale)
        steps = at.steps + 1
        settled = _settled(problem, loss, at, new, last, joint) | (steps > _STEPS_UNVERIFIED)
        size = jnp.where(first, jnp.inf, new.size)
        newton_limit, follow_limit = _limits(at, new, accepted, size)
        taken = _State(
            new.c, new.r, new.s, steps, last, size, size <= newton_limit * new.s, newton_limit,
            follow_limit, new.scale_change != 0, settled & ~first, no,
        )  # fmt: skip
        refused = at._replace(steps=steps, newton=no, newton_limit=newton_limit, settled=no)
        return jax.tree.map(partial(jnp.where, accepted), taken, refused)

    def goes_on(at: _State) -> Array:
        return ~at.converged & (at.steps < max_steps) & jnp.all(jnp.isfinite(at.c))

    # Equations that are expected to hold are verified outside of the inner loop: a verification
    # costs as much as a step, and a batch of fits then verifies once for all of them.
    def iterate_and_verify(at: _State) -> _State:
        at = lax.while_loop(lambda at: ~at.settled & goes_on(at), iterate, at._replace(settled=no))
        balanced = _balanced(problem, loss(at.s), at.c, at.r, at.last)
        return at._replace(converged=balanced & at.last.same_scale)

    newton_limit = infinity if convex else jnp.asarray(_NEWTON_STEP, dtype)
    follow_limit = jnp.ones((), dtype) / 4  # 1 after the first step
    no_step = LastStep(jnp.zeros_like(problem.y), infinity, no)
    begin = _State(
        start, jnp.zeros_like(problem.y), guess, jnp.int32(-1), no_step, infinity, no, newton_limit,
        follow_limit, no, no, no,
    )  # fmt: skip
    end = lax.while_loop(goes_on, iterate_and_verify, begin)
    finite = jnp.all(jnp.isfinite(end.c)) & jnp.isfinite(end.s)
    return Estimate(end.c, end.s, end.r, end.converged & finite, end.steps)


def met_exactly(problem: Problem, found: Estimate) -> Estimate:
    """The fit through the rows that are met exactly, where these are so many that the scale is 0.

    The M-estimate at a scale near 0 differs from this fit by a part of that scale.
    """

    def refine(_: int, c: Array) -> Array:
        r = predictions(problem, c) - problem.y

        def terms(q: Array, weights: Array, r: Array, met: Array) -> Array:
            weights = jnp.where(met, weights, 0)
            right = q.T @ jnp.where(weights > 0, weights * r, 0)
            return jnp.column_stack([gram(q, weights), right])

        equations = sum_over_rows(problem, terms, r, met)
        step = solve(equations[:, :-1], equations[:, -1])
        determined = jnp.max(jnp.abs(step)) <= _STEEPEST * found.scale
        return jnp.where(determined, c - problem.coefficients(step), c)

    met = jnp.abs(found.residuals) <= 4 * found.scale
    c = lax.fori_loop(0, 2, refine, found.coefficients)
    return found._replace(coefficients=c, residuals=predictions(problem, c) - problem.y)
