"""Times linear fits for `speed`: robustloss beside scikit-learn, statsmodels and R.

All programs fit the same model to the same data in the same run, in float64. Peers that are not
installed are left out. R times its own fits. A slow peer is timed once.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import robustloss as rl
from experiments import require

COLUMNS = 10
SHORT, LONG = 0.5, 3.0  # seconds


class Case(NamedTuple):
    """One task."""

    name: str
    rows: int
    fit: Callable[[np.ndarray, np.ndarray], rl.LinearFit]
    peers: dict[str, Callable[[np.ndarray, np.ndarray], float]]
    """By name, a function that fits the data and returns the seconds."""
    error: Callable[[np.ndarray, np.ndarray, rl.LinearFit], float] | None = None


class Timing(NamedTuple):
    """Seconds of one task."""

    first: float
    ours: list[float]
    peers: dict[str, list[float]]
    error: float | None
    converged: bool


def draw_data(rows: int, columns: int = COLUMNS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Data with Student t noise of 3 degrees of freedom, and a tenth of the rows far above."""
    random = np.random.default_rng(seed)
    X = random.normal(size=(rows, columns))
    y = X @ np.arange(1, columns + 1) / columns + 1 + random.standard_t(3, rows)
    y[: rows // 10] += 20
    return X, y


def build_cases(rows: int) -> list[Case]:
    """The tasks; `rows` is the number of rows in the large ones."""
    smaller = min(10_000, rows)
    return [
        Case(
            f"Huber with MAD, {rows:,} x {COLUMNS}", rows, rl.fit_linear,
            _select_installed(
                {"sklearn HuberRegressor": (_sklearn_huber, "sklearn"),
                 "statsmodels RLM": (_statsmodels_rlm, "statsmodels")}
            ),
            measure_huber_error,
        ),
        Case(
            "Huber with MAD, 1,000 fits of 100 x 5 in one call", 0, _fit_sets,
            _select_installed({"sklearn, a loop": (_sklearn_loop, "sklearn")}),
        ),
        Case(
            f"MAE, {smaller:,} x {COLUMNS}", smaller,
            partial(rl.fit_linear, loss=rl.absolute_error),
            _select_installed({"sklearn QuantileRegressor": (_sklearn_quantile, "sklearn")})
            | _build_r_peer("R quantreg rq.fit.fnb", "quantreg", "rq.fit.fnb(cbind(1, X), y)"),
        ),
        Case(
            f"MAE, {rows:,} x {COLUMNS}", rows, partial(rl.fit_linear, loss=rl.absolute_error),
            _build_r_peer("R quantreg rq.fit.fnb", "quantreg", "rq.fit.fnb(cbind(1, X), y)"),
        ),
        Case(
            f"MM, {smaller:,} x {COLUMNS}", smaller, partial(rl.fit_linear, loss=rl.tukey),
            _build_r_peer(
                "R robustbase lmrob", "robustbase", "lmrob.fit(cbind(1, X), y, lmrob.control())"
            ),
        ),
    ]  # fmt: skip


def time_case(case: Case, repeats: int) -> Timing:
    """Times our fit and the peers in turn; a short fit is repeated until it fills half a second."""
    X, y = draw_data(case.rows) if case.rows else draw_data(100_000, 5)
    with jax.enable_x64(True):
        device = jnp.asarray(X), jnp.asarray(y)
        fit = jax.jit(case.fit) if case.rows == 0 else case.fit
        begin = time.perf_counter()
        found = jax.block_until_ready(fit(*device))
        first = time.perf_counter() - begin
        ours: list[float] = []
        peers: dict[str, list[float]] = {name: [] for name in case.peers}
        for _ in range(repeats):
            turn: list[float] = []
            while sum(turn) < SHORT:
                begin = time.perf_counter()
                found = jax.block_until_ready(fit(*device))
                turn.append(time.perf_counter() - begin)
            ours += turn
            for name, peer in case.peers.items():
                if not peers[name] or np.median(peers[name]) < LONG:
                    peers[name].append(peer(X, y))
        require(bool(jnp.all(found.converged)), f"{case.name} did not converge")
    error = case.error(X, y, found) if case.error else None
    return Timing(first, ours, peers, error, bool(jnp.all(found.converged)))


def measure_growth(sizes: list[int], repeats: int) -> Iterator[tuple[int, float]]:
    """Seconds of a Huber fit at each number of rows."""
    with jax.enable_x64(True):
        for rows in sizes:
            X, y = map(jnp.asarray, draw_data(rows))
            jax.block_until_ready(rl.fit_linear(X, y))
            seconds = []
            for _ in range(repeats):
                begin = time.perf_counter()
                jax.block_until_ready(rl.fit_linear(X, y))
                seconds.append(time.perf_counter() - begin)
            yield rows, float(np.median(seconds))


def measure_memory(rows: int) -> dict[str, float]:
    """The peak memory of a compiled fit, including the data, over the size of the data."""
    with jax.enable_x64(True):
        data = jnp.zeros((rows, COLUMNS)), jnp.zeros(rows)
        found = {}
        for name in ("huber", "absolute_error", "tukey"):
            fit = jax.jit(partial(rl.fit_linear, loss=rl.LOSSES[name]))
            analysis = fit.lower(*data).compile().memory_analysis()
            parts = (
                analysis.argument_size_in_bytes,
                analysis.output_size_in_bytes,
                analysis.temp_size_in_bytes,
            )
            found[name] = sum(parts) / analysis.argument_size_in_bytes
    return found


def measure_huber_error(X: np.ndarray, y: np.ndarray, found: rl.LinearFit) -> float:
    """The size of Newton's step in NumPy, the distance to the exact answer, over sd(y)."""
    A = np.c_[np.ones(len(y)), X]
    r = y - A @ np.r_[found.intercept, found.coefficients]
    s = np.median(np.abs(r)) / 0.6744897501960817
    k = rl.tune(rl.huber, efficiency=0.95) * s
    inside = A[np.abs(r) <= k]
    step = np.linalg.solve(inside.T @ inside, A.T @ np.clip(r, -k, k))
    return float(np.max(np.abs(step)) / np.std(y))


def _fit_sets(X: jax.Array, y: jax.Array) -> rl.LinearFit:
    return jax.vmap(rl.fit_linear)(X.reshape(1000, 100, 5), y.reshape(1000, 100))


def _select_installed(peers: dict[str, tuple[Callable[..., float], str]]) -> dict[str, Callable]:
    return {n: f for n, (f, package) in peers.items() if importlib.util.find_spec(package)}


def _time(f: Callable[[], object]) -> float:
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f()
    return time.perf_counter() - begin


def _sklearn_huber(X: np.ndarray, y: np.ndarray) -> float:
    from sklearn.linear_model import HuberRegressor  # noqa: PLC0415

    return _time(lambda: HuberRegressor(epsilon=1.345, alpha=0.0).fit(X, y))


def _sklearn_loop(X: np.ndarray, y: np.ndarray) -> float:
    from sklearn.linear_model import HuberRegressor  # noqa: PLC0415

    pairs = list(zip(X.reshape(1000, 100, 5), y.reshape(1000, 100), strict=True))
    return _time(lambda: [HuberRegressor(epsilon=1.345, alpha=0.0).fit(*pair) for pair in pairs])


def _sklearn_quantile(X: np.ndarray, y: np.ndarray) -> float:
    from sklearn.linear_model import QuantileRegressor  # noqa: PLC0415

    return _time(lambda: QuantileRegressor(alpha=0.0).fit(X, y))


def _statsmodels_rlm(X: np.ndarray, y: np.ndarray) -> float:
    from statsmodels.robust.norms import HuberT  # noqa: PLC0415
    from statsmodels.robust.robust_linear_model import RLM  # noqa: PLC0415

    A = np.c_[np.ones(len(y)), X]
    return _time(lambda: RLM(y, A, M=HuberT()).fit())


def _build_r_peer(name: str, package: str, call: str) -> dict[str, Callable[..., float]]:
    """The peer, or nothing if R lacks this package."""
    program = shutil.which("Rscript")
    if program is None:
        return {}
    question = [program, "-e", f"quit(status = !requireNamespace('{package}', quietly = TRUE))"]
    if subprocess.run(question, capture_output=True, check=False).returncode:
        return {}

    def peer(X: np.ndarray, y: np.ndarray) -> float:
        with tempfile.TemporaryDirectory() as folder:
            np.ascontiguousarray(np.c_[X, y].T).tofile(file := Path(folder) / "data")
            script = (
                f"suppressMessages(library({package}));"
                f"d <- matrix(readBin('{file}', 'double', {X.size + y.size}), nrow = {len(y)},"
                f" byrow = FALSE);"
                f"X <- d[, 1:{X.shape[1]}]; y <- d[, {X.shape[1] + 1}];"
                f"s <- c(); while (sum(s) < {SHORT}) s <- c(s, system.time({call})[3]);"
                f"cat(median(s))"
            )
            command = [str(program), "-e", script]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(out.stdout)

    return {name: peer}
