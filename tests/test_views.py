"""Influence, weight and curvature: of the library's losses and of anyone's."""

from __future__ import annotations

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from witnesses import TRUTH

import robustloss as rl

NAMES = sorted(rl.LOSSES)
SCALED = [n for n in NAMES if "delta" in inspect.signature(rl.LOSSES[n]).parameters]
NAN, INF = float("nan"), float("inf")
R = np.array([-40.0, -2.5, -0.3, 1e-3, 0.7, 3.0, 1e4, 1e-20, 1e20])
AT_ZERO = {"squared_error": 2.0, "absolute_error": INF}
EVERY = (lambda f: f, jax.jit, jax.vmap)


@pytest.mark.parametrize("run", EVERY, ids=["eager", "jit", "vmap"])
@pytest.mark.parametrize("name", NAMES)
def test_views_are_the_derivatives(name, run):
    truth, loss = TRUTH[name], rl.LOSSES[name]
    r = jnp.float32(R)
    slope = np.array([float(truth(x, 1, 1)) for x in np.float32(R)])
    bend = np.array([float(truth(x, 1, 2)) for x in np.float32(R)])
    np.testing.assert_allclose(run(partial(rl.influence, loss))(r), slope, rtol=1e-6)
    np.testing.assert_allclose(run(partial(rl.curvature, loss))(r), bend, rtol=1e-6, atol=1e-38)
    np.testing.assert_allclose(run(partial(rl.weight, loss))(r), slope / np.float32(R), rtol=1e-6)
    for view in (rl.influence, rl.curvature, rl.weight):
        chex.assert_trees_all_equal(view(loss, r, 0 * r), view(loss, r))


@pytest.mark.parametrize("run", EVERY, ids=["eager", "jit", "vmap"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", NAMES)
def test_weight_at_the_ends(name, dtype, run):
    r = jnp.array([0.0, -0.0, INF, -INF, NAN], dtype)
    got = run(partial(rl.weight, rl.LOSSES[name]))(r)
    at_zero, far = AT_ZERO.get(name, 1.0), 2.0 if name == "squared_error" else 0.0
    np.testing.assert_array_equal(got.astype(jnp.float32), [at_zero, at_zero, far, far, NAN])
    for view in (rl.influence, rl.curvature, rl.weight):
        chex.assert_type(run(partial(view, rl.LOSSES[name]))(r), dtype)
        assert np.isnan(view(rl.LOSSES[name], r)[4])


@pytest.mark.parametrize("delta", [1e-3, 0.37, 1e3])
@pytest.mark.parametrize("name", SCALED)
def test_weight_for_any_delta(name, delta):
    loss = partial(rl.LOSSES[name], delta=delta)
    r = np.float32([0.0, -0.0, INF, -INF, 1e-30, -1e-9 * delta])
    np.testing.assert_allclose(rl.weight(loss, r), [1, 1, 0, 0, 1, 1], rtol=1e-6)
    far = np.float32([1e4, -1e6]) * np.float32(delta)
    np.testing.assert_allclose(rl.weight(loss, far), [1e-4, 1e-6], rtol=1e-3)
    np.testing.assert_allclose(rl.influence(loss, r)[2:4], [delta, -delta], rtol=1e-6)


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


@pytest.mark.parametrize("name", NAMES)
def test_weight_can_be_differentiated(name):
    """Against numerical derivatives of psi(r) / r, and without NaN where r = 0 is avoided."""
    loss = rl.LOSSES[name]
    for run in (lambda f: f, jax.jit):
        slope = run(jax.vmap(jax.grad(partial(rl.weight, loss))))
        got = slope(jnp.array([-2.5, 0.3, 3.0, 0.0, -0.0]))
        assert np.isfinite(got).all(), got
        truth = TRUTH[name]
        for x, g in zip(np.float32([-2.5, 0.3, 3.0]), got[:3], strict=True):
            want = (truth(x, 1, 2) * x - truth(x, 1, 1)) / float(x) ** 2
            np.testing.assert_allclose(g, float(want), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got[3:], 0)  # the weight is even
    if name in SCALED:
        for r in (0.0, 0.7, 5.0):
            by_delta = jax.grad(lambda d, r=r: rl.weight(partial(loss, delta=d), r))(1.5)
            assert np.isfinite(by_delta)


@pytest.mark.parametrize("view", [rl.influence, rl.curvature, rl.weight])
def test_inputs_and_errors(view):
    with pytest.raises(ValueError, match=r"\(3,\) and \(3, 1\)"):
        view(rl.huber, jnp.ones(3), jnp.ones((3, 1)))
    with pytest.raises(TypeError, match="complex"):
        view(rl.huber, 1j)
    chex.assert_trees_all_equal(view(rl.huber, [3, 0], [1, 0]), view(rl.huber, jnp.array([2.0, 0])))
    with jax.numpy_dtype_promotion("strict"):
        for name, dtype in [(n, d) for n in NAMES for d in (jnp.float16, jnp.float32)]:
            chex.assert_type(view(rl.LOSSES[name], jnp.zeros(3, dtype), jnp.ones(3, dtype)), dtype)
    with jax.enable_x64(True):
        assert view(rl.huber, [3.0]).dtype == jnp.float64
