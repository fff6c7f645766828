"""Membership attacks on small models: powerful where an adapter was overfitted, and blind where there is nothing to see."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lamina.audits.membership import attacks, shadows
from lamina.audits.membership.attacks import attack, strangers
from lamina.audits.membership.shadows import Settings, put_trained
from lamina.audits.membership.statistics import measured
from lamina.client.data import Example
from lamina.client.evaluate import score
from lamina.client.loading import BaseOptions, load_base
from lamina.client.losses import collate
from lamina.client.model import Base, put, take
from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.config import TrainConfig
from lamina.protos.errors import ConfigError, DataError, TrainingError
from tests.scores import auc
from tests.texts import LABELS

TRAIN = TrainConfig(batch_size=8, learning_rate=0.02, schedule="constant")
SETTINGS = Settings(TRAIN, shadows=2, passes=12)


@pytest.fixture(scope="module")
def base(llama: Path) -> Base:
    return load_base(BaseOptions(str(llama), device="cpu"))


@pytest.fixture(scope="module")
def classifier(bert: Path) -> Base:
    options = BaseOptions(str(bert), task="sequence-classification", labels=LABELS, device="cpu")
    return load_base(options)


def texts(count: int, seed: int = 0, label: bool = False) -> list[Example]:
    """Random words of 6 to 12 tokens; with a random label, which can only be learnt by heart."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens = rng.integers(2, 1000, int(rng.integers(6, 13))).astype(np.int32)
        targets = np.zeros(len(tokens), bool) if label else np.arange(len(tokens)) > 0
        made.append(Example(tokens, targets, int(rng.integers(3)) if label else -1))
    return made


def overfitted(base: Base, examples: list[Example], passes: float = 12) -> Adapter:
    put_trained(base, examples, replace(SETTINGS, passes=passes, seed=7), "target", lambda done: None)
    return take(base)


@pytest.fixture(scope="module")
def groups() -> tuple[list[Example], list[Example]]:
    some = texts(96)
    return some[:48], some[48:]


@pytest.fixture(scope="module")
def adapter(base: Base, groups: tuple[list[Example], list[Example]]) -> Adapter:
    return overfitted(base, groups[0])


def test_statistics_are_those_of_each_example_alone(base: Base, adapter: Adapter) -> None:
    """Padding, batches and pieces change nothing; Min-K%++ written out, in float64 from the logits."""
    some = texts(5, seed=3)
    put(base, adapter, None, trainable=False)
    found = measured(base, some, batch_size=3)
    for number, example in enumerate(some):
        batch = collate([example], 1, base.device)
        with torch.no_grad():
            logs = base.model(input_ids=batch.tokens).logits[0].double().log_softmax(-1).numpy()
        wanted = [float(logs[at - 1, token]) for at, token in enumerate(example.tokens) if at]
        means = [float(np.sum(np.exp(row) * row)) for row in logs[:-1]]
        spreads = [math.sqrt(float(np.sum(np.exp(row) * row**2)) - m**2) for row, m in zip(logs, means, strict=False)]
        standard = sorted((w - m) / s for w, m, s in zip(wanted, means, spreads, strict=True))
        lowest = standard[: max(1, len(standard) // 5)]
        loss = -float(np.mean(wanted))
        assert found.loss[number] == pytest.approx(loss, abs=1e-5)
        assert found.loss[number] == pytest.approx(score(base, [example], 1).loss, abs=1e-5)
        assert found.min_k[number] == pytest.approx(float(np.mean(lowest)), abs=1e-4)
        likely = math.exp(-loss)
        assert found.confidence[number] == pytest.approx(math.log(likely / (1 - likely)), abs=1e-4)
    assert np.isnan(found.margin).all()


def test_statistics_without_a_head_that_splits(base: Base, adapter: Adapter) -> None:
    put(base, adapter, None, trainable=False)
    whole = measured(replace(base, split_head=not base.split_head), texts(5), 3)
    for one, other in zip(vars(measured(base, texts(5), 3)).values(), vars(whole).values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_statistics_of_a_classifier(classifier: Base) -> None:
    some = texts(6, label=True)
    put(classifier, EMPTY, None, trainable=False)
    found = measured(classifier, some, batch_size=4)
    for number, example in enumerate(some):
        batch = collate([example], 1, classifier.device)
        with torch.no_grad():
            logits = classifier.model(input_ids=batch.tokens).logits[0].double().numpy()
        likely = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        p, others = likely[example.label], np.delete(logits, example.label)
        assert found.loss[number] == pytest.approx(-math.log(p), abs=1e-5)
        assert found.confidence[number] == pytest.approx(math.log(p / (1 - p)), abs=1e-4)
        assert found.margin[number] == pytest.approx(logits[example.label] - others.max(), abs=1e-5)
    assert np.isnan(found.min_k).all()


def test_an_overfitted_adapter_gives_its_members_away(
    base: Base, adapter: Adapter, groups: tuple[list[Example], list[Example]]
) -> None:
    found = attack(base, adapter, *groups, SETTINGS)
    assert set(found) == {"loss", "calibrated", "min-k++", "min-k++ calibrated", "rmia", "lira"}
    areas = {name: auc(scores.members, scores.others) for name, scores in found.items()}
    assert areas["calibrated"] > 0.95
    assert areas["rmia"] > 0.95
    assert areas["lira"] > 0.95
    assert areas["loss"] > 0.8
    assert areas["min-k++ calibrated"] > 0.8


def test_four_shadows_see_it_too(base: Base, adapter: Adapter, groups: tuple[list[Example], list[Example]]) -> None:
    found = attack(base, adapter, *groups, replace(SETTINGS, shadows=4))
    for name in ("rmia", "lira"):
        assert auc(found[name].members, found[name].others) > 0.95


def test_an_overfitted_classifier_gives_its_members_away(classifier: Base) -> None:
    some = texts(48, seed=4, label=True)
    by_heart = replace(SETTINGS, train=replace(TRAIN, learning_rate=0.005), passes=150, rank=16)
    put_trained(classifier, some[:24], replace(by_heart, seed=7), "target", lambda done: None)
    adapter = take(classifier)
    found = attack(classifier, adapter, some[:24], some[24:], by_heart)
    assert set(found) == {"loss", "calibrated", "margin", "rmia", "lira"}
    for name, scores in found.items():
        assert auc(scores.members, scores.others) > 0.9, name


def test_an_adapter_of_zero_gives_nobody_away(base: Base, groups: tuple[list[Example], list[Example]]) -> None:
    found = attack(base, EMPTY, *groups, SETTINGS)
    for name in ("calibrated", "min-k++ calibrated"):
        assert not np.concatenate([found[name].members, found[name].others]).any()
    for name in ("loss", "min-k++", "rmia", "lira"):
        # 48 against 48: a deviation of 0.059.
        assert 0.3 < auc(found[name].members, found[name].others) < 0.7, name


def test_members_that_could_as_well_be_others_are_not_told_apart(base: Base) -> None:
    """The adapter was trained on neither group: what shadows were trained on must say nothing of the groups."""
    adapter = overfitted(base, texts(48, seed=9))
    areas: dict[str, list[float]] = {}
    for seed in range(4):
        some = texts(96, seed=20 + seed)
        found = attack(base, adapter, some[:48], some[48:], replace(SETTINGS, passes=4, seed=seed))
        for name, scores in found.items():
            areas.setdefault(name, []).append(auc(scores.members, scores.others))
    for name, some_areas in areas.items():
        assert abs(np.mean(some_areas) - 0.5) < 0.09, name  # 3 deviations of the mean of four


def test_what_an_example_scores_does_not_depend_on_its_group_or_place(
    base: Base, adapter: Adapter, groups: tuple[list[Example], list[Example]]
) -> None:
    few = replace(SETTINGS, passes=1)
    members, others = groups[0][:12], groups[1][:8]
    first = attack(base, adapter, members, others, few)
    swapped = attack(base, adapter, others[::-1], members, few)
    for name, scores in first.items():
        assert scores.members.tobytes() == swapped[name].others.tobytes(), name
        assert scores.others.tobytes() == swapped[name].members[::-1].tobytes(), name


def test_shadows_are_kept_and_taken_up_again(
    base: Base,
    adapter: Adapter,
    groups: tuple[list[Example], list[Example]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = replace(SETTINGS, passes=1)
    members, others = groups[0][:12], groups[1][:8]
    told: list[tuple[int, int]] = []
    first = attack(base, adapter, members, others, few, lambda done, of: told.append((done, of)), tmp_path)
    # 20 examples, halves of 10, two steps of 8 for each shadow.
    assert told == [(1, 4), (2, 4), (2, 4), (3, 4), (4, 4), (4, 4)]
    trained: list[str] = []
    real = put_trained

    def counted(base: Base, examples: list[Example], settings: Settings, name: str, progress: object) -> None:
        trained.append(name)
        real(base, examples, settings, name, lambda done: None)

    monkeypatch.setattr(shadows, "put_trained", counted)
    (tmp_path / "shadow-001.json").write_text('{"of": "')  # a file that is torn
    again = attack(base, adapter, members, others, few, folder=tmp_path)
    assert trained == ["shadow-1"]
    for name, scores in first.items():
        assert scores.members.tobytes() == again[name].members.tobytes(), name
    for other in (replace(few, seed=1), replace(few, train=replace(TRAIN, learning_rate=0.01))):
        trained.clear()
        attack(base, adapter, members, others, other, folder=tmp_path)
        assert trained == ["shadow-0", "shadow-1"]
    trained.clear()
    attack(base, adapter, members, others[:-1], other, folder=tmp_path)
    assert trained == ["shadow-0", "shadow-1"]
    kept = "".join(path.read_text() for path in tmp_path.iterdir())
    assert str(members[0].tokens[0]) not in kept.replace(".", " ").split()


def test_shadows_do_not_depend_on_the_audited_adapter(
    base: Base, adapter: Adapter, groups: tuple[list[Example], list[Example]], tmp_path: Path
) -> None:
    few = replace(SETTINGS, passes=1)
    for number, one in enumerate((adapter, EMPTY)):
        attack(base, one, groups[0][:12], groups[1][:8], few, folder=tmp_path / str(number))
    for name in ("shadow-000.json", "shadow-001.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_it_is_refused_without_examples_or_finite_losses(
    base: Base, adapter: Adapter, groups: tuple[list[Example], list[Example]]
) -> None:
    with pytest.raises(DataError, match="members and others"):
        attack(base, adapter, [], groups[1], SETTINGS)
    with pytest.raises(DataError, match="members and others"):
        attack(base, adapter, groups[0], [], SETTINGS)
    with pytest.raises(DataError, match="got none"):
        measured(base, [], 8)
    with pytest.raises(ConfigError, match="even number"):
        attack(base, adapter, *groups, replace(SETTINGS, shadows=3))
    broken = {name: replace(factors, B=np.full_like(factors.B, np.nan)) for name, factors in adapter.lora.items()}
    with pytest.raises(TrainingError, match="finite"):
        attack(base, Adapter(broken), *groups, SETTINGS)


def test_attacks_without_shadows(base: Base, adapter: Adapter, groups: tuple[list[Example], list[Example]]) -> None:
    found = attack(base, adapter, *groups, replace(SETTINGS, shadows=0))
    assert set(found) == {"loss", "calibrated", "min-k++", "min-k++ calibrated"}
    assert attacks.PRIMARY in found
    assert all(scores.needs for scores in found.values())


def test_strangers_are_not_among_the_members() -> None:
    some = texts(4)
    moved = replace(some[1], row=9, user="someone")
    assert strangers(some[:2], [moved, some[2], some[3], some[2]]) == [some[2], some[3]]
    labelled = replace(some[1], label=2)
    assert strangers(some[:2], [labelled]) == [labelled]
