"""The standard library as a corpus: pieces that give the source back, no repeats, the same hash twice."""

from __future__ import annotations

import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from lamina.protos.errors import DataError
from lamina.simulations.corpora import PACKAGES, corpus_record, pieces, silo_sizes, stdlib_rows

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    "name", ["json/decoder.py", "asyncio/base_events.py", "email/message.py", "logging/__init__.py", "re/_parser.py"]
)
def test_pieces_join_to_the_source(name: str) -> None:
    source = (STDLIB / name).read_text(encoding="utf-8")
    found = pieces(source)
    assert squeezed("".join(found)) == squeezed(source)
    assert all(piece.strip() for piece in found)
    assert all(len(piece) <= 3000 or "\n" not in piece for piece in found)


def test_lines_survive_in_order() -> None:
    source = (STDLIB / "json" / "encoder.py").read_text(encoding="utf-8")
    kept = [line for piece in pieces(source) for line in piece.split("\n") if line.strip()]
    assert kept == [line for line in source.split("\n") if line.strip()]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "\n\n\n",
        "x = 1",
        "def f():\n    pass\n" * 400,
        "a" * 10_000,
        "class A:\n" + "    x = 1\n" * 1000,
        "# only\n# comments\n",
    ],
)
def test_odd_sources_lose_nothing(source: str) -> None:
    assert squeezed("".join(pieces(source))) == squeezed(source)


def test_there_are_ten_silos_and_no_repeats() -> None:
    rows = stdlib_rows()
    assert len(silo_sizes(rows, "silo")) >= 10
    assert set(silo_sizes(rows, "silo")) <= set(PACKAGES)
    assert max(Counter(row["text"] for row in rows).values()) == 1
    for silo, size in list(silo_sizes(rows, "silo").items())[:10]:
        assert size > 40_000, silo


def test_the_corpus_is_the_same_twice() -> None:
    first, second = (corpus_record("stdlib", stdlib_rows(), ["text"]) for _ in range(2))
    assert first == second
    changed = [dict(row) for row in stdlib_rows()]
    changed[5]["text"] += "!"
    assert corpus_record("stdlib", changed, ["text"])["hash"] != first["hash"]


def test_no_test_package_is_in_the_corpus() -> None:
    assert not {"test", "idlelib", "lib2to3"} & {row["silo"] for row in stdlib_rows()}


def test_a_python_without_its_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="library's source"):
        stdlib_rows(tmp_path)
