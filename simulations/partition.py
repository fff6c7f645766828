"""Dealing rows to clients, and each client's rows to train, tune and test. Seeded, and independent of row order where the
rows differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lamina.client.rows import FILE_COLUMN, Row, text_columns
from lamina.client.split import split
from lamina.protos import seeds
from lamina.protos.config import Config
from lamina.protos.errors import ConfigError, DataError
from lamina.simulations.corpora import SILO_COLUMN


@dataclass(frozen=True)
class Silo:
    """One client's rows.

    Attributes:
        name: The silo's own name, or the client's number.
        train: Rows to train on.
        tune: Held out, for choosing settings.
        test: Held out, for reporting.
    """

    name: str
    train: Sequence[Row]
    tune: Sequence[Row]
    test: Sequence[Row]


def deal(rows: Sequence[Row], test_rows: Sequence[Row] | None, config: Config) -> list[Silo]:
    """Partition rows to clients and split each client's.

    Args:
        rows: All rows.
        test_rows: Rows of a test file, dealt in each client's proportions; None holds out a share of `rows`.
        config: Kind of partition, number of clients, share held out, seed.

    Returns:
        One silo a client.

    Raises:
        ConfigError: If the partition cannot be made of these rows.
        DataError: If a silo is empty or too small.
    """
    column, known_by = class_column(rows, config), _known_by(config)
    each_alone = config.privacy.mode == "example-dp"
    names, parts = _partition(rows, column, config)
    tests = None if test_rows is None else _partition_test(test_rows, rows, parts, column, config)
    silos = []
    for index, (name, part) in enumerate(zip(names, parts, strict=True)):
        mine = [rows[row] for row in part]
        if tests is None:
            train, tune, test = split(mine, float(config.data.holdout), known_by, each_alone)
        else:
            train, tune, rest = split(mine, 0.1, known_by, each_alone)
            train, test = [*train, *rest], [test_rows[row] for row in tests[index]] if test_rows else []
        if len(train) < config.partition.min_examples or not test:
            raise DataError(
                f"silo {name!r} (client {index}): expected at least {config.partition.min_examples} training rows and one "
                f"test row, got {len(train)} and {len(test)} of {len(mine)}. Use fewer clients, "
                "partition=iid, a larger partition.dirichlet_alpha, or more data."
            )
        silos.append(Silo(name, train, tune, test))
    return silos


def class_column(rows: Sequence[Row], config: Config) -> str:
    """The column that the partition goes by.

    Args:
        rows: All rows.
        config: Kind and column.

    Returns:
        A column name; empty for iid.

    Raises:
        ConfigError: If none is named and none goes without saying.
    """
    kind, named = config.partition.kind, config.partition.column
    if kind == "iid":
        return ""
    guesses = [named] if named else []
    if kind == "natural" and not named:
        users = [] if config.privacy.unit == "user" else [config.data.user_column]  # else each silo would be one user
        guesses = [*users, SILO_COLUMN, FILE_COLUMN]
    elif not named:
        guesses = [config.data.label_column, SILO_COLUMN, FILE_COLUMN]
    for guess in guesses:
        if guess and all(row.get(guess) is not None for row in rows):
            return guess
    known = ", ".join(sorted(str(key) for key in rows[0]))
    if named:
        raise ConfigError(f"partition.column={named}: expected a column that every row has. Columns: {known}.")
    raise ConfigError(f"partition={kind}: expected partition.column to name one of: {known}. Or set partition=iid.")


def _partition(rows: Sequence[Row], column: str, config: Config) -> tuple[list[str], list[list[int]]]:
    count, kind = config.clients.count, config.partition.kind
    rng = seeds.stream(config.seed, "partition")
    numbers = [str(index) for index in range(count)]
    if kind == "natural":
        return _natural(rows, column, config)
    if kind == "iid":
        order = rng.permutation(len(rows))
        return numbers, [sorted(int(i) for i in part) for part in np.array_split(order, count)]
    classes = _by_class(rows, column)
    if kind == "shards":
        order = np.array([index for members in classes.values() for index in members])
        shards = np.array_split(order, count * config.partition.shards_per_client)
        dealt = rng.permutation(len(shards))
        per = config.partition.shards_per_client
        return numbers, [
            sorted(int(i) for shard in dealt[k * per : (k + 1) * per] for i in shards[shard]) for k in range(count)
        ]
    parts: list[list[int]] = [[] for _ in range(count)]
    for members in classes.values():
        shares = rng.dirichlet(np.full(count, config.partition.dirichlet_alpha))
        _deal_class(members, shares, rng, parts)
    return numbers, [sorted(part) for part in parts]


def _known_by(config: Config) -> list[str]:
    """The columns by which a row is known, as at a site; of the standard library also the package."""
    return text_columns(config.data, config.task) + [SILO_COLUMN] * (config.data.source == "stdlib")


def _natural(rows: Sequence[Row], column: str, config: Config) -> tuple[list[str], list[list[int]]]:
    classes, count, names = _by_class(rows, column), config.clients.count, config.clients.names
    if names and classes.keys() >= set(names):  # each silo to the client of its name
        return list(names), [classes[name] for name in names]
    known_by = _known_by(config)
    sizes = {
        name: sum(len(str(rows[i].get(one))) for i in members for one in known_by) for name, members in classes.items()
    }
    largest = sorted(classes, key=lambda name: (-sizes[name], name))
    if len(largest) < count:
        raise ConfigError(
            f"partition=natural: expected at least clients.count={count} silos in column {column!r}, got {len(largest)}. "
            f"Set clients.count={len(largest)} or less."
        )
    chosen = sorted(largest[:count])
    return chosen, [classes[name] for name in chosen]


def _by_class(rows: Sequence[Row], column: str) -> dict[str, list[int]]:
    classes: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        classes.setdefault(str(row[column]), []).append(index)
    return dict(sorted(classes.items()))


def _deal_class(members: Sequence[int], shares: np.ndarray, rng: np.random.Generator, parts: list[list[int]]) -> None:
    """Deal one class in given shares; rounding is by largest remainder, so that nothing is lost."""
    order = rng.permutation(np.asarray(members))
    exact = shares / shares.sum() * len(order)
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: len(order) - int(counts.sum())]:
        counts[index] += 1
    for part, dealt in zip(parts, np.split(order, np.cumsum(counts)[:-1]), strict=True):
        part.extend(int(index) for index in dealt)


def _partition_test(
    test_rows: Sequence[Row], rows: Sequence[Row], parts: Sequence[Sequence[int]], column: str, config: Config
) -> list[list[int]]:
    """Deal test rows so that each class goes to clients as its training rows did."""
    rng = seeds.stream(config.seed, "partition-test")
    dealt: list[list[int]] = [[] for _ in parts]
    if not column:
        for index, part in enumerate(np.array_split(rng.permutation(len(test_rows)), len(parts))):
            dealt[index] = [int(i) for i in part]
        return dealt
    for name, members in _by_class(test_rows, column).items():
        shares = np.array([sum(str(rows[i][column]) == name for i in part) for part in parts], float)
        if shares.sum() > 0:
            _deal_class(members, shares, rng, dealt)
    return [sorted(part) for part in dealt]
