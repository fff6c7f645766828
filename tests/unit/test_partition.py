"""Laws of dealing rows: every row exactly once, splits disjoint, seeds that matter and reproduce."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from lamina.client.split import split
from lamina.protos.config import Config
from lamina.protos.errors import ConfigError, DataError
from lamina.simulations.partition import Silo, deal

KINDS = ("natural", "dirichlet", "iid", "shards")


def made_rows(count: int = 400, classes: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"id": i, "text": f"row {i}", "label": f"c{int(rng.integers(classes))}"} for i in range(count)]


def config(kind: str, count: int = 8, seed: int = 0, **more: Any) -> Config:
    made = Config()
    made.partition.kind, made.clients.count, made.seed = kind, count, seed
    made.partition.column = "" if kind == "iid" else "label"
    made.partition.dirichlet_alpha = more.get("alpha", 1.0)
    made.data.holdout = more.get("holdout", "0.1")
    made.partition.min_examples = 1
    return made


def ids(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [row["id"] for row in rows]


def whole(silo: Silo) -> list[int]:
    return sorted(ids(silo.train) + ids(silo.tune) + ids(silo.test))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_row_goes_to_exactly_one_place(kind: str, seed: int) -> None:
    rows = made_rows()
    silos = deal(rows, None, config(kind, seed=seed))
    assert sorted(i for silo in silos for i in whole(silo)) == list(range(len(rows)))
    for silo in silos:
        parts = [set(ids(part)) for part in (silo.train, silo.tune, silo.test)]
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]


@pytest.mark.parametrize("kind", ["dirichlet", "iid", "shards"])
def test_the_seed_matters_and_reproduces(kind: str) -> None:
    rows = made_rows()
    first, same, other = ([whole(silo) for silo in deal(rows, None, config(kind, seed=seed))] for seed in (3, 3, 4))
    assert first == same
    assert first != other


def test_natural_silos_are_the_largest_ones_whole() -> None:
    sizes = {"a": 30, "b": 5, "c": 20, "d": 10}
    rows = [{"id": f"{name}{i}", "text": "x" * 10, "label": name} for name, size in sizes.items() for i in range(size)]
    silos = deal(rows, None, config("natural", count=3))
    assert [silo.name for silo in silos] == ["a", "c", "d"]
    for silo in silos:
        assert {row["label"] for part in (silo.train, silo.tune, silo.test) for row in part} == {silo.name}
        assert len(whole(silo)) == sizes[silo.name]


def test_iid_sizes_differ_by_one_at_most() -> None:
    sizes = [len(whole(silo)) for silo in deal(made_rows(101), None, config("iid", count=7))]
    assert max(sizes) - min(sizes) <= 1


def test_shards_give_each_client_few_classes() -> None:
    rows = [{"id": i, "text": "x", "label": f"c{i // 50}"} for i in range(400)]
    silos = deal(rows, None, config("shards", count=8))
    for silo in silos:
        classes = {rows[i]["label"] for i in whole(silo)}
        # Two shards of 25 rows, each inside one class of 50.
        assert len(classes) <= 2
        assert len(whole(silo)) == 50


def spread(silos: Sequence[Silo], rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean over clients of the largest class's share."""
    shares = []
    for silo in silos:
        counts = Counter(rows[i]["label"] for i in whole(silo))
        shares.append(max(counts.values()) / sum(counts.values()))
    return float(np.mean(shares))


def test_a_small_concentration_is_more_skewed() -> None:
    rows = made_rows(2000)
    skewed = spread(deal(rows, None, config("dirichlet", alpha=0.3)), rows)
    flat = spread(deal(rows, None, config("dirichlet", alpha=1000.0)), rows)
    # Eight classes: an even mix has its largest share near 1/8.
    assert flat < 0.2 < 0.35 < skewed


def test_dirichlet_shares_have_the_published_mean() -> None:
    # E[share] = 1/K for every client (Hsu et al. 2019, arXiv:1909.06335), so sizes average n/K over seeds.
    rows = made_rows(400)
    sizes = np.array(
        [[len(whole(s)) for s in deal(rows, None, config("dirichlet", count=4, seed=seed))] for seed in range(40)]
    )
    assert sizes.sum(axis=1).tolist() == [400] * 40
    assert np.allclose(sizes.mean(axis=0), 100, atol=20)


@pytest.mark.parametrize("kind", ["dirichlet", "natural", "shards"])
def test_a_test_file_is_dealt_in_the_training_proportions(kind: str) -> None:
    rows = made_rows(800)
    tests = [{**row, "id": 10_000 + row["id"]} for row in made_rows(400, seed=1)]
    silos = deal(rows, tests, config(kind, holdout="test.csv"))
    assert sorted(i for silo in silos for i in ids(silo.test)) == ids(tests)
    assert sorted(i for silo in silos for i in ids(silo.train)) != []
    trained = [Counter(row["label"] for row in [*silo.train, *silo.tune]) for silo in silos]
    tested = [Counter(row["label"] for row in silo.test) for silo in silos]
    for label in {row["label"] for row in rows}:
        share = np.array([counts[label] for counts in trained], float)
        total = sum(counts[label] for counts in tested)
        exact = share / share.sum() * total
        assert np.abs(exact - [counts[label] for counts in tested]).max() < 1.0


def test_a_test_file_leaves_no_training_row_unused() -> None:
    rows, tests = made_rows(80), [{"id": -1 - i, "text": "t", "label": "c0"} for i in range(16)]
    silos = deal(rows, tests, config("iid", count=4, holdout="test.csv"))
    assert sorted(i for silo in silos for i in ids(silo.train) + ids(silo.tune)) == list(range(80))
    assert all(len(silo.test) == 4 for silo in silos)
    assert all(not set(ids(silo.train)) & set(ids(silo.tune)) for silo in silos)


@pytest.mark.parametrize("size", [2, 3, 4, 10, 101])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_split_covers_and_keeps_its_shares(size: int, share: float) -> None:
    rows = made_rows(size)
    train, tune, test = split(rows, share, ["text"])
    assert sorted(ids(train) + ids(tune) + ids(test)) == list(range(size))
    assert len(test) == max(1, int(share * size))
    assert len(train) >= 1
    assert [row["id"] for row in train] == sorted(row["id"] for row in train)


def test_equal_rows_are_still_split_each_once() -> None:
    rows = [{"text": "same"}] * 10
    train, tune, test = split(rows, 0.2, ["text"])
    assert (len(train), len(tune), len(test)) == (6, 2, 2)


def texts_of(silo: Silo) -> list[list[str]]:
    return [[row["text"] for row in part] for part in (silo.train, silo.tune, silo.test)]


def test_columns_that_are_not_read_do_not_change_a_split() -> None:
    # At a site the rows have their text alone; where the rehearsal reads them all, a column says whose they are.
    rows = made_rows(40)
    (silo,) = deal([{**row, "hospital": "north"} for row in rows], None, named("north"))
    alone = split([{"text": row["text"]} for row in rows], 0.1, ["text"])
    assert texts_of(silo) == [[row["text"] for row in part] for part in alone]


def test_rows_of_the_standard_library_are_known_by_their_package_too() -> None:
    # Published figures are of this split.
    rows = [{"text": row["text"], "silo": row["label"]} for row in made_rows(40, classes=1)]
    wanted = named("c0")
    wanted.partition.column, wanted.data.source = "silo", "stdlib"
    (silo,) = deal(rows, None, wanted)
    parts = split(rows, 0.1, ["silo", "text"])
    assert texts_of(silo) == [[row["text"] for row in part] for part in parts]
    assert texts_of(silo) != [[row["text"] for row in part] for part in split(rows, 0.1, ["text"])]


def named(*names: str) -> Config:
    made = config("natural", count=len(names))
    made.data.source, made.partition.column, made.clients.names = "all.jsonl", "hospital", list(names)
    return made


def test_a_silo_goes_to_the_client_of_its_name() -> None:
    sizes = {"north": 3, "south": 9, "west": 6, "east": 20}
    rows = [{"text": f"{name} {i}", "hospital": name} for name, size in sizes.items() for i in range(size)]
    assert [silo.name for silo in deal(rows, None, named("west", "north", "south"))] == ["west", "north", "south"]
    # Names that are no silos say nothing of whose the rows are.
    assert [silo.name for silo in deal(rows, None, named("a", "b"))] == ["east", "south"]


def test_too_few_silos_says_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match=r"clients\.count=8 or less"):
        deal(made_rows(), None, config("natural", count=9))


@pytest.mark.parametrize("kind", ["iid", "shards", "dirichlet"])
def test_an_empty_silo_is_named(kind: str) -> None:
    with pytest.raises(DataError, match=r"silo '\d+' \(client \d+\)"):
        deal(made_rows(6), None, config(kind, count=20))


def test_a_silo_below_min_examples_is_named() -> None:
    wanted = config("iid", count=4)
    wanted.partition.min_examples = 50
    with pytest.raises(DataError, match="at least 50 training rows"):
        deal(made_rows(100), None, wanted)


def test_a_wrong_partition_column_lists_the_columns() -> None:
    wanted = config("natural")
    wanted.partition.column = "hospital"
    with pytest.raises(ConfigError, match="id, label, text"):
        deal(made_rows(), None, wanted)


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 1e6])
def test_extreme_concentrations_lose_no_row(alpha: float) -> None:
    rows = made_rows(64, classes=2)
    try:
        silos = deal(rows, None, config("dirichlet", count=2, alpha=alpha))
    except DataError:
        return  # one client got everything
    assert sorted(i for silo in silos for i in whole(silo)) == list(range(64))
