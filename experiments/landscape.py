"""Does MAE or MSE make any real difference, and when is the landscape convex?

Draws the surface of each loss over the two parameters of a line and of one neuron with a tanh. Many
data sets with outliers and a known truth show where the minimum is, whether the surface is convex,
the path of an optimiser, and the share of random starts that end in the best minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
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
from experiments._descent import descend
from experiments._distribution import distribute
from experiments._losses import fix_parameters, has_delta, set_delta, title, tune_delta
from robustloss.losses import asymmetric, convex, redescending

MODELS: dict[str, Callable[[Array, Array], Array]] = {
    "line": lambda b, x: b[0] + b[1] * x,
    "neuron": lambda b, x: jnp.tanh(b[0] + b[1] * x),
}
TRUTH = np.array([0.5, 1.5])
NOISE = 0.1
LIMIT = 4.0  # surfaces and starts are within this distance from 0, in each parameter
GRID = 61
SHOWN = ("squared_error", "absolute_error", "huber", "tukey")


@dataclass(frozen=True)
class Config:
    """Settings of `landscape`."""

    losses: tuple[str, ...] = ()
    """Losses of `robustloss.LOSSES`; by default all that are 0 at 0 and not asymmetric."""
    rows: int = 40
    """Rows of each data set."""
    outliers: float = 0.2
    """The share of the rows whose y is put below all others."""
    sets: int = 20
    """Data sets."""
    starts: int = 50
    """Random starts in each data set."""
    steps: int = 400
    """Steps of Adam, whose step size decreases to 0."""
    seed: int = 0
    """The seed of the data and the starts."""
    out: Path | None = None
    """The output folder; results/landscape by default."""
    plots: bool = True
    """Draw the pictures."""


SMOKE = Config(losses=SHOWN, sets=3, starts=20, steps=300)


class Found(NamedTuple):
    """The surface and the minima of one loss and model."""

    surface: np.ndarray  # on the grid, of the first data set
    convex: bool  # on the grid, the surface bends down in no direction
    path: np.ndarray  # the parameters by step from one start, in the first data set
    best: np.ndarray  # the parameters of the best end in the first data set
    share: float  # of the starts that end in the best minimum, over all sets
    error: float  # the median distance of the best minimum from the truth


class Result(NamedTuple):
    """The surfaces and minima by loss and model."""

    losses: tuple[str, ...]
    outliers: float
    found: dict[tuple[str, str], Found]


def run(
    config: Config, progress: Progress = ignore_progress, cache: Cache = compute_arrays
) -> Result:
    """Computes every surface and descends from every start."""
    for option, least in (("rows", 10), ("sets", 1), ("starts", 2), ("steps", 100)):
        if getattr(config, option) < least:
            raise UsageError(f"--{option} must be >= {least}, got {getattr(config, option)}.")
    if not 0 <= config.outliers < 0.5:
        raise UsageError(f"--outliers must be in [0, 0.5), got {config.outliers}.")
    known = tuple(
        name
        for name in rl.LOSSES
        if fix_parameters(name)(0.0) == 0
        and name not in asymmetric.__all__  # these fit quantiles or expectiles
    )
    for name in config.losses:
        if name not in known:
            raise UsageError(f"--losses takes {', '.join(known)}, got {name!r}.")
    if config.losses and not set(SHOWN) <= set(config.losses):
        raise UsageError(f"--losses needs {', '.join(SHOWN)}, got {', '.join(config.losses)}.")
    losses = tuple(name for name in known if name in (config.losses or known))
    found = {}
    with jax.enable_x64(True):
        for i, name in enumerate(losses):
            for j, model in enumerate(MODELS):
                progress((i + j / 2) / len(losses), f"{title(name)}, {model}")
                arrays = cache(f"{name}-{model}", partial(_measure_loss, config, name, model))
                values = (np.asarray(arrays[key]) for key in Found._fields)
                found[name, model] = Found(*(v if v.ndim else v.item() for v in values))
    return Result(losses, config.outliers, found)


def check(result: Result) -> None:
    """Convex losses have one minimum for a line and can have more for a neuron."""
    shares = []
    for name in result.losses:
        line, neuron = (result.found[name, model] for model in MODELS)
        if name in redescending.__all__:
            require(not line.convex, f"{title(name)} is convex")
            continue
        if name not in convex.__all__:
            continue
        require(line.convex, f"{title(name)} of a line is not convex")
        require(
            line.share == 1,
            f"{title(name)} of a line: {line.share:.0%} of starts reach the best minimum",
        )
        require(not neuron.convex, f"{title(name)} of a neuron is convex")
        shares.append(neuron.share)
    require(min(shares) < 0.95, "for a neuron, every start ends in the best minimum")
    mse, mae = (result.found[name, "line"].error for name in ("squared_error", "absolute_error"))
    require(mae < mse / 3, "MAE's minimum is not three times nearer to the truth than MSE's")


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    mse, mae = (
        [result.found[name, model] for model in MODELS]
        for name in ("squared_error", "absolute_error")
    )
    low, high = (
        f(result.found[name, "neuron"].share for name in result.losses if name in convex.__all__)
        for f in (min, max)
    )
    return [
        "For a model that is linear in its parameters a convex loss has one minimum, which every "
        "start reaches; redescending losses have more. With a tanh no surface is convex, and "
        f"{low:.0%} to {high:.0%} of random starts end in the best minimum of a convex loss.",
        f"The choice of MAE or MSE decides where the minimum is: with {result.outliers:.0%} of the "
        f"rows bad, MSE's minimum is {mse[0].error:.2f} from the truth for the line and "
        f"{mse[1].error:.2f} for the neuron, MAE's {mae[0].error:.2f} and {mae[1].error:.2f}.",
    ]


def show(result: Result, console: Console) -> None:
    """Prints the table."""
    table = Table(
        "loss", *[f"{m}: {w}" for m in MODELS for w in ("convex", "best end", "error")],
        title="best end: starts that end in the best minimum; error: its distance from the truth",
    )  # fmt: skip
    for name in result.losses:
        cells = []
        for model in MODELS:
            found = result.found[name, model]
            cells += ["yes" if found.convex else "no", f"{found.share:.0%}", f"{found.error:.2f}"]
        table.add_row(title(name), *cells)
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    described = {
        f"{name}, {model}": {"convex": f.convex, "share": f.share, "error": f.error}
        for (name, model), f in result.found.items()
    }
    written = {"result.json": _results.record(config, found=described)}
    if config.plots:
        written["landscape.png"] = _results.render(plot(result))
        if result.losses != SHOWN:
            written["landscape-all.png"] = _results.render(plot(result, result.losses))
    return written


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "landscape"


def plot(result: Result, names: tuple[str, ...] = SHOWN) -> Figure:
    """The surfaces, a row for each model, with the path of Adam, the minimum and the truth."""
    with mpl.rc_context(_plotting.STYLE):
        columns = min(len(names), 5)
        bands = -(-len(names) // columns)
        figure = Figure(figsize=(2.6 * columns, 5.6 * bands))
        axes = figure.subplots(2 * bands, columns, sharex=True, sharey=True, squeeze=False)
        grid = np.linspace(-LIMIT, LIMIT, GRID)
        for i, name in enumerate(names):
            for j, model in enumerate(MODELS):
                panel = axes[2 * (i // columns) + j, i % columns]
                found = result.found[name, model]
                levels = np.quantile(found.surface, np.linspace(0, 1, 15))
                panel.contourf(
                    grid, grid, found.surface, np.unique(levels), cmap="cividis_r"
                )  # each level covers the same area
                panel.plot(*found.path.T, color="white", lw=2.5)
                panel.plot(*found.path.T, color="black", lw=1.2, label="path of Adam")
                panel.plot(*found.best, "o", color=_plotting.VERMILLION, ms=7, label="best minimum")
                panel.plot(*TRUTH, "*", color="white", mec="black", ms=13, label="truth")
                panel.set_title(f"{title(name)}, {model}", fontsize=11)
                panel.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT))
        for panel in axes.flat[(len(names) % columns and len(names)) or len(axes.flat) :]:
            panel.set_visible(panel.has_data())
        for panel in axes[-1]:
            panel.set_xlabel("intercept")
        for panel in axes[:, 0]:
            panel.set_ylabel("slope")
        if names == SHOWN:
            figure.suptitle(
                "A convex loss is convex for a line, not for a neuron; the loss decides where the "
                "minimum is", fontweight="bold", fontsize=12,
            )  # fmt: skip
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3)
        return figure


def _measure_loss(config: Config, name: str, model: str) -> dict[str, Any]:
    delta = tune_delta(name, efficiency=0.95) if has_delta(name) else 1.0
    loss = set_delta(name, (1.0 if np.isnan(delta) else delta) * NOISE)
    predict = MODELS[model]
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, config.steps))

    def objective(b: Array, x: Array, y: Array) -> Array:
        return rl.mean(loss, predict(b, x), y)

    def fit_start(item: tuple[Array, Array]) -> tuple[Array, Array]:
        start, set_index = item
        found = rl.fit(
            loss, predict, start, x[set_index], y[set_index],
            optimizer=optimizer, steps=config.steps, tolerance=0.0,
        )  # fmt: skip
        return found.params, found.value

    key = jax.random.key(config.seed)
    x, y = jax.vmap(partial(_draw_data, config, model))(jax.random.split(key, config.sets))
    starts = jax.random.uniform(
        jax.random.fold_in(key, 1), (config.sets * config.starts, 2), minval=-LIMIT, maxval=LIMIT
    )
    set_index = np.repeat(np.arange(config.sets), config.starts)
    distributed = distribute(fit_start, group=None)((starts, set_index))
    ends, values = (np.asarray(v).reshape(config.sets, config.starts, -1) for v in distributed)
    values = values[..., 0]
    best = values.min(axis=1, keepdims=True)
    reference = np.asarray(jax.vmap(lambda x, y: objective(jnp.array([9.0, 0.0]), x, y))(x, y))
    successes = values <= best + 0.01 * np.abs(reference[:, None] - best)
    lowest = ends[np.arange(config.sets), values.argmin(1)]

    grid = jnp.linspace(-LIMIT, LIMIT, GRID)
    points = jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    surface = jax.jit(jax.vmap(lambda b: objective(b, x[0], y[0])))(points)
    return {
        "surface": np.asarray(surface).reshape(GRID, GRID),
        "convex": _is_convex(np.asarray(surface).reshape(GRID, GRID)),
        "path": _trace_descent(objective, optimizer, config.steps, x[0], y[0]),
        "best": lowest[0],
        "share": successes.mean(),
        "error": np.median(np.linalg.norm(lowest - TRUTH, axis=1)),
    }


def _is_convex(surface: np.ndarray) -> bool:
    """Whether no triple of points on the grid, along eight directions, bends down."""
    noise = 1e-9 * np.ptp(surface)
    for a, b in ((1, 0), (0, 1), (1, 1), (1, -1), (2, 1), (1, 2), (2, -1), (1, -2)):
        n = len(surface)
        i = slice(a, n - a)
        j = slice(abs(b), n - abs(b))
        ahead = surface[2 * a :, abs(b) + b : n - abs(b) + b]
        behind = surface[: n - 2 * a, abs(b) - b : n - abs(b) - b]
        if np.any(ahead + behind - 2 * surface[i, j] < -noise):
            return False
    return True


def _trace_descent(objective: Any, optimizer: Any, steps: int, x: Array, y: Array) -> np.ndarray:
    descend_path = partial(descend, lambda b: objective(b, x, y), optimizer, steps=steps)
    return np.asarray(jax.jit(descend_path)(jnp.array([-3.0, -1.0]))[1])


def _draw_data(config: Config, model: str, key: Array) -> tuple[Array, Array]:
    x_key, y_key = jax.random.split(key)
    x = jax.random.uniform(x_key, (config.rows,), minval=-2.0, maxval=2.0)
    y = MODELS[model](jnp.asarray(TRUTH), x) + NOISE * jax.random.normal(y_key, x.shape)
    bad = jnp.arange(config.rows) < config.outliers * config.rows
    return x, jnp.where(bad, -1.5 if model == "neuron" else -6.0, y)
