"""Writes a folder of results as a whole or not at all."""

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

RECORD = "result.json"  # lists the files of a result: a later run replaces these and no others
FILES_KEY = "files_of_this_result"


def check_writable(folder: Path) -> None:
    """Refuses, before the work begins, a folder that `write` could not fill."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output folder {folder} is a file; name a folder.")
    if folder.is_symlink():
        raise UsageError(f"the output folder {folder} is a link; name the folder itself.")
    if folder.is_dir() and {path.name for path in folder.iterdir()} - _read_file_list(folder):
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
    """Puts the files into the folder in one rename, in place of earlier results."""
    check_writable(folder)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in {**files, RECORD: _list_files(files)}.items():
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


def locate_cache(folder: Path, config: Any) -> Path:
    """The folder in which `cache_arrays` keeps the arrays of these settings and this device."""
    settings = {**asdict(config), "plots": None, "out": None}
    digest = hashlib.sha256(_encode([settings, environment()])).hexdigest()[:12]
    return folder.parent / f".{folder.name}-{digest}"


def cache_arrays(cached: Path, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The arrays of `compute`, from a file if an interrupted run has written it."""
    path = cached / f"{name}.npz"
    if path.exists():
        with np.load(path) as file:
            return dict(file)
    arrays = {key: np.asarray(value) for key, value in compute().items()}
    cached.mkdir(parents=True, exist_ok=True)
    staged = cached / f"{name}-{os.getpid()}.new"
    with staged.open("wb") as file:
        np.savez(file, **arrays)
    staged.replace(path)
    return arrays


def pack_arrays(**content: Any) -> bytes:
    """The content of an npz file with these arrays."""
    buffer = BytesIO()
    np.savez_compressed(buffer, **{key: np.asarray(value) for key, value in content.items()})
    return buffer.getvalue()


def record(config: Any, **result: Any) -> bytes:
    """The content of `result.json`: the result, its settings, the versions and the device."""
    return _encode({"settings": asdict(config), "environment": environment(), **result})


def extend_record(files: Mapping[str, bytes], **entries: Any) -> dict[str, bytes]:
    """The files, with these entries added to `result.json`."""
    return {**files, RECORD: _encode({**json.loads(files.get(RECORD, b"{}")), **entries})}


def _list_files(files: Mapping[str, bytes]) -> bytes:
    """The content of `result.json` with the names of all files of the result."""
    return _encode({**json.loads(files.get(RECORD, b"{}")), FILES_KEY: sorted({*files, RECORD})})


def _read_file_list(folder: Path) -> set[str]:
    """The names of the files that an earlier run has written into this folder."""
    try:
        return set(json.loads((folder / RECORD).read_text())[FILES_KEY])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _encode(content: Any) -> bytes:
    return (json.dumps(_convert(content), indent=2, allow_nan=False) + "\n").encode()


def environment() -> dict[str, str]:
    """The versions and the device, on which numbers depend besides the settings."""
    return {
        "robustloss": robustloss.__version__,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def render(figure: Any) -> bytes:
    """The content of a PNG file with this matplotlib figure."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _convert(x: Any) -> Any:
    """A value that JSON can hold: arrays as lists, NaN and infinity as strings."""
    if isinstance(x, dict):
        return {str(key): _convert(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_convert(value) for value in x]
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return _convert(np.asarray(x).tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return str(x) if isinstance(x, Path) else x
