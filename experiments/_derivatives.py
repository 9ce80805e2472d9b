"""The errors of all first and second derivatives of a loss, in the residual and its parameters.

The unit of error is one in the last place of the larger of |F| and |r dF/dr|, where F is the
derivative: rounding the residual alone changes F by half a unit of |r dF/dr|, whatever the formula.
The reference is mpmath (`_truth`), at seeded points over 60 orders of magnitude.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from mpmath import mp, mpf

import robustloss as rl
from experiments._truth import ROWS, derivatives

Arguments = tuple[int, ...]


class DerivativeError(NamedTuple):
    """The error of one derivative at one point."""

    ulp: float
    arguments: Arguments
    """The arguments of the derivative; 0 is the residual."""
    point: tuple[float, ...]
    computed: float
    true: float


def sample(name: str, dtype: Any, count: int, seed: int = 0) -> list[np.ndarray]:
    """Residuals and parameters over the whole range, most of them where a loss bends."""
    random, row = np.random.default_rng(seed), ROWS[name]

    def spread(low: float, high: float) -> np.ndarray:
        return 10.0 ** random.uniform(low, high, count)

    def choose(*choices: np.ndarray) -> np.ndarray:
        return np.choose(random.integers(0, len(choices), count), choices)

    sign = random.choice([-1.0, 1.0], count)
    u = sign * choose(spread(-30, 30), spread(-6, 6), spread(-1.5, 1.5), spread(-1.5, 1.5))
    columns = {
        "delta": choose(spread(-18, 18), spread(-2, 2)),
        "q": random.uniform(0.01, 0.99, count),
        "df": choose(spread(-2, 7), spread(0.7, 1.8)),
        "alpha": choose(
            -spread(-6, 3),
            random.uniform(-3, 2, count),
            2 - spread(-7, 0),
            1 + sign * spread(-8, -0.4),
            spread(-8, 0),
            random.choice([-np.inf, -1000, -2, -1, 0, 0.5, 1, 1.5, 2, 3, np.inf], count),
        ),
    }
    columns["scale"] = columns["delta"]
    for parameter, choices in (row.choices or {}).items():
        columns[parameter] = random.choice(choices, count)
    scaled = {"delta", "scale"} & set(row.parameters)
    with np.errstate(over="ignore"):
        point = [(u * columns["delta"] if scaled else u).astype(dtype)]
        point += [columns[parameter].astype(dtype) for parameter in row.parameters]
    kept = np.isfinite(point[0]) & (np.abs(point[0]) >= np.finfo(dtype).tiny)
    for kink in row.kinks:  # a knot is rounded: beside the knot, both sides are right
        distance = np.abs(np.abs(point[0].astype(float)) / kink / point[-1].astype(float) - 1)
        kept &= distance > 8 * np.finfo(dtype).eps
    return [x[kept] for x in point]


def computed(name: str, point: Sequence[Any], every_order: bool = False) -> dict[Arguments, Array]:
    """The library's first and second derivatives, in each order of the arguments if asked."""
    parameters = ROWS[name].parameters

    def loss(r: Array, *values: Array) -> Array:
        return rl.LOSSES[name](r, **dict(zip(parameters, values, strict=True)))

    indices = range(len(parameters) + 1)
    pairs = itertools.combinations_with_replacement(indices, 2)
    orders: list[Arguments] = [(i,) for i in indices]
    orders += itertools.product(indices, repeat=2) if every_order else pairs

    def differentiate(*x: Array) -> list[Array]:
        found = []
        for arguments in orders:
            f = loss
            for i in arguments:
                f = jax.grad(f, i)
            found.append(f(*x))
        return found

    found = jax.device_get(jax.jit(jax.vmap(differentiate))(*point))
    return dict(zip(orders, found, strict=True))


def errors(
    name: str,
    dtype: Any,
    count: int,
    seed: int = 0,
    *,
    every_order: bool = False,
    also: Sequence[tuple[float, ...]] = (),
) -> Iterator[DerivativeError]:
    """The error of each derivative at each point of a sample and at the points in `also`."""
    with jax.enable_x64(dtype == np.float64):
        point = sample(name, dtype, count, seed)
        if also:
            extra = np.array(also, dtype).T
            point = [np.concatenate(pair) for pair in zip(point, extra, strict=True)]
        found = computed(name, point, every_order)
    for k, entries in enumerate(zip(*point, strict=True)):
        numbers = tuple(map(float, entries))
        truth = derivatives(name, *numbers)
        for arguments, values in found.items():
            true, change = truth[tuple(sorted(arguments))]
            value = float(values[k])
            ulp = off_by(value, true, change, dtype)
            if name == "general" and numbers[1] > 2 and np.isfinite(ulp):
                ulp = 0.0  # the promise for alpha > 2 is only that no NaN or infinity is false
            yield DerivativeError(ulp, arguments, numbers, value, float(true))


def find_worst_error(name: str, dtype: Any, count: int, seed: int = 0) -> DerivativeError:
    """The largest of the errors."""
    return max(errors(name, dtype, count, seed), key=lambda error: error.ulp)


def off_by(got: float, true: mpf, change: mpf, dtype: Any) -> float:
    """The error in units; infinite for a false NaN, overflow or underflow."""
    info = np.finfo(dtype)
    if mp.isnan(true):
        return 0.0
    top, tiny = mpf(2) ** int(info.maxexp), 2 * mpf(float(info.tiny))
    if math.isnan(got):
        return math.inf
    size = max(abs(true), abs(change))
    if size < tiny or (abs(true) < tiny and abs(got) < tiny):  # XLA flushes subnormal numbers
        return 0.0 if abs(got) <= 1.000001 * tiny else math.inf
    value = mp.sign(got) * top if math.isinf(got) else mpf(got)
    if size >= top or mp.isinf(true):
        size, true = top / 2, max(min(true, top), -top)
    unit = mpf(2) ** (int(mp.frexp(size)[1]) - 1 - int(info.nmant))
    ulp = float(abs(value - true) / unit)
    return math.inf if math.isinf(got) and ulp > 1e3 else ulp
