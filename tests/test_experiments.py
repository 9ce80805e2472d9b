"""The experiments as a user meets them: what they find, what they write, what they refuse."""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog

import robustloss as rl
from experiments import FindingError, _plotting, _results, compare
from experiments.__main__ import experiments, main
from experiments.data import load
from robustloss import losses as families

OPTIMA = json.loads((Path(__file__).parent / "reference" / "optima.json").read_text())


@pytest.fixture
def csv(tmp_path):
    """Writes a CSV of these lines and returns its path."""

    def write(*lines, encoding="utf-8"):
        path = tmp_path / "mine.csv"
        path.write_bytes("\n".join(lines).encode(encoding))
        return str(path)

    return write


def refused(capsys, *arguments):
    """The one sentence of a run that is refused."""
    code = main(list(arguments))
    said = capsys.readouterr()
    assert code == 2
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_listing_names_every_experiment_and_its_question(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert {"compare", "kink", "accuracy", "speed", "start"} <= set(experiments())
    for name, question in experiments().items():
        assert name in said
        assert question.endswith("?")


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_has_the_parts(name, capsys):
    module = importlib.import_module(f"experiments.{name}")
    for part in ("Config", "run", "check", "findings", "show", "files", "folder"):
        assert hasattr(module, part), f"{name} has no {part}"
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert "--out" in capsys.readouterr().out


SMOKING = [name for name in experiments() if name not in ("accuracy", "speed", "compare")]
SLOW = (
    "landscape", "convergence", "outliers", "efficiency", "network", "adaptive", "start", "losses",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.thorough) if n in SLOW else n for n in SMOKING]
)
def test_small_settings_find_it_too(name, tmp_path):
    """The claim holds, every picture is drawn, and the files say how they came about."""
    module = importlib.import_module(f"experiments.{name}")
    config = replace(module.SMOKE, out=tmp_path / "r")
    result = module.run(config)
    module.check(result)
    assert all(sentence.endswith(".") for sentence in module.findings(result))
    files = module.files(config, result)
    pictures = [content for file, content in files.items() if file.endswith(".png")]
    assert pictures
    assert all(content[:4] == b"\x89PNG" for content in pictures)
    told = json.loads(files["result.json"])
    assert told["settings"]["out"] == str(tmp_path / "r")
    assert {"jax", "device"} <= set(told["environment"])


SHARDED = """
import sys
from dataclasses import replace
import numpy as np
from experiments import _results, outliers
import jax, jax.numpy as jnp
from experiments._distribution import distribute
from experiments._linear_fits import fit_losses
result = outliers.run(replace(outliers.SMOKE, sets=3, losses=outliers.SMOKE.losses[:3]))
with jax.enable_x64(True):
    fits = distribute(lambda b: fit_losses(("squared_error", "huber"), b[:, :1], b[:, 1]))
    text = fits.lower(jnp.ones((3, 9, 2))).compile().as_text()
for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
    assert word not in text, word
np.savez(sys.argv[1], devices=jax.device_count(), errors=result.errors, curves=result.curves)
"""


@pytest.mark.thorough
def test_sweeps_are_the_same_on_eight_devices_that_do_not_talk(tmp_path):
    found = []
    for count in (1, 8):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        path = tmp_path / f"{count}.npz"
        done = subprocess.run(
            [sys.executable, "-c", SHARDED, str(path)],
            env={**os.environ, **flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with np.load(path) as file:
            found.append(dict(file))
    one, eight = found
    assert (one["devices"], eight["devices"]) == (1, 8)
    np.testing.assert_allclose(eight["errors"], one["errors"], rtol=1e-5)
    np.testing.assert_allclose(eight["curves"], one["curves"], rtol=1e-5, atol=1e-5)


def test_the_excess_of_an_asymmetric_loss_is_over_the_optimum_of_the_linear_program():
    """The loss takes predictions - targets, and the exact minimum is HiGHS's."""
    result = compare.run(compare.Config(data="phones", losses=("quantile",)))
    data, q = load("phones"), 0.75
    n = len(data.y)
    X = np.column_stack([np.ones(n), data.X])
    costs = np.concatenate([np.zeros(X.shape[1]), np.full(n, q / n), np.full(n, (1 - q) / n)])
    bounds = [(None, None)] * X.shape[1] + [(0, None)] * (2 * n)
    equations = np.column_stack([X, np.eye(n), -np.eye(n)])
    best = linprog(costs, A_eq=equations, b_eq=data.y, bounds=bounds).fun
    excess = (result.objectives[0] - best) / result.objectives[0]
    assert excess > 1e-9  # optax does not reach the kink, so that a wrong sign cannot pass as 0
    assert result.excesses[0] == pytest.approx(excess, rel=1e-4)


def test_all_writes_a_report_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    from experiments import sign

    run = ["all", "--smoke", "--only", "sign", "--out", str(tmp_path)]
    assert main(run) == 0
    report = (tmp_path / "report" / "report.md").read_text()
    assert experiments()["sign"] in report
    assert "last bit" in report
    picture = re.search(r"\]\((.*\.png)\)", report).group(1)
    assert (tmp_path / "report" / picture).read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(sign, "run", lambda *_: pytest.fail("again"))
    assert main(run) == 0
    monkeypatch.undo()
    monkeypatch.setattr(sign, "check", lambda _: (_ for _ in ()).throw(FindingError("no")))
    assert main([*run, "--seed", "1", "--no-plots"]) == 1  # other settings: run again
    assert "sign: its finding does not hold" in capsys.readouterr().err
    assert (tmp_path / "report" / "report.md").read_text() == report


@pytest.mark.parametrize(
    "name",
    [
        "phones",
        *(pytest.param(n, marks=pytest.mark.thorough) for n in ("siegel", "hbk", "california")),
    ],
)
def test_compare_is_huber_as_statsmodels_fits_it(name):
    exact = name == "phones"
    result = compare.run(compare.Config(data=name, losses=("mae", "huber"), exact=exact))
    compare.check(result)
    assert np.isnan(result.excesses[0]) or exact
    assert result.excesses[0] < 1e-9 or not exact
    assert result.excesses[1] < 1e-14
    assert all(sentence.endswith(".") for sentence in compare.findings(result))
    reference, data = OPTIMA["rlm"][name], load(name)
    ours = result.coefficients[result.losses.index("huber")]
    gap = (ours - reference["coef"])[1:] * data.X.std(0, ddof=1) / data.y.std(ddof=1)
    np.testing.assert_allclose(gap, 0, atol=1e-5)
    assert result.scale == pytest.approx(reference["scale"], rel=1e-5)


def test_compare_takes_any_loss_and_starts_those_that_redescend_at_hubers_fit():
    config = compare.Config(losses=("mse", "tukey", "talwar"), exact=False)
    result = compare.run(config)
    compare.check(result)
    slopes = dict(zip(result.losses, result.coefficients[:, 1], strict=True))
    keep = ~np.isin(result.data.rows, range(15, 21))
    year, calls = result.data.X[keep, 0], result.data.y[keep]
    assert slopes["talwar"] == pytest.approx(np.polyfit(year, calls, 1)[0], rel=1e-6)
    assert 1.1 < slopes["tukey"] < 1.5
    assert slopes["squared_error"] > 5


def test_compare_is_exact_where_raw_units_would_cancel(csv, tmp_path):
    noise = 0.3 * (-1) ** np.arange(20)
    y = 1e9 + 1e-3 * np.r_[np.arange(20) + noise, 500.0]
    path = csv("x,y", *(f"{i},{v:.6f}" for i, v in enumerate(y)))
    result = compare.run(compare.Config(csv=Path(path), target="y", losses=("huber",), exact=False))
    compare.check(result)
    assert result.coefficients[0, 1] == pytest.approx(1e-3, rel=0.05)


@pytest.fixture
def two_of_each_family(monkeypatch):
    """Instead of all losses, which take their time."""
    last = {name for f in families.FAMILIES for name in f.__all__[-2:]}
    some = {n: loss for n, loss in rl.LOSSES.items() if n in last | {"tukey"}}
    monkeypatch.setattr(rl, "LOSSES", some)


@pytest.mark.usefixtures("two_of_each_family")
def test_the_gallery_shows_every_loss_with_its_constants(tmp_path, capsys):
    assert main(["losses", "--points", "2", "--out", str(tmp_path / "r")]) == 0
    said = capsys.readouterr().out
    assert "4.685065" in said
    assert "1.547645" in said
    written = json.loads((tmp_path / "r" / "result.json").read_text())["losses"]
    assert set(written) == set(rl.LOSSES)
    sheets = {family.__name__.rsplit(".", 1)[-1] for family in families.FAMILIES}
    assert {path.stem for path in (tmp_path / "r").glob("*.png")} == sheets


@pytest.mark.usefixtures("two_of_each_family")
def test_a_wrong_constant_fails_the_gallery():
    from experiments import losses as gallery

    result = gallery.run(gallery.Config(points=2))
    gallery.check(result)
    for field in ("at_95", "at_50"):
        tukey = result.losses["tukey"]
        moved = tukey._replace(**{field: getattr(tukey, field) + 1e-5})
        with pytest.raises(FindingError, match="tukey"):
            gallery.check(result._replace(losses=result.losses | {"tukey": moved}))


LIKELIHOODS = {"gaussian_nll", "laplace_nll", "student_t_nll", "general_nll"}


def test_every_loss_but_the_likelihoods_has_limits_in_accuracy():
    from experiments import accuracy

    expected = set(rl.LOSSES) - LIKELIHOODS  # whose value at 0 depends on the scale
    assert set(accuracy.LIMITS) == expected
    assert all(len(limits) == len(accuracy.VIEWS) for limits in accuracy.LIMITS.values())


def test_accuracy_refuses_a_loss_without_a_row(monkeypatch):
    from experiments import accuracy

    monkeypatch.delitem(accuracy.LIMITS, "tukey")
    with pytest.raises(FindingError, match="has no row with limits for tukey"):
        accuracy.check(accuracy.Result(0, {}, {}, {}))


def test_accuracy_refuses_a_result_without_the_derivatives_of_a_loss():
    from experiments import accuracy

    others = dict.fromkeys(list(rl.LOSSES)[1:])
    with pytest.raises(FindingError, match=f"no derivatives of {next(iter(rl.LOSSES))}"):
        accuracy.check(accuracy.Result(0, {}, {}, others))


def test_every_loss_has_a_look_of_its_own():
    looks = _plotting.LOOKS
    assert set(looks) == {*rl.LOSSES, "mm"}
    for parts in (("color", "linestyle"), ("color", "marker")):
        seen = {tuple(getattr(look, part) for part in parts) for look in looks.values()}
        assert len(seen) == len(looks), parts


def test_accuracy_keeps_its_limits_and_notices_an_error(monkeypatch):
    """Two losses stand for all, which take their time; the tables are checked above."""
    from experiments import accuracy

    monkeypatch.setattr(accuracy, "LIMITS", {k: accuracy.LIMITS[k] for k in ("tukey", "quantile")})
    monkeypatch.setattr(rl, "LOSSES", {k: rl.LOSSES[k] for k in ("tukey", "quantile")})
    monkeypatch.setattr(
        accuracy, "OTHERS", {k: v for k, v in accuracy.OTHERS.items() if "cosh" in k}
    )
    result = accuracy.run(accuracy.Config(points=30))
    accuracy.check(result)
    assert 1 < result.derivatives["tukey"].ulp < 5
    assert any("derivative" in sentence for sentence in accuracy.findings(result))
    wrong = result.derivatives | {"tukey": result.derivatives["tukey"]._replace(ulp=10.5)}
    with pytest.raises(FindingError, match="tukey, derivatives"):
        accuracy.check(result._replace(derivatives=wrong))
    assert 1 < result.single["tukey"]["slope"].ulp < 5
    ours = (result.single[name] for name in rl.LOSSES)
    assert all(w.wrong == 0 for views in ours for w in views.values())
    assert result.single["optax.log_cosh"]["value"].ulp > 1e9
    assert result.single["optax.log_cosh"]["value"].wrong > 1000


def test_compare_names_the_rows_that_were_recorded_wrongly():
    result = compare.run(compare.Config(losses=("mse", "huber"), exact=False))
    first, second = compare.findings(result)
    assert first.startswith("MSE's slope is 2.5 times Huber's (5.041 against 2.04)")
    assert "rows 15 to 20 are why" in first
    assert "rows 15 to 20" in second


def test_compare_sees_what_weights_cannot():
    config = compare.Config(data="starsCYG", losses=("mse", "huber"), exact=False)
    sentences = " ".join(compare.findings(compare.run(config)))
    assert "nearly agree" in sentences
    assert "rows 11, 20, 30 and 34" in sentences


def test_any_start_ends_in_the_same_place():
    config = compare.Config(data="stackloss", losses=("huber", "log_cosh"), scale=2.5, exact=False)
    a, b = (compare.run(replace(config, seed=seed)).coefficients for seed in (None, 1))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_compare_writes_the_whole_folder_and_replaces_only_its_own(tmp_path, capsys):
    out = tmp_path / "deep" / "results"
    assert main(["compare", "--losses", "mse", "huber", "--out", str(out)]) == 0
    written = {path.name for path in out.iterdir()}
    assert written == {"result.json", "coefficients.csv", "fit.png", "weights.png", "losses.png"}
    result = json.loads((out / "result.json").read_text())
    assert result["fits"]["huber"]["converged"] is True
    assert result["fits"]["huber"]["low_weight_rows"] == list(range(15, 21))
    assert set(result["environment"]) >= {"jax", "optax", "robustloss", "python", "device"}
    quick = ["compare", "--losses", "mse", "--scale", "9", "--no-plots", "--no-exact", "--out"]
    assert main([*quick, str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"result.json", "coefficients.csv"}
    assert [path.name for path in out.parent.iterdir()] == ["results"]
    (out / "thesis.tex").write_text("mine")
    capsys.readouterr()
    assert "holds other files" in refused(capsys, "compare", "--out", str(out))
    assert (out / "thesis.tex").read_text() == "mine"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "result.json").write_text("{}")
    assert "holds other files" in refused(capsys, "compare", "--out", str(foreign))
    assert (foreign / "result.json").read_text() == "{}"


def test_a_failed_write_leaves_the_old_results(tmp_path, monkeypatch):
    _results.write(tmp_path / "r", {"result.json": b"{}", "a.png": b"old"})
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        _results.write(tmp_path / "r", {"result.json": b"{}"})
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_finding_that_fails_is_told_and_not_written(tmp_path, monkeypatch, capsys):
    quick = ["compare", "--losses", "mse", "--scale", "9", "--no-plots", "--no-exact", "--out"]
    run = [*quick, str(tmp_path / "r")]
    monkeypatch.setattr(compare, "check", lambda result: pytest.fail("no"))
    with pytest.raises(pytest.fail.Exception):
        main(run)

    def fails(result):
        raise FindingError("huber is smaller at another fit")

    monkeypatch.setattr(compare, "check", fails)
    monkeypatch.setattr(compare, "findings", lambda result: ["said all the same"])
    assert main(run) == 1
    said = capsys.readouterr()
    assert "huber is smaller at another fit" in said.err
    assert "said all the same" not in said.out
    assert not (tmp_path / "r").exists()


def test_own_csv_with_bom_quotes_and_blanks(csv, tmp_path, capsys):
    lines = ['"price, EUR",size', *(f"{3 * i + 1},{i}" for i in range(12)), "7,", ""]
    path = csv(*lines, encoding="utf-8-sig")
    options = ["compare", "--csv", path, "--target", "price, EUR", "--out", str(tmp_path / "r")]
    options += ["--losses", "mse", "mae", "huber", "--no-exact"]
    assert "--drop-missing" in refused(capsys, *options)
    assert not (tmp_path / "r").exists()
    assert main([*options, "--drop-missing", "--no-plots"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 13 rows" in said
    rows = (tmp_path / "r" / "coefficients.csv").read_text().splitlines()
    assert rows[0] == "loss,intercept,size"
    for row in rows[1:]:
        np.testing.assert_allclose([float(v) for v in row.split(",")[1:]], [1, 3], atol=1e-4)


def test_far_away_columns_and_names_with_brackets(csv, tmp_path, capsys):
    rng = np.random.default_rng(0)
    t, y = 1.7e9 + np.arange(30.0), 3 * np.arange(30.0) + rng.normal(size=30)
    y[25:28] += 200
    rows = (f"{a:.0f},{b:.6f}" for a, b in zip(t, y, strict=True))
    path, out = csv("time [s],y [/b]", *rows), tmp_path / "r"
    options = ["compare", "--csv", path, "--target", "y [/b]", "--out", str(out), "--no-plots"]
    options += ["--losses", "mse", "huber", "--no-exact"]
    assert main(options) == 0
    said = capsys.readouterr().out
    assert "time [s]" in said
    assert "y [/b]" in said
    without = [s for s in json.loads((out / "result.json").read_text())["findings"] if "MSE g" in s]
    keep = np.r_[0:25, 28:30]
    slope = np.polyfit(t[keep] - t.mean(), y[keep], 1)[0]
    assert float(without[0].rsplit(" ", 1)[1].rstrip(".")) == pytest.approx(slope, rel=1e-3)


def test_too_few_steps_say_so(tmp_path, capsys):
    run = ["compare", "--steps", "2", "--no-plots", "--out", str(tmp_path / "r")]
    assert main([*run, "--losses", "huber", "--scale", "9", "--no-exact"]) == 1
    assert "did not converge; raise --steps" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["accuracy", "--delta", "0"],
        ["accuracy", "--points", "0"],
        ["kink", "--steps", "0"],
        ["speed", "--repeats", "0"],
    ],
    ids=str,
)
def test_other_experiments_refuse_bad_settings(options, tmp_path, capsys):
    assert "must be" in refused(capsys, *options, "--out", str(tmp_path / "r"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "phone"], "'phones'"),
        (["--losses", "hubre"], "did you mean 'huber'?"),
        (["--losses", "xyz"], "there are"),
        (["--losses"], "--losses needs at least one"),
        (["--data", "phones", "--csv", "x.csv", "--target", "y"], "exclude each other"),
        (["--steps", "0"], "--steps must be >= 1, got 0"),
        (["--scale", "-1"], "--scale must be a positive number, got -1"),
        (["--scale", "nan"], "--scale must be a positive number, got nan"),
        (["--target", "y"], "none was given"),
        (["--csv", "nowhere.csv", "--target", "y"], "nowhere.csv"),
        (["--csv", "nowhere.csv"], "needs --target"),
    ],
)
def test_bad_options_are_one_sentence(options, words, tmp_path, capsys):
    assert words in refused(capsys, "compare", *options, "--out", str(tmp_path / "r"))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "mine.csv' is empty"),
        (["x,y", "1,2"], "only one row"),
        (["x;y", "1;2", "2;3"], "separated by semicolons"),
        (["x,x,y", "1,2,3", "2,3,4", "3,1,1"], "The column name 'x' occurs 2 times"),
        (["x,z", "1,2", "2,3", "3,4"], "The target 'y' is not a column"),
        (["x,y", "a,2", "2,3", "3,4"], "Column 'x' is not numeric: row 1 has 'a'"),
        (["x,y", "1,2", "1,3", "1,4"], "Column 'x' is constant (1 in all 3 rows)"),
        (["x,y", "1,2", "2,2", "3,2"], "The target 'y' is constant (2 in all 3 rows)"),
        (["a,b,c,y", "1,2,3,4", "2,3,5,5", "7,1,1,1"], "3 rows, but 3 features and an intercept"),
        (["a,b,y", "1,3,4", "2,5,5", "7,15,1", "8,17,3"], "'b' is a linear combination"),
    ],
)
def test_bad_files_are_one_sentence(lines, words, csv, tmp_path, capsys):
    path, out = csv(*lines), tmp_path / "r"
    assert words in refused(capsys, "compare", "--csv", path, "--target", "y", "--out", str(out))
    assert not out.exists()


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(capsys, "compare", "--out", str(tmp_path / "file"))
    inside = str(tmp_path / "file" / "r")
    assert "cannot be written" in refused(capsys, "compare", "--out", inside)
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_experiment_and_option(capsys):
    assert "did you mean 'compare'?" in refused(capsys, "compere")
    with pytest.raises(SystemExit) as left:
        main(["compare", "--stesp", "3"])
    assert left.value.code == 2


@pytest.mark.thorough
def test_start_decides_where_a_fit_ends():
    from experiments import start

    result = start.run(start.Config(starts=20))
    start.check(result)
    assert start.files(start.Config(), result).keys() == {"result.json", "start.png"}


@pytest.mark.thorough
def test_speed_of_fits_runs():
    from experiments import _fit_speed

    case = _fit_speed.build_cases(10_000)[0]
    timing = _fit_speed.time_case(case._replace(peers={"peer": lambda X, y: 1.0}), 2)
    assert timing.converged
    assert timing.error < 1e-7
    assert len(timing.peers["peer"]) == 2
    assert sum(timing.ours) >= 2 * _fit_speed.SHORT  # in two turns


def test_a_sweep_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    from functools import partial

    from experiments import accuracy

    monkeypatch.setattr(accuracy, "CHUNK", 2**20)
    monkeypatch.setattr(accuracy, "BLOCK", 2)  # five chunks in blocks of two
    monkeypatch.setattr(accuracy, "LIMITS", {"absolute_error": (0.5, 0.5, 0.5)})
    monkeypatch.setattr(rl, "LOSSES", {"absolute_error": rl.LOSSES["absolute_error"]})
    config = accuracy.Config(others=False, points=30, out=tmp_path / "r")
    place = _results.locate_cache(config.out, config)
    whole = accuracy.run(config, cache=partial(_results.cache_arrays, place))
    blocks = sorted(path for path in place.iterdir() if "derivatives" not in path.name)
    assert len(blocks) == 3
    with np.load(blocks[1]) as file:
        other = {name: np.array([0.25, 2.0, 0.0]) for name in file}
    np.savez(blocks[1], **other)
    blocks[2].rename(blocks[2].with_suffix(".new"))  # as kill -9 leaves it
    again = accuracy.run(config, cache=partial(_results.cache_arrays, place))
    assert again.single["absolute_error"]["value"].ulp == 0.25  # what was kept counts
    assert whole.single["absolute_error"]["value"].ulp == 0
    assert blocks[2].exists()
    elsewhere = _results.locate_cache(config.out, replace(config, delta=2.0))
    assert elsewhere != place
    assert _results.locate_cache(config.out, replace(config, out=None)) == place
