"""Reads the data set that the options of `compare` name: a built-in one or a CSV file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments import UsageError
from experiments.data import Data, load, read_csv

DEFAULT = "phones"


def read_data(
    name: str | None,
    csv: Path | None,
    target: str | None,
    features: tuple[str, ...],
    drop_missing: bool,
) -> Data:
    """The data set; a `UsageError` if the options contradict each other."""
    if csv is None:
        for option, value in (("--target", target), ("--features", features)):
            if value:
                raise UsageError(f"{option} describes a --csv file, but none was given.")
        return load(name or DEFAULT)
    if name is not None:
        raise UsageError("--data and --csv exclude each other; give one of them.")
    if target is None:
        raise UsageError("--csv needs --target, the name of the column to predict.")
    return read_csv(csv, target, features or None, drop_missing=drop_missing)


def check_independence(data: Data) -> None:
    """Refuses a feature that is a linear combination of earlier ones: its slope is arbitrary."""
    X = (data.X - data.X.mean(0)) / data.X.std(0)
    for j in range(1, X.shape[1]):
        rest = X[:, j] - X[:, :j] @ np.linalg.lstsq(X[:, :j], X[:, j])[0]
        if np.linalg.norm(rest) < 1e-7 * np.linalg.norm(X[:, j]):
            raise UsageError(
                f"column {data.features[j]!r} is a linear combination of the features before it; "
                "leave it out with --features."
            )
