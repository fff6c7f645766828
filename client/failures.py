"""What goes wrong at a site: the codes that a coordinator is told, and the place of an error without its text."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from lamina.client.spool import Spool
from lamina.protos.errors import (
    AdapterMismatch,
    BudgetSpent,
    CheckpointError,
    ConfigError,
    DataError,
    StorageError,
    TrainingError,
    UpdateRejected,
)
from lamina.protos.statements import BadStatement


def failure_code(error: BaseException) -> str:
    """What a coordinator is told of an error: a word from a fixed list, and nothing else.

    Args:
        error: Anything.

    Returns:
        The code.
    """
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return "out-of-memory"
    kinds: tuple[tuple[type[BaseException], str], ...] = (
        (BudgetSpent, "privacy"),
        (TrainingError, "training"),
        (CheckpointError, "disk"),
        (DataError, "data"),
        (AdapterMismatch, "release"),
        (UpdateRejected, "release"),
        (BadStatement, "release"),
        (ConfigError, "base"),
        (OSError, "disk"),
    )
    return next((code for kind, code in kinds if isinstance(error, kind)), "internal")


def where(error: BaseException) -> str:
    """Kind and place of an error, without its text, which may quote data.

    Args:
        error: Anything.

    Returns:
        Such as `KeyError at data.py:12`.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}"


@contextlib.contextmanager
def on_disk(spool: Spool) -> Iterator[None]:
    """A disk's refusal as an error that says what to do.

    Args:
        spool: Where was read or written.

    Yields:
        Nothing.

    Raises:
        StorageError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or spool.root}: expected room and the right to read and write, got: {error.strerror}. "
            "Make room or set client.state, and start again; nothing is lost."
        ) from None
