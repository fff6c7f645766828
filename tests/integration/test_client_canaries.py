"""Canary clients in a client-dp simulation: a right coordinator is estimated near its claim, a wrong one far above."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lamina.audits.client_canaries import ClientCanaries, client_canaries, json_of
from lamina.audits.estimators.one_shot import beyond
from lamina.protos.errors import ConfigError
from lamina.protos.privacy.noise import Stream, noised
from lamina.strategies import central
from tests.runs import small

EPSILON = 8.0


@pytest.fixture
def run(llama: Path, notes: Path, tmp_path: Path) -> Callable[..., ClientCanaries]:
    def played(*words: str, canaries: int = 40) -> ClientCanaries:
        private = ("privacy=client-dp", f"privacy.epsilon={EPSILON:g}", "privacy.force=true", "rounds=4")
        config = small(llama, notes, "strategy=ffa", *private, *words)
        found = client_canaries(config, tmp_path, canaries)
        assert list(tmp_path.iterdir()) == []
        assert found.refused == 0
        return found

    return played


@pytest.mark.parametrize(
    "words",
    [
        ("strategy=ffa",),
        ("strategy=core",),
        ("strategy=alternate",),
        ("adapter.kind=norm",),
    ],
    ids=["ffa", "core", "alternate", "norms"],
)
def test_a_right_coordinator_is_estimated_near_its_claim(
    run: Callable[..., ClientCanaries], words: tuple[str, ...]
) -> None:
    found = run(*words)
    assert 7.9 < found.analytic <= EPSILON
    assert 0.5 * EPSILON < found.found.epsilon < 1.5 * EPSILON
    assert not beyond(found.found, found.analytic)


def test_where_clients_are_sampled_the_estimate_is_below_the_claim(run: Callable[..., ClientCanaries]) -> None:
    """A claim is for a client that chance takes every time, and the estimate for one that it takes as often as it should."""
    found = run("clients.fraction=0.5", "clients.dropout_rate=0.3")
    assert 7.9 < found.analytic <= EPSILON
    assert 0.25 * EPSILON < found.found.epsilon < EPSILON


@pytest.mark.parametrize("strategy", ["ffa", "alternate"])
def test_a_tenth_of_the_noise_is_seen(
    run: Callable[..., ClientCanaries], monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    def little(total: np.ndarray, deviation: float, stream: Stream) -> np.ndarray:
        return noised(total, deviation / 10, stream)

    monkeypatch.setattr(central, "noised", little)
    found = run(f"strategy={strategy}")
    assert found.analytic <= EPSILON  # the ledger knows nothing of it
    assert found.found.epsilon > 2 * found.analytic
    assert beyond(found.found, found.analytic)


def test_clipping_that_is_not_there_is_seen(
    run: Callable[..., ClientCanaries], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(central, "clipping", lambda one, clip_norm: 1.0)
    found = run()
    assert found.found.epsilon > 2 * found.analytic
    assert beyond(found.found, found.analytic)


def test_what_is_written_down(run: Callable[..., ClientCanaries], llama: Path, notes: Path, tmp_path: Path) -> None:
    found = json_of(run(canaries=5))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["canaries"], found["clients"], found["rounds"]) == (5, 3, 4)
    with pytest.raises(ConfigError, match=r"privacy\.mode=client-dp"):
        client_canaries(small(llama, notes), tmp_path)
    nobody = ("privacy=client-dp", "privacy.noise_multiplier=1", "clients.fraction=1e-4", "strategy=ffa")
    with pytest.raises(ConfigError, match=r"Raise clients\.fraction"):
        client_canaries(small(llama, notes, *nobody), tmp_path, 2)
