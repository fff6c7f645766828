"""A site's rows to train, tune and test."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from lamina.client.rows import Row, load_rows, text_columns
from lamina.protos.config import DataConfig


def parts(
    rows: Sequence[Row], data: DataConfig, task: str, each_alone: bool = False
) -> tuple[list[Row], list[Row], list[Row]]:
    """One site's train, tune and test rows, as `data.holdout` says.

    Args:
        rows: The site's.
        data: Columns; `holdout` is a share, or a file of test rows.
        task: `causal-lm` or `sequence-classification`.
        each_alone: See `split`.

    Returns:
        (train, tune, test).

    Raises:
        DataError: If the file of test rows cannot be read.
    """
    if is_number(data.holdout):
        return split(rows, float(data.holdout), text_columns(data, task), each_alone)
    train, tune, rest = split(rows, 0.1, text_columns(data, task), each_alone)
    return [*train, *rest], tune, load_rows(data.holdout, data)


def is_number(text: str) -> bool:
    """Whether `data.holdout` is a share; otherwise it names a file.

    Args:
        text: The setting.

    Returns:
        True for a number.
    """
    try:
        float(text)
    except ValueError:
        return False
    return True


def split(
    rows: Sequence[Row], share: float, columns: Sequence[str], each_alone: bool = False
) -> tuple[list[Row], list[Row], list[Row]]:
    """Train, tune and test rows, by the hash of each row, so that a row stays where it is when others come or go nearby.

    Only columns that are read count: the same text is split in the same way, whatever lies beside it.

    Args:
        rows: One silo's rows.
        share: Of the rows for test, and again for tune.
        columns: By which a row is known.
        each_alone: Whether a row's own hash decides, as example-dp needs: with exact shares one row more can move others into
            the training rows or out of them. The shares are then about what they should be.

    Returns:
        (train, tune, test); test gets at least one row where there are two, tune where there are three, unless `each_alone`.
    """
    if each_alone:
        places = [int(_hash(row, columns)[:13], 16) / 16**13 for row in rows]
        return (
            [row for row, place in zip(rows, places, strict=True) if place >= 2 * share],
            [row for row, place in zip(rows, places, strict=True) if share <= place < 2 * share],
            [row for row, place in zip(rows, places, strict=True) if place < share],
        )
    ordered = sorted(range(len(rows)), key=lambda i: (_hash(rows[i], columns), i))
    held = max(1, math.floor(share * len(rows))) if len(rows) >= 2 else 0
    tuned = held if len(rows) >= 3 else 0
    test, tune = set(ordered[:held]), set(ordered[held : held + tuned])
    return (
        [row for i, row in enumerate(rows) if i not in test and i not in tune],
        [row for i, row in enumerate(rows) if i in tune],
        [row for i, row in enumerate(rows) if i in test],
    )


def _hash(row: Row, columns: Sequence[str]) -> str:
    content = repr(sorted((column, repr(row.get(column))) for column in columns))
    return hashlib.sha256(content.encode(errors="replace")).hexdigest()
