"""Rows of text from wherever they lie: jsonl, csv, parquet or txt files, a directory of them, or a data set that the `datasets`
library loads by hub id. No row is ever part of an error message: messages name the file, line and column.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lamina.protos.config import Config, DataConfig
from lamina.protos.errors import ConfigError, DataError

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".csv", ".parquet", ".txt")
# Column that loaders add: the file of a directory that a row came from.
FILE_COLUMN = "__file__"
_PARAGRAPHS_CHARS = 2000
_KEYED = (".jsonl", ".parquet")
_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")


def load_rows(source: str, config: DataConfig) -> list[Row]:
    """All rows of a source.

    Args:
        source: A file, a directory, or a hub id.
        config: Revision and split of hub ids, text column of txt files.

    Returns:
        Rows as mappings from column to value; of a directory also `FILE_COLUMN`.

    Raises:
        DataError: If nothing is there, or a file is truncated or malformed; file and line are named.
    """
    path, files = Path(source).expanduser(), _files(source)
    if files is None:
        return _from_hub(source, config)
    if path.is_dir():
        return [{**row, FILE_COLUMN: str(file.relative_to(path))} for file in files for row in _read(file, config)]
    return list(_read(path, config))


def glance(config: DataConfig) -> None:
    """Look at a site's source before anybody is told of the site: it is named, is there, and has a row.

    Args:
        config: The data settings. A hub id is believed.

    Raises:
        DataError: If not.
    """
    if config.source == "stdlib":  # the default, which only a simulation has
        raise DataError(
            "data.source: expected this site's own text. Set data=FILE, or data.source in the settings file."
        )
    files = _files(config.source)
    if files is not None and not any(True for file in files for _ in _read(file, config)):
        raise DataError(f"data.source={config.source}: expected rows, found none. Check the file.")


def _files(source: str) -> list[Path] | None:
    """The files of a source; None for a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
        if not files:
            raise DataError(
                f"data.source={source}: expected files ending in {', '.join(SUFFIXES)}, found none in this directory."
            )
        return files
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"data.source={source}: expected a file ending in {', '.join(SUFFIXES)}, got {path.suffix!r}."
            )
        return [path]
    if source.startswith((".", "/", "~")) or source.lower().endswith(SUFFIXES):
        raise DataError(f"data.source={source}: expected a file, found none. Check the path.")
    return None


def _from_hub(source: str, config: DataConfig) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data.source={source}: a hub id needs the extra [client]: pip install 'lamina-fl[client]'."
        ) from None
    try:
        loaded = datasets.load_dataset(source, revision=config.revision or None, split=config.split)
    except Exception as error:  # noqa: BLE001 - whatever the library raises means that the id cannot be had
        raise DataError(
            f"data.source={source}: expected stdlib, a local file or directory, or a hub id that can be reached, "
            f"got {type(error).__name__}. Check the spelling, the network, data.revision and data.split."
        ) from None
    return [dict(row) for row in loaded]


def _read(path: Path, config: DataConfig) -> Iterator[Row]:
    readers: Mapping[str, Callable[[Path, DataConfig], Iterator[Row]]] = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": _read_txt,
    }
    try:
        yield from readers[path.suffix.lower()](path, config)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, got other bytes at byte {error.start}. Convert the file."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got {error.strerror or type(error).__name__}.") from None


def _read_jsonl(path: Path, _: DataConfig) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise DataError(
                    f"{path}, line {number}: expected one JSON object a line. Is the file truncated?"
                ) from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
            yield row


def _read_csv(path: Path, _: DataConfig) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or ())
                    raise DataError(
                        f"{path}, line {reader.line_num}: expected {wanted} columns. Is the file truncated?"
                    )
                yield row
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: expected CSV, got {error}. Is the file truncated?"
            ) from None


def _read_parquet(path: Path, _: DataConfig) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        yield from parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: expected a parquet file, got {type(error).__name__}. Is the file truncated?"
        ) from None


def _read_txt(path: Path, config: DataConfig) -> Iterator[Row]:
    """Paragraphs, joined until they make about 2000 characters."""
    gathered: list[str] = []
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        gathered.append(paragraph)
        if sum(map(len, gathered)) >= _PARAGRAPHS_CHARS:
            yield {config.text_column: "\n\n".join(gathered)}
            gathered = []
    if "".join(gathered).strip():
        yield {config.text_column: "\n\n".join(gathered)}


def check_columns(rows: Sequence[Row], columns: Sequence[str], where: str) -> None:
    """Raise unless every row has the columns.

    Args:
        rows: Loaded rows.
        columns: What the config names.
        where: The source, for messages.

    Raises:
        DataError: Naming the missing column and those that exist, or that there is no row at all.
    """
    if not rows:
        raise DataError(f"{where}: expected rows, found none. Check the file.")
    for column in columns:
        for number, row in enumerate(rows, 1):
            if row.get(column) is None:
                raise DataError(f"{where}: no column {column!r} in row {number}. {_columns(rows[0], where)}")


def _columns(row: Row, where: str) -> str:
    """The columns of a row by name where its format names them; those of a CSV file without a header are text."""
    names = sorted(str(key) for key in row if key != FILE_COLUMN)
    if str(row.get(FILE_COLUMN, where)).lower().endswith(_KEYED) and all(map(_COLUMN.fullmatch, names)):
        return f"Columns of the first row: {', '.join(names)}."
    return f"The first row has {len(names)} columns; in a CSV file the first line names them."


def text_columns(config: DataConfig, task: str) -> list[str]:
    """The columns that examples are made from.

    Args:
        config: The data settings.
        task: `causal-lm` or `sequence-classification`.

    Returns:
        Column names.
    """
    if task == "sequence-classification":
        return [config.text_column, config.label_column]
    if config.messages_column:
        return [config.messages_column]
    if config.prompt_column:
        return [config.prompt_column, config.response_column]
    return [config.text_column]


def columns_of(config: Config) -> list[str]:
    """The columns that every row must have: those of `text_columns`, and where users are protected, theirs.

    Args:
        config: Data, task and privacy settings.

    Returns:
        Column names.

    Raises:
        ConfigError: If users are protected and no column names them.
    """
    found = text_columns(config.data, config.task)
    if config.privacy.mode != "example-dp" or config.privacy.unit != "user":
        return found
    if not config.data.user_column:
        raise ConfigError(
            "privacy.unit=user: expected data.user_column, the column that says whose a row is. Set it, or privacy.unit=record."
        )
    return [*found, config.data.user_column]
