"""Puts the result of `compare` into words: the findings and the tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from experiments._compare.fitting import Result
from experiments._losses import title
from experiments.data import Data
from robustloss._numerics.normal import UPPER_QUARTILE

LOW = 0.5  # a row whose weight is below this share of a typical row's is listed


def findings(result: Result) -> list[str]:
    """The differences between the fits and their meaning, in plain sentences."""
    sentences = []
    robust = next((n for n in ("huber", "pseudo_huber", "log_cosh") if n in result.losses), None)
    low = find_low_rows(result)
    if robust and "squared_error" in result.losses:
        sentences.append(_compare_slopes(result, robust, low[robust]))
    if robust and len(low[robust]):
        weights = result.weights[result.losses.index(robust)]
        ends = [f"{w:.2g}" for w in (weights.min(), weights[weights < LOW].max())]
        sentences.append(
            f"In {title(robust)}'s fit the weight of {_list_rows(low[robust])} is "
            f"{' to '.join(dict.fromkeys(ends))} of a typical row's; in MSE's every row counts in "
            "full, and the largest residual pulls most."
        )
    far_rows = _find_far_rows(result.data)
    if robust:
        near = np.abs(result.residuals[result.losses.index(robust)]) < 3 * result.scale
        far_rows = np.intersect1d(far_rows, result.data.rows[near])
    if robust and len(far_rows):
        single = len(far_rows) == 1
        sentences.append(
            f"The leverage point{' ' if single else 's '}near {title(robust)}'s fit "
            f"{'is' if single else 'are'} {_list_rows(far_rows)}. No convex loss distinguishes a "
            "bad leverage point from a good one, and a bad one attracts every convex fit: check "
            f"{'this row' if single else 'these rows'} before you trust a number in this result."
        )
    for name, converged, kinked, steps, drift in zip(
        result.losses, result.converged, result.kinked, result.steps, result.drifts, strict=True
    ):
        if kinked and converged:
            sentences.append(
                f"{title(name)} came to rest where its gradient is exactly 0: its minimum is "
                "flat, other coefficients are as good, and these depend on the start."
            )
        elif kinked:
            sentences.append(
                f"{title(name)} is not reported as converged: its gradient jumps at the minimum "
                f"instead of becoming small, so the fit took all {steps} steps; over the last "
                f"tenth of the steps the objective fell by {drift:.1g} of its value."
            )
        elif not converged:
            sentences.append(f"{title(name)} did NOT converge in {steps} steps: raise --steps.")
    return sentences


def show(result: Result, console: Console) -> None:
    """Prints the data, the coefficients, the fits, the rows of low weight and the MM-estimate."""
    data = result.data
    console.print(
        f"{data.name}: {data.target} from {', '.join(data.features)}; "
        f"{len(data.y)} rows. {data.note}\n"
        f"Scale of the residuals: {result.scale:.6g} ({result.scale_note}).\n",
        highlight=False,
        markup=False,
    )
    console.print(_tabulate_coefficients(result))
    console.print(_tabulate_fits(result))
    console.print(_tabulate_low_rows(result))
    if result.mm is not None:
        console.print(
            "\nMM: Tukey's loss at 95 % efficiency, from an S-estimate that just under half of "
            "the rows cannot carry off.\n\n" + result.mm.summary(data.features) + "\n",
            highlight=False,
            markup=False,
        )


def find_low_rows(result: Result) -> dict[str, np.ndarray]:
    """By loss, the rows whose weight is below `LOW` of a typical row's."""
    return {
        name: result.data.rows[weights < LOW]
        for name, weights in zip(result.losses, result.weights, strict=True)
    }


def describe_ratio(result: Result, robust: str) -> str | None:
    """`2.5 times`, MSE's slope over the robust one, or None where the two nearly agree."""
    j, mse, other = _find_largest_gap(result, robust)
    if abs(mse[j] - other[j]) * result.data.X[:, j].std() < 0.25 * result.scale:
        return None
    if mse[j] * other[j] <= 0:
        return "of the other sign than"
    return f"{mse[j] / other[j]:.2g} times"


def _tabulate_coefficients(result: Result) -> Table:
    table = Table(title="Coefficients", padding=0)
    columns = result.coefficients
    rough = result.kinked & ~result.converged
    heads = [title(name) for name in result.losses]
    if result.mm is not None:
        columns = np.vstack([columns, [result.mm.intercept, *result.mm.coefficients]])
        rough, heads = np.append(rough, False), [*heads, "MM"]
    for head in ("", *heads):
        table.add_column(head, overflow="fold")
    for term, values in zip(("intercept", *result.data.features), columns.T, strict=True):
        digits = [f"{v:.4g}" if r else f"{v:.6g}" for v, r in zip(values, rough, strict=True)]
        table.add_row(escape(term), *digits)
    return table


def _tabulate_fits(result: Result) -> Table:
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
            _format_excess(result.excesses[i]),
            str(result.steps[i]),
            "yes" if result.converged[i] else "no",
            f"{result.seconds[i]:.2f}",
        )
    return table


def _tabulate_low_rows(result: Result) -> Table:
    table = Table(
        Column("loss", no_wrap=True),
        f"rows with less than {LOW:.0%} of a typical row's weight: weight",
    )
    for (name, rows), weights in zip(find_low_rows(result).items(), result.weights, strict=True):
        weight_by_row = dict(zip(result.data.rows, weights, strict=True))
        if len(rows) > 12:
            text = f"{len(rows)} of {len(result.data.y)} rows"
        else:
            text = ", ".join(f"{row}: {weight_by_row[row]:.2f}" for row in rows) or "none"
        table.add_row(title(name), text)
    return table


def _format_excess(x: float) -> str:
    return "-" if np.isnan(x) else "< 1e-9" if x < 1e-9 else f"{x:.0e}"


def _compare_slopes(result: Result, robust: str, low: np.ndarray) -> str:
    """The slope in which MSE and a robust loss differ most, and the rows that cause it."""
    data = result.data
    j, mse, other = _find_largest_gap(result, robust)
    slope = f"slope of {data.features[j]}" if len(data.features) > 1 else "slope"
    values = f"({mse[j]:.4g} against {other[j]:.4g})"
    ratio = describe_ratio(result, robust)
    if ratio is None:
        return (
            f"MSE and {title(robust)} nearly agree: the largest gap is in the {slope} {values}, "
            "within a quarter of the scale over that feature's spread."
        )
    difference = f"MSE's {slope} is {ratio} {title(robust)}'s {values}"
    kept = ~np.isin(data.rows, low)
    if len(low) > 0 and kept.sum() > data.X.shape[1] + 1:
        X = (data.X[kept] - data.X.mean(0)) / data.X.std(0)
        y = (data.y[kept] - data.y.mean()) / data.y.std()
        fitted = np.linalg.lstsq(np.column_stack([np.ones(len(y)), X]), y)[0]
        reduced = fitted[1 + j] * data.y.std() / data.X[:, j].std()
        if abs(reduced - other[j]) < 0.5 * abs(mse[j] - other[j]):
            verb = "is" if len(low) == 1 else "are"
            return f"{difference}; {_list_rows(low)} {verb} why: without, MSE gives {reduced:.4g}."
        return f"{difference}; without {_list_rows(low)}, MSE gives {reduced:.4g}."
    return f"{difference}; no single row is the cause."


def _find_largest_gap(result: Result, robust: str) -> tuple[int, np.ndarray, np.ndarray]:
    """The feature over whose spread MSE and a robust loss differ most, and the slopes of both."""
    mse, other = (
        result.coefficients[result.losses.index(n), 1:] for n in ("squared_error", robust)
    )
    return int(np.argmax(np.abs(mse - other) * result.data.X.std(0))), mse, other


def _find_far_rows(data: Data) -> np.ndarray:
    """Rows more than five robust deviations from the median in at least one feature."""
    distance = np.abs(data.X - np.median(data.X, axis=0))
    mad = np.median(distance, axis=0) / UPPER_QUARTILE
    return data.rows[np.any(distance > 5 * np.where(mad > 0, mad, data.X.std(0)), axis=1)]


def _list_rows(rows: Sequence[int]) -> str:
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
    for first, last in runs:
        parts += (
            [str(first), str(last)][: last - first + 1]
            if last - first < 2
            else [f"{first} to {last}"]
        )
    text = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    return f"{'row' if len(rows) == 1 else 'rows'} {text}"
