"""Lists the experiments, or runs one: `python -m experiments compare --help`."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments import FindingError, UsageError

FOLDER = Path(__file__).parent
INTERRUPTED = 130


def experiments() -> dict[str, str]:
    """The question of each experiment: the files in this folder that do not begin with `_`."""
    return {
        path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        for path in sorted(FOLDER.glob("[!_]*.py"))
    }


def main(arguments: list[str]) -> int:
    """Runs `experiments NAME [options]` and returns the exit code."""
    found = experiments()
    if not arguments or arguments[0] in ("-h", "--help"):
        table = Table("experiment", "its question", title="python -m experiments NAME [--help]")
        for name, question in found.items():
            table.add_row(name, question)
        Console().print(table)
        return 0
    name, *options = arguments
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(found)}."
        return refuse(f"no experiment is called {name!r}; {hint}")
    try:
        import tyro  # noqa: PLC0415  (listing needs none of it)

        module = importlib.import_module(f"experiments.{name}")
        prog = f"python -m experiments {name}"
        config = tyro.cli(module.Config, args=options, prog=prog, description=module.__doc__)
        return perform(module, config)
    except UsageError as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        print(
            "\ninterrupted; no results were written. The same command continues a sweep "
            "where it was interrupted.",
            file=sys.stderr,
        )
        return INTERRUPTED


def perform(module: ModuleType, config: Any, console: Console | None = None) -> int:
    """Runs an experiment, checks its findings, writes the results and shows them."""
    from experiments import _results  # noqa: PLC0415

    out = module.folder(config)
    _results.check_writable(out)
    cached = _results.locate_cache(out, config)
    console = console or Console()
    begin = time.perf_counter()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("reading", total=1.0)

        def progress(share: float, task: str) -> None:
            bar.update(line, completed=share, description=task)

        sweeps = "cache" in inspect.signature(module.run).parameters
        options = {"cache": partial(_results.cache_arrays, cached)} if sweeps else {}
        result = module.run(config, progress, **options)
        findings: list[str] = []
        try:
            module.check(result)
        except FindingError as error:
            failed = f"the finding does not hold: {error}; nothing was written."
        else:
            failed = ""
            findings = module.findings(result)
            progress(1.0, "writing")
            files = module.files(config, result)
            entries = {"findings": findings, "seconds": time.perf_counter() - begin}
            _results.write(out, _results.extend_record(files, **entries))
            shutil.rmtree(cached, ignore_errors=True)
    module.show(result, console)
    for sentence in findings:
        console.print(f"- {sentence}", highlight=False, markup=False)
    if failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    console.print(f"\nWritten to {out}/", highlight=False, markup=False)
    return 0


def refuse(sentence: str) -> int:
    """One clear sentence, and the exit code of bad usage."""
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == INTERRUPTED:
        sys.stderr.flush()
        os._exit(code)  # a normal exit would end the interpreter while XLA still computes
    sys.exit(code)
