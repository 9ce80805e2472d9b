"""Influence, weight and curvature: of the library's losses and of anyone's."""

from __future__ import annotations

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from witnesses import FEW, LOSSES, TRUTH, at_infinity, few_first

import robustloss as rl

NAMES = sorted(TRUTH)
SCALED = [name for name in NAMES if TRUTH[name].has_delta]
NAN, INF = float("nan"), float("inf")
R = np.array([-40.0, -2.5, -0.3, 1e-3, 0.7, 3.0, 1e4, 1e-20, 1e20])
AT_ZERO = {"squared_error": 2.0, "absolute_error": INF, "quantile": INF, "epsilon_insensitive": 0.0}


@pytest.mark.parametrize("name", few_first(NAMES))
def test_views_are_the_derivatives(name):
    truth, loss, x = TRUTH[name], LOSSES[name], np.float32(R)
    slope = np.array([float(truth(r, 1, 1)) for r in x])
    bend = np.array([float(truth(r, 1, 2)) for r in x])
    terms = np.broadcast_to(truth.sizes(x.astype(np.float64), 1.0)[2], x.shape)
    want = {rl.influence: slope, rl.curvature: bend, rl.weight: slope / x}

    def views(r):
        return [view(loss, r) for view in want]

    def of_two(r):
        return [view(loss, r, 0 * r) for view in want]

    runs = (jax.jit(jax.vmap(views)), jax.jit(of_two), views) if name in FEW else (jax.jit(views),)
    for run in runs:
        for view, true, got in zip(want, want.values(), run(x), strict=True):
            limit = 1e-6 * np.maximum(np.abs(true), terms if view is rl.curvature else 0) + 1e-38
            assert np.all(np.abs(np.float64(got) - true) <= limit), view.__name__


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.float32) for name in FEW),
        *(
            pytest.param(name, jnp.float32, marks=pytest.mark.thorough)
            for name in sorted({*NAMES} - {*FEW})
        ),
        *((name, dtype) for name in FEW for dtype in (jnp.float16, jnp.bfloat16)),
    ],
)
def test_weight_at_the_ends(name, dtype):
    r = jnp.array([0.0, -0.0, INF, -INF, NAN], dtype)
    at_zero = AT_ZERO.get(TRUTH[name].loss, 1.0)
    far = [at_infinity(TRUTH[name], sign, 1.0, 2) for sign in (1, -1)]
    views = (rl.influence, rl.curvature, rl.weight)
    got = jax.jit(lambda r: [view(LOSSES[name], r) for view in views])(r)
    chex.assert_type(got, dtype)
    assert all(np.isnan(g[4]) for g in got)
    weights = [got[2], rl.weight(LOSSES[name], r)] if name in FEW else got[2:]
    for w in weights:
        np.testing.assert_array_equal(w.astype(jnp.float32), [at_zero, at_zero, *far, NAN])


@pytest.mark.parametrize("name", few_first(SCALED))
def test_weight_for_any_delta(name):
    @jax.jit
    def both(r, delta):
        loss = partial(LOSSES[name], delta=delta)
        return rl.weight(loss, r), rl.influence(loss, r)

    at_zero = AT_ZERO.get(TRUTH[name].loss, 1.0)
    for delta in (1e-3, 0.37, 1e3):
        r = np.float32([-1e-9, 0.3, -0.9, 2.1, 1e4, -1e6]) * np.float32(delta)
        weights, slopes = both(np.r_[r, np.float32([0.0, -0.0, INF, -INF])], delta)
        d = float(np.float32(delta))
        want = [float(TRUTH[name](x, d, 1)) / float(x) for x in r]
        np.testing.assert_allclose(weights[:-4], want, rtol=1e-6, atol=1e-38)
        np.testing.assert_array_equal(weights[-4:], [at_zero, at_zero, 0, 0])
        limits = [at_infinity(TRUTH[name], sign, d, 1) for sign in (1, -1)]
        np.testing.assert_allclose(slopes[-2:], limits, rtol=1e-6)


@pytest.mark.parametrize("kink", [-1.0, 0.0, 0.5, 1.0])
def test_weight_at_a_kink_is_infinite(kink):
    loss = partial(rl.absolute_error, kink=kink)
    assert rl.weight(loss, 0.0) == INF
    assert rl.influence(loss, 0.0) == kink
    assert rl.curvature(loss, 0.0) == 0


def test_a_loss_of_the_user():
    def loss(r):
        return r**4

    r = jnp.array([0.0, -0.0, 1.0, -2.0, NAN])
    np.testing.assert_array_equal(rl.influence(loss, r), [0, 0, 4, -32, NAN])
    np.testing.assert_array_equal(rl.curvature(loss, r), [0, 0, 12, 48, NAN])
    np.testing.assert_array_equal(rl.weight(loss, r), [0, 0, 4, 16, NAN])
    ten = rl.weight(lambda r: 10 * rl.absolute_error(r), jnp.array([0.0, 2.0]))
    np.testing.assert_array_equal(ten, [INF, 5])
    assert rl.weight(lambda r: 1e4 * rl.huber(r), 0.0) == 1e4
    assert rl.mean(loss, jnp.array([1.0, 2.0])) == 8.5


@pytest.mark.parametrize("name", few_first(NAMES))
def test_weight_can_be_differentiated(name):
    """Against the quotient rule for psi(r) / r, and without NaN where r = 0 is avoided."""
    loss = LOSSES[name]
    slope = jax.jit(jax.vmap(jax.grad(partial(rl.weight, loss))))
    got = slope(jnp.array([-2.5, 0.3, 3.0, 0.0, -0.0]))
    assert np.isfinite(got).all(), got
    truth = TRUTH[name]
    for x, g in zip(np.float32([-2.5, 0.3, 3.0]), got[:3], strict=True):
        want = (truth(x, 1, 2) * x - truth(x, 1, 1)) / float(x) ** 2
        np.testing.assert_allclose(g, float(want), rtol=1e-4, atol=1e-5)
    if truth.even and truth.loss != "fair":
        np.testing.assert_array_equal(got[3:], 0)
    if name in SCALED and name in FEW:
        by_delta = jax.jit(jax.grad(lambda d, r: rl.weight(partial(loss, delta=d), r)))
        assert all(np.isfinite(by_delta(1.5, r)) for r in (0.0, 0.7, 5.0))


@pytest.mark.parametrize("view", [rl.influence, rl.curvature, rl.weight])
def test_inputs_and_errors(view):
    with pytest.raises(ValueError, match=r"\(3,\) and \(3, 1\)"):
        view(rl.huber, jnp.ones(3), jnp.ones((3, 1)))
    with pytest.raises(TypeError, match="complex"):
        view(rl.huber, 1j)
    chex.assert_trees_all_equal(view(rl.huber, [3, 0], [1, 0]), view(rl.huber, jnp.array([2.0, 0])))
    with jax.numpy_dtype_promotion("strict"):
        for name, dtype in [(n, d) for n in NAMES for d in (jnp.float16, jnp.float32)]:
            zeros, ones = jnp.zeros(3, dtype), jnp.ones(3, dtype)
            chex.assert_type(jax.eval_shape(partial(view, LOSSES[name]), zeros, ones), dtype)
    with jax.enable_x64(True):
        assert view(rl.huber, [3.0]).dtype == jnp.float64


def test_a_weight_where_the_influence_overflows():
    r = np.float32([1e-3, 1.0, 1e20, -1e30])
    for delta in (1.0, 4.0):
        cubic = partial(rl.general, alpha=3.0, delta=delta)
        want = np.sqrt(1 + (r.astype(float) / delta) ** 2)
        np.testing.assert_allclose(rl.weight(cubic, r), want, rtol=1e-6)
    np.testing.assert_array_equal(rl.weight(rl.squared_error, np.float32([1.0, 3e38])), 2)
    small = partial(rl.gaussian_nll, scale=1e-10)
    np.testing.assert_allclose(rl.weight(small, np.float32([0.0, 1.0, 1e20])), 1e20, rtol=1e-6)
