"""Mistakes in a private mechanism, planted in the code that clients train with, are each found; the right one passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lamina.audits import audit, document, scene
from lamina.audits.audit import Work
from lamina.audits.mechanism import Check, figures, happened_in
from lamina.audits.scene import Scene
from lamina.audits.telling import Telling
from lamina.audits.verdict import verdict
from lamina.audits.witness import Seen, largest_correlation
from lamina.client.private import clipper, sampling, train
from lamina.protos.privacy import accounting, mechanism, noise
from lamina.protos.privacy.events import Event
from lamina.protos.privacy.mechanism import Mechanism
from lamina.server import spending
from lamina.simulations import private
from tests import audits
from tests.runs import Quiet

Plant = Callable[[pytest.MonkeyPatch], None]


def _checks(found: Scene, folder: Path) -> dict[str, Check]:
    work = Work(found, audits.sizes(), folder, Telling(Console(quiet=True), 1))
    result, _ = audit._mechanism(work, lambda done, of: None)
    assert result is not None
    return {one["name"]: Check(**one) for one in result["checks"]}


def _none(patch: pytest.MonkeyPatch) -> None:
    pass


def _little_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(train, "noised", lambda total, deviation, stream: noise.noised(total, 0.05 * deviation, stream))


def _no_clipping(patch: pytest.MonkeyPatch) -> None:
    add = clipper.add
    patch.setattr(clipper, "add", lambda found, sheet, units, goes_on, clip: add(found, sheet, units, goes_on, 1e9))


def _clipped_by_row_not_by_unit_sum(patch: pytest.MonkeyPatch) -> None:
    """Twice the bound: as if two units were let through as one."""
    add = clipper.add
    patch.setattr(
        clipper, "add", lambda found, sheet, units, goes_on, clip: add(found, sheet, units, goes_on, 2 * clip)
    )


def _clipped_by_row(patch: pytest.MonkeyPatch) -> None:
    """Each row of a user by itself."""
    add = clipper.add

    def rows(found: Any, sheet: Any, units: Sequence[int], goes_on: bool, clip: float) -> Any:
        return add(found, sheet, range(len(units)), False, clip)

    patch.setattr(clipper, "add", rows)


def _drawn_twice_as_often(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        train, "drawn", lambda units, rate, most, stream: sampling.drawn(units, min(1, 2 * rate), most, stream)
    )


def _always_as_many(patch: pytest.MonkeyPatch) -> None:
    """A batch of one size, drawn without replacement, as loaders of data do."""

    def drawn(units: Any, rate: float, most: int, stream: Any) -> Any:
        chosen = np.argsort(stream.uniform(len(units)))[: max(1, round(rate * len(units)))]
        return sampling.drawn([units[int(index)] for index in chosen], 1.0, most, stream)

    patch.setattr(train, "drawn", drawn)


def _always_the_same(patch: pytest.MonkeyPatch) -> None:
    def drawn(units: Any, rate: float, most: int, stream: Any) -> Any:
        return sampling.drawn(units, rate, most, noise.seeded(0))

    patch.setattr(train, "drawn", drawn)


def _claims_half_the_rate(patch: pytest.MonkeyPatch) -> None:
    event = Mechanism.event
    patch.setattr(Mechanism, "event", lambda own, *of: replace(event(own, *of), sample_rate=own.sample_rate / 2))


def _same_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(private, "seeded", lambda seed, purpose, client, number: noise.seeded(seed, purpose, number))


def _noise_begins_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(private, "seeded", lambda seed, purpose, client, number: noise.seeded(seed, purpose, client))


def _no_noise_in_one_step(patch: pytest.MonkeyPatch) -> None:
    calls, give = [], train._give_gradients

    def forgetful(parameters: Any, total: Any, mechanism: Any, stream: Any) -> None:
        calls.append(1)
        little = 1e-3 if len(calls) == 2 else 1.0
        give(parameters, total, replace(mechanism, noise_multiplier=little * mechanism.noise_multiplier), stream)

    patch.setattr(train, "_give_gradients", forgetful)


def _no_noise_on_one_parameter(patch: pytest.MonkeyPatch) -> None:
    give = train._give_gradients

    def forgetful(parameters: Any, total: Any, mechanism: Any, stream: Any) -> None:
        give(parameters, total, mechanism, stream)
        next(iter(parameters.values())).grad *= 1e-3

    patch.setattr(train, "_give_gradients", forgetful)


def _accountant_reset(patch: pytest.MonkeyPatch) -> None:
    """Only the last round counts."""
    patch.setattr(spending, "epsilon", lambda events, delta: accounting.epsilon(list(events)[-1:], delta))


def _calibrated_by_round(patch: pytest.MonkeyPatch) -> None:
    """Noise for one round where there are two, and a cost that believes it."""
    patch.setattr(mechanism, "noise_for", lambda *of: accounting.noise_for(of[0], of[1], of[2], of[3] // 2))

    def half(events: Sequence[Event], delta: float) -> float:
        return accounting.epsilon([replace(one, steps=one.steps // 2) for one in events], delta)

    patch.setattr(mechanism, "epsilon", half)


def _a_little_less_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(train, "noised", lambda total, deviation, stream: noise.noised(total, 0.97 * deviation, stream))


def _more_is_sent(patch: pytest.MonkeyPatch) -> None:
    """What was trained is moved once more before it is sent."""
    trained = train.train_privately

    def moved(base: Any, *of: Any) -> Any:
        found = trained(base, *of)
        for parameter in base.model.parameters():
            if parameter.requires_grad:
                parameter.data += 1e-3
        return found

    patch.setattr("lamina.client.participant.train_privately", moved)


PLANTS: Mapping[str, tuple[Plant, str]] = {
    "noise x 0.97": (_a_little_less_noise, "noise alone"),
    "an update that is moved after training": (_more_is_sent, "update"),
    "noise x 0.05": (_little_noise, "noise, noise alone"),
    "no noise in one step": (_no_noise_in_one_step, "noise"),
    "no noise on one parameter": (_no_noise_on_one_parameter, "noise"),
    "clipping removed": (_no_clipping, "sensitivity"),
    "clipped at twice the bound": (_clipped_by_row_not_by_unit_sum, "sensitivity"),
    "same noise at every client": (_same_noise, "independence"),
    "the same noise in every round": (_noise_begins_again, "independence"),
    "drawn twice as often": (_drawn_twice_as_often, "sampling"),
    "batches of one size": (_always_as_many, "sensitivity, sampling"),
    "always the same records": (_always_the_same, "sensitivity, sampling"),
    "half the rate in the events": (_claims_half_the_rate, "sampling"),
    "accountant reset every round": (_accountant_reset, "accounting"),
    "noise calibrated for one round": (_calibrated_by_round, "accounting"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_mistake_is_found(
    name: str, llama: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, check = PLANTS[name]
    plant(monkeypatch)
    found = audits.campaign(audits.small(llama, notes, *audits.PRIVATE), tmp_path)
    checks = _checks(found, tmp_path)
    assert ", ".join(one.name for one in checks.values() if one.holds is False) == check
    word, reasons = verdict(document.claim(found), list(checks.values()), None)
    assert word == "violated"
    assert [reason.split(":")[0] for reason in reasons] == check.split(", ")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("strategy=core",),
        ("strategy=stack", "wire.format=bf16"),
        ("strategy=ffa", "privacy.secagg=true", "clients.count=3"),
    ],
)
def test_a_right_mechanism_passes(words: Sequence[str], llama: Path, notes: Path, tmp_path: Path) -> None:
    found = audits.campaign(audits.small(llama, notes, *audits.PRIVATE, *words), tmp_path)
    checks = _checks(found, tmp_path)
    assert set(checks) == {
        "accounting", "noise", "independence", "update", "figures", "noise alone", "sensitivity", "sampling",
    }  # fmt: skip
    summed = "privacy.secagg=true" in words
    assert [one.name for one in checks.values() if not one.holds] == (["update"] if summed else []), checks
    assert checks["update"].holds is (None if summed else True)
    assert verdict(document.claim(found), list(checks.values()), None)[0] == "under-powered"


@pytest.mark.parametrize(("plant", "check"), [(_clipped_by_row, "sensitivity"), (_drawn_twice_as_often, "sampling")])
def test_a_planted_mistake_with_users_is_found(
    plant: Plant, check: str, llama: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("privacy.unit=user", "data.user_column=silo", "privacy.user_rows=3", "privacy.delta=1e-3")
    config = audits.small(llama, notes, *audits.PRIVATE, *words, "train.batch_size=2")
    found = audits.campaign(config, tmp_path)
    assert all(one.holds for one in _checks(found, tmp_path).values())
    plant(monkeypatch)
    assert [one.name for one in _checks(found, tmp_path).values() if one.holds is False] == [check]


def test_data_that_are_alike_in_every_step_are_no_noise_used_twice(llama: Path, notes: Path, tmp_path: Path) -> None:
    """Little noise over gradients that all point one way: the largest claim, clipping that always bites, and few numbers."""
    words = ("privacy.epsilon=64", "clients.ranks=1", "train.batch_size=16", "train.max_grad_norm=0.001")
    found = audits.campaign(audits.small(llama, notes, *audits.PRIVATE, *words), tmp_path)
    assert all(one.holds for one in _checks(found, tmp_path).values())


def test_the_data_account_for_no_more_of_a_correlation_than_they_can() -> None:
    rng = np.random.default_rng(0)
    data, noise_of_both = rng.normal(size=4096), rng.normal(size=(2, 4096))

    def excess(first: np.ndarray, second: np.ndarray) -> float:
        none = np.zeros(0)
        steps = (first, second)
        seen = [Seen("0", 1, step, none.astype(int), none, one.astype(np.float32)) for step, one in enumerate(steps)]
        return largest_correlation(seen, {"0": 1.0})[0]

    for size in (0.0, 0.5, 1.0, 10.0):  # correlations of 0, 0.2, 0.5 and 0.99
        assert excess(size * data + noise_of_both[0], size * data + noise_of_both[1]) < 0.1
    assert excess(0.5 * data + noise_of_both[0], 0.5 * data + noise_of_both[0]) > 0.7
    assert excess(noise_of_both[0], noise_of_both[1] - noise_of_both[0]) > 0.6


def test_coins_cannot_be_read_off_public_numbers(llama: Path, notes: Path, tmp_path: Path) -> None:
    """Rate, denominator and noise count every canary that was dealt, in or out."""
    found = audits.campaign(audits.small(llama, notes, *audits.PRIVATE), tmp_path)
    assert found.private is not None
    for client, one in found.private.items():
        dealt = sum(some.clients.count(client) for some in found.canaries)
        assert one.nominal == 8 + dealt
        inside = sum(
            bool(coin)
            for some in found.canaries
            for coin, owner in zip(some.included, some.clients, strict=True)
            if owner == client
        )
        assert len({example.row for example in found.prepared.train[client]}) == 8 + inside


def test_a_campaign_that_was_broken_off_goes_on(llama: Path, notes: Path, tmp_path: Path) -> None:
    config = audits.small(llama, notes, *audits.PRIVATE)
    whole = audits.campaign(config, tmp_path / "whole")

    class Stop(Exception):
        pass

    class Interrupted(Quiet):
        def completed(self, completed: Any) -> None:
            if completed.state.round == 1:
                raise Stop

    with pytest.raises(Stop):
        scene.campaign(audits.sizes(), config, tmp_path / "broken", Interrupted())
    again = audits.campaign(config, tmp_path / "broken")
    assert again.run.hashes()["adapter"] == whole.run.hashes()["adapter"]
    assert whole.seen is not None
    assert again.seen is not None
    assert [(one.client, one.round, one.step) for one in again.seen] == [
        (one.client, one.round, one.step) for one in whole.seen
    ]
    assert all(_checks(again, tmp_path)[name].holds for name in ("noise", "independence", "accounting"))


def test_steps_that_no_event_counts_are_counted() -> None:
    event = {"client_id": "0", "round": 1, "noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 3, "clip": 1.0}
    central = {**event, "client_id": "", "steps": 1}

    def steps(rounds: Mapping[str, int], seen: list[Seen] | None = None) -> dict[str, int]:
        found = happened_in([event, central], seen, 3, rounds)
        return {client: sum(one.steps for one in some) for client, some in found.items()}

    assert steps({"0": 1, "": 1}) == {"0": 3, "": 1}
    assert steps({"0": 4, "": 4}) == {"0": 12, "": 4}
    nothing = np.zeros(0)
    looked = [Seen("0", 1, step, nothing.astype(int), nothing, nothing.astype(np.float32)) for step in range(5)]
    assert steps({"0": 1, "": 1}, looked) == {"0": 5, "": 1}


def test_a_training_loss_under_privacy_is_found() -> None:
    quiet: list[Mapping[str, Any]] = [{"round": 1, "train_loss": None}, {"round": 2}]
    assert figures(quiet).holds
    assert figures([*quiet, {"round": 3, "train_loss": 2.5}]).holds is False
