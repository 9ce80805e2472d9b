"""What docs/constants.md says of others' losses, against their formulas as they define them."""

from __future__ import annotations

import inspect
import re
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special

import robustloss as rl
from robustloss.tuning import breakdown, efficiency, tune

PAGE = (Path(__file__).parent.parent / "docs" / "constants.md").read_text()

# Residuals in units of the knob: far enough from 0 that 1e-12 is left of the plain formulas, and
# close to an edge where a weight jumps, but not on it.
GRID = np.append(np.geomspace(0.07, 40.0, 30), (0.999, 1.001))
GRID = np.concatenate([-GRID, GRID])


def sections() -> dict[str, list[list[str]]]:
    """The rows of the tables under each heading, without those of the head."""
    found = {}
    for section in PAGE.split("\n## ")[1:]:
        title, text = section.split("\n", 1)
        tables = re.findall(r"^\|.*\n\|---.*\n((?:\|.*\n)*)", text, re.MULTILINE)
        rows = [line.strip("|").split(" | ") for table in tables for line in table.splitlines()]
        found[title] = [[cell.strip() for cell in row] for row in rows]
    return found


SECTIONS = sections()
NUMPY = {name: getattr(np, name) for name in np.__all__}


def run(cell: str, **names: object) -> np.ndarray:
    return eval(cell.strip("`"), {**NUMPY, "partial": partial, "rl": rl, **names})


# Others' losses of a residual and their knobs, each built the way they build it: SciPy from
# z = (r / C)**2, Ceres from s = r**2, the R packages and MATLAB from weights or scaled rhos.


def scipy_cost(rho, r, C):
    return 0.5 * C**2 * rho((r / C) ** 2)


def huber(r, k):
    a = np.abs(r)
    return np.where(a <= k, 0.5 * r * r, k * (a - 0.5 * k))


def bisquare_chi(r, c):
    t = np.minimum((r / c) ** 2, 1)
    return t * (3 + t * (-3 + t))


def hampel(r, a, b, c):
    u = np.abs(r)
    falling = a * (b - a / 2 + (u - b) * (1 - (u - b) / (c - b) / 2))
    return np.select(
        [u <= a, u <= b, u <= c], [u * u / 2, a * (u - a / 2), falling], a * (b - a + c) / 2
    )


def pinball(r, q):
    u = -r  # target - prediction
    return u * (q - (u < 0))


def lossfun(r, alpha, c):
    beta = abs(alpha - 2)
    return beta / alpha * (((r / c) ** 2 / beta + 1) ** (alpha / 2) - 1)


def fair(r, c):
    return c**2 * (np.abs(r) / c - np.log1p(np.abs(r) / c))


def log_cosh(r):
    return np.logaddexp(r, -r) - np.log(2)


THEIRS = {
    "SciPy": {
        '`least_squares(loss="linear")`': lambda r: 0.5 * r**2,
        '`least_squares(loss="huber", f_scale=C)`': lambda r, C: scipy_cost(
            lambda z: np.where(z <= 1, z, 2 * z**0.5 - 1), r, C
        ),
        '`least_squares(loss="soft_l1", f_scale=C)`': lambda r, C: scipy_cost(
            lambda z: 2 * ((1 + z) ** 0.5 - 1), r, C
        ),
        '`least_squares(loss="cauchy", f_scale=C)`': lambda r, C: scipy_cost(np.log1p, r, C),
        "`scipy.special.huber(C, r)`": lambda r, C: huber(r, C),
        "`scipy.special.pseudo_huber(C, r)`": lambda r, C: C**2 * (np.hypot(1, r / C) - 1),
    },
    "Ceres": {
        "`HuberLoss(a)`": lambda r, a: (
            0.5 * np.where(r**2 > a**2, 2 * a * np.sqrt(r**2) - a**2, r**2)
        ),
        "`SoftLOneLoss(a)`": lambda r, a: 0.5 * 2 * a**2 * (np.sqrt(1 + r**2 / a**2) - 1),
        "`CauchyLoss(a)`": lambda r, a: 0.5 * a**2 * np.log(1 + r**2 / a**2),
        "`TukeyLoss(a)`, Ceres 2.1": lambda r, a: 0.5 * a**2 / 3 * bisquare_chi(r, a),
        "`TukeyLoss(a)`, Ceres 1.14": lambda r, a: 0.5 * a**2 / 6 * bisquare_chi(r, a),
    },
    "GTSAM": {
        "`Null()`": lambda r: 0.5 * r**2,
        "`Huber(k)`": huber,
        "`Fair(c)`": fair,
        "`Cauchy(k)`": lambda r, k: 0.5 * k**2 * np.log1p(r**2 / k**2),
        "`Tukey(c)`": lambda r, c: c**2 / 6 * bisquare_chi(r, c),
        "`Welsch(c)`": lambda r, c: 0.5 * c**2 * -np.expm1(-(r**2) / c**2),
        "`GemanMcClure(c)`": lambda r, c: 0.5 * c**2 * r**2 / (c**2 + r**2),
        "`TruncatedLeastSquares(c)`": lambda r, c: np.where(r**2 <= c**2, 0.5 * r**2, 0.5 * c**2),
    },
    "OpenCV": {
        "`DIST_L1`": lambda r: np.abs(r),
        "`DIST_L2`": lambda r: r**2 / 2,
        "`DIST_L12`": lambda r: 2 * (np.sqrt(1 + r**2 / 2) - 1),
        "`DIST_HUBER, param=C`": lambda r, C: huber(r, C),
        "`DIST_FAIR, param=C`": lambda r, C: fair(r, C),
        "`DIST_WELSCH, param=C`": lambda r, C: C**2 / 2 * (1 - np.exp(-((r / C) ** 2))),
    },
    "Barron's general loss": {
        "`lossfun(r, alpha, c)`": lossfun,
        "`lossfun(r, 2, c)`": lambda r, c: 0.5 * (r / c) ** 2,
        "`lossfun(r, 1, c)`": lambda r, c: lossfun(r, 1, c),
        "`lossfun(r, 0, c)`": lambda r, c: np.log1p(0.5 * (r / c) ** 2),
        "`lossfun(r, -2, c)`": lambda r, c: lossfun(r, -2, c),
        "`lossfun(r, -inf, c)`": lambda r, c: -np.expm1(-0.5 * (r / c) ** 2),
    },
    "PyTorch, Keras, Optax": {
        "torch `l1_loss`": lambda r: np.abs(r),
        "torch `mse_loss`": lambda r: r**2,
        "torch `huber_loss(delta=d)`": lambda r, d: huber(r, d),
        "torch `smooth_l1_loss(beta=b)`": lambda r, b: np.where(
            np.abs(r) < b, 0.5 * r**2 / b, np.abs(r) - 0.5 * b
        ),
        "keras `Huber(delta=d)`": lambda r, d: huber(r, d),
        "keras `LogCosh()`": log_cosh,
        "optax `l2_loss`": lambda r: 0.5 * r**2,
        "optax `squared_error`": lambda r: r**2,
        "optax `huber_loss(delta=d)`": lambda r, d: huber(r, d),
        "optax `log_cosh`": log_cosh,
    },
    "LightGBM, XGBoost, scikit-learn": {
        'LightGBM `objective="huber", alpha=d`': lambda r, d: huber(r, d),
        'LightGBM `objective="fair", fair_c=c`': fair,
        'LightGBM `objective="quantile", alpha=q`': pinball,
        "XGBoost `reg:pseudohubererror, huber_slope=s`": lambda r, s: (
            s**2 * (np.sqrt(1 + (r / s) ** 2) - 1)
        ),
        "XGBoost `reg:quantileerror, quantile_alpha=q`": pinball,
        "sklearn `HuberRegressor(epsilon=e)`": lambda r, e: np.where(
            np.abs(r) < e, r**2, 2 * e * np.abs(r) - e**2
        ),
        'sklearn `SGDRegressor(loss="huber", epsilon=e)`': lambda r, e: huber(r, e),
        "sklearn `SVR(epsilon=e)`": lambda r, e: np.where(np.abs(r) <= e, 0, np.abs(r) - e),
        "sklearn `QuantileRegressor(quantile=q)`": pinball,
    },
    "statsmodels": {
        "`LeastSquares()`": lambda r: 0.5 * r**2,
        "`HuberT(t)`": lambda r, t: huber(r, t),
        "`TukeyBiweight(c)`": lambda r, c: c**2 / 6 * bisquare_chi(r, c),
        "`AndrewWave(a)`": lambda r, a: np.where(
            np.abs(r) <= a * np.pi, a**2 * (1 - np.cos(r / a)), 2 * a**2
        ),
        "`TrimmedMean(c)`": lambda r, c: np.where(np.abs(r) <= c, 0.5 * r**2, 0.5 * c**2),
        "`Hampel(a, b, c)`": hampel,
        "`StudentT(c, df)`": lambda r, c, df: (
            c**2 * df / 2 * (np.log(df + (r / c) ** 2) - np.log(df))
        ),
        "`MQuantileNorm(q, HuberT(t))`": lambda r, q, t: np.abs(q - (-r < 0)) * huber(-r, t),
    },
    "robustbase": {
        '`Mpsi(r, k, "huber", -1)`': huber,
        '`Mpsi(r, c, "bisquare", -1)`': lambda r, c: bisquare_chi(r, c) * (c * c / 6),
        '`Mchi(r, c, "bisquare")`': bisquare_chi,
        '`Mpsi(r, c, "welsh", -1)`': lambda r, c: -np.expm1(-((r / c) ** 2) / 2) * c**2,
        '`Mchi(r, c, "welsh")`': lambda r, c: -np.expm1(-((r / c) ** 2) / 2),
        '`Mpsi(r, c(a, b, c), "hampel", -1)`': hampel,
        '`Mchi(r, c(a, b, c), "hampel")`': lambda r, a, b, c: (
            hampel(r, a, b, c) / hampel(np.inf, a, b, c)
        ),
    },
    "MASS": {
        "`psi.huber(r, k)`": lambda r, k: np.minimum(1, k / np.abs(r)),
        "`psi.bisquare(r, c)`": lambda r, c: (1 - np.minimum(1, np.abs(r / c)) ** 2) ** 2,
        "`psi.hampel(r, a, b, c)`": lambda r, a, b, c: (
            np.minimum(np.minimum(np.abs(r), a), np.maximum(a * (c - np.abs(r)) / (c - b), 0))
            / np.abs(r)
        ),
    },
    "MATLAB": {
        "`andrews`": lambda r, t: (np.abs(r / t) < np.pi) * np.sinc(r / t / np.pi),
        "`bisquare`": lambda r, t: (np.abs(r / t) < 1) * (1 - (r / t) ** 2) ** 2,
        "`cauchy`": lambda r, t: 1 / (1 + (r / t) ** 2),
        "`fair`": lambda r, t: 1 / (1 + np.abs(r / t)),
        "`huber`": lambda r, t: 1 / np.maximum(1, np.abs(r / t)),
        "`logistic`": lambda r, t: np.tanh(r / t) / (r / t),
        "`talwar`": lambda r, t: 1.0 * (np.abs(r / t) < 1),
        "`welsch`": lambda r, t: np.exp(-((r / t) ** 2)),
    },
}

# The same from the package itself, where it is installed.


def least_squares(loss):
    """The cost of each residual alone, at the start, which is all the one evaluation sees."""

    def cost(r, C=1.0):
        return scipy.optimize.least_squares(lambda x: x, r, loss=loss, f_scale=C, max_nfev=1).cost

    return np.vectorize(cost)


REAL = {
    '`least_squares(loss="linear")`': least_squares("linear"),
    '`least_squares(loss="huber", f_scale=C)`': least_squares("huber"),
    '`least_squares(loss="soft_l1", f_scale=C)`': least_squares("soft_l1"),
    '`least_squares(loss="cauchy", f_scale=C)`': least_squares("cauchy"),
    "`scipy.special.huber(C, r)`": lambda r, C: scipy.special.huber(C, r),
    "`scipy.special.pseudo_huber(C, r)`": lambda r, C: scipy.special.pseudo_huber(C, r),
    "optax `l2_loss`": lambda r: optax.losses.l2_loss(jnp.asarray(r)),
    "optax `squared_error`": lambda r: optax.losses.squared_error(jnp.asarray(r)),
    "optax `huber_loss(delta=d)`": lambda r, d: optax.losses.huber_loss(jnp.asarray(r), delta=d),
    "optax `log_cosh`": lambda r: optax.losses.log_cosh(jnp.asarray(r)),
}

KNOBS = {"q": (0.1, 0.5, 0.93), "alpha": (-4.0, -0.5, 0.5, 1.5, 3.0), "df": (1.0, 4.0)}
KNOTS = ((1.5, 3.5, 8.0), (2.0, 4.0, 8.0), (0.7, 0.7, 1.9))


def knobs(theirs):
    """Several values of every knob of a formula, one below the other."""
    names = list(inspect.signature(theirs).parameters)[1:]
    values = (
        KNOTS if len(names) == 3 else product(*(KNOBS.get(n, (0.3, 1.0, 4.685)) for n in names))
    )
    columns = np.array(list(values)).T[..., None]
    return dict(zip(names, columns, strict=True))


ROWS = [(title, name) for title, rows in THEIRS.items() for name in rows]


def test_every_row_has_a_formula_and_every_formula_a_row():
    translated = {title: rows for title, rows in SECTIONS.items() if rows}
    assert list(translated) == [*THEIRS, "What a constant buys"]
    for title, formulas in THEIRS.items():
        assert [row[0] for row in translated[title]] == list(formulas)
    assert REAL.keys() <= {name for _, name in ROWS}


@pytest.mark.parametrize(("title", "name"), ROWS)
def test_theirs_is_ours(title, name):
    theirs = THEIRS[title][name]
    ((_, formula, here),) = [row for row in SECTIONS[title] if row[0] == name]
    given = knobs(theirs)
    units = [column for name, column in given.items() if name not in KNOBS]
    r = units[0] * GRID if units else np.tile(GRID, (3, 1))
    with jax.enable_x64(True):
        said = [run(here, r=jnp.asarray(r), **given), run(formula, r=r, **given)]
        said += [REAL[name](r, **given)] if name in REAL else []
    for got in said:
        np.testing.assert_allclose(got, theirs(r, **given), rtol=1e-12, atol=0)


BUYS = SECTIONS["What a constant buys"]
CONSTANTS = [row for row in BUYS if row[0].startswith("`rl.")]
DEFAULTS = [row for row in BUYS if row[0].startswith("`partial(")]


def assert_prints(value: float, cell: str) -> None:
    """The cell is the value, to as many digits as it has."""
    assert f"{value:.{len(cell.partition('.')[2])}f}" == cell


def test_tables_of_constants_are_complete():
    assert len(CONSTANTS) + len(DEFAULTS) == len(BUYS)
    families = [rl.losses.convex, rl.losses.redescending]
    losses = {f"`rl.{name}`" for family in families for name in family.__all__}
    unbent = {"`rl.squared_error`", "`rl.absolute_error`", "`rl.epsilon_insensitive`"}
    assert {name for name, *_ in CONSTANTS} == losses - unbent


@pytest.mark.parametrize(("name", "efficient", "resistant"), CONSTANTS)
def test_constants(name, efficient, resistant):
    loss = run(name)
    half = 0.5 * 10.0 ** -len(efficient.partition(".")[2])
    less, more = (efficiency(partial(loss, delta=float(efficient) + x)) for x in (-half, half))
    assert less < 0.95 < more
    if resistant == "-":
        assert breakdown(loss) == 0
    else:
        assert_prints(tune(loss, breakdown=0.5), resistant)


@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: row[0])
def test_defaults(row):
    default, _, efficient, *resistant = row
    loss = run(default)
    assert_prints(100 * efficiency(loss), efficient)
    for cell in resistant:
        assert_prints(100 * breakdown(loss), cell)
