"""Does a learned shape find the right loss?

Compares `general_nll`, whose alpha and scale are learned along with the model, with fixed losses.
The models are linear fits under the noise laws of `efficiency` and the network of `network` with
corrupted targets. The learned shape should be near the best fixed loss under every law, though it
does not know the law.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from experiments import network as networks
from experiments._descent import descend
from experiments._distribution import distribute
from experiments._linear_fits import fit_losses
from experiments._losses import title
from experiments.efficiency import LAWS

FIXED = ("squared_error", "absolute_error", "huber", "cauchy")
LEARNED = "learned alpha"


@dataclass(frozen=True)
class Config:
    """Settings of `adaptive`."""

    rows: int = 400
    """Rows of each data set."""
    features: int = 4
    """Features of each data set, without the intercept."""
    sets: int = 200
    """Data sets for each law."""
    steps: int = 600
    """Steps of Adam in the fits with a learned shape."""
    seed: int = 0
    """The seed of all random numbers."""
    share: float = 0.2
    """The share of the network's training targets that is corrupted; 0 to 0.5."""
    train: networks.Config = networks.Config(epochs=12, seeds=2)  # noqa: RUF009  (frozen)
    """The settings of the network; its losses, shares and seed are not used."""
    out: Path | None = None
    """The output folder; results/adaptive by default."""
    plots: bool = True
    """Draw the picture."""


SMOKE = Config(
    rows=150, features=1, sets=48, steps=400,
    train=networks.Config(rows=3000, hidden=16, epochs=6, seeds=1),
)  # fmt: skip


class Result(NamedTuple):
    """Arrays by law and estimator, and the errors of the network."""

    names: tuple[str, ...]
    laws: tuple[str, ...]
    efficiency: np.ndarray  # variance of MSE's fit over variance of the estimator's fit
    alphas: np.ndarray  # by law and data set
    network: dict[str, float]  # the test MAE by training loss
    network_alpha: float


def run(
    config: Config, progress: Progress = ignore_progress, cache: Cache = compute_arrays
) -> Result:
    """Fits the lines, then trains the networks."""
    for option, least in (("sets", 10), ("features", 1), ("steps", 100)):
        if getattr(config, option) < least:
            raise UsageError(f"--{option} must be >= {least}, got {getattr(config, option)}.")
    if not 0 <= config.share < 0.5:
        raise UsageError(f"--share must be in [0, 0.5), got {config.share}.")
    train_settings = replace(config.train, seed=config.seed)
    networks.check_settings(train_settings)
    laws = tuple(LAWS)
    law_indices = np.repeat(np.arange(len(laws)), config.sets)
    seeds = np.tile(np.arange(config.sets), len(laws))
    with jax.enable_x64(True):
        progress(0.0, "linear fits")
        fits = distribute(partial(_fit_set, config, laws))
        found = cache(
            "fits", lambda: dict(zip(("b", "alpha"), fits((seeds, law_indices)), strict=True))
        )
    square = np.sum(found["b"] ** 2, axis=-1).reshape(len(laws), config.sets, -1)
    variance = square.mean(1)

    progress(0.6, "networks")
    split = networks.load_split(train_settings.rows, config.seed)
    network = {}
    for name in (*FIXED, LEARNED):
        loss, learned = networks.tune_loss(name) if name != LEARNED else _unconstrained_nll, None
        if name == LEARNED:
            learned = {"alpha": jnp.zeros(()), "scale": jnp.log(networks.SPREAD)}
        train = partial(networks.train_networks, train_settings, split, loss, (config.share,))
        trained = cache(f"network-{name}", partial(train, learned=learned))
        network[name] = float(np.mean(trained["errors"][..., -1, 0]))
    alpha, _ = _constrain(trained)
    return Result(
        (*FIXED, LEARNED), laws, variance[:, :1] / variance,
        found["alpha"].reshape(len(laws), config.sets), network, float(np.mean(alpha)),
    )  # fmt: skip


def check(result: Result) -> None:
    """The learned shape is near the best fixed loss under every law and larger for light tails."""
    learned = result.efficiency[:, -1]
    best = result.efficiency[:, :-1].max(axis=1)
    for law, value, highest in zip(result.laws, learned, best, strict=True):
        require(
            value > 0.75 * highest,
            f"on {law} noise the efficiency is {value:.2f}, that of the best loss {highest:.2f}",
        )
    typical = dict(zip(result.laws, np.median(result.alphas, axis=1), strict=True))
    require(typical["normal"] > 1.5, f"alpha on normal noise is {typical['normal']:.2f}")
    others = [alpha for law, alpha in typical.items() if law != "normal"]
    require(max(others) < 1.2, f"alpha on noise with heavy tails is up to {max(others):.2f}")
    network = result.network
    require(network[LEARNED] < network["squared_error"] / 2, "the network is as bad as MSE's")
    require(network[LEARNED] < 1.1 * network["huber"], "the network is worse than Huber's")


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    typical = np.median(result.alphas, axis=1)
    alphas = ", ".join(f"{a:.2f} ({law})" for a, law in zip(typical, result.laws, strict=True))
    share = (result.efficiency[:, -1] / result.efficiency[:, :-1].max(axis=1)).min()
    errors = result.network
    return [
        f"The learned alpha is {alphas}: 2 is normal, 0 Cauchy. The fit does not know the law, and "
        f"has at least {share:.0%} of the efficiency of the best of "
        f"{', '.join(title(name) for name in FIXED)}.",
        f"The network with corrupted targets learns alpha = {result.network_alpha:.2f}. Its test "
        f"MAE is {errors[LEARNED]:.2f}; that of MSE is {errors['squared_error']:.2f}, of Huber "
        f"{errors['huber']:.2f} and of Cauchy {errors['cauchy']:.2f} (100,000 dollars).",
    ]


def show(result: Result, console: Console) -> None:
    """Prints the table."""
    table = Table(
        "estimator", *result.laws, "network: test MAE",
        title="Variance of MSE's fit over that of the estimator's",
    )  # fmt: skip
    for j, name in enumerate(result.names):
        table.add_row(
            name if name == LEARNED else title(name),
            *[f"{e:.2f}" for e in result.efficiency[:, j]],
            f"{result.network[name]:.2f}",
        )
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    written = {"result.json": _results.record(config, **result._asdict())}
    if config.plots:
        written["adaptive.png"] = _results.render(plot(result))
    return written


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "adaptive"


def plot(result: Result) -> Figure:
    """Efficiencies by law, and the learned alphas."""
    with mpl.rc_context(_plotting.STYLE):
        figure = Figure(figsize=(11, 4.4))
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        width = 0.8 / len(result.names)
        for j, name in enumerate(result.names):
            x = np.arange(len(result.laws)) + (j - (len(result.names) - 1) / 2) * width
            left.bar(
                x, result.efficiency[:, j], 0.9 * width,
                color=_plotting.get_color("general_nll" if name == LEARNED else name),
                label=name if name == LEARNED else title(name),
            )  # fmt: skip
        left.axhline(1, color="0.5", lw=0.8)
        left.set_xticks(range(len(result.laws)), result.laws)
        left.set(
            title="A learned shape is near the best fixed loss",
            ylabel="efficiency relative to MSE",
            ylim=(0, 1.25 * result.efficiency.max()),
        )  # fmt: skip
        left.legend(loc="upper left", ncols=3, fontsize=10)
        for i, (law, alphas) in enumerate(zip(result.laws, result.alphas, strict=True)):
            right.plot(
                np.sort(alphas), np.linspace(0, 100, len(alphas)), **_plotting.get_series_line(i),
                lw=2, label=law,
            )  # fmt: skip
        right.set(
            title="Learned alpha", xlabel="alpha (2: normal, 0: Cauchy)",
            ylabel="data sets below, %", xlim=(0, 2),
        )  # fmt: skip
        right.legend(loc="center", bbox_to_anchor=(0.63, 0.5), fontsize=10)
        return figure


def _fit_set(
    config: Config, laws: tuple[str, ...], item: tuple[Array, Array]
) -> tuple[Array, Array]:
    seed, law = item
    X_key, y_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), seed))
    X = jax.random.normal(X_key, (config.rows, config.features))

    def draw(name: str, key: Array) -> Array:
        return LAWS[name].draw(key, (config.rows,)) / LAWS[name].unit

    y = jax.lax.switch(law, [partial(draw, name) for name in laws], y_key)
    fixed, _ = fit_losses(FIXED, X, y)
    b, alpha = _fit_learned(config.steps, X, y, fixed[FIXED.index("huber")])
    return jnp.concatenate([fixed, b[None]]), alpha


def _fit_learned(steps: int, X: Array, y: Array, start: Array) -> tuple[Array, Array]:
    """The parameters and alpha that minimise the mean `general_nll`, from a robust start."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def objective(params: Any) -> Array:
        return jnp.mean(_unconstrained_nll(params["b"][0] + X @ params["b"][1:], y, params))

    start = {"b": start, "alpha": jnp.zeros(()), "scale": jnp.zeros(())}
    params, _ = descend(objective, optimizer, start, steps)
    return params["b"], _constrain(params)[0]


def _constrain(unconstrained: Any) -> tuple[Array, Array]:
    """Alpha in (0.001, 1.999), where all derivatives are finite, and a positive scale."""
    return 0.001 + 1.998 * jax.nn.sigmoid(unconstrained["alpha"]), jnp.exp(unconstrained["scale"])


def _unconstrained_nll(predictions: Array, targets: Array, unconstrained: Any) -> Array:
    alpha, scale = _constrain(unconstrained)
    return rl.general_nll(predictions, targets, alpha=alpha, scale=scale)
