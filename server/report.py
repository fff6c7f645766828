"""`report.html`: one self-contained page about a run, or one that compares several, from run directories alone.

The page loads nothing from outside and works without scripts; its parts are in `lamina.server.pages`. Losses are nats per
token. What was not recorded (privacy, an optional file) is left out or said in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lamina.protos.errors import ConfigError
from lamina.protos.files import write_atomic
from lamina.protos.pages import style
from lamina.protos.pages.charts import escape
from lamina.server.pages import comparison, run_page
from lamina.server.pages.loading import Run, load_run

__all__ = ["Run", "load_run", "render", "write_report"]


def render(runs: Sequence[Run]) -> str:
    """The page about one run, or the comparison of several.

    Args:
        runs: At least one run, from `load_run`.

    Returns:
        A whole HTML document that refers to nothing outside itself.

    Raises:
        ConfigError: If there is no run.
    """
    if not runs:
        raise ConfigError("report: expected at least one run directory, got none. Name one: lamina report RUN_DIR.")
    if len(runs) > 1:
        return style.document(f"Lamina: {len(runs)} runs", comparison.body(runs))
    return style.document(f"Lamina: {escape(runs[0].get('run_id') or runs[0].name)}", run_page.body(runs[0]))


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Write the page so that a reader never sees half of it.

    Args:
        run_dirs: Run directories, one for a run page, several for a comparison.
        output: File to write; its directory is made where missing.

    Raises:
        ConfigError: If a run cannot be read, or the file cannot be written.
    """
    page = render([load_run(run_dir) for run_dir in run_dirs])
    try:
        write_atomic(output, page)
    except OSError as error:
        got = type(error).__name__
        raise ConfigError(f"{output}: expected a file that can be written, got {got}. Give another path.") from error
