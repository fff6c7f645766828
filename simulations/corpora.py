"""Text that needs no download: the packages of the standard library, each a silo.

Every CPython carries them, and they differ by subject, vocabulary and author: a federation that is non-IID by nature. The text
is the source itself, with its docstrings and comments. Figures compare within one Python version; the version and a hash of
the corpus go into the summary.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamina.client.rows import Row
from lamina.protos.errors import DataError

SILO_COLUMN = "silo"
# Packages that every platform has since 3.11, large enough to train on. Parts that are tables or tests are left out.
PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "importlib", "json", "logging",
    "multiprocessing", "re", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo",
)  # fmt: skip
_LEFT_OUT = ("test", "tests", "__pycache__", "entities.py", "_vendor")
_PIECE_CHARS = (400, 3000)
_TOP_LEVEL = re.compile(r"^(?=(?:async def|def|class)\b|[@#])", re.MULTILINE)


def stdlib_rows(root: Path | None = None) -> list[Row]:
    """The standard library as rows with `text` and `silo`.

    Args:
        root: Where it lies; default: this interpreter's.

    Returns:
        Rows in a fixed order, without repeats. Each is a piece of one file, cut at top-level definitions.

    Raises:
        DataError: If the library's source is not there.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    rows: list[Row] = []
    seen: set[str] = set()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            if any(part in _LEFT_OUT for part in file.relative_to(root).parts):
                continue
            for piece in pieces(file.read_text(encoding="utf-8", errors="replace")):
                if piece not in seen:
                    seen.add(piece)
                    rows.append({"text": piece, SILO_COLUMN: package})
    if len({row[SILO_COLUMN] for row in rows}) < 5:
        raise DataError(
            f"data=stdlib: expected the library's source under {root}, found too little of it. "
            "Install the full Python package, or give another data source."
        )
    return rows


def pieces(source: str) -> list[str]:
    """Cut a source file at top-level lines into pieces of 400 to 3000 characters.

    Args:
        source: The file's text.

    Returns:
        Pieces that, joined, give the text but for blank lines at cuts; a longer definition is cut at line ends.
    """
    low, high = _PIECE_CHARS
    found: list[str] = []
    current = ""
    for block in _TOP_LEVEL.split(source):
        for part in _lines_up_to(block, high):
            if current and len(current) + len(part) > high:
                found.append(current)
                current = ""
            current += part
            if len(current) >= low:
                found.append(current)
                current = ""
    if current.strip():
        found.append(current)
    return [piece.strip("\n") for piece in found if piece.strip()]


def _lines_up_to(block: str, limit: int) -> list[str]:
    parts, current = [], ""
    for line in block.splitlines(keepends=True):
        if current and len(current) + len(line) > limit:
            parts.append(current)
            current = ""
        current += line
    return [*parts, current] if current else parts


def corpus_record(source: str, rows: Sequence[Row], columns: Sequence[str]) -> dict[str, Any]:
    """What identifies a corpus in the summary.

    Args:
        source: `data.source`.
        rows: All rows.
        columns: The columns that examples are made from.

    Returns:
        `source`, `rows`, `hash` (SHA-256 over those columns) and the Python version.
    """
    digest = hashlib.sha256()
    for row in rows:
        for column in columns:
            digest.update(repr(row[column]).encode(errors="replace") + b"\x1f")
    return {"source": source, "rows": len(rows), "hash": digest.hexdigest(), "python": platform.python_version()}


def silo_sizes(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, int]:
    """Characters of text in each silo.

    Args:
        rows: With `text` and the column.
        column: Names the silo.

    Returns:
        Silo -> characters, largest first.
    """
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[str(row[column])] = sizes.get(str(row[column]), 0) + len(str(row.get("text", "")))
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))
