"""What does robustness cost on clean data, and what does it gain where the tails are heavy?

Measures the variance of MSE's fit over that of each other loss, for normal, Laplace, Student-t and
contaminated normal noise. The measurements are thousands of linear fits; they have Monte-Carlo
error bars and are compared with the asymptotic theory. The scale of the noise is taken as known:
half of the noise is within 0.6745.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jax import Array
from jax.scipy.stats import laplace, norm, t
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
from experiments._linear_fits import fit_losses, resolve_losses
from experiments._losses import has_delta, set_delta, title, tune_delta

LOSSES = (
    "squared_error", "absolute_error", "huber", "log_cosh", "pseudo_huber", "cauchy", "tukey",
)  # fmt: skip
_QUARTILE = 0.6744897501960817  # half of the standard normal distribution is within +-this


class Law(NamedTuple):
    """A distribution of errors."""

    draw: Callable[..., Array]  # (key, shape)
    density: Callable[[Array], Array]
    unit: float  # the half-width that holds half of the draws, over 0.6745


def _contaminated(key: Array, shape: tuple[int, ...]) -> Array:
    key_share, key_noise = jax.random.split(key)
    spread = jnp.where(jax.random.bernoulli(key_share, 0.1, shape), 5.0, 1.0)
    return spread * jax.random.normal(key_noise, shape)


LAWS = {  # units follow from the quartiles; that of the last law is a numerical solution
    "normal": Law(jax.random.normal, norm.pdf, 1.0),
    "Laplace": Law(jax.random.laplace, laplace.pdf, np.log(2) / _QUARTILE),
    "Student t, 3 df": Law(
        lambda key, shape: jax.random.t(key, 3.0, shape),
        partial(t.pdf, df=3.0),
        0.764892328 / _QUARTILE,
    ),
    "10 % with 5 sd": Law(
        _contaminated, lambda x: 0.9 * norm.pdf(x) + 0.1 * norm.pdf(x, scale=5.0), 1.1013630745
    ),
}


@dataclass(frozen=True)
class Config:
    """Settings of `efficiency`."""

    losses: tuple[str, ...] = LOSSES
    """The losses to fit; MSE, MAE and Huber's loss must be among them."""
    rows: int = 400
    """Rows of each data set."""
    features: int = 4
    """Features of each data set, without the intercept."""
    sets: int = 640
    """Data sets for each law."""
    chunk: int = 640
    """Data sets in one compiled call."""
    seed: int = 0
    """The seed of the data."""
    out: Path | None = None
    """The output folder; results/efficiency by default."""
    plots: bool = True
    """Draw the picture."""


SMOKE = Config(
    losses=("squared_error", "absolute_error", "huber"), rows=100, features=2, sets=160, chunk=320
)


class Result(NamedTuple):
    """Arrays by law and loss."""

    losses: tuple[str, ...]
    laws: tuple[str, ...]
    measured: np.ndarray  # variance of MSE's fit over variance of the loss's fit
    errors: np.ndarray  # the standard errors of `measured`
    theory: np.ndarray
    unconverged: float
    fits: int
    rows: int
    parameters: int


def run(
    config: Config, progress: Progress = ignore_progress, cache: Cache = compute_arrays
) -> Result:
    """Fits every loss to every data set."""
    config = replace(config, losses=resolve_losses(config.losses))
    for option, least in (("sets", 20), ("chunk", 1), ("features", 1)):
        if getattr(config, option) < least:
            raise UsageError(f"--{option} must be >= {least}, got {getattr(config, option)}.")
    if config.rows < 10 * (config.features + 1):
        raise UsageError(
            f"--rows must be at least 10 times the parameters, got {config.rows} for "
            f"{config.features + 1}."
        )
    with jax.enable_x64(True):
        return _run(config, progress, cache)


def _run(config: Config, progress: Progress, cache: Cache) -> Result:
    laws = tuple(LAWS)
    law_indices = np.repeat(np.arange(len(laws)), config.sets)
    seeds = np.tile(np.arange(config.sets), len(laws))
    key = jax.random.key(config.seed)

    def fit_set(item: tuple[Array, Array]) -> tuple[Array, Array]:
        seed, law = item
        X_key, y_key = jax.random.split(jax.random.fold_in(key, seed))
        X = jax.random.normal(X_key, (config.rows, config.features))
        draws = [partial(_noise, name, (config.rows,)) for name in laws]
        return fit_losses(config.losses, X, jax.lax.switch(law, draws, y_key))

    fits = distribute(fit_set)
    params, converged = [], []
    for first in range(0, len(seeds), config.chunk):
        progress(first / len(seeds), "fits by optax")
        index = np.arange(first, first + config.chunk) % len(seeds)

        def chunk(index: np.ndarray = index) -> dict[str, Any]:
            return dict(
                zip(("params", "converged"), fits((seeds[index], law_indices[index])), strict=True)
            )

        found = cache(f"fits-{first}", chunk)
        params.append(found["params"])
        converged.append(found["converged"])
    b = np.concatenate(params)[: len(seeds)]
    square = np.sum(b**2, axis=-1).reshape(len(laws), config.sets, -1)  # the truth is 0
    variance = square.mean(1)
    measured = variance[:, :1] / variance
    spread = square[..., :1] - measured[:, None] * square
    errors = np.sqrt(np.sum(spread**2, axis=1)) / np.sum(square, axis=1)
    return Result(
        config.losses,
        laws,
        measured,
        errors,
        np.array([[compute_theory(law, name) for name in config.losses] for law in laws]),
        float(1 - np.concatenate(converged)[: len(seeds)].mean()),
        b.shape[0] * b.shape[1],
        config.rows,
        config.features + 1,
    )


def compute_theory(law: str, name: str) -> float:
    """The asymptotic variance of MSE's fit over that of the loss's, E psi**2 / (E psi')**2."""
    delta = tune_delta(name, efficiency=0.95) if has_delta(name) else 1.0
    joint = [delta, np.nextafter(delta, np.inf)]  # the curvature can jump between these two
    grid = np.concatenate([np.linspace(0, 30, 300_001), np.geomspace(30, 1e5, 100_001)[1:]])
    grid = np.sort(np.append(grid, joint))
    unit = LAWS[law].unit
    density = 2 * unit * np.asarray(LAWS[law].density(grid * unit))

    def mean(values: Any) -> float:
        return float(np.trapezoid(np.asarray(values) * density, grid))

    variance = mean(grid**2)
    if name == "absolute_error":
        return variance * density[0] ** 2
    loss = set_delta(name, delta)
    psi, bend = (jax.jit(partial(view, loss))(grid) for view in (rl.influence, rl.curvature))
    return variance * mean(bend) ** 2 / mean(psi**2)


def check(result: Result) -> None:
    """Every measured efficiency but one is within its Monte-Carlo error of the theory.

    The exception is MAE on Laplace noise, which approaches the theory as rows**-0.5 instead of
    1 / rows: the density has a kink at the point where the slope of the loss jumps.
    """
    require(result.unconverged < 0.01, f"{result.unconverged:.1%} of the fits did not converge")
    deviation = np.abs(result.measured - result.theory) / np.maximum(result.errors, 1e-12)
    exception = result.laws.index("Laplace"), result.losses.index("absolute_error")
    shortfall = 1 - result.measured[exception] / result.theory[exception]
    noise = 4 * result.errors[exception] / result.theory[exception]
    limit = result.parameters / np.sqrt(result.rows)
    require(
        -noise < shortfall < limit + noise, f"MAE on Laplace noise falls short by {shortfall:.0%}"
    )
    deviation[exception] = 0
    deviation[:, 0] = 0  # MSE relative to itself
    law, loss = np.unravel_index(np.argmax(deviation), deviation.shape)
    require(
        deviation.max() < 4,
        f"{title(result.losses[loss])} at {result.laws[law]} noise is {deviation.max():.1f} "
        "standard errors from the theory",
    )
    normal = dict(zip(result.losses, result.theory[0], strict=True))
    require(abs(normal["absolute_error"] - 2 / np.pi) < 1e-6, "MAE's theory is not 2 / pi")
    require(abs(normal["huber"] - 0.95) < 1e-6, "Huber's theory is not 0.95")


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    texts = {
        (law, name): f"{result.measured[i, j]:.2f} ± {result.errors[i, j]:.2f}"
        for i, law in enumerate(result.laws)
        for j, name in enumerate(result.losses)
    }
    return [
        f"On normal noise MAE has {texts['normal', 'absolute_error']} of MSE's efficiency "
        f"(theory: {result.theory[0, result.losses.index('absolute_error')]:.3f}) and Huber's loss "
        f"{texts['normal', 'huber']} (0.950): for MSE's accuracy MAE needs half as many rows "
        "again, Huber's loss a twentieth.",
        f"On Laplace noise MAE has {texts['Laplace', 'absolute_error']} times MSE's efficiency "
        f"with {result.rows} rows; the efficiency approaches 2 as rows^-1/2. "
        "On noise of which a tenth is five times as wide, Huber's loss has "
        f"{texts['10 % with 5 sd', 'huber']} times MSE's efficiency.",
        f"{result.fits:,} fits, {result.unconverged:.2%} unconverged; every efficiency but that of "
        "MAE on Laplace noise is within 4 standard errors of the asymptotic theory.",
    ]


def show(result: Result, console: Console) -> None:
    """Prints the table."""
    table = Table(
        "loss", *result.laws,
        title="Variance of MSE's fit over variance of the loss's fit: measured ± se (theory)",
    )  # fmt: skip
    for j, name in enumerate(result.losses):
        table.add_row(
            title(name),
            *[
                f"{m[j]:.3f} ± {e[j]:.3f} ({t[j]:.3f})"
                for m, e, t in zip(result.measured, result.errors, result.theory, strict=True)
            ],
        )
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    written = {"result.json": _results.record(config, **result._asdict())}
    if config.plots:
        written["efficiency.png"] = _results.render(plot(result))
    return written


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "efficiency"


def plot(result: Result) -> Figure:
    """By law, the measured efficiencies with error bars on bars of the theory."""
    with mpl.rc_context(_plotting.STYLE):
        figure = Figure(figsize=(10, 4.6))
        axes = figure.subplots()
        width = 0.8 / len(result.losses)
        for j, name in enumerate(result.losses):
            x = np.arange(len(result.laws)) + (j - (len(result.losses) - 1) / 2) * width
            points = _plotting.get_points(name)
            axes.bar(x, result.theory[:, j], 0.9 * width, color=points["color"], alpha=0.45)
            axes.errorbar(
                x, result.measured[:, j], 2 * result.errors[:, j], fmt=points["marker"],
                color="black", ms=4, capsize=2,
            )  # fmt: skip
            axes.bar(0, 0, color=points["color"], alpha=0.45, label=title(name))
        axes.axhline(1, color="0.4", lw=0.8)
        axes.set_xticks(range(len(result.laws)), [f"{law} noise" for law in result.laws])
        axes.set(
            title="Tuned losses lose 5 % on normal noise and gain much on heavy tails",
            ylabel="efficiency relative to MSE",
            ylim=(0, 1.2 * result.theory.max()),
        )
        axes.errorbar([], [], [], fmt="o", color="black", ms=4, capsize=2, label="measured, ± 2 se")
        axes.legend(loc="upper left", ncols=4, fontsize=10)
        return figure


def _noise(law: str, shape: tuple[int, ...], key: Array) -> Array:
    return LAWS[law].draw(key, shape) / LAWS[law].unit
