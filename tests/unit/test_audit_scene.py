"""Whose rows a deployment's audit is given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lamina.audits.scene import _check_rows
from lamina.client.data import Example
from lamina.protos.errors import ConfigError


def example(length: int, label: int = -1) -> Example:
    targets = np.arange(length) > 0
    return Example(np.arange(length, dtype=np.int32), targets, label=label)


def run(figures: Any) -> Any:
    config = SimpleNamespace(data=SimpleNamespace(source="notes.jsonl"))
    return SimpleNamespace(path=Path("run"), config=config, summary={"eval": figures})


def test_rows_of_another_size_than_the_site_measured_on_are_refused() -> None:
    told = run({"per_client": {"north": {"tokens": 11}}})
    _check_rows(told, "north", [example(5), example(8)])
    with pytest.raises(ConfigError, match=r"11 targets, data\.source=notes\.jsonl holds out 12"):
        _check_rows(told, "north", [example(5), example(9)])


def test_a_classifiers_targets_are_its_examples() -> None:
    told = run({"per_client": {"north": {"tokens": 2}}})
    _check_rows(told, "north", [example(5, 0), example(8, 1)])
    with pytest.raises(ConfigError, match="2 targets"):
        _check_rows(told, "north", [example(5, 0)])


@pytest.mark.parametrize("figures", [None, {}, {"per_client": {}}, {"per_client": {"south": {"tokens": 3}}}])
def test_a_site_that_measured_nothing_is_taken_at_its_word(figures: Any) -> None:
    _check_rows(run(figures), "north", [example(5)])
