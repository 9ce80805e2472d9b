"""Built-in data sets, and a CSV reader whose errors explain in one sentence what is wrong.

``SOURCES.md`` in this folder lists the sets and their sources.
"""

import csv
import difflib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments import UsageError

_FOLDER = Path(__file__).parent

# float() also accepts "1_000" and digits of other scripts
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_MISSING = re.compile(r"|#?n/?a|[+-]?(nan|inf|infinity)|null", re.IGNORECASE)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)

# name: (target, features, note on the outliers)
_BUILT_IN: dict[str, tuple[str, tuple[str, ...], str]] = {
    "phones": (
        "calls",
        ("year",),
        "Rows 15 to 20 (years 64 to 69) were recorded in a different unit, rows 14 and 21 in part.",
    ),
    "starsCYG": (
        "log_light",
        ("log_te",),
        "Rows 11, 20, 30 and 34 are giant stars (bad leverage points), rows 7 and 9 are milder.",
    ),
    "stackloss": (
        "stack_loss",
        ("air_flow", "water_temp", "acid_conc"),
        "Rows 1, 3, 4 and 21 are the usual outliers, sometimes row 2 as well.",
    ),
    "animals2": (
        "log_brain",
        ("log_body",),
        "Rows 6, 16 and 26 are dinosaurs.",
    ),
    "hbk": (
        "y",
        ("x1", "x2", "x3"),
        "Rows 1 to 10 are bad leverage points, rows 11 to 14 good ones (artificial data).",
    ),
    "coleman": (
        "y",
        ("salary_p", "father_wc", "sstatus", "teacher_sc", "mother_lev"),
        "Rows 3 and 18 are the usual outliers.",
    ),
    "salinity": (
        "y",
        ("x1", "x2", "x3"),
        "Rows 5 and 16 are outliers, which row 3 can mask.",
    ),
    "delivery": (
        "del_time",
        ("n_prod", "distance"),
        "Row 9 is the usual outlier and row 22 a leverage point.",
    ),
    "engel": (
        "foodexp",
        ("income",),
        "No row is labelled; the spread grows with income and row 138 is a bad leverage point.",
    ),
    "siegel": (
        "y",
        ("x",),
        "Rows 1 to 6 lie exactly on y = 0, so a scale with 50 % breakdown is 0.",
    ),
    "pilot_error": (
        "y",
        ("x",),
        "Row 6 has x = 370 in place of 37, a slip put in on purpose.",
    ),
    "california": (
        "med_house_val",
        (
            "median_income",
            "housing_median_age",
            "ave_rooms",
            "ave_bedrms",
            "population",
            "ave_occup",
            "latitude",
            "longitude",
        ),
        "No row is labelled; 965 targets are capped at 5.00001 and ave_occup goes up to 1243.",
    ),
}


class DataError(UsageError):
    """Input that cannot be used; the message is one clear sentence for the user."""


@dataclass(frozen=True)
class Data:
    """A regression data set: features without an intercept, target, and the rows of the file."""

    name: str
    features: tuple[str, ...]
    target: str
    X: np.ndarray
    y: np.ndarray
    rows: np.ndarray  # 1-based rows in the file; dropped rows do not renumber the others
    note: str = ""


def names() -> list[str]:
    """The names of the built-in sets."""
    return list(_BUILT_IN)


def load(name: str) -> Data:
    """A built-in set."""
    if name not in _BUILT_IN:
        raise DataError(
            f"There is no built-in data set {_quote(name)}: {_suggest(name, _BUILT_IN)}"
            f"{', '.join(_BUILT_IN)}."
        )
    target, features, note = _BUILT_IN[name]
    path = _FOLDER / f"{name}.csv"
    data = _read_california(path) if name == "california" else read_csv(path, target, features)
    return replace(data, note=note)


def read_csv(
    path: str | Path,
    target: str,
    features: Sequence[str] | None = None,
    *,
    drop_missing: bool = False,
) -> Data:
    """Reads a CSV file with a header line; the features default to all columns but `obs`."""
    if isinstance(features, str):
        features = (features,)
    header, cells = _read_cells(Path(path))
    used = _choose_features(header, target, features)
    hint = "" if features is not None else ", or leave the column out with --features"
    table = np.column_stack(
        [
            _parse_column(name, [row[header.index(name)] for row in cells], hint if i else "")
            for i, name in enumerate((target, *used))
        ]
    )
    kept = np.isfinite(table).all(axis=1)
    dropped = len(kept) - int(kept.sum())
    if dropped and not drop_missing:
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise DataError(
            f"{dropped} of {len(kept)} rows {'has' if dropped == 1 else 'have'} a blank, NA, NaN, "
            f"null or infinite value in the columns used (the first is row {row + 1}, column "
            f"{_quote((target, *used)[column])}); pass --drop-missing to leave them out."
        )
    table = table[kept]
    _check_table(table, target, used, dropped)
    verb = "was" if dropped == 1 else "were"
    return Data(
        name=Path(path).stem,
        features=used,
        target=target,
        X=np.ascontiguousarray(table[:, 1:]),
        y=table[:, 0].copy(),
        rows=np.flatnonzero(kept) + 1,
        note=f"{dropped} of {len(kept)} rows had blanks and {verb} dropped." if dropped else "",
    )


def _read_california(path: Path) -> Data:
    """Reads the file and forms averages per household, as the scikit-learn version of the set."""
    target, features, _ = _BUILT_IN["california"]
    raw = read_csv(path, "median_house_value")
    column = dict(zip(raw.features, raw.X.T, strict=True))
    households = column["households"]
    column["ave_rooms"] = column["total_rooms"] / households
    column["ave_bedrms"] = column["total_bedrooms"] / households
    column["ave_occup"] = column["population"] / households
    X = np.column_stack([column[name] for name in features])
    return replace(raw, features=features, target=target, X=X, y=raw.y / 1e5)


def _read_text(path: Path) -> str:
    shown = repr(str(path))
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"There is no file {shown}; give the path of a CSV file.") from None
    except IsADirectoryError:
        raise DataError(f"{shown} is a directory; give the path of a CSV file.") from None
    except OSError as error:
        raise DataError(f"The file {shown} cannot be read: {error.strerror}.") from None
    try:
        text = raw.decode("utf-8-sig")  # Excel's "CSV UTF-8" starts with a BOM
    except UnicodeDecodeError:
        text = None
    if text is None or "\0" in text:  # UTF-16 without a BOM decodes, but every other byte is 0
        raise DataError(f"The file {shown} is not UTF-8 text; save it as CSV in UTF-8.")
    if not text.strip():
        raise DataError(f"The file {shown} is empty; a header line and rows of numbers are needed.")
    return text


def _read_cells(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a file, all with the same number of cells."""
    # the strict parser detects open quotes, but refuses spaces after a closing quote
    text = re.sub(r'"[ \t]+(?=[,\r\n]|$)', '"', _read_text(path))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            lines.append((reader.line_num, [cell.strip() for cell in row]))
    except csv.Error as error:
        raise DataError(f"Line {reader.line_num} is not well-formed CSV: {error}.") from None
    blank: tuple[list[str], ...] = ([], [""])
    while len(lines) > 1 and lines[0][1] in blank:
        del lines[0]
    while len(lines) > 1 and lines[-1][1] in blank:
        del lines[-1]
    header = lines[0][1]
    _check_header(header)
    for line, row in lines[1:]:
        if len(row) != len(header):
            raise DataError(
                f"Line {line} has {_count_nouns(len(row), 'cell')}, "
                f"but the header has {len(header)}."
            )
    if len(lines) < 3:
        found = "only one row" if len(lines) == 2 else "a header but no rows"
        raise DataError(f"The file {str(path)!r} has {found}; at least 2 rows are needed.")
    return header, [row for _, row in lines[1:]]


def _check_header(header: list[str]) -> None:
    if len(header) == 1:
        for separator, word in ((";", "semicolons"), ("\t", "tabs")):
            if separator in header[0]:
                raise DataError(
                    f"The columns are separated by {word}; save the file with commas instead."
                )
    if all(_NUMBER.fullmatch(name) for name in header):
        raise DataError(
            f"There is no header: the first line has only numbers ({_list_names(header)}), "
            f"where the names of the columns are expected."
        )
    for i, name in enumerate(header):
        if not name:
            raise DataError(f"Column {i + 1} of {len(header)} has an empty name; give it one.")
        if name in header[:i]:
            raise DataError(
                f"The column name {_quote(name)} occurs {header.count(name)} times; "
                f"names must differ."
            )


def _choose_features(
    header: list[str], target: str, features: Sequence[str] | None
) -> tuple[str, ...]:
    """The features, after a check that target and features are columns."""
    if features is None:
        features = [name for name in header if name not in (target, "obs")]  # obs: a row number
    for role, name in (("target", target), *(("feature", name) for name in features)):
        if name not in header:
            raise DataError(
                f"The {role} {_quote(name)} is not a column: {_suggest(name, header)}"
                f"{_list_names(header)}."
            )
    if target in features:
        raise DataError(f"The column {_quote(target)} is both the target and a feature.")
    for name in features:
        if list(features).count(name) > 1:
            raise DataError(
                f"The feature {_quote(name)} is listed {list(features).count(name)} times; "
                f"list it once."
            )
    if not features:
        raise DataError(
            f"There is no feature column beside the target {_quote(target)}: the columns are "
            f"{_list_names(header)}."
        )
    return tuple(features)


def _parse_column(name: str, cells: list[str], hint: str) -> np.ndarray:
    """The numbers of a column, NaN where a value is missing."""
    values = np.full(len(cells), np.nan)
    for i, cell in enumerate(cells):
        if _NUMBER.fullmatch(cell):
            values[i] = float(cell)
        elif not _MISSING.fullmatch(cell):
            remedy = "numbers are expected"
            if _THOUSANDS.fullmatch(cell):
                remedy = "write numbers without thousands separators"
            elif _DECIMAL_COMMA.fullmatch(cell):
                remedy = "write decimals with a point, not a comma"
            raise DataError(
                f"Column {_quote(name)} is not numeric: row {i + 1} has {_quote(cell)}; "
                f"{remedy}{hint}."
            )
    return values


def _check_table(table: np.ndarray, target: str, features: tuple[str, ...], dropped: int) -> None:
    """Refuses a table that cannot be fitted; column 0 is the target."""
    n, needed = len(table), len(features) + 1
    if n < needed:
        left = f" left after {dropped} of {n + dropped} were dropped" if dropped else ""
        raise DataError(
            f"There {'is' if n == 1 else 'are'} {_count_nouns(n, 'row')}{left}, but "
            f"{_count_nouns(len(features), 'feature')} and an intercept need at least {needed}."
        )
    constant = (table == table[0]).all(axis=0)
    if constant[0]:
        raise DataError(
            f"The target {_quote(target)} is constant ({table[0, 0]:g} in all {n} rows), so there "
            f"is nothing to fit."
        )
    if constant.any():
        column = int(np.argmax(constant))
        raise DataError(
            f"Column {_quote(features[column - 1])} is constant ({table[0, column]:g} in all {n} "
            f"rows), so it is indistinguishable from the intercept; leave it out of the features."
        )
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        spread = table.std(axis=0, ddof=1)
        extreme = ~(np.isfinite(spread) & (spread > 0) & np.isfinite(1 / spread))
    if extreme.any():
        column = int(np.argmax(extreme))
        largest = np.max(np.abs(table[:, column]))
        raise DataError(
            f"Column {_quote((target, *features)[column])} holds numbers up to {largest:.0e}, "
            f"whose squares leave the range of float64; give it in other units."
        )


def _suggest(name: str, known: Iterable[str]) -> str:
    """The beginning of a list of the known names: the one most similar to a wrong name, if any."""
    # wrong letter case is common, and difflib counts it as another letter
    folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.3)
    return f"the nearest is {_quote(folded[close[0]])} of " if close else "choose one of "


def _count_nouns(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _quote(text: str, limit: int = 60) -> str:
    """The quoted input of a user, on one line and truncated."""
    return repr(text if len(text) <= limit else f"{text[: limit - 3]}...")


def _list_names(header: list[str], limit: int = 20) -> str:
    more = [f"{len(header) - limit} more"] if len(header) > limit else []
    return ", ".join([_quote(name) for name in header[:limit]] + more)
