"""`lamina simulate`: words to configs, one run or a sweep, then the table and where the pages are."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lamina.client.model import quiet
from lamina.protos import compose
from lamina.protos.config import Config, checked, known_keys
from lamina.protos.errors import ConfigError
from lamina.server.report import write_report
from lamina.simulations import run
from lamina.simulations.prepare import Prepared, prepare
from lamina.simulations.progress import Terminal, over_seeds, table

_EXAMPLES = """\
usage: lamina simulate [key=value …] [--multirun] [--config FILE.yaml] [--json]

Federated LoRA fine-tuning with many clients on this machine. Writes a run directory with the adapter (peft loads it),
summary.json, rounds.jsonl and report.html.

examples:
  lamina simulate
      five rounds of ten clients on the standard library's own text, with the small base that comes with the package
  lamina simulate strategy=residual 'clients.ranks=[32,16,8,8,4,4,2,2,2,2]' seed=1
  lamina simulate --multirun strategy=recompress,stack seed=0,1,2 output=outputs/sweep
  lamina simulate data=notes.jsonl partition.column=hospital clients.count=4 model=./my-model
  lamina simulate task=sequence-classification model=./encoder data=train.csv data.holdout=test.csv \\
      data.label_column=category partition=dirichlet
  lamina simulate resume=outputs/2026-01-31/12-00-00

keys (default):"""


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina simulate`.

    Args:
        command: `simulate`.
        words: What follows it.

    Returns:
        Exit code 0; errors are raised.
    """
    words = list(words)
    if any(word in ("-h", "--help") for word in words):
        print(compose.help_text(_EXAMPLES, list(known_keys())))
        return 0
    as_json, multirun = "--json" in words, "--multirun" in words or "-m" in words
    words = [word for word in words if word not in ("--json", "--multirun", "-m")]
    base = compose.take_config(words, "--multirun, --config FILE, --json, --help")
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    quiet()
    configs = _configs(words, multirun, base)
    finished, titles, shared = [], [], _Shared()
    for index, (config, title) in enumerate(configs):
        if len(configs) > 1:
            console.print(f"\n[{index + 1}/{len(configs)}] {title}", style="bold", highlight=False, markup=False)
        watcher = Terminal(console, config.strategy.name)
        try:
            prepared = None if config.threads else shared.get(config, watcher)
            finished.append(run.simulate(config, watcher, prepared))
        finally:
            watcher.end()
        titles.append(title or config.strategy.name)
    console.print(table(finished, titles))
    if len({config.seed for config, _ in configs}) > 1:
        console.print("\n".join(over_seeds(finished, titles)), highlight=False)
    pages = [one.path / "report.html" for one in finished]
    if len(finished) > 1:
        pages = [finished[0].path.parent / "report.html"]
        write_report([one.path for one in finished], pages[0])
    best = min(finished, key=lambda one: one.summary["eval"]["final_loss"])
    which = "adapter with the lowest loss" if len(finished) > 1 else "adapter"
    console.print(f"{which}: {best.path / 'adapter'}\nreport: {pages[0]}", highlight=False, markup=False)
    if as_json:
        print(json.dumps([{"path": str(one.path), **one.summary} for one in finished], indent=1))
    return 0


class _Shared:
    """The last prepared base and data, for the next run of a sweep that needs the same."""

    def __init__(self) -> None:
        self._key, self._prepared = "", None  # type: tuple[str, Prepared | None]

    def get(self, config: Config, watcher: Terminal) -> Prepared:
        parts = [config.data, config.model, config.task, config.partition, config.clients.count, config.evaluate]
        parts += [
            config.adapter.kind,
            config.lora.target_modules,
            config.train.max_length,
            config.train.device,
            config.seed,
        ]
        key = repr(
            [*parts, config.quantisation, config.privacy.mode, config.privacy.unit]
        )  # by which rows are held out
        if self._prepared is None or key != self._key:
            self._prepared = None
            self._prepared, self._key = prepare(config, watcher.say), key
        return self._prepared


def _configs(words: Sequence[str], multirun: bool, base: Path | None) -> list[tuple[Config, str]]:
    runs = compose.sweeps(words, multirun)
    configs = [compose.composed(overrides, base) for overrides in runs]
    if len(configs) == 1:
        config = configs[0]
        return [(_resumed(config, runs[0]) if config.resume else config, "")]
    if any(config.resume for config in configs):
        raise ConfigError("resume: expected one run, got a sweep. Resume each run by itself.")
    root = Path(configs[0].output or str(run.default_output()))
    swept = [[word for word in overrides if sum(word in other for other in runs) < len(runs)] for overrides in runs]
    titles = [" ".join(one) or str(index) for index, one in enumerate(swept)]
    titles = [title.replace("strategy.name=", "") for title in titles]
    return [
        (replace(config, output=str(root / _folder(index, title))), title)
        for index, (config, title) in enumerate(zip(configs, titles, strict=True))
    ]


def _folder(index: int, title: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in "=.-_" else "-" for letter in title)[:80]
    return kept.strip("-") or str(index)


def _resumed(config: Config, overrides: Sequence[str]) -> Config:
    """The config of an interrupted run, with the overrides that came with `resume`."""
    path = Path(config.resume)
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"resume={path}: expected a run directory with config.yaml, found none.")
    kept = [word for word in overrides if not word.startswith("output=")]
    again = compose.composed(kept, path / "config.yaml")
    return checked(replace(again, resume=str(path), output=str(path)))
