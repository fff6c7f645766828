"""Who is asked, random streams by name, and files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lamina.protos import files, seeds, words
from lamina.protos.errors import ConfigError
from lamina.server.selection import cohort
from tests.federation import budget, campaign

JOINED = {str(i): 1 for i in range(10)}


def test_everyone_is_asked_at_fraction_one() -> None:
    assert cohort(0, 1, JOINED, 1.0) == sorted(JOINED)


@pytest.mark.parametrize(("fraction", "size"), [(0.5, 5), (0.25, 2), (0.01, 1), (0.99, 10)])
def test_the_size_is_the_fraction(fraction: float, size: int) -> None:
    for number in range(1, 20):
        asked = cohort(3, number, JOINED, fraction)
        assert len(asked) == len(set(asked)) == size
        assert asked == sorted(asked)


def test_rounds_and_seeds_ask_others_and_reproduce() -> None:
    drawn = {(seed, number): tuple(cohort(seed, number, JOINED, 0.5)) for seed in range(3) for number in range(1, 9)}
    assert len(set(drawn.values())) > 15
    assert drawn[(1, 4)] == tuple(cohort(1, 4, JOINED, 0.5))


def test_every_client_is_asked_equally_often() -> None:
    counts = dict.fromkeys(JOINED, 0)
    for number in range(1, 601):
        for client in cohort(0, number, JOINED, 0.3):
            counts[client] += 1
    # Binomial(600, 0.3): mean 180, five standard deviations are 56.
    assert all(abs(count - 180) < 56 for count in counts.values())


def test_nobody_is_asked_before_joining() -> None:
    one = replace(campaign(), budgets=dict.fromkeys("abc", budget(2)), joined={"a": 1, "b": 3, "c": 5})
    assert [cohort(0, number, one.present(number), 1.0) for number in (1, 2, 3, 4, 5)] == [
        ["a"],
        ["a"],
        ["a", "b"],
        ["a", "b"],
        ["a", "b", "c"],
    ]
    assert cohort(0, 1, [], 1.0) == []


def test_streams_depend_on_every_name() -> None:
    names: list[tuple[int, str, object]] = [
        (0, "a", 1),
        (0, "a", 2),
        (0, "b", 1),
        (1, "a", 1),
        (0, "a1", ""),
        (0, "a", 11),
    ]
    first = [seeds.stream(name[0], *name[1:]).random() for name in names]
    assert len(set(first)) == len(first)
    assert seeds.stream(0, "a", 1).random() == first[0]


def test_integers_fit_a_torch_seed_and_are_pinned() -> None:
    drawn = [seeds.integer(0, "x", i) for i in range(200)]
    assert all(0 <= number < 2**63 for number in drawn)
    assert len(set(drawn)) == 200
    # SHA-256 of "0\x1fx\x1f0", first 8 bytes, little endian, halved: the streams must not move between versions.
    import hashlib

    assert drawn[0] == int.from_bytes(hashlib.sha256(b"0\x1fx\x1f0").digest()[:8], "little") >> 1


def test_streams_are_uniform_enough() -> None:
    values = np.array([seeds.stream(0, "u", i).random() for i in range(400)])
    # Mean of 400 uniforms: 0.5 with standard error 1/sqrt(12*400) = 0.0144; five of them.
    assert abs(values.mean() - 0.5) < 0.072


def test_a_file_is_written_whole_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    files.write_atomic(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    files.write_atomic(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert os.listdir(path.parent) == ["b.txt"]


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_atomic(path, "old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_crash_while_writing_a_folder_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "round-0001"
    files.write_folder(folder, {"a": b"1", "b": b"2"})
    written: list[Path] = []
    whole = files.write_atomic

    def crash(path: Path, content: bytes | str) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        whole(path, content)

    monkeypatch.setattr(files, "write_atomic", crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_folder(folder, {"a": b"3", "b": b"4"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"1", "b": b"2"}


def test_a_folder_is_replaced_with_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    files.write_folder(folder, {"a": b"1", "b": b"2"})
    files.write_folder(folder, {"b": b"3"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"b": b"3"}


def test_json_refuses_what_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": math.nan})
    assert not (tmp_path / "a.json").exists()
    files.write_json(tmp_path / "a.json", {"x": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1]}


KEYS = {"output": "", "merge": "false"}


def test_words_split_into_plain_ones_and_settings() -> None:
    assert words.parsed(["run", "output=a=b", "merge=true"], KEYS) == (["run"], {"output": "a=b", "merge": "true"})
    assert words.parsed(["runs/seed=1"], KEYS) == (["runs/seed=1"], KEYS)


@pytest.mark.parametrize(("word", "hint"), [("outptu=x", "output"), ("--merge", "merge"), ("zzz=1", "Known")])
def test_an_unknown_word_names_the_nearest(word: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        words.parsed([word], KEYS)


def test_a_flag_is_true_or_false() -> None:
    assert words.flag({"merge": "True"}, "merge")
    assert not words.flag({"merge": "false"}, "merge")
    with pytest.raises(ConfigError, match="true or false"):
        words.flag({"merge": "yes"}, "merge")
