"""How fast are the losses, beside a plain copy of the array and beside optax?

Times value and gradient of the mean over one large array, everything interleaved in one run,
and compares medians: machines are noisy, and a ratio in one run is the only honest number. A
copy reads and writes the array once, which is the least that a gradient can do. Also: the
first call with its compilation, and what `import robustloss` adds to `import jax`.
"""

from __future__ import annotations

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
from experiments import Progress, UsageError, _results
from experiments._losses import example

PEERS = {
    "squared_error": optax.squared_error,
    "huber": optax.huber_loss,
    "log_cosh": optax.log_cosh,
}
LIMITS = {  # of copy's time, of the peer's time
    "squared_error": (1.25, None),
    "absolute_error": (1.25, None),
    "huber": (1.5, 0.55),
    "log_cosh": (None, 1.0),
}
IMPORT_LIMIT = 0.1  # seconds


@dataclass(frozen=True)
class Config:
    """Settings of `speed`."""

    size: int = 2**24
    """Numbers in the array."""
    repeats: int = 21
    """Interleaved runs of which the median counts."""
    seed: int = 0
    """Of the random numbers."""
    out: Path | None = None
    """Where to write; results/speed by default."""


class Result(NamedTuple):
    """Seconds."""

    times: dict[str, np.ndarray]  # by what is timed: seconds of each repeat
    first: dict[str, float]  # the first call, compilation included
    imports: float  # what `import robustloss` adds
    device: str


def run(config: Config, progress: Progress = lambda done, what: None) -> Result:
    """Times everything in turn."""
    if config.size < 1 or config.repeats < 1:
        raise UsageError("--size and --repeats must be >= 1.")
    progress(0.0, "import")
    imports = _import_seconds()
    r = 3 * jax.random.normal(jax.random.key(config.seed), (config.size,), jnp.float32)
    cases: dict[str, Callable[[Array], object]] = {"copy": jnp.copy}
    for name in rl.LOSSES:
        cases[name] = _value_and_grad(example(name))
        if name in PEERS:
            cases[f"optax: {name}"] = _value_and_grad(PEERS[name])
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
        progress(0.3 + 0.7 * repeat / config.repeats, "time")
        for name in shuffle(list(compiled)):  # what runs next pays for freeing the last's memory
            f = compiled[name]
            begin = time.perf_counter()
            jax.block_until_ready(f(r))
            times[name].append(time.perf_counter() - begin)
    arrays = {name: np.array(seconds) for name, seconds in times.items()}
    return Result(arrays, first, imports, jax.devices()[0].device_kind)


def check(result: Result) -> None:
    """The promises, as ratios of medians."""
    for name, (of_copy, of_peer) in LIMITS.items():
        if of_copy is not None:
            ratio = _ratio(result, name, "copy")
            assert ratio <= of_copy, f"{name} takes {ratio:.2f} times a copy, not {of_copy}"
        if of_peer is not None:
            ratio = _ratio(result, name, f"optax: {name}")
            assert ratio <= of_peer, f"{name} takes {ratio:.2f} times optax's, not {of_peer}"
    assert result.imports <= IMPORT_LIMIT, f"the import adds {result.imports:.2f} s"


def show(result: Result, console: Console) -> None:
    """The table."""
    table = Table("value and gradient of the mean", "ms", "/ copy", "/ optax", "first call, s")
    for name, seconds in result.times.items():
        peer = f"optax: {name}"
        table.add_row(
            name,
            f"{1e3 * np.median(seconds):.1f}",
            f"{_ratio(result, name, 'copy'):.2f}",
            f"{_ratio(result, name, peer):.2f}" if peer in result.times else "",
            f"{result.first[name]:.2f}",
        )
    console.print(table)
    console.print(
        f"- On {result.device}; `import robustloss` adds {result.imports:.3f} s to `import jax`.",
        highlight=False,
    )


def files(config: Config, result: Result) -> dict[str, bytes]:
    """What goes into the output folder."""
    return {"result.json": _results.record(config, **result._asdict())}


def folder(config: Config) -> Path:
    """Where the results go."""
    return config.out or Path("results") / "speed"


def _value_and_grad(loss: Callable[..., Array]) -> Callable[[Array], object]:
    return jax.value_and_grad(lambda r: jnp.mean(loss(r)))


def _ratio(result: Result, name: str, other: str) -> float:
    return float(np.median(result.times[name]) / np.median(result.times[other]))


def _import_seconds() -> float:
    script = (
        "import jax, time; begin = time.perf_counter(); import robustloss; "
        "print(time.perf_counter() - begin)"
    )
    command = [sys.executable, "-c", script]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(5)]
    return float(np.median([float(run.stdout) for run in runs]))
