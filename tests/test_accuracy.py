"""Value, slope and curvature of every loss, in units in the last place of the truth."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf
from witnesses import FEW, LIKELIHOODS, TRUTH, Witness, at_infinity, loss

import robustloss as rl

NAMES = sorted(TRUTH)
CASES = [(name, delta) for name in NAMES for delta in TRUTH[name].deltas]
TINY, MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
SOME = [
    (name, delta) if delta == 1 else pytest.param(name, delta, marks=pytest.mark.thorough)
    for name, delta in CASES
    if delta in (1.0, 3.3, 1e-30, 1e30)
]
COMPILED = [(*case, "traced") for case in CASES] + [
    (name, delta, "constant") for name, delta in CASES if delta in (1.0, 12345.678)
]
QUANTITIES = ("value", "slope", "curvature")


def with_delta(name: str, delta: float) -> dict[str, float]:
    return {"delta": delta} if TRUTH[name].has_delta else {}


def three(name: str, r: jax.Array, **parameters: jax.Array) -> tuple[jax.Array, ...]:
    """Value, slope and curvature, by forward mode."""

    def slope(r):
        return jax.jvp(partial(loss(name), **parameters), (r,), (jnp.ones_like(r),))[1]

    curvature = jax.jvp(slope, (r,), (jnp.ones_like(r),))[1]
    return loss(name)(r, **parameters), slope(r), curvature


traced = jax.jit(three, static_argnums=0)


def compiled(mode: str, name: str, r: np.ndarray, delta: float) -> tuple[np.ndarray, ...]:
    """`three` under jit, with delta as a constant of the program or as its argument."""
    parameters = with_delta(name, delta)
    if mode == "traced":
        return tuple(map(np.asarray, traced(name, r, **parameters)))
    return tuple(map(np.asarray, jax.jit(partial(three, name, **parameters))(r)))


def ulps(got: np.ndarray, true: np.ndarray, terms: np.ndarray, dtype: type) -> np.ndarray:
    """The error of `got` beside the truth, or beside its terms where these are larger.

    Infinity stands for the power of two above the largest number.
    """
    info = jnp.finfo(dtype)
    top = 2.0 ** float(info.maxexp)
    got = np.where(np.isposinf(got), top, np.where(np.isneginf(got), -top, got.astype(np.float64)))
    overflown = (np.abs(got) == top) & (np.abs(true) >= top) & (np.sign(got) == np.sign(true))
    size = np.maximum(np.maximum(np.abs(true), terms), float(info.tiny))
    size = np.minimum(size, float(info.max))
    unit = np.ldexp(1.0, np.frexp(size)[1] - 1 - info.nmant)
    with np.errstate(invalid="ignore"):
        error = np.where(overflown | (got == true), 0.0, np.abs(got - true) / unit)
    return np.where(np.isnan(true), np.where(np.isnan(got), 0.0, np.inf), error)


def worst(
    got: np.ndarray, true: np.ndarray, terms: np.ndarray, r: np.ndarray, limit: float
) -> str | None:
    """The worst error where it is over the limit.

    XLA computes in float32 and flushes its subnormals, which are bfloat16's too but not
    float16's: there, and next to there, only the size of the result is checked.
    """
    error = ulps(got, true, terms, got.dtype)
    if got.dtype != np.float16:
        small = (np.abs(true) < 2 * TINY) & (np.abs(got) <= np.maximum(np.abs(true), TINY))
        error = np.where(small, 0.0, error)
    error = np.where(np.isnan(error), np.inf, error)
    i = error.argmax()
    if error[i] <= limit:
        return None
    return f"{error[i]} ulp at r = {r[i]!r}: {got[i]!r} instead of {true[i]!r}"


def sample(delta: float, many: int = 1 << 15) -> np.ndarray:
    """float32 residuals of all magnitudes and signs, and near where a formula may change."""
    random = np.random.default_rng(0)
    everywhere = 2.0 ** random.uniform(-126, 128, 2 * many)
    bend = delta * 2.0 ** random.uniform(-4, 4, 2 * many)
    joints = np.float32(delta) * np.r_[np.arange(1, 65) / 16, 0.61875, 8, 9, 44, 87, 1e4]
    ticks = 1 + np.arange(-32, 33) * 2.0**-23
    ties = np.ldexp(1.0, np.arange(-126, 128))
    edge = MAX * (1 - np.arange(64) * 2.0**-24)
    r = np.r_[everywhere, bend, np.outer(joints.astype(np.float32), ticks).ravel(), ties, edge]
    # Values that overflow do so from somewhere: there too, sqrt(max) and max / delta.
    for center in (MAX**0.5, (2 * MAX) ** 0.5, MAX / delta, MAX / 2):
        r = np.r_[r, center * ticks]
    with np.errstate(over="ignore"):
        r = np.unique(r.astype(np.float32))
    r = r[(r >= TINY) & (r <= MAX)]
    assert len(r) <= 4.5 * many
    r = np.sort(np.resize(r, 9 * many // 2))  # of one shape at any delta: one program
    return np.r_[-r[::-1], np.float32([-0.0, 0.0]), r]


def test_every_loss_has_a_witness():
    seen = {witness.loss for witness in TRUTH.values()} | set(LIKELIHOODS)
    for name in rl.LOSSES:
        assert name in seen, f"loss {name} has no row in experiments/_truth.py"
    for name in seen:
        assert name in rl.LOSSES, f"row {name} in experiments/_truth.py has no loss"


@pytest.mark.parametrize(("name", "delta"), SOME)
def test_the_witness_agrees_with_itself(name, delta):
    """Bulk against mpmath, and the derivatives by hand against numerical ones."""
    truth, d = TRUTH[name], float(np.float32(delta))
    r = sample(delta)
    r = np.random.default_rng(1).choice(r, 200).astype(np.float64)
    for m, (bulk, terms) in enumerate(zip(truth.bulk(r, d), truth.sizes(r, d), strict=True)):
        for x, b, size in np.broadcast(r, bulk, terms):
            assert close(b, truth(x, d, m), size), (x, b, truth(x, d, m))


@pytest.mark.parametrize("name", TRUTH)
@pytest.mark.parametrize("u", [-2.7, -0.6, 0.3, 1.4])
def test_the_derivatives_of_the_witness(name, u):
    truth, scaled = TRUTH[name], bool(with_delta(name, 1.5))
    d = 1.5 if scaled else 1.0
    for m, n in [of for of in np.ndindex(4, 4) if sum(of) <= 3 and (scaled or of[1] == 0)]:
        numeric = mp.diff(truth.value, (mpf(u * d), mpf(d)), (m, n))
        assert abs(numeric - truth(u * d, d, m, n)) < 1e-10, (m, n)


def close(b: float, true: mpf, terms: float) -> bool:
    return abs(mpf(float(b)) - true) <= 1e-13 * max(abs(true), terms) or abs(true) < 1e-100


@pytest.mark.parametrize(("name", "delta", "mode"), COMPILED)
def test_float32(name, delta, mode):
    truth, r = TRUTH[name], sample(delta)
    got = compiled(mode, name, r, delta)
    x, d = r.astype(np.float64), float(np.float32(delta))
    true, terms = truth.bulk(x, d), truth.sizes(x, d)
    # A knot that is not delta itself is rounded: next to it either side is right.
    at = [k * d for k in truth.kinks if k not in (0, 1)]
    clear = np.all([np.abs(np.abs(x) - k) > 2e-7 * k for k in at], axis=0) | np.zeros(len(r), bool)
    assert measured(got, true, terms, r, clear, truth.ulps) == [None] * 3
    value, slope, _ = got
    assert np.all(value >= 0)
    assert np.all(value[r == 0] == 0)
    assert np.all(slope[r == 0] == 0)
    if truth.even:
        np.testing.assert_array_equal(value.view(np.int32), value[::-1].view(np.int32))
        np.testing.assert_array_equal(slope, -slope[::-1])


def measured(got, true, terms, r, clear, limits) -> list[str | None]:
    return [
        worst(g[clear], t[clear], np.broadcast_to(size, r.shape)[clear], r[clear], limit)
        for g, t, size, limit in zip(got, true, terms, limits, strict=True)
    ]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(("name", "delta"), SOME)
def test_all_inputs_of_16_bits(name, delta, dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    if dtype == jnp.bfloat16:  # its subnormals are in the next test
        bits = bits[~np.isin(bits & 0x7FFF, np.arange(1, 1 << 7))]
    check_16_bits(name, delta, bits.view(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_subnormal_inputs_of_bfloat16_count_as_themselves_or_as_0(name):
    # XLA on a CPU reads them as 0, as it does those of float32.
    r = np.arange(1, 1 << 7, dtype=np.uint16).view(jnp.bfloat16)
    r = np.r_[-r, r]
    true = true_with_limits(TRUTH[name], r.astype(np.float64), 1.0)
    at_zero = compiled("traced", name, np.zeros_like(r), 1.0)
    for got, t, zero in zip(compiled("traced", name, r, 1.0), true, at_zero, strict=True):
        right = ulps(got, t, np.zeros(1), got.dtype) <= 0.51
        assert np.all(right | (got == zero))


def check_16_bits(name: str, delta: float, r: np.ndarray) -> None:
    got = compiled("traced", name, r, delta)
    d, truth = float(np.float32(delta)), TRUTH[name]
    with np.errstate(invalid="ignore"):
        x = r.astype(np.float64)
        true = true_with_limits(truth, x, d)
        terms = truth.sizes(np.where(np.isfinite(x), x, 0.0), d)
    assert all(g.dtype == r.dtype for g in got)
    assert measured(got, true, terms, r, np.ones(r.shape, bool), (0.51,) * 3) == [None] * 3


def true_with_limits(truth: Witness, r: np.ndarray, d: float) -> list[np.ndarray]:
    """Of the float64 formulas, with NaN at NaN and the limit at infinity."""
    three = truth.bulk(np.where(np.isfinite(r), r, 1.0), d)
    for m, values in enumerate(three):
        for sign in (1, -1):
            values[r == sign * np.inf] = at_infinity(truth, sign, d, m)
        values[np.isnan(r)] = np.nan
    return list(three)


@pytest.mark.parametrize(
    ("name", "delta", "mode"),
    [
        c if c[0] in FEW else pytest.param(*c, marks=pytest.mark.thorough)
        for c in COMPILED
        if c[1] in (1.0, 1e-30, 1e30)
    ],
)
def test_float64(name, delta, mode):
    random = np.random.default_rng(2)
    magnitude = np.r_[2.0 ** random.uniform(-200, 200, 100), 2.0 ** random.uniform(-5, 5, 300)]
    joints = np.r_[0.61875, 0.625, 1, 2] * (1 + np.arange(-3, 4)[:, None] * 2.0**-52)
    r = delta * np.r_[0.0, magnitude * random.choice([-1, 1], 400), joints.ravel()]
    with jax.enable_x64(True):
        got = compiled(mode, name, r, delta)
    for m, quantity in enumerate(QUANTITIES):
        assert got[m].dtype == np.float64
        terms = np.broadcast_to(TRUTH[name].sizes(r, delta)[m], r.shape)
        for x, g, size in zip(r, got[m], terms, strict=True):
            error = ulps64(g, TRUTH[name](x, delta, m), size)
            assert error <= 8, f"{quantity}: {error} ulp at r = {x!r}"


def ulps64(got: float, true: mpf, terms: float) -> float:
    if true == 0:
        return 0.0 if got == 0 else np.inf
    exponent = max(mp.frexp(max(abs(true), mpf(float(terms))))[1] - 1, -1022)
    if exponent == -1022:
        return 0.0 if abs(got) <= 2.3e-308 else np.inf
    return float(abs(mpf(float(got)) - true) / mpf(2) ** (exponent - 52))


POINTS = json.loads((Path(__file__).parent / "reference" / "loss_points.json").read_text())[
    "losses"
]


@partial(jax.jit, static_argnums=0)
def four_views(of: str, u: jax.Array, *numbers: float) -> list[jax.Array]:
    loss = {
        "half_squared": lambda r: 0.5 * rl.squared_error(r),
        "absolute": rl.absolute_error,
        "barron": partial(rl.general, alpha=numbers[0], delta=numbers[-1]) if numbers else None,
        "hampel": partial(rl.hampel, knots=numbers),
    }.get(of) or partial(getattr(rl, of), delta=numbers[0])
    return [loss(u)] + [view(loss, u) for view in (rl.influence, rl.curvature, rl.weight)]


@pytest.mark.parametrize("name", POINTS)
def test_printed_points(name):
    """Value, influence, curvature and weight to 14 digits."""
    of, *given = re.findall(r"[\w.+-]+", name)
    numbers = [float(text) for text in given if re.match(r"-?[\d.]+|-inf", text)]
    u, *wanted = np.array(POINTS[name]["rows"], np.float64).T
    with jax.enable_x64(True):
        found = np.array(four_views(of, u, *numbers))
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == np.float64
        printed = ~np.isnan(want)
        limit = np.where(want == 0, 1e-20, 1e-14 * np.abs(want))  # 0: below the last decimal
        assert np.all((np.abs(got - want) <= limit)[printed])
