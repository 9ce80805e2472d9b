"""Derivatives of every loss: all orders, modes and transformations, and the laws they obey."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from mpmath import mp, mpf
from witnesses import FEW, TRUTH, at_infinity, few_first, loss

import robustloss as rl
from experiments import _derivatives, _truth
from robustloss.losses import asymmetric, convex, redescending

NAMES = sorted(TRUTH)
MODES = (jax.jacfwd, jax.jacrev)
INF, NAN = float("inf"), float("nan")
# Where every formula is smooth, from far inside the bend to far outside it; and where it is not.
R = np.array([-7.3, -2.7, -0.6, -1e-3, 0.3, 1.4, 3.1, 40.0, 1e-7, -1e8, 0.93, 0.94, 2e3])
D = np.array([1.5, 0.4, 2.0, 1.0, 0.7, 1.345, 0.01, 30.0, 1.0, 1.0, 1.5, 1.5, 1.0])
SPECIAL = np.array([0.0, -0.0, 1.5, -1.5, INF, -INF, NAN])


SCALED = [name for name in NAMES if TRUTH[name].has_delta]


def of_two(name: str):
    """The loss as a function of (r, delta), whether it has a delta or not."""
    f = loss(name)
    return (lambda r, d: f(r, delta=d)) if name in SCALED else (lambda r, d: f(r))


def derivative(r, f):
    return jax.jvp(f, (r,), (jnp.ones_like(r),))[1]


def nested(f, operators, arguments):
    for operator, argument in zip(operators, arguments, strict=True):
        f = operator(f, argument)
    return f


def expected(name: str, r: float, d: float, m: int, n: int) -> float:
    """The truth, with the limit at inf and NaN at NaN."""
    if np.isnan(r):
        return NAN
    if np.isfinite(r):
        return float(TRUTH[name](r, d, m, n))
    return at_infinity(TRUTH[name], np.sign(r), d, m, n)


@pytest.mark.parametrize(
    ("order", "name"),
    [
        *((order, name) for name in NAMES for order in (range(3) if name in FEW else (0,))),
        *(
            pytest.param(order, name, marks=pytest.mark.thorough)
            for name in NAMES
            for order in ((3,) if name in FEW else (1, 2, 3))
        ),
    ],
)
def test_every_nesting_to_third_order(name, order):
    """All orders in r and delta, in every order of arguments and of modes."""
    r = np.r_[R, SPECIAL]
    d = np.r_[D, np.full_like(SPECIAL, 1.5)] if name in SCALED else np.ones_like(r)
    operators = (*MODES, jax.grad) if order == 1 else MODES
    nestings = list(itertools.product(operators, repeat=order))
    if order == 2:
        nestings = [MODES, MODES[::-1]]
    arguments = (0, 1) if name in SCALED else (0,)
    cases = [(of, nestings) for of in itertools.product(arguments, repeat=order)]
    if order == 3:  # all 64 are slow to compile
        alternating = [(jax.jacfwd, jax.jacrev, jax.jacfwd), (jax.jacrev, jax.jacfwd, jax.jacrev)]
        some = [(0, 0, 0), (0, 1, 1)][: 2 if name in SCALED else 1]
        cases = [(of, [alternating[sum(of) % 2]]) for of in some]

    def derivatives(r, d):
        return [[nested(of_two(name), ops, of)(r, d) for ops in each] for of, each in cases]

    with jax.enable_x64(True):
        got = jax.device_get(jax.jit(jax.vmap(derivatives))(r, d))
    for (of, each), results in zip(cases, got, strict=True):
        n = sum(of)
        true = [expected(name, x, y, order - n, n) for x, y in zip(r, d, strict=True)]
        for ops, result in zip(each, results, strict=True):
            note = f"{[op.__name__ for op in ops]} of arguments {of}"
            # The truth has 50 digits, so what is 0 in it may show as 1e-51. Some derivatives
            # pass through 0 at |r| = delta, or are a difference of knots.
            knots = TRUTH[name].fixed.get("knots", ())
            crossing = (np.abs(r) == d) | bool(knots)
            terms = 1e-14 * max((1, *knots)) ** 2
            for at, atol in ((crossing, terms), (~crossing, 1e-40)):
                np.testing.assert_allclose(
                    result[at], np.array(true)[at], rtol=1e-9, atol=atol, err_msg=note
                )


@pytest.mark.parametrize("name", few_first(NAMES))
def test_special_residuals(name):
    """Value, slope and curvature at 0, +-delta, inf and NaN, in both modes.

    Those of 16 bits are among all inputs, in test_accuracy.
    """
    forward, reverse = MODES

    @jax.jit
    def views(r, d):
        def f(r):
            return loss(name)(r, delta=d) if name in SCALED else loss(name)(r)

        modes = (f, forward(f), reverse(f), reverse(forward(f)), forward(reverse(f)))
        return [jax.vmap(g)(r) for g in modes]

    for delta in (1.0, 1e-30, 1e30) if name in SCALED else (1.0,):
        check_special(name, views, float(np.float32(delta)))


def check_special(name, views, delta):
    ties = [delta, -delta]
    r = jnp.array([0.0, -0.0, INF, -INF, NAN, *ties], jnp.float32)
    value, *slopes_and_bends = views(r, delta)
    true = [rounded([expected(name, float(x), delta, m, 0) for x in r]) for m in (1, 2)]
    # A curvature that passes through 0 elsewhere is measured beside its terms.
    terms = np.broadcast_to(TRUTH[name].sizes(np.array([delta]), delta)[2], 1)[0]
    size = np.maximum(np.abs(true[1]), np.where(np.isin(r, ties), terms, 0))
    for slope, bend in zip(slopes_and_bends[:2], slopes_and_bends[2:], strict=True):
        np.testing.assert_allclose(slope, true[0], rtol=3e-7)
        off = np.abs(bend - true[1])
        assert np.all((off <= 3e-7 * size) | (np.isnan(off) & np.isnan(size)))
    true = rounded([expected(name, float(x), delta, 0, 0) for x in r[:5]])
    np.testing.assert_allclose(value[:5], true, rtol=3e-7)
    chex.assert_type([value, slope, bend], jnp.float32)


def rounded(x: list[float]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.float64(x).astype(np.float32)


SMALL = [(0.5 * d, d) for d in (1e-19, 1e-20, 1e-30)] + [(2 * d, d) for d in (1e-19, 1e-20)]
HARD = {  # of (r, *parameters): where derivatives were wrong, or NaN, in spite of a right value
    "general": [
        *((r, 2, 1) for r in (1e8, 1e10, 1e30)),
        *((r, -INF, 1) for r in (0.7, 1e10, 1e20)),
        *((r, alpha, 1) for r in (1e11, 1e20) for alpha in (1.41, 1.7, 1.999, 3)),
        *((r, alpha, 1) for r in (30, 1e8, 1e12) for alpha in (0.9999999, 1, 1.0000001)),
        (0.5, 0, 1e-18),
    ],
    "student_t_nll": [
        *((r, df, 1) for r in (1e-3, 0.9, 30) for df in (18, 23.9, 24.1, 1e4, 1e7)),
        *((r, 3, 1e-20) for r in (1e-20, 0.5e-20, 1)),
    ],
    "general_nll": [(r, alpha, 1) for r in (0.3, 4) for alpha in (0, 1e-6, 1e-3, 1.9999)],
    "log_cosh": [*((u, 1) for u in (1e-4, 1e-3, 0.1, 0.63, 0.66, 0.99, 1.01)), *SMALL],
    "welsch": [*((u, 1) for u in (1e-4, 2, 5, 9, 9.3)), *SMALL],
    "tukey": SMALL,
    "andrews": SMALL,
    "hampel": [(4e-20, 1e-20), (5e-20, 1e-20)],
    "gaussian_nll": [*SMALL, (2e38, 1), (1e30, 1e10)],
    "laplace_nll": SMALL,
}
SLOW = ("general", "general_nll", "student_t_nll")  # to compile


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name, dtype, id=f"{name}-{dtype.__name__}",
            marks=[pytest.mark.thorough]
            * (name == "general_nll" or (name in SLOW and dtype is np.float64)),
        )
        for name in rl.LOSSES
        for dtype in (np.float32, np.float64)
    ],
)  # fmt: skip
def test_first_and_second_derivatives_in_ulps(name, dtype):
    """In the residual and every parameter, against mpmath."""
    many = 10 if name == "general_nll" else 30
    off = _derivatives.errors(name, dtype, many, also=HARD.get(name, ()))
    assert [x for x in off if x.ulp > 10] == []


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", rl.LOSSES)
def test_first_and_second_derivatives_in_ulps_at_many_points(name, dtype):
    """And in either order of two arguments."""
    off = _derivatives.errors(name, dtype, 800, seed=1, every_order=True)
    # Two pass through 0 so slowly that both |F| and |r dF/dr| are far below the terms of F: by
    # alpha and delta next to alpha = 1, and by df where that is below 0.1.
    limit = {"general": 25, "student_t_nll": 15}.get(name, 10)
    assert [x for x in off if x.ulp > limit] == []


def test_the_measure_of_derivatives_measures():
    """The series give what differences do, and an error of an ulp counts as one."""
    for name in ("cauchy", "student_t_nll", "general_nll", "hampel"):
        point = (0.7, *(0.6,) * len(_truth.ROWS[name].parameters))
        for of, (value, change) in _truth.derivatives(name, *point).items():
            orders = [of.count(k) for k in range(len(point))]

            def f(*x, name=name):
                return _truth.ROWS[name].formula(*_truth.variables(*x)).value

            with mp.workdps(60):
                numeric = mp.diff(f, point, tuple(orders), h=mpf("1e-10"))
                orders[0] += 1
                slope = mp.diff(f, point, tuple(orders), h=mpf("1e-10"))
                assert abs(numeric - value) < 1e-7, (name, of)
                assert abs(point[0] * slope - change) < 1e-7, (name, of)
    for got, ulp in ((1.0, 0.0), (1 + 2.0**-23, 1.0), (NAN, INF), (INF, INF)):
        assert _derivatives.off_by(got, mpf(1), mpf(0), np.float32) == ulp
    assert _derivatives.off_by(INF, mpf(10) ** 39, mpf(0), np.float32) == 0
    assert _derivatives.off_by(-INF, mpf(10) ** 39, mpf(0), np.float32) == INF
    assert _derivatives.off_by(1.0, mpf(10) ** -39, mpf(0), np.float32) == INF
    assert _derivatives.off_by(1 + 2.0**-23, mpf(1), mpf(8), np.float32) == 0.125


@pytest.mark.parametrize("name", ["tukey", "welsch", "log_cosh", "andrews"])
def test_third_derivatives_in_ulps(name):
    point = _derivatives.sample(name, np.float64, 200)
    with jax.enable_x64(True):
        got = jax.jit(jax.vmap(jax.grad(jax.grad(jax.grad(of_two(name))))))(*point)
    for g, r, d in zip(np.asarray(got), *point, strict=True):
        with mp.workdps(_truth.DIGITS):
            at = _truth.ROWS[name].formula(*_truth.variables(mpf(r), mpf(d)))
            third = at.derivative((3, 0))
        assert _derivatives.off_by(float(g), third, 2 * third, np.float64) < 12, (r, d)


@pytest.mark.parametrize("name", rl.LOSSES)
def test_nan_and_infinite_residuals_at_every_order(name):
    """NaN in the value and in every derivative that depends on r; at infinity, the limits."""
    parameters = _truth.ROWS[name].parameters
    point = [{"q": 0.25, "df": 3.0, "alpha": 1.25}.get(p, 1.5) for p in parameters]
    r = jnp.array([NAN, INF, -INF])
    at = [r, *(jnp.full(3, p) for p in point)]
    assert np.isnan(rl.LOSSES[name](r, **dict(zip(parameters, point, strict=True)))[0])
    for of, got in _derivatives.computed(name, at).items():
        assert np.isnan(got[0]), of
        assert not np.isnan(got[1:]).any(), of


def test_the_limits_of_student_t_at_infinity():
    at = [jnp.array([INF, -INF]), jnp.full(2, 3.0), jnp.full(2, 2.0)]
    got = _derivatives.computed("student_t_nll", at)
    for of, limit in {(0, 0): 0, (0, 1): 0, (0, 2): 0, (1, 2): -0.5, (2,): -1.5}.items():
        np.testing.assert_allclose(got[of], limit, rtol=1e-6)
    np.testing.assert_allclose(got[2, 2], 0.75, rtol=1e-6)


def test_the_end_of_the_range():
    np.testing.assert_allclose(rl.tukey(1e30, delta=2e19), 2e19 * (2e19 / 6), rtol=1e-6)
    slope = jax.jit(jax.vmap(jax.grad(rl.gaussian_nll)))
    np.testing.assert_array_equal(slope(jnp.float32([1.7e38, -3e38])), np.float32([1.7e38, -3e38]))


def of_kink(r, kink):
    return rl.absolute_error(r, kink=kink)


@jax.jit
def at_kink(r, kink):
    slopes = [mode(of_kink)(r, kink) for mode in MODES]
    return slopes, [mode(mode(of_kink))(r, kink) for mode in MODES]


@pytest.mark.parametrize("kink", [-1.0, -0.3, 0.0, 0.25, 1.0])
def test_the_kink_is_taken_exactly(kink):
    f = of_kink
    for zero, dtype in itertools.product((0.0, -0.0), (jnp.float16, jnp.bfloat16, jnp.float32)):
        slopes, bends = at_kink(jnp.array(zero, dtype), kink)
        assert slopes == [jnp.array(kink, dtype)] * 2
        assert bends == [0, 0]
    assert [mode(f)(zero, kink) for mode in MODES for zero in (0.0, -0.0)] == [np.float32(kink)] * 4
    slopes = jax.vmap(jax.grad(f), (0, None))(jnp.array([-2.0, 3.0, NAN]), kink)
    np.testing.assert_array_equal(slopes, [-1, 1, NAN])
    assert jax.grad(f, 1)(0.0, kink) == 0
    assert jax.grad(jax.grad(f), 1)(0.0, kink) == 1
    assert jax.grad(jax.grad(f), 1)(1.0, kink) == 0


def spread(many: int = 999) -> np.ndarray:
    random = np.random.default_rng(3)
    bend = random.normal(size=many) * 3
    return np.r_[bend, 2.0 ** random.uniform(-60, 60, many), SPECIAL].astype(np.float32)


@pytest.mark.parametrize("run", [jax.jit, lambda f: f])
@pytest.mark.parametrize("name", few_first(NAMES))
def test_differentiating_keeps_the_value(name, run):
    r, d = spread(), np.float32(1.5)
    f = of_two(name)
    ones = np.ones_like(r)
    value = run(f)(r, d)

    def pull(r, d):
        out, vjp = jax.vjp(f, r, d)
        return out, vjp(jnp.ones_like(out))

    others = {
        "jvp": run(lambda r, d: jax.jvp(f, (r, d), (ones, jnp.ones_like(d))))(r, d)[0],
        "value_and_grad": run(jax.vmap(jax.value_and_grad(f, (0, 1)), (0, None)))(r, d)[0],
        "second": run(lambda r, d: jax.jvp(partial(derivative_and_value, f, d), (r,), (ones,)))(
            r, d
        )[0][0],
    }
    if name in FEW:
        others["linearize"] = run(lambda r, d: jax.linearize(f, r, d)[0])(r, d)
        others["vjp"] = run(pull)(r, d)[0]
    for how, other in others.items():
        np.testing.assert_array_equal(bits(other), bits(value), err_msg=how)


def derivative_and_value(f, d, r):
    return jax.jvp(lambda r: f(r, d), (r,), (jnp.ones_like(r),))


def bits(x: jax.Array) -> np.ndarray:
    return np.where(np.isnan(x), np.float32(NAN), x).view(np.int32)


@pytest.mark.parametrize("name", few_first(NAMES))
def test_transformations_agree(name):
    r, d = spread(50)[:-3], np.float32(1.5)  # without infinities and NaN
    f = of_two(name)
    slope = jax.vmap(jax.grad(f), (0, None))
    curvature = jax.vmap(jax.grad(jax.grad(f)), (0, None))

    def total(r, d):
        return f(r, d).sum()

    def scanned(r, d):
        return jax.lax.scan(lambda carry, x: (carry, jax.grad(f)(x, d)), 0.0, r)[1]

    ways = {
        "sum": jax.grad(total),
        "scan": scanned,
        "through scan": jax.grad(
            lambda r, d: jax.lax.scan(lambda c, x: (c + f(x, d), 0), 0.0, r)[0]
        ),
        "remat": jax.grad(jax.checkpoint(total)),
        "linearize": lambda r, d: jax.linearize(lambda r: f(r, d), r)[1](jnp.ones_like(r)),
        "map": lambda r, d: jax.lax.map(lambda x: jax.grad(f)(x, d), r),
    }

    def every(r, d):
        hessians = [jax.hessian(total)(r, d), jax.jacrev(jax.jacfwd(total))(r, d)]
        return slope(r, d), curvature(r, d), hessians, [way(r, d) for way in ways.values()]

    for run in (jax.jit, lambda f: f) if name == "huber" else (jax.jit,):
        slopes, bends, hessians, others = run(every)(r, d)
        for how, other in zip(ways, others, strict=True):
            chex.assert_trees_all_close(other, slopes, rtol=1e-6, custom_message=how)
        for hessian in hessians:
            chex.assert_trees_all_close(hessian, jnp.diag(bends), rtol=1e-6)


@pytest.mark.parametrize("name", ["huber", "tukey"])
def test_numerical_derivatives(name):
    arguments = (np.array([-3.0, -0.8, 0.4, 2.1]), np.array([1.4, 0.9, 1.7, 0.3]))
    with jax.enable_x64(True):
        if name not in SCALED:
            check_grads(loss(name), arguments[:1], order=2, modes=("fwd", "rev"))
        else:
            check_grads(of_two(name), arguments, order=2, modes=("fwd", "rev"))


def check_sharded(devices: int) -> None:
    """A sum over sharded residuals: its value and gradients are those of the whole."""
    assert len(jax.devices()) >= devices
    mesh = jax.make_mesh((devices,), ("rows",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("rows"), PartitionSpec()
    r, d = jnp.linspace(-4, 4, 64), jnp.float32(1.5)
    for name in (*FEW, "general(alpha=-1.5)") if devices > 1 else FEW:
        f = of_two(name)

        def total(r, d, f=f):
            return jax.lax.psum(f(r, d).sum(), "rows")

        def slopes(r, d, f=f):
            return jax.vmap(jax.grad(f), (0, None))(r, d)

        def sharded(r, d, total=total, slopes=slopes):
            summed = jax.shard_map(total, mesh=mesh, in_specs=(rows, whole), out_specs=whole)
            inside = jax.shard_map(slopes, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
            return jax.value_and_grad(summed, (0, 1))(r, d), inside(r, d)

        def plain(r, d, f=f, slopes=slopes):
            return jax.value_and_grad(lambda r, d: f(r, d).sum(), (0, 1))(r, d), slopes(r, d)

        chex.assert_trees_all_close(jax.jit(sharded)(r, d), jax.jit(plain)(r, d), rtol=1e-5)


def test_shard_map_on_one_device():
    check_sharded(1)


def test_shard_map_on_eight_devices():
    root = str(Path(__file__).parents[1])
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": root}
    run = [sys.executable, "-W", "error", __file__]
    subprocess.run(run, env=environment, check=True, timeout=200)


@pytest.mark.parametrize("name", ["huber", "hampel(knots=(1.5, 3.5, 8.0))"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (3, 4)])
def test_delta_broadcasts(name, shape):
    random = np.random.default_rng(4)
    r = random.normal(size=(3, 4)).astype(np.float32) * 2
    d = random.uniform(0.5, 2, shape).astype(np.float32)
    f = of_two(name)
    whole = np.broadcast_to(d, r.shape)
    chex.assert_trees_all_close(f(r, d), f(r, whole), rtol=1e-6)
    gradient = jax.grad(lambda r, d: f(r, d).sum(), 1)
    each = np.asarray(gradient(r, whole), np.float64)
    axes = tuple(i for i in range(2) if np.shape(d[(None,) * (2 - d.ndim)])[i] == 1)
    want = each.sum(axes).reshape(shape)
    for got in (gradient(r, d), jax.jit(gradient)(r, d)):
        assert got.shape == shape
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_huber_with_infinite_delta(mode, run):
    r = jnp.array([0.0, 0.5, -3.0, 1e10, INF, -INF, NAN])
    f = of_two("huber")
    d = jnp.float32(INF)
    np.testing.assert_array_equal(run(f)(r, d), r * r / 2)
    np.testing.assert_array_equal(rl.huber(r, delta=INF), r * r / 2)
    np.testing.assert_array_equal(run(jax.vmap(mode(f), (0, None)))(r, d), r)
    bend = run(jax.vmap(mode(mode(f)), (0, None)))(r, d)
    np.testing.assert_array_equal(bend, [1, 1, 1, 1, 1, 1, NAN])
    by_delta = run(jax.vmap(mode(f, 1), (0, None)))(r, d)
    np.testing.assert_array_equal(by_delta[:4], 0)


@pytest.mark.parametrize("name", FEW)
def test_integers_have_no_tangent(name):
    f = loss(name)
    p, t = jnp.array([1.5, -2.0, 7.25]), jnp.array([1, 2, -3])
    none = np.zeros(3, jax.dtypes.float0)
    want = jax.vmap(jax.grad(f))(p - t)
    got = jax.grad(lambda p: f(p, t).sum())(p)
    chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal(jax.jvp(f, (p, t), (jnp.ones(3), none))[1], want)
    by_p, by_t = jax.vjp(f, p, t)[1](jnp.ones(3))
    chex.assert_trees_all_equal(by_p, want)
    assert by_t.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(jax.jvp(f, (t,), (none,))[1], 0)
    assert jax.vjp(f, t)[1](jnp.ones(3))[0].dtype == jax.dtypes.float0


@pytest.mark.parametrize("name", SCALED)
def test_scale_law(name):
    """rho(k r; k delta) = k**2 rho(r; delta), to the last bit for powers of two."""
    f, degree = jax.jit(of_two(name)), TRUTH[name].degree
    r = (np.random.default_rng(5).normal(size=999) * 2.0 ** np.linspace(-12, 12, 999)).astype("f4")
    for d, k in itertools.product(np.float32([1, 1.345, 0.1, 3.3]), np.float32(2.0) ** [-9, 1, 7]):
        np.testing.assert_array_equal(f(k * r, k * d), k**degree * f(r, d))


@pytest.mark.parametrize("name", SCALED)
def test_eulers_law(name):
    """r d/dr + delta d/ddelta multiplies a loss by its degree, and its slopes by one less."""
    f, degree = of_two(name), TRUTH[name].degree
    # The last of general is in test_eulers_law_of_alphas_derivatives: minutes of compilation.
    orders = (0, 1, 1) if name.startswith("general") else (0, 1, 1, 2)

    def along(r, d):
        views = [f, jax.grad(f), jax.grad(f, 1), jax.grad(jax.grad(f, 1), 1)][: len(orders)]
        both = [jax.jvp(g, (r, d), (r, d)) for g in views]
        return [value for value, _ in both], [change for _, change in both]

    with jax.enable_x64(True):
        values, changes = jax.jit(jax.vmap(along))(R, D)
    for order, value, change in zip(orders, values, changes, strict=True):
        terms = np.max(np.abs(value))
        want = (degree - order) * np.asarray(value)
        np.testing.assert_allclose(change, want, rtol=1e-11, atol=1e-13 * terms)


@pytest.mark.parametrize("name", asymmetric.__all__)
def test_what_is_asymmetric_is_linear_in_q(name):
    """So are its slopes: half way between two q, in value and derivative."""
    f = rl.LOSSES[name]
    scaled = "delta" in inspect.signature(f).parameters

    def views(r, d, q):
        def of(r, d):
            return f(r, q=q, delta=d) if scaled else f(r, q=q)

        return jnp.stack([of(r, d), jax.grad(of)(r, d), jax.grad(of, 1)(r, d)])

    every = jax.vmap(views, (0, 0, None))
    with jax.enable_x64(True):
        low, high = every(R, D, 0.25), every(R, D, 0.75)
        middle, slope = jax.jvp(lambda q: every(R, D, q), (0.5,), (1.0,))
        at_0 = jax.jvp(lambda q: views(jnp.zeros(()), 1.5, q), (0.5,), (1.0,))[1]
    low, high = np.asarray(low), np.asarray(high)
    np.testing.assert_allclose(middle, (low + high) / 2, rtol=1e-13)
    np.testing.assert_allclose(slope, 2 * (high - low), rtol=1e-13)
    np.testing.assert_array_equal(at_0, 0)


@pytest.mark.parametrize("name", [name for name in NAMES if TRUTH[name].unit])
def test_half_the_square_near_zero(name):
    f = of_two(name)
    views = (f, jax.grad(f), jax.grad(jax.grad(f)))
    run = jax.jit(lambda r, d: [jax.vmap(g, (0, None))(r, d) for g in views])
    with jax.enable_x64(True):
        for d in TRUTH[name].deltas:
            r = 1e-12 * d * np.array([-1.0, 1.0, 0.0])
            value, slope, bend = run(r, d)
            np.testing.assert_allclose(value, r * r / 2, rtol=1e-11)
            np.testing.assert_allclose(slope, r, rtol=1e-11)
            assert bend[2] == 1


SOME = st.lists(
    st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=8, max_size=8
).map(np.float32)
A_DELTA = st.floats(2.0**-40, 2.0**40, width=32).map(np.float32)


def of(family) -> list[str]:
    """The labels of a family's losses."""
    return [name for name in NAMES if TRUTH[name].loss in family.__all__]


@jax.jit(static_argnums=0)
def both_sides(name, r, d):
    f = of_two(name)
    slope = partial(derivative, f=lambda r: f(r, d))
    return [(f(x, d), slope(x), derivative(x, slope)) for x in (r, -r)]


laws = settings(deadline=None, derandomize=True, max_examples=100)


@pytest.mark.parametrize("name", of(convex))
@laws
@given(r=SOME, d=A_DELTA)
def test_laws_of_the_convex_family(name, r, d):
    """Even, nonnegative and 0 at 0; an odd influence that never decreases."""
    r = np.sort(np.r_[r, -r[:2], 0, d, -d])
    _, slope, bend = even_and_zero_at_zero(name, r, d)
    assert np.all(bend >= 0)
    assert np.all(slope * np.sign(r) >= 0)
    # Never decreasing, and lying below every chord, up to the ulps that test_accuracy allows.
    ulps = 2 * TRUTH[name].ulps[1] * 2.0**-23
    lower, upper = slope[:-1].astype(np.float64), slope[1:].astype(np.float64)
    finite = np.isfinite(lower) & np.isfinite(upper)
    assert np.all(upper[finite] >= lower[finite] - ulps * np.abs(lower[finite]))


@pytest.mark.parametrize("name", of(redescending))
@laws
@given(r=SOME, d=A_DELTA)
def test_laws_of_the_redescending_family(name, r, d):
    """Even, nonnegative and 0 at 0; an odd, bounded influence that returns to zero."""
    r = np.sort(np.r_[r, -r[:2], 0, d, -d, INF, -INF])
    value, slope, _ = even_and_zero_at_zero(name, r, d)
    assert np.all(slope * np.sign(r) >= 0)
    top = max(TRUTH[name].fixed.get("knots", (1.0,)))
    assert np.all(np.abs(slope) <= top * d * (1 + 1e-6))
    assert np.all(slope[np.isinf(r)] == 0)
    assert np.all(np.abs(slope)[np.abs(r) > 1e4 * d] <= 1.001e-4 * d)
    # Never falling away from 0, up to rounding.
    outward = value[r >= 0].astype(np.float64)
    finite = outward[np.isfinite(outward)]
    assert np.all(np.diff(finite) >= -1e-6 * finite[:-1])


def even_and_zero_at_zero(name, r, d):
    (value, slope, bend), mirrored = jax.device_get(both_sides(name, r, d))
    np.testing.assert_array_equal(value, mirrored[0])
    np.testing.assert_array_equal(slope, -mirrored[1])
    np.testing.assert_array_equal(bend, mirrored[2])
    np.testing.assert_array_equal(value[r == 0], 0)
    np.testing.assert_array_equal(slope[r == 0], 0)
    assert np.all(value >= 0)
    return value, slope, bend


@jax.jit(static_argnums=0)
def mirrored(name, r, q, d):
    f = partial(loss_of_q, name, d)
    views = (f, jax.grad(f), jax.grad(jax.grad(f)), jax.grad(f, 1))
    return [(jax.vmap(v, (0, None))(r, q), jax.vmap(v, (0, None))(-r, 1 - q)) for v in views]


def loss_of_q(name, d, r, q):
    knobs = {"delta": d} if "delta" in inspect.signature(rl.LOSSES[name]).parameters else {}
    return rl.LOSSES[name](r, q=q, **knobs)


@pytest.mark.parametrize("name", asymmetric.__all__)
@laws
@given(r=SOME, d=A_DELTA, q=st.integers(1, 63).map(lambda k: np.float32(k / 64)))
def test_laws_of_the_asymmetric_family(name, r, d, q):
    """rho(r; q) = rho(-r; 1 - q), derivatives likewise; 0 at 0 and nowhere negative."""
    r = np.r_[r, 0, d, -d]
    value, slope, bend, by_q = jax.device_get(mirrored(name, r, q, d))
    np.testing.assert_array_equal(*value)
    np.testing.assert_array_equal(slope[0], -slope[1])
    np.testing.assert_array_equal(*bend)
    np.testing.assert_array_equal(by_q[0], -by_q[1])
    assert np.all(value[0] >= 0)
    assert np.all(slope[0] * np.sign(r) >= 0)
    np.testing.assert_array_equal(value[0][r == 0], 0)
    np.testing.assert_array_equal(slope[0][r == 0], 0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", asymmetric.__all__)
def test_derivatives_in_q(name):
    """Every nesting of two in r, q and delta, against mpmath; and the limits at inf, NaN."""
    scaled = "delta" in inspect.signature(rl.LOSSES[name]).parameters

    def f(r, q, d):
        return loss_of_q(name, d, r, q)

    def truth(r, q, d):
        side = 1 - q if r > 0 else q
        square = r * r if name == "expectile" or abs(r) <= d else d * (2 * abs(r) - d)
        return side * (abs(r) if name == "quantile" else square)

    r = np.array([-7.3, -2.7, -0.6, -1e-3, 0.3, 1.4, 3.1, 40.0])
    d = 1.5
    of_what = range(3 if scaled else 2)
    with jax.enable_x64(True):
        for i, j in itertools.product(of_what, of_what):
            orders = [(i == k) + (j == k) for k in range(3)]
            nestings = [outer(inner(f, i), j) for outer in MODES for inner in MODES]
            run = jax.jit(lambda r, q: [jax.vmap(g, (0, None, None))(r, q, d) for g in nestings])  # noqa: B023
            for q in (0.1, 0.5, 0.75):
                want = [float(mp.diff(truth, (mpf(x), mpf(q), mpf(d)), orders)) for x in r]
                for got in run(np.r_[r, INF, -INF, 0.0, NAN], q):
                    np.testing.assert_allclose(got[: len(r)], want, rtol=1e-9, atol=1e-12)
                    assert np.isnan(got[-1]) or want == [0] * len(r)
                    assert not np.isnan(got[-4:-1]).any()


def test_limits_of_the_asymmetric_losses():
    r = np.linspace(-4, 4, 33, dtype=np.float32)
    chex.assert_trees_all_equal(rl.quantile(r, q=0.5), rl.absolute_error(r) / 2)
    chex.assert_trees_all_equal(rl.expectile(r, q=0.5), rl.squared_error(r) / 2)
    chex.assert_trees_all_equal(rl.quantile_huber(r, q=0.5), rl.huber(r))
    far = rl.quantile_huber(r, q=0.25, delta=INF)
    chex.assert_trees_all_equal(far, rl.expectile(r, q=0.25))
    tiny = rl.quantile_huber(r, q=0.25, delta=1e-6) / 2e-6
    chex.assert_trees_all_close(tiny, rl.quantile(r, q=0.25), rtol=1e-5, atol=1e-6)
    # Of Hampel's: far knots make it Huber's.
    chex.assert_trees_all_close(rl.hampel(r, knots=(1.5, 1e6, 1e9)), rl.huber(r, delta=1.5))
    # The tube is what Huber's loss does when delta moves.
    by_delta = jax.vmap(jax.grad(lambda d, r: rl.huber(r, delta=d)), (None, 0))
    chex.assert_trees_all_equal(by_delta(1.5, r), rl.epsilon_insensitive(r, delta=1.5))


@pytest.mark.parametrize("kink", [-0.25, 0.0, 0.3, 0.75])
def test_the_kink_of_the_quantile_loss(kink):
    def f(r, kink):
        return rl.quantile(r, q=0.25, kink=kink)

    for mode, zero in itertools.product(MODES, (0.0, -0.0)):
        assert mode(f)(zero, kink) == np.float32(kink)
        assert mode(mode(f))(zero, kink) == 0
        assert mode(mode(f), 1)(zero, kink) == 1
    slopes = jax.vmap(jax.grad(f), (0, None))(jnp.array([-2.0, 3.0, NAN]), kink)
    np.testing.assert_array_equal(slopes, [-0.25, 0.75, NAN])


@pytest.mark.thorough
@pytest.mark.parametrize("modes", [MODES, MODES[::-1]])
def test_derivatives_in_the_knots(modes):
    """Of Hampel's loss, every second one, against mpmath."""
    outer, inner = modes
    r, d, knots = np.array([-9.0, -2.2, -0.7, 0.1, 1.1, 2.4, 3.3, 6.0]), 1.1, (0.8, 1.6, 4.5)
    with jax.enable_x64(True):
        arguments = (d, *knots)
        for i, j in itertools.combinations_with_replacement(range(5), 2):

            def f(r, d, a, b, c):
                return rl.hampel(r, delta=d, knots=(a, b, c))

            def truth(r, d, a, b, c):
                return hampel_of(r, d, a, b, c)

            g = jax.jit(jax.vmap(outer(inner(f, i), j), (0, None, None, None, None)))
            got = g(np.r_[r, INF, -INF, 0.0], *arguments)
            orders = [(i == k) + (j == k) for k in range(5)]
            want = [float(mp.diff(truth, (mpf(x), *map(mpf, arguments)), orders)) for x in r]
            np.testing.assert_allclose(got[:-3], want, rtol=1e-9, atol=1e-12)
            assert not np.isnan(got[-3:]).any()


def hampel_of(r, d, a, b, c):
    u = min(abs(r / d), c)
    if u <= a:
        return r**2 / 2
    if u <= b:
        return d**2 * a * (u - a / 2)
    return d**2 * a * ((b + c - a) / 2 - (c - u) ** 2 / (c - b) / 2)


if __name__ == "__main__":
    check_sharded(8)
