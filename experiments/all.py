"""What do all the experiments find?

Runs those that answer a question, one after the other, and writes a report with every finding and
picture. What an earlier call has done, with the same settings and versions on the same device, is
not done again. `accuracy` and `speed` are about this library, and left to calls of their own.
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

APART = ("all", "accuracy", "speed")


@dataclass(frozen=True)
class Config:
    """Settings of `all`."""

    only: tuple[str, ...] = ()
    """The experiments to run; by default all that answer a question."""
    smoke: bool = False
    """Small settings, to see that everything works."""
    seed: int = 0
    """Of all of them."""
    out: Path | None = None
    """Where the results go, a folder for each; results by default."""
    plots: bool = True
    """Draw the pictures."""


SMOKE = Config(only=("sign",), smoke=True)


class Result(NamedTuple):
    """By experiment."""

    questions: dict[str, str]
    told: dict[str, dict[str, Any]]  # what is in result.json
    failed: dict[str, str]
    folders: dict[str, Path]


def run(config: Config, progress: Progress = ignore_progress) -> Result:
    """Runs what is not there yet."""
    from experiments.__main__ import experiments, perform  # noqa: PLC0415  (it runs this file)

    known = {name: question for name, question in experiments().items() if name not in APART}
    for name in config.only:
        if name not in known:
            raise UsageError(f"--only takes {', '.join(known)}, got {name!r}.")
    names = config.only or tuple(known)
    modules = {name: importlib.import_module(f"experiments.{name}") for name in names}
    settings = {name: _settings(config, name, module) for name, module in modules.items()}
    folders = {name: one.out for name, one in settings.items()}
    for place in folders.values():
        _results.check_writable(place)  # before any work
    told, failed = {}, {}
    for i, (name, module) in enumerate(modules.items()):
        progress(i / len(names), name)
        one = settings[name]
        earlier = _earlier(one)
        if earlier is None:
            quiet = Console(quiet=True)
            code = perform(module, one, quiet)
            earlier = _earlier(one) if code == 0 else None
        if earlier is None:
            failed[name] = f"its finding does not hold: run `python -m experiments {name}`"
        else:
            told[name] = earlier
    return Result({name: known[name] for name in names}, told, failed, folders)


def check(result: Result) -> None:
    """Every finding holds."""
    require(not result.failed, "; ".join(f"{name}: {why}" for name, why in result.failed.items()))


def findings(result: Result) -> list[str]:
    """Where the report is, and how long it took."""
    seconds = sum(told["seconds"] for told in result.told.values())
    return [f"{len(result.told)} experiments, {seconds / 60:.1f} minutes; report.md has them all."]


def show(result: Result, console: Console) -> None:
    """All findings."""
    table = Table("experiment", "s", "finding", show_lines=True)
    for name, told in result.told.items():
        table.add_row(name, f"{told['seconds']:.0f}", "\n".join(told["findings"]))
    console.print(table)


def files(config: Config, result: Result) -> dict[str, bytes]:
    """The report, beside the pictures it shows."""
    lines = ["# What the experiments find", ""]
    environment = _results.environment()
    lines += [", ".join(f"{k} {v}" for k, v in environment.items() if k != "device"), ""]
    lines += [f"On {environment['device']}.", ""]
    written = {"result.json": _results.record(config, seconds_of={
        name: told["seconds"] for name, told in result.told.items()
    })}  # fmt: skip
    for name, told in result.told.items():
        command = f"python -m experiments {name}"
        lines += [f"## {result.questions[name]}", ""]
        lines += [*(f"- {sentence}" for sentence in told["findings"]), ""]
        pictures = sorted(result.folders[name].glob("*.png"))
        for picture in pictures:
            written[f"{name}-{picture.name}"] = picture.read_bytes()
            lines += [f"![{result.questions[name]}]({name}-{picture.name})", ""]
        lines += [f"`{command}`, {told['seconds']:.0f} s", ""]
    return {"report.md": "\n".join(lines).encode(), **written}


def folder(config: Config) -> Path:
    """Where the report goes."""
    return (config.out or Path("results")) / "report"


def _settings(config: Config, name: str, module: ModuleType) -> Any:
    one = module.SMOKE if config.smoke else module.Config()
    one = replace(one, out=folder(config).parent / name, plots=config.plots)
    seeded = getattr(one, "seed", None) is not None
    return replace(one, seed=config.seed) if seeded else one


def _earlier(config: Any) -> dict[str, Any] | None:
    """The record of an earlier run with these settings, if there is one."""
    try:
        told = json.loads((config.out / _results.RECORD).read_text())
    except (OSError, ValueError):
        return None
    wanted = json.loads(_results.record(config))
    if any(told.get(key) != wanted[key] for key in ("settings", "environment")):
        return None
    pictures = list(config.out.glob("*.png"))
    return told if "findings" in told and bool(pictures) == config.plots else None
