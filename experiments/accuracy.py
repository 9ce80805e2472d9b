"""How many digits of a loss, its slope and its curvature are right?

Compares the losses of this library and of optax in float32 with the textbook formula in float64.
The numbers are a dense sample of float32 or all of them (`--exhaustive`), and all of float16 and
bfloat16. The error is in units in the last place (ulp). Where a curve passes through 0 away from
r = 0, the unit is that of the terms whose difference is the curve. Numbers and results below twice
the smallest normal number are left out: XLA on a CPU flushes them to 0.

The column "derivatives" has the worst error of all first and second derivatives F in the residual
and every parameter, in float32 and float64, at the points of a sample. The unit is that of the
larger of |F| and |r dF/dr|.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from rich.console import Console
from rich.table import Table

import robustloss as rl
from experiments import (
    Cache,
    Progress,
    UsageError,
    _results,
    compute_arrays,
    ignore_progress,
    require,
)
from experiments._derivatives import DerivativeError, find_worst_error
from experiments._losses import EXAMPLES, fix_parameters, set_delta
from experiments._truth import ROWS

VIEWS = ("value", "slope", "curvature")
LIMITS = {  # the largest errors that this library promises, in ulp of float32
    name: row.all_ulps or row.ulps for name, row in ROWS.items() if row.ulps
}
HALF_LIMIT = 0.51
DERIVATIVES_LIMIT = 10
OTHERS = {
    "optax.squared_error": ("squared_error", lambda delta: optax.squared_error),
    "optax.huber_loss": ("huber", lambda delta: partial(optax.huber_loss, delta=delta)),
    "optax.log_cosh": ("log_cosh", lambda delta: optax.log_cosh),
}
CHUNK = 2**18  # numbers that fit into a cache
BLOCK = 256  # chunks in one file


@dataclass(frozen=True)
class Config:
    """Settings of `accuracy`."""

    exhaustive: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Every float32 number instead of one in a thousand; an interrupted run can be continued."""
    delta: float = 1.0
    """The `delta` of the losses that have one."""
    others: bool = True
    """The losses of optax too."""
    points: int = 100
    """The number of points, for each loss and precision, for the derivatives."""
    out: Path | None = None
    """The output folder; results/accuracy by default."""


class Worst(NamedTuple):
    """The worst error of one view of one loss."""

    ulp: float = 0.0
    residual: float = 0.0  # of the worst error
    wrong: int = 0  # results that are NaN, have the wrong sign, or falsely over- or underflow


class Result(NamedTuple):
    """The worst errors."""

    numbers: int
    single: dict[str, dict[str, Worst]]
    half: dict[str, dict[str, dict[str, Worst]]]  # by dtype
    derivatives: dict[str, DerivativeError]  # the worst first or second one, by loss


def run(
    config: Config, progress: Progress = ignore_progress, cache: Cache = compute_arrays
) -> Result:
    """Measures every loss."""
    if not 0 < config.delta < np.inf:
        raise UsageError(f"--delta must be a positive number, got {config.delta}.")
    if config.points < 1:
        raise UsageError(f"--points must be >= 1, got {config.points}.")
    stride = 1 if config.exhaustive else 1021
    numbers = -(-(2**32) // stride)
    cases = {name: (name, partial(set_delta, name)) for name in LIMITS}
    cases |= OTHERS if config.others else {}
    chunks = -(-numbers // CHUNK)
    single = {}
    with jax.enable_x64(True), ThreadPoolExecutor(os.cpu_count()) as threads:
        for i, (case, (name, loss)) in enumerate(cases.items()):
            measure = _measure(
                loss(config.delta), _build_truth(name, config.delta), numbers, stride
            )

            def block(first: int, measure: Any = measure) -> dict[str, Any]:
                worst = [Worst()] * len(VIEWS)
                for found in threads.map(measure, range(first, min(first + BLOCK, chunks))):
                    worst = [_merge(w, f) for w, f in zip(worst, found, strict=True)]
                return dict(zip(VIEWS, worst, strict=True))

            single[case] = dict.fromkeys(VIEWS, Worst())
            for first in range(0, chunks, BLOCK):
                progress((i + first / chunks) / len(cases), case)
                found = cache(f"{case}-{first}", partial(block, first))
                single[case] = {
                    view: _merge(worst, Worst(float(ulp), float(residual), int(wrong)))
                    for (view, worst), (ulp, residual, wrong) in zip(
                        single[case].items(), (found[view] for view in VIEWS), strict=True
                    )
                }
        half = {
            dtype.__name__: {
                case: _measure_half(loss(config.delta), _build_truth(name, config.delta), dtype)
                for case, (name, loss) in cases.items()
            }
            for dtype in (jnp.float16, jnp.bfloat16)
        }
    derivatives = {}
    for name in rl.LOSSES:
        progress(1.0, f"{name}, derivatives")
        found = cache(
            f"{name}-derivatives-{config.points}", partial(_measure_derivatives, name, config)
        )
        derivatives[name] = DerivativeError(
            float(found["ulp"]),
            tuple(map(int, found["arguments"])),
            tuple(map(float, found["point"])),
            float(found["computed"]),
            float(found["true"]),
        )
    return Result(numbers, single, half, derivatives)


def _measure_derivatives(name: str, config: Config) -> dict[str, Any]:
    errors = [find_worst_error(name, dtype, config.points) for dtype in (np.float32, np.float64)]
    return max(errors, key=lambda error: error.ulp)._asdict()


def check(result: Result) -> None:
    """Every loss of this library has limits and derivatives, and keeps its limits."""
    measured = {name for name in rl.LOSSES if fix_parameters(name)(0.0) == 0}  # not the likelihoods
    missing = ", ".join(sorted(measured - set(LIMITS)))
    require(not missing, f"experiments/_truth.py has no row with limits for {missing}")
    missing = ", ".join(sorted(set(rl.LOSSES) - set(result.derivatives)))
    require(not missing, f"no derivatives of {missing} were measured")
    for name, limits in LIMITS.items():
        for view, limit in zip(VIEWS, limits, strict=True):
            worst = result.single[name][view]
            require(worst.ulp <= limit, f"{name}, {view}: {worst}")
            require(not worst.wrong, f"{name}, {view}: {worst}")
            for dtype, losses in result.half.items():
                worst = losses[name][view]
                require(worst.ulp <= HALF_LIMIT, f"{name}, {dtype}: {worst}")
                require(not worst.wrong, f"{name}, {dtype}: {worst}")
    for name, error in result.derivatives.items():
        require(error.ulp <= DERIVATIVES_LIMIT, f"{name}, derivatives: {error}")


def show(result: Result, console: Console) -> None:
    """Prints the table."""
    console.print(_tabulate(result))


def findings(result: Result) -> list[str]:
    """The largest errors."""
    worst = max(max(v.ulp for v in result.single[name].values()) for name in LIMITS)
    return [
        f"The error of every loss of this library is at most {worst:.3g} units in the last place "
        f"for {result.numbers:,} float32 numbers, and at most {HALF_LIMIT:g} for all numbers of "
        "the 16-bit types, subnormal numbers excepted. 'wrong' counts results that are NaN, have "
        "the wrong sign, or falsely over- or underflow.",
        "The error of every first and second derivative, in the residual and in the parameters, "
        f"is at most {max(error.ulp for error in result.derivatives.values()):.3g} units at the "
        "points of the sample.",
    ]


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    return {
        "result.json": _results.record(
            config,
            numbers=result.numbers,
            float32=_convert_tables(result.single),
            derivatives={name: error._asdict() for name, error in result.derivatives.items()},
            **{dtype: _convert_tables(losses) for dtype, losses in result.half.items()},
        )
    }


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "accuracy"


def _build_truth(name: str, delta: float) -> Callable[[Array], tuple[Array, ...]]:
    """The textbook in float64: value, slope, curvature, and the terms of slope and curvature."""
    row = ROWS[name]
    given = {"delta": float(np.float32(delta)), **EXAMPLES.get(name, {})}
    parameters = [given[parameter] for parameter in row.parameters]
    return lambda r: row.in_float64(jnp, r, *parameters)


def _list_views(loss: Callable[..., Array]) -> list[Callable[[Array], Array]]:
    return [loss, partial(rl.influence, loss), partial(rl.curvature, loss)]


def _measure(
    loss: Callable[..., Array], truth: Any, numbers: int, stride: int
) -> Callable[[int], list[Worst]]:
    @jax.jit
    def measure(chunk: Array) -> list[tuple[Array, ...]]:
        index = chunk * CHUNK + jnp.arange(CHUNK, dtype=jnp.int64)
        r = jax.lax.bitcast_convert_type((index * stride).astype(jnp.uint32), jnp.float32)
        return _compare(loss, truth, jnp.where(index < numbers, r, 1.0))

    def worst(chunk: int) -> list[Worst]:
        with jax.enable_x64(True):  # each thread has its own setting
            return [Worst(float(u), float(x), int(n)) for u, x, n in measure(jnp.int64(chunk))]

    return worst


def _measure_half(loss: Callable[..., Array], truth: Any, dtype: Any) -> dict[str, Worst]:
    r = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)
    found = jax.jit(partial(_compare, loss, truth))(r)
    worst = [Worst(float(u), float(x), int(n)) for u, x, n in found]
    return dict(zip(VIEWS, worst, strict=True))


def _compare(loss: Callable[..., Array], truth: Any, r: Array) -> list[tuple[Array, ...]]:
    """By view, the worst error in ulp, its residual, and the number of wrong results."""
    smallest = float(jnp.finfo(jnp.float32).smallest_normal)
    wide = r.astype(jnp.float64)
    subnormal = (jnp.abs(wide) < smallest) & (wide != 0)
    r = jnp.where(jnp.isfinite(wide) & ~subnormal, r, 1)
    value, slope, bend, *terms = truth(r.astype(jnp.float64))
    trues = ((value, 0 * value), (slope, terms[0]), (bend, terms[1]))
    found = []
    for view, (true, size) in zip(_list_views(loss), trues, strict=True):
        got, info = view(r), jnp.finfo(r.dtype)
        got = got.astype(jnp.float64)
        unit = jnp.minimum(jnp.maximum(jnp.abs(true), size), float(info.max))
        step = jnp.maximum(_round_down(unit), 2.0**info.minexp) * 2.0**-info.nmant
        overflows = jnp.abs(true) >= float(info.max) + 2.0 ** (info.maxexp - 2 - info.nmant)
        flushed = jnp.abs(true) < 2 * smallest  # the same for float32 and bfloat16
        ulp = jnp.where(flushed | overflows, 0.0, jnp.abs(got - true) / step)
        ulp = jnp.where(jnp.isfinite(ulp), ulp, jnp.inf)
        wrong = jnp.isnan(got) | ((got * true < 0) & (ulp > 1))
        wrong |= flushed & (jnp.abs(got) > jnp.maximum(2 * smallest, float(info.smallest_normal)))
        wrong |= overflows & ~(jnp.abs(got) >= float(info.max))
        worst = jnp.max(ulp)
        residual = jnp.max(r, where=ulp == worst, initial=-jnp.inf)  # a tenth of argmax's time
        found.append((worst, residual.astype(jnp.float64), jnp.sum(wrong)))
    return found


def _round_down(x: Array) -> Array:
    """The largest power of 2 that is at most x; x is 0, or positive and normal."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int64)
    return jax.lax.bitcast_convert_type(bits & (0x7FF << 52), jnp.float64)


def _merge(a: Worst, b: Worst) -> Worst:
    return Worst(*max((a.ulp, a.residual), (b.ulp, b.residual)), a.wrong + b.wrong)


def _convert_tables(losses: dict[str, dict[str, Worst]]) -> dict[str, Any]:
    return {n: {v: w._asdict() for v, w in views.items()} for n, views in losses.items()}


def _tabulate(result: Result) -> Table:
    halves = list(result.half.values())
    table = Table(
        "loss", *[f"{v}, ulp (at r)" for v in VIEWS], "float16", "bfloat16", "wrong", "derivatives"
    )
    for name in {**result.single, **result.derivatives}:
        views = result.single.get(name)
        cells = ["-"] * (len(VIEWS) + 3)
        if views:
            worsts = [w for v in (views, *(losses[name] for losses in halves)) for w in v.values()]
            cells = [f"{views[v].ulp:.3g} ({views[v].residual:.3g})" for v in VIEWS]
            cells += [f"{max(w.ulp for w in losses[name].values()):.3g}" for losses in halves]
            cells += [f"{sum(w.wrong for w in worsts):,}"]
        error = result.derivatives.get(name)
        table.add_row(name, *cells, f"{error.ulp:.3g}" if error else "-")
    return table
