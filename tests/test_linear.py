"""Linear fits: against what R prints, exact optima, and laws."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

import robustloss as rl
from experiments.data import load, names

REFERENCE = Path(__file__).parent / "reference"
R = json.loads((REFERENCE / "linear.json").read_text())["fits"]
OPTIMA = json.loads((REFERENCE / "optima.json").read_text())["datasets"]
NAN, INF = float("nan"), float("inf")

# R divides the MAD by 0.6745.
ROUNDED = 0.674489750196082 / 0.6745
FITS = {
    "huber": (rl.huber, {"tuning": 1.345 * ROUNDED}),
    "proposal2": (rl.huber, {"tuning": 1.345, "scale": "proposal2"}),
    "bisquare": (rl.tukey, {"tuning": 4.685 * ROUNDED, "method": "irls"}),
    "hampel": (partial(rl.hampel, knots=(2.0, 4.0, 8.0)), {"tuning": ROUNDED, "method": "irls"}),
    "mm": (rl.tukey, {"tuning": 4.685061}),
    "mae": (rl.absolute_error, {}),
}
SMALL = [name for name in names() if name != "california"]
BROKEN = {"a NaN": NAN, "an infinity": INF}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def padded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The small sets in one array: columns of 0, and rows to drop that hold anything.

    Then stackloss, broken in ways that must show.
    """
    sets = [load(name) for name in (*SMALL, *len(BROKEN) * ["stackloss"])]
    X, y = np.zeros((len(sets), 235, 5)), np.full((len(sets), 235), NAN)
    keep = np.zeros(y.shape, bool)
    for i, data in enumerate(sets):
        n, p = data.X.shape
        X[i, :n, :p], y[i, :n], keep[i, :n] = data.X, data.y, True
        X[i, n:] = INF
    y[len(SMALL) :, 7] = list(BROKEN.values())
    return X, y, keep


@cache
def fits(kind: str) -> dict[str, rl.LinearFit]:
    loss, settings = FITS[kind]

    def one(X, y, keep):
        return rl.fit_linear(X, y, loss, where=keep, **settings)

    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, jax.vmap(one)(*padded()))
    each = enumerate((*SMALL, *BROKEN))
    return {name: jax.tree.map(lambda x, i=i: x[i], found) for i, name in each}


def check_that_broken_data_show(kind):
    for name in BROKEN:
        assert not fits(kind)[name].converged, f"{kind} hides {name}"


def error(name: str, found: rl.LinearFit, coef: list[float]) -> float:
    """Of the coefficients of standardised columns, in standard deviations of y."""
    data = load(name)
    p = data.X.shape[1]
    off = np.asarray(found.coefficients)[:p] - coef[1:]
    middle = found.intercept - coef[0] + data.X.mean(0) @ off
    return max(abs(middle), *np.abs(off * data.X.std(0))) / data.y.std()


@pytest.mark.parametrize(
    "kind",
    [
        "huber",
        *(pytest.param(k, marks=pytest.mark.thorough) for k in ("bisquare", "proposal2", "hampel")),
    ],
)
def test_is_rlm(kind):
    """All sets in one compiled batch."""
    known = [name for name in SMALL if kind in R[name]]
    assert set(SMALL) - set(known) <= {"siegel"}
    for name in known:
        check_rlm(name, kind)
    check_that_broken_data_show(kind)


def check_rlm(name, kind):
    want, found = R[name][kind], fits(kind)[name]
    p = len(want["coef"])
    assert found.converged
    assert error(name, found, want["coef"]) < 1e-10
    rounded = 1 if kind == "proposal2" else ROUNDED
    np.testing.assert_allclose(found.scale * rounded, want["scale"], rtol=1e-10)
    errors = np.sqrt(np.diag(found.covariance))[:p]
    np.testing.assert_allclose(errors, want["se"], rtol=1e-9)
    # The columns of 0 that were added.
    assert np.all(found.coefficients[p - 1 :] == 0)
    assert np.all(np.isnan(found.covariance[p:]))
    assert found.unique == (p == 6)


def test_mae_is_the_exact_vertex():
    for name in SMALL:
        check_mae(name)
    check_that_broken_data_show("mae")


def check_mae(name):
    found, want = fits("mae")[name], R[name]["mae"]
    kept = ~np.isnan(found.residuals)
    objective = np.abs(found.residuals[kept]).sum()
    assert found.converged
    np.testing.assert_allclose(objective, want["objective_sum_abs"], rtol=1e-12)
    p = len(want["coef"])
    assert np.sum(found.residuals == 0) >= p
    assert np.sum(np.isinf(found.weights)) == np.sum(found.residuals == 0)
    if name == "phones":
        assert objective == pytest.approx(844, rel=1e-13)
    else:
        assert error(name, found, want["coef"]) < 1e-12
        errors = np.sqrt(np.diag(found.covariance))[:p]
        np.testing.assert_allclose(errors, want["se"], rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["phones", "stackloss", "engel"])
def test_says_whether_mae_is_unique(x64, name):
    data = load(name)
    assert bool(rl.fit_linear(data.X, data.y, rl.absolute_error).unique) == (name != "phones")


def test_mm_is_lmrob():
    for name in SMALL:
        check_mm(name)
    check_that_broken_data_show("mm")


def check_mm(name):
    found, want = fits("mm")[name], R[name]["mm"]
    p = len(want["coef"])
    assert found.converged
    if name == "siegel":  # six of nine rows are on y = 0
        assert found.scale == 0
        np.testing.assert_allclose(found.coefficients[:1], 0, atol=1e-14)
        np.testing.assert_array_equal(np.flatnonzero(found.flagged()[:9]), [6, 7, 8])
        return
    assert found.scale <= want["scale"] * (1 + 1e-8)
    np.testing.assert_allclose(found.scale, want["scale"], rtol=5e-6)  # 1.547645, not 1.54764
    assert error(name, found, want["coef"]) < 2e-6
    np.testing.assert_allclose(np.sqrt(np.diag(found.covariance))[:p], want["se"], rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", FITS)
def test_california(x64, kind):
    data, want = load("california"), R["california"][kind]
    loss, settings = FITS[kind]
    found = rl.fit_linear(data.X, data.y, loss, **settings)
    assert found.converged
    assert error("california", found, want["coef"]) < (1e-4 if kind == "mm" else 1e-10)
    if kind == "mm":  # a few of its many starts lead to the lowest scale, whatever the key
        keys = jax.random.split(jax.random.key(1), 5)
        scales = [rl.fit_linear(data.X, data.y, loss, key=key, **settings).scale for key in keys]
        assert max(found.scale, *scales) <= want["scale"] * (1 + 1e-6)
    elif kind != "mae":
        np.testing.assert_allclose(found.standard_errors(), want["se"], rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("loss", ["half_squared", "huber", "log_cosh", "pseudo_huber"])
def test_optima_at_a_fixed_scale(loss):
    X, y, keep = padded()
    problems = [
        (i, problem)
        for i, name in enumerate(SMALL)
        for problem in OPTIMA[name]["problems"]
        if problem["loss"] == loss
    ]
    assert problems
    index = np.array([i for i, _ in problems])
    with jax.enable_x64(True):
        if loss == "half_squared":
            fit = partial(rl.fit_linear, loss=rl.squared_error, scale=1.0)
            found = jax.vmap(lambda X, y, k: fit(X, y, where=k))(X[index], y[index], keep[index])
        else:
            c = np.array([problem["c"] or 1.0 for _, problem in problems])
            s = np.array([problem["scale"] for _, problem in problems])

            def one(X, y, keep, c, s):
                return rl.fit_linear(X, y, getattr(rl, loss), tuning=c, scale=s, where=keep)

            found = jax.vmap(one)(X[index], y[index], keep[index], c, s)
    for j, (i, problem) in enumerate(problems):
        one = jax.tree.map(lambda x, j=j: np.asarray(x[j]), found)
        assert one.converged, SMALL[i]
        assert error(SMALL[i], one, problem["coef"]) < 1e-10, SMALL[i]


@pytest.mark.thorough
def test_float32():
    data = load("stackloss")
    for kind in ("huber", "mae", "mm"):
        loss, settings = FITS[kind]
        found = rl.fit_linear(data.X.astype("f4"), data.y.astype("f4"), loss, **settings)
        assert found.coefficients.dtype == jnp.float32
        assert found.converged
        assert error("stackloss", found, R["stackloss"][kind]["coef"]) < 1e-4


@pytest.mark.thorough
def test_printed_by_the_textbook(x64):
    """Rousseeuw and Leroy (1987), p. 27: least squares, and the giants that it follows."""
    stars = load("starsCYG")
    least = rl.fit_linear(stars.X, stars.y, rl.squared_error)
    assert f"{least.intercept:.3f} {least.coefficients[0]:.3f}" == "6.793 -0.413"
    robust = rl.fit_linear(stars.X, stars.y, rl.tukey)
    assert sorted(set(np.flatnonzero(robust.weights < 0.01) + 1)) == [11, 20, 30, 34]


# Laws.


def sample(n: int = 60, p: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    X = random.normal(size=(n, p))
    y = X @ np.arange(1.0, p + 1) + 5 + random.standard_t(2, n)
    return X, y


KINDS = {
    "irls": rl.huber,
    "interior_point": partial(rl.quantile, q=0.3),
    "mm": rl.tukey,
}


each = pytest.mark.parametrize(
    "method", ["irls", *(pytest.param(m, marks=pytest.mark.thorough) for m in list(KINDS)[1:])]
)


@each
def test_moves_with_the_data(x64, method):
    """Regression, scale and affine equivariance; columns that differ by 1e12 in size."""
    X, y = sample()
    fit = partial(rl.fit_linear, loss=KINDS[method])
    found = fit(X, y)
    assert found.converged
    units, slopes = np.array([1e-6, 1.0, 1e6]), np.array([3.0, -7.0, 0.5])
    moved = (X + np.array([0.0, 100.0, -5.0])) * units
    other = fit(moved, 4.0 * (y + X @ slopes) + 50)
    assert other.converged
    want = 4 * (found.coefficients + slopes) / units
    np.testing.assert_allclose(other.coefficients, want, rtol=1e-9)
    np.testing.assert_allclose(other.residuals, 4 * found.residuals, atol=1e-9)
    np.testing.assert_allclose(other.scale, 4 * found.scale, rtol=1e-9)
    ratio = other.standard_errors()[1:] * units / found.standard_errors()[1:]
    np.testing.assert_allclose(ratio, 4, rtol=1e-7)
    fitted = 4.0 * (y + X @ slopes) + 50 - other.residuals
    np.testing.assert_allclose(other.predict(moved), fitted, rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("method", KINDS)
def test_masks_and_weights(x64, method):
    """What is dropped may hold anything; a weight of 0 drops, one of 2 is two rows."""
    X, y = sample()
    fit = jax.jit(partial(rl.fit_linear, loss=KINDS[method]))
    keep = np.arange(60) % 5 != 0
    short = rl.fit_linear(X[keep], y[keep], KINDS[method])
    bad_X, bad_y = np.where(keep[:, None], X, NAN), np.where(keep, y, -INF)
    masked = fit(bad_X, bad_y, where=keep)
    assert masked.converged
    assert short.converged
    np.testing.assert_allclose(masked.coefficients, short.coefficients, rtol=1e-8)
    np.testing.assert_allclose(masked.scale, short.scale, rtol=1e-8)
    np.testing.assert_allclose(masked.covariance, short.covariance, rtol=1e-6)
    assert np.all(np.isnan(masked.residuals[~keep]))
    assert np.all(masked.weights[~keep] == 0)
    twice = np.where(np.arange(60) < 20, 2.0, 1.0)
    if method != "mm":  # whose scale counts degrees of freedom
        weighted = fit(X, y, weights=twice)
        repeated = rl.fit_linear(np.r_[X, X[:20]], np.r_[y, y[:20]], KINDS[method])
        np.testing.assert_allclose(weighted.coefficients, repeated.coefficients, rtol=1e-8)
        np.testing.assert_allclose(weighted.scale, repeated.scale, rtol=1e-8)


@pytest.mark.thorough
@each
def test_forward_mode_passes_through_a_fit(x64, method):
    X, y = sample()
    change = np.random.default_rng(1).normal(size=X.shape)

    @jax.jit
    def fit(h):
        found = rl.fit_linear(X + h * change, y + h * change[:, 0], KINDS[method])
        return found.coefficients

    _, got = jax.jvp(fit, (0.0,), (1.0,))
    np.testing.assert_allclose(got, (fit(1e-6) - fit(-1e-6)) / 2e-6, rtol=1e-6)


@each
def test_columns_that_depend_on_others(x64, method):
    X, y = sample()
    found = rl.fit_linear(X, y, KINDS[method])
    double = rl.fit_linear(np.c_[X, X[:, 0] - X[:, 1]], y, KINDS[method])
    assert double.converged
    assert not double.unique
    np.testing.assert_allclose(double.residuals, found.residuals, atol=1e-8)
    told = [True, False, False, True, False]
    np.testing.assert_array_equal(~np.isnan(np.diag(double.covariance)), told)
    np.testing.assert_allclose(double.covariance[3, 3], found.covariance[3, 3], rtol=1e-6)


def test_columns_that_nearly_depend_on_others(x64):
    """The same fit in worse and worse columns, until rounding makes them dependent."""
    X, y = sample()
    apart = np.array([1, 1e-3, 1e-5, 1e-6, 1e-9, 1e-15, 0])
    columns = np.stack([np.c_[X[:, :2], X[:, 1] + d * X[:, 2]] for d in apart])
    found = jax.vmap(rl.fit_linear, (0, None))(columns, y)
    assert jnp.all(found.converged)
    np.testing.assert_array_equal(found.unique, apart > 1e-12)
    whole, one_less = (rl.fit_linear(x, y).residuals for x in (X, X[:, :2]))
    for d, residuals in zip(apart, found.residuals, strict=True):
        if d > 1e-12:
            np.testing.assert_allclose(residuals, whole, atol=1e-14 / d)
        else:
            np.testing.assert_allclose(residuals, one_less, atol=1e-8)


def test_singular_values_are_for_columns_that_depend_on_others():
    """Cholesky's factor serves for all others: XLA must leave the decomposition in its branch."""
    decomposition = jax.jit(jnp.linalg.svd).lower(np.ones((20, 3))).compile().as_text()
    (name,) = set(re.findall(r'custom_call_target="([^"]+)"', decomposition))  # of this platform
    program = jax.jit(jax.vmap(rl.fit_linear)).lower(np.ones((9, 20, 3)), np.ones((9, 20)))
    program = program.compile().as_text()
    assert name in program
    assert name not in program[program.index("\nENTRY ") :]


@each
def test_what_fits_exactly(x64, method):
    """A line, a constant, and as many rows as coefficients: scale 0, and converged."""
    X, _ = sample()
    loss = KINDS[method]
    for y in (X @ [1.0, 2.0, 3.0] + 4, np.full(60, 3.25)):
        found = rl.fit_linear(X, y, loss)
        assert found.converged
        np.testing.assert_allclose(found.predict(X), y, atol=1e-12)
        assert found.scale == 0
    few = rl.fit_linear(X[:4], X[:4, 0] ** 2, loss)
    np.testing.assert_allclose(few.residuals, 0, atol=1e-12)


@pytest.mark.thorough
def test_a_nan_shows_in_a_single_fit(x64):
    X, y = sample()
    for bad in BROKEN.values():
        for loss in KINDS.values():
            found = rl.fit_linear(X, np.where(np.arange(60) == 7, bad, y), loss)
            assert not found.converged


@pytest.mark.thorough
def test_mm_survives_outliers(x64):
    """Just under (n - p) / 2n in y; in X, all at one place, where subsets without one are rare."""
    X, y = sample(200)
    cases = [("y", 90, 1e6), ("y", 60, 30.0), ("X", 80, -1e3), ("X", 80, -1e9), ("X", 40, 30.0)]
    inputs, targets = [], []
    for outliers, bad, value in cases:
        rows = np.arange(200) < bad
        inputs.append(np.where(rows[:, None] & (outliers == "X"), 50 + 0.1 * X, X))
        targets.append(np.where(rows, value, y))
    inputs, targets = np.stack(inputs), np.stack(targets)
    found = jax.vmap(partial(rl.fit_linear, loss=rl.tukey))(inputs, targets)
    huber = jax.vmap(rl.fit_linear)(inputs, targets)
    assert np.all(found.converged)
    assert np.all(huber.converged)
    for case, (outliers, bad, _) in enumerate(cases):
        off = np.abs(found.coefficients[case] - np.arange(1, 4))
        assert np.max(off) < 0.5, cases[case]
        assert np.all(found.flagged()[case, :bad])
        assert np.sum(found.flagged()[case, bad:]) < 10
        if outliers == "X":
            assert np.max(np.abs(huber.coefficients[case] - np.arange(1, 4))) > 0.5


@pytest.mark.parametrize("n", [66_003, pytest.param(66_048, marks=pytest.mark.thorough)])
def test_many_rows(x64, n):
    """In blocks, of 3 groups and of 64; NumPy's own test of the exact answer."""
    X, y = sample(n)
    y[: n // 10] += 50
    keep = np.arange(n) % 8 != 0  # of every eighth row, where the start might look, none
    found = rl.fit_linear(X, np.where(keep, y, NAN), where=keep)
    A, r = np.c_[np.ones(n), X][keep], -np.asarray(found.residuals)[keep]
    assert found.converged
    assert found.steps <= 4  # or it does not follow the scale
    np.testing.assert_allclose(found.scale, 1.4826022185056018 * np.median(np.abs(r)), rtol=1e-12)
    k = rl.tune(rl.huber, efficiency=0.95) * found.scale
    inside = A[np.abs(r) <= k]
    off = np.linalg.solve(inside.T @ inside, A.T @ np.clip(r, -k, k))
    assert np.max(np.abs(off)) < 1e-11 * found.scale


@pytest.mark.thorough
def test_mm_of_many_rows(x64):
    """Subsets of groups of the rows; the S scale is no larger than the truth has it."""
    n = 3000
    X, y = sample(n)
    X[: n // 3], y[: n // 3] = 50 + 0.1 * X[: n // 3], -1e3
    found = rl.fit_linear(X, y, rl.tukey)
    assert found.converged
    assert found.steps <= 15  # or few of them are Newton's
    truth = rl.m_scale(y - X @ [1.0, 2, 3] - 5, breakdown=0.5 * (1 - 4 / n), center=0.0)
    assert 0.95 * truth < found.scale <= truth
    assert np.all(found.flagged()[: n // 3])
    np.testing.assert_allclose(found.coefficients, [1, 2, 3], atol=0.2)


MANY = [("everywhere", 0.5, True)]
MANY += [
    pytest.param(*case, weighed, marks=pytest.mark.thorough)
    for case in (("leverage", 0.2), ("everywhere", 0.5), ("heavy", 0.999))
    for weighed in (True, False)
    if (*case, weighed) != MANY[0]
]


@pytest.mark.parametrize(("rows", "q", "weighed"), MANY)
def test_quantiles_of_many_rows(x64, rows, q, weighed):
    """The rows that are met balance the gradient of the others, each within its slopes."""
    n, random = 66_003, np.random.default_rng(1)
    X, y = sample(n)
    if rows == "leverage":
        X[:5] *= 100
    elif rows == "everywhere":
        X = random.standard_cauchy(X.shape)
        y = X @ [1.0, 2, 3] + random.normal(size=n)
    else:
        y = X @ [1.0, 2, 3] + random.standard_t(2, n)
    keep = np.arange(n) % 2 == 1  # every second one, where the first round might look
    w = random.uniform(0.5, 2, n) if weighed else np.ones(n)
    found = rl.fit_linear(
        X, y, partial(rl.quantile, q=q), where=keep, weights=w if weighed else None
    )
    e, A, y, w = np.asarray(found.residuals)[keep], np.c_[np.ones(n), X][keep], y[keep], w[keep]
    met = e == 0
    assert found.converged
    assert found.unique
    assert met.sum() == 4
    np.testing.assert_allclose(e, y - A @ np.r_[found.intercept, found.coefficients], atol=1e-9)
    pull = w[~met] * np.where(e[~met] > 0, q, q - 1)
    carried = np.linalg.solve(A[met].T, -A[~met].T @ pull) / w[met]
    assert np.all((carried > q - 1) & (carried < q))


def test_many_rows_that_are_met_together(x64):
    """More than take part: on a plane, and whole numbers, whose medians are those of groups."""
    n, random = 66_003, np.random.default_rng(2)
    X, y = sample(n)
    w = random.integers(1, 3, n)
    fit = partial(rl.fit_linear, loss=partial(rl.quantile, q=0.5), weights=w, where=y < INF)
    y = np.where(random.random(n) < 0.6, X @ [1.0, 2, 3] + 5, y + random.standard_t(2, n))
    zeros = np.where(random.random(n) < 0.6, 0, random.exponential(size=n))  # the MAD is 0
    for given, truth in ((y, [1, 2, 3, 5]), (zeros, [0] * 4), (np.full(n, 3.0), [0, 0, 0, 3])):
        plane = fit(X, given)
        assert plane.converged
        assert plane.unique
        np.testing.assert_allclose([*plane.coefficients, plane.intercept], truth, atol=1e-12)

    group = random.integers(0, 4, n)
    y = random.poisson(3.5, n) + 2.0 * group
    found = fit(np.eye(4)[group][:, 1:], y)
    medians = [np.median(np.repeat(y[group == g], w[group == g])) for g in range(4)]
    assert found.converged
    assert found.unique
    np.testing.assert_allclose(found.intercept, medians[0], atol=1e-12)
    np.testing.assert_allclose(found.intercept + found.coefficients, medians[1:], atol=1e-12)


@pytest.mark.parametrize("n", [60, 66_003])
def test_float32_stays_float32_where_float64_is_on(x64, n):
    X, y = (jax.ShapeDtypeStruct(a.shape, np.float32) for a in sample(n))
    for loss in KINDS.values():
        found = jax.eval_shape(partial(rl.fit_linear, loss=loss), X, y)
        floating = {a.dtype for a in jax.tree.leaves(found) if jnp.issubdtype(a.dtype, np.floating)}
        assert floating == {np.dtype(np.float32)}


def test_a_scale_is_in_the_program_once():
    """It is most of what there is to compile."""
    seen = []

    def counted(r, *, center):
        seen.append(r.shape)
        return rl.mad(r, center=center)

    jax.make_jaxpr(partial(rl.fit_linear, scale=counted))(*sample())
    assert len(seen) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("method", KINDS)
def test_memory_of_many_rows(x64, method):
    """Less than the data take themselves: XLA must write no second X."""
    X, y = (jax.ShapeDtypeStruct((1_000_000, *p), float) for p in ((10,), ()))
    fit = jax.jit(partial(rl.fit_linear, loss=KINDS[method]))
    needed = fit.lower(X, y).compile().memory_analysis()
    given = needed.argument_size_in_bytes
    assert given == 88_000_000
    assert needed.temp_size_in_bytes + needed.output_size_in_bytes < given


@pytest.mark.thorough
def test_a_thousand_at_once(x64):
    random = np.random.default_rng(5)
    X = random.normal(size=(1000, 30, 2))
    y = X @ [1.0, 2.0] + random.standard_t(2, (1000, 30))
    for loss in KINDS.values():
        found = jax.vmap(partial(rl.fit_linear, loss=loss))(X, y)
        assert np.all(found.converged)
        if loss is rl.huber:  # steps that took the scale as fixed needed up to a hundred
            assert np.max(found.steps) <= 15
        for i in (0, 500, 999):
            one = rl.fit_linear(X[i], y[i], loss)
            np.testing.assert_allclose(found.coefficients[i], one.coefficients, rtol=1e-7)


SHARDED = """
from functools import partial
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
import robustloss as rl
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, P("rows"))
random = np.random.default_rng(0)
for n, loss in ((320, rl.huber), (320, rl.tukey), (320, rl.absolute_error), (40_000, rl.huber)):
    X = random.normal(size=(n, 3))
    y = X @ [1.0, 2.0, 3.0] + random.standard_t(3, n)
    here = rl.fit_linear(X, y, loss)
    there = rl.fit_linear(*jax.device_put((X, y), rows), loss)
    assert here.converged and there.converged
    for name in ("coefficients", "intercept", "scale"):
        a, b = getattr(here, name), getattr(there, name)
        np.testing.assert_allclose(a, b, rtol=1e-9)
print("same")
"""


@pytest.mark.thorough
def test_rows_on_eight_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(
        command, env=os.environ | flags, capture_output=True, text=True, check=False
    )
    assert done.stdout == "same\n", done.stderr


@pytest.mark.thorough
def test_quantiles_are_linear_programmes(x64):
    """Also where many rows are met by chance, and with weights."""
    random = np.random.default_rng(4)
    fit = jax.jit(lambda X, y, q, w: rl.fit_linear(X, y, partial(rl.quantile, q=q), weights=w))
    for trial in range(12):
        X = random.integers(-2, 3, (40, 2)).astype(float)
        y = random.integers(-3, 4, 40).astype(float) if trial % 2 else random.normal(size=40)
        q, w = random.uniform(0.05, 0.95), random.integers(1, 4, 40).astype(float)
        found = fit(X, y, q, w)
        A = np.c_[np.ones(40), X]
        programme = optimize.linprog(
            np.r_[np.zeros(3), q * w, (1 - q) * w],
            A_eq=np.c_[A, np.eye(40), -np.eye(40)], b_eq=y,
            bounds=[(None, None)] * 3 + [(0, None)] * 80,
        )  # fmt: skip
        e = np.asarray(found.residuals)
        objective = np.sum(w * np.maximum(q * e, (q - 1) * e))
        assert found.converged
        np.testing.assert_allclose(objective, programme.fun, rtol=1e-10, atol=1e-10)


@pytest.mark.thorough
def test_unique_where_linear_programmes_are(x64):
    """Of integers, where many rows are met at once: the range of a direction over all optima."""
    random = np.random.default_rng(0)
    sets, n = 60, 24
    X = random.integers(0, 4, (sets, n, 2)).astype(float)
    y = X @ [1.0, 2.0] + random.integers(-2, 3, (sets, n))
    direction = np.r_[random.normal(size=3), np.zeros(2 * n)]
    cost, free = np.r_[np.zeros(3), np.full(2 * n, 0.5)], [(None, None)] * 3 + [(0, None)] * 2 * n
    widths = []
    for x, target in zip(X[:20], y[:20], strict=True):
        rows = {"A_eq": np.c_[np.ones(n), x, np.eye(n), -np.eye(n)], "b_eq": target, "bounds": free}
        least = optimize.linprog(cost, **rows).fun
        optima = rows | {"A_ub": cost[None], "b_ub": [least + 1e-9]}
        ends = [optimize.linprog(way * direction, **optima).fun for way in (1, -1)]
        widths.append(-sum(ends))
    unique = np.array(widths) < 1e-5
    assert 0 < np.sum(unique) < 20
    fits = jax.jit(jax.vmap(partial(rl.fit_linear, loss=rl.absolute_error)))
    np.testing.assert_array_equal(fits(X, y).unique[:20], unique)
    y[:, 0] = 1e3
    unique = fits(X, y).unique
    assert not np.all(unique)
    y[:, 0] = 1e9  # how far off a row is does not matter
    np.testing.assert_array_equal(fits(X, y).unique, unique)


def test_most_of_y_is_one_number(x64):
    """Its MAD is 0 then, and says nothing about what rounding is relative to."""
    X, y = sample()
    for spaced in (6, 10):
        y = np.where(np.arange(60) % spaced > 0, 3.0, y)
        found = rl.fit_linear(X, y)
        assert found.converged
        assert found.scale == 0
        np.testing.assert_allclose(found.coefficients, 0, atol=1e-13)
        np.testing.assert_allclose(found.intercept, 3, rtol=1e-13)


@pytest.mark.thorough
def test_powell_in_numpy(x64):
    X, y = sample(200, 2)
    q = 0.3
    found = rl.fit_linear(X, y, partial(rl.quantile, q=q))
    A, e, n = np.c_[np.ones(200), X], np.asarray(found.residuals), 200
    x, z = stats.norm.ppf(q), stats.norm.ppf(0.975)
    h = n ** (-1 / 3) * z ** (2 / 3) * (1.5 * stats.norm.pdf(x) ** 2 / (2 * x**2 + 1)) ** (1 / 3)
    assert q - h > 0
    spread = min(e.std(ddof=1), np.subtract(*np.quantile(e, [0.75, 0.25])) / 1.34)
    width = (stats.norm.ppf(q + h) - stats.norm.ppf(q - h)) * spread
    D = np.linalg.inv(A.T @ (A * (stats.norm.pdf(e / width) / width)[:, None]))
    np.testing.assert_allclose(found.covariance, q * (1 - q) * D @ A.T @ A @ D, rtol=1e-9)


@pytest.mark.thorough
def test_several_targets_and_no_intercept(x64):
    X, y = sample()
    Y = np.stack([y, -y, X @ [1.0, 0.0, 0.0] + np.sin(np.arange(60))], 1)
    found = rl.fit_linear(X, Y, intercept=False)
    assert found.coefficients.shape == (3, 3)
    assert found.covariance.shape == (3, 3, 3)
    assert np.all(found.intercept == 0)
    assert found.predict(X).shape == (60, 3)
    np.testing.assert_allclose(Y - found.predict(X), found.residuals, atol=1e-12)
    for i in range(3):
        one = rl.fit_linear(X, Y[:, i], intercept=False)
        np.testing.assert_allclose(found.coefficients[:, i], one.coefficients, rtol=1e-9)
        np.testing.assert_allclose(found.predict(X)[:, i], Y[:, i] - one.residuals, rtol=1e-9)
        np.testing.assert_allclose(found.flagged()[:, i], one.flagged())


def test_dropped_rows_are_not_there(x64):
    """Of few rows "mm" takes all subsets: as many as there are of the rows that are kept."""
    random = np.random.default_rng(1)
    X = random.normal(size=(7, 2))
    y = X.sum(1) + random.normal(size=7)
    alone = rl.fit_linear(X, y, rl.tukey)
    assert alone.converged
    for dropped in (2, 60):
        padded = np.r_[X, np.full((dropped, 2), np.nan)], np.r_[y, np.full(dropped, np.nan)]
        found = rl.fit_linear(*padded, rl.tukey, where=np.arange(7 + dropped) < 7)
        assert found.converged
        np.testing.assert_allclose(found.coefficients, alone.coefficients, rtol=1e-9)
        np.testing.assert_allclose(found.scale, alone.scale, rtol=1e-9)


@pytest.mark.parametrize("dropped", [0, 5])
def test_as_many_rows_off_the_fit_as_the_breakdown_point_allows(dropped):
    """Two of seven, with three coefficients: the S-scale is 0, however shares are rounded."""
    X = np.array([[1.5, 1.5], [-1, 0], [-1.5, 0], [1.5, -1], [1.5, 0], [0.5, -1], [0.5, 0.5]], "f4")
    y = np.array([-4, 2, 3, 1, -1, 2, -1], "f4")
    X, y = np.r_[X, np.zeros((dropped, 2), "f4")], np.r_[y, np.zeros(dropped, "f4")]
    found = rl.fit_linear(X, y, rl.tukey, where=np.arange(7 + dropped) < 7)
    assert found.converged
    assert found.scale == 0
    np.testing.assert_allclose([found.intercept, *found.coefficients], [0.5, -1, -2], rtol=1e-6)


def test_the_equations_of_small_integer_data_hold(x64):
    """Sets of five rows whose matrix of curvatures is nearly singular: one used to end at 2.04."""
    X = np.array([[-6, 0], [-7, 2], [-1, 3], [7, 4], [-8, -6]], float)
    found = rl.fit_linear(X, np.array([0, -7, 8, 5, -5.0]))
    assert found.converged
    random = np.random.default_rng(0)
    X = np.concatenate([X[None], random.integers(-9, 10, (999, 5, 2))])
    y = np.concatenate([[[0, -7, 8, 5, -5.0]], random.integers(-9, 10, (999, 5))])
    found = jax.tree.map(np.asarray, jax.vmap(rl.fit_linear)(X, y))
    assert np.all(found.converged | (found.scale == 0))  # one set, with a row that stands twice
    assert np.sum(~found.converged) <= 1
    at = found.converged & found.unique & (found.scale > 1e-9)
    A = np.concatenate([np.ones((1000, 5, 1)), X - X.mean(1, keepdims=True)], 2)[at]
    e, scale = found.residuals[at], found.scale[at]
    psi = np.clip(e, *(1.344997508 * np.stack([-scale, scale])[..., None]))
    total = np.abs(np.einsum("fr,frc->fc", psi, A))
    size = np.einsum("fr,frc->fc", np.abs(psi), np.abs(A))
    rounding = 1e-14 * np.abs(A).max(1) * (np.abs(y[at]).max(1) + 1)[:, None]
    assert np.all(total <= 1e-8 * size + 5 * rounding)
    mad = np.median(np.abs(e), axis=1) / stats.norm.ppf(0.75)
    np.testing.assert_allclose(scale, mad, rtol=1e-9, atol=1e-13)


@each
def test_what_cannot_be_fitted_is_nan(x64, method):
    """No rows, no weights, a NaN where the weight is 0, a traced negative weight."""
    X, y = sample()
    weightless = np.where(np.arange(60) == 3, 0.0, 1.0)
    bad = np.where(np.arange(60) == 3, NAN, y)
    fit = jax.jit(lambda y, w, keep: rl.fit_linear(X, y, KINDS[method], weights=w, where=keep))
    every = np.ones(60, bool)
    assert fit(y, weightless, every).converged
    for found in (
        fit(y, weightless, ~every),
        fit(y, np.zeros(60), every),
        fit(bad, weightless, every),
        fit(y, -weightless, every),
    ):
        assert not found.converged
        for number in (found.coefficients, found.intercept, found.scale):
            assert np.all(np.isnan(number))


def test_a_level_minimum_is_not_unique(x64):
    """Two groups far apart: any middle between them is as good at this scale."""
    y = np.array([0.0, 0.0, 0.0, 10.0, 10.0, 10.0])
    level, told = (rl.fit_linear(np.zeros((6, 0)), y, scale=scale) for scale in (1.0, 10.0))
    assert not level.unique
    assert told.unique
    np.testing.assert_allclose(told.intercept, 5)


def test_summary_says_what_happened(x64):
    X, y = sample()
    nothing = rl.fit_linear(X, y, where=np.zeros(60, bool)).summary()
    assert "nothing to fit: every row is dropped or has the weight 0" in nothing
    broken = rl.fit_linear(X, np.where(np.arange(60) == 3, NAN, y)).summary()
    assert "60 rows" in broken
    assert "the data hold a NaN or an infinity" in broken
    siegel = load("siegel")
    mostly = np.where(np.arange(60) % 6 > 0, 3.0, y)
    for found, rows in (
        (rl.fit_linear(siegel.X, siegel.y, rl.tukey), "6 of 9 rows"),
        (rl.fit_linear(X, mostly), "50 of 60 rows"),
    ):
        assert f"{rows} are fitted exactly, so the scale is 0" in found.summary()
        assert "no standard errors" in found.summary()
        assert np.all(np.isnan(found.standard_errors()))
    perfect = rl.fit_linear(X, X @ [1.0, 2.0, 3.0])
    assert "60 of 60 rows are fitted exactly" in perfect.summary()
    assert np.all(perfect.standard_errors() == 0)


def test_a_loss_is_judged_relative_to_its_delta(x64):
    """The default method is that of the loss, whatever the units of y."""
    stars = load("starsCYG")
    for unit in (1.0, 1e7, 1e-7):
        found = rl.fit_linear(stars.X, unit * stars.y, partial(rl.tukey, delta=2.0 * unit))
        assert found.converged
        np.testing.assert_allclose(found.coefficients[0] / unit, 2.33, atol=0.005)


@pytest.mark.thorough
def test_a_redescending_loss_with_a_large_delta_is_fitted_by_mm(x64):
    stars = load("starsCYG")
    far = rl.fit_linear(stars.X, stars.y, partial(rl.cauchy, delta=1e3))
    mm = rl.fit_linear(stars.X, stars.y, partial(rl.cauchy, delta=1e3), method="mm")
    np.testing.assert_array_equal(far.coefficients, mm.coefficients)


def test_a_scale_below_rounding_is_not_verified(x64):
    X, y = sample()
    for settings in ({"tuning": 1e-30}, {"scale": 1e-100}):
        assert not rl.fit_linear(X, y, **settings).converged
    found = rl.fit_linear(X, y, scale=1e-15)
    np.testing.assert_allclose(found.scale, 1e-15, rtol=1e-12)
    for nonsense in (-1.0, NAN):
        assert not rl.fit_linear(X, y, scale=lambda r, s=nonsense: jnp.float64(s)).converged


@pytest.mark.parametrize(
    "method", ["irls", "interior_point", pytest.param("mm", marks=pytest.mark.thorough)]
)
def test_columns_in_any_units_in_float32(method):
    """Squares of 1e18 leave float32, coefficients and errors do not."""
    X, y = sample()
    loss = KINDS[method]
    found = rl.fit_linear(X.astype("f4"), y.astype("f4"), loss)
    for unit in (1e18, 1e-18):
        other = rl.fit_linear((unit * X).astype("f4"), y.astype("f4"), loss)
        assert other.converged
        np.testing.assert_allclose(other.coefficients * unit, found.coefficients, rtol=1e-3)
        errors = np.asarray(other.standard_errors(), float)[1:] * unit
        np.testing.assert_allclose(errors, found.standard_errors()[1:], rtol=1e-2)


def test_columns_and_targets_in_any_units(x64):
    """Squares of 1e154 leave float64, coefficients and errors do not."""
    X, y = sample()
    found, other = rl.fit_linear(X, y), rl.fit_linear(1e154 * X, y)
    np.testing.assert_allclose(other.coefficients * 1e154, found.coefficients, rtol=1e-9)
    errors = other.standard_errors()[1:] * 1e154
    np.testing.assert_allclose(errors, found.standard_errors()[1:], rtol=1e-9)
    far = rl.fit_linear(X, 1e200 * y)
    assert far.converged
    np.testing.assert_allclose(far.coefficients / 1e200, found.coefficients, rtol=1e-9)
    np.testing.assert_allclose(far.scale / 1e200, found.scale, rtol=1e-9)


def test_predictions_have_the_shape_of_y(x64):
    """Rows first, targets second; one row; a batch of fits."""
    X, y = sample()
    Y = np.stack([y, -y, 2 * y, 3 * y], 1)
    found = rl.fit_linear(X, Y)
    np.testing.assert_allclose(Y - found.predict(X), found.residuals, atol=1e-12)
    np.testing.assert_allclose(found.predict(X[:1]), (Y - found.residuals)[:1], atol=1e-12)
    np.testing.assert_allclose(found.predict(X[0]), (Y - found.residuals)[0], atol=1e-12)
    np.testing.assert_array_equal(found.prediction_errors, -found.residuals)
    assert found.flagged().shape == found.weights.shape == Y.shape
    batch = jax.vmap(rl.fit_linear)(np.stack([X, 2 * X]), np.stack([y, y]))
    assert batch.predict(X).shape == (2, 60)
    with pytest.raises(ValueError, match=r"X must have 3 columns.*got the shape \(2, 60, 3\)"):
        found.predict(np.stack([X, X]))


def test_an_intercept_alone_is_a_location(x64):
    _, y = sample()
    X = np.zeros((60, 0))
    np.testing.assert_allclose(
        rl.fit_linear(X, y, rl.squared_error).intercept, np.mean(y), rtol=1e-12
    )
    assert rl.fit_linear(X, y).converged
    median = rl.fit_linear(X[:59], y[:59], rl.absolute_error)
    np.testing.assert_allclose(median.intercept, np.median(y[:59]), rtol=1e-12)
    assert rl.fit_linear(X, y, rl.tukey).converged


def test_a_loss_of_ones_own_with_a_required_delta(x64):
    def own(r, delta):
        return jnp.where(jnp.abs(r) <= delta, r * r / 2, delta * (jnp.abs(r) - delta / 2))

    X, y = sample()
    found, want = rl.fit_linear(X, y, own), rl.fit_linear(X, y)
    assert found.converged
    np.testing.assert_allclose(found.coefficients, want.coefficients, rtol=1e-9)
    assert "x0" not in want.summary(range(3))
    assert "\n2 " in want.summary(range(3))


@each
def test_settings_that_forbid_promotion(method):
    X, y = (a.astype("f4") for a in sample())
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = rl.fit_linear(X, y, KINDS[method], weights=np.ones(60, "f4"))
        assert found.converged
        assert found.predict(X).shape == found.flagged().shape == (60,)


@pytest.mark.thorough
def test_variances_of_an_mm_estimate_are_positive(x64):
    """Of few rows, the corrections for the scale can outweigh the rest of the sandwich."""
    random = np.random.default_rng(1)
    X = random.normal(size=(200, 8, 2))
    y = random.standard_t(1.5, (200, 8))
    found = jax.vmap(partial(rl.fit_linear, loss=rl.tukey))(X, y)
    errors = np.asarray(found.standard_errors())[np.asarray(found.converged & (found.scale > 0))]
    assert np.all(errors > 0)


@pytest.mark.thorough
@pytest.mark.parametrize("scale", ["iqr", "qn", rl.tau, partial(rl.m_scale, breakdown=0.3)])
def test_any_scale(x64, scale):
    """At the solution both equations hold."""
    X, y = sample()
    found = rl.fit_linear(X, y, rl.pseudo_huber, tuning=1.5, scale=scale)
    assert found.converged
    r = -found.residuals
    function = {"iqr": rl.iqr, "qn": rl.qn}.get(scale, scale)
    center = {} if isinstance(scale, str) else {"center": 0.0}
    np.testing.assert_allclose(found.scale, function(r, **center), rtol=1e-10)
    loss = partial(rl.pseudo_huber, delta=1.5 * found.scale)
    np.testing.assert_allclose(np.c_[np.ones(60), X].T @ rl.influence(loss, r), 0, atol=1e-9)


@pytest.mark.thorough
def test_a_start_decides_where_a_redescending_fit_ends(x64):
    stars = load("starsCYG")
    fit = partial(rl.fit_linear, stars.X, stars.y, rl.tukey, method="irls", scale=0.4715)
    ends = [fit(start=start).coefficients[0] for start in ([6.79, -0.41], [-5.0, 2.25])]
    assert ends[0] < 0
    assert ends[1] > 2


def test_summary(x64):
    data = load("stackloss")
    text = rl.fit_linear(data.X, data.y, tuning=1.345 * ROUNDED).summary(data.features)
    want = R["stackloss"]["huber"]
    for coef, se in zip(want["coef"], want["se"], strict=True):
        assert f"{coef:.4f}" in text
        assert f"{se:.4f}" in text
    assert "rows beyond 2.5 scales: 4, 21" in text
    assert "21 rows, scale 2.4405, converged in" in text
    calls = load("phones")
    phones = rl.fit_linear(calls.X, calls.y, rl.absolute_error)
    assert "not unique" in phones.summary()
    assert "in 1 step\n" in replace(phones, steps=jnp.int32(1)).summary()
    with pytest.raises(ValueError, match="names must be 1, one for each column, got 3"):
        phones.summary(data.features)


@pytest.mark.thorough
def test_the_same_key_gives_the_same_fit_and_no_other_compiles_again(x64):
    X, y = sample()
    first, again = (rl.fit_linear(X, y, rl.tukey, key=jax.random.key(3)) for _ in range(2))
    np.testing.assert_array_equal(first.coefficients, again.coefficients)
    rl.fit_linear(X, y, tuning=1.0)
    compiled = rl.linear.fit._fit_linear._cache_size()
    rl.fit_linear(X, y + 1, tuning=2.0)
    rl.fit_linear(X, y, tuning=jnp.asarray(3.0))
    assert rl.linear.fit._fit_linear._cache_size() == compiled


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, r"X must have the shape .*got \(60,\) and \(60,\)", {"X": np.ones(60)}),
        (ValueError, r"got \(60, 3\) and \(59,\)", {"y": np.ones(59)}),
        (ValueError, "4 coefficients .* got 3", {"X": np.ones((3, 3)), "y": np.ones(3)}),
        (TypeError, "X must be real numbers", {"X": np.array([["a"] * 3] * 60)}),
        (TypeError, "loss must be a function", {"loss": "huber"}),
        (ValueError, "method must be one of irls, .*got 'ols'", {"method": "ols"}),
        (ValueError, "kink at 0", {"loss": rl.absolute_error, "method": "irls"}),
        (ValueError, "is for absolute_error", {"loss": rl.huber, "method": "interior_point"}),
        (ValueError, "returns to zero", {"loss": rl.huber, "method": "mm"}),
        (ValueError, "quantile needs its q", {"loss": rl.quantile}),
        (ValueError, "tuning must be > 0, got -1", {"tuning": -1.0}),
        (ValueError, "no free delta", {"loss": rl.squared_error, "tuning": 1.0}),
        (ValueError, "scale must be .* one of iqr, .*got 'std'", {"scale": "std"}),
        (ValueError, "scale must be > 0, got 0", {"scale": 0.0}),
        (ValueError, "estimates its own scale", {"loss": rl.tukey, "scale": "qn"}),
        (ValueError, "the scale qn takes none", {"scale": "qn", "weights": np.ones(60)}),
        (ValueError, "weights must be >= 0, got -1", {"weights": -np.ones(60)}),
        (TypeError, "where must be boolean", {"where": np.ones(60)}),
        (ValueError, r"start is for .*\(4,\).*shape \(3,\)", {"start": np.ones(3)}),
        (ValueError, "start is for", {"loss": rl.tukey, "start": np.ones(4)}),
        (
            ValueError,
            "estimates its own scale, got scale='mad'",
            {"loss": rl.tukey, "scale": "mad"},
        ),
        (ValueError, "a scale of its own", {"loss": rl.gaussian_nll}),
        (ValueError, "needs its df", {"loss": partial(rl.student_t_nll, scale=1.0)}),
        (ValueError, "influence is 0 around 0", {"loss": rl.epsilon_insensitive}),
        (ValueError, r"tuning must be one number, got shape \(2,\)", {"tuning": np.ones(2)}),
        (ValueError, r"scale must be one number, got shape \(60,\)", {"scale": np.ones(60)}),
        (ValueError, r"q must be .*\(0, 1\)", {"loss": partial(rl.quantile, q=0.0)}),
        (ValueError, r"q must be .*\(0, 1\)", {"loss": partial(rl.quantile, q=1)}),
        (ValueError, "q must be one number", {"loss": partial(rl.quantile, q=np.full(2, 0.5))}),
        (ValueError, "must keep the residual's shape", {"loss": lambda r: jnp.sum(r * r)}),
        (ValueError, r"scale <lambda> must give one number.*\(60,\)", {"scale": lambda r: r}),
        (TypeError, "key must be a jax.random.key, got 3", {"loss": rl.tukey, "key": 3}),
    ],
)
def test_bad_input_is_named(error, message, settings):
    X, y = sample()
    with pytest.raises(error, match=message):
        rl.fit_linear(**{"X": X, "y": y, "loss": rl.huber} | settings)
