"""The table that a simulation prints at its end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lamina.simulations.progress import table
from lamina.simulations.run import Finished


def finished(accuracy: tuple[float, float] | None, privacy: dict[str, Any] | None = None) -> Finished:
    base, final = accuracy or (None, None)
    figures: dict[str, Any] = {"base_loss": 4.5, "final_loss": 3.25, "base_accuracy": base, "final_accuracy": final}
    summary = {
        "eval": figures | {"per_client": {"a": {"final_loss": 3.75}}},
        "communication": {"bytes_up": 123_400_000, "bytes_down": 199_900_000},
        "aggregation": {"relative_error": 1e-8},
        "seconds": {"total": 12_345.0},
        "privacy": privacy,
    }
    return Finished(Path(), summary)


@pytest.mark.parametrize("titles", [["recompress"], ["recompress seed=0", "residual seed=1"]])
@pytest.mark.parametrize("accuracy", [None, (0.0, 0.5)])
def test_no_value_is_broken_at_120_columns(titles: list[str], accuracy: tuple[float, float] | None) -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(table([finished(accuracy)] * len(titles), titles))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for value in ("4.5000", "3.2500", "-1.2500", "3.7500", "123.4 MB", "199.9 MB", "1.0e-08", "12345"):
        assert printed.count(value) == len(titles)
    assert printed.count("0.000 -> 0.500") == (len(titles) if accuracy else 0)
    for word in ("aggregation", "recompress"):
        assert word in printed


def test_a_run_with_privacy_shows_its_epsilon_and_one_without_a_dash() -> None:
    console = Console(width=120, file=io.StringIO())
    runs = [finished(None, {"epsilon": 7.994}), finished(None)]
    console.print(table(runs, ["recompress seed=0", "residual seed=1"]))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "epsilon" in printed
    assert printed.count("7.99") == 1
    assert next(line for line in printed.splitlines() if "residual" in line).count(" - ") == 1
