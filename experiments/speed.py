"""How fast are the losses beside a plain copy and optax, the fits beside scikit-learn and R?

Times the value and gradient of the mean over one large array, interleaved in one run, and compares
medians: machines are noisy, and only a ratio within one run is meaningful. A copy reads and writes
the array once, which is the least that a gradient can do. Then times linear fits in float64, beside
those of the installed peers (`pip install '.[peers]'`; R with quantreg and robustbase), for several
numbers of rows, and measures their memory. Also times the first call with its compilation, and the
part of `import robustloss` that is not `import jax`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.console import Console
from rich.table import Table

import robustloss as rl
from experiments import Progress, UsageError, _fit_speed, _results, ignore_progress, require
from experiments._fit_speed import Timing
from experiments._losses import fix_parameters

PEERS = {
    "squared_error": optax.squared_error,
    "huber": optax.huber_loss,
    "log_cosh": optax.log_cosh,
}
LIMITS = {  # times the copy's time, times the peer's time
    "squared_error": (1.25, None),
    "absolute_error": (1.25, None),
    "huber": (1.5, 0.55),
    "log_cosh": (None, 1.0),
}
FIT_LIMITS = {  # how many times as fast as the peer, at the sizes of the default settings
    "sklearn HuberRegressor": 3,
    "statsmodels RLM": 30,
    "sklearn, a loop": 50,
    "sklearn QuantileRegressor": 200,
    "R robustbase lmrob": 5,
}
ERROR_LIMIT = 1e-7  # distance to the exact answer, in sd(y)
GROWTH_LIMIT = 1.5  # time over a time that is linear in the rows, from 1/100 of the rows on
MEMORY_LIMIT = 2.0  # times the data
IMPORT_LIMIT = 0.1  # seconds


@dataclass(frozen=True)
class Config:
    """Settings of `speed`."""

    size: int = 2**24
    """Numbers in the array."""
    repeats: int = 21
    """Interleaved runs, of which the median is taken."""
    rows: int = 1_000_000
    """Rows of the large fits; 0 leaves the fits out."""
    fit_repeats: int = 5
    """Turns of the fits; a short fit fills half a second, a peer slower than 3 s has one turn."""
    seed: int = 0
    """The seed of the random numbers."""
    out: Path | None = None
    """The output folder; results/speed by default."""


class Result(NamedTuple):
    """Seconds of the losses and fits, and the memory of the fits."""

    times: dict[str, np.ndarray]  # by task: seconds of each repeat
    first: dict[str, float]  # the first call, compilation included
    imports: float  # seconds that `import robustloss` adds
    device: str
    fits: dict[str, Timing]
    growth: dict[int, float]  # seconds of a Huber fit by the number of rows
    memory: dict[str, float]  # planned by the compiled fits, over the size of the data


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Times everything in turn."""
    if min(config.size, config.repeats, config.fit_repeats) < 1:
        raise UsageError("--size, --repeats and --fit-repeats must be >= 1.")
    if config.rows and config.rows < 10_000:
        raise UsageError(f"--rows must be 0 or at least 10,000, got {config.rows}.")
    progress(0.0, "import")
    imports = _time_import()
    r = 3 * jax.random.normal(jax.random.key(config.seed), (config.size,), jnp.float32)
    cases: dict[str, Callable[[Array], object]] = {"copy": jnp.copy}
    for name in rl.LOSSES:
        cases[name] = _differentiate_mean(fix_parameters(name))
        if name in PEERS:
            cases[f"optax: {name}"] = _differentiate_mean(PEERS[name])
    compiled, first = {}, {}
    for name, f in cases.items():
        progress(0.1, f"compile {name}")
        begin = time.perf_counter()
        compiled[name] = jax.jit(f)
        jax.block_until_ready(compiled[name](r))
        first[name] = time.perf_counter() - begin
    times: dict[str, list[float]] = {name: [] for name in cases}
    shuffle = np.random.default_rng(config.seed).permutation
    for repeat in range(config.repeats):
        progress(0.2 + 0.2 * repeat / config.repeats, "time")
        for name in shuffle(list(compiled)):  # a task frees the memory of the task before it
            f = compiled[name]
            begin = time.perf_counter()
            jax.block_until_ready(f(r))
            times[name].append(time.perf_counter() - begin)
    arrays = {name: np.array(seconds) for name, seconds in times.items()}
    fits, growth, peak = _time_fits(config, progress) if config.rows else ({}, {}, {})
    return Result(arrays, first, imports, jax.devices()[0].device_kind, fits, growth, peak)


def _time_fits(
    config: Config, progress: Progress
) -> tuple[dict[str, Timing], dict[int, float], dict[str, float]]:
    fits = {}
    cases = _fit_speed.build_cases(config.rows)
    for i, case in enumerate(cases):
        progress(0.4 + 0.4 * i / len(cases), case.name)
        fits[case.name] = _fit_speed.time_case(case, config.fit_repeats)
    sizes = [
        size for size in (config.rows // 100, config.rows // 10, config.rows, 10 * config.rows)
    ]
    growth = {}
    for rows, seconds in _fit_speed.measure_growth(sizes, config.fit_repeats):
        growth[rows] = seconds
        progress(0.8 + 0.04 * len(growth), f"{rows:,} rows done")
    progress(0.96, "memory")
    return fits, growth, _fit_speed.measure_memory(config.rows)


def check(result: Result) -> None:
    """The ratios of medians keep their limits; the message lists all that do not."""
    missed = []
    for name, (copy_limit, peer_limit) in LIMITS.items():
        for limit, other in ((copy_limit, "copy"), (peer_limit, f"optax: {name}")):
            if limit is not None and (ratio := _compute_ratio(result, name, other)) > limit:
                missed.append(f"{name} takes {ratio:.2f} times {other}, not {limit}")
    if result.imports > IMPORT_LIMIT:
        missed.append(f"the import adds {result.imports:.2f} s, not {IMPORT_LIMIT}")
    for name, timing in result.fits.items():
        if not timing.converged:
            missed.append(f"{name} did not converge")
        for peer, seconds in timing.peers.items():
            faster, limit = np.median(seconds) / np.median(timing.ours), FIT_LIMITS.get(peer, 0)
            if faster < limit:
                missed.append(f"{name} is {faster:.1f} times as fast as {peer}, not {limit}")
        if timing.error is not None and not timing.error <= ERROR_LIMIT:
            missed.append(f"the error of {name} is {timing.error:.1e}, not {ERROR_LIMIT}")
    if result.growth:
        first, *_, last = result.growth
        ratio = result.growth[last] / result.growth[first] / (last / first)
        if ratio > GROWTH_LIMIT:
            missed.append(f"time is {ratio:.2f} times linear in the rows, not {GROWTH_LIMIT}")
    missed += [
        f"{name} takes {size:.2f} times the data's memory, not {MEMORY_LIMIT}"
        for name, size in result.memory.items()
        if size > MEMORY_LIMIT
    ]
    require(not missed, "; ".join(missed))


def show(result: Result, console: Console) -> None:
    """Prints the tables and the seconds of the import."""
    table = Table("value and gradient of the mean", "ms", "/ copy", "/ optax", "first call, s")
    for name, seconds in result.times.items():
        peer = f"optax: {name}"
        table.add_row(
            name,
            f"{1e3 * np.median(seconds):.1f}",
            f"{_compute_ratio(result, name, 'copy'):.2f}",
            f"{_compute_ratio(result, name, peer):.2f}" if peer in result.times else "",
            f"{result.first[name]:.2f}",
        )
    console.print(table)
    console.print(f"`import robustloss` adds {result.imports:.3f} s to `import jax`.")
    if result.fits:
        _show_fits(result, console)


def findings(result: Result) -> list[str]:
    """The device, and the time and error of a Huber fit."""
    sentences = [f"All times are from {result.device}."]
    if result.fits:
        grown = ", ".join(f"{seconds:.3g} s at {rows:,}" for rows, seconds in result.growth.items())
        errors = [t.error for t in result.fits.values() if t.error is not None]
        sentences.append(f"A Huber fit takes {grown} rows; its error is {max(errors):.1e} sd(y).")
    return sentences


def _show_fits(result: Result, console: Console) -> None:
    table = Table("fit, float64", "s", "first call, s", "beside", "s", "times as fast")
    for name, timing in result.fits.items():
        ours = float(np.median(timing.ours))
        peers = {peer: float(np.median(s)) for peer, s in timing.peers.items()} or {"": np.nan}
        for i, (peer, seconds) in enumerate(peers.items()):
            mine = ("", "", "") if i else (name, f"{ours:.3g}", f"{timing.first:.1f}")
            beside = (peer, f"{seconds:.3g}", f"{seconds / ours:.1f}") if peer else ("", "", "")
            table.add_row(*mine, *beside)
    console.print(table)
    table = Table("rows of a Huber fit", "s")
    for rows, seconds in result.growth.items():
        table.add_row(f"{rows:,}", f"{seconds:.3g}")
    console.print(table)
    table = Table(f"fit of {list(result.growth)[-2]:,} rows", "memory at the peak / the data")
    for name, size in result.memory.items():
        table.add_row(name, f"{size:.2f}")
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    fits = {name: timing._asdict() for name, timing in result.fits.items()}
    return {"result.json": _results.record(config, **{**result._asdict(), "fits": fits})}


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "speed"


def _differentiate_mean(loss: Callable[..., Array]) -> Callable[[Array], object]:
    return jax.value_and_grad(lambda r: jnp.mean(loss(r)))


def _compute_ratio(result: Result, name: str, other: str) -> float:
    return float(np.median(result.times[name]) / np.median(result.times[other]))


def _time_import() -> float:
    script = (
        "import jax, time; begin = time.perf_counter(); import robustloss; "
        "print(time.perf_counter() - begin)"
    )
    command = [sys.executable, "-c", script]
    # The first run compiles to bytecode, as an installation does.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        for _ in range(6)
    ]
    return float(np.median([float(run.stdout) for run in runs[1:]]))
