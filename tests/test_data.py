import re
from pathlib import Path

import numpy as np
import pytest

from experiments import data
from experiments.data import Data, DataError, load, names, read_csv

FOLDER = Path(data.__file__).parent

SHAPES = {
    "phones": (24, 1),
    "starsCYG": (47, 1),
    "stackloss": (21, 3),
    "animals2": (65, 1),
    "hbk": (75, 3),
    "coleman": (20, 5),
    "salinity": (28, 3),
    "delivery": (25, 2),
    "engel": (235, 1),
    "siegel": (9, 1),
    "pilot_error": (20, 1),
    "california": (20640, 8),
}

GOOD = "x,z,y\n1,5,3\n2,7,1\n4,6,2\n"


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "given.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def check_sentence(error: BaseException, words: tuple[str, ...]) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1
    assert message.endswith(".")
    assert ". " not in message, "one sentence"
    assert len(message) < 400
    for word in words:
        assert word in message


# id: (file, features asked for, words of the message); the target is y
BAD_FILES: dict[str, tuple[str | bytes, tuple[str, ...] | None, tuple[str, ...]]] = {
    "empty": ("", None, ("given.csv", "empty")),
    "only blank lines": ("\n \n\r\n", None, ("given.csv", "empty")),
    "only a byte order mark": (b"\xef\xbb\xbf", None, ("given.csv", "empty")),
    "only an empty cell": ('""\n', None, ("Column 1", "empty name")),
    "latin-1": ("größe,y\n1,2\n2,1\n".encode("latin-1"), None, ("given.csv", "not UTF-8")),
    "utf-16": (GOOD.encode("utf-16"), None, ("given.csv", "not UTF-8", "save it")),
    "utf-16 without mark": (GOOD.encode("utf-16-le"), None, ("given.csv", "not UTF-8")),
    "only a header": ("x,y\n", None, ("a header but no rows", "at least 2")),
    "one row": ("x,y\n1,2\n", None, ("only one row", "at least 2")),
    "no header": ("1,2.5\n2,-3e1\n3,4\n", None, ("no header", "'1', '2.5'", "names")),
    "one line of numbers": ("1,2.5\n", None, ("no header",)),
    "no target": ("x,Yield\n1,2\n2,1\n", None, ("target 'y'", "nearest is", "'x', 'Yield'")),
    "no feature of that name": (
        "weight,x,y\n1,2,3\n2,1,4\n3,3,3\n",
        ("x", "wieght"),
        ("feature 'wieght'", "nearest is 'weight'", "'weight', 'x', 'y'"),
    ),
    "target among features": (GOOD, ("x", "y"), ("'y'", "both the target and a feature")),
    "feature twice": (GOOD, ("x", "z", "x"), ("'x'", "listed 2 times", "once")),
    "duplicate names": ("x,y, x\n1,2,3\n2,3,4\n", None, ("'x'", "occurs 2 times", "differ")),
    "empty name": (",x,y\n1,2,3\n2,3,5\n", None, ("Column 1 of 3", "empty name")),
    "empty last name": ("x,y,\n1,2,\n2,3,\n", None, ("Column 3 of 3", "empty name")),
    "too few cells": ("x,y\n1,2\n2\n3,4\n", None, ("Line 3", "1 cell,", "header has 2")),
    "too many cells": ("x,y\n1,2\n2,3\n3,4,5\n", None, ("Line 4", "3 cells", "header has 2")),
    "blank line between": ("x,y\n1,2\n\n3,4\n", None, ("Line 3", "0 cells")),
    "open quote": ('x,y,t\n1,2,"a\n2,3,b\n3,3,c\n', ("x",), ("Line 4", "well-formed")),
    "text in an asked column": (
        "x,t,y\n1,2,3\n2,red,4\n3,blue,4\n",
        ("x", "t"),
        ("Column 't'", "not numeric", "row 2", "'red'"),
    ),
    "text in a default column": (
        "x,t,y\n1,2,3\n2,3,4\n3,blue,4\n",
        None,
        ("Column 't'", "row 3", "'blue'", "--features"),
    ),
    "text in the target": ("x,y\n1,2\n2,high\n", None, ("Column 'y'", "row 2", "'high'")),
    "thousands separators": (
        'x,y\n1,999\n2,"1,234"\n',
        None,
        ("Column 'y'", "row 2", "'1,234'", "thousands separators"),
    ),
    "decimal comma": ('x,y\n1,2\n2,"1,5"\n', None, ("'1,5'", "decimals with a point")),
    "underscore": ("x,y\n1,2\n1_000,3\n", None, ("Column 'x'", "row 2", "'1_000'")),
    "digits of another script": ("x,y\n1,2\n٣,3\n", None, ("Column 'x'", "not numeric", "row 2")),
    "hexadecimal": ("x,y\n1,2\n0x10,3\n", None, ("Column 'x'", "not numeric", "'0x10'")),
    "value with a line break": ('x,y\n1,2\n"a\nb",3\n', None, ("Column 'x'", r"'a\nb'")),
    "long value": ("x,y\n1,2\n" + 5000 * "q" + ",3\n", None, ("Column 'x'", "qqq...")),
    "name with a line break": ('"a\nb",y\n1,2\n1,3\n', None, (r"'a\nb'", "constant")),
    "too few rows": (
        "x,z,y\n1,5,3\n2,7,1\n",
        None,
        ("2 rows", "2 features and an intercept", "at least 3"),
    ),
    "constant column": ("x,z,y\n1,5,3\n2,5,1\n4,5,2\n", None, ("'z'", "constant", "5 in all 3")),
    "squares that overflow": (
        "x,y\n1e154,5\n3e154,6\n4e154,5\n",
        None,
        ("Column 'x'", "4e+154", "squares leave the range", "other units"),
    ),
    "constant target": ("x,y\n1,5\n2,5\n4,5\n", None, ("target 'y'", "constant", "5 in all 3")),
    "semicolons": ("x;y\n1,5;2\n2,5;3\n", None, ("semicolons", "commas")),
    "tabs": ("x\ty\n1\t2\n2\t3\n", None, ("tabs", "commas")),
    "only the target": ("y\n1\n2\n", None, ("no feature column", "'y'")),
    "only obs beside the target": ("obs,y\n1,1\n2,2\n", None, ("no feature column", "'obs'")),
    "no feature asked for": (GOOD, (), ("no feature column", "'x', 'z', 'y'")),
}


@pytest.mark.parametrize(("content", "features", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(
    tmp_path: Path,
    content: str | bytes,
    features: tuple[str, ...] | None,
    words: tuple[str, ...],
) -> None:
    with pytest.raises(DataError) as caught:
        read_csv(write(tmp_path, content), "y", features)
    check_sentence(caught.value, words)


MISSING = ["", "  ", "NA", "n/a", "#N/A", "NaN", "nan", "null", "NULL", "inf", "-Inf", "1e999"]


@pytest.mark.parametrize("value", MISSING)
def test_missing_value(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, f"x,y\n1,2\n2,{value}\n3,4\n{value},3\n5,1\n")
    with pytest.raises(DataError) as caught:
        read_csv(path, "y")
    check_sentence(caught.value, ("2 of 5 rows", "row 2", "'y'", "--drop-missing"))

    kept = read_csv(path, "y", drop_missing=True)
    assert kept.rows.tolist() == [1, 3, 5]
    assert kept.X.tolist() == [[1], [3], [5]]
    assert kept.y.tolist() == [2, 4, 1]
    assert kept.note == "2 of 5 rows had blanks and were dropped."


def test_missing_in_one_row(tmp_path: Path) -> None:
    path = write(tmp_path, "x,y\n,2\n2,3\n3,1\n")
    with pytest.raises(DataError, match=r"^1 of 3 rows has a blank.*row 1, column 'x'"):
        read_csv(path, "y")
    assert read_csv(path, "y", drop_missing=True).note == "1 of 3 rows had blanks and was dropped."


def test_missing_in_unused_column_is_no_matter(tmp_path: Path) -> None:
    found = read_csv(write(tmp_path, "x,t,y\n1,,2\n2,red,3\n"), "y", ["x"])
    assert found.rows.tolist() == [1, 2]
    assert found.note == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "x,z,y\n1,5,3\n2,7,1\n4,,2\n",
            ("2 rows left", "1 of 3", "2 features and an intercept", "at least 3"),
        ),
        ("x,y\n1,\n2,NA\n", ("0 rows left", "2 of 2", "at least 2")),
        ("x,y\n1,1\n1,3\n2,\n", ("'x'", "constant", "1 in all 2 rows")),
        ("x,y\n1,3\n2,3\n,4\n", ("target 'y'", "constant", "3 in all 2 rows")),
    ],
    ids=["too few", "none", "constant column", "constant target"],
)
def test_bad_after_drop(tmp_path: Path, content: str, words: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        read_csv(write(tmp_path, content), "y", drop_missing=True)
    check_sentence(caught.value, words)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_csv(tmp_path / "absent.csv", "y")
    check_sentence(caught.value, ("no file", "absent.csv"))


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_csv(tmp_path, "y")
    check_sentence(caught.value, (tmp_path.name, "is a directory"))


def test_file_used_as_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_csv(write(tmp_path, GOOD) / "more.csv", "y")
    check_sentence(caught.value, ("more.csv",))


def test_the_target_cannot_be_left_out_with_features(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'high'") as caught:
        read_csv(write(tmp_path, "x,y\n1,2\n2,high\n"), "y")
    assert "--features" not in str(caught.value)


def test_nearest_name_whatever_the_case(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nearest is 'Yield'"):
        read_csv(write(tmp_path, "x,Yield\n1,2\n2,1\n"), "YIELD")


def test_long_header_is_cut(tmp_path: Path) -> None:
    header = ",".join(f"c{i}" for i in range(300))
    with pytest.raises(DataError) as caught:
        read_csv(write(tmp_path, f"{header}\n{header}\n{header}\n"), "y")
    check_sentence(caught.value, ("'c19', 280 more",))


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD.rstrip("\n"),
        "\ufeff" + GOOD,
        "\ufeff" + GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r"),
        GOOD + "\n\n  \n",
        GOOD + "\r\n\r\n",
        "\n" + GOOD,
        GOOD.replace(",", " ,  ").replace("\n", " \n"),
        'x, "z" ,y\n"1", "5" ,3\n2,7,"1" \n4,6, 2\n',
        "x,z,y\n+1,5.,3e0\n2.0,.7E+1,10e-1\n04,6,2\n",
        "obs,x,z,y\n9,1,5,3\n8,2,7,1\n7,4,6,2\n",
    ],
)
def test_good_file(tmp_path: Path, content: str) -> None:
    found = read_csv(str(write(tmp_path, content)), "y")
    assert (found.name, found.features, found.target) == ("given", ("x", "z"), "y")
    assert found.X.tolist() == [[1, 5], [2, 7], [4, 6]]
    assert found.y.tolist() == [3, 1, 2]
    assert found.rows.tolist() == [1, 2, 3]
    assert found.X.dtype == found.y.dtype == np.float64
    assert np.issubdtype(found.rows.dtype, np.integer)
    assert found.note == ""


def test_as_many_rows_as_coefficients(tmp_path: Path) -> None:
    assert read_csv(write(tmp_path, GOOD), "y").X.shape == (3, 2)


def test_features_keep_the_order_asked_for(tmp_path: Path) -> None:
    found = read_csv(write(tmp_path, GOOD), "x", ["y", "z"])
    assert found.features == ("y", "z")
    assert found.X.tolist() == [[3, 5], [1, 7], [2, 6]]
    assert found.y.tolist() == [1, 2, 4]
    assert read_csv(write(tmp_path, GOOD), "y", "x").features == ("x",)


def test_quoted_comma(tmp_path: Path) -> None:
    text = '"price, EUR","said ""no"" , then",y\n1,"-4.5",2\n1e3,2,3\n+2,1,4\n'
    found = read_csv(write(tmp_path, text), "y", ["price, EUR"])
    assert found.features == ("price, EUR",)
    assert found.X.tolist() == [[1], [1000], [2]]


def test_negative_and_exponent(tmp_path: Path) -> None:
    found = read_csv(write(tmp_path, "x,y\n1e3,-4.5\n+2,-1E-2\n"), "y")
    assert found.X.tolist() == [[1000], [2]]
    assert found.y.tolist() == [-4.5, -0.01]


@pytest.mark.parametrize("name", SHAPES)
def test_built_in(name: str) -> None:
    found = load(name)
    n, p = SHAPES[name]
    assert isinstance(found, Data)
    assert found.name == name
    assert found.X.shape == (n, p)
    assert found.y.shape == (n,)
    assert len(found.features) == p
    assert found.target not in found.features
    assert np.isfinite(found.X).all()
    assert np.isfinite(found.y).all()
    assert found.rows.tolist() == list(range(1, n + 1))
    assert np.linalg.matrix_rank(np.column_stack([np.ones(n), found.X])) == p + 1
    assert re.fullmatch(r"[A-Z].*\.", found.note)
    assert ". " not in found.note


def test_phones_least_squares() -> None:
    # Venables & Ripley (2002), section 6.5
    phones = load("phones")
    design = np.column_stack([np.ones(len(phones.y)), phones.X])
    intercept, slope = np.linalg.lstsq(design, phones.y)[0]
    assert f"{intercept:.3f}" == "-260.059"
    assert f"{slope:.3f}" == "5.041"


def test_known_rows() -> None:
    assert load("animals2").X[5, 0] == pytest.approx(np.log(11700))
    assert load("pilot_error").X[5, 0] == 370
    assert load("engel").X.argmax() == 137
    assert (load("siegel").y[:6] == 0).all()


def test_california_columns() -> None:
    california = load("california")
    assert california.target == "med_house_val"
    # the first row: the numbers that scikit-learn prints for its copy
    first = [8.3252, 41, 6.98412698, 1.02380952, 322, 2.55555556, 37.88, -122.23]
    np.testing.assert_allclose(california.X[0], first, rtol=1e-8)
    assert california.features == (
        "median_income",
        "housing_median_age",
        "ave_rooms",
        "ave_bedrms",
        "population",
        "ave_occup",
        "latitude",
        "longitude",
    )
    assert california.y[0] == pytest.approx(4.526)
    assert np.sum(california.y >= 5.00001) == 965
    assert int(california.X[:, 5].max()) == 1243


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("phone", "phones"), ("StarsCyg", "starsCYG"), ("stack-loss", "stackloss")],
)
def test_unknown_name(name: str, nearest: str) -> None:
    with pytest.raises(DataError) as caught:
        load(name)
    check_sentence(caught.value, (repr(name), f"nearest is '{nearest}'", *names()))


@pytest.mark.parametrize("name", ["", "zzz", "Å"])
def test_unknown_name_like_none(name: str) -> None:
    with pytest.raises(DataError) as caught:
        load(name)
    check_sentence(caught.value, (repr(name), "choose one of", *names()))


def test_built_in_sets_are_the_files() -> None:
    assert sorted(names()) == sorted(path.stem for path in FOLDER.glob("*.csv"))
    assert sorted(names()) == sorted(SHAPES)


def test_sources_mention_every_file() -> None:
    sources = (FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    for name, (n, _) in SHAPES.items():
        lines = [line for line in sources.splitlines() if f"`{name}.csv`" in line]
        assert any(f"| {n} |" in line for line in lines), name
