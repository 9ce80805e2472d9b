"""Robust scales: published values, independent algorithms, and the laws of a scale."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache, partial
from itertools import product

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mp
from scipy import special, stats

import robustloss as rl
from robustloss import scale
from robustloss._numerics import normal
from robustloss._numerics.order_statistics import near_median
from robustloss.scale import iqr, location_scale, m_scale, mad, proposal2, qn, sn, tau

NAN, INF = float("nan"), float("inf")
with mp.workdps(30):
    _UPPER_QUARTILE = mp.sqrt(2) * mp.erfinv(mp.mpf(1) / 2)  # of the standard normal
    _TWO_SIDED_95 = mp.sqrt(2) * mp.erfinv(mp.mpf("0.95"))
    MAD, IQR = float(1 / _UPPER_QUARTILE), float(1 / (2 * _UPPER_QUARTILE))
ALL = {name: getattr(scale, name) for name in scale.__all__ if "ocation" not in name}
WEIGHTED = {n: f for n, f in ALL.items() if "weights" in inspect.signature(f).parameters}
CENTERED = {n: f for n, f in ALL.items() if "center" in inspect.signature(f).parameters}
BOUNDED = {n: f for n, f in ALL.items() if n not in ("iqr", "proposal2")}  # just under half
CHEM = np.fromstring(
    "2.9 3.1 3.4 3.4 3.7 3.7 2.8 2.5 2.4 2.4 2.7 2.2 "
    "5.28 3.37 3.03 3.03 28.95 3.77 3.4 2.2 3.5 3.6 3.7 3.7",
    sep=" ",
)
FIRST = ("mad", "sn", "m_scale")  # the others where tests are thorough


def over(names: Iterable[str]) -> pytest.MarkDecorator:
    tiered = [n if n in FIRST else pytest.param(n, marks=pytest.mark.thorough) for n in names]
    return pytest.mark.parametrize("name", tiered)


each, weighted, centered = over(ALL), over(WEIGHTED), over(CENTERED)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def samples(count: int, n: int = 24, seed: int = 0) -> np.ndarray:
    """Rows that are normal, skewed, heavy-tailed, and coarse, with many ties."""
    random = np.random.default_rng(seed)
    rows = [
        random.normal(size=(count, n)),
        random.exponential(size=(count, n)),
        random.standard_t(1, size=(count, n)),
        random.integers(-2, 3, (count, n)).astype(float),
        random.normal(size=(count, n)).round(1) + 100,
        np.where(random.random((count, n)) < 0.5, 0.0, random.normal(size=(count, n))),
        10 ** random.uniform(-15, 15, (count, n)) * random.choice([-1, 1], (count, n)),
    ]
    return np.array([rows[i % len(rows)][i] for i in range(count)]) * 1.7 + 0.3


def repeated(rows: np.ndarray, times: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Each entry so many times, padded to n, and which entries are not padding."""
    keep = np.arange(n) < times.sum(1)[:, None]
    padded = np.full(keep.shape, NAN)
    padded[keep] = np.concatenate([np.repeat(x, t) for x, t in zip(rows, times, strict=True)])
    return padded, keep


def gaussian(n: int) -> np.ndarray:
    return stats.norm.ppf((np.arange(n) + 0.5) / n)


@cache
def value_and_gradient(name: str, masked: bool = True):
    """Compiled once, for seven rows of 24; the mask comes second."""
    if masked:
        f = jax.value_and_grad(lambda x, keep: ALL[name](x, where=keep))
    else:
        f = jax.value_and_grad(ALL[name])
    return jax.jit(jax.vmap(f))


# Published values.


@pytest.mark.parametrize("x64", [False, True])
def test_the_chem_data(x64):
    printed = {"mad": 0.52632, "iqr": 0.68570, "proposal2": 0.673652}
    with jax.enable_x64(x64):
        for name, value in printed.items():
            assert abs(ALL[name](CHEM) - value) < 5.1e-6, name
        # As printed, and without a finite-sample correction: 0.33 * 2.219144 = 0.7323175.
        assert abs(qn(CHEM) - 0.73231) < 1e-5
        found = location_scale(CHEM)
        location, spread = found.location, found.scale
        assert abs(location - 3.205498) < 1e-6
        assert abs(spread - 0.673652) < 1e-6


def test_the_constants(x64):
    """Of samples whose raw scale is 1, or so that it is seen, against mpmath."""
    quartile = mp.sqrt(2) * mpmath.erfinv(mp.mpf(1) / 2)

    def quantile(p):
        return mp.sqrt(2) * mpmath.erfinv(2 * mp.mpf(p) - 1)

    def of_sn(c):
        return mp.ncdf(quartile + 1 / c) - mp.ncdf(quartile - 1 / c) - mp.mpf(1) / 2

    def of_tukey(c):
        def rho(r):
            return (1 - (1 - (r / c) ** 2) ** 3) * mp.npdf(r)

        return 2 * mpmath.quad(rho, [0, c]) + 2 * mp.ncdf(-c) - mp.mpf(1) / 2

    cut = 3 * quartile
    moment = 2 * ((1 - cut**2) * mp.ncdf(cut) - cut * mp.npdf(cut) + cut**2) - 1
    biweight = mpmath.findroot(of_tukey, 1.5)
    # Of two residuals of 1, rho is half its bound.
    half = biweight**-1 / mp.sqrt(1 - mp.mpf(1) / 2 ** (mp.mpf(1) / 3))
    truth = [
        (mad([-1.0, 0.0, 1.0]), 1 / quartile),
        (iqr(np.arange(5.0)), 1 / quartile),
        (qn([0.0, 1.0]), 1 / (mp.sqrt(2) * quantile(mp.mpf(5) / 8))),
        (sn([0.0, 1.0]), mpmath.findroot(of_sn, 1.2)),
        (tau([1.0, -1.0], center=0.0), 1 / mp.sqrt(moment)),
        (m_scale([1.0, -1.0], center=0.0), half),
    ]
    for got, want in truth:
        assert abs(float(got) / float(want) - 1) < 5e-16, (got, want)


LIMITS = {
    "mad": 1.2,
    "iqr": 1.2,
    "qn": 6.3,
    "sn": 1.6,
    "proposal2": 0.9,
    "tau": 0.3,
    "m_scale": 0.1,
}


@each
def test_consistent_at_the_normal(x64, name):
    """Of its quantiles in the middle of n equal shares: 1, up to what falls as 1 / n."""
    sizes = np.array([1000, 1001, 20_001])
    rows, keep = np.zeros((3, sizes.max())), np.arange(sizes.max()) < sizes[:, None]
    rows[keep] = np.concatenate([gaussian(n) for n in sizes])
    off = np.abs(ALL[name](rows, where=keep, axis=1) - 1) * sizes
    assert off.max() < LIMITS[name]


# Independent algorithms.


def plain_qn(x: np.ndarray) -> float:
    i, j = np.triu_indices(len(x), 1)
    h = len(x) // 2 + 1
    return np.sort(np.abs(x[i] - x[j]))[h * (h - 1) // 2 - 1] if len(x) > 1 else x.dtype.type(0)


def plain_sn(x: np.ndarray) -> float:
    n = len(x)
    inner = np.sort(np.abs(x[:, None] - x), 1)[:, n // 2]
    return np.sort(inner)[(n + 1) // 2 - 1]


def unscaled(got, constant: str):
    """What the result is where the raw scale is this: rounded once, in its dtype."""
    return got.dtype.type(getattr(scale, constant))


@pytest.mark.parametrize(("n", "dtype"), [(9, np.float32), (24, np.float64)])
def test_qn_and_sn_bit_for_bit(n, dtype):
    rows = samples(60, n, seed=n).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        got_qn, got_sn = np.asarray(qn(rows, axis=1)), np.asarray(sn(rows, axis=1))
    for row, q, s in zip(rows, got_qn, got_sn, strict=True):
        assert q == unscaled(q, "_QN") * plain_qn(row)
        assert s == unscaled(s, "_SN") * plain_sn(row)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 0.0])
def test_masked_qn_sn_mad_iqr(bad):
    rows = samples(60, seed=5).astype(np.float32)
    random = np.random.default_rng(3)
    keep = random.random(rows.shape) < random.uniform(0.1, 1, (60, 1))
    keep[:, 0] |= ~keep.any(1)
    holed = np.where(keep, rows, np.float32(bad))
    got = {f: np.asarray(f(holed, where=keep, axis=1)) for f in (qn, sn, mad, iqr)}
    for i, (row, kept) in enumerate(zip(rows, keep, strict=True)):
        x = row[kept]
        assert got[qn][i] == np.float32(scale._QN) * plain_qn(x)
        assert got[sn][i] == np.float32(scale._SN) * plain_sn(x)
        median = np.median(x)
        assert got[mad][i] == np.float32(MAD) * np.median(np.abs(x - median))
        quartiles = np.quantile(x.astype(float), [0.25, 0.75])
        want = IQR * np.diff(quartiles)[0]
        assert abs(got[iqr][i] - want) <= 2e-7 * np.abs(quartiles).max()


def check_qn(x: np.ndarray, got: float) -> None:
    """That many differences are up to it, and fewer below: of integers, where nothing rounds."""
    x, n = np.sort(x.astype(np.int64)), len(x)
    d = round(float(got) / scale._QN)
    h, i = n // 2 + 1, np.arange(n)
    up_to, below = (np.sum(np.searchsorted(x, x + d - e, "right") - i - 1) for e in (0, 1))
    assert below < h * (h - 1) // 2 <= up_to
    assert abs(got / d / scale._QN - 1) < 2e-7


def check_sn(x: np.ndarray, got: float) -> None:
    x, n = np.sort(x.astype(np.int64)), len(x)
    d = round(float(got) / scale._SN)

    def within(d):
        near = np.searchsorted(x, x + d, "right") - np.searchsorted(x, x - d, "left")
        return np.sum(near >= n // 2 + 1)

    assert within(d - 1) < (n + 1) // 2 <= within(d)
    assert abs(got / d / scale._SN - 1) < 2e-7


@pytest.mark.parametrize("wide", [False, True])
def test_a_hundred_thousand(wide):
    n = 100_000
    x = np.random.default_rng(1).standard_t(2, size=n) * (1e12 if wide else 1e5)
    x = np.clip(np.round(x), -(2**53), 2**53) if wide else np.clip(np.round(x), -(2**23), 2**23)
    with jax.enable_x64(wide):
        x = jnp.asarray(x)
        for f, check in ((qn, check_qn), (sn, check_sn)):
            compiled = jax.jit(f).lower(x).compile()
            check(np.asarray(x), compiled(x))
            # Not n**2, which would be 10**10: 24 words of 4 or 8 bytes for each entry.
            assert compiled.memory_analysis().temp_size_in_bytes < 24 * n * x.dtype.itemsize


def test_counts_beyond_an_int32():
    """Of pairs, which are counted modulo 2**32 and roughly."""
    for h in (2, 3, 46340, 46341, 65536, 65537, 92682, 100_001, 131_073, 400_001):
        k = h * (h - 1) // 2
        parts, extra = divmod(k, 64)
        for off in (-(2**33), -1, 0, 1, 2**33):
            counts = np.full(64 * 4096, parts // 4096)
            counts[: k - counts.sum()] += 1
            counts = counts + off // len(counts)
            counts[0] += k + off - counts.sum()
            assert counts.sum() == k + off
            if abs(counts).max() < 2**31:
                reach = scale._pairs_reach(jnp.asarray(counts, jnp.int32), jnp.int32(h))
                assert reach == (off >= 0), (h, off, extra)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_selection_is_exact(dtype):
    """The median of |x|: both parities, all magnitudes, signed zeros, ties."""
    random = np.random.default_rng(4)
    top = float(np.finfo(dtype).max)
    tiny = 4 * float(np.finfo(dtype).tiny)  # a median may be less than half of it
    for n in (7, 8):
        rows = np.r_[
            samples(30, n, n),
            2.0 ** random.uniform(-125, 127, (30, n)) * random.choice([-1, 1], (30, n)),
            random.choice([0.0, -0.0, 1.0, -1.0, tiny, top, -top, INF, -INF], (60, n)),
        ].astype(dtype)
        half = dtype(0.5) * np.sort(np.abs(rows))
        want = half[:, (n - 1) // 2] + half[:, n // 2]
        with jax.enable_x64(dtype == np.float64), np.errstate(over="ignore"):
            got = mad(rows, center=0.0, axis=1)
            np.testing.assert_array_equal(got, dtype(MAD) * want)


def test_selection_among_many():
    x = np.random.default_rng(2).standard_t(1, size=(2, 100_000)).astype(np.float32)
    for rows in (x, x[:, :-1]):
        deviations = np.abs(rows - np.median(rows, 1, keepdims=True))
        want = np.float32(MAD) * np.median(deviations, 1)
        np.testing.assert_array_equal(mad(rows, axis=1), want)


@pytest.mark.parametrize("n", [1, 8, 300])
def test_what_is_next_to_a_median(x64, n):
    random = np.random.default_rng(n)
    rows = np.r_[samples(20, n, n), random.choice([0.0, 1.0, -3.0, INF], (20, n))]
    keep = random.random(rows.shape) < 0.9
    keep[:, 0] = True
    got = jax.jit(jax.vmap(near_median))(rows, keep.astype(np.int32))
    for x, found in zip((x[k] for x, k in zip(rows, keep, strict=True)), got, strict=True):
        rank = (len(x) + 1) // 2
        assert found in x
        assert rank - len(x) // 10 <= np.sum(x <= found)
        assert np.sum(x < found) < rank


@pytest.mark.parametrize("n", [7, 8, 300])
def test_the_mad_is_found_wherever_it_is_thought_to_be(x64, n):
    random = np.random.default_rng(n)
    rows = np.r_[samples(20, n, n), random.choice([0.0, 1.0, -3.0, INF], (20, n))]
    keep = random.random(rows.shape) < 0.9
    weights = np.where(keep, random.integers(1, 4, rows.shape), 0.0)
    near = np.array([0, 1e-300, 0.3, 0.7, 1 - 1e-12, 1, 1 + 1e-12, 1.5, 1e9, INF, NAN])
    far = np.array([0, 1e-12, 1e-2, 0.5, 1, INF, NAN])
    counted = {"where": keep, "weights": weights}
    for names in ((), ("where",), ("weights",), ("where", "weights")):
        known = {name: counted[name] for name in names}
        each = weights if "weights" in names else keep if names else np.ones(rows.shape)
        each = each.astype(int)
        ordered = [np.sort(np.repeat(abs(x), k)) for x, k in zip(rows, each, strict=True)]
        middles = [0.5 * x[(len(x) - 1) // 2] + 0.5 * x[len(x) // 2] for x in ordered]
        want = MAD * np.array(middles)
        of_rows = jax.jit(
            jax.vmap(lambda r, s, far, known: scale._mad_from_guess(r, guess=(s, far), **known))
        )
        for a, b in product(near, far):
            with np.errstate(invalid="ignore"):
                got = of_rows(np.where(each > 0, rows, 0), a * want, b * want, known)
            np.testing.assert_array_equal(got, want)


def test_iqr_is_that_of_numpy(x64):
    for n in (3, 24):
        rows = samples(60, n, n)
        low, high = np.quantile(rows, [0.25, 0.75], axis=1)
        np.testing.assert_allclose(iqr(rows, axis=1), IQR * (high - low), 1e-14, 3e-14)


def residual_of_proposal2(x, k, m, s, center=None, w=1.0):
    """What its two equations miss, of quantities of order 1."""
    w = np.broadcast_to(w, x.shape)
    beta = special.gammainc(1.5, k * k / 2) + k * k * special.erfc(k / np.sqrt(2))
    psi = np.clip((x - m) / s, -k, k)
    size = w.sum() - (w**2).sum() / w.sum() if center is None else w.sum()
    return (w * psi).sum() / w.sum() / k, ((w * psi**2).sum() / size / beta) - 1


@pytest.mark.parametrize(
    "k", [1.5, *(pytest.param(k, marks=pytest.mark.thorough) for k in (0.3, 1.0, 3.0))]
)
def test_proposal2_solves_its_equations(x64, k):
    rows = np.r_[samples(36, seed=1), samples(24, seed=2)]
    rows[36:, :6] = [1e30, 2e30, -1e30, 3e9, 50, 1e20]  # at its breakdown
    rows[48:, :6] = 1e30
    w = np.random.default_rng(1).uniform(0, 2, rows.shape)
    for weights in (None, w):
        found = location_scale(rows, k=k, weights=weights, axis=1)
        m, s = np.asarray(found.location), np.asarray(found.scale)
        known = np.asarray(proposal2(rows, k=k, center=0.3, weights=weights, axis=1))
        misses, limits = [], []
        for i, x in enumerate(rows):
            wi = 1.0 if weights is None else w[i]
            if s[i] != 0:
                misses += residual_of_proposal2(x, k, m[i], s[i], None, wi)
                limits += [2e-14 + 2.0**-52 * abs(m[i]) / s[i]] * 2  # m itself is rounded
            if known[i] != 0:
                misses.append(residual_of_proposal2(x, k, 0.3, known[i], 0.3, wi)[1])
                limits.append(2e-14)
        assert np.all(np.abs(misses) < limits)
        # Nothing but rows of many ties has no scale.
        ties = np.array([np.unique(x).size < 20 for x in rows])
        assert np.all((s > 0) | ties)


def huber_iteration(x: np.ndarray, k: float, steps: int) -> tuple[float, float]:
    """Huber's own scheme, from the standard deviation."""
    m, s = np.median(x), np.std(x)
    beta = special.gammainc(1.5, k * k / 2) + k * k * special.erfc(k / np.sqrt(2))
    for _ in range(steps):
        y = np.clip(x, m - k * s, m + k * s)
        m = y.mean()
        s = np.sqrt(((y - m) ** 2).sum() / (len(x) - 1) / beta)
    return m, s


def test_proposal2_of_ties_is_the_limit_of_hubers_scheme(x64):
    """Among 24: where the MAD is 0 it still has a scale, up to the tie where it has none."""
    for ties in range(12, 20):
        x = np.r_[np.full(ties, 2.0), np.arange(24 - ties) - 1.3]
        got, (m, s) = location_scale(x), huber_iteration(x, 1.5, 4000)
        assert (got.scale == 0) == (s < 1e-9) == (ties >= 17)
        assert abs(got.scale - s) < 2e-14
        assert abs(got.location - m) < 2e-14


def test_the_constants_of_the_normal_are_rounded_once():
    assert float(_UPPER_QUARTILE) == normal.UPPER_QUARTILE
    assert normal.MAD == MAD
    assert normal.IQR == IQR
    assert float(_TWO_SIDED_95) == normal.TWO_SIDED_95


def soft(r):
    """A bounded loss of the user's own."""
    return -jnp.expm1(-(jnp.abs(r) ** 3))


LOSSES = {
    "default": (
        scale._BIWEIGHT,
        lambda r: 1 - (1 - np.minimum(r / 1.547644980928226, 1) ** 2) ** 3,
    ),
    "tukey": (partial(rl.tukey, delta=4.0), lambda r: 1 - (1 - np.minimum(r / 4, 1) ** 2) ** 3),
    "welsch": (rl.welsch, lambda r: 1 - np.exp(-(r**2))),
    "geman_mcclure": (rl.geman_mcclure, lambda r: 1 - 1 / (1 + r**2)),
    "talwar": (rl.talwar, lambda r: np.minimum(r, 1) ** 2),
    "own": (soft, lambda r: 1 - np.exp(-(r**3))),
}


@pytest.mark.parametrize(
    "name", [n if n == "tukey" else pytest.param(n, marks=pytest.mark.thorough) for n in LOSSES]
)
def test_m_scale_solves_its_equation(x64, name):
    loss, rho = LOSSES[name]
    rows = np.r_[samples(42, seed=3), samples(18, seed=4) * 1e-30]
    rows[48:, :4] = [1e30, -2e25, 3e9, INF]
    w = np.random.default_rng(1).uniform(0, 2, rows.shape)
    f = jax.jit(lambda b: m_scale(rows, loss, breakdown=b, center=0.3, weights=w, axis=1))
    for breakdown in (0.5, 0.2):
        s = np.asarray(f(breakdown))
        differ = (w * (rows != 0.3)).sum(1) / w.sum(1)
        far = (w * np.isinf(rows)).sum(1) / w.sum(1)
        np.testing.assert_array_equal(s == 0, differ <= breakdown)
        np.testing.assert_array_equal(s == INF, far >= breakdown)
        some = (s > 0) & (s < INF)
        u = np.abs(rows[some] - 0.3) / s[some, None]
        miss = (w[some] * rho(u)).sum(1) / w[some].sum(1) - breakdown
        assert np.abs(miss).max() < 3e-15


def plain_tau(x: np.ndarray, center: float | None = None) -> float:
    """robustbase's scaleTau2 with its defaults, from its documentation."""
    m0 = np.median(x) if center is None else center
    s0 = np.median(np.abs(x - m0))
    if s0 == 0:
        return 0.0
    w = np.maximum(0, 1 - ((x - m0) / (4.5 * s0)) ** 2) ** 2
    m = np.sum(w * x) / np.sum(w) if center is None else center
    cut = 3 * stats.norm.ppf(0.75)
    expected = 2 * ((1 - cut**2) * stats.norm.cdf(cut) - cut * stats.norm.pdf(cut) + cut**2) - 1
    return s0 * np.sqrt(np.mean(np.minimum(((x - m) / s0) ** 2, 9)) / expected)


def test_tau_is_that_of_robustbase(x64):
    rows = samples(60, seed=6)
    for center in (None, 0.3):
        got = tau(rows, center=center, axis=1)
        np.testing.assert_allclose(got, [plain_tau(x, center) for x in rows], 3e-15)


# Laws.


@pytest.mark.thorough
@weighted
def test_weights(x64, name):
    """Integers are repetitions, 0 and 1 a mask, equal ones none; only ratios count."""
    f = partial(WEIGHTED[name], axis=1)
    rows = samples(70, seed=7)[np.arange(70) % 7 < 6]  # the last kind may be ill-conditioned
    random = np.random.default_rng(8)
    times = random.integers(0, 4, rows.shape)
    times[:, 8:] = 0
    times[:, 0] += times.sum(1) == 0
    copies, keep = repeated(rows, times, 24)
    for given in [{}] * (name not in ("iqr", "proposal2")) + [{"center": 0.3}] * (name in CENTERED):
        got = f(rows, weights=times, **given)
        np.testing.assert_allclose(got, f(copies, where=keep, **given), 1e-14)
    zero_one = f(rows, weights=(times > 0).astype(float))
    np.testing.assert_allclose(zero_one, f(rows, where=times > 0), 1e-13, 3e-14)
    for equal in (0.1, 3.0, 1e-12, 7e11):
        np.testing.assert_allclose(f(rows, weights=equal), f(rows), 3e-13, 1e-13)
    w = random.uniform(0, 1, rows.shape)
    for factor in (0.1, 3e-9, 7e7):
        np.testing.assert_allclose(f(rows, weights=factor * w), f(rows, weights=w), 3e-13, 1e-14)
    dropped = np.where(times > 0, w, NAN)
    kept = f(rows, weights=np.where(times > 0, w, 0.0))
    np.testing.assert_allclose(f(rows, weights=dropped, where=times > 0), kept, 1e-13, 1e-14)


@weighted
def test_weights_of_any_size_count_by_their_ratios(name):
    """In float32, from the smallest numbers to the largest, rows each of their own size."""
    random = np.random.default_rng(8)
    rows = random.normal(size=(2, 24)).astype(np.float32)
    w = random.uniform(0.5, 2, rows.shape).astype(np.float32)
    f = partial(WEIGHTED[name], axis=1)
    traced = jax.jit(lambda w: f(rows, weights=w))
    both = jax.jit(jax.value_and_grad(lambda x, w: f(x, weights=w).sum()))
    want, (_, slope) = f(rows, weights=w), both(rows, w)
    for size in (1e38, 1e-37, 1e-38):
        scaled = (size * w.astype(np.float64)).astype(np.float32)
        np.testing.assert_allclose(traced(scaled), want, rtol=2e-5)
        np.testing.assert_allclose(f(rows, weights=scaled), want, rtol=2e-5)
        np.testing.assert_allclose(both(rows, scaled)[1], slope, rtol=1e-3, atol=1e-4)
    for sizes in ([1e300], [1e-300], [1e-50, 1e50]):
        np.testing.assert_allclose(f(rows, weights=w * np.c_[sizes]), want, rtol=2e-5)
    for wrong in (INF, NAN, -1.0, -1e-39):
        assert np.isnan(traced(np.where(np.arange(24) == 3, np.float32(wrong), w))).all()
        with pytest.raises(ValueError, match="weights must be"):
            f(rows, weights=np.where(np.arange(24) == 3, np.float32(wrong), w))


@each
def test_under_strict_settings(name):
    x = samples(2, seed=3).astype(np.float32)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        ways = [{}, {"where": x < 50}, {"weights": np.ones_like(x)}]
        for given in ways if name in WEIGHTED else ways[:2]:
            for axis in (None, 1):
                assert np.isfinite(ALL[name](x, axis=axis, **given)).all()


def test_weighted_quartiles_by_hand(x64):
    # Weight 1 of 4 is one observation's: the quartiles are at weight 0.75 to 1.75, 2.25 to 3.25.
    assert iqr([1.0, 3.0, 7.0, 8.0], weights=[2.0, 2.0, 2.0, 2.0]) == pytest.approx(
        IQR * ((7 * 0.75 + 8 * 0.25) - (1 * 0.25 + 3 * 0.75)), rel=1e-15
    )
    # sum 4, unit (1 + 1 + 4) / 4 = 1.5: from 0.625 to 2.125 and from 1.875 to 3.375.
    upper, lower = (7 * 0.125 + 8 * 1.375) / 1.5, (1 * 0.375 + 7 * 1.0 + 8 * 0.125) / 1.5
    got = iqr([8.0, 1.0, 7.0], weights=[2.0, 1.0, 1.0])
    assert got == pytest.approx(IQR * (upper - lower), rel=1e-15)


@each
def test_moves_with_the_data(x64, name):
    f, rows = partial(ALL[name], axis=1), samples(60, seed=9)
    want = f(rows)
    for factor, shift in ((-3.7, 0.0), (1.0, 12.5), (1e-30, 0.0), (1e30, 0.0), (0.01, -3.0)):
        np.testing.assert_allclose(f(factor * rows + shift), abs(factor) * want, 1e-12, 1e-15)
    order = np.random.default_rng(1).permutation(24)
    limit = np.full(len(rows), 1e-14)
    if name == "m_scale":  # An ulp of 1/2, the mean, where it has next to no slope.
        some = want > 0
        r = rows[some] - np.median(rows[some], axis=1, keepdims=True)
        u = np.minimum(np.abs(r) / np.c_[want[some]] / 1.547644980928226, 1)
        slope = np.mean(6 * u**2 * (1 - u**2) ** 2, axis=1)
        limit[some] = np.maximum(1e-14, 2**-53 / slope)
        assert np.sum(limit > 1e-14) == 2
    assert np.all(np.abs(f(rows[:, order]) - want) <= limit * want)
    np.testing.assert_allclose(f(rows[:, ::-1]), want, 1e-14)


@each
@pytest.mark.parametrize("far", [1e30, INF])
def test_breakdown(name, far):
    keep = np.arange(24) < np.array([23, 24, 24, 24, 24, 24, 24])[:, None]
    x = np.tile(gaussian(24), (7, 1))
    resisted = 5 if name in ("iqr", "proposal2") else 11
    one, two = far * np.arange(1, 14), far * np.arange(1, 14) * np.resize([1, -1], 13)
    x[:2, :resisted], x[2:4, :resisted] = one[:resisted], two[:resisted]
    # It breaks down in the end: half is too many, and a scale that is infinite says so.
    x[4, :13], x[5, :13], x[6, :13] = two, -two, 5.0
    value, _ = value_and_gradient(name)(x, keep)
    assert np.all((value[:4] > 0.2) & (value[:4] < 8))
    assert np.all(value[4:6] > 1e28)
    assert (value[6] == 0) == (name in BOUNDED)


@each
def test_no_spread_is_exactly_zero(name):
    rows = np.full((7, 24), np.float32(0.1))
    keep = np.arange(24) < np.array([1, 2, 7, 8, 23, 24, 24])[:, None]
    rows[4, 7:9], rows[5, :3], rows[6, 20:] = [5.0, -1e30], [1e30, 7.3, 2.0], INF
    for zeros in value_and_gradient(name)(rows, keep):
        np.testing.assert_array_equal(zeros, 0)
    for zeros in value_and_gradient(name, masked=False)(rows[[0, 5, 0, 5, 0, 5, 0]]):
        np.testing.assert_array_equal(zeros, 0)


@each
def test_nothing_is_nan_and_nan_shows(name):
    if name in WEIGHTED:
        f = jax.jit(lambda x, w: ALL[name](x, weights=w))
        x, one = jnp.arange(24.0), jnp.ones(24)
        assert np.isnan(f(x, 0 * one))
        assert np.isnan(f(x.at[3].set(NAN), one.at[3].set(0.0)))
        for wrong in (INF, NAN, -1.0):
            assert np.isnan(f(x, one.at[3].set(wrong)))
    rows, keep = (
        np.tile(np.arange(24.0), (7, 1)),
        np.arange(24) < np.array([24] * 5 + [9, 0])[:, None],
    )
    rows[np.arange(7), [0, 1, 12, 22, 23, 8, 8]] = NAN
    value, gradient = value_and_gradient(name)(rows, keep)
    assert np.isnan(value).all()
    np.testing.assert_array_equal(np.isnan(gradient), keep)
    value, gradient = value_and_gradient(name, masked=False)(rows)
    assert np.isnan(value).all()
    assert np.isnan(gradient).all()


@each
def test_infinite_entries_are_outliers(name):
    x = np.full((7, 24), INF)
    x[0, 3:] = gaussian(21)
    x[0, 0] *= -1
    x[1:, 0], x[2:, 1], x[3:, 2], x[4, 0] = 1, 2, -INF, INF
    keep = np.arange(24) < np.array([24, 2, 4, 4, 4, 24, 7])[:, None]
    value, gradient = value_and_gradient(name)(x, keep)
    assert 0.9 < value[0] < 2
    assert np.isfinite(gradient[0]).all()
    assert np.all(gradient[0, :3] == 0)
    np.testing.assert_array_equal(value[1:], INF)


def numbers(n: int = 24) -> np.ndarray:
    return np.random.default_rng(11).normal(size=n) * 2 + 1


@pytest.mark.parametrize(
    "name", ["mad", *(pytest.param(n, marks=pytest.mark.thorough) for n in ALL if n != "mad")]
)
def test_derivatives(x64, name):
    """In both modes, of x and weights, against differences; and of second order."""
    n, f = 24, ALL[name]
    x = at = jnp.asarray(numbers(n))
    if name in WEIGHTED:
        at = jnp.r_[x, np.random.default_rng(3).uniform(0.5, 1.5, n)]

    def g(at):
        return f(at[:n], weights=at[n:]) if name in WEIGHTED else f(at)

    both = jax.jit(jax.vmap(jax.value_and_grad(g)))
    steps = 1e-6 * jnp.eye(at.size)
    ones = jnp.r_[x, jnp.ones(at.size - n)]
    holes = ones.at[-2:].set(0.0)  # the last two x where there are no weights
    value, gradient = both(jnp.concatenate([at + steps, at - steps, jnp.stack([ones, holes])]))
    (up, down), (above, below) = (jnp.split(a[:-2], 2) for a in (value, gradient))
    forward, hessian = jax.jit(lambda at: (jax.jacfwd(g)(at), jax.hessian(g)(at)))(at)
    np.testing.assert_allclose(forward, (up - down) / 2e-6, atol=2e-9)
    np.testing.assert_allclose((above + below) / 2, jnp.tile(forward, (at.size, 1)), atol=2e-6)
    np.testing.assert_allclose(hessian, (above - below) / 2e-6, atol=5e-9)
    # Without weights, and of what is kept.
    keep, slope = jnp.arange(n) < n - 2, jax.grad(f)
    plain, kept, short = jax.jit(
        lambda x: (slope(x), slope(jnp.where(keep, x, NAN), where=keep), slope(x[:-2]))
    )(x)
    np.testing.assert_allclose(plain, gradient[-2, :n], atol=1e-14)
    np.testing.assert_array_equal(kept[-2:], 0)
    if name in WEIGHTED:
        np.testing.assert_allclose(kept, gradient[-1, :n] * keep, atol=1e-14)
    else:
        np.testing.assert_allclose(kept[:-2], short, atol=1e-14)


@pytest.mark.thorough
def test_derivatives_of_parameters(x64):
    x = jnp.asarray(numbers())
    functions = [
        (lambda k: 2 * proposal2(x, k=k) + location_scale(x, k=k).location, 1.3),
        (lambda delta: m_scale(x, partial(rl.tukey, delta=delta)), 1.7),
        (lambda breakdown: m_scale(x, breakdown=breakdown), 0.3),
        (lambda center: mad(x, center=center), 0.5),
    ]
    for f, at in functions:
        value, slope = jax.jit(jax.vmap(jax.value_and_grad(f)))(at + np.array([-1e-6, 0, 1e-6]))
        assert abs(slope[1] - (value[2] - value[0]) / 2e-6) < 1e-8
    location = jax.grad(lambda x: location_scale(x).location)(x)
    assert abs(location.sum() - 1) < 1e-14
    # Where nothing but the middle counts: a location still moves with the data.
    tied = jnp.r_[jnp.full(23, 2.0), 3.0]
    assert jax.grad(lambda x: location_scale(x).location)(tied).sum() == 1


# Contract.


@pytest.mark.parametrize("axis", [[-1, 1]])
def test_axis(axis):
    x = samples(24, 5, 12).reshape(2, 3, 4, 5).astype(np.float32)
    random = np.random.default_rng(0)
    given = {"where": random.random(x.shape) < 0.8, "weights": random.uniform(0.5, 1, x.shape)}
    axes = [a % 4 for a in np.ravel(axis).tolist()]
    left = [a for a in range(4) if a not in axes]

    def rows(a):
        a = np.transpose(a, left + axes)
        return a.reshape(*a.shape[: len(left)], -1)

    got = mad(x, axis=axis, **given)
    chex.assert_shape(got, [x.shape[a] for a in left])
    for index in np.ndindex(got.shape):
        one = {k: rows(v)[index] for k, v in given.items()}
        np.testing.assert_allclose(got[index], mad(rows(x)[index], **one), 1e-6)
    thin = given["where"][:, :1, :1]
    whole = np.broadcast_to(thin, x.shape)
    np.testing.assert_array_equal(mad(x, where=thin, axis=axis), mad(x, where=whole, axis=axis))


def test_axis_of_all_of_none_and_of_nothing():
    x = samples(24, 5, 12).reshape(2, 3, 4, 5).astype(np.float32)
    np.testing.assert_array_equal(mad(x), mad(x.ravel()))
    np.testing.assert_array_equal(mad(x, axis=()), np.zeros(x.shape))
    chex.assert_shape(mad(x[:, :0], axis=0), (0, 4, 5))
    empty = mad(x[:, :0], axis=1)
    chex.assert_shape(empty, (2, 4, 5))
    assert np.isnan(empty).all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["mad", "qn", "m_scale"])
def test_vmap_is_a_loop(name):
    x = samples(7, seed=12).astype(np.float32)
    f, keep = ALL[name], np.random.default_rng(0).random(x.shape) < 0.8
    one = [f(row, where=k) for row, k in zip(x, keep, strict=True)]
    np.testing.assert_allclose(value_and_gradient(name)(x, keep)[0], one, 1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, jnp.float16) for name in ALL), ("mad", jnp.bfloat16)]
)
def test_16_bits_round_once(name, dtype):
    f, x = ALL[name], jnp.asarray(np.clip(samples(7, seed=12) * 50, -6e4, 6e4), dtype)
    got = f(x, axis=1)
    chex.assert_type(got, dtype)
    np.testing.assert_array_equal(got, f(x.astype(jnp.float32), axis=1).astype(dtype))


@each
def test_types(name):
    f, integers = ALL[name], np.arange(24) ** 2
    floats, keep = integers.astype(np.float32), integers > 3

    def check(want, *x, **given):
        for result in (f, jax.grad(f)) if x[0].dtype.kind != "i" else (f,):
            chex.assert_type(jax.eval_shape(result, *x, **given), want)

    check(jnp.float32, integers)
    with jax.enable_x64(True):
        check(jnp.float64, integers)
        check(jnp.float32, floats)
    half = floats.astype(np.float16)
    if name in WEIGHTED:
        assert jax.eval_shape(f, half, weights=floats).dtype == jnp.float32
    with jax.numpy_dtype_promotion("strict"):
        for x in (half, floats):
            given = {"weights": x} if name in WEIGHTED else {}
            check(x.dtype, x)
            check(x.dtype, x, where=keep)
            check(x.dtype, x, where=keep, **given)
            if name in CENTERED:
                check(x.dtype, x, center=0.0)


def test_integers_are_numbers():
    assert mad([1, 2, 4, 9]) == mad([1.0, 2.0, 4.0, 9.0])


@centered
def test_center(x64, name):
    """One number or one of each row; residuals are taken about it."""
    f, rows = CENTERED[name], samples(60, seed=14)
    middle = np.arange(60.0)[:, None]
    got = f(rows, center=middle, axis=1)
    np.testing.assert_array_equal(got, f(rows - middle, center=0.0, axis=1))
    rows[:] = 3.0
    rows[:, ::2] *= -1
    assert np.all(f(rows, center=0.0, axis=1) > 2.9)
    assert np.all(f(np.abs(rows), axis=1) == 0)
    with pytest.raises(ValueError, match=r"center must broadcast to the shape \(60, 24\)"):
        f(rows, center=np.ones((3, 60, 24)))
    with pytest.raises(TypeError, match="center must be real"):
        f(rows, center=1j)


@each
def test_errors(name):
    f, x = ALL[name], np.ones((3, 2), np.float32)
    for where in (np.ones((3, 2)), 1, "yes"):
        with pytest.raises(TypeError, match="where must be"):
            f(x, where=where)
    with pytest.raises(ValueError, match=r"where must broadcast.*3, 2"):
        f(x, where=np.ones((3,), bool))
    with pytest.raises(TypeError, match="x must be real numbers, got dtype complex"):
        f(1j * x)
    with pytest.raises(TypeError, match="x must be real numbers, got NoneType"):
        f(None)
    with pytest.raises(ValueError, match="axis"):
        f(x, axis=2)
    if name in WEIGHTED:
        with pytest.raises(ValueError, match=r"weights must be >= 0, got -2"):
            f(x, weights=[1.0, -2.0])
        with pytest.raises(ValueError, match=r"weights must broadcast.*3, 2"):
            f(x, weights=np.ones(3))
    else:
        with pytest.raises(TypeError, match="weights"):
            f(x, weights=x)


def test_errors_of_parameters():
    x, tied = jnp.arange(24.0), jnp.ones(24)
    of_k = jax.jit(lambda x, k: proposal2(x, k=k))
    of_share = jax.jit(lambda x, b: m_scale(x, breakdown=b))
    for k in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="k must be > 0"):
            proposal2(x, k=k)
        assert np.isnan([of_k(x, k), of_k(tied, k)]).all()
    with pytest.raises(ValueError, match=r"k must be one number, got shape \(2,\)"):
        proposal2(x, k=jnp.ones(2))
    for breakdown in (0.0, 0.6, NAN):
        with pytest.raises(ValueError, match="breakdown must be"):
            m_scale(x, breakdown=breakdown)
        assert np.isnan([of_share(x, breakdown), of_share(tied, breakdown)]).all()
    with pytest.raises(ValueError, match=r"breakdown must be one number"):
        m_scale(x, breakdown=[0.5, 0.5])
    for loss in (rl.huber, rl.cauchy, lambda r: r**2 / (1 + r**2)):
        with pytest.raises(ValueError, match="loss must be bounded"):
            m_scale(x, loss)
        with pytest.raises(ValueError, match="loss must be bounded"):
            jax.jit(partial(m_scale, loss=loss))(x)
    with pytest.raises(TypeError, match="loss must be a function"):
        m_scale(x, "tukey")
