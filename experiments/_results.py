"""Where results go: a folder that is written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import robustloss
from experiments import UsageError

MARK = "result.json"  # a folder that holds this is ours to replace


def check_writable(folder: Path) -> None:
    """Tells before the work whether `write` will be able to put results there."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output folder {folder} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise UsageError(
            f"the output folder {folder} holds other files; name a new or an empty folder."
        )
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=nearest if nearest != folder else folder.absolute().parent))
    except OSError as error:
        raise UsageError(
            f"the output folder {folder} cannot be written: {error.strerror}."
        ) from None


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Puts the files into the folder, replacing earlier results, in one rename."""
    check_writable(folder)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in files.items():
            (staged / name).write_bytes(content)
        staged.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            folder.rename(old / "old")
            staged.rename(folder)
            shutil.rmtree(old)
        else:
            staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def record(config: Any, **result: Any) -> bytes:
    """`result.json`: the result with its settings, versions and device."""
    content = {
        "settings": asdict(config),
        "environment": environment(),
        **result,
    }
    return (json.dumps(content, indent=2, default=_plain) + "\n").encode()


def environment() -> dict[str, str]:
    """What a number depends on besides its settings."""
    return {
        "robustloss": robustloss.__version__,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def picture(figure: Any) -> bytes:
    """A matplotlib figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _plain(x: Any) -> Any:
    if isinstance(x, Path):
        return str(x)
    return np.asarray(x).tolist()
