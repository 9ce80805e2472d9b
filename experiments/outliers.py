"""What do outliers do to each loss: few or many, near or far, in y or at leverage points?

Makes thousands of linear fits to data with a known truth in one compiled call: for every share and
size of outliers, in ordinary rows or at one far point of X; and for sensitivity curves, for which a
single row is moved. The measured breakdown points are compared with the theory. The scale of the
noise is taken as known, so that the comparison is one of losses alone.
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
FAR = 10.0  # the place of leverage points, in standard deviations of the column
LIMIT = 15.0  # the largest |y| of the row of the sensitivity curves
MM = "mm"


@dataclass(frozen=True)
class Config:
    """Settings of `outliers`."""

    losses: tuple[str, ...] = LOSSES
    """The losses to fit; MSE, MAE and Huber's loss must be among them."""
    rows: int = 200
    """Rows of each data set."""
    features: int = 4
    """Features of each data set, without the intercept."""
    shares: tuple[float, ...] = (
        0.0, 0.005, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.45, 0.5,
    )  # fmt: skip
    """The shares of the rows that are outliers."""
    sizes: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0)
    """The y of the outliers, in standard deviations of the noise, in ascending order."""
    sets: int = 36
    """Data sets for each share, size and place."""
    sets_of_mm: int = 4
    """Data sets with an MM-estimate for each share, size and place; 0 for none."""
    chunk: int = 3010
    """Data sets in one compiled call."""
    seed: int = 0
    """The seed of the data."""
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
    errors: np.ndarray  # by loss, place, share and size: the median over the data sets
    fits: int  # by optax
    seconds: list[float]  # of each compiled call, with compilation in the first
    unconverged: float  # the share of fits that did not converge
    moved: np.ndarray  # y of the row of the sensitivity curves
    curves: np.ndarray  # by loss and place: rows times the change of the parameter
    deviations: dict[str, float]  # 99th percentile of the distance from the exact optimum, by loss


class Sets(NamedTuple):
    """The settings of data sets, an entry for each."""

    seed: Any
    outliers: Any  # the number of outliers
    size: Any
    place: Any


def run(
    config: Config, progress: Progress = ignore_progress, cache: Cache = compute_arrays
) -> Result:
    """Fits every loss to every data set."""
    _check_settings(config)
    config = replace(config, losses=resolve_losses(config.losses))
    with jax.enable_x64(True):
        return _run(config, progress, cache)


def _run(config: Config, progress: Progress, cache: Cache) -> Result:
    shares, sizes = np.array(config.shares), np.array(config.sizes)
    grid = list(product(range(2), np.rint(shares * config.rows).astype(int), sizes))
    sweep = _build_sets([(s, n, z, place) for place, n, z in grid for s in range(config.sets)])
    moved = np.linspace(-LIMIT, LIMIT, 61)
    curve = _build_sets([(-1, 1, z, place) for place in range(2) for z in moved])
    all_sets = Sets(*(np.concatenate(pair) for pair in zip(sweep, curve, strict=True)))
    total = len(all_sets.seed)
    key = jax.random.key(config.seed)

    fits = distribute(lambda item: fit_losses(config.losses, *_draw_data(config, key, item)))
    params, converged, seconds = [], [], []
    for first in range(0, total, config.chunk):
        progress(0.9 * first / total, "fits by optax")
        index = np.arange(first, first + config.chunk) % total  # all chunks have one shape
        chunk_sets = Sets(*(x[index] for x in all_sets))

        def chunk(chunk_sets: Sets = chunk_sets) -> dict[str, Any]:
            begin = time.perf_counter()
            b, finished = jax.block_until_ready(fits(chunk_sets))
            return {"params": b, "converged": finished, "seconds": time.perf_counter() - begin}

        found = cache(f"fits-{first}", chunk)
        seconds.append(float(found["seconds"]))
        params.append(found["params"])
        converged.append(found["converged"])
    b, finished = np.concatenate(params)[:total], np.concatenate(converged)[:total]

    n = len(sweep.seed)
    errors = np.median(
        np.linalg.norm(b[:n], axis=-1).reshape(2, len(shares), len(sizes), config.sets, -1), axis=3
    )
    progress(0.9, "exact optima")
    deviations = _measure_deviations(config, key, sweep, b)
    losses, errors = config.losses, np.moveaxis(errors, -1, 0)
    if config.sets_of_mm:
        progress(0.92, "MM-estimates")
        selected = np.flatnonzero(sweep.seed < config.sets_of_mm)
        mm = distribute(lambda item: _fit_mm(*_draw_data(config, key, item)))
        found = cache("mm", lambda: {"params": mm(Sets(*(x[selected] for x in sweep)))})
        distances = np.linalg.norm(found["params"], axis=-1).reshape(*errors.shape[1:], -1)
        losses, errors = (*losses, MM), np.concatenate([errors, np.median(distances, -1)[None]])

    # The reference is the row at the truth, which is 0.
    curves = b[n:].reshape(2, len(moved), len(config.losses), -1)
    return Result(
        shares, sizes, config.rows, losses, errors,
        n * len(config.losses),
        seconds,
        float(1 - finished[:n].mean()),
        moved,
        config.rows * np.stack([_subtract_middle(curves[i, ..., i]) for i in range(2)], 1),
        deviations,
    )  # fmt: skip


def check(result: Result) -> None:
    """MSE breaks at one outlier, bounded losses at none in y, all but MM at leverage points."""
    require(result.unconverged < 0.02, f"{result.unconverged:.1%} of the fits did not converge")
    for name, deviation in result.deviations.items():
        limit = 0.1 if name == "absolute_error" else 1e-3
        require(deviation < limit, f"{name}: the fits are {deviation:.1e} from the exact optimum")
    broken = measure_breakdown(result)
    first = result.shares[result.shares > 0].min()
    for place in PLACES:
        require(broken["squared_error", place] == first, f"MSE withstands outliers {place}")
    fitted = [name for name in result.losses if name != MM]
    for name in set(fitted) - {"squared_error", *redescending.__all__}:
        require(broken[name, "in y"] > 0.44, f"{title(name)} breaks down at outliers in y")
        share = broken[name, "at leverage points"]
        tolerated = result.shares[result.shares < share].max()
        require(
            tolerated <= compute_breakdown(name)[1] <= share,
            f"{title(name)} breaks down at {share}, not as in theory",
        )
    for name in set(fitted) & set(redescending.__all__):
        require(broken[name, PLACES[1]] < 0.3, f"{title(name)} from MSE's fit withstands leverage")
    if MM in result.losses:
        # A tight cluster of 45 % of the rows has the smaller scale until its slope is too steep.
        for place, limit in zip(PLACES, (0.44, 0.39), strict=True):
            require(broken[MM, place] > limit, f"MM breaks down at outliers {place}")
    half, whole = (np.abs(result.curves[:, 0, i]) for i in (len(result.moved) * 3 // 4, -1))
    for i, name in enumerate(fitted):
        if name == "squared_error":
            require(abs(whole[i] / half[i] - 2) < 0.1, "the influence on MSE is not linear")
        elif name != "absolute_error":  # its fit jumps between vertices
            require(whole[i] < half[i] + 0.1, f"the influence on {title(name)} does not level off")


def measure_breakdown(result: Result) -> dict[tuple[str, str], float]:
    """The smallest share at which the error follows the outliers, by loss and place.

    The error follows the outliers if it exceeds 1 and more than doubles as they move three times
    as far.
    """
    farther, nearer = result.errors[..., -1], result.errors[..., -2]
    gives_way = (farther > 2 * nearer) & (farther > 1)
    return {
        (name, place): float(min(result.shares[gives_way[i, j]], default=1.0))
        for i, name in enumerate(result.losses)
        for j, place in enumerate(PLACES)
    }


def compute_breakdown(name: str) -> tuple[float, float]:
    """The theoretical breakdown points at outliers in y and at leverage points at FAR.

    If the influence is at most psi, outliers pull with share FAR psi and the other rows resist with
    at most (1 - share) E|x| psi. The breakdown point decreases to 0 as FAR increases.
    """
    if name == "squared_error":
        return 0.0, 0.0
    if name == MM:
        return 0.5, 0.5
    pull = np.sqrt(2 / np.pi)
    return 0.5, float(pull / (FAR + pull))


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    broken = measure_breakdown(result)
    i, smallest = (
        result.losses.index("squared_error"),
        list(result.shares).index(min(result.shares[1:])),
    )
    huber = result.losses.index("huber")
    count = round(result.shares[smallest] * result.rows)
    size = result.sizes[-1]
    sentences = [
        f"{count} outlier{'s' if count > 1 else ''} among {result.rows} rows, {size:g} standard "
        f"deviations from the truth, move{'s' * (count == 1)} MSE's fit to a distance of "
        f"{result.errors[i, 0, smallest, -1]:.2g} from the truth, Huber's to "
        f"{result.errors[huber, 0, smallest, -1]:.2g}; without outliers both are at "
        f"{result.errors[huber, 0, 0, -1]:.2g}.",
        "Convex losses with a bounded influence, like MAE and Huber's, tolerate outliers in y up "
        "to half of the rows. "
        f"At leverage points {FAR:g} standard deviations away they break down at "
        f"{broken['huber', PLACES[1]]:.0%} of the rows; the theory says "
        f"{compute_breakdown('huber')[1]:.1%}, and less at a greater distance. No convex loss "
        "resists leverage points.",
    ]
    if MM in result.losses and "tukey" in result.losses:
        sentences.append(
            f"From MSE's fit, Tukey's loss breaks down at {broken['tukey', PLACES[1]]:.0%} too; "
            "from an S-estimate (MM) it tolerates "
            f"{_find_tolerated_share(result, MM, PLACES[1]):.0%}. The start makes a fit robust to "
            "leverage points."
        )
    return [
        *sentences,
        f"{result.fits:,} fits by optax in {len(result.seconds)} compiled "
        f"call{'s' * (len(result.seconds) > 1)}, {sum(result.seconds):.0f} s with compilation, "
        f"{result.unconverged:.2%} unconverged; 99 % of Huber's fits are within "
        f"{result.deviations['huber']:.0e} of the noise of the exact optimum, 99 % of MAE's within "
        f"{result.deviations['absolute_error']:.0e}.",
    ]


def show(result: Result, console: Console) -> None:
    """Prints the table."""
    table = Table(
        "loss", *[f"{place}: measured, theory" for place in PLACES],
        title="Breakdown point: the smallest share of outliers that a fit follows",
    )  # fmt: skip
    broken = measure_breakdown(result)
    for name in result.losses:
        measured_shares = [broken[name, place] for place in PLACES]
        points = compute_breakdown(name)
        if name in redescending.__all__:
            points = (np.nan, np.nan)  # the breakdown point depends on the start
        cells = []
        for measured, point in zip(measured_shares, points, strict=True):
            text = "none" if measured > 0.5 else f"{measured:.1%}"
            cells.append(f"{text}, {'the start decides' if np.isnan(point) else f'{point:.1%}'}")
        table.add_row(_label(name), *cells)
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    broken = {
        f"{name}, {place}": share for (name, place), share in measure_breakdown(result).items()
    }
    written = {
        "result.json": _results.record(
            config, breakdown=broken, deviations=result.deviations, fits=result.fits,
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
    """Errors by share of outliers, and sensitivity curves, for both places."""
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
            top.set_ylim(min(0.08, 0.8 * result.errors.min()), 2 * result.errors.max())
            bottom.axhline(0, color="0.8", lw=0.8, zorder=0)
        axes[0, 0].set(
            title=f"Outliers at y = {result.sizes[-1]:g} sd: MSE breaks",
            ylabel="median error of the fit, sd of the noise",
        )
        axes[0, 1].set(title=f"Outliers at x = {FAR:g} sd: all break but MM")
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


def _find_tolerated_share(result: Result, name: str, place: str) -> float:
    """The largest share below the breakdown point."""
    return float(result.shares[result.shares < measure_breakdown(result)[name, place]].max())


def _subtract_middle(b: np.ndarray) -> np.ndarray:
    """By loss, the change of a parameter as the row moves away from the middle."""
    return (b - b[len(b) // 2]).T


def _build_sets(entries: list[tuple[int, int, float, int]]) -> Sets:
    seed, outliers, size, place = zip(*entries, strict=True)
    return Sets(np.array(seed), np.array(outliers), np.array(size, float), np.array(place))


def _draw_data(config: Config, key: Array, item: Sets) -> tuple[Array, Array]:
    """Data whose true parameters are all 0: in clean rows, y is noise."""
    X_key, y_key, place_key = jax.random.split(jax.random.fold_in(key, item.seed), 3)
    X = jax.random.normal(X_key, (config.rows, config.features))
    y = jax.random.normal(y_key, (config.rows,))
    is_outlier = jnp.arange(config.rows) < item.outliers
    far_X = 0.1 * jax.random.normal(place_key, X.shape)
    far_X = far_X.at[:, 0].add(FAR)
    X = jnp.where((is_outlier & (item.place == 1))[:, None], far_X, X)
    return X, jnp.where(is_outlier, item.size, y)


def _fit_mm(X: Array, y: Array) -> Array:
    found = rl.fit_linear(X, y, rl.tukey)
    return jnp.append(found.intercept, found.coefficients)


def _measure_deviations(config: Config, key: Array, sets: Sets, b: np.ndarray) -> dict[str, float]:
    """The distance of convex fits from their exact optima, over up to 100 data sets.

    The distance means nothing where an optimum is not unique, hence a percentile instead of the
    maximum.
    """
    selected = np.linspace(0, len(sets.seed) - 1, 100).astype(int)
    deviations = {}
    for name in ("absolute_error", "huber"):
        exact = distribute(partial(_fit_exact_set, config, key, name))(
            Sets(*(x[selected] for x in sets))
        )
        distance = np.max(
            np.abs(np.asarray(exact) - b[selected, config.losses.index(name)]), axis=-1
        )
        deviations[name] = float(np.quantile(distance, 0.99))
    return deviations


def _fit_exact_set(config: Config, key: Array, name: str, item: Sets) -> Array:
    return fit_exact(name, *_draw_data(config, key, item))


def _check_settings(config: Config) -> None:
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
