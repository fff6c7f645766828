"""`lamina report`: finished runs to one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lamina.protos.errors import ConfigError
from lamina.protos.words import parsed
from lamina.server.report import load_run, write_report

_HELP = """\
usage: lamina report RUN_DIR… [output=FILE.html] [--json]

One self-contained HTML page: of one run, or comparing several.

examples:
  lamina report outputs/demo/recompress
  lamina report outputs/demo/recompress outputs/demo/stack output=compare.html

output: default RUN_DIR/report.html for one run, comparison.html for several"""


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina report`.

    Args:
        command: `report`.
        words: What follows it.

    Returns:
        Exit code 0; errors are raised.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_HELP)
        return 0
    as_json = "--json" in words
    plain, settings = parsed([word for word in words if word != "--json"], {"output": ""})
    if not plain:
        raise ConfigError("lamina report: expected at least one run directory. See `lamina report --help`.")
    runs = [Path(word) for word in plain]
    for run in runs:
        if not run.is_dir():
            raise ConfigError(f"{run}: expected a run directory, found none.")
    output = Path(settings["output"] or (runs[0] / "report.html" if len(runs) == 1 else "comparison.html"))
    write_report(runs, output)
    if as_json:
        print(json.dumps([dict(load_run(run).summary) | {"path": str(run)} for run in runs], indent=1))
    else:
        print(output)
    return 0
