"""What does each loss make of the outliers in a data set, built in or your own?

Fits a linear model with every loss and shows the coefficients, the rows that a loss all but
ignores, and pictures. Columns are standardised for the fit and the coefficients transformed
back. A loss with a `delta` gets its tuning constant for 95 % efficiency at the normal, times
a robust scale of the residuals: the MAD / 0.6745 of Huber's fit, each found with the other.
Beside them, with standard errors, the MM-estimate, which starts where outliers had no say.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import robustloss as rl
from experiments import Progress, UsageError, _plotting, _results, ignore_progress, require
from experiments._losses import comparable, title, tuned, with_delta
from experiments.data import Data, load, read_csv
from robustloss.losses import redescending

COMPARED = ("absolute_error", "huber", "log_cosh", "pseudo_huber", "squared_error")
FEW = 80  # rows that can still be told apart along an axis
LOW = 0.5  # a row that counts less than this share of a typical row is named


@dataclass(frozen=True)
class Config:
    """Settings of `compare`."""

    data: str | None = None
    """A built-in data set, phones by default; experiments/data/SOURCES.md says what each is."""
    csv: Path | None = None
    """A CSV file of your own, with a header; needs --target."""
    target: str | None = None
    """The column of --csv to predict."""
    features: tuple[str, ...] = ()
    """The columns of --csv to predict it from; all others by default."""
    drop_missing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave out the rows of --csv with blanks instead of refusing the file."""
    losses: tuple[str, ...] = COMPARED
    """The losses to compare, any of `robustloss.LOSSES`."""
    scale: float | None = None
    """The scale of the residuals, in units of the target; estimated by default."""
    steps: int = 5000
    """The most steps of a fit."""
    seed: int | None = None
    """Start from a random plane instead of the mean; a convex loss ends in the same place."""
    exact: bool = True
    """Exact fits too: the MM-estimate, and the minimum that a fit of MAE is measured against."""
    out: Path | None = None
    """Where to write; results/compare-NAME by default."""
    plots: bool = True
    """Draw the pictures."""


SMOKE = Config(losses=("squared_error", "huber"), exact=False)


class Result(NamedTuple):
    """The fits, losses in the order asked for, everything in the data's own units."""

    data: Data
    losses: tuple[str, ...]
    scale: float  # of the residuals, in units of the target
    scale_note: str
    deltas: np.ndarray  # NaN where a loss has none
    coefficients: np.ndarray  # (losses, 1 + features), the intercept first
    residuals: np.ndarray  # (losses, rows), fitted minus observed
    spreads: np.ndarray  # MAD / 0.6745 of each fit's residuals
    objectives: np.ndarray  # mean loss
    excesses: np.ndarray  # by how much of itself it is above the exact minimum
    weights: np.ndarray  # (losses, rows), relative to a typical row, at most 1
    steps: np.ndarray
    converged: np.ndarray
    kinked: np.ndarray  # whether a loss has no slope at its minimum
    drifts: np.ndarray  # by how much of itself the objective fell in the last tenth of the steps
    seconds: np.ndarray
    mm: rl.LinearFit | None  # with exact fits


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Fits every loss of the config to its data."""
    if not config.losses:
        raise UsageError(f"--losses needs at least one of {', '.join(rl.LOSSES)}.")
    names = tuple(dict.fromkeys(comparable(name) for name in config.losses))
    data = _data(config)
    if config.steps < 1:
        raise UsageError(f"--steps must be >= 1, got {config.steps}.")
    if config.scale is not None and not 0 < config.scale < np.inf:
        raise UsageError(f"--scale must be a positive number, got {config.scale}.")
    with jax.enable_x64(True):
        return _run(config, data, names, progress)


def _run(config: Config, data: Data, names: tuple[str, ...], progress: Progress) -> Result:
    _independent(data)
    center, spread = data.X.mean(0), data.X.std(0, ddof=1)
    target_center, target_spread = data.y.mean(), data.y.std(ddof=1)
    X = np.column_stack([np.ones(len(data.y)), (data.X - center) / spread])
    y = (data.y - target_center) / target_spread
    start = np.zeros(X.shape[1])
    if config.seed is not None:
        start = np.asarray(jax.random.normal(jax.random.key(config.seed), start.shape))
    seconds: dict[str, float] = {}

    def fit(name: str, delta: float, start: np.ndarray = start) -> rl.Fit:
        loss = with_delta(name, delta)
        optimizer = _adam(config.steps) if _has_kink(name) else _LBFGS
        begin = time.perf_counter()
        found = jax.block_until_ready(
            rl.fit(loss, _plane, start, X, y, optimizer=optimizer, steps=config.steps)
        )
        seconds.setdefault(name, time.perf_counter() - begin)  # the first one compiles
        return found

    progress(0, "scale")
    if config.scale is None:
        unit, note = _scale(fit, X, y, data)
    else:
        unit, note = config.scale / target_spread, "given by --scale"

    deltas, fits = [], []
    for i, name in enumerate(names):
        progress((1 + i) / (2 + len(names)), name)
        deltas.append(tuned(name, efficiency=0.95) * unit)
        # A redescending loss has more than one minimum: the one near Huber's fit is meant.
        redescends = name in redescending.__all__
        robust = fit("huber", tuned("huber", efficiency=0.95) * unit) if redescends else None
        fits.append(fit(name, deltas[-1], start if robust is None else robust.params))

    slopes = np.array([f.params for f in fits]) * target_spread
    slopes[:, 1:] /= spread
    slopes[:, 0] += target_center - slopes[:, 1:] @ center
    residuals = (np.array([f.params for f in fits]) @ X.T - y) * target_spread
    deltas = np.array(deltas) * target_spread
    described = [
        jax.device_get(_described(name, delta, r))
        for name, delta, r in zip(names, deltas, residuals, strict=True)
    ]
    progress((1 + len(names)) / (2 + len(names)), "exact fits")
    mm = jax.device_get(rl.fit_linear(data.X, data.y, rl.tukey)) if config.exact else None
    return Result(
        data=data,
        losses=names,
        scale=float(unit * target_spread),
        scale_note=note,
        deltas=deltas,
        coefficients=slopes,
        residuals=residuals,
        spreads=np.median(np.abs(residuals), axis=1) / _MAD_AT_NORMAL,
        objectives=np.array([objective for objective, *_ in described]),
        excesses=np.array(
            [
                _excess(name, X / target_spread, data if config.exact else None, *of)
                for name, of in zip(names, described, strict=True)
            ]
        ),
        weights=np.array([weights for _, weights, *_ in described]),
        steps=np.array([f.steps for f in fits]),
        converged=np.array([f.converged for f in fits]),
        kinked=np.array([_has_kink(name) for name in names]),
        drifts=np.array([_drift(f) for f in fits]),
        seconds=np.array([seconds[name] for name in names]),
        mm=mm,
    )


def check(result: Result) -> None:
    """All have converged, and no convex loss is smaller at another's fit than at its own."""
    for name, converged, kinked in zip(result.losses, result.converged, result.kinked, strict=True):
        require(kinked or converged, f"{name} did not converge; raise --steps")
    for i, name in enumerate(result.losses):
        if name in redescending.__all__:
            continue  # it may well have a lower minimum that follows the outliers
        loss = with_delta(name, result.deltas[i])
        with jax.enable_x64(True):
            best = min(float(rl.mean(loss, r)) for r in result.residuals)
            constant = float(rl.mean(loss, result.data.y - np.median(result.data.y)))
        slack, exact = (1e-3, 1e-5) if result.kinked[i] else (1e-9, 1e-12)
        limit = best * (1 + slack) + constant * exact  # the latter where the fit is perfect
        require(result.objectives[i] <= limit, f"{name} is smaller at another fit; raise --steps")


def findings(result: Result) -> list[str]:
    """What differs and what it means, in plain sentences."""
    said = []
    robust = next((n for n in ("huber", "pseudo_huber", "log_cosh") if n in result.losses), None)
    low = _low(result)
    if robust and "squared_error" in result.losses:
        said += _mse_against(result, robust, low[robust])
    if robust and len(low[robust]):
        weights = result.weights[result.losses.index(robust)]
        ends = [f"{w:.2g}" for w in (weights.min(), weights[weights < LOW].max())]
        said.append(
            f"In {title(robust)}'s fit the weight of {_rows(low[robust])} is "
            f"{' to '.join(dict.fromkeys(ends))} of a typical row's; in MSE's every row counts in "
            "full, and the largest residual pulls most."
        )
    unseen = _far_rows(result.data)
    if robust:
        near = np.abs(result.residuals[result.losses.index(robust)]) < 3 * result.scale
        unseen = np.intersect1d(unseen, result.data.rows[near])
    if robust and len(unseen):
        said.append(
            f"Far out in the features, yet near {title(robust)}'s fit: {_rows(unseen)}. No convex "
            "loss can tell a bad leverage point from a good one, and all of them give way to it: "
            f"look at {'it' if len(unseen) == 1 else 'them'} before you trust a number here."
        )
    for name, converged, kinked, steps, drift in zip(
        result.losses, result.converged, result.kinked, result.steps, result.drifts, strict=True
    ):
        if kinked and converged:
            said.append(
                f"{title(name)} came to rest where its gradient is exactly 0: its minimum is "
                "flat, other coefficients are as good, and these depend on the start."
            )
        elif kinked:
            said.append(
                f"{title(name)} is not reported as converged: its gradient jumps at the minimum "
                f"instead of getting small, so the fit took all its {steps} steps; over the last "
                f"tenth of them its objective fell by {drift:.1g} of itself."
            )
        elif not converged:
            said.append(f"{title(name)} did NOT converge in {steps} steps: raise --steps.")
    return said


def show(result: Result, console: Console) -> None:
    """The tables."""
    data = result.data
    console.print(
        f"{data.name}: {data.target} from {', '.join(data.features)}; "
        f"{len(data.y)} rows. {data.note}\n"
        f"Scale of the residuals: {result.scale:.6g} ({result.scale_note}).\n",
        highlight=False,
        markup=False,
    )

    table = Table(title="Coefficients", padding=0)
    columns = result.coefficients
    rough = result.kinked & ~result.converged
    heads = [title(name) for name in result.losses]
    if result.mm is not None:
        columns = np.vstack([columns, [result.mm.intercept, *result.mm.coefficients]])
        rough, heads = np.append(rough, False), [*heads, "MM"]
    for head in ("", *heads):
        table.add_column(head, overflow="fold")
    for term, values in zip(("intercept", *data.features), columns.T, strict=True):
        digits = [f"{v:.4g}" if r else f"{v:.6g}" for v, r in zip(values, rough, strict=True)]
        table.add_row(escape(term), *digits)
    console.print(table)

    table = Table(
        Column("loss", no_wrap=True),
        *("delta", "scale", "objective", "above", "steps", "converged", "s"),
        title="Fits",
        caption="scale: MAD / 0.6745 of the fit's residuals; objective: the mean loss; above: by\n"
        "how much of itself it is above the exact minimum; s: of the first fit, compiled",
    )
    for i, name in enumerate(result.losses):
        table.add_row(
            title(name),
            "-" if np.isnan(result.deltas[i]) else f"{result.deltas[i]:.4g}",
            f"{result.spreads[i]:.4g}",
            f"{result.objectives[i]:.5g}",
            _small(result.excesses[i]),
            str(result.steps[i]),
            "yes" if result.converged[i] else "no",
            f"{result.seconds[i]:.2f}",
        )
    console.print(table)

    table = Table(
        Column("loss", no_wrap=True),
        f"rows with less than {LOW:.0%} of a typical row's weight: weight",
    )
    for (name, rows), weights in zip(_low(result).items(), result.weights, strict=True):
        by_row = dict(zip(data.rows, weights, strict=True))
        if len(rows) > 12:
            text = f"{len(rows)} of {len(data.y)} rows"
        else:
            text = ", ".join(f"{row}: {by_row[row]:.2f}" for row in rows) or "none"
        table.add_row(title(name), text)
    console.print(table)
    if result.mm is not None:
        console.print(
            "\nMM: Tukey's loss at 95 % efficiency, from an S-estimate that just under half of "
            "the rows cannot carry off.\n\n" + result.mm.summary(data.features) + "\n",
            highlight=False,
            markup=False,
        )


def files(config: Config, result: Result) -> dict[str, bytes]:
    """What goes into the output folder."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("loss", "intercept", *result.data.features))
    table.writerows(
        (name, *map(float, row))
        for name, row in zip(result.losses, result.coefficients, strict=True)
    )
    if result.mm is not None:
        table.writerow(("mm", *map(float, (result.mm.intercept, *result.mm.coefficients))))
    written = {"coefficients.csv": text.getvalue().encode()}
    written["result.json"] = _results.record(
        config,
        data={"name": result.data.name, "rows": len(result.data.y), "note": result.data.note},
        scale={"value": result.scale, "from": result.scale_note},
        fits={
            name: {
                "delta": None if np.isnan(result.deltas[i]) else result.deltas[i],
                "coefficients": result.coefficients[i],
                "robust_scale": result.spreads[i],
                "objective": result.objectives[i],
                "above_the_minimum": result.excesses[i],
                "steps": result.steps[i],
                "converged": result.converged[i],
                "seconds": result.seconds[i],
                "low_weight_rows": _low(result)[name],
            }
            for i, name in enumerate(result.losses)
        },
        mm=None
        if result.mm is None
        else {
            **{name: value for name, value in vars(result.mm).items() if name[0] != "_"},
            "standard_errors": result.mm.standard_errors(),
        },
        findings=findings(result),
    )
    if config.plots:
        written |= {f"{name}.png": _results.render(f) for name, f in plot(result).items()}
    return written


def plot(result: Result) -> dict[str, Figure]:
    """`fit`: the data with the fits; `weights`: what each row counts; `losses`: the curves."""
    with mpl.rc_context(_plotting.STYLE):
        lines = len(result.data.features) == 1
        return {
            "fit": _lines(result) if lines else _residuals(result),
            "weights": _weights(result),
            "losses": _losses(result),
        }


def folder(config: Config) -> Path:
    """Where the results go."""
    name = config.csv.stem if config.csv else config.data or "phones"
    return config.out or Path("results") / f"compare-{name}"


_MAD_AT_NORMAL = 0.6744897501960817


def _scale(
    fit: Callable[[str, float], rl.Fit], X: np.ndarray, y: np.ndarray, data: Data
) -> tuple[float, str]:
    """MAD / 0.6745 of the residuals of Huber's fit, each found with the other, from MAE on.

    Where more than half of the residuals are 0, so is the MAD; then their mean size counts.
    """

    def residuals(found: rl.Fit) -> np.ndarray:
        return np.abs(X @ np.asarray(found.params) - y)

    size = residuals(fit("absolute_error", np.nan))
    exact = 1e-6  # of the target's spread: what a first-order fit leaves of an exact one
    for _ in range(200):
        scale = float(np.median(size)) / _MAD_AT_NORMAL
        if scale < exact:
            break
        size = residuals(fit("huber", tuned("huber", efficiency=0.95) * scale))
        if abs(np.median(size) / _MAD_AT_NORMAL - scale) <= 1e-9 * scale:
            return scale, "MAD / 0.6745 of Huber's residuals, found together with the fit"
    else:
        return scale, "MAD / 0.6745 of Huber's residuals after 200 rounds, not yet settled"
    mean = float(np.sqrt(np.pi / 2) * np.mean(size))
    if mean >= exact:
        return (
            mean,
            "half of the rows lie on the fit, so the MAD is 0; 1.25 mean |residual| instead",
        )
    return 1.0, "all rows lie on the fit; the standard deviation of the target instead"


def _data(config: Config) -> Data:
    if config.csv is None:
        for option, value in (("--target", config.target), ("--features", config.features)):
            if value:
                raise UsageError(f"{option} describes a --csv file, but none was given.")
        return load(config.data or "phones")
    if config.data is not None:
        raise UsageError("--data and --csv exclude each other; give one of them.")
    if config.target is None:
        raise UsageError("--csv needs --target, the name of the column to predict.")
    return read_csv(
        config.csv, config.target, config.features or None, drop_missing=config.drop_missing
    )


# An optimizer is part of the compiled program: the same one, or it compiles again.
_LBFGS = optax.lbfgs()


@cache
def _adam(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(0.1, steps))


@cache
def _has_kink(name: str) -> bool:
    return bool(np.isinf(jax.jit(partial(rl.weight, with_delta(name, 1.0)))(0.0)))


def _drift(found: rl.Fit) -> float:
    history = np.asarray(found.history)
    before, last = history[int(0.9 * int(found.steps))], history[int(found.steps)]
    return float(abs(before - last) / last) if last > 0 else 0.0


def _plane(params: jax.Array, X: jax.Array) -> jax.Array:
    return X @ params


def _excess(
    name: str, X: np.ndarray, data: Data | None, objective: float, _: np.ndarray,
    psi: np.ndarray, bend: np.ndarray,
) -> float:  # fmt: skip
    """How far above the exact minimum, over the objective: to second order, if it is smooth.

    With a kink it takes an exact fit to the data; NaN without.
    """
    if objective == 0:
        return 0.0
    if _has_kink(name):
        if data is None:
            return np.nan
        best = rl.fit_linear(data.X, data.y, with_delta(name, np.nan))
        exact = float(rl.mean(with_delta(name, np.nan), best.residuals))
        return max(objective - exact, 0.0) / objective
    slope = X.T @ psi
    step = np.linalg.lstsq(X.T @ (bend[:, None] * X), slope)[0]
    return float(abs(slope @ step) / 2 / len(psi) / objective)


@partial(jax.jit, static_argnums=0)
def _described(name: str, delta: float, residuals: jax.Array) -> tuple[jax.Array, ...]:
    """The mean loss, weights over that of a residual of typical (median) size, psi and psi'."""
    loss = with_delta(name, delta)
    weights = rl.weight(loss, residuals)
    unit = rl.weight(loss, jnp.median(jnp.abs(residuals)))
    relative = jnp.where(jnp.isinf(weights), 1.0, jnp.minimum(weights / unit, 1.0))
    return (
        rl.mean(loss, residuals),
        relative + 0.0,  # no -0
        rl.influence(loss, residuals),
        rl.curvature(loss, residuals),
    )


def _small(x: float) -> str:
    return "-" if np.isnan(x) else "< 1e-9" if x < 1e-9 else f"{x:.0e}"


def _low(result: Result) -> dict[str, np.ndarray]:
    """Per loss the rows that it gives less than LOW of a typical row's weight."""
    return {
        name: result.data.rows[weights < LOW]
        for name, weights in zip(result.losses, result.weights, strict=True)
    }


def _mse_against(result: Result, robust: str, low: np.ndarray) -> list[str]:
    """The slope that differs most between MSE and a robust loss, over a row's usual range."""
    data = result.data
    j, mse, other = _largest_gap(result, robust)
    slope = f"slope of {data.features[j]}" if len(data.features) > 1 else "slope"
    against = f"({mse[j]:.4g} against {other[j]:.4g})"
    times = _times(result, robust)
    if times is None:
        return [
            f"MSE and {title(robust)} nearly agree: the largest gap is in the {slope} {against}, "
            "within a quarter of the scale over that feature's spread."
        ]
    said = f"MSE's {slope} is {times} {title(robust)}'s {against}"
    keep = ~np.isin(data.rows, low)
    if len(low) > 0 and keep.sum() > data.X.shape[1] + 1:
        X = (data.X[keep] - data.X.mean(0)) / data.X.std(0)
        y = (data.y[keep] - data.y.mean()) / data.y.std()
        fitted = np.linalg.lstsq(np.column_stack([np.ones(len(y)), X]), y)[0]
        without = fitted[1 + j] * data.y.std() / data.X[:, j].std()
        if abs(without - other[j]) < 0.5 * abs(mse[j] - other[j]):
            verb = "is" if len(low) == 1 else "are"
            return [f"{said}; {_rows(low)} {verb} why: without, MSE gives {without:.4g}."]
        return [f"{said}; leaving out {_rows(low)}, MSE gives {without:.4g}."]
    return [f"{said}; no single row is why."]


def _largest_gap(result: Result, robust: str) -> tuple[int, np.ndarray, np.ndarray]:
    """The feature over whose spread MSE and a robust loss differ most, and their slopes."""
    mse, other = (
        result.coefficients[result.losses.index(n), 1:] for n in ("squared_error", robust)
    )
    return int(np.argmax(np.abs(mse - other) * result.data.X.std(0))), mse, other


def _times(result: Result, robust: str) -> str | None:
    """`2.5 times`, of that feature's slopes, or None where they nearly agree."""
    j, mse, other = _largest_gap(result, robust)
    if abs(mse[j] - other[j]) * result.data.X[:, j].std() < 0.25 * result.scale:
        return None
    if mse[j] * other[j] <= 0:
        return "of the other sign than"
    return f"{mse[j] / other[j]:.2g} times"


def _independent(data: Data) -> None:
    """Refuses a feature that is a combination of those before it: its slope would be anything."""
    X = (data.X - data.X.mean(0)) / data.X.std(0)
    for j in range(1, X.shape[1]):
        left = X[:, j] - X[:, :j] @ np.linalg.lstsq(X[:, :j], X[:, j])[0]
        if np.linalg.norm(left) < 1e-7 * np.linalg.norm(X[:, j]):
            raise UsageError(
                f"column {data.features[j]!r} is a linear combination of the features before it; "
                "leave it out with --features."
            )


def _far_rows(data: Data) -> np.ndarray:
    """Rows that are in some feature more than five robust deviations from its median."""
    distance = np.abs(data.X - np.median(data.X, axis=0))
    mad = np.median(distance, axis=0) / _MAD_AT_NORMAL
    return data.rows[np.any(distance > 5 * np.where(mad > 0, mad, data.X.std(0)), axis=1)]


def _rows(rows: Sequence[int]) -> str:
    """`row 7`, or `rows 3 and 15 to 20`."""
    runs: list[list[int]] = []
    for row in map(int, rows):
        if runs and row == runs[-1][1] + 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    if len(rows) > 30:
        return f"{len(rows)} rows"
    parts = []
    for a, b in runs:
        parts += [str(a), str(b)][: b - a + 1] if b - a < 2 else [f"{a} to {b}"]
    text = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    return f"{'row' if len(rows) == 1 else 'rows'} {text}"


def _lines(result: Result) -> Figure:
    data = result.data
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    x = data.X[:, 0]
    of, odd = _doubted(result)
    axes.plot(x[~odd], data.y[~odd], "o", color="0.35", ms=5, label="rows")
    if odd.any():
        label = f"low weight in {title(of)}"
        axes.plot(x[odd], data.y[odd], "o", mfc="white", mec="0.1", ms=7, label=label)
        _name_rows(axes, x[odd], data.y[odd], data.rows[odd])
    ends = np.array([x.min(), x.max()])
    for name, (intercept, slope) in zip(result.losses, result.coefficients, strict=True):
        style = _plotting.line(name)
        axes.plot(
            ends, intercept + slope * ends, lw=2.2, label=f"{title(name)} {slope:.3g}", **style
        )
    if result.mm is not None:
        intercept, slope = result.mm.intercept, result.mm.coefficients[0]
        fitted = intercept + slope * ends
        axes.plot(ends, fitted, lw=2.2, color="black", ls=(0, (1, 1)), label=f"MM {slope:.3g}")
    axes.set(xlabel=data.features[0], ylabel=data.target, title=_headline(result))
    axes.legend(title="loss and slope", loc="best", fontsize=10)
    return figure


def _residuals(result: Result) -> Figure:
    data, count = result.data, len(result.losses)
    figure = Figure(figsize=(9, 1.2 + 1.5 * count))
    rows = np.atleast_1d(figure.subplots(count, 1, sharex=True, sharey=True))
    shown = -result.residuals / result.scale
    many = len(data.y) > FEW
    limit = 1.3 * np.quantile(np.abs(shown), 0.9995 if many else 1.0)
    for axes, name, values, weights in zip(rows, result.losses, shown, result.weights, strict=True):
        color = _plotting.color(name)
        axes.axhline(0, color="0.7", lw=1)
        low = weights < LOW
        if many:
            style = {"color": color, "rasterized": True, "lw": 0}
            axes.plot(data.rows, values, marker=".", ms=2, alpha=0.3, mew=0, **style)
            for sign, marker in ((1, "^"), (-1, "v")):
                off = sign * values > limit
                axes.plot(data.rows[off], np.full(off.sum(), 0.96 * sign * limit), marker, **style)
        else:
            axes.vlines(data.rows, 0, values, color=color, lw=1.5)
            axes.plot(data.rows[~low], values[~low], "o", color=color, ms=4)
            axes.plot(data.rows[low], values[low], "o", mfc="white", mec=color, ms=6)
            for row, value in zip(data.rows[low], values[low], strict=True):
                axes.annotate(
                    str(row), (row, value), (0, 6 if value > 0 else -6), fontsize=8,
                    textcoords="offset points", ha="center", va="bottom" if value > 0 else "top",
                )  # fmt: skip
        axes.set_ylabel(title(name))
    rows[0].set_ylim(-limit, limit)
    key = "triangles: beyond the frame" if many else "hollow: low weight"
    rows[0].set_title(f"Observed - fitted, in units of the robust scale; {key}")
    rows[-1].set_xlabel("row")
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _weights(result: Result) -> Figure:
    data = result.data
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    if len(data.y) > FEW:
        share = np.linspace(0, 100, len(data.y))
        for name, weights in zip(result.losses, result.weights, strict=True):
            label, style = title(name), _plotting.line(name)
            axes.plot(share, np.sort(weights), lw=2.2, label=label, **style)
        axes.set(xlabel="rows, the least trusted first (%)", xlim=(0, 100))
    else:
        for i, (name, weights) in enumerate(zip(result.losses, result.weights, strict=True)):
            beside = 0.12 * (i - (len(result.losses) - 1) / 2)
            marker, color = _plotting.MARKERS[i % 10], _plotting.color(name)
            axes.plot(data.rows + beside, weights, marker, color=color, ms=5, label=title(name))
        axes.set(xlabel="row", xlim=(data.rows.min() - 1, data.rows.max() + 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(LOW, color="0.7", lw=1, zorder=0)
    axes.set(
        ylabel="weight, of a typical row's",
        ylim=(-0.03, 1.05),
        title="What each row counts in each fit",
    )
    axes.legend(ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _losses(result: Result) -> Figure:
    figure = Figure(figsize=(11, 3.8))
    views = (
        (lambda f, r: f(r), r"loss $\rho(r)$", (0, 6)),
        (rl.influence, r"influence $\psi(r) = \rho'(r)$", (-3, 3)),
        (rl.weight, r"weight $w(r) = \psi(r)/r$", (0, 2.1)),
    )
    panels = figure.subplots(1, 3)
    with jax.enable_x64(True):
        r = np.linspace(-5, 5, 1001)
        for axes, (view, label, limits) in zip(panels, views, strict=True):
            for name, delta in zip(result.losses, result.deltas / result.scale, strict=True):
                values = np.asarray(view(with_delta(name, delta), r))
                axes.plot(r, values, lw=2, label=title(name), **_plotting.line(name))
            axes.set(title=label, ylim=limits, xlim=(-5, 5), xlabel="residual / scale")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _doubted(result: Result) -> tuple[str, np.ndarray]:
    """A loss that bounds its influence smoothly, and the rows that have a low weight in it."""
    for name, weights in zip(result.losses, result.weights, strict=True):
        if name not in ("squared_error", "absolute_error"):
            return name, weights < LOW
    return "", np.zeros(len(result.data.y), bool)


def _name_rows(axes: Axes, x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> None:
    """Numbers beside points, but for those that would sit on another number."""
    named: list[np.ndarray] = []
    for row, at in zip(rows, np.column_stack([x, y]), strict=True):
        place = axes.transAxes.inverted().transform(axes.transData.transform(at))
        if all(np.any(np.abs(place - other) > (0.03, 0.05)) for other in named):
            axes.annotate(str(row), at, (-7, 4), textcoords="offset points", fontsize=9, ha="right")
            named.append(place)


def _headline(result: Result) -> str:
    name = result.data.name
    if not {"squared_error", "huber"} <= set(result.losses):
        return f"{name}: {result.data.target} by {result.data.features[0]}"
    times = _times(result, "huber")
    if times is None:
        return f"{name}: MSE and Huber draw nearly the same line"
    return f"{name}: MSE's slope is {times} Huber's"
