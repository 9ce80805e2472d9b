"""How many digits of a loss, its slope and its curvature are right?

Compares float32 with the textbook formula in float64, in units in the last place (ulp), over
a dense sample of all float32 numbers or over every one (`--exhaustive`), beside the losses of
optax; and all numbers of float16 and of bfloat16. Where a curve passes through 0 away from
r = 0, the unit is that of the terms whose difference it is. Left out are numbers, and results,
below twice the smallest normal number, which XLA on a CPU flushes to 0.

"Derivatives" are all first and second ones, in the residual and every parameter, in float32 and
float64, at points of a sample: the worst, in units of the larger of |F| and |r dF/dr|.
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
from experiments import Keep, Progress, UsageError, _results, compute
from experiments._derivatives import Off
from experiments._derivatives import worst as _worst_derivative
from experiments._losses import EXAMPLES, example, with_delta
from experiments._truth import ROWS

VIEWS = ("value", "slope", "curvature")
LIMITS = {  # what this library promises, in ulp of float32
    name: row.all_ulps or row.ulps for name, row in ROWS.items() if row.ulps
}
DERIVED = tuple(rl.LOSSES)  # whose first and second derivatives are measured, in all parameters
HALF_LIMIT = 0.51
DERIVATIVES_LIMIT = 10
OTHERS = {
    "optax.squared_error": ("squared_error", lambda delta: optax.squared_error),
    "optax.huber_loss": ("huber", lambda delta: partial(optax.huber_loss, delta=delta)),
    "optax.log_cosh": ("log_cosh", lambda delta: optax.log_cosh),
}
CHUNK = 2**18  # fits into a cache
AT_ONCE = 256


@dataclass(frozen=True)
class Config:
    """Settings of `accuracy`."""

    exhaustive: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Every float32 number instead of one in a thousand; continues where it was interrupted."""
    delta: float = 1.0
    """Of the losses that have one."""
    others: bool = True
    """The losses of optax too."""
    points: int = 100
    """How many points all derivatives are compared with mpmath at, per loss and precision."""
    out: Path | None = None
    """Where to write; results/accuracy by default."""


class Worst(NamedTuple):
    """The worst of one view of one loss."""

    ulp: float = 0.0
    at: float = 0.0  # the residual
    wrong: int = 0  # NaN, negative, or of the wrong size where the result over- or underflows


class Result(NamedTuple):
    """The worst errors."""

    numbers: int
    single: dict[str, dict[str, Worst]]
    half: dict[str, dict[str, dict[str, Worst]]]  # by dtype
    derivatives: dict[str, Off]  # first and second ones, of every loss


def run(
    config: Config, progress: Progress = lambda done, what: None, keep: Keep = compute
) -> Result:
    """Measures every loss."""
    if not 0 < config.delta < np.inf:
        raise UsageError(f"--delta must be a positive number, got {config.delta}.")
    if config.points < 1:
        raise UsageError(f"--points must be >= 1, got {config.points}.")
    stride = 1 if config.exhaustive else 1021
    numbers = -(-(2**32) // stride)
    cases = {name: (name, partial(with_delta, name)) for name in LIMITS}
    cases |= OTHERS if config.others else {}
    chunks = -(-numbers // CHUNK)
    single = {}
    with jax.enable_x64(True), ThreadPoolExecutor(os.cpu_count()) as threads:
        for i, (case, (name, loss)) in enumerate(cases.items()):
            measure = _measure(loss(config.delta), _truth(name, config.delta), numbers, stride)

            def block(first: int, measure: Any = measure) -> dict[str, Any]:
                worst = [Worst()] * len(VIEWS)
                for found in threads.map(measure, range(first, min(first + AT_ONCE, chunks))):
                    worst = [_merge(w, f) for w, f in zip(worst, found, strict=True)]
                return dict(zip(VIEWS, worst, strict=True))

            single[case] = dict.fromkeys(VIEWS, Worst())
            for first in range(0, chunks, AT_ONCE):
                progress((i + first / chunks) / len(cases), case)
                found = keep(f"{case}-{first}", partial(block, first))
                single[case] = {
                    view: _merge(worst, Worst(float(u), float(at), int(wrong)))
                    for (view, worst), (u, at, wrong) in zip(
                        single[case].items(), (found[view] for view in VIEWS), strict=True
                    )
                }
        half = {
            dtype.__name__: {
                case: _half(loss(config.delta), _truth(name, config.delta), dtype)
                for case, (name, loss) in cases.items()
            }
            for dtype in (jnp.float16, jnp.bfloat16)
        }
    derivatives = {}
    for name in DERIVED:
        progress(1.0, f"{name}, derivatives")
        found = keep(f"{name}-derivatives-{config.points}", partial(_derivatives, name, config))
        derivatives[name] = Off(
            float(found["ulp"]),
            tuple(map(int, found["of"])),
            tuple(map(float, found["at"])),
            float(found["got"]),
            float(found["true"]),
        )
    return Result(numbers, single, half, derivatives)


def _derivatives(name: str, config: Config) -> dict[str, Any]:
    both = [_worst_derivative(name, dtype, config.points) for dtype in (np.float32, np.float64)]
    return max(both, key=lambda off: off.ulp)._asdict()


def check(result: Result) -> None:
    """Every loss of this library keeps its promise."""
    for name, limits in LIMITS.items():
        for view, limit in zip(VIEWS, limits, strict=True):
            worst = result.single[name][view]
            assert worst.ulp <= limit, f"{name}, {view}: {worst}"
            assert not worst.wrong, f"{name}, {view}: {worst}"
            for dtype, losses in result.half.items():
                worst = losses[name][view]
                assert worst.ulp <= HALF_LIMIT, f"{name}, {dtype}: {worst}"
                assert not worst.wrong, f"{name}, {dtype}: {worst}"
    for name, off in result.derivatives.items():
        assert off.ulp <= DERIVATIVES_LIMIT, f"{name}, derivatives: {off}"
    measured = {name for name in rl.LOSSES if example(name)(0.0) == 0}  # not the likelihoods
    assert set(LIMITS) == measured, "a loss without limits in experiments/_truth.py"


def show(result: Result, console: Console) -> None:
    """The table."""
    console.print(_table(result))


def findings(result: Result) -> list[str]:
    """What was found."""
    worst = max(max(v.ulp for v in result.single[name].values()) for name in LIMITS)
    return [
        f"No loss of this library is off by more than {worst:.3g} units in the last place, of "
        f"{result.numbers:,} float32 numbers, nor {HALF_LIMIT:g} of any in a 16-bit type, "
        "but for the subnormal ones; 'wrong' counts results that are NaN or of the wrong sign, or "
        "that over- or underflow on their own.",
        "No first or second derivative, in the residual or a parameter, is off by more than "
        f"{max(off.ulp for off in result.derivatives.values()):.3g} units at the points tried.",
    ]


def files(config: Config, result: Result) -> dict[str, bytes]:
    """What goes into the output folder."""
    return {
        "result.json": _results.record(
            config,
            numbers=result.numbers,
            float32=_plain(result.single),
            derivatives={name: off._asdict() for name, off in result.derivatives.items()},
            **{dtype: _plain(losses) for dtype, losses in result.half.items()},
        )
    }


def folder(config: Config) -> Path:
    """Where the results go."""
    return config.out or Path("results") / "accuracy"


def _truth(name: str, delta: float) -> Callable[[Array], tuple[Array, ...]]:
    """The textbook in float64: value, slope, curvature, and the terms of the last two."""
    row = ROWS[name]
    given = {"delta": float(np.float32(delta)), **EXAMPLES.get(name, {})}
    parameters = [given[parameter] for parameter in row.parameters]
    return lambda r: row.in_float64(jnp, r, *parameters)


def _views(loss: Callable[..., Array]) -> list[Callable[[Array], Array]]:
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
        with jax.enable_x64(True):  # in each thread
            return [Worst(float(u), float(x), int(n)) for u, x, n in measure(jnp.int64(chunk))]

    return worst


def _half(loss: Callable[..., Array], truth: Any, dtype: Any) -> dict[str, Worst]:
    r = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)
    found = jax.jit(partial(_compare, loss, truth))(r)
    worst = [Worst(float(u), float(x), int(n)) for u, x, n in found]
    return dict(zip(VIEWS, worst, strict=True))


def _compare(loss: Callable[..., Array], truth: Any, r: Array) -> list[tuple[Array, ...]]:
    """Of each view the worst error in ulp, where, and how many results are wrong altogether."""
    smallest = float(jnp.finfo(jnp.float32).smallest_normal)
    wide = r.astype(jnp.float64)
    subnormal = (jnp.abs(wide) < smallest) & (wide != 0)
    r = jnp.where(jnp.isfinite(wide) & ~subnormal, r, 1)
    value, slope, bend, *terms = truth(r.astype(jnp.float64))
    trues = ((value, 0 * value), (slope, terms[0]), (bend, terms[1]))
    found = []
    for view, (true, size) in zip(_views(loss), trues, strict=True):
        got, info = view(r), jnp.finfo(r.dtype)
        got = got.astype(jnp.float64)
        unit = jnp.minimum(jnp.maximum(jnp.abs(true), size), float(info.max))
        step = jnp.maximum(_power_of_2(unit), 2.0**info.minexp) * 2.0**-info.nmant
        overflows = jnp.abs(true) >= float(info.max) + 2.0 ** (info.maxexp - 2 - info.nmant)
        flushed = jnp.abs(true) < 2 * smallest  # of float32, and so of bfloat16
        ulp = jnp.where(flushed | overflows, 0.0, jnp.abs(got - true) / step)
        ulp = jnp.where(jnp.isfinite(ulp), ulp, jnp.inf)
        wrong = jnp.isnan(got) | ((got * true < 0) & (ulp > 1))
        wrong |= flushed & (jnp.abs(got) > jnp.maximum(2 * smallest, float(info.smallest_normal)))
        wrong |= overflows & ~(jnp.abs(got) >= float(info.max))
        worst = jnp.max(ulp)
        at = jnp.max(r, where=ulp == worst, initial=-jnp.inf)  # a tenth of argmax's time
        found.append((worst, at.astype(jnp.float64), jnp.sum(wrong)))
    return found


def _power_of_2(x: Array) -> Array:
    """The largest one that is at most x, which is positive and normal or 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int64)
    return jax.lax.bitcast_convert_type(bits & (0x7FF << 52), jnp.float64)


def _merge(a: Worst, b: Worst) -> Worst:
    return Worst(*max((a.ulp, a.at), (b.ulp, b.at)), a.wrong + b.wrong)


def _plain(losses: dict[str, dict[str, Worst]]) -> dict[str, Any]:
    return {n: {v: w._asdict() for v, w in views.items()} for n, views in losses.items()}


def _table(result: Result) -> Table:
    halves = list(result.half.values())
    table = Table(
        "loss", *[f"{v}, ulp (at r)" for v in VIEWS], "float16", "bfloat16", "wrong", "derivatives"
    )
    for name in {**result.single, **result.derivatives}:
        views = result.single.get(name)
        cells = ["-"] * (len(VIEWS) + 3)
        if views:
            every = [w for v in (views, *(losses[name] for losses in halves)) for w in v.values()]
            cells = [f"{views[v].ulp:.3g} ({views[v].at:.3g})" for v in VIEWS]
            cells += [f"{max(w.ulp for w in losses[name].values()):.3g}" for losses in halves]
            cells += [f"{sum(w.wrong for w in every):,}"]
        off = result.derivatives.get(name)
        table.add_row(name, *cells, f"{off.ulp:.3g}" if off else "-")
    return table
