"""The exception tree, with the exit code that the command line gives for each.

    LaminaError                 1  a fault of ours
      StorageError              1  a disk that is full, or fails
      ConfigError               2  a setting, file or column that cannot be used
        DataError               2  data that cannot be read or trained on
        CheckpointError         2  a checkpoint that is corrupt, truncated or of another base
      AdapterMismatch           2  an adapter that does not fit the spec
      UpdateRejected            -  a client's update that is not admitted; counted, never fatal
      TrainingError             2  training that produced non-finite values
      QuorumNotReached          3  too few updates before the deadline
        SecureSumAborted        3  an attempt at a secure sum that cannot be finished; nothing of it is known
      BudgetSpent               4  a privacy budget that does not allow a step, or of which nobody knows what is spent
      IdentityError             5  a certificate, key, signature or invite that is not trusted
      PolicyRefused             5  terms or an instruction that a site's own policy does not allow
      SecureSumRefused          5  a secure sum that a site takes no part in, or no further part

A message says what was expected, what was got, where, and what to do next. No message carries a row of data or a secret.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class LaminaError(Exception):
    """Base of all errors raised on purpose; its own exit code means a fault of ours."""

    exit_code = 1


class StorageError(LaminaError):
    """A disk that is full, or fails; what was complete before is kept."""


class ConfigError(LaminaError):
    """A setting, path or column that cannot be used."""

    exit_code = 2


class DataError(ConfigError):
    """Data that cannot be read, or a silo with nothing to train on."""


class CheckpointError(ConfigError):
    """A checkpoint that is corrupt, truncated, or made for another base or configuration."""


class AdapterMismatch(LaminaError):
    """An adapter whose modules or shapes do not fit the negotiated spec."""

    exit_code = 2


class UpdateRejected(LaminaError):
    """An update that admission refuses. `reason` is a short code for counting.

    Args:
        reason: Code such as `duplicate`, `non-finite`, `schema`.
        message: The sentence for the log.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TrainingError(LaminaError):
    """Local training produced a loss or an adapter that is not finite, or this machine's gradients are wrong."""

    exit_code = 2


class QuorumNotReached(LaminaError):
    """Fewer updates than the quorum were accepted before the deadline."""

    exit_code = 3


class SecureSumAborted(QuorumNotReached):
    """An attempt at a secure sum that cannot be finished: too few are left, or what came back is no sum of what was asked."""


class BudgetSpent(LaminaError):
    """A private mechanism that may not run: its cost would exceed a budget, or what was spent before cannot be told."""

    exit_code = 4


class IdentityError(LaminaError):
    """A certificate, key, signature or invite that is not trusted."""

    exit_code = 5


class PolicyRefused(LaminaError):
    """Terms or an instruction of a coordinator that the site's own policy does not allow."""

    exit_code = 5


class SecureSumRefused(LaminaError):
    """A secure sum that would show a site's update, or whose messages are not what they should be."""

    exit_code = 5


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word closest to `name`, or the empty string.

    Args:
        name: What the user wrote.
        known: What could have been meant.

    Returns:
        ` Did you mean X?` with a leading space, or ``.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def shown(value: Any) -> str:
    """A value for a message: short, on one line, without characters that a terminal would obey.

    Args:
        value: Anything.

    Returns:
        At most about 100 characters.
    """
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value) if len(value) <= 80 else f"{value[:80]!r}… of {len(value)} characters"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, bool | int | float):
        return repr(value)
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict | bytes) else ""
    return f"a {type(value).__name__}{size}"


def one_line(text: str, most: int = 300) -> str:
    """What another machine said, for a message: on one line, without characters that a terminal would obey.

    Args:
        text: Anything.
        most: Characters that are kept.

    Returns:
        The text, with an ellipsis where it was cut.
    """
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= most else f"{flat[:most].rstrip()}…"
