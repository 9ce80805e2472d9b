"""What do all the experiments find?

Runs the experiments one after the other and writes a report with every finding and picture. An
experiment that an earlier call has run with the same settings and versions on the same device is
not run again. `accuracy` and `speed` are about this library and need calls of their own.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from experiments import Progress, UsageError, _results, ignore_progress, require

EXCLUDED = ("all", "accuracy", "speed")


@dataclass(frozen=True)
class Config:
    """Settings of `all`."""

    only: tuple[str, ...] = ()
    """The experiments to run; by default all but `accuracy` and `speed`."""
    smoke: bool = False
    """Small settings, to test that everything works."""
    seed: int = 0
    """The seed of all experiments."""
    out: Path | None = None
    """The folder of the output folders; results by default."""
    plots: bool = True
    """Draw the pictures."""


SMOKE = Config(only=("sign",), smoke=True)


class Result(NamedTuple):
    """The results by experiment."""

    questions: dict[str, str]
    records: dict[str, dict[str, Any]]  # the content of result.json
    failed: dict[str, str]
    folders: dict[str, Path]


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Runs the experiments that have no result yet."""
    from experiments.__main__ import experiments, perform  # noqa: PLC0415  (imports this file)

    known = {name: question for name, question in experiments().items() if name not in EXCLUDED}
    for name in config.only:
        if name not in known:
            raise UsageError(f"--only takes {', '.join(known)}, got {name!r}.")
    names = config.only or tuple(known)
    modules = {name: importlib.import_module(f"experiments.{name}") for name in names}
    settings = {name: _build_setting(config, name, module) for name, module in modules.items()}
    folders = {name: setting.out for name, setting in settings.items()}
    for place in folders.values():
        _results.check_writable(place)  # before any work
    records, failed = {}, {}
    for i, (name, module) in enumerate(modules.items()):
        progress(i / len(names), name)
        setting = settings[name]
        record = _read_record(setting)
        if record is None:
            quiet = Console(quiet=True)
            code = perform(module, setting, quiet)
            record = _read_record(setting) if code == 0 else None
        if record is None:
            failed[name] = f"its finding does not hold: run `python -m experiments {name}`"
        else:
            records[name] = record
    return Result({name: known[name] for name in names}, records, failed, folders)


def check(result: Result) -> None:
    """Every finding holds."""
    require(
        not result.failed, "; ".join(f"{name}: {reason}" for name, reason in result.failed.items())
    )


def findings(result: Result) -> list[str]:
    """The number of experiments and their total time."""
    seconds = sum(record["seconds"] for record in result.records.values())
    return [f"{len(result.records)} experiments took {seconds / 60:.1f} minutes; see report.md."]


def show(result: Result, console: Console) -> None:
    """Prints all findings."""
    table = Table("experiment", "s", "finding", show_lines=True)
    for name, record in result.records.items():
        table.add_row(name, f"{record['seconds']:.0f}", "\n".join(record["findings"]))
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The report and its pictures."""
    lines = ["# What the experiments find", ""]
    environment = _results.environment()
    lines += [", ".join(f"{k} {v}" for k, v in environment.items() if k != "device"), ""]
    lines += [f"On {environment['device']}.", ""]
    written = {"result.json": _results.record(config, seconds_of={
        name: record["seconds"] for name, record in result.records.items()
    })}  # fmt: skip
    for name, record in result.records.items():
        command = f"python -m experiments {name}"
        lines += [f"## {result.questions[name]}", ""]
        lines += [*(f"- {sentence}" for sentence in record["findings"]), ""]
        pictures = sorted(result.folders[name].glob("*.png"))
        for picture in pictures:
            written[f"{name}-{picture.name}"] = picture.read_bytes()
            lines += [f"![{result.questions[name]}]({name}-{picture.name})", ""]
        lines += [f"`{command}`, {record['seconds']:.0f} s", ""]
    return {"report.md": "\n".join(lines).encode(), **written}


def folder(config: Config) -> Path:
    """The folder of the report."""
    return (config.out or Path("results")) / "report"


def _build_setting(config: Config, name: str, module: ModuleType) -> Any:
    setting = module.SMOKE if config.smoke else module.Config()
    setting = replace(setting, out=folder(config).parent / name, plots=config.plots)
    seeded = getattr(setting, "seed", None) is not None
    return replace(setting, seed=config.seed) if seeded else setting


def _read_record(config: Any) -> dict[str, Any] | None:
    """The record of an earlier run with these settings, if there is one."""
    try:
        record = json.loads((config.out / _results.RECORD).read_text())
    except (OSError, ValueError):
        return None
    wanted = json.loads(_results.record(config))
    if any(record.get(key) != wanted[key] for key in ("settings", "environment")):
        return None
    pictures = list(config.out.glob("*.png"))
    return record if "findings" in record and bool(pictures) == config.plots else None
