"""What do corrupted training targets do to a network, for each training loss?

Trains a multi-layer perceptron (Flax NNX) on the California housing data by Adam in mini-batches,
several seeds at once. A share of the training targets is ten times too large, as if the decimal
point had slipped; the test rows are clean. Then trains in bfloat16 with targets in small units,
for which the gradient of optax's Huber loss vanishes.
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
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
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
from experiments._linear_fits import resolve_losses
from experiments._losses import has_delta, set_delta, title, tune_delta
from experiments.data import load

LOSSES = ("squared_error", "absolute_error", "huber", "log_cosh", "cauchy", "tukey")
SPREAD = 0.4  # the assumed scale of the residuals, in standard units of the target
UNIT = 1e-3  # the unit of the targets in bfloat16
MEASURES = ("MAE", "RMSE", "median")


@dataclass(frozen=True)
class Config:
    """Settings of `network`."""

    losses: tuple[str, ...] = LOSSES
    """The training losses; MSE, MAE and Huber's loss must be among them."""
    shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    """The shares of the training targets that are corrupted."""
    rows: int = 12_000
    """Training rows; the test has 4,000 others."""
    hidden: int = 32
    """Units in each of two hidden layers."""
    epochs: int = 16
    """Passes over the training rows."""
    batch: int = 256
    """Rows in a mini-batch."""
    seeds: int = 3
    """Networks for each loss and share."""
    learning_rate: float = 3e-3
    """The step size of Adam, which decreases to 0."""
    seed: int = 0
    """The seed of all random numbers."""
    out: Path | None = None
    """The output folder; results/network by default."""
    plots: bool = True
    """Draw the picture."""


SMOKE = Config(
    losses=("squared_error", "absolute_error", "huber"), shares=(0.0, 0.2), rows=3000, hidden=16,
    epochs=8, seeds=2,
)  # fmt: skip


class Split(NamedTuple):
    """Features and targets in standard units, the targets clean."""

    X: Array
    y: Array
    X_test: Array
    y_test: Array
    middle: float  # median of the target, in 100,000 dollars
    unit: float  # of the standardised target, in 100,000 dollars


class Result(NamedTuple):
    """Errors on the clean test rows, in 100,000 dollars."""

    losses: tuple[str, ...]
    shares: np.ndarray
    errors: np.ndarray  # by loss, share, seed, epoch and measure
    half: dict[str, np.ndarray]  # the test MAE in bfloat16 by epoch, for two Huber losses
    train: np.ndarray  # the final training MAE against the corrupted targets, by loss and share


class Mlp(nnx.Module):
    """A multi-layer perceptron with two hidden layers."""

    def __init__(self, features: int, hidden: int, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(
            nnx.Linear(a, b, rngs=rngs)
            for a, b in ((features, hidden), (hidden, hidden), (hidden, 1))
        )

    def __call__(self, x: Array) -> Array:
        """A prediction for each row."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)[..., 0]


def run(
    config: Config, progress: Progress = ignore_progress, cache: Cache = compute_arrays
) -> Result:
    """Trains every network."""
    check_settings(config)
    config = replace(config, losses=resolve_losses(config.losses))
    split = load_split(config.rows, config.seed)
    found = []
    for i, name in enumerate(config.losses):
        progress(i / (len(config.losses) + 1), title(name))
        train = partial(train_networks, config, split, tune_loss(name))
        found.append(cache(name, partial(train, config.shares)))
    half = {}
    progress(1 - 1 / (len(config.losses) + 1), "bfloat16")
    for name, huber in {"optax.huber_loss": optax.huber_loss, "rl.huber": rl.huber}.items():
        train = partial(train_networks, config, split, partial(huber, delta=1.0), half=True)
        arrays = cache(f"half-{name}", partial(train, (0.0,)))
        half[name] = np.asarray(arrays["errors"])[0, :, :, 0].mean(0)
    return Result(
        config.losses, np.array(config.shares), np.array([arrays["errors"] for arrays in found]),
        half,
        np.array([arrays["train"] for arrays in found]).mean(-1),
    )  # fmt: skip


def check(result: Result) -> None:
    """Corrupted targets harm MSE most; in bfloat16 our Huber loss learns and optax's does not."""
    at_end = result.errors[..., -1, 0].mean(axis=2)  # MAE by loss and share
    harm = at_end[:, -1] - at_end[:, 0]
    require(harm.argmax() == result.losses.index("squared_error"), "MSE is not harmed most")
    mse = result.losses.index("squared_error")
    require(
        np.delete(harm, mse).max() < harm[mse] / 2,
        "a robust loss is harmed at least half as much as MSE",
    )
    require(np.all(np.isfinite(result.errors)), "an error is not finite")
    require(
        result.train[mse, -1] == result.train[:, -1].max(),
        "by training MAE, the MSE network is not the worst",
    )
    rl_errors, optax_errors = result.half["rl.huber"], result.half["optax.huber_loss"]
    require(rl_errors[-1] < 0.9 * rl_errors[0], "our Huber loss does not learn in bfloat16")
    require(
        rl_errors[-1] < 0.8 * optax_errors[-1],
        "our Huber loss is no better than optax's in bfloat16",
    )
    require(optax_errors[-1] > 0.95 * optax_errors[0], "optax's Huber loss learns in bfloat16")


def findings(result: Result) -> list[str]:
    """What the experiment finds."""
    end = result.errors[..., -1, :].mean(axis=2)
    mse, mae, huber = (result.losses.index(n) for n in ("squared_error", "absolute_error", "huber"))
    share = result.shares[-1]
    rl_errors, optax_errors = result.half["rl.huber"], result.half["optax.huber_loss"]
    return [
        f"With {share:.0%} of the training targets ten times too large, the test MAE of the MSE "
        f"network on clean rows is {end[mse, -1, 0]:.2f} instead of {end[mse, 0, 0]:.2f} (in "
        f"100,000 dollars), of the Huber network {end[huber, -1, 0]:.2f} instead of "
        f"{end[huber, 0, 0]:.2f}, of the MAE network {end[mae, -1, 0]:.2f} instead of "
        f"{end[mae, 0, 0]:.2f}.",
        "MAE is robust as a metric too. A user who has only the corrupted targets measures "
        f"{result.train[huber, -1]:.2f} for the Huber network and {result.train[mse, -1]:.2f} for "
        "the MSE network, which is the right order.",
        f"In bfloat16, with errors of a thousandth of delta, optax's Huber loss learns nothing "
        f"(test MAE {optax_errors[0]:.2f} after the first epoch, {optax_errors[-1]:.2f} after the "
        f"last): its gradient is 0 for all but the largest errors. With our Huber loss, MAE is "
        f"{rl_errors[0]:.2f}, then {rl_errors[-1]:.2f}.",
    ]


def show(result: Result, console: Console) -> None:
    """Prints the table."""
    table = Table(
        "training loss", *[f"{share:.0%} corrupted" for share in result.shares],
        title="Errors on clean test rows: MAE / RMSE / median, 100,000 dollars",
    )  # fmt: skip
    for name, errors in zip(result.losses, result.errors, strict=True):
        cells = errors[:, :, -1].mean(axis=1)
        table.add_row(title(name), *[" / ".join(f"{v:.2f}" for v in cell) for cell in cells])
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The files of the output folder."""
    end = result.errors[..., -1, :].mean(axis=2)
    written = {
        "result.json": _results.record(
            config,
            errors={
                n: {f"{s:g}": dict(zip(MEASURES, e, strict=True)) for s, e in pairs}
                for n, pairs in (
                    (n, zip(result.shares, of, strict=True))
                    for n, of in zip(result.losses, end, strict=True)
                )
            },
            half=result.half,
        ),
        "network.npz": _results.pack_arrays(errors=result.errors, shares=result.shares),
    }
    if config.plots:
        written["network.png"] = _results.render(plot(result))
    return written


def folder(config: Config) -> Path:
    """The output folder."""
    return config.out or Path("results") / "network"


def plot(result: Result) -> Figure:
    """The test error by share, the learning curves at the largest share, and bfloat16."""
    with mpl.rc_context(_plotting.STYLE):
        figure = Figure(figsize=(12, 4.4))
        left, middle, right = figure.subplots(1, 3)
        for i, name in enumerate(result.losses):
            look = {**_plotting.get_line(name), "lw": 2, "label": title(name)}
            at_end = result.errors[i, :, :, -1, 0]
            marker = _plotting.LOOKS[name].marker
            left.plot(100 * result.shares, at_end.mean(1), marker=marker, **look)
            curve = result.errors[i, -1, :, :, 0].mean(0)
            middle.plot(1 + np.arange(len(curve)), curve, **look)
        left.set(
            title="The MSE network fits the corruption", xlabel="training targets corrupted, %",
            ylabel="test MAE on clean rows, 100,000 dollars",
        )  # fmt: skip
        middle.set(
            title=f"Learning with {result.shares[-1]:.0%} corrupted", xlabel="epoch", yscale="log",
            ylabel="test MAE on clean rows, 100,000 dollars",
        )  # fmt: skip
        middle.yaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
        middle.yaxis.set_major_formatter("{x:g}")
        middle.yaxis.set_minor_formatter(NullFormatter())
        looks = {
            "rl.huber": _plotting.get_line("huber"),
            "optax.huber_loss": _plotting.get_series_line(0),
        }
        for name, curve in result.half.items():
            right.plot(1 + np.arange(len(curve)), curve, **looks[name], lw=2, label=name)
        right.set(title="bfloat16, small targets", xlabel="epoch", ylabel="test MAE, same units")
        right.set_ylim(bottom=0)
        for panel in (middle, right):
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend(loc="upper left")
        right.legend(loc="lower left")
        return figure


def tune_loss(name: str) -> Callable[..., Array]:
    """The loss at 95 % efficiency for residuals of scale `SPREAD`."""
    return set_delta(name, tune_delta(name, efficiency=0.95) * SPREAD if has_delta(name) else 1.0)


def load_split(rows: int, seed: int) -> Split:
    """Random rows of the California data for the training, and 4,000 others for the test."""
    data = load("california")
    order = np.random.default_rng(seed).permutation(len(data.y))
    train, test = order[:rows], order[-4000:]
    center = np.median(data.X[train], 0)
    spread = np.subtract(*np.quantile(data.X[train], [0.75, 0.25], axis=0))
    X = np.clip((data.X - center) / spread, -5, 5).astype("f4")
    middle, unit = float(np.median(data.y[train])), float(data.y[train].std())
    y = ((data.y - middle) / unit).astype("f4")
    return Split(*(jnp.asarray(v) for v in (X[train], y[train], X[test], y[test])), middle, unit)


def corrupt_targets(split: Split, share: Array, key: Array) -> Array:
    """Training targets of which a share is ten times too large."""
    selected = jax.random.uniform(key, split.y.shape) < share
    return jnp.where(selected, 10 * split.y + 9 * split.middle / split.unit, split.y)


def train_networks(
    config: Config,
    split: Split,
    loss: Callable[..., Array],
    shares: tuple[float, ...],
    half: bool = False,
    learned: dict[str, Array] | None = None,
) -> dict[str, Any]:
    """Trains a network for each share and seed; returns errors, training MAE and `learned`.

    The loss is `loss(predictions, targets)`. The parameters in `learned`, if any, are its third
    argument and are trained along with the network.
    """
    batches = len(split.y) // config.batch
    total = config.epochs * batches
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, total))
    unit = UNIT if half else 1.0
    dtype = jnp.bfloat16 if half else jnp.float32
    graph, _ = nnx.split(Mlp(split.X.shape[1], config.hidden, nnx.Rngs(0)))

    def predict(weights: Any, X: Array) -> Array:
        weights = jax.tree.map(lambda w: w.astype(dtype), weights)
        return nnx.merge(graph, weights)(X.astype(dtype)) * dtype(unit)

    def objective(params: Any, X: Array, y: Array) -> Array:
        own = () if learned is None else (params["own"],)
        values = loss(predict(params["weights"], X), (y * unit).astype(dtype), *own)
        return jnp.mean(values.astype(jnp.float32))

    def measure_errors(params: Any) -> Array:
        predictions = predict(params["weights"], split.X_test).astype(jnp.float32) / unit
        distance = jnp.abs(predictions - split.y_test) * split.unit
        return jnp.stack([distance.mean(), jnp.sqrt((distance**2).mean()), jnp.median(distance)])

    def train_network(item: tuple[Array, Array]) -> dict[str, Any]:
        share, key = item
        corruption_key, start_key, order_key = jax.random.split(key, 3)
        y = corrupt_targets(split, share, corruption_key)
        _, weights = nnx.split(Mlp(split.X.shape[1], config.hidden, nnx.Rngs(start_key)))
        params = {"weights": weights, "own": {} if learned is None else learned}

        def step(carry: Any, rows: Array) -> Any:
            params, state = carry
            gradient = jax.grad(objective)(params, split.X[rows], y[rows])
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry: Any, key: Array) -> Any:
            order = jax.random.permutation(key, len(y))[: batches * config.batch]
            carry, _ = jax.lax.scan(step, carry, order.reshape(batches, config.batch))
            return carry, measure_errors(carry[0])

        start = params, optimizer.init(params)
        (params, _), errors = jax.lax.scan(epoch, start, jax.random.split(order_key, config.epochs))
        fitted = predict(params["weights"], split.X).astype(jnp.float32) / unit
        train = jnp.mean(jnp.abs(fitted - y)) * split.unit
        return {"errors": errors, "train": train, **params["own"]}

    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    n = len(shares)
    items = jnp.repeat(jnp.asarray(shares), config.seeds), jnp.tile(keys, n)
    found = jax.device_get(distribute(train_network, group=None)(items))
    return jax.tree.map(lambda x: x.reshape(n, config.seeds, *x.shape[1:]), found)


def check_settings(config: Config) -> None:
    """Refuses settings with which no network can be trained."""
    if not config.shares or list(config.shares) != sorted(set(config.shares)):
        raise UsageError(f"--shares must ascend, got {config.shares}.")
    if config.shares[0] != 0 or not config.shares[-1] < 0.5 or len(config.shares) < 2:
        raise UsageError(f"--shares must begin with 0 and stay below 0.5, got {config.shares}.")
    for option, least in (("rows", 100), ("hidden", 1), ("epochs", 2), ("batch", 1), ("seeds", 1)):
        if getattr(config, option) < least:
            raise UsageError(f"--{option} must be >= {least}, got {getattr(config, option)}.")
    if config.rows > 16_000:
        raise UsageError(f"--rows must be at most 16,000, got {config.rows}.")
    if config.batch > config.rows:
        raise UsageError(f"--batch must be at most --rows, got {config.batch} > {config.rows}.")
    if not 0 < config.learning_rate < np.inf:
        raise UsageError(f"--learning-rate must be a positive number, got {config.learning_rate}.")
