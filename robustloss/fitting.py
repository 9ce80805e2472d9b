"""Fits of any model by any optax optimiser, compiled whole."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from robustloss._arguments import (
    at_least_float32,
    check_loss,
    mask,
    ratios,
    real_array,
    relative,
    with_leaves,
)
from robustloss.reduce import mean, total

__all__ = ["Fit", "fit"]

Params = Any  # a pytree of floating arrays
Inputs = Any  # a pytree of arrays whose first axis counts the rows
Model = Callable[[Params, Inputs], Array]
Objective = Callable[..., Array]


class Optimizer(Protocol):
    """An `optax.GradientTransformation`, told by its parts: optax is imported when it is used."""

    @property
    def init(self) -> Callable[..., Any]: ...

    @property
    def update(self) -> Callable[..., Any]: ...


class Fit(NamedTuple):
    """What `fit` found. A pytree: under vmap each field has the batch axis in front."""

    params: Params
    """The parameters after the last step, as the pytree that was given."""
    value: Array
    """The mean loss at `params`, over all rows kept."""
    steps: Array
    """How many steps were taken."""
    converged: Array
    """Whether the tests that `fit` describes held at `params`: a minimum, as far as they see."""
    history: Array
    """The objective before each step and after the last, `history[: steps + 1]`; the last is
    repeated to the end. In a mini-batch fit it is the objective of each step's batch."""


def fit(
    loss: Callable[..., Array],
    model: Model,
    params: Params,
    inputs: Inputs,
    targets: ArrayLike,
    *,
    optimizer: Optimizer,
    steps: int,
    tolerance: float | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    batch_size: int | None = None,
    key: Array | None = None,
) -> Fit:
    """Minimises the mean loss of `model(params, inputs) - targets` over `params`.

    The loop is one compiled program; it is compiled again only for another shape, model,
    optimizer object, number of steps or loss function, not for another `delta` in a
    `functools.partial`. It can be vmapped over data sets, starts and loss parameters, runs on
    sharded arrays as it is, and can be differentiated in forward mode (a loop of unknown
    length has no reverse mode in JAX).

    It stops when four things hold at what is returned, and `converged` says that they did:

    - the value changed by at most `tolerance` of itself in the last step (in the last epoch,
      with mini-batches). Below `tolerance` of the first value, of that;
    - each entry of the gradient is at most `tolerance**(2/3)` of its own size: of the largest
      it has been, or would have been at the start if the rows' pulls had random signs. So the
      units of a parameter do not matter;
    - no step lowers the value by more than `tolerance` of itself, says the quadratic that has
      the gradient and the curvature found here. Conjugate gradients look for that step, as far
      as 100 products with the Hessian matrix go;
    - the curvature is nowhere negative, in as many products from a random direction. A start
      where the gradient is exactly 0 must have some curvature too, or the value 0: a plateau of
      a redescending loss, or a network of zeros, is at rest but no minimum.

    It also stops, unconverged, where a value is not finite. The gradient of `absolute_error`
    jumps at its minimum instead of getting small, so such a fit is not reported as converged
    unless the minimum is flat. Nor is a fit under weight decay, such as `optax.adamw`: it comes
    to rest where the mean loss still has a gradient, at the minimum of another function than the
    one that was given. Where a model cannot be differentiated twice, the last two are left out.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`.
        model: `model(params, inputs) -> predictions`, of the targets' shape.
        params: where to start, a pytree of floating arrays.
        inputs: what the model takes: a pytree of arrays whose first axis counts the rows.
        targets: real numbers; the first axis counts the rows.
        optimizer: any optax transformation, `optax.lbfgs` with its line search included.
        steps: the most steps to take.
        tolerance: see above; by default 1e-12 in float64 and 1e-6 in float32. 0 takes all
            steps, unless the gradient becomes 0.
        where: booleans that broadcast to the targets; rows of which nothing is kept may hold
            anything, in inputs and targets.
        weights: finite numbers >= 0 that broadcast to the targets; only their ratios count.
        batch_size: rows per step, drawn without replacement in each epoch; None takes all.
            The gradient of a batch is, on average over batches, that of all rows.
        key: a `jax.random.key`, needed with `batch_size`.

    Returns:
        A `Fit`.

    Raises:
        ValueError: no steps, a negative tolerance, a batch size outside [1, rows], a missing
            key, rows that do not agree, or predictions of another shape than the targets.
        TypeError: parameters or data that are not real numbers, an optimizer that is none.

    >>> x = jnp.arange(8.0)
    >>> y = (2 * x + 1).at[3].set(99.0)
    >>> def line(params, x):
    ...     return params["slope"] * x + params["intercept"]
    >>> start = {"slope": 0.0, "intercept": 0.0}
    >>> found = fit(rl.huber, line, start, x, y, optimizer=optax.lbfgs(), steps=100)
    >>> print(f"{found.params['slope']:.2f} x + {found.params['intercept']:.2f}, {found.converged}")
    1.99 x + 1.19, True
    """
    check_loss(loss)
    if not all(callable(getattr(optimizer, part, None)) for part in ("init", "update")):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be an optax GradientTransformation, got {kind}")
    targets = real_array("targets", targets)
    params = jax.tree_util.tree_map_with_path(_floating, params)
    leaves = jax.tree.leaves(params)
    if not sum(leaf.size for leaf in leaves):
        raise ValueError("params must hold at least one number, got none")
    inputs = jax.tree.map(partial(_rows, len(targets) if targets.ndim else None), inputs)
    if targets.size == 0:
        raise ValueError(f"targets must have at least one row, got shape {targets.shape}")
    try:
        steps = operator.index(steps)
    except TypeError:
        raise TypeError(f"steps must be an integer, got {steps!r}") from None
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if tolerance is None:
        tolerance = 1e-12 if _widest(leaves) == jnp.float64 else 1e-6
    if not isinstance(tolerance, jax.core.Tracer) and not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    keep = None if where is None else mask(where, targets.shape)
    w = None if weights is None else _weights(weights, targets.shape, where)
    # Told here, where delta is still a number and the shapes can be named.
    jax.eval_shape(lambda: mean(loss, _predictions(model, params, inputs, targets.shape), targets))
    loss = with_leaves(loss)
    model = with_leaves(model, jax.Array, np.ndarray)
    if batch_size is not None:
        _check_batches(batch_size, key, targets, jax.tree.leaves(loss))
    return _fit(
        optimizer, steps, batch_size,
        loss, model, params, inputs, targets, keep, w, tolerance, key,
    )  # fmt: skip


@partial(jax.jit, static_argnums=range(3))
def _fit(
    optimizer: Any, steps: int, batch_size: int | None,
    loss: Partial, model: Partial, params: Params, inputs: Inputs, targets: Array,
    keep: Array | None, weights: Array | None, tolerance: Array, key: Array | None,
) -> Fit:  # fmt: skip
    if keep is not None:
        # A dropped row becomes a copy of a kept one, lest a NaN in it reach the gradient.
        kept = jnp.any(keep.reshape(len(keep), -1), axis=1)
        index = jnp.where(kept, jnp.arange(len(kept)), jnp.argmax(kept))
        inputs = jax.tree.map(lambda x: jnp.where(jnp.any(kept), x[index], 0), inputs)

    wide = _widest(jax.tree.leaves(params))
    weights = None if weights is None else weights.astype(wide)
    size = jnp.asarray(targets.size, wide) if keep is None else jnp.sum(keep, dtype=wide)
    size = size if weights is None else jnp.sum(weights, dtype=wide)

    def objective(params: Params, loss: Callable[..., Array] = loss) -> Array:
        predictions, y = model(params, inputs).astype(wide), targets.astype(wide)
        return mean(loss, predictions, y, where=keep, weights=weights).astype(wide)

    def with_signs(key: Array) -> Array:
        signs = jax.random.rademacher(key, targets.shape, wide)
        gradient = jax.grad(objective)(params, lambda r: signs.astype(r.dtype) * loss(r))
        return jnp.abs(_flat(gradient, wide))

    def of_batch(params: Params, take: Array, real: Array) -> Array:
        x, y, k, w = jax.tree.map(lambda leaf: leaf[take], (inputs, targets, keep, weights))
        here = jnp.broadcast_to(jnp.expand_dims(real, range(1, y.ndim)), y.shape)
        k = here if k is None else here & k
        predictions, y = model(params, x).astype(wide), y.astype(wide)
        share = jnp.sum(real) / len(targets)
        summed = total(loss, predictions, y, where=k, weights=w).astype(wide)
        return summed / (share * jnp.where(size > 0, size, 1)).astype(wide)

    value, gradient = jax.value_and_grad(objective)(params)
    typical = jnp.max(lax.map(with_signs, jax.random.split(jax.random.key(0), _SIGNS)), axis=0)
    tests = _Tests(objective, jnp.asarray(tolerance, wide), value, typical)
    history = jnp.full(steps + 1, value)
    start = _State(
        params, value, gradient, optimizer.init(params), jnp.asarray(0, jnp.int32), history
    )
    if batch_size is None or key is None:
        turn = _step(objective, optimizer)
    else:
        turn = _epoch(objective, of_batch, optimizer, steps, len(targets), batch_size, key)
    return _descend(turn, tests, start, steps)


class _State(NamedTuple):
    """Where a fit is after `k` steps."""

    params: Params
    value: Array
    gradient: Params
    optimizer: Any
    k: Array
    history: Array


Turn = Callable[[_State], _State]


class _Carry(NamedTuple):
    """What a fit takes from turn to turn."""

    state: _State
    pulls: Array  # the largest that each entry of the gradient has been
    looks: Array  # whether this seems to be a minimum, of which the curvature has the say
    next: Array  # from which step on it is looked at again
    converged: Array
    ended: Array


def _descend(turn: Turn, tests: _Tests, start: _State, steps: int) -> Fit:
    """Takes turns until the fit is at rest, out of steps or no longer finite."""

    def take(carry: _Carry) -> _Carry:
        before = carry.state
        after = turn(before)
        pulls = jnp.maximum(carry.pulls, tests.sizes(after.gradient))
        out_of_steps = after.k >= steps
        looks = tests.at_rest(before.value, after.value, after.gradient, pulls)
        looks &= (after.k >= carry.next) | out_of_steps
        ended = out_of_steps | ~jnp.isfinite(after.value)
        return carry._replace(state=after, pulls=pulls, looks=looks, ended=ended)

    def look(carry: _Carry) -> _Carry:
        at = carry.state
        converged = tests.at_minimum(carry.looks, at.params, at.value, at.gradient, carry.pulls)
        # To look costs as much as many steps; what is no minimum is not soon one.
        later = jnp.where(carry.looks, at.k + at.k // 4 + 1, carry.next)
        seen = carry._replace(
            looks=jnp.zeros_like(carry.looks),
            next=later,
            converged=converged,
            ended=carry.ended | converged,
        )
        return lax.while_loop(lambda carry: ~(carry.looks | carry.ended), take, seen)

    pulls, finite = tests.sizes(start.gradient), jnp.isfinite(start.value)
    flat = (jnp.max(pulls) == 0) & finite
    first = _Carry(start, pulls, flat, jnp.zeros_like(start.k), jnp.zeros_like(flat), ~finite)
    last = lax.while_loop(lambda carry: carry.looks | ~carry.ended, look, first)
    end = last.state
    history = jnp.where(jnp.arange(steps + 1) < end.k, end.history, end.value)
    return Fit(end.params, end.value, end.k, last.converged, history)


def _step(objective: Objective, optimizer: Any) -> Turn:
    """One step on all rows."""

    def step(at: _State) -> _State:
        params, state = _update(
            optimizer, objective, at.params, at.value, at.gradient, at.optimizer
        )
        value, gradient = _value_and_grad(objective, params, state)
        history = at.history.at[at.k].set(at.value)
        return _State(params, value, gradient, state, at.k + 1, history)

    return step


def _epoch(
    objective: Objective, of_batch: Callable[..., Array], optimizer: Any, steps: int,
    rows: int, batch_size: int, key: Array,
) -> Turn:  # fmt: skip
    """Steps on batches that together are all rows, in an order of its own."""
    batches = -(-rows // batch_size)

    def epoch(at: _State) -> _State:
        order = jax.random.permutation(jax.random.fold_in(key, at.k), rows)
        order = jnp.resize(order, (batches * batch_size,))  # the last batch may be a short one

        def step(i: Array, carry: Any) -> Any:
            params, state, history = carry
            first = i * batch_size
            take = lax.dynamic_slice(order, (first,), (batch_size,))
            batch = partial(of_batch, take=take, real=first + jnp.arange(batch_size) < rows)
            value, gradient = jax.value_and_grad(batch)(params)
            params, state = _update(optimizer, batch, params, value, gradient, state)
            return params, state, history.at[at.k + i].set(value)

        taken = jnp.minimum(batches, steps - at.k)
        start = (at.params, at.optimizer, at.history)
        params, state, history = lax.fori_loop(0, taken, step, start)
        value, gradient = jax.value_and_grad(objective)(params)
        return _State(params, value, gradient, state, at.k + taken, history)

    return epoch


class _Tests(NamedTuple):
    """The tests of `fit`'s docstring."""

    objective: Objective
    tolerance: Array
    first: Array  # the value at the start
    typical: Array  # the gradient's entries there, had the rows' pulls random signs

    def sizes(self, gradient: Params) -> Array:
        return jnp.abs(_flat(gradient, self.first.dtype))

    def size(self, value: Array) -> Array:
        # Below tolerance * first, a fit is perfect to rounding and its value mere noise.
        return jnp.maximum(jnp.abs(value), self.tolerance * jnp.abs(self.first))

    def at_rest(self, before: Array, value: Array, gradient: Params, pulls: Array) -> Array:
        still = jnp.abs(value - before) <= self.tolerance * self.size(value)
        limit = self.tolerance ** (2 / 3) * jnp.maximum(pulls, self.typical)
        return still & jnp.all(self.sizes(gradient) <= limit) & jnp.isfinite(value)

    def at_minimum(
        self, looks: Array, params: Params, value: Array, gradient: Params, pulls: Array
    ) -> Array:
        """Whether the curvature allows that this be a minimum; False unless it `looks`."""
        wide = self.first.dtype
        slope = _flat(gradient, wide)
        eps = float(jnp.finfo(_narrowest(jax.tree.leaves(params))).eps)
        unit = jnp.maximum(pulls, self.typical)
        some = jnp.where(jnp.max(unit) > 0, jnp.max(unit), 1)
        noise = 8 * eps * jnp.where(unit > 0, unit, some)
        scale = 1 / jnp.where(unit > 0, unit, some)  # so that a parameter's unit has no say

        def bend(v: Array) -> Array:
            _, along = jax.jvp(jax.grad(self.objective), (params,), (_like(params, scale * v),))
            return scale * _flat(along, wide)

        try:
            jax.eval_shape(bend, scale)
        except (TypeError, ValueError, NotImplementedError):
            # A model that JAX cannot differentiate twice, such as one with a `custom_vjp`, has no
            # curvature to test; the docstring of `fit` says so.
            return looks & ((jnp.max(pulls) > 0) | (value == 0))
        signs = jax.random.rademacher(jax.random.key(1), slope.shape, wide)
        by_slope, by_signs = jnp.stack([scale * slope, signs])
        enough = self.tolerance * self.size(value)
        gain, least, _ = _conjugate(bend, by_slope, looks, scale * noise, enough, eps)
        _, below, most = _conjugate(bend, by_signs, looks, 0 * noise, jnp.inf, eps)
        convex = (jnp.minimum(least, below) >= 0) & (gain <= enough)
        # At rest from the start, it takes more than that.
        return looks & convex & ((jnp.max(pulls) > 0) | (value == 0) | (most > 0))


def _conjugate(
    bend: Callable[[Array], Array], b: Array, looks: Array, noise: Array, enough: Any, eps: float
) -> tuple[Array, Array, Array]:
    """What minimising `v H v / 2 - b v` gains by conjugate gradients, at least.

    With the least and the greatest curvature met on the way, the least as -1 if it is negative
    beyond rounding, else 0. It ends where b is rounding, where the gain is more than `enough`,
    or where the curvature ends; if b has not, the gain is infinite. NaN shows in all of them.
    """
    flat = eps**0.5

    def step(state: Any) -> Any:
        r, p, gain, least, most, k, _ = state
        along = bend(p)
        curvature, length = jnp.vdot(p, along), jnp.vdot(p, p)
        bent = curvature / length
        most = jnp.maximum(most, jnp.abs(bent))
        negative = bent < -flat * most
        none = ~(bent > eps * most)
        alpha = jnp.vdot(r, r) / jnp.where(none, 1, curvature)
        gain = jnp.where(none, jnp.inf, gain + 0.5 * alpha * jnp.vdot(r, r))
        rest = r - alpha * along
        beta = jnp.vdot(rest, rest) / jnp.vdot(r, r)
        least = jnp.where(negative | jnp.isnan(bent), -1, least)
        done = none | (gain > enough) | jnp.all(jnp.abs(rest) <= noise)
        return rest, rest + beta * p, gain, least, most, k + 1, done

    zero = jnp.zeros_like(b, shape=())
    done = ~looks | jnp.all(jnp.abs(b) <= noise)
    start = b, b, zero, zero, zero, jnp.asarray(0, jnp.int32), done
    limit = min(2 * b.size, _PRODUCTS)
    _, _, gain, least, most, _, _ = lax.while_loop(
        lambda state: ~state[-1] & (state[-2] < limit), step, start
    )
    return gain, least, most


_SIGNS = 3
_PRODUCTS = 100


def _update(
    optimizer: Any, objective: Objective, params: Params, value: Array, gradient: Params, state: Any
) -> tuple[Params, Any]:
    import optax  # noqa: PLC0415  (`import robustloss` stays as quick as `import jax`)

    updates, state = optax.with_extra_args_support(optimizer).update(
        gradient, state, params, value=value, grad=gradient, value_fn=objective
    )
    return optax.apply_updates(params, updates), state


def _value_and_grad(objective: Objective, params: Params, state: Any) -> tuple[Array, Params]:
    """At the new params; a line search that came last in the optimizer has them already."""
    import optax  # noqa: PLC0415

    searched = (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)
    last = state[-1] if isinstance(state, tuple) and state else None
    if isinstance(last, searched) and last.grad is not None:
        return optax.value_and_grad_from_state(objective)(params, state=last)
    return jax.value_and_grad(objective)(params)


def _widest(leaves: list[Array]) -> jnp.dtype:
    """The type to compute in: the widest of the parameters', at least float32."""
    return max((at_least_float32(x.dtype) for x in leaves), key=lambda dtype: dtype.itemsize)


def _narrowest(leaves: list[Array]) -> jnp.dtype:
    return max((x.dtype for x in leaves), key=lambda dtype: float(jnp.finfo(dtype).eps))


def _flat(tree: Params, dtype: Any) -> Array:
    return jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in jax.tree.leaves(tree)])


def _like(tree: Params, flat: Array) -> Params:
    """The inverse of `_flat`."""
    leaves, structure = jax.tree.flatten(tree)
    parts = jnp.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
    shaped = [
        part.reshape(leaf.shape).astype(leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)


def _weights(weights: ArrayLike, shape: tuple[int, ...], where: ArrayLike | None) -> Array:
    """The largest of them between 1 and 4."""
    axes = tuple(range(len(shape)))
    return relative(ratios(weights, shape, where, axes)[0], axes)[0]


def _predictions(model: Model, params: Params, inputs: Inputs, shape: tuple[int, ...]) -> Array:
    predictions = model(params, inputs)
    if not isinstance(predictions, jax.Array):
        kind = type(predictions).__name__
        raise TypeError(f"model must return one array, the predictions, got {kind}")
    if predictions.shape != shape:
        raise ValueError(
            "model must return predictions of the targets' shape: predictions and targets must "
            f"have equal shapes, got {predictions.shape} and {shape}"
        )
    return predictions


def _check_batches(
    batch_size: int, key: Array | None, targets: Array, parameters: list[Any]
) -> None:
    if not 1 <= batch_size <= len(targets):
        raise ValueError(f"batch_size must be in [1, {len(targets)}], got {batch_size}")
    if key is None:
        raise ValueError("a mini-batch fit needs key=jax.random.key(...)")
    if isinstance(key, int | np.integer):
        raise TypeError(f"key must be a jax.random.key, got {key}; jax.random.key({key})?")
    if not isinstance(key, jax.Array) or not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    ):
        kind = f"dtype {key.dtype}" if hasattr(key, "dtype") else type(key).__name__
        raise TypeError(f"key must be a jax.random.key, got {kind}")
    for shape in map(np.shape, parameters):
        if len(shape) >= targets.ndim and shape[-targets.ndim] != 1:
            raise ValueError(
                "with batch_size, a parameter of the loss cannot differ by row, "
                f"got shape {shape} for targets of shape {targets.shape}"
            )


def _floating(path: Any, x: ArrayLike) -> Array:
    name = "params" + jax.tree_util.keystr(path)
    if not isinstance(x, float | jax.Array | np.ndarray | np.generic) and not hasattr(x, "dtype"):
        hint = ""
        if callable(x) or isinstance(x, bool | int | str):
            hint = (
                "; what is not trained belongs in the model: of an Equinox module, "
                "params, static = eqx.partition(module, eqx.is_inexact_array) and a model that "
                "calls eqx.combine(params, static)"
            )
        raise TypeError(f"params must be floating arrays, got {type(x).__name__} at {name}{hint}")
    array = real_array(name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        at = f" at {name}" if path else ""
        raise TypeError(f"params must be floating arrays, got dtype {array.dtype}{at}")
    return lax.convert_element_type(array, array.dtype)


def _rows(rows: int | None, x: Any) -> Array:
    if isinstance(x, jax.Array):
        array = x
    else:
        host = np.asarray(x)
        numbers = jnp.issubdtype(host.dtype, np.number) or host.dtype == np.bool_
        array = jnp.asarray(x) if numbers else real_array("inputs", x)
    if rows is None or array.ndim == 0 or len(array) != rows:
        raise ValueError(
            f"the first axis of inputs and targets must count the same rows, "
            f"got shape {array.shape} for {'scalar' if rows is None else rows} targets"
        )
    return array
