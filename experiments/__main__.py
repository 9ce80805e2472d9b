"""Lists the experiments, or runs one: `python -m experiments compare --help`."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments import UsageError

FOLDER = Path(__file__).parent


def experiments() -> dict[str, str]:
    """Every experiment and its first line: the files here that do not begin with `_`."""
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
    import tyro  # noqa: PLC0415  (listing stays quick)

    module = importlib.import_module(f"experiments.{name}")
    config = tyro.cli(
        module.Config,
        args=options,
        prog=f"python -m experiments {name}",
        description=module.__doc__,
    )
    try:
        return module.main(config)
    except UsageError as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written.", file=sys.stderr)
        return 130


def refuse(sentence: str) -> int:
    """One clear sentence, and the exit code of bad usage."""
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
