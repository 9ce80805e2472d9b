"""How many digits of a loss, its slope and its curvature are right?

Compares float32 with the textbook formula in float64, in units in the last place (ulp), over
a dense sample of all float32 numbers or over every one (`--exhaustive`), beside the losses of
optax; and all 65,536 numbers of float16 and of bfloat16. Results below the smallest normal
number, which XLA on a CPU flushes to 0, are left out.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
from experiments import UsageError, _results

VIEWS = ("value", "slope", "curvature")
LIMITS = {  # what this library promises, in ulp of float32
    "squared_error": (0.5, 0.5, 0.5),
    "absolute_error": (0.5, 0.5, 0.5),
    "huber": (1.6, 0.51, 0.51),
    "log_cosh": (3.0, 2.2, 5.0),
    "pseudo_huber": (3.0, 3.5, 4.0),
}
HALF_LIMIT = 0.51
OTHERS = {
    "optax.squared_error": ("squared_error", optax.squared_error),
    "optax.huber_loss": ("huber", optax.huber_loss),
    "optax.log_cosh": ("log_cosh", optax.log_cosh),
}
CHUNK = 2**22
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Config:
    """Settings of `accuracy`."""

    exhaustive: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Every float32 number instead of one in a thousand; continues where it was interrupted."""
    delta: float = 1.0
    """Of the losses that have one."""
    others: bool = True
    """The losses of optax too."""
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


def run(config: Config, progress: Progress = lambda done, what: None) -> Result:
    """Measures every loss."""
    if not 0 < config.delta < np.inf:
        raise UsageError(f"--delta must be a positive number, got {config.delta}.")
    stride = 1 if config.exhaustive else 1021
    numbers = -(-(2**32) // stride)
    cases = {name: (name, loss) for name, loss in rl.LOSSES.items()}
    cases |= OTHERS if config.others else {}
    chunks = -(-numbers // CHUNK)
    kept = _unfinished(config)
    done = _continued(kept, config)
    with jax.enable_x64(True):
        for i, (case, (name, loss)) in enumerate(cases.items()):
            measure = _measure(_fixed(loss, config.delta), _truth(name, config.delta))
            for chunk in range(done.get(case, {}).get("chunks", 0), chunks):
                progress((i + chunk / chunks) / len(cases), case)
                worst = measure(chunk * CHUNK, numbers, stride)
                before = done.get(case, {}).get("worst", [Worst()] * len(VIEWS))
                merged = [_merge(b, w) for b, w in zip(before, worst, strict=True)]
                done[case] = {"chunks": chunk + 1, "worst": merged}
                if config.exhaustive and chunk % 16 == 15:
                    _keep(kept, config, done)
        half = {
            dtype.__name__: {
                case: _half(_fixed(loss, config.delta), _truth(name, config.delta), dtype)
                for case, (name, loss) in cases.items()
            }
            for dtype in (jnp.float16, jnp.bfloat16)
        }
    single = {case: dict(zip(VIEWS, done[case]["worst"], strict=True)) for case in cases}
    return Result(numbers, single, half)


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
    assert set(LIMITS) == set(rl.LOSSES), "a loss without limits in experiments/accuracy.py"


def show(result: Result, console: Console) -> None:
    """The table."""
    console.print(_table(result))
    console.print(
        f"- The worst of {result.numbers:,} float32 numbers, and of all 65,536 of each 16-bit "
        "type; 'wrong' counts results that are NaN or negative and must not be, or that over- "
        "or underflow on their own.",
        highlight=False,
    )


def files(config: Config, result: Result) -> dict[str, bytes]:
    """What goes into the output folder; with that, nothing is unfinished."""
    _unfinished(config).unlink(missing_ok=True)
    return {
        "result.json": _results.record(
            config,
            numbers=result.numbers,
            float32=_plain(result.single),
            **{dtype: _plain(losses) for dtype, losses in result.half.items()},
        )
    }


def folder(config: Config) -> Path:
    """Where the results go."""
    return config.out or Path("results") / "accuracy"


def _truth(name: str, delta: float) -> tuple[Callable[[Array], Array], ...]:
    """The textbook's value, slope and curvature for r >= 0, in float64."""
    d = float(np.float32(delta))

    def tail(r: Array) -> Array:
        return jnp.exp(-2 * r / d)

    def log_cosh(r: Array) -> Array:
        s = jnp.expm1(-jnp.minimum(r / d, 5))
        near = jnp.log1p(s * s / (2 * (1 + s)))  # cosh u - 1 = expm1(-u)^2 e^u / 2
        return d * d * jnp.where(r < 5 * d, near, r / d - jnp.log(2) + jnp.log1p(tail(r)))

    def root(r: Array) -> Array:
        return jnp.sqrt(1 + (r / d) ** 2)

    return {
        "squared_error": (lambda r: r * r, lambda r: 2 * r, lambda r: 2 + 0 * r),
        "absolute_error": (lambda r: r, jnp.sign, lambda r: 0 * r),
        "huber": (
            lambda r: jnp.where(r <= d, r * r / 2, d * (r - d / 2)),
            lambda r: jnp.minimum(r, d),
            lambda r: jnp.where(r <= d, 1.0, 0.0),
        ),
        "log_cosh": (
            log_cosh,
            lambda r: d * jnp.where(r < d, jnp.tanh(r / d), (1 - tail(r)) / (1 + tail(r))),
            lambda r: 4 * tail(r) / (1 + tail(r)) ** 2,
        ),
        "pseudo_huber": (
            lambda r: r * r / (1 + root(r)),
            lambda r: r / root(r),
            lambda r: root(r) ** -3.0,
        ),
    }[name]


def _views(loss: Callable[..., Array]) -> Iterator[tuple[Callable[[Array], Array], float]]:
    """The three views with what r -> -r does to their sign."""
    yield loss, 1.0
    yield partial(rl.influence, loss), -1.0
    yield partial(rl.curvature, loss), 1.0


def _measure(loss: Callable[..., Array], truth: Any) -> Callable[..., list[Worst]]:
    views = list(_views(loss))

    @jax.jit
    def measure(first: Array, numbers: Array, stride: Array) -> list[tuple[Array, ...]]:
        index = first + jnp.arange(CHUNK, dtype=jnp.int64)
        r = jax.lax.bitcast_convert_type((index * stride).astype(jnp.uint32), jnp.float32)
        real = jnp.isfinite(r) & (index < numbers)
        r = jnp.where(real, r, 1.0)
        return [
            _compare(view(r), true(jnp.abs(r.astype(jnp.float64))), r, sign)
            for (view, sign), true in zip(views, truth, strict=True)
        ]

    def worst(*arguments: int) -> list[Worst]:
        return [Worst(float(u), float(x), int(n)) for u, x, n in measure(*arguments)]

    return worst


def _half(loss: Callable[..., Array], truth: Any, dtype: Any) -> dict[str, Worst]:
    r = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)
    r = r[jnp.isfinite(r)]
    found = {}
    for name, (view, sign), true in zip(VIEWS, _views(loss), truth, strict=True):
        u, x, n = _compare(view(r), true(jnp.abs(r.astype(jnp.float64))), r, sign)
        found[name] = Worst(float(u), float(x), int(n))
    return found


def _compare(got: Array, true: Array, r: Array, sign: float) -> tuple[Array, Array, Array]:
    """The worst error in ulp, where, and how many results are wrong altogether."""
    info = jnp.finfo(got.dtype)
    got, true = got.astype(jnp.float64), jnp.where(r < 0, sign, 1.0) * true
    size = jnp.abs(true)
    step = 2.0 ** (jnp.maximum(jnp.frexp(size)[1] - 1, info.minexp) - info.nmant)
    overflows = size >= float(info.max) + 2.0 ** (info.maxexp - 1 - info.nmant - 1)
    # XLA on a CPU flushes what is subnormal in float32, and so in bfloat16.
    flushed = size < float(jnp.finfo(jnp.float32).smallest_normal)
    exact = flushed | overflows
    ulp = jnp.where(exact, 0.0, jnp.abs(got - true) / step)
    ulp = jnp.where(jnp.isfinite(ulp), ulp, jnp.inf)
    wrong = jnp.isnan(got) | (jnp.sign(got) * jnp.sign(true) < 0)
    wrong |= flushed & (jnp.abs(got) > float(info.smallest_normal))
    wrong |= overflows & ~(jnp.abs(got) >= float(info.max))
    at = jnp.argmax(ulp)
    return ulp[at], r[at].astype(jnp.float64), jnp.sum(wrong)


def _fixed(loss: Callable[..., Array], delta: float) -> Callable[..., Array]:
    has = "delta" in inspect.signature(loss).parameters
    return partial(loss, delta=delta) if has else loss


def _merge(a: Worst, b: Worst) -> Worst:
    return Worst(*max((a.ulp, a.at), (b.ulp, b.at)), a.wrong + b.wrong)


def _continued(kept: Path, config: Config) -> dict[str, Any]:
    """What an interrupted run of the same settings had measured."""
    if not (config.exhaustive and kept.exists()):
        return {}
    try:
        state = json.loads(kept.read_text())
    except ValueError:
        return {}
    if state["key"] != _key(config):
        return {}
    return {
        case: {"chunks": of["chunks"], "worst": [Worst(*w) for w in of["worst"]]}
        for case, of in state["done"].items()
    }


def _unfinished(config: Config) -> Path:
    return folder(config).parent / f".{folder(config).name}-unfinished.json"


def _keep(kept: Path, config: Config, done: dict[str, Any]) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    staged = kept.with_suffix(".new")
    staged.write_text(json.dumps({"key": _key(config), "done": done}))
    staged.replace(kept)


def _key(config: Config) -> Any:
    return json.loads(json.dumps([asdict(config), _results.environment()], default=str))


def _plain(losses: dict[str, dict[str, Worst]]) -> dict[str, Any]:
    return {n: {v: w._asdict() for v, w in views.items()} for n, views in losses.items()}


def _table(result: Result) -> Table:
    table = Table("loss", *[f"{v}, ulp (at r)" for v in VIEWS], "float16", "bfloat16", "wrong")
    for name, views in result.single.items():
        halves = [losses[name] for losses in result.half.values()]
        wrong = sum(w.wrong for v in (views, *halves) for w in v.values())
        table.add_row(
            name,
            *[f"{views[v].ulp:.3g} ({views[v].at:.3g})" for v in VIEWS],
            *[f"{max(w.ulp for w in half.values()):.3g}" for half in halves],
            f"{wrong:,}",
        )
    return table
