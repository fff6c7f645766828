"""Small made-up data, the same in every run. The word `xyzzy` stands in every text: no error message may show it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SECRET = "xyzzy"
_WORDS = (
    "round",
    "ends",
    "when",
    "every",
    "site",
    "has",
    "sent",
    "its",
    "update",
    "server",
    "adds",
    "by",
    "weight",
    "go",
    "on",
)
_SILOS = {"north": 24, "east": 16, "south": 12, "west": 10, "centre": 8}
LABELS = ("refund", "card", "login")


def _sentence(rng: np.random.Generator, length: int) -> str:
    return " ".join(rng.choice(_WORDS, length))


def notes() -> list[dict[str, Any]]:
    """Rows with `text`, `silo` and `number`; five silos of 8 to 24 rows, texts of 6 to 30 words."""
    rng = np.random.default_rng(7)
    return [
        {
            "text": f"{SECRET} {silo} {number}: {_sentence(rng, int(rng.integers(6, 30)))}",
            "silo": silo,
            "number": number,
        }
        for silo, count in _SILOS.items()
        for number in range(count)
    ]


def questions(count: int = 90) -> list[dict[str, Any]]:
    """Rows with `text` and `category`; the label can be read from the text."""
    rng = np.random.default_rng(8)
    return [
        {"text": f"{SECRET} {LABELS[i % 3]} {_sentence(rng, 5)} {LABELS[i % 3]}", "category": LABELS[i % 3]}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A header and the rows."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
