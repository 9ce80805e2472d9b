"""The textbook formulas of the losses in mpmath, with all derivatives to third order.

A `Series` is a Taylor series in several variables, truncated after the third order. A formula
that takes numbers also takes series, and then gives exact derivatives without finite differences.
The arithmetic has `DIGITS` digits, enough to survive the cancellation in the formulas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
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


# The losses as functions of the residual and their parameters.


def _absolute(r: Series) -> Series:
    return r * (-1 if r.value < 0 else 1)


def _huber(r: Series, d: Series) -> Series:
    a = _absolute(r)
    return a * a / 2 if a.value <= d.value else d * (a - d / 2)


def _side(r: Series, q: Series) -> Series:
    return 1 - q if r.value > 0 else q


def _log_cosh(r: Series, d: Series) -> Series:
    u = _absolute(r) / d
    return d * d * (u - mp.log(2) + log(1 + exp(-2 * u)))


def _fair(r: Series, d: Series) -> Series:
    u = _absolute(r) / d
    return d * d * (u - log(1 + u))


def _epsilon_insensitive(r: Series, d: Series) -> Series:
    a = _absolute(r)
    return a - d if a.value > d.value else 0 * a


def _geman_mcclure(r: Series, d: Series) -> Series:
    return r * r / 2 / (1 + (r / d) ** 2)


def _tukey(r: Series, d: Series) -> Series:
    inside = abs(r.value) <= d.value
    return d * d / 6 * (1 - (1 - (r / d) ** 2) ** 3 if inside else 1)


def _andrews(r: Series, d: Series) -> Series:
    return d * d * (1 - cos(r / d) if abs(r.value) < mp.pi * d.value else 2)


def _hampel(r: Series, d: Series) -> Series:
    a, b, c = mpf("1.5"), mpf("3.5"), mpf(8)
    u = _absolute(r) / d
    if u.value <= a:
        return r * r / 2
    if u.value <= b:
        return d * d * a * (u - a / 2)
    top = d * d * (a * (b + c - a) / 2)
    return top - d * d * (c - u) ** 2 * (a / (c - b) / 2) if u.value <= c else top


def _talwar(r: Series, d: Series) -> Series:
    return r * r / 2 if abs(r.value) <= d.value else d * d / 2


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


def _gaussian(r: Series, s: Series) -> Series:
    return (r / s) ** 2 / 2 + log(s) + mp.log(2 * mp.pi) / 2


def _laplace(r: Series, s: Series) -> Series:
    return _absolute(r) / s + log(2 * s)


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


FORMULAS: dict[str, tuple[Callable[..., Series], tuple[str, ...]]] = {
    "squared_error": (lambda r: r * r, ()),
    "absolute_error": (_absolute, ()),
    "huber": (_huber, ("delta",)),
    "log_cosh": (_log_cosh, ("delta",)),
    "pseudo_huber": (lambda r, d: d * d * (sqrt(1 + (r / d) ** 2) - 1), ("delta",)),
    "fair": (_fair, ("delta",)),
    "epsilon_insensitive": (_epsilon_insensitive, ("delta",)),
    "cauchy": (lambda r, d: d * d / 2 * log(1 + (r / d) ** 2), ("delta",)),
    "geman_mcclure": (_geman_mcclure, ("delta",)),
    "welsch": (lambda r, d: d * d / -2 * expm1(-((r / d) ** 2)), ("delta",)),
    "tukey": (_tukey, ("delta",)),
    "andrews": (_andrews, ("delta",)),
    "hampel": (_hampel, ("delta",)),
    "talwar": (_talwar, ("delta",)),
    "quantile": (lambda r, q: _side(r, q) * _absolute(r), ("q",)),
    "expectile": (lambda r, q: _side(r, q) * r * r, ("q",)),
    "quantile_huber": (lambda r, q, d: 2 * _side(r, q) * _huber(r, d), ("q", "delta")),
    "general": (_general, ("alpha", "delta")),
    "gaussian_nll": (_gaussian, ("scale",)),
    "laplace_nll": (_laplace, ("scale",)),
    "student_t_nll": (_student_t, ("df", "scale")),
    "general_nll": (_general_nll, ("alpha", "scale")),
}
"""The formula of each loss in `rl.LOSSES`, and the parameters that follow the residual."""

KINKS = {
    "huber": (1.0,),
    "epsilon_insensitive": (1.0,),
    "quantile_huber": (1.0,),
    "talwar": (1.0,),
    "tukey": (1.0,),
    "hampel": (1.5, 3.5, 8.0),
    "andrews": (math.pi,),
}
"""The values of |r| / delta at which a first or second derivative jumps."""


def derivatives(name: str, *point: float) -> dict[tuple[int, ...], tuple[mpf, mpf]]:
    """By arguments: each first and second derivative, and r times its own derivative in r."""
    formula, _ = FORMULAS[name]
    with mp.workdps(DIGITS):
        numbers = [mpf(x) for x in point]
        series = formula(*variables(*numbers))
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
