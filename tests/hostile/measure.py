"""Fits of many hostile sets, in batches of one shape, and what their certificates say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np

import robustloss as rl

from . import certificates as certify
from .sets import KINDS, SOUND, Set, made


@dataclass(frozen=True)
class Way:
    """A loss, how it is fitted, and what has to hold then."""

    loss: str
    method: str
    tuning: float | None = None
    scale: str = "mad"
    """a name, or "given": half of the spread of y"""
    level: bool = False
    """whether the loss has a `q`"""

    @property
    def name(self) -> str:
        scale = "" if self.method != "irls" else f", {self.scale}"
        return f"{self.loss}, {self.method}{scale}"

    def fit(self, X, y, keep, w, q, given, intercept: bool) -> rl.LinearFit:
        loss = rl.LOSSES[self.loss]
        loss = partial(loss, q=q) if self.level else loss
        settings: dict[str, Any] = {"tuning": self.tuning} if self.tuning else {}
        if self.method == "irls":
            settings["scale"] = given if self.scale == "given" else self.scale
        return rl.fit_linear(
            X, y, loss, method=self.method, intercept=intercept, where=keep, weights=w, **settings
        )


WAYS = (
    Way("huber", "irls", 1.345),
    Way("huber", "irls", 1.345, "proposal2"),
    Way("huber", "irls", 1.345, "given"),
    Way("log_cosh", "irls", 1.205),
    Way("pseudo_huber", "irls", 1.287),
    Way("fair", "irls", 1.4, "proposal2"),
    Way("quantile_huber", "irls", 1.345, level=True),
    Way("expectile", "irls", level=True),
    Way("squared_error", "irls"),
    Way("cauchy", "irls", 2.385),
    Way("tukey", "irls", 4.685),
    Way("welsch", "irls", 2.985, "proposal2"),
    Way("tukey", "mm", 4.685),
    Way("welsch", "mm", 2.985),
    Way("cauchy", "mm", 2.385),
    Way("absolute_error", "interior_point"),
    Way("quantile", "interior_point", level=True),
)
SMALL = ((12, 2, True), (9, 3, False), (12, 1, True), (10, 2, False))
LARGE = ((40, 3, True), (200, 5, True), (60, 4, False), (30, 1, True), (100, 2, True))
BATCH = 80  # sets in a program, so that what is compiled serves all
LEVELS = (0.05, 0.25, 0.5, 0.9)


class Cell(NamedTuple):
    """What is compiled once: a way, the rows there is room for, the columns."""

    way: Way
    rows: int
    columns: int
    intercept: bool
    weighted: bool
    dtype: type


class Fit(NamedTuple):
    """A set and what was found for it."""

    set: Set
    cell: Cell
    q: float
    given: float
    found: rl.LinearFit

    @property
    def way(self) -> Way:
        return self.cell.way

    @property
    def intercept(self) -> bool:
        return self.cell.intercept

    @property
    def flagged(self) -> bool:
        """Whether it says itself that something is wrong."""
        return not (self.found.converged and self.found.unique)


class Broken(NamedTuple):
    """A law that a fit said to have converged does not obey."""

    law: str
    by: float


def fitted(cell: Cell, sets: list[Set], levels: list[float] | float = 0.5) -> list[Fit]:
    """All sets in compiled batches: rows short of what there is room for are dropped, and NaN."""
    levels = levels if isinstance(levels, list) else [levels] * len(sets)
    if len(sets) > BATCH:
        rest = fitted(cell, sets[BATCH:], levels[BATCH:])
        return fitted(cell, sets[:BATCH], levels[:BATCH]) + rest
    dtype, count = np.dtype(cell.dtype), BATCH
    every = [sets[min(i, len(sets) - 1)] for i in range(count)]
    X = np.full((count, cell.rows, cell.columns), np.nan, dtype)
    y, w = np.full(X.shape[:2], np.nan, dtype), np.ones(X.shape[:2], dtype)
    keep = np.zeros(y.shape, bool)
    for i, one in enumerate(every):
        rows = len(one.y)
        X[i, :rows], y[i, :rows], keep[i, :rows] = one.X, one.y, True
        w[i, :rows] = 1 if one.w is None else one.w
    given = [half_the_spread(one) for one in every]
    levels = [levels[min(i, len(levels) - 1)] for i in range(count)]
    way, intercept, weighted = cell.way, cell.intercept, cell.weighted
    batch = _batched(way, intercept, weighted)
    with jax.enable_x64(dtype == np.float64):
        arrays = X, y, keep, w if weighted else None
        found = batch(*arrays, np.array(levels, dtype), np.array(given, dtype))
        found = jax.tree.map(np.asarray, found)
    fits = []
    for i, (one, q) in enumerate(zip(sets, levels[: len(sets)], strict=True)):
        rows = len(one.y)
        here = jax.tree.map(lambda x, i=i: x[i], found)
        here = replace(here, residuals=here.residuals[:rows], weights=here.weights[:rows])
        fits.append(Fit(one, cell, q, float(dtype.type(given[i])), here))
    return fits


def half_the_spread(of: Set) -> float:
    """A scale to give, in the units of y."""
    size = float(certify.size_of(of.y.astype(np.longdouble)))
    return 0.5 * size if size > 0 else 1.0


def alone(cell: Cell, of: Set, q: float = 0.5) -> Fit:
    """One set as a user fits it: no batch, no rows that are dropped."""
    dtype = np.dtype(cell.dtype)
    given = float(dtype.type(half_the_spread(of)))
    w = (np.ones_like(of.y) if of.w is None else of.w) if cell.weighted else None
    with jax.enable_x64(dtype == np.float64):
        found = cell.way.fit(of.X, of.y, None, w, q, given, cell.intercept)
        return Fit(of, cell, q, given, jax.tree.map(np.asarray, found))


def _batched(way: Way, intercept: bool, weighted: bool):
    key = way, intercept, weighted
    if key not in _PROGRAMS:
        axes = (0, 0, 0, 0 if weighted else None, 0, 0)
        _PROGRAMS[key] = jax.jit(jax.vmap(partial(way.fit, intercept=intercept), axes))
    return _PROGRAMS[key]


_PROGRAMS: dict[Any, Any] = {}


def broken(fit: Fit) -> list[Broken]:
    """The laws that a fit does not obey; none are asked of one that says it did not converge."""
    found = fit.found
    if not found.converged:
        return []
    numbers = np.r_[found.coefficients, found.intercept, found.scale]
    if not np.all(np.isfinite(numbers)):
        return [Broken("a converged fit is finite", np.inf)]
    if found.scale < 0:
        return [Broken("a scale is not negative", float(found.scale))]
    of = certify.problem(fit.set.X, fit.set.y, fit.set.w, fit.intercept)
    at = certify.evidence(of, found.coefficients, found.intercept)
    laws = [*_laws(fit, of, at), *_errors(fit, of, at)]
    claimed = found.residuals[counted(fit)]
    slack = at.noise + certify.SLACK[of.dtype] * float(found.scale)
    off = np.max(np.abs(at.e - claimed) / np.where(slack > 0, slack, np.finfo(slack.dtype).tiny))
    if off > 1:
        laws.append(Broken("residuals are y - predict(X)", float(off)))
    if float(found.scale) == 0 and not certify.fitted(of, at):
        laws.append(Broken("scale 0 without half of the rows fitted", 1.0))
    return laws


def counted(fit: Fit) -> np.ndarray:
    """The rows with a weight."""
    return np.ones(len(fit.set.y), bool) if fit.set.w is None else fit.set.w > 0


def _errors(fit: Fit, of: certify.Problem, at: certify.Evidence) -> Iterator[Broken]:
    found = fit.found
    with np.errstate(all="ignore"):
        errors = np.sqrt(np.diag(found.covariance))
    count = np.sum(of.w) ** 2 / np.sum(of.w**2)
    told = bool(found.unique) and found.scale > 0 and count > len(errors) + 1
    met = np.sum(of.w[np.abs(at.e) > at.noise]) < 1e-3 * np.sum(of.w)
    if told and not met and not np.all(np.isfinite(errors) & (errors > 0)):
        yield Broken("standard errors are numbers > 0", np.inf)


def _laws(fit: Fit, of: certify.Problem, at: certify.Evidence) -> Iterator[Broken]:
    way, scale = fit.way, float(fit.found.scale)
    yield from _of_vertex(fit, of, at) if way.method == "interior_point" else _of_psi(fit, of, at)
    if way.method == "mm":
        yield from _of_s(fit, of, at, scale)
    elif way.scale == "given":
        if not np.isclose(scale, fit.given, rtol=1e-6, atol=0):
            yield Broken("a scale that is given is returned", scale)
    elif scale > 0 and way.scale == "proposal2":
        k = len(fit.found.coefficients) + fit.intercept
        rank = (k,) if fit.found.unique else tuple(range(1, k + 1))
        off = certify.proposal2(of, at, scale, rank)
        if off > 1:
            yield Broken("scale is proposal 2's", off)
    elif scale > 0:
        off = certify.mad(of, at, scale)
        if off > 1:
            yield Broken("scale is the MAD", off)


def _of_vertex(fit: Fit, of: certify.Problem, at: certify.Evidence) -> Iterator[Broken]:
    claimed = fit.found.residuals[counted(fit)] == 0
    inside, full = certify.vertex(of, at, fit.q if fit.way.level else 0.5, claimed)
    loose = 1e-7 if of.dtype == np.dtype("f8") else 1e-3
    if inside < -loose:
        yield Broken("optimum of the quantile loss", -inside)
    elif fit.found.unique and (not full or abs(inside) < 0.01 * loose):
        yield Broken("unique, but other coefficients serve as well", inside)


def _of_psi(fit: Fit, of: certify.Problem, at: certify.Evidence) -> Iterator[Broken]:
    way = fit.way
    scale = fit.given if way.scale == "given" else float(fit.found.scale)
    width = np.longdouble(scale) * (way.tuning or 1)
    if width > 0 or way.tuning is None:
        psi = partial(certify.PSI[way.loss], d=width)
        psi = partial(psi, q=np.longdouble(fit.q)) if way.level else psi
        off = certify.equations(of, at, psi)
        if off > 1:
            yield Broken("sum w psi x = 0", off)


def _of_s(fit: Fit, of: certify.Problem, at: certify.Evidence, scale: float) -> Iterator[Broken]:
    loss = fit.way.loss if fit.way.loss in certify.RHO else "tukey"
    if not fit.found.unique:
        return
    # The fit says that it is unique, so that it counted all columns, be they nearly dependent.
    k = of.X.shape[1] + of.intercept
    count = float(np.sum(of.w) ** 2 / np.sum(of.w**2))
    share = max(0.5 * (1 - k / count), 0.5 / count)
    slack = 1e-3
    if scale == 0:
        # 0 where no more rows than the breakdown point allows are off the fit.
        off = np.sum(of.w[np.abs(at.e) > at.noise]) / np.sum(of.w)
        if off > share * (1 + 1e-9):
            yield Broken("S-scale 0 with too few rows on the fit", off)
        return
    here = certify.m_scale(np.abs(at.e) + at.noise, of.w, loss, share)
    if scale > here * (1 + slack):
        yield Broken("S-scale is at most the M-scale of the fit", scale / here - 1)
    elif len(of.y) <= 12 and k <= 3 and k == at.Q.shape[1]:
        least = certify.s_scale(of, at, loss)
        rounding = float(np.median(at.noise))
        if scale > least * (1 + slack) + rounding:
            yield Broken("S-scale is the least", scale / max(least, 1e-300) - 1)


class Count(NamedTuple):
    """Of all fits of one kind and way."""

    sets: Counter
    converged: Counter
    flagged: Counter
    violations: Counter
    """converged and unique, it says, but breaking a law"""
    warned: Counter
    """breaking a law, converged, but said not to be unique"""
    worst: dict[str, list[tuple[float, Fit]]]


def cells(ways: Iterable[Way] = WAYS) -> list[Cell]:
    """Each way in each dtype at two shapes, one of them with weights."""
    every = []
    for i, (way, dtype) in enumerate(product(WAYS, (np.float64, np.float32))):
        number = i + i // 8  # or one dtype would get every other shape only
        every.append(Cell(way, *SMALL[number % len(SMALL)], i // 2 % 2 == 1, dtype))
        every.append(Cell(way, *LARGE[number % len(LARGE)], i // 2 % 2 == 0, dtype))
    return [cell for cell in every if cell.way in ways]


def batches(total: int, seed: int, chosen: Iterable[Cell]) -> Iterator[list[Fit]]:
    """`total` sets or a few more, as many in each cell, of all kinds in turn."""
    chosen = list(chosen)
    each = -(-total // len(chosen))
    every = cells()
    for cell in chosen:
        number = every.index(cell) if cell in every else 0  # so that no two have the same sets
        weighty = ("weights", "mixed")
        kinds = list(KINDS) if cell.weighted else [kind for kind in KINDS if kind != "weights"]
        sets = []
        for i in range(each):
            kind = kinds[(number + i) % len(kinds)]
            one = made(kind, seed + 1000 * number + i, cell.rows, cell.columns, cell.dtype)
            keeps = cell.weighted and (kind in weighty or i % 2 == 0)
            sets.append(one if keeps else one._replace(w=None))
        levels = [LEVELS[i % len(LEVELS)] for i in range(each)]
        for some in range(0, each, BATCH):
            part = slice(some, some + BATCH)
            yield fitted(cell, sets[part], levels[part])


def measure(fits: Iterable[list[Fit]], report=None) -> Count:
    """Counts, and the fits that broke a law."""
    count = Count(Counter(), Counter(), Counter(), Counter(), Counter(), {})
    for batch in fits:
        for fit in batch:
            key = fit.set.kind, fit.way.name
            count.sets[key] += 1
            count.converged[key] += bool(fit.found.converged)
            count.flagged[key] += fit.flagged
            laws = broken(fit)
            (count.warned if fit.flagged else count.violations)[key] += bool(laws)
            for law, by in laws:
                name = f"{law} (not unique, it says)" if fit.flagged else law
                count.worst.setdefault(name, []).append((by, fit))
                if report is not None:
                    report(fit, law, by)
    return count


def added(one: Count, other: Count) -> Count:
    """Counts of both."""
    worst = {law: list(fits) for law, fits in one.worst.items()}
    for law, fits in other.worst.items():
        worst.setdefault(law, []).extend(fits)
    return Count(*(a + b for a, b in zip(one[:5], other[:5], strict=True)), worst)


def forget() -> None:
    """All compiled programs."""
    _PROGRAMS.clear()
    jax.clear_caches()


def table(count: Count) -> str:
    """Sets, converged, flagged and violations for each kind, then for each way."""
    lines = [f"{'':34}{'sets':>8}{'converged':>11}{'flagged':>9}{'violations':>12}{'warned':>8}"]
    for axis in (0, 1):
        names = list(dict.fromkeys(key[axis] for key in count.sets))
        for name in names:
            sums = [
                sum(number for key, number in column.items() if key[axis] == name)
                for column in count[:5]
            ]
            lines.append(f"{name:34}{sums[0]:8}{sums[1]:11}{sums[2]:9}{sums[3]:12}{sums[4]:8}")
        lines.append("")
    sums = [sum(column.values()) for column in count[:5]]
    lines.append(f"{'all':34}{sums[0]:8}{sums[1]:11}{sums[2]:9}{sums[3]:12}{sums[4]:8}")
    lines += [f"{len(fits):6} broke: {law}" for law, fits in count.worst.items()]
    return "\n".join(lines)


def describe(fit: Fit, law: str, by: float) -> str:
    """A fit that broke a law, so that it can be made again."""
    n, p = fit.set.X.shape
    found = fit.found
    return (
        f"made({fit.set.kind!r}, {fit.set.seed}, {fit.cell.rows}, {p}) of {n} rows, "
        f"{fit.set.y.dtype}, weights={fit.set.w is not None}, "
        f"intercept={fit.intercept}, {fit.way.name}, q={fit.q}: {law}: {by:.3g} "
        f"(coefficients {np.asarray(found.coefficients)}, {found.intercept}, scale {found.scale}, "
        f"unique {found.unique}, steps {found.steps})"
    )


__all__ = [
    "LEVELS", "SOUND", "WAYS", "Broken", "Cell", "Count", "Fit", "Way",
    "added", "alone", "batches", "broken", "cells", "describe", "fitted", "forget",
    "measure", "table",
]  # fmt: skip
