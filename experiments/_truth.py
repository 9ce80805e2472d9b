"""The truth about every loss, one row each: its textbook formula, its laws, its limits.

A row states a loss twice. The first time it is the textbook's formula of the value, for mpmath: a
`Series` is a Taylor series in several variables, truncated after the third order. A formula that
takes numbers also takes series, and then gives exact derivatives without finite differences. The
arithmetic has `DIGITS` digits, enough to survive the cancellation in the formulas. The second time
it is value, slope and curvature in float64, written by hand without cancellation, for millions of
residuals at a time. The tests compare the two, and derive all other truths from them: the
derivatives, psi, and the limits of accuracy. Nothing in this file uses the library.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from mpmath import mp, mpf

DIGITS = 450
ORDER = 3

Index = tuple[int, ...]


@cache
def _products(variables: int) -> tuple[list[Index], list[tuple[int, int, int]]]:
    """The orders of the coefficients, and the triples (i, j, k) with i times j equal to k."""
    orders = [i for i in itertools.product(range(ORDER + 1), repeat=variables) if sum(i) <= ORDER]
    orders.sort(key=sum)
    index = {order: k for k, order in enumerate(orders)}
    pairs = itertools.product(enumerate(orders), repeat=2)
    sums = (((i, j), tuple(a + b for a, b in zip(x, y, strict=True))) for (i, x), (j, y) in pairs)
    return orders, [(i, j, index[total]) for (i, j), total in sums if total in index]


class Series:
    """A function of several variables to third order about a point."""

    def __init__(self, coefficients: list[mpf], variables: int):
        self.coefficients, self.variables = coefficients, variables

    @property
    def value(self) -> mpf:
        return self.coefficients[0]

    def derivative(self, orders: Index) -> mpf:
        """The derivative of these orders in the variables, at the point."""
        index = _products(self.variables)[0].index(orders)
        return self.coefficients[index] * math.prod(map(math.factorial, orders))

    def __add__(self, other: Any) -> Series:
        if isinstance(other, Series):
            pairs = zip(self.coefficients, other.coefficients, strict=True)
            return Series([a + b for a, b in pairs], self.variables)
        return Series([self.value + other, *self.coefficients[1:]], self.variables)

    def __mul__(self, other: Any) -> Series:
        if not isinstance(other, Series):
            return Series([c * other for c in self.coefficients], self.variables)
        product = [mpf(0)] * len(self.coefficients)
        for i, j, k in _products(self.variables)[1]:
            a, b = self.coefficients[i], other.coefficients[j]
            if a and b:
                product[k] += a * b
        return Series(product, self.variables)

    def __neg__(self) -> Series:
        return self * -1

    def __sub__(self, other: Any) -> Series:
        return self + -other

    def __rsub__(self, other: Any) -> Series:
        return -self + other

    def __truediv__(self, other: Any) -> Series:
        return self * (other**-1 if isinstance(other, Series) else 1 / mpf(other))

    def __rtruediv__(self, other: Any) -> Series:
        return self**-1 * other

    def __pow__(self, power: int) -> Series:
        x, n = self.value, power
        if n >= 0:
            return math.prod((self for _ in range(n - 1)), start=self) if n else 0 * self + 1
        inverse = self.compose([(-1) ** k * x ** -(k + 1) for k in range(ORDER + 1)])
        return inverse ** (-n)

    def __abs__(self) -> Series:
        return self * (-1 if self.value < 0 else 1)

    def __lt__(self, other: Any) -> bool:
        return self.value < _number(other)

    def __le__(self, other: Any) -> bool:
        return self.value <= _number(other)

    __radd__ = __add__
    __rmul__ = __mul__

    def compose(self, taylor: Sequence[mpf]) -> Series:
        """f of this series, where f has these Taylor coefficients at its value."""
        change = Series([mpf(0), *self.coefficients[1:]], self.variables)
        *lower, total = taylor
        total = change * 0 + total
        for c in reversed(lower):
            total = total * change + c
        return total


def _number(x: Any) -> Any:
    return x.value if isinstance(x, Series) else x


def variables(*point: mpf) -> list[Series]:
    """The series of the variables themselves about a point."""
    orders, _ = _products(len(point))

    def build_variable(i: int) -> Series:
        first = tuple(int(k == i) for k in range(len(point)))
        return Series(
            [point[i] if sum(order) == 0 else mpf(int(order == first)) for order in orders],
            len(point),
        )

    return [build_variable(i) for i in range(len(point))]


def exp(x: Series) -> Series:
    return x.compose([mp.exp(x.value) / math.factorial(k) for k in range(ORDER + 1)])


def expm1(x: Series) -> Series:
    return exp(x) - 1


def log(x: Series) -> Series:
    v = x.value
    return x.compose([mp.log(v), *(-((-1) ** k) / (k * v**k) for k in range(1, ORDER + 1))])


def sqrt(x: Series) -> Series:
    root = mp.sqrt(x.value)
    return x.compose([mp.binomial(mpf(1) / 2, k) * root / x.value**k for k in range(ORDER + 1)])


def cos(x: Series) -> Series:
    c, s = mp.cos_sin(x.value)
    return x.compose([c, -s, -c / 2, s / 6])


def expm1_ratio(x: Series) -> Series:
    """(exp(x) - 1) / x, also at 0."""
    if x.value:
        return expm1(x) / x
    return x.compose([mpf(1) / math.factorial(k + 1) for k in range(ORDER + 1)])


# The statements of a row.

Three = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """The truth about a loss. Of a loss with two sides, formula and views are those of one side."""

    formula_of_side: Callable[..., Series]
    """The textbook's formula, a function of the residual and its parameters."""
    views: Callable[..., Sequence[Any]] | None = None
    """Value, slope and curvature at |r| in float64, a function of NumPy or jax.numpy, |r| and the
    parameters. Where slope or curvature passes through 0 away from r = 0, the sizes of their terms
    follow."""
    parameters: tuple[str, ...] = ("delta",)
    """The parameters after the residual, in the order of the formula."""
    ulps: Three | None = None
    """The largest accepted errors of value, slope and curvature in float32, at any delta."""
    all_ulps: Three | None = None
    """The same over all 2**32 numbers, where they are larger than over the sample of the tests."""
    kinks: tuple[float, ...] = ()
    """The values of |r| / delta, 0 apart, at which a first or second derivative jumps."""
    degree: int = 2
    """The loss is `delta**degree f(r / delta)`."""
    unit: bool = True
    """Whether the loss is r**2 / 2 near 0; of a loss with two sides, at q = 1/2."""
    side_factor: int = 0
    """The side above 0 has the factor (1 - q) times this, the side below q times this; 0: even."""
    cases: tuple[dict[str, Any], ...] = ({},)
    """Values of the parameters other than delta for the tests."""
    case_ulps: tuple[Three, ...] | None = None
    """`ulps` of each case, where they differ."""
    choices: dict[str, tuple[float, ...]] | None = None
    """Of a parameter, the only values at which all derivatives are measured."""

    def formula(self, r: Series, *parameters: Any, **fixed: Any) -> Series:
        """The loss; at 0 its derivatives of odd order in r are those from the right."""
        if not self.side_factor:
            return self.formula_of_side(r, *parameters, **fixed)
        q, *others = parameters
        side = 0 * q + mpf(1) / 2 if r.value == 0 else q if r.value < 0 else 1 - q
        return self.side_factor * side * self.formula_of_side(r, *others)

    def in_float64(self, xp: Any, r: Any, *parameters: Any, **fixed: Any) -> tuple[Any, ...]:
        """Value, slope, curvature, and the sizes of the terms of the last two."""
        side, sign = 1.0, xp.sign(r)
        if self.side_factor:
            q, *parameters = parameters
            side = self.side_factor * xp.where(r == 0, 0.5, xp.where(r > 0, 1 - q, q))
        value, slope, bend, *terms = self.views(xp, xp.abs(r), *parameters, **fixed)
        in_slope, in_bend = terms or (0 * r, 0 * r)
        return tuple(side * x for x in (value, sign * slope, bend, in_slope, in_bend))


ROWS: dict[str, Row] = {}
"""The row of each loss in `rl.LOSSES`."""


def row(formula: Callable[..., Series], **fields: Any) -> Callable[[Callable[..., Any]], Row]:
    """Adds the row of a loss. The decorated function has its name and computes its views."""

    def add(views: Callable[..., Any]) -> Row:
        ROWS[views.__name__] = Row(formula, views, **fields)
        return ROWS[views.__name__]

    return add


# The rows. u is r / delta, and z its square.


@row(lambda r: r * r, parameters=(), ulps=(0.5, 0.5, 0.5), unit=False)
def squared_error(xp, a):
    return a * a, 2 * a, 2 + 0 * a


@row(abs, parameters=(), ulps=(0.5, 0.5, 0.5), unit=False)
def absolute_error(xp, a):
    return a, 1 + 0 * a, 0 * a


def _huber(r: Series, d: Series) -> Series:
    a = abs(r)
    return a * a / 2 if a <= d else d * (a - d / 2)


@row(_huber, ulps=(1.6, 0.51, 0.51), kinks=(1.0,))
def huber(xp, a, d):
    near = a <= d
    return xp.where(near, a * a / 2, d * (a - d / 2)), xp.minimum(a, d), xp.where(near, 1.0, 0.0)


def _log_cosh(r: Series, d: Series) -> Series:
    u = abs(r) / d
    return d * d * (u - mp.log(2) + log(1 + exp(-2 * u)))


@row(_log_cosh, ulps=(3.0, 2.2, 5.0))
def log_cosh(xp, a, d):
    u = a / d
    s, tail = xp.expm1(-xp.minimum(u, 5)), xp.exp(-2 * u)
    near = xp.log1p(s * s / (2 * (1 + s)))  # cosh u - 1 = expm1(-u)**2 e**u / 2
    value = xp.where(u < 5, near, u - math.log(2) + xp.log1p(tail))
    slope = xp.where(u < 1, xp.tanh(u), (1 - tail) / (1 + tail))
    return d * d * value, d * slope, 4 * tail / (1 + tail) ** 2


@row(lambda r, d: d * d * (sqrt(1 + (r / d) ** 2) - 1), ulps=(3.0, 3.5, 4.0))
def pseudo_huber(xp, a, d):
    root = xp.sqrt(1 + (a / d) ** 2)
    return a * a / (1 + root), a / root, root**-3.0


@row(lambda r, d: d * d * (abs(r) / d - log(1 + abs(r) / d)), ulps=(3.3, 1.6, 5.5))
def fair(xp, a, d):
    u = a / d
    x = xp.minimum(u, 0.1)
    near = sum((-x) ** k / k for k in range(20, 1, -1))
    return d * d * xp.where(u < 0.1, near, u - xp.log1p(u)), a / (1 + u), (1 + u) ** -2.0


@row(
    lambda r, d: 0 * r if abs(r) <= d else abs(r) - d,
    ulps=(0.5, 0.5, 0.5),
    all_ulps=(0.51, 0.5, 0.5),
    kinks=(1.0,),
    degree=1,
    unit=False,
)
def epsilon_insensitive(xp, a, d):
    return xp.maximum(a - d, 0), xp.where(a > d, 1.0, 0.0), 0 * a


@row(
    lambda r, d: d * d / 2 * log(1 + (r / d) ** 2),
    ulps=(4.5, 3.2, 6.5),
    all_ulps=(4.5, 3.2, 7.1),
)
def cauchy(xp, a, d):
    z = (a / d) ** 2
    return d * (d / 2 * xp.log1p(z)), a / (1 + z), (1 - z) / (1 + z) ** 2, 0 * a, 1 / (1 + z)


@row(
    lambda r, d: r * r / 2 / (1 + (r / d) ** 2),
    ulps=(2.6, 3.4, 5.2),
    all_ulps=(2.6, 3.4, 5.4),
)
def geman_mcclure(xp, a, d):
    z = (a / d) ** 2
    w = 1 / (1 + z)
    return a * w * a / 2, a * w * w, (1 - 3 * z) * w * w * w, 0 * a, (1 + 3 * z) * w * w * w


@row(lambda r, d: d * d / -2 * expm1(-((r / d) ** 2)), ulps=(3.8, 4.4, 7.8))
def welsch(xp, a, d):
    z = xp.minimum((a / d) ** 2, 1e3)
    e = xp.exp(-z)  # which loses z ulps, little beside float32's
    return d * (-d / 2 * xp.expm1(-z)), a * e, (1 - 2 * z) * e, 0 * a, (1 + 2 * z) * e


@row(
    lambda r, d: d * d / 6 * (1 - (1 - (r / d) ** 2) ** 3 if abs(r) <= d else 1),
    ulps=(4.0, 4.7, 4.4),
    kinks=(1.0,),
)
def tukey(xp, a, d):
    x = xp.minimum(a, d)
    z, q = (x / d) ** 2, (d - x) / d * (1 + x / d)
    return x * (x * (3 - 3 * z + z * z) / 6), x * q * q, q * (1 - 5 * z), 0 * a, q * (1 + 5 * z)


@row(
    lambda r, d: d * d * (1 - cos(r / d) if abs(r) < mp.pi * d else 2),
    ulps=(3.5, 2.4, 2.2),
    kinks=(math.pi,),
)
def andrews(xp, a, d):
    u = a / d
    x, inside, near = xp.minimum(u, math.pi), u <= math.pi, u <= 3.2
    slope, bend = d * xp.where(inside, xp.sin(x), 0), xp.where(inside, xp.cos(x), 0)
    terms = d * xp.where(near & (u > 1.5), 1.0, 0.0), xp.where(near, 1.0, 0.0)
    return 2 * (d * xp.sin(x / 2)) ** 2, slope, bend, *terms


KNOTS = (1.5, 3.5, 8.0)


def _hampel(r: Series, d: Series, knots: Sequence[Any] = KNOTS) -> Series:
    a, b, c = map(mpf, knots)
    u = abs(r) / d
    if u <= a:
        return r * r / 2
    if u <= b:
        return d * d * a * (u - a / 2)
    top = d * d * (a * (b + c - a) / 2)
    return top - d * d * (c - u) ** 2 * (a / (c - b) / 2) if u <= c else top


@row(
    _hampel,
    ulps=(3.5, 1.5, 0.7),
    kinks=KNOTS,
    cases=({"knots": KNOTS}, {"knots": (2.0, 2.0, 2.75)}),
    case_ulps=((3.5, 1.5, 0.7), (2.0, 0.6, 1.8)),
)
def hampel(xp, a, d, knots=KNOTS):
    k, b, c = knots
    x = xp.minimum(a / d, c)
    top = k * ((b + c - k) / 2 - (c - x) ** 2 / (c - b) / 2)
    value = xp.where(x <= k, x * x / 2, xp.where(x <= b, k * (x - k / 2), top))
    slope = xp.where(x <= k, x, xp.where(x <= b, k, k * (c - x) / (c - b)))
    falling = (a / d > b) & (a / d <= c)
    bend = xp.where(x <= k, 1.0, xp.where(falling, -k / (c - b), 0.0))
    terms = xp.where((a / d > b) & (a / d < 1.001 * c), k * c / (c - b), 0.0)
    return d * (d * value), d * slope, bend, d * terms, 0 * a


@row(
    lambda r, d: r * r / 2 if abs(r) <= d else d * d / 2,
    ulps=(0.5, 0.5, 0.5),
    all_ulps=(0.51, 0.5, 0.5),
    kinks=(1.0,),
)
def talwar(xp, a, d):
    return xp.minimum(a, d) ** 2 / 2, xp.where(a <= d, a, 0), xp.where(a <= d, 1.0, 0.0)


ROWS["quantile"] = replace(
    absolute_error,
    parameters=("q",),
    side_factor=1,
    cases=({"q": 0.5}, {"q": 0.875}),
    all_ulps=(0.51, 0.5, 0.5),
)
ROWS["expectile"] = replace(
    squared_error,
    parameters=("q",),
    side_factor=1,
    cases=({"q": 0.25},),
    ulps=(1.5, 0.5, 0.5),
    all_ulps=(1.5, 0.51, 0.5),
    unit=True,
)
ROWS["quantile_huber"] = replace(
    huber, parameters=("q", "delta"), side_factor=2, cases=({"q": 0.875},), ulps=(1.8, 0.51, 0.5)
)


def _general(r: Series, alpha: Series, d: Series) -> Series:
    """The general loss; at alpha = 2, the derivatives in alpha are infinite and left out."""
    z = (r / d) ** 2
    if mp.isinf(alpha.value):
        sign = mp.sign(alpha.value)
        return d * d * sign * expm1(sign * z / 2)
    if alpha.value == 2:
        return r * r / 2
    b = (alpha - 2) * mp.sign(alpha.value - 2)
    logarithm = log(1 + z / b)
    return d * d * b * logarithm / 2 * expm1_ratio(alpha * logarithm / 2)


@row(_general, parameters=("alpha", "delta"), cases=({"alpha": -1.5},), ulps=(5.0, 5.0, 8.0))
def general(xp, a, alpha, d):
    b = abs(alpha - 2)
    z = (a / d) ** 2 / b
    power = xp.exp((alpha / 2 - 1) * xp.log1p(z))
    bend, terms = ((1 + times * z) * power / (1 + z) for times in (alpha - 1, abs(alpha - 1)))
    value = d * (d * (b / alpha) * xp.expm1(alpha / 2 * xp.log1p(z)))
    return value, a * power, bend, 0 * a, terms


# The likelihoods, which are not 0 at 0. `tests/test_adaptive.py` integrates them.


def _gaussian(r: Series, s: Series) -> Series:
    return (r / s) ** 2 / 2 + log(s) + mp.log(2 * mp.pi) / 2


def _laplace(r: Series, s: Series) -> Series:
    return abs(r) / s + log(2 * s)


def _student_t(r: Series, df: Series, s: Series) -> Series:
    if mp.isinf(df.value):
        return _gaussian(r, s)
    distance = (df + 1) / 2 * log(1 + (r / s) ** 2 / df)
    return distance + log(s) + df.compose(_student_t_normaliser(df.value))


@cache
def _student_t_normaliser(df: mpf) -> list[mpf]:
    """Taylor coefficients of log(df) / 2 + log B(df / 2, 1 / 2)."""
    with mp.workdps(80):
        x, half = df / 2, mpf(1) / 2
        value = mp.log(df) / 2 + mp.loggamma(x) + mp.loggamma(half) - mp.loggamma(x + half)
        slopes = [
            -((-1) ** k) / (2 * k * df**k)
            + (mp.psi(k - 1, x) - mp.psi(k - 1, x + half)) / (mpf(2) ** k * math.factorial(k))
            for k in range(1, ORDER + 1)
        ]
        return [value, *slopes]


def _general_nll(r: Series, alpha: Series, s: Series) -> Series:
    unit_scale = 0 * s + 1
    distance = _general(r / s, alpha, unit_scale)
    return distance + log(s) + alpha.compose(_log_partition(alpha.value))


@cache
def _log_partition(alpha: mpf) -> list[mpf]:
    """Taylor coefficients of the log of the integral of exp(-general(u)) over all u.

    The trapezoidal rule in v, with u = sqrt(b) sinh(v), converges geometrically.
    """
    with mp.workdps(45):
        b = abs(2 - alpha) or mpf(1)
        step = mpf(1) / 16
        small = alpha < mpf("1e-3")  # the density then falls like a power
        end = 115 if small else mp.log(1 + alpha * 200 / b) / alpha + mp.log(4 + 100 * mp.sqrt(b))
        (a,) = variables(alpha)
        total = 0 * a
        for k in range(int(end / step)):
            u = mp.sqrt(b) * mp.sinh(k * step)
            weight = mp.sqrt(b) * mp.cosh(k * step) * step * (2 if k else 1)
            total += exp(-_general(0 * a + u, a, 0 * a + 1)) * weight
        return log(total).coefficients


ROWS["gaussian_nll"] = Row(_gaussian, parameters=("scale",))
ROWS["laplace_nll"] = Row(_laplace, parameters=("scale",))
ROWS["student_t_nll"] = Row(_student_t, parameters=("df", "scale"), cases=({"df": 3.0},))
ROWS["general_nll"] = Row(
    _general_nll,
    parameters=("alpha", "scale"),
    cases=({"alpha": 1.25},),
    # Few, as each has an integral of its own.
    choices={"alpha": (0, 1e-6, 1e-3, 0.1, 0.5, 0.75, 1, 1.25, 1.5, 1.9, 1.99, 1.9999)},
)


def derivatives(name: str, *point: float) -> dict[tuple[int, ...], tuple[mpf, mpf]]:
    """By arguments: each first and second derivative, and r times its own derivative in r."""
    with mp.workdps(DIGITS):
        numbers = [mpf(x) for x in point]
        series = ROWS[name].formula(*variables(*numbers))
        found = {}
        for order in (1, 2):
            for arguments in itertools.combinations_with_replacement(range(len(point)), order):
                orders = [arguments.count(k) for k in range(len(point))]
                value = series.derivative(tuple(orders))
                orders[0] += 1
                found[arguments] = value, numbers[0] * series.derivative(tuple(orders))
        if name == "general" and numbers[1] == 2:
            infinite, r = mp.inf * abs(mp.sign(numbers[0])), numbers[0]
            found[1,] = infinite, mpf(0)
            found[0, 1] = mp.sign(r) * infinite, mpf(0)
            found[1, 1] = mp.nan, mpf(0)  # no number is promised
            found[1, 2] = -r * r / numbers[2] / 2, -r * r / numbers[2]
        return found
