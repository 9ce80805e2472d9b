"""`rl.fit` reaches known optima, says honestly when it does not, and composes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from witnesses import FEW

import robustloss as rl
from experiments.data import load, names

OPTIMA = json.loads((Path(__file__).parent / "reference" / "optima.json").read_text())["datasets"]
LBFGS = optax.lbfgs()
SGD = optax.sgd(0.3)
ADAM = optax.adam(optax.cosine_decay_schedule(0.1, 3000))
KEY = jax.random.key(0)


tiered = ["siegel", "hbk"]
tiered += [pytest.param(n, marks=pytest.mark.thorough) for n in names() if n not in tiered]


def half_squared(r):
    return 0.5 * rl.squared_error(r)


def plane(params, X):
    return X @ params


def standardised(data):
    """Design and target as compare fits them, and coefficients in those units."""
    center, spread = data.X.mean(0), data.X.std(0, ddof=1)
    mean, sd = data.y.mean(), data.y.std(ddof=1)

    def coefficients(raw):
        raw = np.asarray(raw)
        return np.array([raw[0] + raw[1:] @ center - mean, *(raw[1:] * spread)]) / sd

    X = np.column_stack([np.ones(len(data.y)), (data.X - center) / spread])
    return X, (data.y - mean) / sd, sd, coefficients


def padded(X, y):
    """Of one of two shapes, so that few programs are compiled, and what is no padding."""
    rows, columns = (max(256, len(y)), 10)
    keep = np.arange(rows) < len(y)
    whole = np.zeros((rows, columns))
    whole[: len(y), : X.shape[1]] = X
    return whole, np.r_[y, np.full(rows - len(y), np.nan)], keep


def line(n=40, outliers=4, seed=0):
    rng = np.random.default_rng(seed)
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    y = X @ [1.0, 2.0] + 0.1 * rng.normal(size=n)
    y[:outliers] += 10
    return jnp.asarray(X, jnp.float32), jnp.asarray(y, jnp.float32)


def test_every_data_set_has_its_optima():
    assert set(OPTIMA) == set(names())


@pytest.mark.parametrize("name", tiered)
def test_reaches_the_optimum_in_float64(name):
    data = load(name)
    with jax.enable_x64(True):
        X, y, sd, coefficients = standardised(data)
        rows, targets, keep = padded(X, y)
        assert OPTIMA[name]["problems"]
        for problem in OPTIMA[name]["problems"]:
            scale = problem["scale"]
            delta = (problem["c"] or 1.0) * scale / sd
            loss = {
                "half_squared": half_squared,
                "huber": partial(rl.huber, delta=delta),
                "log_cosh": partial(rl.log_cosh, delta=delta),
                "pseudo_huber": partial(rl.pseudo_huber, delta=delta),
            }[problem["loss"]]
            found = rl.fit(
                loss, plane, np.zeros(10), rows, targets,
                where=keep, optimizer=LBFGS, steps=2000,
            )  # fmt: skip
            objective = float(found.value) * len(y) * (sd / scale) ** 2
            assert found.converged
            assert objective == pytest.approx(problem["objective"], rel=1e-10)
            want = np.zeros(10)
            want[: X.shape[1]] = coefficients(problem["coef"])
            np.testing.assert_allclose(found.params, want, atol=1e-6)


@pytest.mark.parametrize("name", tiered)
def test_first_order_mae_is_near_its_exact_objective(name):
    data = load(name)
    with jax.enable_x64(True):
        X, y, sd, _ = standardised(data)
        rows, targets, keep = padded(X, y)
        found = rl.fit(
            rl.absolute_error, plane, np.zeros(10), rows, targets,
            where=keep, optimizer=ADAM, steps=3000,
        )  # fmt: skip
        objective = float(found.value) * len(y) * sd
    assert objective == pytest.approx(OPTIMA[name]["mae"]["objective"], rel=1e-3)
    assert bool(found.converged) <= (not OPTIMA[name]["mae"]["unique"])


@pytest.mark.parametrize("loss", FEW.values(), ids=FEW)
def test_value_and_history_are_what_they_say(loss):
    X, y = line()
    found = rl.fit(loss, plane, jnp.zeros(2), X, y, optimizer=optax.adam(0.1), steps=30)
    chex.assert_shape(found.history, (31,))
    np.testing.assert_allclose(found.history[0], rl.mean(loss, -y), rtol=1e-6)
    np.testing.assert_allclose(found.value, rl.mean(loss, X @ found.params, y), rtol=1e-6)
    assert found.steps == 30
    assert found.history[30] == found.value < found.history[0]
    assert not found.converged


def test_history_repeats_its_last_value():
    X, y = line()
    found = rl.fit(rl.huber, plane, jnp.zeros(2), X, y, optimizer=LBFGS, steps=500)
    assert found.converged
    k = int(found.steps)
    assert k < 500
    assert np.isfinite(found.history).all()
    np.testing.assert_array_equal(found.history[k:], found.value)
    assert np.all(np.diff(found.history[: k + 1]) <= 0)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.3),
        optax.adam(0.1),
        optax.lbfgs(),
        optax.chain(optax.lbfgs(), optax.scale(0.5)),  # the line search's value is not ours
        optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(20, store_grad=True)),
    ],
    ids=["sgd", "adam", "lbfgs", "scaled lbfgs", "backtracking"],
)
def test_optimizers_agree(optimizer):
    X, y = line()
    found = rl.fit(rl.huber, plane, jnp.zeros(2), X, y, optimizer=optimizer, steps=3000)
    best = rl.fit(rl.huber, plane, jnp.zeros(2), X, y, optimizer=LBFGS, steps=3000)
    assert found.converged
    np.testing.assert_allclose(found.params, best.params, atol=3e-3)
    np.testing.assert_allclose(found.value, rl.mean(rl.huber, X @ found.params, y), rtol=1e-5)


def test_what_a_line_search_found_is_not_computed_again():
    X, y = line()
    calls = {"theirs": 0, "anew": 0}

    def counted(name, params, X):
        jax.debug.callback(lambda: calls.update({name: calls[name] + 1}))
        return X @ params

    optimizers = {"theirs": LBFGS, "anew": optax.chain(LBFGS, optax.identity())}
    for name, optimizer in optimizers.items():
        model = partial(counted, name)
        found = rl.fit(rl.huber, model, jnp.zeros(2), X, y, optimizer=optimizer, steps=5)
        jax.effects_barrier()
    assert calls["anew"] - calls["theirs"] == found.steps


def test_a_perfect_start_stays_and_a_perfect_fit_converges():
    X, _ = line()
    truth = jnp.array([1.0, 2.0])
    for loss in (rl.absolute_error, rl.huber):
        stays = rl.fit(loss, plane, truth, X, X @ truth, optimizer=SGD, steps=3000)
        assert stays.converged
        assert stays.steps == 0
    found = rl.fit(rl.huber, plane, jnp.zeros(2), X, X @ truth, optimizer=SGD, steps=3000)
    assert found.converged
    np.testing.assert_allclose(found.params, truth, atol=1e-4)


def test_too_few_steps_and_broken_data_do_not_converge():
    X, y = line()
    short = rl.fit(rl.huber, plane, jnp.zeros(2), X, y, optimizer=SGD, steps=2)
    assert not short.converged
    nan = rl.fit(rl.huber, plane, jnp.zeros(2), X, y.at[0].set(jnp.nan), optimizer=SGD, steps=9)
    assert not nan.converged
    assert np.isnan(nan.value)
    wild = rl.fit(rl.squared_error, plane, jnp.zeros(2), X, y, optimizer=optax.sgd(9.0), steps=999)
    assert not wild.converged
    assert not np.isfinite(wild.value)
    assert wild.steps < 999


@pytest.mark.parametrize(
    ("target", "optimizer"),
    [
        (lambda x: 150000 + 20000 * x + 100 * jnp.sin(7 * x), optax.adam(0.1)),
        (lambda x: x.at[3].set(1e6), optax.adam(0.1)),
        (lambda x: 3000 + 5 * x, optax.adam(optax.linear_schedule(0.0, 0.1, 50))),
        (lambda x: 1e3 * x, optax.sgd(1e-9)),
    ],
    ids=["far away", "one wild row", "warm-up from 0", "tiny steps"],
)
@pytest.mark.parametrize("loss", [rl.absolute_error, rl.huber, rl.tukey])
def test_never_converged_before_the_gradient_is_small(loss, target, optimizer):
    x = jnp.arange(12.0) / 6 - 1
    X, y = jnp.stack([jnp.ones(12), x], axis=1), target(x)
    found = rl.fit(loss, plane, jnp.zeros(2), X, y, optimizer=optimizer, steps=300)

    def steepest(params):
        return np.abs(jax.grad(lambda p: rl.mean(loss, X @ p, y))(params)).max()

    if found.converged:
        assert steepest(found.params) <= 2e-4 * steepest(jnp.zeros(2))
    else:
        assert found.steps == 300 or not np.isfinite(found.value)


def test_a_start_at_the_optimum_converges():
    X, y = line()
    best = rl.fit(rl.huber, plane, jnp.zeros(2), X, y, optimizer=LBFGS, steps=300)
    again = rl.fit(rl.huber, plane, best.params, X, y, optimizer=LBFGS, steps=300)
    assert best.converged
    assert again.converged
    assert again.steps <= 3


def test_nothing_finite_is_never_converged():
    y = jnp.array([jnp.inf, -jnp.inf])
    for loss in (rl.squared_error, rl.huber):
        found = rl.fit(loss, lambda p, x: p * x, 0.0, y * 0 + 1, y, optimizer=SGD, steps=9)
        assert not found.converged
    X = jnp.full((2, 1), jnp.nan)
    none = jnp.zeros(2, bool)
    found = rl.fit(rl.huber, plane, jnp.ones(1), X, y, where=none, optimizer=SGD, steps=9)
    np.testing.assert_array_equal(found.params, [1.0])
    assert found.value == 0


def test_mini_batches_minimise_the_weighted_mean_of_all_rows():
    y, w = jnp.tile(jnp.array([0.0, 10.0]), 20), jnp.tile(jnp.array([1.0, 99.0]), 20)
    sgd = optax.sgd(optax.cosine_decay_schedule(0.02, 20000))

    def fit(**batches):
        return rl.fit(
            rl.squared_error, lambda p, x: p + 0 * x, 0.0, y, y,
            weights=w, optimizer=sgd, steps=20000, tolerance=0.0, **batches,
        )  # fmt: skip

    np.testing.assert_allclose(fit().params, 9.9, rtol=1e-4)
    for size in (1, 7):
        np.testing.assert_allclose(fit(batch_size=size, key=KEY).params, 9.9, rtol=5e-3)


def test_partial_models_keep_their_settings():
    X, y = line()

    def model(params, X, *, power, shift):
        return X @ params + shift if power == 1.0 else (X @ params) ** power

    settings = partial(model, power=1.0, shift=np.zeros(40, np.float32))
    found = rl.fit(rl.huber, settings, jnp.zeros(2), X, y, optimizer=SGD, steps=3000)
    plain = rl.fit(rl.huber, plane, jnp.zeros(2), X, y, optimizer=SGD, steps=3000)
    np.testing.assert_allclose(found.params, plain.params, atol=1e-4)


def test_float32_parameters_take_float64_targets():
    with jax.enable_x64(True):
        X, y = (np.asarray(a, np.float64) for a in line())
        start = jnp.zeros(2, jnp.float32)
        found = rl.fit(rl.huber, plane, start, X, y, optimizer=SGD, steps=3000)
        assert found.params.dtype == jnp.float32
        assert found.converged


def test_where_drops_rows_that_hold_anything():
    X, y = line()
    keep = jnp.arange(len(y)) % 5 != 1
    dirty = (jnp.where(keep[:, None], X, jnp.nan), jnp.where(keep, y, jnp.inf))
    fit = partial(rl.fit, rl.log_cosh, plane, jnp.zeros(2), optimizer=SGD, steps=3000)
    chex.assert_trees_all_close(
        fit(*dirty, where=keep).params, fit(X[keep], y[keep]).params, atol=1e-5
    )
    batches = fit(*dirty, where=keep, batch_size=8, key=jax.random.key(0))
    assert np.isfinite(batches.params).all()


def test_weights_count_rows():
    X, y = line()
    count = jnp.arange(len(y)) % 3
    repeated = jnp.repeat(jnp.arange(len(y)), count)
    fit = partial(rl.fit, rl.pseudo_huber, plane, jnp.zeros(2), optimizer=SGD, steps=3000)
    chex.assert_trees_all_close(
        fit(X, y, weights=count).params, fit(X[repeated], y[repeated]).params, atol=1e-4
    )


def test_vmap_over_delta_starts_and_data():
    X, y = line()
    data = jnp.stack([y, y[::-1], -y])
    starts = jax.random.normal(jax.random.key(1), (3, 2))
    deltas = jnp.array([0.1, 1.0, 10.0])

    def fit(delta, start, y):
        loss = partial(rl.huber, delta=delta)
        return rl.fit(loss, plane, start, X, y, optimizer=LBFGS, steps=200)

    together = jax.jit(jax.vmap(fit))(deltas, starts, data)
    for i, case in enumerate(zip(deltas, starts, data, strict=True)):
        alone = fit(*case)
        assert alone.converged
        assert together.converged[i]
        np.testing.assert_allclose(together.params[i], alone.params, atol=2e-3)
        np.testing.assert_allclose(together.value[i], alone.value, rtol=1e-5)


def test_another_delta_does_not_compile_again():
    X, y = line()
    traces = []

    def counted(params, X):
        traces.append(1)
        return X @ params

    def fit(delta):
        loss = partial(rl.huber, delta=delta)
        return rl.fit(loss, counted, jnp.zeros(2), X, y, optimizer=LBFGS, steps=50)

    first = fit(0.5)
    once = len(traces)
    second = fit(5.0)
    assert len(traces) == once + 1  # the check of the shapes alone
    assert not np.allclose(first.params, second.params)


def test_forward_mode_passes_through_the_loop():
    X, y = line()

    def slope(delta):
        loss = partial(rl.huber, delta=delta)
        gd = optax.sgd(0.3)
        return rl.fit(loss, plane, jnp.zeros(2), X, y, optimizer=gd, steps=500).params[0]

    with jax.enable_x64(True):
        X, y = X.astype(jnp.float64), y.astype(jnp.float64)
        _, tangent = jax.jvp(slope, (0.5,), (1.0,))
        np.testing.assert_allclose(tangent, (slope(0.5001) - slope(0.4999)) / 2e-4, rtol=1e-4)


def test_params_are_a_pytree_and_targets_may_have_columns():
    X, y = line()
    Y = jnp.stack([y, 2 * y], axis=1)

    def model(params, inputs):
        return inputs["x"] @ params["w"] + params["b"]

    start = {"w": np.zeros((2, 2), np.float32), "b": [0.0, 0.0]}
    start["b"] = np.zeros(2, np.float32)
    found = rl.fit(rl.huber, model, start, {"x": X}, Y, optimizer=optax.adam(0.05), steps=2000)
    chex.assert_trees_all_equal_shapes(found.params, start)
    np.testing.assert_allclose(found.params["w"][1], [2.0, 4.0], atol=0.2)


def test_bfloat16_parameters_train():
    X, y = line()
    start = jnp.zeros(2, jnp.bfloat16)
    adam = optax.adam(0.05)
    found = rl.fit(rl.huber, plane, start, X.astype(jnp.bfloat16), y, optimizer=adam, steps=300)
    assert found.params.dtype == jnp.bfloat16
    assert found.value.dtype == jnp.float32
    np.testing.assert_allclose(found.params.astype(jnp.float32)[1], 2.0, atol=0.2)


@pytest.mark.parametrize("batch_size", [7, 40])
def test_mini_batches(batch_size):
    X, y = line()
    adam = optax.adam(optax.cosine_decay_schedule(0.1, 2000))

    def fit(seed):
        return rl.fit(
            rl.huber, plane, jnp.zeros(2), X, y,
            optimizer=adam, steps=2000, batch_size=batch_size, key=jax.random.key(seed),
        )  # fmt: skip

    one, same, other = fit(0), fit(0), fit(1)
    every = partial(rl.fit, key=KEY)  # which is for batches alone
    best = every(rl.huber, plane, jnp.zeros(2), X, y, optimizer=LBFGS, steps=200)
    chex.assert_trees_all_equal(one, same)
    if batch_size < len(y):
        assert not np.array_equal(one.history, other.history)
    np.testing.assert_allclose(one.params, best.params, atol=0.02)
    np.testing.assert_allclose(one.value, rl.mean(rl.huber, X @ one.params, y), rtol=1e-6)
    assert one.history[int(one.steps)] == one.value


def test_an_epoch_sees_every_row_once():
    n, seen = 10, []
    X, y = jnp.arange(n, dtype=jnp.float32), jnp.zeros(n)

    def spy(params, x):
        if x.shape == (4,):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return params * x

    found = rl.fit(
        rl.huber, spy, jnp.float32(1.0), X, y,
        optimizer=optax.sgd(1e-9), steps=3, batch_size=4, key=jax.random.key(3),
    )  # fmt: skip
    jax.block_until_ready(found)
    jax.effects_barrier()
    rows = np.concatenate(seen)
    assert sorted(set(rows[: n + 2])) == list(range(n))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps must be >= 1, got 0"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be >= 0, got -1.0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance"),
        (
            {"batch_size": 0, "key": jax.random.key(0)},
            ValueError,
            r"batch_size must be in \[1, 40\], got 0",
        ),
        ({"batch_size": 41, "key": jax.random.key(0)}, ValueError, "got 41"),
        ({"batch_size": 4}, ValueError, "key"),
        ({"batch_size": 4, "key": 7}, TypeError, r"jax.random.key\(7\)"),
        ({"steps": 10.5}, TypeError, "steps must be an integer, got 10.5"),
        ({"params": ()}, ValueError, "params must hold at least one number"),
        (
            {"loss": partial(rl.huber, delta=np.ones(40)), "batch_size": 4, "key": KEY},
            ValueError,
            "cannot differ by row",
        ),
        ({"loss": "huber"}, TypeError, "loss must be a function such as rl.huber, got str"),
        ({"params": jnp.zeros(2, int)}, TypeError, "params must be floating arrays, got dtype int"),
        ({"targets": jnp.zeros((40, 1))}, ValueError, r"\(40,\) and \(40, 1\)"),
        ({"inputs": jnp.zeros((39, 2))}, ValueError, r"39, 2\) for 40 targets"),
        ({"targets": jnp.zeros(())}, ValueError, "scalar"),
        ({"weights": jnp.full(40, -1.0)}, ValueError, "weights must be >= 0, got -1.0"),
        ({"where": jnp.ones(40)}, TypeError, "where must be boolean"),
        ({"where": jnp.ones(39, bool)}, ValueError, r"\(40,\), got shape \(39,\)"),
        ({"loss": partial(rl.huber, delta=-1.0)}, ValueError, "delta must be > 0, got -1.0"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be an optax"),
    ],
)
def test_bad_input_is_told_before_any_work(change, error, words):
    X, y = line()
    good = {"loss": rl.huber, "params": jnp.zeros(2), "inputs": X, "targets": y}
    given = {**good, "optimizer": LBFGS, "steps": 5, **change}
    with pytest.raises(error, match=words):
        rl.fit(
            given.pop("loss"), plane, given.pop("params"), given.pop("inputs"),
            given.pop("targets"), **given,
        )  # fmt: skip


# `converged` is never wrong, whatever the units, the valley or the start.

SLOW = {
    "lbfgs": LBFGS,
    "adam": optax.adam(0.1),
    "sgd": optax.sgd(1e-3),
    "momentum": optax.sgd(1e-2, 0.9),
    "tiny steps": optax.sgd(1e-9),
}


def hostile():
    rng = np.random.default_rng(0)
    n = 60
    one, z = np.ones(n), rng.normal(size=n)
    noise = rng.standard_t(2, size=n)
    for unit in (1e3, 1e5, 1e7):
        X = np.column_stack([one, unit * z])
        yield f"units {unit:g}, exact", X, X @ [1.0, 2.0]
        yield f"units {unit:g}", X, X @ [1.0, 2.0] + noise
        yield f"an intercept in units of {unit:g}", X[:, ::-1] / unit, X @ [1.0, 2.0] / unit
    for apart in (1e-1, 1e-2, 1e-3):
        X = np.column_stack([one, z, z + apart * rng.normal(size=n)])
        yield f"collinear to {apart:g}", X, X @ [1.0, 20.0, -30.0] + noise
    Q, _ = np.linalg.qr(rng.normal(size=(n, 4)))
    V, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    X = n**0.5 * Q @ np.diag([1.0, 1e-2, 1e-4, 1e-5]) @ V.T  # the Hessian's condition is 1e10
    yield "condition 1e10", X, X @ V @ [1.0, 1e2, 1e4, 1e5] + 0.3 * noise


HOSTILE = {name: (X, y) for name, X, y in hostile()}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [n if n in ("lbfgs", "sgd") else pytest.param(n, marks=pytest.mark.thorough) for n in SLOW],
)
def test_converged_is_never_wrong_about_hostile_columns(optimizer, x64):
    """Against the least squares of NumPy: above them by little more than the tolerance."""
    told = 0
    with jax.enable_x64(x64):
        dtype, tolerance = (np.float64, 1e-12) if x64 else (np.float32, 1e-6)
        for name, (X, y) in HOSTILE.items():
            columns = np.zeros((len(y), 4))  # of one shape, so that one program is compiled
            columns[:, : X.shape[1]] = X
            given = columns.astype(dtype), y.astype(dtype)
            found = rl.fit(
                half_squared, plane, np.zeros(4, dtype), *given,
                optimizer=SLOW[optimizer], steps=2000,
            )  # fmt: skip
            if found.converged:
                told += 1
                A, b = (a.astype(np.float64) for a in given)
                best = 0.5 * np.mean((b - A @ np.linalg.lstsq(A, b, rcond=None)[0]) ** 2)
                reached = 0.5 * np.mean((b - A @ np.asarray(found.params, np.float64)) ** 2)
                first = 0.5 * np.mean(b**2)
                assert reached - best <= 10 * tolerance * max(best, tolerance * first), name
        assert told or optimizer != "lbfgs"


def test_units_of_1e5_do_not_hide_what_is_left():
    """What was said to have converged in 7 steps, at a value of 1.404."""
    rng = np.random.default_rng(1)
    X = np.column_stack([np.ones(50), 1e5 * rng.uniform(1, 2, 50)]).astype(np.float32)
    y = X @ np.array([3.0, 2.0], np.float32)
    for optimizer in (LBFGS, optax.adam(0.1), optax.sgd(1e-11)):
        found = rl.fit(rl.huber, plane, jnp.zeros(2), X, y, optimizer=optimizer, steps=500)
        assert not (found.converged and found.value > 1e-3)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam", "sgd", "tiny steps"])
def test_converged_is_never_wrong_in_a_curved_valley(optimizer):
    """Rosenbrock's function as residuals: 10 (b - a^2) and 1 - a, least at (1, 1) alone."""
    with jax.enable_x64(True):
        x = jnp.arange(2.0)

        def model(p, x):
            return jnp.where(x == 0, 10 * (p[1] - p[0] ** 2), 1 - p[0])

        for start in ([-1.2, 1.0], [3.0, 9.0]):
            found = rl.fit(
                half_squared, model, jnp.array(start), x, 0 * x,
                optimizer=SLOW[optimizer], steps=3000,
            )  # fmt: skip
            if found.converged:
                np.testing.assert_allclose(found.params, 1, atol=1e-4)
            assert found.converged or optimizer != "lbfgs"


def two_layers(params, x):
    return jnp.tanh(x[:, None] * params["first"]) @ params["second"]


@pytest.mark.parametrize(
    "optimizer",
    [SGD, *(pytest.param(o, marks=pytest.mark.thorough) for o in (LBFGS, optax.adam(0.1)))],
)
def test_a_gradient_of_zero_is_no_proof(optimizer):
    X, y = line()
    far = rl.fit(rl.tukey, plane, jnp.full(2, 1e3), X, y, optimizer=optimizer, steps=99)
    zeros = {"first": jnp.zeros(3), "second": jnp.zeros(3)}
    saddle = rl.fit(half_squared, two_layers, zeros, X[:, 1], y, optimizer=optimizer, steps=99)
    for found in (far, saddle):
        assert not found.converged
        assert found.steps == 99
        assert found.value == found.history[0]  # nothing moves
    # A little off it, steps lead away.
    off = {"first": jnp.full(3, 1e-20), "second": jnp.full(3, 1e-20)}
    near = rl.fit(half_squared, two_layers, off, X[:, 1], y, optimizer=optimizer, steps=5)
    assert not near.converged
    # Of the same kind and honest: a minimum, and a perfect fit on the plateau of no curvature.
    for loss, there in ((rl.huber, X @ jnp.ones(2)), (rl.absolute_error, X @ jnp.ones(2))):
        stays = rl.fit(loss, plane, jnp.ones(2), X, there, optimizer=optimizer, steps=9)
        assert stays.converged
        assert stays.steps == 0
    middle = rl.fit(
        half_squared, lambda p, x: p * x, jnp.zeros(()), jnp.ones(2), jnp.array([1.0, -1.0]),
        optimizer=optimizer, steps=9,
    )  # fmt: skip
    assert middle.converged
    assert middle.steps == 0


def test_weight_decay_is_not_reported_as_a_minimum_of_the_loss():
    X, y = line()
    adamw = optax.adamw(0.05, weight_decay=0.1)
    found = rl.fit(rl.huber, plane, jnp.zeros(2), X, y, optimizer=adamw, steps=1500)
    slope = jax.grad(lambda p: rl.mean(rl.huber, X @ p, y))(found.params)
    assert np.abs(slope).max() > 1e-2
    assert not found.converged


def test_a_model_that_has_no_second_derivative_is_fitted():
    @jax.custom_vjp
    def product(X, p):
        return X @ p

    product.defvjp(lambda X, p: (X @ p, X), lambda X, ct: (None, ct @ X))
    X, y = line()
    found = rl.fit(
        rl.huber, lambda p, X: product(X, p), jnp.zeros(2), X, y, optimizer=SGD, steps=999
    )
    best = rl.fit(rl.huber, plane, jnp.zeros(2), X, y, optimizer=LBFGS, steps=99)
    assert found.converged
    np.testing.assert_allclose(found.params, best.params, atol=1e-3)


@pytest.mark.parametrize("size", [1e38, 1e-38, 1e-300])
def test_only_the_ratios_of_weights_count(size):
    X, y = line()
    w = np.linspace(1, 3, len(y))
    for batches in ({}, {"batch_size": 8, "key": KEY}):
        fit = partial(rl.fit, rl.huber, plane, jnp.zeros(2), X, y, optimizer=SGD, steps=99)
        want, got = fit(weights=w, **batches), fit(weights=size * w, **batches)
        np.testing.assert_allclose(got.params, want.params, rtol=1e-4)
        np.testing.assert_allclose(got.value, want.value, rtol=1e-5)
    wrong = jax.jit(lambda w: fit(weights=w))(jnp.ones(len(y)).at[3].set(-1.0))
    assert np.isnan(wrong.value)
    assert not wrong.converged


# Under the settings that people debug with.


def test_without_jit_and_with_nan_checks():
    X, y = line(12, 2)
    fit = partial(rl.fit, rl.huber, plane, jnp.zeros(2), X, y, steps=6)
    weighted = partial(fit, weights=jnp.linspace(1, 2, 12))
    ways = [(fit, SGD), (weighted, SGD), (partial(fit, batch_size=5, key=KEY), SGD), (fit, LBFGS)]
    for run, optimizer in ways:
        want = run(optimizer=optimizer)
        with jax.debug_nans(True):
            checked = run(optimizer=optimizer)
        with jax.disable_jit():
            plain = run(optimizer=optimizer)
        for found in (checked, plain):
            np.testing.assert_allclose(found.params, want.params, rtol=1e-4, atol=1e-5)
            assert found.converged == want.converged


@pytest.mark.parametrize("optimizer", [SGD, LBFGS], ids=["sgd", "lbfgs"])
def test_under_strict_settings(optimizer):
    """Not with adam, which itself promotes an integer count, in optax 0.2.8."""
    X, y = line()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for given in ({}, {"where": y < 5}, {"weights": jnp.ones_like(y)}):
            found = rl.fit(
                rl.huber, plane, jnp.zeros(2), X, y, optimizer=optimizer, steps=50, **given
            )
            assert np.isfinite(found.value)


def test_its_type_hints_can_be_read():
    code = (
        "import sys, typing, robustloss as rl; hints = typing.get_type_hints(rl.fit); "
        "assert 'optax' not in sys.modules; assert 'optimizer' in hints; "
        "typing.get_type_hints(rl.Fit)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_parameters_of_several_types_keep_them():
    X, y = line()
    start = {"a": jnp.zeros((), jnp.float16), "b": jnp.zeros(1, jnp.float32)}
    found = rl.fit(
        rl.huber, lambda p, X: X[:, 0] * p["a"] + X[:, 1] * p["b"], start, X, y,
        optimizer=SGD, steps=500,
    )  # fmt: skip
    chex.assert_trees_all_equal_dtypes(found.params, start)
    np.testing.assert_allclose(found.params["b"], 2.0, atol=0.3)


class Words:
    """A leaf that is no number."""


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loss": lambda r: jnp.mean(r**2)}, ValueError, r"elementwise and keep.*got shape \(\)"),
        ({"key": 3, "batch_size": 4}, TypeError, r"key must be a jax.random.key, got 3"),
        ({"key": "3", "batch_size": 4}, TypeError, "key must be a jax.random.key, got str"),
        ({"key": jnp.ones(2), "batch_size": 4}, TypeError, "got dtype float32"),
        ({"params": {"w": jnp.zeros(2), "f": jnp.tanh}}, TypeError, r"params\['f'\].*partition"),
        ({"params": {"w": jnp.zeros(2), "n": 3}}, TypeError, r"int at params\['n'\]"),
        ({"params": {"w": jnp.zeros(2), "o": Words()}}, TypeError, r"Words at params\['o'\]"),
        ({"params": [jnp.zeros(2), jnp.zeros(2, int)]}, TypeError, r"int32 at params\[1\]"),
        ({"inputs": np.array([["a", "b"]] * 40)}, TypeError, "inputs must be real numbers"),
        ({"inputs": np.full((40, 2), None)}, TypeError, "inputs must.*convert it to floats"),
        ({"targets": np.array([None] * 40)}, TypeError, "targets must.*convert it to floats"),
        ({"weights": np.full(40, np.inf)}, ValueError, "weights must be finite, got inf"),
        ({"model": lambda p, X: (X @ p, 1)}, TypeError, "model must return one array.*tuple"),
        ({"model": lambda p, X: jnp.sum(X @ p)}, ValueError, r"model must.*\(\) and \(40,\)"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(change, error, words):
    X, y = line()
    given = {"loss": rl.huber, "model": plane, "params": jnp.zeros(2), "inputs": X, "targets": y}
    given = {**given, "optimizer": SGD, "steps": 5, **change}
    with pytest.raises(error, match=words):
        rl.fit(**given)


def test_an_empty_leaf_is_left_alone():
    X, y = line()
    start = {"w": jnp.zeros(2), "none": jnp.zeros((0, 3))}
    found = rl.fit(rl.huber, lambda p, X: X @ p["w"], start, X, y, optimizer=SGD, steps=3000)
    assert found.converged
    assert found.params["none"].shape == (0, 3)


def test_sharded_rows_give_the_same_fit_on_eight_devices():
    script = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import robustloss as rl
assert jax.device_count() == 8
rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(800, 3)), jnp.float32)
y = X @ jnp.array([1.0, 2.0, 3.0]) + jnp.asarray(rng.standard_t(2, size=800), jnp.float32)
mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, P("rows"))
fit = lambda X, y: rl.fit(rl.huber, lambda p, X: X @ p, jnp.zeros(3), X, y,
                          optimizer=optax.lbfgs(), steps=100)
one, many = fit(X, y), fit(jax.device_put(X, rows), jax.device_put(y, rows))
assert one.converged and many.converged
np.testing.assert_allclose(many.params, one.params, rtol=1e-4)
np.testing.assert_allclose(many.value, one.value, rtol=1e-5)
"""
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, check=False, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
