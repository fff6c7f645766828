"""Reading a run directory for its page, with a check of every value that the page relies on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lamina.protos.errors import ConfigError
from lamina.protos.pages.charts import usable
from lamina.server.store.run_directory import read_records

_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "an object": dict,
    "a list": list,
    "a string": str,
    "an integer": int,
    "a number": (int, float),
}
# Kind -> dotted keys, `*` for every entry. A key may be absent or null, but not an object among others.
_ROUND = {
    "an object": "per_client_loss rejections.*",
    "a list": "clients rejections",
    "an integer": "round",
    "a number": "loss accuracy train_loss bytes_up bytes_down relative_error release_error seconds epsilon "
    "per_client_loss.*",
}
_SUMMARY = {
    "an object": "eval eval.per_client eval.per_client.* communication aggregation privacy privacy.per_client seconds baselines "
    "baselines.* client_ranks corpus versions base gone log",
    "a string": "run_id strategy eval.view eval.per_client.*.name ended ended_at coordinator consortium base.* gone.* "
    "privacy.mode privacy.unit privacy.accountant "
    "log.hash",
    "a number": "log.n rounds clients seed rejections communication.* aggregation.* seconds.* privacy.epsilon privacy.delta "
    "privacy.epsilon_rdp privacy.budget privacy.per_client.* "
    "eval.base_loss eval.final_loss eval.base_accuracy eval.final_accuracy eval.per_client.*.base_loss "
    "eval.per_client.*.final_loss eval.per_client.*.base_accuracy eval.per_client.*.final_accuracy "
    "eval.per_client.*.tokens client_ranks.* baselines.*.loss",
}
_LAYERS = {
    "an object": "*",
    "a list": "*.singular_values",
    "a number": "*.singular_values.* *.rank *.relative_error",
}


@dataclass(frozen=True)
class Client:
    """One client's held-out result: losses in nats per token before and after the run."""

    ident: str
    name: str
    rank: float | None
    tokens: float | None
    before: float | None
    after: float | None
    accuracy: tuple[float | None, float | None]

    def __str__(self) -> str:
        return f"client {self.ident}" if self.name == self.ident else self.name

    @property
    def change(self) -> float | None:
        """Loss after less loss before; negative is better."""
        return self.after - self.before if usable(self.after) and usable(self.before) else None


@dataclass(frozen=True)
class Run:
    """What a run directory holds, checked: `config` maps dotted keys to text, `config_text` is config.yaml as written.

    `clients` has the largest improvement first.
    """

    name: str
    config_text: str
    config: Mapping[str, str]
    rounds: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    clients: Sequence[Client]
    layers: Mapping[str, Any]
    generations: Sequence[Mapping[str, Any]]

    @property
    def deployed(self) -> bool:
        """Whether the sites measured what each had received; in a simulation the whole adapter is measured."""
        return bool(self.get("eval.view") == "release")

    def get(self, key: str) -> Any:
        """The value at a dotted key of summary.json, or None."""
        value: Any = self.summary
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def load_run(run_dir: Path) -> Run:
    """Read and check the files of a run directory.

    Args:
        run_dir: Directory with config.yaml, rounds.jsonl and summary.json; layers.json and generations.json may lack.

    Returns:
        The run; its values have the types that the page needs, and null where nothing was recorded. A torn last line of
        rounds.jsonl is left out.

    Raises:
        ConfigError: If a required file is missing, or any file is malformed; names the file, and the line of rounds.jsonl.
    """
    config_path, summary_path = run_dir / "config.yaml", run_dir / "summary.json"
    text = _read(config_path)
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{config_path}: expected YAML, got something else. Restore it.") from error
    _check(config, str(config_path), {})
    rounds = _rounds(run_dir)
    summary = _json(summary_path, _SUMMARY)
    if summary.get("schema") != 1:
        raise ConfigError(
            f"{summary_path}: expected schema 1, got {summary.get('schema')}. Use the version of Lamina that wrote the run."
        )
    layers, talks = run_dir / "layers.json", run_dir / "generations.json"
    return Run(
        name=run_dir.resolve().name,
        config_text=text,
        config=dict(_flat(config)),
        rounds=rounds,
        summary=summary,
        clients=_clients(summary),
        layers=_json(layers, _LAYERS) if layers.exists() else {},
        generations=_json(talks, {"an object": "*"}, "a list") if talks.exists() else [],
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise ConfigError(
            f"{path}: expected a UTF-8 file of a finished run, got {got}. Give `lamina report` the run's `output` "
            "directory."
        ) from error


def _json(path: Path, schema: Mapping[str, str], top: str = "an object") -> Any:
    text = _read(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{path}: expected JSON, got something else: {error}. Restore it or repeat the run."
        ) from error
    _check(content, str(path), schema, top)
    return content


def _rounds(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "rounds.jsonl"
    _read(path)  # names a missing file, where `read_records` finds a run without rounds
    records, last = read_records(run_dir), 0
    for line, record in enumerate(records, start=1):
        where = f"{path}, line {line}"
        _check(record, where, _ROUND)
        number = record.get("round") or 0
        if number <= last:
            raise ConfigError(
                f"{where}: expected a round number above {last}, got {number}. Restore it or repeat the run."
            )
        last = number
    return records


def _check(content: Any, where: str, schema: Mapping[str, str], top: str = "an object") -> None:
    found = [("the content", top, content)]
    found += [
        (name, kind, value)
        for kind, keys in schema.items()
        for key in keys.split()
        for name, value in _entries(content, key.split("."))
        if value is not None or (kind == "an object" and key.endswith("*"))
    ]
    for name, kind, value in found:
        if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
            raise ConfigError(
                f"{where}: expected {name} to be {kind}, got {type(value).__name__}. Restore it or repeat the run."
            )


def _entries(value: Any, parts: Sequence[str], name: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted name, value) that the parts of a key stand for."""
    if not parts:
        yield name[1:], value
    elif parts[0] == "*" and isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _entries(item, parts[1:], f"{name}.{key}")
    elif isinstance(value, dict):
        yield from _entries(value.get(parts[0]), parts[1:], f"{name}.{parts[0]}")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _clients(summary: Mapping[str, Any]) -> list[Client]:
    ranks = summary.get("client_ranks") or {}
    clients = [
        Client(
            ident=ident,
            name=one.get("name") or ident,
            rank=ranks.get(ident),
            tokens=one.get("tokens"),
            before=one.get("base_loss"),
            after=one.get("final_loss"),
            accuracy=(one.get("base_accuracy"), one.get("final_accuracy")),
        )
        for ident, one in ((summary.get("eval") or {}).get("per_client") or {}).items()
    ]
    return sorted(clients, key=lambda client: math.inf if client.change is None else client.change)
