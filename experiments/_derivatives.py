"""The errors of all first and second derivatives of a loss, in the residual and its parameters.

The unit is one in the last place of the larger of |F| and |r dF/dr|, F being the derivative: half
a unit of the second is what rounding the residual does to F, whatever the formula. The truth is
mpmath's (`_truth`), at seeded points over 60 orders of magnitude.
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

Of = tuple[int, ...]


class Off(NamedTuple):
    """How far off one derivative is at one point."""

    ulp: float
    of: Of
    """The arguments it is taken in; 0 is the residual."""
    at: tuple[float, ...]
    got: float
    true: float


def sample(name: str, dtype: Any, many: int, seed: int = 0) -> list[np.ndarray]:
    """Residuals and parameters: everywhere, and more of them where a loss bends."""
    random, row = np.random.default_rng(seed), ROWS[name]

    def spread(low: float, high: float) -> np.ndarray:
        return 10.0 ** random.uniform(low, high, many)

    def one_of(*choices: np.ndarray) -> np.ndarray:
        return np.choose(random.integers(0, len(choices), many), choices)

    sign = random.choice([-1.0, 1.0], many)
    u = sign * one_of(spread(-30, 30), spread(-6, 6), spread(-1.5, 1.5), spread(-1.5, 1.5))
    columns = {
        "delta": one_of(spread(-18, 18), spread(-2, 2)),
        "q": random.uniform(0.01, 0.99, many),
        "df": one_of(spread(-2, 7), spread(0.7, 1.8)),
        "alpha": one_of(
            -spread(-6, 3),
            random.uniform(-3, 2, many),
            2 - spread(-7, 0),
            1 + sign * spread(-8, -0.4),
            spread(-8, 0),
            random.choice([-np.inf, -1000, -2, -1, 0, 0.5, 1, 1.5, 2, 3, np.inf], many),
        ),
    }
    columns["scale"] = columns["delta"]
    for parameter, choices in (row.choices or {}).items():
        columns[parameter] = random.choice(choices, many)
    scaled = {"delta", "scale"} & set(row.parameters)
    with np.errstate(over="ignore"):
        point = [(u * columns["delta"] if scaled else u).astype(dtype)]
        point += [columns[parameter].astype(dtype) for parameter in row.parameters]
    kept = np.isfinite(point[0]) & (np.abs(point[0]) >= np.finfo(dtype).tiny)
    for kink in row.kinks:  # a knot is a rounded number: next to it either side is right
        away = np.abs(np.abs(point[0].astype(float)) / kink / point[-1].astype(float) - 1)
        kept &= away > 8 * np.finfo(dtype).eps
    return [x[kept] for x in point]


def computed(name: str, point: Sequence[Any], every_order: bool = False) -> dict[Of, Array]:
    """The library's first and second derivatives; those of two arguments in both orders, too."""
    parameters = ROWS[name].parameters

    def loss(r: Array, *given: Array) -> Array:
        return rl.LOSSES[name](r, **dict(zip(parameters, given, strict=True)))

    arguments = range(len(parameters) + 1)
    pairs = itertools.combinations_with_replacement(arguments, 2)
    of = [(i,) for i in arguments]
    of += itertools.product(arguments, repeat=2) if every_order else pairs

    def all_of_them(*x: Array) -> list[Array]:
        found = []
        for arguments in of:
            f = loss
            for i in arguments:
                f = jax.grad(f, i)
            found.append(f(*x))
        return found

    found = jax.device_get(jax.jit(jax.vmap(all_of_them))(*point))
    return dict(zip(of, found, strict=True))


def errors(
    name: str,
    dtype: Any,
    many: int,
    seed: int = 0,
    *,
    every_order: bool = False,
    also: Sequence[tuple[float, ...]] = (),
) -> Iterator[Off]:
    """Of each derivative at each point of a sample, and at what other points are given."""
    with jax.enable_x64(dtype == np.float64):
        point = sample(name, dtype, many, seed)
        if also:
            more = np.array(also, dtype).T
            point = [np.concatenate(both) for both in zip(point, more, strict=True)]
        found = computed(name, point, every_order)
    for k, numbers in enumerate(zip(*point, strict=True)):
        at = tuple(map(float, numbers))
        truth = derivatives(name, *at)
        for of, got in found.items():
            true, change = truth[tuple(sorted(of))]
            ulp = off_by(float(got[k]), true, change, dtype)
            if name == "general" and at[1] > 2 and np.isfinite(ulp):
                ulp = 0.0  # of these, only that nothing is falsely NaN or infinite is promised
            yield Off(ulp, of, at, float(got[k]), float(true))


def worst(name: str, dtype: Any, many: int, seed: int = 0) -> Off:
    """The largest of the errors."""
    return max(errors(name, dtype, many, seed), key=lambda off: off.ulp)


def off_by(got: float, true: mpf, change: mpf, dtype: Any) -> float:
    """The error in units; infinite where it is a NaN, or over- or underflows on its own."""
    info = np.finfo(dtype)
    if mp.isnan(true):
        return 0.0
    top, tiny = mpf(2) ** int(info.maxexp), 2 * mpf(float(info.tiny))
    if math.isnan(got):
        return math.inf
    size = max(abs(true), abs(change))
    if size < tiny or (abs(true) < tiny and abs(got) < tiny):  # XLA flushes what is subnormal
        return 0.0 if abs(got) <= 1.000001 * tiny else math.inf
    value = mp.sign(got) * top if math.isinf(got) else mpf(got)
    if size >= top or mp.isinf(true):
        size, true = top / 2, max(min(true, top), -top)
    unit = mpf(2) ** (int(mp.frexp(size)[1]) - 1 - int(info.nmant))
    ulp = float(abs(value - true) / unit)
    return math.inf if math.isinf(got) and ulp > 1e3 else ulp
