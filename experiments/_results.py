"""Where results go: a folder that is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import robustloss
from experiments import UsageError

MARK = "result.json"  # names the files written beside it: just these are ours to replace
WRITTEN = "files_of_this_result"


def check_writable(folder: Path) -> None:
    """Tells before the work whether `write` will be able to put results there."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output folder {folder} is a file; name a folder.")
    if folder.is_symlink():
        raise UsageError(f"the output folder {folder} is a link; name the folder itself.")
    if folder.is_dir() and {path.name for path in folder.iterdir()} - _ours(folder):
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
        for name, content in {**files, MARK: _listing(files)}.items():
            (staged / name).write_bytes(content)
        staged.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            folder.rename(old / "old")
            try:
                staged.rename(folder)
            except BaseException:
                (old / "old").rename(folder)
                raise
            shutil.rmtree(old)
        else:
            staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def unfinished(folder: Path, config: Any) -> Path:
    """Where `kept` puts what an interrupted run of these settings had, on this device."""
    settings = {**asdict(config), "plots": None, "out": None}
    digest = hashlib.sha256(_json([settings, environment()])).hexdigest()[:12]
    return folder.parent / f".{folder.name}-{digest}"


def kept(place: Path, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The arrays that `compute` gives; from its file, if an interrupted run had come so far."""
    path = place / f"{name}.npz"
    if path.exists():
        with np.load(path) as file:
            return dict(file)
    found = {key: np.asarray(value) for key, value in compute().items()}
    place.mkdir(parents=True, exist_ok=True)
    staged = place / f"{name}-{os.getpid()}.new"
    with staged.open("wb") as file:
        np.savez(file, **found)
    staged.replace(path)
    return found


def arrays(**content: Any) -> bytes:
    """Arrays as one npz file."""
    buffer = BytesIO()
    np.savez_compressed(buffer, **{key: np.asarray(value) for key, value in content.items()})
    return buffer.getvalue()


def record(config: Any, **result: Any) -> bytes:
    """`result.json`: the result with its settings, versions and device."""
    content = {"settings": asdict(config), "environment": environment(), **result}
    return _json(content)


def told(files: Mapping[str, bytes], **more: Any) -> dict[str, bytes]:
    """The files, with more told in `result.json`."""
    return {**files, MARK: _json({**json.loads(files.get(MARK, b"{}")), **more})}


def _listing(files: Mapping[str, bytes]) -> bytes:
    """`result.json` with the names of the files that belong to it."""
    return _json({**json.loads(files.get(MARK, b"{}")), WRITTEN: sorted({*files, MARK})})


def _ours(folder: Path) -> set[str]:
    """The files of earlier results in this folder."""
    try:
        return set(json.loads((folder / MARK).read_text())[WRITTEN])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _json(content: Any) -> bytes:
    return (json.dumps(_plain(content), indent=2, allow_nan=False) + "\n").encode()


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
    """As JSON has it: no arrays, and NaN and infinity as words."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(x).tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return str(x) if isinstance(x, Path) else x
