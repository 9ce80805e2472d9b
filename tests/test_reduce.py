"""From losses to one number: against plain NumPy, and safe from what is masked."""

from __future__ import annotations

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from witnesses import FEW, LOSSES

import robustloss as rl

NAMES = sorted(LOSSES)
NAN, INF = float("nan"), float("inf")
RANDOM = np.random.default_rng(6)
P, T = RANDOM.normal(size=(2, 4, 5, 3)).astype(np.float32) * 2
KEEP = RANDOM.random(P.shape) < 0.6
WEIGHTS = RANDOM.uniform(0, 3, P.shape).astype(np.float32)
WHERES = {"all": None, "some": KEEP, "rows": KEEP[:, :1, :1], "last": KEEP[0, 0], "one": True}
WEIGHINGS = {"none": None, "each": WEIGHTS, "last": WEIGHTS[0, 0], "one": 2.5, "integer": 3}


def plain(name, p, t, *, where=None, weights=None, axis=None):
    """Total and mean in float64, from the losses of each residual."""
    losses = np.asarray(LOSSES[name](p, t), np.float64)
    w = np.broadcast_to(1.0 if weights is None else np.float64(weights), losses.shape)
    w = np.where(True if where is None else where, w, 0.0)
    total = (losses * w).sum(axis)
    size = w.sum(axis)
    return total, np.divide(total, size, out=np.zeros_like(total), where=size > 0)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (), [1]])
@pytest.mark.parametrize("weights", WEIGHINGS)
@pytest.mark.parametrize("where", WHERES)
def test_against_numpy(where, weights, axis):
    given = {"where": WHERES[where], "weights": WEIGHINGS[weights], "axis": axis}
    of_numpy = given | {"axis": tuple(axis) if isinstance(axis, list) else axis}
    for name in ("huber", "absolute_error", "squared_error"):
        total, mean = plain(name, P, T, **of_numpy)
        loss = LOSSES[name]
        got = {rl.total: total, rl.mean: mean}
        for reduction, want in got.items():
            result = reduction(loss, P, T, **given)
            np.testing.assert_allclose(result, want, rtol=3e-6, atol=1e-7)
            chex.assert_type(result, jnp.float32)
            np.testing.assert_allclose(reduction(loss, P - T, **given), want, rtol=1e-5, atol=1e-6)
    short = {"absolute_error": rl.mae, "squared_error": rl.mse}
    for name, reduction in short.items():
        want = rl.mean(LOSSES[name], P, T, **given)
        chex.assert_trees_all_equal(reduction(P, T, **given), want)


@pytest.mark.parametrize(
    ("name", "reduction"),
    [*((name, rl.mean) for name in FEW), ("huber", rl.total)],
)
def test_what_is_dropped_may_hold_anything(name, reduction):
    """Value and gradient are those of the kept entries alone, in either argument."""
    loss, n = LOSSES[name], 6
    p, t = jnp.array(P.ravel()[:n]), jnp.array(T.ravel()[:n])
    keep, kept = jnp.arange(n) < 4, slice(0, 4)
    holes = [
        hole
        for bad in (NAN, INF, -INF)
        for hole in (
            (p.at[4].set(bad), t),
            (p, t.at[5].set(bad)),
            (p.at[4:].set(bad), t.at[4:].set(bad)),
        )
    ]
    runs = (lambda f: f, jax.jit) if name == "huber" else (jax.jit,)
    weighings = (None, jnp.linspace(0.5, 2, n)) if name in FEW else (None,)
    for w, run in itertools.product(weighings, runs):

        def f(p, t, where=None, w=None):
            return reduction(loss, p, t, where=where, weights=w)

        both = run(jax.value_and_grad(f, (0, 1)))
        want, gradients = both(p[kept], t[kept], None, None if w is None else w[kept])
        for holed in holes:
            value, got = both(*holed, keep, w)
            chex.assert_trees_all_close(value, want, rtol=1e-6)
            for g, expected in zip(got, gradients, strict=True):
                np.testing.assert_allclose(g[kept], expected, rtol=1e-6)
                np.testing.assert_array_equal(g[4:], 0)
    if name in FEW:
        hessian = jax.hessian(f)(*holes[2], keep)
        assert np.isfinite(hessian).all()


@pytest.mark.parametrize("name", FEW)
def test_a_dropped_weight_may_hold_anything(name):
    w = np.array([1.0, 2.0, NAN])
    keep = np.array([True, True, False])
    for run in (lambda f: f, jax.jit):
        f = run(lambda w, loss=LOSSES[name]: rl.mean(loss, P[0, 0], where=keep, weights=w))
        np.testing.assert_allclose(f(w), rl.mean(LOSSES[name], P[0, 0, :2], weights=w[:2]))
        assert np.isfinite(jax.grad(f)(w)).all()


@pytest.mark.parametrize("reduction", [rl.mean, rl.total])
@pytest.mark.parametrize("name", FEW)
def test_nothing_kept_is_zero(name, reduction):
    p = jnp.array([1.0, NAN, INF])
    none = jnp.zeros(3, bool)
    for run, mask in itertools.product((lambda f: f, jax.jit), (none, False)):
        f = run(jax.value_and_grad(lambda p, m=mask: reduction(LOSSES[name], p, where=m)))
        chex.assert_trees_all_equal(f(p), (jnp.float32(0), jnp.zeros(3)))
    zero = jax.value_and_grad(lambda p: reduction(LOSSES[name], p, weights=jnp.zeros(2)))
    chex.assert_trees_all_equal(zero(jnp.array([1.0, -3.0])), (jnp.float32(0), jnp.zeros(2)))
    rows = reduction(LOSSES[name], jnp.ones((2, 3)), where=jnp.array([[True], [False]]), axis=1)
    assert rows[1] == 0 != rows[0]


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 0.0]])
@pytest.mark.parametrize("reduction", [rl.mean, rl.total])
@pytest.mark.parametrize("name", FEW)
def test_a_weight_of_zero_hides_no_nan(name, reduction, weights):
    f = partial(reduction, LOSSES[name], weights=np.float32(weights))
    for run in (lambda f: f, jax.jit):
        assert np.isnan(run(f)(jnp.array([1.0, NAN])))
        assert np.isnan(run(jax.grad(f))(jnp.array([1.0, NAN]))[1])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", FEW)
def test_a_million_of_16_bits(name, dtype):
    r = jnp.asarray(np.random.default_rng(7).normal(size=10**6) * 8, dtype)
    each = np.asarray(LOSSES[name](np.asarray(r, np.float32)), np.float64)
    for keep in (None, r > -8):
        want = np.mean(each, where=True if keep is None else np.asarray(keep))
        for run in (lambda f: f, jax.jit):
            got = run(partial(rl.mean, LOSSES[name]))(r, where=keep)
            chex.assert_type(got, dtype)
            error = abs(float(got) - want) / want
            assert error < 2 * float(jnp.finfo(dtype).eps), error
    gradient = jax.grad(lambda r: rl.mean(LOSSES[name], r))(r)
    chex.assert_type(gradient, dtype)
    assert np.isfinite(gradient.astype(jnp.float32)).all()


@pytest.mark.parametrize("name", FEW)
def test_empty(name):
    for run in (lambda f: f, jax.jit):
        for reduction in (rl.mean, rl.total):
            assert run(partial(reduction, LOSSES[name]))(jnp.zeros(0), jnp.zeros(0)) == 0
            none = run(partial(reduction, LOSSES[name], axis=1))(jnp.zeros((3, 0)))
            chex.assert_trees_all_equal(none, jnp.zeros(3))
            chex.assert_shape(reduction(LOSSES[name], jnp.zeros((3, 0)), axis=0), (0,))


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_among_many_shows(name):
    """XLA's vectorised min and max drop a NaN on some CPUs."""
    f = partial(rl.mean, LOSSES[name])
    slope = jax.jit(jax.value_and_grad(f))
    for where in (0, 1 << 19, (1 << 20) - 1, 12345):
        r = jnp.ones(1 << 20).at[where].set(NAN)
        value, gradient = slope(r)
        assert np.isnan(value)
        assert np.flatnonzero(np.isnan(gradient)).tolist() == [where]
    for g in (f, partial(rl.total, LOSSES[name])) if name in FEW else (f,):
        assert np.isnan(jax.jit(g)(jnp.ones_like(r), r))


@pytest.mark.parametrize("reduction", [partial(rl.mean, rl.huber), rl.mae, rl.mse])
def test_errors(reduction):
    r = np.ones((3, 2), np.float32)
    several = [[1.0, -2.5], [-7.0, 1.0], [1.0, 1.0]]  # the first is told
    for weights, bad in [(-1.0, "-1.0"), (NAN, "nan"), (several, "-2.5")]:
        for run in (lambda f: f, jax.jit):
            with pytest.raises(ValueError, match=f"weights must be >= 0, got {bad}"):
                run(partial(reduction, weights=weights))(r)
    for where in (np.ones((3, 2)), np.ones((3, 2), int), 1, 0.0, "yes"):
        with pytest.raises(TypeError, match="where must be"):
            reduction(r, where=where)
    for shape in [(3,), (4, 3, 2), (2, 3), (3, 2, 1)]:
        with pytest.raises(ValueError, match=r"where must broadcast.*3, 2"):
            reduction(r, where=np.ones(shape, bool))
        with pytest.raises(ValueError, match=r"weights must broadcast.*3, 2"):
            reduction(r, weights=np.ones(shape))
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3,\)"):
        reduction(r, np.ones(3))
    with pytest.raises(TypeError, match="weights must be real"):
        reduction(r, weights=1j)
    with pytest.raises(TypeError, match="predictions must be real"):
        reduction(1j * r)
    with pytest.raises(ValueError, match="axis"):
        reduction(r, axis=2)


@pytest.mark.parametrize("reduction", [rl.mean, rl.total])
@pytest.mark.parametrize("loss", [jnp.sum, lambda r: 1.0, lambda r: None])
def test_a_loss_that_is_not_elementwise_is_refused(loss, reduction):
    got = "NoneType" if loss(jnp.ones(3)) is None else r"shape \(\)"
    for given in ({}, {"where": jnp.ones(3, bool)}):
        with pytest.raises(
            ValueError, match=rf"loss must.* keep the residual's shape \(3,\), got {got}"
        ):
            reduction(loss, jnp.ones(3), **given)


@pytest.mark.parametrize("name", FEW)
def test_transformations(name):
    f = partial(rl.mean, LOSSES[name])
    want = np.array([plain(name, p, t)[1] for p, t in zip(P, T, strict=True)])
    for g in (jax.vmap(f), jax.jit(jax.vmap(f)), jax.vmap(jax.jit(f))):
        np.testing.assert_allclose(g(P, T), want, rtol=1e-6)
    masked = jax.jit(jax.vmap(lambda p, t, m, w: f(p, t, where=m, weights=w)))(P, T, KEEP, WEIGHTS)
    each = [
        plain(name, p, t, where=m, weights=w)[1]
        for p, t, m, w in zip(P, T, KEEP, WEIGHTS, strict=True)
    ]
    np.testing.assert_allclose(masked, each, rtol=1e-6)
    gradient = jax.grad(f)(P, T)
    slopes = rl.influence(LOSSES[name], P, T)
    np.testing.assert_allclose(gradient, slopes / P.size, rtol=1e-6)
    by_weight = jax.grad(lambda w: rl.total(LOSSES[name], P, T, weights=w))(WEIGHTS)
    np.testing.assert_allclose(by_weight, LOSSES[name](P, T), rtol=1e-6)


@pytest.mark.parametrize("name", FEW)
def test_strict_promotion(name):
    with jax.numpy_dtype_promotion("strict"):
        f = jax.jit(partial(rl.mean, LOSSES[name]))
        for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
            p, w = jnp.asarray(P, dtype), jnp.asarray(WEIGHTS, dtype)
            ways = [{}, {"where": KEEP}, {"where": KEEP, "weights": w}]
            chex.assert_type([jax.eval_shape(f, p, p, **way) for way in ways], dtype)
            jax.eval_shape(jax.grad(f), p, p, where=KEEP, weights=w)


def test_a_loss_of_the_users_own_in_16_bits_is_summed_in_float32():
    r = jnp.ones(100_000, jnp.float32)
    assert rl.mean(lambda r: (2 * r).astype(jnp.float16), r) == 2


# Only the ratios of weights count, whatever their size; and a mean is finite where it can be.


def weights_of_size(size, n=7):
    """Not all equal, and none lost by float32 even where it is subnormal."""
    return (np.linspace(1.0, 3.0, n) * size).astype(np.float32 if size >= 1e-38 else np.float64)


SIZES = [1e38, 3e19, 1.0, 1e-19, 1e-37, 1e-38]


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_only_the_ratios_of_weights_count(dtype, x64):
    with jax.enable_x64(x64):
        if dtype == jnp.float64 and not x64:
            return
        r = jnp.asarray(np.linspace(-2, 3, 7), dtype)

        def f(r, w):
            return rl.mean(rl.huber, r, weights=w).astype(jnp.float32)

        both = jax.value_and_grad(f, (0, 1))
        want, (by_r, by_w) = both(r, jnp.asarray(weights_of_size(1.0)))
        runs = (both, jax.jit(both), lambda r, w: jax.tree.map(
            lambda a: a[0], jax.vmap(both)(r[None], w[None])
        ))  # fmt: skip
        for size, run in itertools.product(SIZES, runs):
            w = jnp.asarray(weights_of_size(size), jnp.float32)
            value, (of_r, of_w) = run(r, w)
            rtol = 3e-6 if size > 1e-37 else 1e-5
            np.testing.assert_allclose(value, want, rtol=rtol)
            np.testing.assert_allclose(
                of_r.astype(jnp.float32), by_r.astype(jnp.float32),
                rtol=max(rtol, 2 * float(jnp.finfo(dtype).eps)), atol=1e-7,
            )  # fmt: skip
            expected = np.float64(by_w) / size
            held = (abs(expected) > 2e-38) & (abs(expected) < 3e38)
            np.testing.assert_allclose(of_w[held], expected[held], rtol=2e-5)


@pytest.mark.parametrize("factor", [1e-300, 1e-50, 1e-39, 1e50, 1e300])
def test_weights_that_float32_cannot_hold(factor):
    """As read from NumPy or Python, each row of its own size."""
    r, w = jnp.linspace(-2, 3, 7), np.linspace(1.0, 3.0, 7)
    want = rl.mean(rl.huber, r, weights=w)
    np.testing.assert_allclose(rl.mean(rl.huber, r, weights=factor * w), want, rtol=1e-6)
    equal = rl.mean(rl.huber, r, weights=factor)
    np.testing.assert_allclose(equal, rl.mean(rl.huber, r), rtol=1e-6)
    two = rl.mean(rl.huber, jnp.stack([r, r]), weights=np.stack([w, factor * w]), axis=1)
    np.testing.assert_allclose(two, [want, want], rtol=1e-6)
    with pytest.raises(ValueError, match=r"weights must be 0 or in \[1.175e-38, 3.403e\+38\]"):
        rl.total(rl.huber, r, weights=factor * w)


def test_a_total_of_small_weights_is_right_or_refused():
    r = jnp.full(3, 2.0)
    np.testing.assert_allclose(rl.total(rl.squared_error, r, weights=1e38), INF)
    np.testing.assert_allclose(rl.total(rl.squared_error, r, weights=2e37), 2.4e38, rtol=1e-6)
    np.testing.assert_allclose(rl.total(rl.squared_error, r, weights=2e-38), 2.4e-37, rtol=1e-6)
    with pytest.raises(ValueError, match="weights must be 0 or"):
        rl.total(rl.squared_error, r, weights=np.float32(1e-39))
    assert np.isnan(jax.jit(lambda w: rl.total(rl.huber, r, weights=w))(jnp.full(3, 1e-39)))


@pytest.mark.parametrize("x64", [False, True])
def test_a_mean_is_finite_where_its_sum_is_not(x64):
    with jax.enable_x64(x64):
        top = 1e300 if x64 else 1e36
        r = jnp.full((3, 1000), np.sqrt(top))
        w = jnp.linspace(1, 2, 1000)
        keep = jnp.arange(1000) < 990
        for given in ({}, {"where": keep}, {"weights": w}, {"where": keep, "weights": 1e38 * w}):
            for axis in (None, 1):
                f = partial(rl.mean, rl.squared_error, axis=axis, **given)
                for run in (f, jax.jit(f)):
                    np.testing.assert_allclose(run(r), top, rtol=1e-5)
        gradient = jax.jit(jax.grad(lambda r: rl.mean(rl.squared_error, r)))(r)
        np.testing.assert_allclose(gradient, 2 * np.sqrt(top) / 3000, rtol=1e-6)
        # As exact as the sum where this is finite.
        for n in (1, 3, 1000, 4096):
            x = jnp.asarray(np.random.default_rng(n).integers(0, 99, n), float)
            assert rl.mean(rl.squared_error, x) == jnp.sum(x**2) / n


@pytest.mark.parametrize("bad", [-1.0, -1e-39, NAN, INF, -INF])
@pytest.mark.parametrize("reduction", [rl.mean, rl.total])
def test_a_wrong_weight_is_never_a_plausible_number(reduction, bad):
    r, w = jnp.linspace(-2, 3, 5), np.ones(5, np.float32)
    w[3] = bad
    f = partial(reduction, rl.huber, r)
    with pytest.raises(ValueError, match=r"weights must be (>= 0|finite), got"):
        f(weights=w)
    value, gradient = jax.jit(jax.value_and_grad(
        lambda r, w: reduction(rl.huber, r, weights=w), (0, 1)
    ))(r, w)  # fmt: skip
    assert np.isnan(value)
    assert np.isnan(gradient[0][3])
    keep = np.arange(5) != 3
    np.testing.assert_allclose(f(weights=w, where=keep), f(where=keep), rtol=1e-6)
    if bad == -1.0:
        f = jax.jit(lambda w: reduction(rl.huber, r, weights=w))
        assert np.isnan(f(w.astype(int)))


@pytest.mark.parametrize("reduction", [rl.mean, rl.total])
def test_weights_by_differences(reduction):
    """First and second order, in both modes."""
    with jax.enable_x64(True):
        r, w = jnp.linspace(-2.0, 3.0, 5), jnp.array([1.0, 0.3, 2.0, 0.7, 5.0])

        def f(at):
            return reduction(rl.log_cosh, at[0], weights=at[1])

        jax.test_util.check_grads(f, (jnp.stack([r, w]),), 2, rtol=1e-6)


def test_under_strict_settings():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for given in ({}, {"where": KEEP[:1]}, {"weights": WEIGHTS[:1, :1]}):
            for axis, run in itertools.product((None, 1, (0, 2)), (lambda f: f, jax.jit)):
                for reduction in (rl.mean, rl.total):
                    f = partial(reduction, rl.huber, axis=axis, **given)
                    assert np.isfinite(run(f)(P, T)).all()
                    assert np.isfinite(run(jax.grad(lambda p, f=f: f(p, T).sum()))(P)).all()
