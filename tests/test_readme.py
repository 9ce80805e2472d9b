"""What the README says is what a reader gets."""

import contextlib
import functools
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import robustloss as rl
from experiments import __main__ as command
from experiments import compare, kink

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_print_what_is_printed_below_them():
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for code, printed in blocks:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code, names)
        assert said.getvalue() == printed


@pytest.mark.thorough
def test_page_on_linear_fits_prints_what_it_says():
    """But for the number of steps; and R's table beside each has the same digits."""
    page = (ROOT / "docs" / "linear.md").read_text()
    blocks = re.findall(
        r"<!-- printed -->\n```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL
    )
    assert len(blocks) == 3
    others = re.findall(r"```text\n +(?:Value|Estimate).*?```", page, re.DOTALL)
    names = {}
    try:
        for (code, printed), other in zip(blocks, others, strict=True):
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(code, names)
            counted = re.compile(r"in \d+ steps")
            assert counted.sub("", said.getvalue()) == counted.sub("", printed)
            ours = re.findall(r"^\w+ +(-?[\d.]+) +([\d.]+)", said.getvalue(), re.MULTILINE)
            theirs = re.findall(r"^[\w.()]+ +(-?[\d.]+) +([\d.]+)", other, re.MULTILINE)
            assert len(ours) == len(theirs) == 4
            np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), atol=1.1e-4)
    finally:
        jax.config.update("jax_enable_x64", False)


def test_loss_table_is_complete_and_its_constants_hold():
    table = README.split("## The losses")[1].split("## ")[0]
    lines = [line.strip("| ") for line in table.splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\) \| ", line) for line in lines]
    rows = {row[0].strip("`"): row[1:] for row in cells}
    families = {name: f.__module__.rsplit(".", 1)[-1] for name, f in rl.LOSSES.items()}
    assert {name: row[-1] for name, row in rows.items()} == families
    assert len(rows) == len(cells) == len(rl.LOSSES)
    for name, (*_, at_95, at_50, source, _family) in rows.items():
        assert re.search(r"\d{4}$", source)
        if at_95 == at_50 == "by alpha":
            continue
        for printed, request in ((at_95, {"efficiency": 0.95}), (at_50, {"breakdown": 0.5})):
            if printed == "-":
                with pytest.raises((ValueError, TypeError)):
                    rl.tune(rl.LOSSES[name], **request)
            else:
                assert printed == f"{rl.tune(rl.LOSSES[name], **request):.6f}"


def test_constants_named_beside_calls():
    names = {"rl": rl, "partial": functools.partial}
    calls = re.findall(r"^(rl\.\S.*)  # ([\d.]+)$", README, re.MULTILINE)
    assert len(calls) == 3
    for call, printed in calls:
        assert f"{eval(call, names):.4f}" == printed


def test_compare_block_is_what_compare_prints():
    printed = README.split("```text\n")[1].split("```")[0]
    said = io.StringIO()
    result, console = compare.run(compare.Config()), Console(file=said, width=80)
    compare.show(result, console)
    for sentence in compare.findings(result):
        console.print(f"- {sentence}", highlight=False, markup=False)
    timed = re.compile(r"\d+\.\d+ +│$|in \d+ steps$", re.MULTILINE)  # seconds, steps of MM

    def lines(text):
        return [timed.sub("", line).rstrip() for line in text.strip().splitlines()]

    assert lines(said.getvalue()) == lines(printed.split("\nWritten to")[0])


def test_kink_table_is_what_kink_measures():
    table = README.split("## Why the kink matters")[1].split("How many digits")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| ")][1:]
    said = {what: values for what, *values in rows}
    result = kink.run(kink.Config())
    at = result.slopes["jnp.abs"]
    assert said["slope of `jnp.abs` at 0 and -0"][0] == "1"
    assert (*at["0"], *at["-0"], *at["NaN"]) == (1, 1, 1, 1, -1, -1)
    assert said["slope of `jnp.abs` at NaN"][0] == "-1"
    measured = [row[2:4] for row in result.losses]
    printed = [[float(v) for v in values[:2]] for values in list(said.values())[2:]]
    assert len(printed) == len(measured)
    for ours, theirs in zip(printed, measured, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, nan_ok=True)


def test_named_commands_and_files_exist():
    pages = [ROOT / "README.md", ROOT / "experiments/README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for name in re.findall(r"python -m experiments ([a-z]+)", page.read_text()):
            assert name in command.experiments(), (page, name)
        for path in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / path).exists(), (page, path)
