"""What goes in, what comes out, and what is refused: the same for every loss."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from witnesses import FEW, LOSSES, TRUTH, few_first, knobs

import robustloss as rl
from robustloss import losses

NAMES = sorted(LOSSES)
NAN, INF = float("nan"), float("inf")
KNOBS = [(name, knob) for name in NAMES for knob in knobs(name)]
SCALED = [name for name, knob in KNOBS if knob == "delta"]


def test_the_losses_are_those_of_the_families():
    names = [name for family in losses.FAMILIES for name in family.__all__]
    assert sorted(names) == sorted(rl.LOSSES), (
        "rl.LOSSES is the union of the families, without repetition"
    )
    for family in losses.FAMILIES:
        assert list(family.__all__) == sorted(family.__all__)
    for name, loss in rl.LOSSES.items():
        assert getattr(rl, name) is loss
        assert loss.__name__ == name


@pytest.mark.parametrize("name", rl.LOSSES)
def test_signature_and_docstring(name):
    loss = rl.LOSSES[name]
    predictions, targets, *others = inspect.signature(loss).parameters.values()
    assert (predictions.name, predictions.default) == ("predictions", inspect.Parameter.empty)
    assert (targets.name, targets.default) == ("targets", None)
    assert all(p.kind is p.KEYWORD_ONLY for p in others)
    assert {p.name for p in others if p.default is p.empty} <= {"alpha", "df"}
    doc = inspect.getdoc(loss)
    found = [doc.find(f"\n{s}:") for s in ("Args", "Returns", "Raises", "Source")]
    assert -1 not in found
    assert found == sorted(found)
    for p in inspect.signature(loss).parameters:
        assert f"\n    {p}: " in doc


def test_import_brings_no_optax():
    code = "import sys, robustloss; assert 'optax' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("p", "t"),
    [
        ((3,), (3, 1)),
        ((3, 1), (3,)),
        ((3,), ()),
        ((), (3,)),
        ((3,), (4,)),
        ((0,), (1,)),
        ((1,), ()),
    ],
)
def test_shapes_are_equal_or_named(name, p, t):
    for run in (lambda f: f, jax.jit):
        with pytest.raises(ValueError, match=f"{re.escape(str(p))}.*{re.escape(str(t))}"):
            run(LOSSES[name])(np.zeros(p), np.zeros(t))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (np.array([1j]), "complex128"),
        (1j, "complex128"),
        (np.array(["1.0"]), "<U3"),
        ("1.0", "<U3"),
        (np.array([1.0, None]), "object"),
        (None, "NoneType"),
        (np.array(["2020-01-01"], "datetime64[D]"), "datetime64"),
        (np.array([1], "timedelta64[s]"), "timedelta64[s]"),
        (b"1", "|S1"),
    ],
)
def test_only_real_numbers(name, bad, dtype):
    good = np.zeros(np.shape(bad))
    refused = partial(pytest.raises, TypeError)
    with refused(match=rf"predictions .*{re.escape(dtype)}"):
        LOSSES[name](bad)
    if bad is None:
        return
    with refused(match=rf"predictions .*{re.escape(dtype)}"):
        LOSSES[name](bad, good)
    with refused(match=rf"targets .*{re.escape(dtype)}"):
        LOSSES[name](good, bad)
    for knob in knobs(name):
        with refused(match=rf"{knob} .*{re.escape(dtype)}"):
            LOSSES[name](good, **{knob: bad})


@pytest.mark.parametrize("name", NAMES)
def test_complex_jax_arrays(name):
    z = jnp.ones(2, jnp.complex64)
    for run in (lambda f: f, jax.jit):
        with pytest.raises(TypeError, match="complex64"):
            run(LOSSES[name])(z)


@pytest.mark.parametrize(("name", "knob"), KNOBS)
def test_knobs_go_by_name(name, knob):
    with pytest.raises(TypeError, match="positional"):
        LOSSES[name](1.0, 2.0, 1.0)


BAD_SCALE = [
    0.0,
    -1.5,
    NAN,
    -INF,
    np.array([1.0, -2.5, 1.0]),
    jnp.array([1.0, NAN, 1.0]),
]
BAD = {
    "delta": BAD_SCALE,
    "scale": BAD_SCALE,
    "kink": [1.5, -1.0001, NAN, INF, np.array([0.0, -2.5, 0.0]), 2],
    "q": [0.0, 1, -0.5, NAN, INF, np.array([0.5, 1.5, 0.5])],
}


@pytest.mark.parametrize(("name", "knob", "bad"), [(n, k, bad) for n, k in KNOBS for bad in BAD[k]])
def test_a_bad_knob_is_named(name, knob, bad):
    check_refusal(LOSSES[name], knob, bad)


@pytest.mark.parametrize("bad", BAD["q"])
@pytest.mark.parametrize("name", losses.asymmetric.__all__)
def test_a_bad_q_is_named(name, bad):
    check_refusal(rl.LOSSES[name], "q", bad)
    for mode in (jax.jacfwd, jax.jacrev):
        for of in (0, 1):
            f = lambda r, q: rl.LOSSES[name](r, q=q)  # noqa: E731
            got = [jax.jit(g)(0.5, float(np.ravel(bad).max())) for g in (f, mode(f, of))]
            np.testing.assert_array_equal(got, NAN)


@pytest.mark.parametrize("bad", [(2.0, 1.0, 4.0), (1.0, 2.0, 2.0), (0.0, 1.0, 2.0), (1, NAN, 2)])
def test_bad_knots_are_named(bad):
    with pytest.raises(ValueError, match=r"knots must be .*got"):
        rl.hampel(1.0, knots=bad)
    for r in (0.5, -7.0):
        f = jax.jit(lambda a, b, c, r=r: rl.hampel(r, knots=(a, b, c)))
        assert np.isnan(f(*map(float, bad)))
    with pytest.raises(ValueError, match=r"three numbers \(a, b, c\), got 2"):
        rl.hampel(1.0, knots=(1.0, 2.0))


def check_refusal(loss, knob, bad):
    inside = {"kink": lambda v: -1 <= v <= 1, "q": lambda v: 0 < v < 1}.get(knob, lambda v: v > 0)
    worst = next(v for v in np.ravel(bad) if not inside(v))
    f = partial(loss, **{knob: bad})
    for run in (lambda f: f, jax.jit, jax.grad):
        r = jnp.float32(0.5) if run is jax.grad and np.ndim(bad) == 0 else jnp.ones(3)
        with pytest.raises(ValueError, match=f"{knob} must be .*got {re.escape(str(worst))}"):
            run(f)(r)


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, of) for name in FEW if name in SCALED for of in ("delta", "r")]
    + [
        pytest.param(name, "delta", marks=pytest.mark.thorough)
        for name in SCALED
        if name not in FEW
    ],
)
def test_a_traced_bad_delta_is_nan(name, argument):
    """Value, slope and curvature, in either argument."""

    def f(r, d):
        return LOSSES[name](r, delta=d)

    of = ("r", "delta").index(argument)
    r, d = np.meshgrid([0.0, 0.5, -7.0, INF], [0.0, -1.5, NAN])
    slope = jax.jacrev(f, of)
    views = (f, slope, jax.jacfwd(f, of), jax.jacfwd(slope, of))
    got = jax.jit(lambda r, d: [jax.vmap(g)(r, d) for g in views])(*map(jnp.ravel, (r, d)))
    np.testing.assert_array_equal(got, NAN)


@pytest.mark.parametrize("bad", [1.5, -1.0001, NAN])
def test_a_traced_bad_kink_is_a_nan_slope(bad):
    def f(r, kink):
        return rl.absolute_error(r, kink=kink)

    assert np.isnan(jax.jit(jax.grad(f))(0.0, bad))
    assert f(2.0, 0.5) == jax.jit(f)(2.0, bad)


def test_vmap_over_delta_traces_it():
    for name in SCALED:
        f = jax.vmap(lambda d, name=name: LOSSES[name](1.0, delta=d))
        np.testing.assert_array_equal(np.isnan(f(jnp.array([1.0, -1.0]))), [False, True])


@pytest.mark.parametrize("name", SCALED)
def test_delta_never_enlarges_the_residual(name):
    for shape, of in [((3,), ()), ((2, 3), (3,)), ((3,), (1,)), ((3, 1), (3,))]:
        for run in (lambda f: f, jax.jit):
            with pytest.raises(ValueError, match=re.escape(str(shape))):
                run(lambda r, d: LOSSES[name](r, delta=d))(jnp.ones(of), jnp.ones(shape))
    with pytest.raises(ValueError, match=r"\(4,\)|broadcast"):
        LOSSES[name](jnp.ones(3), delta=jnp.ones(4))


@pytest.mark.parametrize("name", few_first(NAMES))
def test_ways_to_give_the_same_numbers(name):
    f = LOSSES[name]
    want = f(jnp.array([3.0, -1.0, 0.0]))
    chex.assert_type(want, jnp.float32)
    p, t = [4, 0, 2], [1, 1, 2]
    integers = [np.int8, np.int32, np.int64, np.uint8, jnp.int16]
    for given in [(p, t), (np.float64(p), np.float64(t)), (jnp.float32(p), t), (p, np.float32(t))]:
        chex.assert_trees_all_equal(f(*given), want)
    for dtype in integers:
        chex.assert_trees_all_equal(f(np.array(p, dtype), np.array(t, dtype)), want)
    chex.assert_trees_all_equal(f(True, False), f(1.0))
    chex.assert_trees_all_equal(f(np.array([True, False]), np.array([False, True])), f([1.0, -1.0]))
    chex.assert_trees_all_equal(f(np.float32(3.0)), want[0])
    chex.assert_trees_all_equal(f(predictions=p, targets=t), want)
    with jax.enable_x64(True):
        assert f(p, t).dtype == jnp.float64
        assert f(jnp.float32(p), jnp.float32(t)).dtype == jnp.float32


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", few_first(NAMES))
def test_dtypes(name, strict):
    f = LOSSES[name]
    wide = [jnp.float64] if not strict else []
    good = {"kink": (0.125, 0)}
    with jax.numpy_dtype_promotion("strict" if strict else "standard"), jax.enable_x64(bool(wide)):
        for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, *wide):
            r = jnp.array([0.125, -2.0, 0.0], dtype)
            # A parameter as Python numbers, and as an array of the same type.
            ways = [{}, *({k: v} for k in knobs(name) for v in (*good.get(k, (1.0, 1)), r[0]))]

            def every(r, ways=ways):
                gs = [partial(f, **way) for way in ways]
                slopes = [jax.grad(lambda r, g=g: g(r).sum())(r) for g in gs]
                return [[g(r), g(r, r), jax.vmap(g)(r, r)] for g in gs], slopes

            results = jax.eval_shape(every, r)
            chex.assert_type(jax.tree.leaves(results), dtype)
            chex.assert_shape(jax.tree.leaves(results), (3,))
            chex.assert_type(f(r), dtype)
    if not strict:
        half, brain = jnp.float16([1]), jnp.bfloat16([1])
        assert f(half, brain).dtype == jnp.float32
        assert f(half, jnp.float32([1])).dtype == jnp.float32
        assert f(half, jnp.array([1])).dtype == jnp.float16
        for knob in knobs(name):
            assert f(half, **{knob: jnp.float32(0.125)}).dtype == jnp.float32


@pytest.mark.parametrize("name", few_first(NAMES))
def test_strict_promotion_at_every_order(name):
    with jax.numpy_dtype_promotion("strict"):
        f = LOSSES[name]
        r = jnp.array([-2.0, 0.0, 0.3])
        slope = jax.grad(lambda r: f(r).sum())
        bend = jax.grad(lambda r: slope(r).sum())
        jax.eval_shape(lambda r: jax.jvp(bend, (r,), (r,)), r)
        if "delta" in knobs(name):
            by_delta = jax.grad(lambda d: f(r, delta=d).sum())
            jax.eval_shape(jax.grad(jax.grad(by_delta)), jnp.float32(1.5))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", few_first(NAMES))
def test_strict_promotion_of_ranks_and_types(name, x64):
    """Value and gradients in everything, with traced scalars as parameters."""
    with (
        jax.enable_x64(x64),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        for dtype in (jnp.float16, jnp.float32, *([jnp.float64] if x64 else [])):
            given = {k: jnp.asarray(0.25, dtype) for k in knobs(name) if k not in ("kink", "knots")}

            def total(r, given):
                return LOSSES[name](r, **given).sum()

            slopes = jax.grad(total, (0, 1))
            r = jnp.ones(3, dtype)
            got = jax.eval_shape(slopes, r, given)
            chex.assert_type(jax.tree.leaves(got), dtype)
            bends = jax.grad(lambda r, given: sum(map(jnp.sum, jax.tree.leaves(slopes(r, given)))))  # noqa: B023
            chex.assert_type(jax.eval_shape(bends, r, given), dtype)


@pytest.mark.parametrize("subnormal", [1e-38, 1e-50, np.float32(1e-39), jnp.bfloat16(1e-39)])
@pytest.mark.parametrize("name", [n for n in NAMES if {"delta", "scale"} & set(knobs(n))])
def test_a_scale_that_counts_as_0_is_refused(name, subnormal):
    (knob,) = {"delta", "scale"} & set(knobs(name))
    words = f"{knob} must be at least 4.7e-38, as next to nothing counts as 0 in float32"
    with pytest.raises(ValueError, match=re.escape(words)):
        LOSSES[name](0.0, **{knob: subnormal})
    traced = jax.jit(lambda d: LOSSES[name](0.0, **{knob: d}))
    assert np.isnan(traced(jnp.float32(1e-38)))
    assert not np.isnan(traced(jnp.float32(5e-38)))


def test_a_scale_that_counts_as_0_in_the_type_of_the_residual():
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match="1e-40 counts as 0 in float32"):
            rl.welsch(jnp.float32(0.0), delta=1e-40)
        assert rl.welsch(0.0, delta=1e-40) == 0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", FEW)
def test_differences_that_16_bits_cannot_hold(name, dtype):
    big = float(jnp.finfo(dtype).max)
    p, t = jnp.array(0.6 * big, dtype), jnp.array(-0.6 * big, dtype)
    for far, near in ((p, t), (t, p), (p, 0 * p)):
        for f in (LOSSES[name], jax.grad(LOSSES[name])):
            with np.errstate(over="ignore"):
                difference = np.float32(far) - np.float32(near)
                assert f(far, near) == np.asarray(f(difference)).astype(dtype)
    p, t = jnp.float16(40000), jnp.float16(-20000)
    with np.errstate(over="ignore"):
        want = np.asarray(LOSSES[name](np.float32(60000))).astype(np.float16)
    assert LOSSES[name](p, t) == want
    assert rl.absolute_error(p, t) == 60000


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_kept(name):
    for shape in [(), (0,), (3,), (2, 3, 4), (1, 1)]:
        for given in [(jnp.ones(shape),), (jnp.ones(shape), jnp.zeros(shape))]:
            chex.assert_shape(jax.eval_shape(LOSSES[name], *given), shape)
    chex.assert_shape(LOSSES[name](jnp.ones((2, 0))), (2, 0))


@pytest.mark.parametrize("x64", [False, True])
def test_integers_too_large_for_jax_do_not_wrap(x64):
    with jax.enable_x64(x64):
        assert rl.mae(np.array([3_000_000_000]), np.array([0])) == 3e9
        assert rl.absolute_error(2**40, 0) == 2.0**40
        assert rl.absolute_error([2**40, 1], [0, 0])[1] == 1


@pytest.mark.parametrize("shape", [(12,), (1, 5), (5, 1)])
def test_a_delta_that_does_not_fit_names_both_shapes(shape):
    words = rf"residual's shape \(5,\), got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=words):
        rl.huber(np.ones(5), delta=np.ones(shape))


@pytest.mark.parametrize("wrong", ["huber", jnp.ones(3)], ids=["name", "result"])
def test_what_is_no_loss_is_refused(wrong):
    r = jnp.ones(3)
    for use in (rl.mean, rl.total, rl.influence, rl.weight, rl.curvature):
        with pytest.raises(TypeError, match=r"loss must be a function such as rl\.huber, got"):
            use(wrong, r)


@pytest.mark.parametrize("name", few_first(name for name in SCALED if TRUTH[name].unit))
def test_a_huge_delta_gives_half_the_square(name):
    @jax.jit
    def traced(r, d):
        f = jax.value_and_grad(lambda r, d: LOSSES[name](r, delta=d), (0, 1))
        return f(r, d), rl.curvature(partial(LOSSES[name], delta=d), r)

    for delta in (1e37, 1e38, 3e38, np.inf):
        assert LOSSES[name](2.0, delta=delta) == 2
        (value, (slope, by_delta)), bend = traced(2.0, delta)
        assert (value, slope, bend) == (2, 2, 1)
        assert abs(by_delta) < 1e-30
