"""What do outliers do to each loss: few or many, near or far, in y or at leverage points?

Linear fits of data with the truth known, thousands in one compiled call: every share and size of
outliers, at rows like the others or at one far place of X; then the sensitivity curves, for which
a single row is moved. Breakdown points are measured beside the theory. The scale of the noise is
taken as known, so that losses are compared and nothing else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import robustloss as rl
from experiments import (
    Cache,
    Progress,
    UsageError,
    _plotting,
    _results,
    compute_arrays,
    ignore_progress,
    require,
)
from experiments._distribution import distribute
from experiments._linear_fits import fit_exact, fit_losses, resolve_losses
from experiments._losses import title
from robustloss.losses import redescending

LOSSES = (
    "squared_error", "absolute_error", "huber", "log_cosh", "pseudo_huber", "cauchy", "tukey",
)  # fmt: skip
PLACES = ("in y", "at leverage points")
FAR = 10.0  # where leverage points are, in standard deviations of the column
REACH = 15.0  # how far the row of the sensitivity curves is moved
MM = "mm"


@dataclass(frozen=True)
class Config:
    """Settings of `outliers`."""

    losses: tuple[str, ...] = LOSSES
    """The losses to fit by; MSE, MAE and Huber's among them."""
    rows: int = 200
    """Of each data set."""
    features: int = 4
    """Of each data set, besides the intercept."""
    shares: tuple[float, ...] = (
        0.0, 0.005, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.45, 0.5,
    )  # fmt: skip
    """Of the rows that are outliers."""
    sizes: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0)
    """Of the outliers' y, in standard deviations of the noise, in ascending order."""
    sets: int = 36
    """Data sets for each share, size and place."""
    sets_of_mm: int = 4
    """Of these, how many get an MM-estimate too; 0 for none."""
    chunk: int = 3010
    """Data sets in one compiled call."""
    seed: int = 0
    """Of the data."""
    out: Path | None = None
    """The output folder; results/outliers by default."""
    plots: bool = True
    """Draw the picture."""


SMOKE = Config(
    losses=("squared_error", "absolute_error", "huber", "tukey"),
    rows=60, features=1, shares=(0.0, 0.05, 0.1, 0.2, 0.4), sizes=(30.0, 100.0), sets=9,
    sets_of_mm=0, chunk=160,
)  # fmt: skip


class Result(NamedTuple):
    """Errors are distances from the truth, in standard deviations of the noise."""

    shares: np.ndarray
    sizes: np.ndarray
    rows: int
    losses: tuple[str, ...]
    errors: np.ndarray  # by loss, place, share, size: the median of the data sets
    fits: int  # by optax
    seconds: list[float]  # of each compiled call, the first one with compilation
    unconverged: float  # the share of the fits
    moved: np.ndarray  # how far the row of the sensitivity curves is moved
    curves: np.ndarray  # by loss, place: rows times the change of the parameter that it moves
    off: dict[str, float]  # the 99th percentile of the distance from the exact optimum, by loss


class Sets(NamedTuple):
    """What tells a data set from others, an entry for each."""

    seed: Any
    bad: Any  # how many rows are outliers
    size: Any
    place: Any


def run(
    config: Config, progress: Progress = ignore_progress, cache: Cache = compute_arrays
) -> Result:
    """Fits every data set by every loss."""
    _check(config)
    config = replace(config, losses=resolve_losses(config.losses))
    with jax.enable_x64(True):
        return _run(config, progress, cache)


def _run(config: Config, progress: Progress, cache: Cache) -> Result:
    shares, sizes = np.array(config.shares), np.array(config.sizes)
    grid = list(product(range(2), np.rint(shares * config.rows).astype(int), sizes))
    sweep = _sets([(s, bad, z, place) for place, bad, z in grid for s in range(config.sets)])
    moved = np.linspace(-REACH, REACH, 61)
    curve = _sets([(-1, 1, z, place) for place in range(2) for z in moved])
    everything = Sets(*(np.concatenate(pair) for pair in zip(sweep, curve, strict=True)))
    total = len(everything.seed)
    key = jax.random.key(config.seed)

    fits = distribute(lambda one: fit_losses(config.losses, *_data(config, key, one)))
    params, converged, seconds = [], [], []
    for first in range(0, total, config.chunk):
        progress(0.9 * first / total, "fits by optax")
        index = np.arange(first, first + config.chunk) % total  # all chunks are of one shape
        these = Sets(*(x[index] for x in everything))

        def chunk(these: Sets = these) -> dict[str, Any]:
            begin = time.perf_counter()
            b, done = jax.block_until_ready(fits(these))
            return {"params": b, "converged": done, "seconds": time.perf_counter() - begin}

        found = cache(f"fits-{first}", chunk)
        seconds.append(float(found["seconds"]))
        params.append(found["params"])
        converged.append(found["converged"])
    b, done = np.concatenate(params)[:total], np.concatenate(converged)[:total]

    n = len(sweep.seed)
    errors = np.median(
        np.linalg.norm(b[:n], axis=-1).reshape(2, len(shares), len(sizes), config.sets, -1), axis=3
    )
    progress(0.9, "the exact optimum of some")
    off = _off(config, key, sweep, b)
    losses, errors = config.losses, np.moveaxis(errors, -1, 0)
    if config.sets_of_mm:
        progress(0.92, "MM-estimates")
        few = np.flatnonzero(sweep.seed < config.sets_of_mm)
        mm = distribute(lambda one: _mm(*_data(config, key, one)))
        found = cache("mm", lambda: {"params": mm(Sets(*(x[few] for x in sweep)))})
        by_place = np.linalg.norm(found["params"], axis=-1).reshape(*errors.shape[1:], -1)
        losses, errors = (*losses, MM), np.concatenate([errors, np.median(by_place, -1)[None]])

    # Compared with the row at the truth, which is 0.
    curves = b[n:].reshape(2, len(moved), len(config.losses), -1)
    return Result(
        shares, sizes, config.rows, losses, errors,
        n * len(config.losses),
        seconds,
        float(1 - done[:n].mean()),
        moved,
        config.rows * np.stack([_from_still(curves[0, ..., 0]), _from_still(curves[1, ..., 1])], 1),
        off,
    )  # fmt: skip


def check(result: Result) -> None:
    """One outlier breaks MSE, no share in y the bounded ones; leverage points break all but MM."""
    require(result.unconverged < 0.02, f"{result.unconverged:.1%} of the fits did not converge")
    for name, off in result.off.items():
        limit = 0.1 if name == "absolute_error" else 1e-3
        require(off < limit, f"{name}: the fits are {off:.1e} off the exact optimum")
    broken = breakdown(result)
    first = result.shares[result.shares > 0].min()
    for place in PLACES:
        require(broken["squared_error", place] == first, f"MSE withstands outliers {place}")
    fitted = [name for name in result.losses if name != MM]
    for name in set(fitted) - {"squared_error", *redescending.__all__}:
        require(broken[name, "in y"] > 0.44, f"{title(name)} gives way to outliers in y")
        at = broken[name, "at leverage points"]
        below = result.shares[result.shares < at].max()
        require(
            below <= theory(name)[1] <= at, f"{title(name)} gives way at {at}, not as in theory"
        )
    for name in set(fitted) & set(redescending.__all__):
        require(broken[name, PLACES[1]] < 0.3, f"{title(name)} from MSE's fit withstands leverage")
    if MM in result.losses:
        # A tight cluster of 45 % can have the smaller scale, until it is too steep for that.
        for place, least in zip(PLACES, (0.44, 0.39), strict=True):
            require(broken[MM, place] > least, f"MM gives way to outliers {place}")
    half, whole = (np.abs(result.curves[:, 0, i]) for i in (len(result.moved) * 3 // 4, -1))
    for i, name in enumerate(fitted):
        if name == "squared_error":
            require(abs(whole[i] / half[i] - 2) < 0.1, "the influence on MSE is not linear")
        elif name != "absolute_error":  # whose fit jumps from vertex to vertex
            require(whole[i] < half[i] + 0.1, f"the influence on {title(name)} grows on")


def breakdown(result: Result) -> dict[tuple[str, str], float]:
    """The smallest share at which the error follows the outliers: doubles where they go 3 times
    as far, to more than 1.
    """
    far, near = result.errors[..., -1], result.errors[..., -2]
    gives_way = (far > 2 * near) & (far > 1)
    return {
        (name, place): float(min(result.shares[gives_way[i, j]], default=1.0))
        for i, name in enumerate(result.losses)
        for j, place in enumerate(PLACES)
    }


def theory(name: str) -> tuple[float, float]:
    """Breakdown points at outliers in y, and at leverage points that are FAR away.

    With an influence of at most psi, the outliers pull with share FAR psi, and the others hold on
    with at most (1 - share) E|x| psi. That is 0 as FAR grows.
    """
    if name == "squared_error":
        return 0.0, 0.0
    if name == MM:
        return 0.5, 0.5
    holds = np.sqrt(2 / np.pi)
    return 0.5, float(holds / (FAR + holds))


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    broken = breakdown(result)
    i, at = result.losses.index("squared_error"), list(result.shares).index(min(result.shares[1:]))
    huber = result.losses.index("huber")
    few = round(result.shares[at] * result.rows)
    size = result.sizes[-1]
    said = [
        f"{few} outlier{'s' if few > 1 else ''} among {result.rows} rows, {size:g} standard "
        f"deviations off, put{'s' * (few == 1)} MSE's fit off by "
        f"{result.errors[i, 0, at, -1]:.2g}, Huber's by {result.errors[huber, 0, at, -1]:.2g}; "
        f"without, both are off by {result.errors[huber, 0, 0, -1]:.2g}.",
        "Outliers in y: convex losses with a bounded influence, like MAE and Huber's, hold until "
        "half of the rows are bad. "
        f"At leverage points {FAR:g} standard deviations away they give way at "
        f"{broken['huber', PLACES[1]]:.0%} of the rows; theory says {theory('huber')[1]:.1%}, and "
        "less the farther away. No convex loss withstands leverage points.",
    ]
    if MM in result.losses and "tukey" in result.losses:
        said.append(
            f"From MSE's fit, Tukey's loss gives way at {broken['tukey', PLACES[1]]:.0%} too; from "
            f"an S-estimate (MM) it holds with {_held(result, MM, PLACES[1]):.0%}. It is the start "
            "that makes a fit robust to leverage."
        )
    return [
        *said,
        f"{result.fits:,} fits by optax in {len(result.seconds)} compiled "
        f"call{'s' * (len(result.seconds) > 1)}, {sum(result.seconds):.0f} s with compilation, "
        f"{result.unconverged:.2%} unconverged; Huber's are off the exact "
        f"optimum by {result.off['huber']:.0e} of the noise, MAE's by "
        f"{result.off['absolute_error']:.0e} (99 % of them).",
    ]


def show(result: Result, console: Console) -> None:
    """Prints the table."""
    table = Table(
        "loss", *[f"{place}: measured, theory" for place in PLACES],
        title="Breakdown: the share of outliers at which a fit follows them",
    )  # fmt: skip
    broken = breakdown(result)
    for name in result.losses:
        ours = [broken[name, place] for place in PLACES]
        points = theory(name)
        if name in redescending.__all__:
            points = (np.nan, np.nan)  # depends on the start
        cells = []
        for measured, point in zip(ours, points, strict=True):
            seen = "none" if measured > 0.5 else f"{measured:.1%}"
            cells.append(f"{seen}, {'the start decides' if np.isnan(point) else f'{point:.1%}'}")
        table.add_row(_label(name), *cells)
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    broken = {f"{name}, {place}": share for (name, place), share in breakdown(result).items()}
    written = {
        "result.json": _results.record(
            config, breakdown=broken, off=result.off, fits=result.fits,
            unconverged=result.unconverged, seconds_of_calls=result.seconds,
        ),
        "outliers.npz": _results.pack_arrays(
            shares=result.shares, sizes=result.sizes, losses=result.losses, errors=result.errors,
            moved=result.moved, curves=result.curves,
        ),
    }  # fmt: skip
    if config.plots:
        written["outliers.png"] = _results.render(plot(result))
    return written


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "outliers"


def plot(result: Result) -> Figure:
    """Errors against the share of outliers, and sensitivity curves, for both places."""
    with mpl.rc_context(_plotting.STYLE):
        figure = Figure(figsize=(10, 8.4))
        axes = figure.subplots(2, 2)
        names = [n for n in result.losses if n not in ("log_cosh", "pseudo_huber")]
        for j, place in enumerate(PLACES):
            top, bottom = axes[0, j], axes[1, j]
            for name in names:
                look = {**_plotting.get_line(name), "label": _label(name), "lw": 2}
                i = result.losses.index(name)
                top.plot(100 * result.shares, result.errors[i, j, :, -1], **look)
                if name != MM:
                    bottom.plot(result.moved, result.curves[i, j], **look)
            top.set(xlabel=f"rows that are outliers {place}, %", yscale="log")
            bottom.set(xlabel="y of the one row, in standard deviations of the noise")
            reach = 1.1 * np.abs(result.curves[0, j]).max()
            bottom.set_ylim(-reach, reach)
            top.set_ylim(0.08, 2 * result.errors.max())
            bottom.axhline(0, color="0.8", lw=0.8, zorder=0)
        axes[0, 0].set(
            title=f"{result.sizes[-1]:g} sd off in y: MSE breaks",
            ylabel="median error of the fit, sd of the noise",
        )
        axes[0, 1].set(title=f"At x = {FAR:g} sd: only MM holds")
        axes[1, 0].set(
            title="One row moved in y", ylabel="rows x change of the parameter, sd of the noise"
        )
        axes[1, 1].set(title=f"One row moved, at x = {FAR:g} sd")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure


def _label(name: str) -> str:
    if name == MM:
        return "MM (Tukey from an S-estimate)"
    return f"{title(name)} from MSE's fit" if name in redescending.__all__ else title(name)


def _held(result: Result, name: str, place: str) -> float:
    """The largest share below the breakdown."""
    return float(result.shares[result.shares < breakdown(result)[name, place]].max())


def _from_still(b: np.ndarray) -> np.ndarray:
    """The change of a parameter, by loss, as the row is moved from the middle."""
    return (b - b[len(b) // 2]).T


def _sets(entries: list[tuple[int, int, float, int]]) -> Sets:
    seed, bad, size, place = zip(*entries, strict=True)
    return Sets(np.array(seed), np.array(bad), np.array(size, float), np.array(place))


def _data(config: Config, key: Array, one: Sets) -> tuple[Array, Array]:
    """Clean rows have y = noise, so that all true parameters are 0."""
    for_X, for_y, near = jax.random.split(jax.random.fold_in(key, one.seed), 3)
    X = jax.random.normal(for_X, (config.rows, config.features))
    y = jax.random.normal(for_y, (config.rows,))
    bad = jnp.arange(config.rows) < one.bad
    there = 0.1 * jax.random.normal(near, X.shape)
    there = there.at[:, 0].add(FAR)
    X = jnp.where((bad & (one.place == 1))[:, None], there, X)
    return X, jnp.where(bad, one.size, y)


def _mm(X: Array, y: Array) -> Array:
    found = rl.fit_linear(X, y, rl.tukey)
    return jnp.append(found.intercept, found.coefficients)


def _off(config: Config, key: Array, sets: Sets, b: np.ndarray) -> dict[str, float]:
    """How far the fits of convex losses are from their exact optima, for up to 100 data sets.

    With the optimum not unique, which happens, the distance says nothing: hence a percentile.
    """
    some = np.linspace(0, len(sets.seed) - 1, 100).astype(int)
    off = {}
    for name in ("absolute_error", "huber"):
        exact = distribute(partial(_exact, config, key, name))(Sets(*(x[some] for x in sets)))
        distance = np.max(np.abs(np.asarray(exact) - b[some, config.losses.index(name)]), axis=-1)
        off[name] = float(np.quantile(distance, 0.99))
    return off


def _exact(config: Config, key: Array, name: str, one: Sets) -> Array:
    return fit_exact(name, *_data(config, key, one))


def _check(config: Config) -> None:
    if not config.shares or not all(0 <= share <= 0.5 for share in config.shares):
        raise UsageError(f"--shares must be in [0, 0.5], got {config.shares}.")
    if config.shares[0] != 0 or list(config.shares) != sorted(set(config.shares)):
        raise UsageError(f"--shares must begin with 0 and ascend, got {config.shares}.")
    if len(config.shares) < 2:
        raise UsageError(f"--shares needs one above 0, got {config.shares}.")
    if len(config.sizes) < 2 or list(config.sizes) != sorted(set(config.sizes)):
        raise UsageError(f"--sizes needs two or more in ascending order, got {config.sizes}.")
    if not config.sizes[0] > 0:
        raise UsageError(f"--sizes must be > 0, got {config.sizes}.")
    for option, least in (("sets", 1), ("chunk", 1), ("features", 1), ("sets_of_mm", 0)):
        value = getattr(config, option)
        if value < least:
            raise UsageError(f"--{option.replace('_', '-')} must be >= {least}, got {value}.")
    if config.sets_of_mm > config.sets:
        raise UsageError(
            f"--sets-of-mm must be at most --sets, got {config.sets_of_mm} > {config.sets}."
        )
    if config.rows < 5 * (config.features + 1):
        raise UsageError(
            f"--rows must be at least 5 times the parameters, got {config.rows} for "
            f"{config.features + 1}."
        )
