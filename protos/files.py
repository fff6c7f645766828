"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lamina.protos.errors import ConfigError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file through a temporary neighbour, flushed to disk before it takes the name.

    Args:
        path: Where; the folder is made if need be.
        content: Text is written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def append_durably(path: Path, text: str) -> None:
    """Append to a file and return when it is on disk; a crash may leave the start of `text`.

    Args:
        path: The file.
        text: Whole lines.
    """
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write JSON with one-space indentation; NaN and infinities are refused.

    Args:
        path: Where.
        value: The document.
    """
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder that appears with all its files or not at all; an older one of the name is replaced.

    Args:
        path: The folder.
        files: Name -> content.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in files.items():
        write_atomic(partial / name, content)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    fsync_folder(path.parent)


@contextlib.contextmanager
def alone(path: Path, setting: str, taken: str) -> Iterator[None]:
    """Keep a second process, or a second agent of this one, out of a folder; a process that dies lets go of it.

    Args:
        path: The folder, made if need be.
        setting: That names it, for messages.
        taken: What is wrong where another has it, and what to do.

    Yields:
        Nothing.

    Raises:
        ConfigError: If another has it, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{setting}={path}: expected a place to write, got {error.strerror}.") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{setting}={path}: {taken}") from None
        yield
    finally:
        os.close(folder)


def fsync_folder(path: Path) -> None:
    """Return when the names in a folder are on disk.

    Args:
        path: The folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(content: bytes) -> str:
    """SHA-256 in hex.

    Args:
        content: Any bytes.

    Returns:
        64 characters.
    """
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path | None) -> hashlib._Hash:
    """SHA-256 over a file, to go on with.

    Args:
        path: The file; None for nothing yet.

    Returns:
        The running hash.
    """
    running = hashlib.sha256()
    if path is not None:
        with path.open("rb", buffering=0) as file:
            while part := file.read(1024**2):
                running.update(part)
    return running
